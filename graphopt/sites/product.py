"""What two factors multiply to, and how the node is written that takes their place."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.sites.linear import Spelling
from graphopt.sites.pair import Pair

Array = npt.NDArray[Any]

_SAMPLED = 64
_BLOCK = 1 << 20


def multiply(left: Array, right: Array) -> Array:
    """The matrix, or the kernel, of U V in float64.

    Args:
        left: U, (outputs, rank[, *kernel]).
        right: V, (rank, inputs[, *kernel]); in each spatial axis one of the two kernels has size 1.

    Returns:
        (outputs, inputs[, *kernel]), each axis of the kernel the larger of both.
    """
    outputs, rank, *kernel = left.shape
    _, inputs, *beside = right.shape
    # The sizes are spelled out: of an axis of size zero numpy cannot tell what -1 stands for.
    rows = np.moveaxis(left, 1, -1).reshape(outputs * math.prod(kernel), rank).astype(np.float64)
    product = rows @ right.reshape(rank, inputs * math.prod(beside)).astype(np.float64)
    axes = len(kernel)
    split = product.reshape(outputs, *kernel, inputs, *beside)
    # (m, k.., n, l..) -> (m, n, k, l, k, l, ..), of each pair one of size 1.
    order = [0, axes + 1, *(place for axis in range(axes) for place in (1 + axis, axes + 2 + axis))]
    return split.transpose(order).reshape(outputs, inputs, *(k * b for k, b in zip(kernel, beside, strict=True)))


def bounded(left: Array, right: Array, dtype: ir.DataType) -> bool:
    """Whether certainly no number of U V is too large for a dtype, which is told without multiplying.

    Args:
        left: U, (outputs, rank[, *kernel]).
        right: V, (rank, inputs[, *kernel]).
        dtype: What the product is to be stored in.
    """
    # No element of a product is larger than the norm of its row times the norm of its column.
    with np.errstate(all="ignore"):
        return bool(_norm(np.moveaxis(left, 1, -1)) * _norm(np.moveaxis(right, 0, -1)) <= _largest(dtype))


def fits(left: Array, right: Array, dtype: ir.DataType) -> bool:
    """Whether a dtype holds the numbers of U V: none is too large for it, and most are not too small.

    Args:
        left: U, (outputs, rank[, *kernel]).
        right: V, (rank, inputs[, *kernel]).
        dtype: What the product is to be stored in.
    """
    if not bounded(left, right, dtype):
        return False
    if dtype is not ir.DataType.FLOAT16 or not left.size or not right.size:
        return True  # the exponents of all others reach far enough down
    rows, columns = np.moveaxis(left, 1, -1).reshape(-1, left.shape[1]), right.reshape(right.shape[0], -1)
    few = rows[:: -(-len(rows) // _SAMPLED)], columns[:, :: -(-columns.shape[1] // _SAMPLED)]
    some = few[0].astype(np.float64) @ few[1].astype(np.float64)
    return not some.any() or bool(np.sqrt(np.mean(some**2)) >= float(np.finfo(np.float16).tiny))


def _norm(array: Array) -> np.float64:
    """The largest of the norms along the last axis, some rows at a time; NaN where a number is none."""
    if not array.size:
        return np.float64(0)
    step = max(1, _BLOCK // array[0].size)
    blocks = (array[start : start + step].astype(np.float64) for start in range(0, len(array), step))
    with np.errstate(all="ignore"):
        return np.float64(np.max([np.sqrt((block**2).sum(axis=-1)).max() for block in blocks]))


def fits_numbers(numbers: Array, dtype: ir.DataType) -> bool:
    """Whether a dtype holds some numbers: none is too large for it, or not finite."""
    return bool((np.abs(numbers) <= _largest(dtype)).all())


def _largest(dtype: ir.DataType) -> float:
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]


def merged_attributes(pair: Pair) -> dict[str, object] | str:
    """The attributes of the convolution that two make, or why they make none; {} for products that are none."""
    first, second = pair.first, pair.second
    if first.spelling is not Spelling.CONV:
        return {}
    if second.pointwise or first.pointwise:
        wide = first if second.pointwise else second
        return {name: attribute for name, attribute in wide.node.attributes.items() if name != "kernel_shape"}
    axes = len(first.kernel)
    merged: dict[str, object] = {}
    for one in (first.node, second.node):
        attribute = one.attributes.get("auto_pad")
        if attribute is not None and attribute.as_string() not in ("NOTSET", "VALID"):
            return "the padding of the convolutions is left to the runtime (auto_pad)"
    for name, default in (("strides", [1] * axes), ("dilations", [1] * axes), ("pads", [0] * 2 * axes)):
        values = [_ints(node, name, default) for node in (first.node, second.node)]
        merged[name] = [values[0 if first.spatial[i % axes] else 1][i] for i in range(len(default))]
        if name == "strides":
            merged[name] = [one * other for one, other in zip(*values, strict=True)]
    return merged


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else list(attribute.as_ints())
