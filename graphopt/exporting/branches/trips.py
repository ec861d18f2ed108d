"""Loops that turn as often as a tensor says: by conditions that can be forced, or by their trip count alone.

`sinking` gives such a Loop both. While its decisions are forced the count must not end it; in the file that is written
the count alone does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

COUNTED = "graphopt_counted"  # in the metadata of a Loop: its trip count is a tensor that its conditions repeat


def free_trips(model: ir.Model) -> None:
    """Leave it to the conditions of counted Loops how often they turn, in place."""
    for node in _counted(model):
        node.replace_input_with(0, None)


def settle_trips(model: ir.Model) -> None:
    """Leave it to the trip count of counted Loops how often they turn, in place: it is no condition any more."""
    always: ir.Value | None = None
    for node in _counted(model):
        count, body = node.inputs[0], node.attributes["body"].as_graph()
        if always is None:
            always = ir.Value(
                name=f"{node.name}_always",
                type=ir.TensorType(ir.DataType.BOOL),
                shape=ir.Shape([]),
                const_value=ir.tensor(np.array(True), name=f"{node.name}_always"),
            )
            model.graph.register_initializer(always)
        if _asks_for(count, node.inputs[1]):
            node.replace_input_with(1, always)
        for decide in [inner for inner in body if inner.op_type == "Decide"]:
            if _asks_for(count, decide.outputs[0]):
                decide.replace_input_with(0, always)
        del node.metadata_props[COUNTED]


def _counted(model: ir.Model) -> Iterator[ir.Node]:
    return iter([node for node in model.graph.all_nodes() if COUNTED in node.metadata_props])


def _asks_for(count: ir.Value | None, truth: ir.Value | None) -> bool:
    """Whether ``truth`` is a decision of whether ``count`` is more than something."""
    decide = truth.producer() if truth is not None else None
    condition = decide.inputs[0] if decide is not None and decide.op_type == "Decide" else None
    greater = condition.producer() if condition is not None else None
    return greater is not None and greater.op_type == "Greater" and greater.inputs[0] is count
