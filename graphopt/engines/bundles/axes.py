"""Values cut, stacked and put together along an axis, on the GPU by copies there: nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from graphopt.bundles.arrays import merge_into, merged_shape
from graphopt.bundles.backend import Part, Rows
from graphopt.engines.bundles.values import Copier, Value
from graphopt.gpu.arrays import DeviceArray

Move = tuple[int, int, int]  # to which index, from which, how many


def part(copier: Copier, value: Value, axis: int, index: int) -> Value:
    """One index of an axis, which is gone then."""
    if value.device is None:
        return Value(np.asarray(np.take(value.host, index, axis)))
    whole = value.device
    at = axis % len(whole.shape)
    shape = (*whole.shape[:at], *whole.shape[at + 1 :])
    if math.prod(whole.shape[:at]) == 1:  # it lies there as it is
        start = whole.pointer + index * math.prod(whole.shape[at + 1 :]) * whole.dtype.itemsize
        made = DeviceArray(whole.context, start, shape, whole.dtype, owner=whole, stream=whole.stream)
        made.takers = whole.takers
        return Value(device=made, kept=True)
    made = copier.array((*whole.shape[:at], 1, *whole.shape[at + 1 :]), whole.dtype)
    _move(copier, made, whole, at, [(0, index, 1)])
    made.shape = shape
    return Value(device=made)


def stack(copier: Copier, parts: Sequence[Value], axis: int) -> Value:
    """Values along a new axis; ValueError where their shapes differ."""
    if all(one.device is None for one in parts):
        return Value(np.stack([np.asarray(one.host) for one in parts], axis))
    arrays = [copier.to_device(one) for one in parts]
    shape, dtype = arrays[0].shape, arrays[0].dtype
    if any(array.shape != shape for array in arrays):
        raise ValueError("turns of a loop made parts of different shapes")
    at = axis % (len(shape) + 1)
    made = copier.array((*shape[:at], len(arrays), *shape[at:]), dtype)
    for index, array in enumerate(arrays):
        _move(copier, made, _with_axis(array, at), at, [(index, 0, 1)])
    return Value(device=made)


def take(copier: Copier, value: Value, axis: int, rows: Rows) -> Value:
    """Some indices of an axis."""
    if value.device is None:
        return Value(np.take(value.host, rows, axis))
    whole = value.device
    made = copier.array((*whole.shape[:axis], len(rows), *whole.shape[axis + 1 :]), whole.dtype)
    _move(copier, made, whole, axis, list(_together(np.arange(len(rows)), rows)))
    return Value(device=made)


def merge(copier: Copier, parts: Sequence[Part], axis: int, count: int) -> Value:
    """As `graphopt.bundles.backend.RowBackend.merge`; raises GraphoptError where the parts do not fit."""
    values: list[Value] = [part.value for part in parts]
    shape = tuple(merged_shape([value.shape for value in values], axis, count))
    if all(value.device is None for value in values):
        merged = np.empty(shape, values[0].dtype)
        merge_into(merged, [(np.asarray(part.value.host), part.rows, part.to) for part in parts], axis)
        return Value(merged)
    made = copier.array(shape, values[0].dtype)
    filled = 0
    for one in parts:
        rows = np.arange(len(one.to)) if one.rows is None else one.rows
        _move(copier, made, copier.to_device(one.value), axis, list(_together(one.to, rows)))
        filled += len(one.to)
    _move(copier, made, made, axis, [(index, filled - 1, 1) for index in range(filled, count)])
    return Value(device=made)


def _with_axis(array: DeviceArray, at: int) -> DeviceArray:
    shape = (*array.shape[:at], 1, *array.shape[at:])
    return DeviceArray(array.context, array.pointer, shape, array.dtype, owner=array, stream=array.stream)


def _together(to: Rows, rows: Rows) -> Iterator[Move]:
    """Indices that follow each other on both sides as one move."""
    begin = 0
    for index in range(1, len(to) + 1):
        if index == len(to) or to[index] != to[index - 1] + 1 or rows[index] != rows[index - 1] + 1:
            yield int(to[begin]), int(rows[begin]), index - begin
            begin = index


def _move(copier: Copier, target: DeviceArray, source: DeviceArray, at: int, moves: Sequence[Move]) -> None:
    """Copy indices of an axis from one array to another, which differ in the size of that axis alone."""
    inner = math.prod(source.shape[at + 1 :]) * source.dtype.itemsize
    for outer in range(math.prod(source.shape[:at])):
        for to, index, count in moves:
            into = target.pointer + (outer * target.shape[at] + to) * inner
            copier.copy_part(into, source.pointer + (outer * source.shape[at] + index) * inner, count * inner)
