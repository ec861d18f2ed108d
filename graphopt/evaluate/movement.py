"""Operators that move elements: exact for every element type."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphopt.evaluate.operation import (
    Array,
    Function,
    Inexact,
    Inputs,
    Operation,
    normal_axis,
    operand,
    optional_operand,
    to_ints,
)


def _identity(op: Operation, xs: Inputs) -> list[Array]:
    return [operand(xs)]


def reshape_dims(shape: Sequence[int], target: Sequence[int], *, allow_zero: bool = False) -> list[int]:
    """The shape that Reshape gives: 0 copies an axis (unless ``allow_zero``), -1 takes what is left.

    Raises:
        Inexact: The number of elements differs, or cannot be told.
    """
    dims = [shape[i] if d == 0 and not allow_zero else d for i, d in enumerate(target)]
    if dims.count(-1) > 1 or any(d < -1 for d in dims):
        raise Inexact
    size = math.prod(shape)
    if -1 in dims:
        known = math.prod(d for d in dims if d != -1)
        if known == 0 or size % known:
            raise Inexact
        dims[dims.index(-1)] = size // known
    if math.prod(dims) != size:
        raise Inexact
    return dims


def _reshape(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    target = op.integers("shape") if op.opset < 5 else to_ints(operand(xs, 1))
    if target is None:
        raise Inexact
    return [x.reshape(reshape_dims(x.shape, target, allow_zero=op.integer("allowzero", 0) == 1))]


def _flatten(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    axis = op.integer("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        raise Inexact
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))]


def _axes(op: Operation, xs: Inputs) -> list[int] | None:
    """The axes of Squeeze and Unsqueeze: an attribute before opset 13, an input since."""
    if op.opset < 13:
        return op.integers("axes")
    given = optional_operand(xs, 1)
    return None if given is None else to_ints(given)


def _squeeze(op: Operation, xs: Inputs) -> list[Array]:
    x, axes = operand(xs), _axes(op, xs)
    if axes is None:
        return [np.squeeze(x)]
    return [np.squeeze(x, tuple(normal_axis(a, x.ndim) for a in axes))]


def _unsqueeze(op: Operation, xs: Inputs) -> list[Array]:
    x, axes = operand(xs), _axes(op, xs)
    if axes is None:
        raise Inexact
    rank = x.ndim + len(axes)
    wanted = {normal_axis(a, rank) for a in axes}
    if len(wanted) != len(axes):
        raise Inexact
    dims = iter(x.shape)
    return [x.reshape([1 if i in wanted else next(dims) for i in range(rank)])]


def _transpose(op: Operation, xs: Inputs) -> list[Array]:
    return [np.transpose(operand(xs), op.integers("perm"))]


def _concat(op: Operation, xs: Inputs) -> list[Array]:
    parts = [operand(xs, i) for i in range(len(xs))]
    default = 1 if op.opset < 4 else None
    axis = op.integer("axis", default) if default is not None else op.attributes["axis"].as_int()
    return [np.concatenate(parts, normal_axis(axis, parts[0].ndim))]


def _split(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    axis = normal_axis(op.integer("axis", 0), x.ndim)
    given = optional_operand(xs, 1)
    sizes = op.integers("split") if op.opset < 13 else None if given is None else to_ints(given)
    if sizes is None:
        count = op.integer("num_outputs", op.outputs)
        step = -(-x.shape[axis] // count)
        sizes = [min(step, max(0, x.shape[axis] - i * step)) for i in range(count)]
    if sum(sizes) != x.shape[axis] or len(sizes) != op.outputs or min(sizes, default=0) < 0:
        raise Inexact
    return np.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


def slice_bounds(start: int, stop: int, step: int, size: int) -> slice:
    """The numpy slice for Slice's start, end and step on an axis of a given size (ends are clamped).

    Raises:
        Inexact: The step is zero.
    """
    if step == 0:
        raise Inexact
    start = start + size if start < 0 else start
    stop = stop + size if stop < 0 else stop
    if step > 0:
        return slice(min(max(start, 0), size), min(max(stop, 0), size), step)
    start, stop = min(max(start, 0), size - 1), min(max(stop, -1), size - 1)
    return slice(start, None if stop < 0 else stop, step)


def _slice(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    if op.opset < 10:
        starts, stops, axes = op.integers("starts"), op.integers("ends"), op.integers("axes")
        steps = None
    else:
        starts, stops = to_ints(operand(xs, 1)), to_ints(operand(xs, 2))
        axes = None if (given := optional_operand(xs, 3)) is None else to_ints(given)
        steps = None if (given := optional_operand(xs, 4)) is None else to_ints(given)
    if starts is None or stops is None:
        raise Inexact
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index: list[slice] = [slice(None)] * x.ndim
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        axis = normal_axis(axis, x.ndim)
        index[axis] = slice(0, 0) if x.shape[axis] == 0 else slice_bounds(start, stop, step, x.shape[axis])
    return [x[tuple(index)]]


def _indices(indices: Array, size: int) -> Array:
    """Indices with negative ones counted from the end; all must be inside."""
    wide: Array = indices.astype(np.int64)
    wide = np.where(wide < 0, wide + size, wide)
    if wide.size and not (wide.min() >= 0 and wide.max() < size):
        raise Inexact
    return wide


def _gather(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    axis = normal_axis(op.integer("axis", 0), x.ndim)
    taken = np.take(x, _indices(operand(xs, 1), x.shape[axis]), axis)
    return [np.asarray(taken, x.dtype) if x.dtype == object else taken]


def _gather_elements(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    axis = normal_axis(op.integer("axis", 0), x.ndim)
    indices = _indices(operand(xs, 1), x.shape[axis])
    if indices.ndim != x.ndim:
        raise Inexact
    # Not take_along_axis, which broadcasts: an index array that is shorter along another axis reads its beginning.
    return [x[_places(indices, axis)]]


def _places(indices: Array, axis: int) -> tuple[Array, ...]:
    """Where each element of ``indices`` points: to its own place, but along ``axis``."""
    places: list[Array] = list(np.indices(indices.shape))
    places[axis] = indices
    return tuple(places)


def _expand(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(to_ints(operand(xs, 1)))))]


def _tile(op: Operation, xs: Inputs) -> list[Array]:
    if op.opset < 6:
        raise Inexact
    x, repeats = operand(xs), to_ints(operand(xs, 1))
    if len(repeats) != x.ndim or min(repeats, default=0) < 0:
        raise Inexact
    return [np.tile(x, repeats)]


def _where(op: Operation, xs: Inputs) -> list[Array]:
    condition, x, y = operand(xs), operand(xs, 1), operand(xs, 2)
    if condition.dtype != np.bool_ or x.dtype != y.dtype:
        raise Inexact
    return [np.where(condition, x, y)]


def _pad(op: Operation, xs: Inputs) -> list[Array]:
    mode = op.attributes.get("mode")
    if op.opset < 11 or (mode is not None and mode.as_string() != "constant"):
        raise Inexact
    x, pads, fill, axes = operand(xs), to_ints(operand(xs, 1)), optional_operand(xs, 2), optional_operand(xs, 3)
    chosen = list(range(x.ndim)) if axes is None else [normal_axis(a, x.ndim) for a in to_ints(axes)]
    if len(pads) != 2 * len(chosen) or min(pads, default=0) < 0 or len(set(chosen)) != len(chosen):
        raise Inexact
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(chosen):
        widths[axis] = (pads[i], pads[i + len(chosen)])
    value = x.dtype.type(0) if fill is None else fill.reshape(())
    result = np.empty([n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)], x.dtype)
    result[...] = value
    result[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, widths, strict=True))] = x
    return [result]


def _scatter_nd(op: Operation, xs: Inputs) -> list[Array]:
    reduction = op.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        raise Inexact
    x, indices, updates = operand(xs), operand(xs, 1).astype(np.int64), operand(xs, 2)
    depth = indices.shape[-1]
    result = x.copy()
    places = [tuple(_indices(indices[..., i], x.shape[i]).reshape(-1).tolist()) for i in range(depth)]
    if depth and len(set(zip(*places, strict=True))) != len(places[0]):
        raise Inexact  # the same place twice: the order of writing is not defined
    if updates.shape != (*indices.shape[:-1], *x.shape[depth:]):
        raise Inexact
    result[tuple(_indices(indices[..., i], x.shape[i]) for i in range(depth))] = updates
    return [result]


def _scatter_elements(op: Operation, xs: Inputs) -> list[Array]:
    reduction = op.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        raise Inexact
    x, updates = operand(xs), operand(xs, 2)
    axis = normal_axis(op.integer("axis", 0), x.ndim)
    indices = _indices(operand(xs, 1), x.shape[axis])
    if indices.shape != updates.shape:
        raise Inexact
    places = _places(indices, axis)
    flat = np.ravel_multi_index(tuple(p.reshape(-1) for p in places), x.shape) if indices.size else indices
    if np.unique(flat).size != indices.size:
        raise Inexact
    result = x.copy()
    result[places] = updates
    return [result]


MOVEMENT: dict[str, Function] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Expand": _expand,
    "Tile": _tile,
    "Where": _where,
    "Pad": _pad,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
}
