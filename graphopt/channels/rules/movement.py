"""Operators that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.rules.shared import SMALL, align, axes_of, has_axes, present, same
from graphopt.channels.rules.table import rule
from graphopt.channels.tying import Axis, Tying, counted
from graphopt.matching import int_attribute, permutation


@rule("Transpose")
def _transpose(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = t.rank(source)
    perm = permutation(node) if "perm" in node.attributes else tuple(reversed(range(rank)))
    t.rank(output)
    if perm is not None:
        for axis, origin in enumerate(perm):
            t.tie((output, axis), (source, origin))


@rule("Squeeze", "Unsqueeze")
def _squeeze(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    shorter, longer = (source, output) if node.op_type == "Unsqueeze" else (output, source)
    ranks = t.rank(shorter), t.rank(longer)
    named = axes_of(node, 1)
    if named is None and (has_axes(node) or trusted_static(t, longer) is None):
        return
    ones = [n for n in range(ranks[1]) if t.size((longer, n)) == 1] if named is None else [n % ranks[1] for n in named]
    kept = [axis for axis in range(ranks[1]) if axis not in ones]
    if len(kept) == ranks[0]:
        for place, axis in enumerate(kept):
            t.tie((shorter, place), (longer, axis))


def trusted_static(t: Tying, value: ir.Value) -> list[int] | None:
    """The sizes of a value where all are numbers."""
    sizes = [t.size((value, axis)) for axis in range(t.rank(value))]
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(s, int) for s in sizes) else None


@rule("Reshape", "Flatten")
def _reshape(t: Tying, node: ir.Node) -> None:
    """The elements are the same in the same order: groups of axes of equal sizes are tied."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    copied = 0
    if node.op_type == "Reshape" and int_attribute(node, "allowzero", 0) == 0 and len(node.inputs) > 1:
        shape = graphs.constant_array(node.inputs[1], limit=SMALL)
        while shape is not None and copied < min(shape.size, t.rank(source), t.rank(output)) and shape[copied] == 0:
            t.tie((source, copied), (output, copied))
            copied += 1
    a, b = (_long_axes(t, value, copied) for value in (source, output))
    # From the right: whatever is at the left, the index modulo the sizes at the right is the same.
    while a and b:
        count = _group(t, a, b)
        if count is None:
            break
        left, right = count
        t.tie_products(a[len(a) - left :], b[len(b) - right :])
        del a[len(a) - left :], b[len(b) - right :]
    while a and b and t.size(a[0]) == t.size(b[0]):
        t.tie(a.pop(0), b.pop(0))
    while a and b:
        count = _group(t, a[::-1], b[::-1])
        if count is None:
            break
        t.tie_products(a[: count[0]], b[: count[1]])
        del a[: count[0]], b[: count[1]]


def _long_axes(t: Tying, value: ir.Value, start: int) -> list[Axis]:
    """The axes of a value, but for those of one element, which matter to nobody."""
    axes = counted(value, range(start, t.rank(value)))
    return [axis for axis in axes if t.size(axis) != 1]


def _group(t: Tying, a: Sequence[Axis], b: Sequence[Axis]) -> tuple[int, int] | None:
    """How many axes at the right ends make the same number of elements, at least; None where that is not known."""
    left, right = t.size(a[-1]), t.size(b[-1])
    counts = [1, 1]
    while isinstance(left, int) and isinstance(right, int) and left > 0 and right > 0:
        if left == right:
            return counts[0], counts[1]
        side = 0 if left < right else 1
        axes = (a, b)[side]
        counts[side] += 1
        if counts[side] > len(axes):
            return None
        more = t.size(axes[-counts[side]])
        if not isinstance(more, int):
            return None
        if side == 0:
            left *= more
        else:
            right *= more
    return None


@rule("Concat")
def _concat(t: Tying, node: ir.Node) -> None:
    output = node.outputs[0]
    rank = t.rank(output)
    axis = int_attribute(node, "axis", 0)
    if axis is None:
        return
    axis %= rank
    for value in present(node):
        same(t, value, output, but=(axis,))
    _tie_sum(t, (output, axis), [(value, axis) for value in present(node)])


