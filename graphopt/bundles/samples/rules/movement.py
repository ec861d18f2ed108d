"""Operators that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import STACKED, Lifted, common_place
from graphopt.bundles.samples.rules.shared import axes_of, integer, one_axis, operand, others
from graphopt.bundles.samples.rules.table import rule
from graphopt.bundles.samples.sizes import sizes_of

_SHAPE_HAS_ENDS = 15
_ALL = 1 << 40


@rule("Transpose")
def _transpose(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    named = node.attributes.get("perm")
    order = list(range(given.rank))[::-1] if named is None else [int(axis) for axis in named.as_ints()]
    if given.place == STACKED:
        return t.same_results(node, [given.value], STACKED, perm=[0, *(axis + 1 for axis in order)])
    return t.same_results(node, [given.value], order.index(given.place or 0))


@rule("Reshape")
def _reshape(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    """The batch stays what it is; the rest is reshaped as it was."""
    given, (shape,) = operand(t, node, 0), others(t, node)
    literal = bool(integer(t, node, "allowzero", 0))
    wanted = _target(t, node, literal=literal)
    made = sizes_of(node.outputs[0])
    if wanted is not None and given.place == 0 and made and made[0] == 1:
        return t.same_results(node, [given.value, t.numbers([0, *wanted[1:]])], 0, allowzero=0)
    if wanted is not None:
        return t.same_results(node, [t.stacked(given), t.numbers([0, *wanted])], STACKED, allowzero=0)
    if literal:
        t.refuse("its sizes are not constant, and may be 0")
    target = t.one("Concat", [t.numbers([0]), shape], axis=0)
    return t.same_results(node, [t.stacked(given), target], STACKED)


def _target(t: Lift, node: ir.Node, *, literal: bool) -> list[int] | None:
    """The sizes that a Reshape asks for, as numbers where they are known; 0 copies, and -1 is what is left."""
    made = sizes_of(node.outputs[0])
    found = t.constant(node.inputs[1])
    asked = [-1] * len(made or ()) if found is None else [int(size) for size in found.reshape(-1)]
    known = [size if size is not None else told for size, told in zip(made or (), asked, strict=False)]
    target = known if made is not None and len(made) == len(asked) else asked
    if (found is None and (made is None or target.count(-1) > 1)) or target.count(-1) > 1:
        return None
    if made is not None and 0 in made:
        t.refuse("it makes a value of no elements")
    return None if literal and 0 in target else target


@rule("Flatten")
def _flatten(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    axis = integer(t, node, "axis", 1)
    axis = axis % given.rank if axis < 0 else axis
    if axis == 1 and given.place == 0:
        return t.same_results(node, [given.value], 0)
    sizes = list(sizes_of(node.outputs[0]) or (None, None))
    if sizes.count(None) > 1:
        t.refuse("the sizes that it makes are not known")
    target = t.numbers([0, *(-1 if size is None else size for size in sizes)])
    return [t.result(node, t.one("Reshape", [t.stacked(given), target]), STACKED)]


@rule("Squeeze")
def _squeeze(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    axes = axes_of(t, node, given.rank)
    if axes is None:
        if given.sizes is None or None in given.sizes:
            t.refuse("which axes it takes away is not known")
        axes = [axis for axis in range(given.rank) if given.is_one(axis)]
    if not axes:
        return [Lifted(given.value, given.place, given.sizes)]
    place = given.place or 0
    if place != STACKED and place not in axes:
        made = t.squeeze(given.value, axes)
        return [t.result(node, made, place - sum(axis < place for axis in axes))]
    if axes == [place]:  # of the batch axis alone: what is left is as if it had stood in front
        made = t.transpose(given.value, [place, *(axis for axis in range(given.rank) if axis != place)])
        sizes = sizes_of(node.outputs[0])
        return [Lifted(made, STACKED, sizes) if made is given.value else t.result(node, made, STACKED)]
    return [t.result(node, t.squeeze(t.stacked(given), [axis + 1 for axis in axes]), STACKED)]


@rule("Unsqueeze")
def _unsqueeze(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    found = sizes_of(node.outputs[0])
    attribute = node.attributes.get("axes")
    axes = attribute.as_ints() if attribute is not None else t.constant(node.inputs[1])
    if axes is None:
        t.refuse("its axes are not constant")
    flat = [int(axis) for axis in np.asarray(axes).reshape(-1)]
    rank = given.rank + len(flat) if found is None else len(found)
    flat = sorted(axis % rank for axis in flat)
    if given.place == STACKED:
        return [t.result(node, t.unsqueeze(given.value, [axis + 1 for axis in flat]), STACKED)]
    place = [axis for axis in range(rank) if axis not in flat][given.place or 0]
    return [t.result(node, t.unsqueeze(given.value, flat), place)]


@rule("Concat", "GatherElements", "ScatterElements")
def _one_axis_of_all(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = [operand(t, node, index) for index in range(len(node.inputs))]
    axis = integer(t, node, "axis", 0) % given[0].rank
    place = common_place(given)
    if place is None or place in (STACKED, axis):
        return t.same_results(node, [t.stacked(value) for value in given], STACKED, axis=axis + 1)
    return t.same_results(node, [t.along(value, place) for value in given], place)


@rule("Split")
def _split(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return one_axis(t, node, integer(t, node, "axis", 0))


@rule("Slice")
def _slice(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    starts, ends, _, steps = (t.as_int64(value) for value in [*others(t, node), None, None][:4])
    axes = axes_of(t, node, given.rank, 3)
    if axes is None:
        count = sizes_of(node.inputs[1]) if node.inputs[1] is not None else None
        if not count or count[0] is None:
            t.refuse("which axes it cuts is not known")
        axes = list(range(count[0]))
    stacked = given.place in (STACKED, *axes)
    first = t.stacked(given) if stacked else given.value
    named = t.numbers([axis + stacked for axis in axes])
    inputs = [first, starts, ends, named, *([] if steps is None else [steps])]
    return t.same_results(node, inputs, STACKED if stacked else given.place)


@rule("Gather")
def _gather(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, indices = operand(t, node, 0), operand(t, node, 1)
    axis = integer(t, node, "axis", 0) % given.rank
    if indices.place is None:
        if given.place not in (None, STACKED, axis):
            place = given.place if given.place < axis else given.place + indices.rank - 1
            return t.same_results(node, [given.value, indices.value], place)
        return t.same_results(node, [t.stacked(given), indices.value], STACKED, axis=axis + 1)
    if given.place is None:
        if indices.place != STACKED:
            return t.same_results(node, [given.value, indices.value], axis + indices.place)
        if axis == 0:
            return t.same_results(node, [given.value, indices.value], STACKED)
        made = t.again(node, [given.value, indices.value])[0]
        rank = given.rank + indices.rank
        return [t.result(node, t.transpose(made, [axis, *(n for n in range(rank) if n != axis)]), STACKED)]
    # Each sample looks up in its own: [B, chosen axis, rest] at [B, indices, 1].
    rank = given.rank
    data = t.transpose(t.stacked(given), [0, 1 + axis, *(1 + n for n in range(rank) if n != axis)])
    places = t.unsqueeze(t.stacked(indices), [1 + indices.rank])
    made = t.one("GatherND", [data, places], batch_dims=1)
    order = [*range(1 + indices.rank, 1 + indices.rank + axis), *range(1, 1 + indices.rank)]
    order = [0, *order, *range(1 + indices.rank + axis, rank + indices.rank)]
    return [t.result(node, t.transpose(made, order), STACKED)]


@rule("GatherND")
def _gather_nd(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, indices = operand(t, node, 0), operand(t, node, 1)
    batched = integer(t, node, "batch_dims", 0)
    if given.place is None and not batched:
        return t.same_results(node, [given.value, t.stacked(indices)], STACKED)
    return t.same_results(node, [t.stacked(given), t.stacked(indices)], STACKED, batch_dims=batched + 1)


@rule("ScatterND")
def _scatter_nd(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    """Indices get the number of their sample in front."""
    data, indices, updates = (t.stacked(operand(t, node, index)) for index in range(3))
    rank = operand(t, node, 1).rank
    number = t.one("Range", [t.of_array(np.array(0)), t.squeeze(t.count(), [0]), t.of_array(np.array(1))])
    number = t.one("Reshape", [number, t.numbers([-1] + [1] * rank)])
    sizes = t.one("Slice", [t.one("Shape", [indices]), t.numbers([0]), t.numbers([rank])])
    number = t.one("Expand", [number, t.one("Concat", [sizes, t.numbers([1])], axis=0)])
    return t.same_results(node, [data, t.one("Concat", [number, indices], axis=rank), updates], STACKED)


@rule("Expand")
def _expand(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, (shape,) = operand(t, node, 0), others(t, node)
    count = sizes_of(node.inputs[1]) if node.inputs[1] is not None else None
    wanted = t.constant(node.inputs[1])
    length = wanted.size if wanted is not None else count[0] if count else None
    if length is None:
        t.refuse("the rank that it makes is not known")
    rank = max(given.rank, length)
    if wanted is not None and given.place is not None and given.place != STACKED:
        place = given.place + rank - given.rank
        target = [*[1] * (rank - length), *(int(size) for size in wanted.reshape(-1))]
        if target[place] == 1:
            return t.same_results(node, [given.value, shape], place)
    front = t.numbers([1] * (1 + rank - length))
    return t.same_results(node, [t.stacked(given, rank), t.one("Concat", [front, shape], axis=0)], STACKED)


@rule("Tile")
def _tile(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, (repeats,) = operand(t, node, 0), others(t, node)
    known = t.constant(node.inputs[1])
    if known is not None and given.place not in (None, STACKED) and int(known.reshape(-1)[given.place]) == 1:
        return t.same_results(node, [given.value, repeats], given.place)
    return t.same_results(node, [t.stacked(given), t.one("Concat", [t.numbers([1]), repeats], axis=0)], STACKED)


@rule("Pad")
def _pad(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    more = others(t, node)
    axes = axes_of(t, node, given.rank, 3)
    axes = list(range(given.rank)) if axes is None else axes
    pads = t.constant(node.inputs[1])
    if pads is None:
        t.refuse("what it adds is not constant")
    sides = pads.reshape(2, -1)
    added = {axis: (int(sides[0, n]), int(sides[1, n])) for n, axis in enumerate(axes)}
    if given.place != STACKED and added.get(given.place or 0, (0, 0)) == (0, 0):
        return t.same_results(node, [given.value, *more], given.place)
    begins, ends = ([0, *(added.get(axis, (0, 0))[side] for axis in range(given.rank))] for side in (0, 1))
    return t.same_results(node, [t.stacked(given), t.numbers([*begins, *ends]), *more[1:2]], STACKED)


@rule("OneHot")
def _one_hot(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    more = others(t, node)
    axis = integer(t, node, "axis", -1) % (given.rank + 1)
    if given.place == STACKED:
        return t.same_results(node, [given.value, *more], STACKED, axis=axis + 1)
    place = given.place or 0
    return t.same_results(node, [given.value, *more], place + (axis <= place))


@rule("Trilu")
def _triangle(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    more = others(t, node)
    if given.place is not None and given.place < given.rank - 2:
        return t.same_results(node, [given.value, *more], given.place)
    return t.same_results(node, [t.stacked(given), *more], STACKED)


@rule("ReverseSequence")
def _reverse(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, lengths = operand(t, node, 0), operand(t, node, 1)
    batch = integer(t, node, "batch_axis", 1)
    return t.same_results(node, [t.along(given, batch), t.along(lengths, 0)], batch)


@rule("Shape")
def _shape(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    """Of one sample."""
    given = operand(t, node, 0)
    whole = _sizes_of_one(t, given)
    if t.opset >= _SHAPE_HAS_ENDS and ("start" in node.attributes or "end" in node.attributes):
        start, end = integer(t, node, "start", 0), integer(t, node, "end", _ALL)
        whole = t.one("Slice", [whole, t.numbers([start]), t.numbers([end])])
    return [Lifted(whole, None, sizes_of(node.outputs[0]))]


@rule("Size")
def _size(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return [Lifted(t.one("ReduceProd", [_sizes_of_one(t, operand(t, node, 0))], keepdims=0), None, ())]


def _sizes_of_one(t: Lift, given: Lifted) -> ir.Value:
    sizes = t.one("Shape", [given.value])
    if given.place == STACKED:
        return t.one("Slice", [sizes, t.numbers([1]), t.numbers([_ALL])])
    place = given.place or 0
    before = t.one("Slice", [sizes, t.numbers([0]), t.numbers([place])])
    after = t.one("Slice", [sizes, t.numbers([place + 1]), t.numbers([_ALL])])
    return t.one("Concat", [before, t.numbers([1]), after], axis=0)
