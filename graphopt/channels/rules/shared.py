"""What the rules share: aligning and tying axes, and reading a node's axes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.tying import Axis, Tying

SMALL = 64  # axes, sizes, pads: never data


def align(t: Tying, inputs: Sequence[ir.Value], output: ir.Value) -> list[tuple[Axis, list[Axis], int]]:
    """Each axis of a broadcast output: the input axes that run along it, and how many inputs are repeated along it."""
    rank = t.rank(output)
    ranks = {value: t.rank(value) for value in inputs}
    aligned: list[tuple[Axis, list[Axis], int]] = []
    for axis in range(rank):
        running: list[Axis] = []
        for value in inputs:
            place = axis - (rank - ranks[value])
            if place >= 0 and t.size((value, place)) != 1:
                running.append((value, place))
            elif place >= 0:
                t.free((value, place))
        aligned.append(((output, axis), running, len(inputs) - len(running)))
    return aligned


def present(node: ir.Node, start: int = 0, end: int | None = None) -> list[ir.Value]:
    return [value for value in node.inputs[start:end] if value is not None]


def tie_all(t: Tying, axis: Axis, running: Sequence[Axis]) -> None:
    if not running:
        t.free(axis)
    for other in running:
        t.tie(axis, other)


def same(t: Tying, one: ir.Value, other: ir.Value, *, but: Sequence[int] = ()) -> None:
    """Tie each axis of a value to that of another."""
    for axis in range(t.rank(one)):
        if axis not in but:
            t.tie((one, axis), (other, axis))


def has_axes(node: ir.Node) -> bool:
    return "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)


def axes_of(node: ir.Node, index: int) -> list[int] | None:
    """The axes in a node's attribute, or in the constant at an input; None where there are none or they vary."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else [int(a) for a in attribute.as_ints()]
    array = graphs.constant_array(node.inputs[index], limit=SMALL) if len(node.inputs) > index else None
    return None if array is None else [int(a) for a in array.reshape(-1)]
