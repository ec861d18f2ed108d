"""Operators that make elements: shapes, ranges, constants of a shape, the places of what is not zero."""

from __future__ import annotations

import numpy as np

from graphopt.evaluate.movement import slice_bounds
from graphopt.evaluate.operation import Array, Function, Inexact, Inputs, Operation, operand, to_ints


def shape_slice(op: Operation, rank: int) -> slice:
    """Which axes of a value of a given rank Shape returns (``start`` and ``end`` came with opset 15)."""
    start, stop = op.integer("start", 0), op.integer("end", rank)
    return slice_bounds(start, stop, 1, rank)


def _shape(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    return [np.array(x.shape[shape_slice(op, x.ndim)], np.int64)]


def _size(op: Operation, xs: Inputs) -> list[Array]:
    return [np.array(operand(xs).size, np.int64)]


def _constant_of_shape(op: Operation, xs: Inputs) -> list[Array]:
    dims = to_ints(operand(xs))
    value = op.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
    if fill.size != 1 or min(dims, default=0) < 0:
        raise Inexact
    return [np.full(dims, fill.reshape(()), fill.dtype)]


def _range(op: Operation, xs: Inputs) -> list[Array]:
    start, stop, step = (operand(xs, i) for i in range(3))
    if start.dtype.kind not in "iu" or step.item() == 0:
        raise Inexact
    return [np.arange(start.item(), stop.item(), step.item(), dtype=start.dtype)]


def _non_zero(op: Operation, xs: Inputs) -> list[Array]:
    x = operand(xs)
    if x.ndim == 0 or x.dtype.kind not in "fiub":
        raise Inexact
    return [np.array(np.nonzero(x), np.int64).reshape(x.ndim, -1)]


MAKING: dict[str, Function] = {
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "NonZero": _non_zero,
}
