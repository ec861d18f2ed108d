"""Recurrent layers, whose batch is an axis inside."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import Lifted
from graphopt.bundles.samples.rules.shared import integer
from graphopt.bundles.samples.rules.table import rule

_LENGTHS, _STATES = 4, (5, 6)


@rule("LSTM", "GRU", "RNN")
def _recurrent(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    """[steps, batch, in], with states [directions, batch, hidden]; with ``layout`` the batch is in front."""
    axis = 0 if integer(t, node, "layout", 0) else 1
    batch = {0: axis, _LENGTHS: 0, **dict.fromkeys(_STATES, axis)}
    values: list[ir.Value | None] = []
    for index, given in enumerate(t.inputs(node)):
        if given is None:
            values.append(None)
        elif index in batch:
            values.append(t.along(given, batch[index]))
        elif given.place is None:
            values.append(given.value)
        else:
            t.refuse(f"its input {index} differs by sample")
    made = t.again(node, values)
    places = (2, 1, 1) if axis else (0, 0, 0)
    return [t.result(node, value, place, index) for index, (value, place) in enumerate(zip(made, places, strict=False))]
