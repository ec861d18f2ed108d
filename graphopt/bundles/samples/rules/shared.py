"""What the rules share: operands that must be the same for all samples, axes, broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import STACKED, Lifted
from graphopt.matching import int_attribute


def operand(t: Lift, node: ir.Node, index: int) -> Lifted:
    """An input that must be there."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        t.refuse(f"its input {index} is missing")
    return t.of(value)


def others(t: Lift, node: ir.Node, first: int = 1) -> list[ir.Value | None]:
    """The inputs from one on, which must be the same for all samples."""
    made: list[ir.Value | None] = []
    for index, given in enumerate(t.inputs(node)[first:], first):
        if given is not None and given.place is not None:
            t.refuse(f"its input {index} differs by sample")
        made.append(None if given is None else given.value)
    return made


def integer(t: Lift, node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    number = int_attribute(node, name, default)
    if number is None:
        t.refuse(f"its attribute '{name}' belongs to a function")
    return number


def axes_of(t: Lift, node: ir.Node, rank: int, index: int = 1) -> list[int] | None:
    """The axes in the attribute or the constant input of a node, counted from the front; None where there are none."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [axis % rank for axis in attribute.as_ints()]
    if len(node.inputs) <= index or node.inputs[index] is None:
        return None
    found = t.constant(node.inputs[index])
    if found is None:
        t.refuse("its axes are not constant")
    return [int(axis) % rank for axis in found.reshape(-1)]


def one_axis(
    t: Lift, node: ir.Node, axis: int, *, kept: bool = True, before: bool = False, rest: int = 1
) -> Sequence[Lifted]:
    """An operator that works along one axis of its first input, and sample by sample along any other.

    Args:
        t, node: The node.
        axis: Its attribute ``axis``.
        kept: Whether the results still have that axis.
        before: Whether it works along all axes from that one on.
        rest: The inputs from this one on must be the same for all samples.
    """
    given = operand(t, node, 0)
    more = others(t, node, rest)
    axis %= given.rank
    place = given.place
    if place is not None and place != STACKED and (place < axis if before else place != axis):
        return t.same_results(node, [given.value, *more], place if kept or place < axis else place - 1)
    return t.same_results(node, [t.stacked(given), *more], STACKED, axis=axis + 1)


def broadcast(t: Lift, given: Sequence[Lifted]) -> tuple[list[ir.Value], int]:
    """Operands of an elementwise operator, of which some have samples, such that their shapes still go together.

    Returns:
        The operands, and where the result has the samples.
    """
    rank = max(value.rank for value in given)
    with_samples = [value for value in given if value.place is not None]
    ends = {None if value.place == STACKED else (value.place or 0) - value.rank for value in with_samples}
    end = ends.pop() if len(ends) == 1 else None
    if end is not None and all(value.padded(rank)[rank + end] == 1 for value in given):
        return [value.value for value in given], rank + end
    if rank and all(value.padded(rank)[0] == 1 for value in given):
        return [_in_front(t, value, rank) for value in given], 0
    return [value.value if value.place is None else t.stacked(value, rank) for value in given], STACKED


def _in_front(t: Lift, given: Lifted, rank: int) -> ir.Value:
    if given.place is None:
        return given.value
    return t.along(given, 0) if given.rank == rank else t.stacked(given, rank - 1)