@rule("Split")
def _split(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    axis = int_attribute(node, "axis", 0)
    rank = t.rank(source)
    if axis is None:
        return
    axis %= rank
    for value in node.outputs:
        same(t, source, value, but=(axis,))
    _tie_sum(t, (source, axis), [(value, axis) for value in node.outputs])


def _tie_sum(t: Tying, whole: Axis, parts: Sequence[Axis], before: int = 0, after: int = 0) -> None:
    sizes = [t.size(part) for part in parts]
    label = t.label(whole)
    if label is None or not all(isinstance(size, int) for size in sizes):
        t.pin(f"size not known at {t.called()}", whole, *parts)
        return
    t.free(whole, *parts)
    labels = [t.labels.fresh(before)] if before else []
    for part, size in zip(parts, sizes, strict=True):
        found = t.label(part)
        if found is not None:
            labels.append(found)
        elif size == 1:
            labels.append(t.labels.fresh(1))
    if after:
        labels.append(t.labels.fresh(after))
    t.tie_labels(label, tuple(term for found in labels for term in found))


@rule("Slice")
def _slice(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = t.rank(source)
    t.rank(output)
    if t.opset < 10:
        return
    numbers = [graphs.constant_array(value, limit=SMALL) for value in node.inputs[1:5]]
    given = [value is not None for value in node.inputs[1:5]]
    named = numbers[2] if len(given) > 2 and given[2] else None
    if len(given) > 2 and given[2] and named is None:
        return
    if named is not None:
        axes = [int(a) % rank for a in named]
    else:
        shape = node.inputs[1].shape if node.inputs[1] is not None else None
        if shape is None or not shape.is_static() or len(shape) != 1:
            return
        axes = list(range(shape.numpy()[0]))
    same(t, source, output, but=axes)
    for place, axis in enumerate(axes):
        size, kept = t.size((source, axis)), t.size((output, axis))
        if not isinstance(size, int) or not isinstance(kept, int) or numbers[0] is None or numbers[1] is None:
            continue
        steps = numbers[3] if len(numbers) > 3 else None
        if len(given) > 3 and given[3] and (steps is None or int(steps[place]) != 1):
            continue
        start, end, _ = slice(int(numbers[0][place]), int(numbers[1][place])).indices(size)
        if end - start == kept:
            _tie_sum(t, (source, axis), [(output, axis)], start, size - end)


@rule("Expand")
def _expand(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    for axis, running, _ in align(t, [source], output):
        if running:
            t.tie(axis, running[0])
        elif t.permutes:
            t.free(axis)  # all elements along it are equal


@rule("ConstantOfShape")
def _fill(t: Tying, node: ir.Node) -> None:
    if t.permutes:
        t.free_all(*node.outputs)


@rule("Tile")
def _tile(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    repeats = graphs.constant_array(node.inputs[1], limit=SMALL)
    if repeats is None or t.rank(source) != t.rank(output) or repeats.size != t.rank(source):
        return
    for axis, repeat in enumerate(int(r) for r in repeats):
        label, made = t.label((source, axis)), t.label((output, axis))
        if repeat == 1:
            t.tie((source, axis), (output, axis))
        elif made is not None and t.permutes and isinstance(t.size((source, axis)), int):
            t.free((source, axis), (output, axis))
            if label is not None:
                t.tie_labels(made, t.labels.product([t.labels.fresh(repeat), label]))


@rule("Gather")
def _gather(t: Tying, node: ir.Node) -> None:
    source, indices = present(node)
    output = node.outputs[0]
    rank, count = t.rank(source), t.rank(indices)
    t.rank(output)
    axis = int_attribute(node, "axis", 0)
    if axis is None:
        return
    axis %= rank
    for place in range(rank):
        if place < axis:
            t.tie((source, place), (output, place))
        elif place > axis:
            t.tie((source, place), (output, place - 1 + count))
    if t.permutes:
        for place in range(count):
            t.tie((indices, place), (output, axis + place))
        if t.can_absorb(indices, 1) and source is not indices:
            # Its numbers are renumbered with the axis; what comes out is relabelled by moving them about.
            t.absorb(indices, None, (source, axis), inverse=False)
        else:
            t.pin(f"computed indices of {t.called()}", (source, axis))


@rule("Shape", "Size")
def _shape(t: Tying, node: ir.Node) -> None:
    t.free_all(*node.inputs)
