"""Round-to-nearest integer codes for weights, a scale a channel or a block, as ONNX ``DequantizeLinear`` reads them.

With s the scale and z the zero point (0 where symmetric), a weight w becomes the code
``q = clip(round(w / s) + z)``, rounding half to even, and is read back as ``(q - z) * s``.

* symmetric: signed codes in [-(2^(b-1) - 1), 2^(b-1) - 1], s = max|w| / (2^(b-1) - 1). Zero and sign flips are exact.
* asymmetric: unsigned codes in [0, 2^b - 1], s = (max(w, 0) - min(w, 0)) / (2^b - 1), so that zero has a code.

The scale is rounded to the type of the weights before codes are taken with it, since that is the scale that the codes
are read back with. Work goes in slabs of rows: beside the weights and the codes, memory of one slab is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SLAB = 1 << 20  # elements


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised.

    Attributes:
        bits: Bits of a code, 2 to 8.
        axis: With ``block`` 0, the axis with a scale for each index (the output channels); else the axis that is cut
            into blocks (the one that a product sums over).
        block: Length of a block, a divisor of that axis; 0: none.
        symmetric: Whether the zero point is 0 and codes are signed.
    """

    bits: int
    axis: int
    block: int = 0
    symmetric: bool = True

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of scales and zero points for weights of a shape.

        Raises:
            ValueError: The blocks do not divide the axis.
        """
        if self.block == 0:
            return (shape[self.axis],)
        if shape[self.axis] % self.block:
            raise ValueError(f"blocks of {self.block} do not divide an axis of {shape[self.axis]}")
        return (*shape[: self.axis], shape[self.axis] // self.block, *shape[self.axis + 1 :])

    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if self.symmetric:
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1


def scales_of(weights: Array, scheme: Scheme) -> tuple[Array, Array | None]:
    """Scales, in the dtype of the weights, and zero points (uint8, None where symmetric) for finite weights.

    A channel or block of nothing but zeros gets the scale 1, so that no scale is ever zero.
    """
    low, high = _extremes(weights, scheme)
    lowest, highest = scheme.code_range()
    zeros = None
    if scheme.symmetric:
        span = np.maximum(-low, high)
        steps = highest
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        span = high - low
        steps = highest - lowest
    # The smallest normal number keeps a scale from vanishing in a narrow type.
    smallest = float(ml_dtypes.finfo(weights.dtype).smallest_normal)  # type: ignore[no-untyped-call]
    scales = np.where(span > 0, np.maximum(span / steps, smallest), 1.0).astype(weights.dtype)
    if not scheme.symmetric:
        zeros = np.clip(np.rint(-low / scales.astype(np.float64)), lowest, highest).astype(np.uint8)
    return scales, zeros


def codes_of(weights: Array, scales: Array, zeros: Array | None, scheme: Scheme) -> Array:
    """The codes of weights, one a byte (int8 where symmetric, else uint8), in the shape of the weights."""
    lowest, highest = scheme.code_range()
    codes = np.empty(weights.shape, np.int8 if scheme.symmetric else np.uint8)
    wide = _wide(weights.dtype)
    for rows in _slabs(weights.shape, scheme):
        scale = _expand(scales, scheme, rows, weights.ndim).astype(wide)
        part = _cut(weights[rows].astype(wide, copy=False), scheme) / scale
        np.rint(part, out=part)
        if zeros is not None:
            part += _expand(zeros, scheme, rows, weights.ndim)
        np.clip(part, lowest, highest, out=part)
        codes[rows] = part.reshape(codes[rows].shape)
    return codes


def dequantise(codes: Array, scales: Array, zeros: Array | None, scheme: Scheme) -> Array:
    """What ``DequantizeLinear`` makes of codes, in the dtype of the scales: (q - z) * s."""
    everything = slice(0, codes.shape[0])
    wide = _wide(scales.dtype)
    values = _cut(codes.astype(np.int32), scheme)
    if zeros is not None:
        values = values - _expand(zeros, scheme, everything, codes.ndim).astype(np.int32)
    result: Array = values.astype(wide) * _expand(scales, scheme, everything, codes.ndim).astype(wide)
    return result.reshape(codes.shape).astype(scales.dtype)


def pack4(codes: Array) -> npt.NDArray[np.uint8]:
    """Two 4-bit codes a byte, the first in the low half, as ONNX packs int4 and uint4; the last may be alone."""
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(0x0F)
    packed = flat[0::2].copy()
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return packed


def all_finite(weights: Array) -> bool:
    """Whether weights hold neither NaN nor infinity."""
    flat = weights.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + _SLAB]).all()) for start in range(0, flat.size, _SLAB))


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type to compute in: float32 for narrow types, whose own arithmetic would round once more."""
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)


def _slabs(shape: tuple[int, ...], scheme: Scheme) -> Iterator[slice]:
    """Ranges of the first axis, of whole blocks where that axis is cut into blocks."""
    rows = max(1, _SLAB // max(1, math.prod(shape[1:])))
    if scheme.block and scheme.axis == 0:
        rows = max(1, rows // scheme.block) * scheme.block
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _cut(part: Array, scheme: Scheme) -> Array:
    """With blocks, the axis split into (blocks, length); else as it is."""
    if scheme.block == 0:
        return part
    axis = scheme.axis
    return part.reshape(*part.shape[:axis], -1, scheme.block, *part.shape[axis + 1 :])


def _expand(scales: Array, scheme: Scheme, rows: slice, rank: int) -> Array:
    """Scales of some rows of weights with ``rank`` axes, shaped to be broadcast against ``_cut`` of those rows."""
    if scheme.block:
        if scheme.axis == 0:
            rows = slice(rows.start // scheme.block, rows.stop // scheme.block)
        return np.expand_dims(scales[rows], scheme.axis + 1)
    mine = scales[rows] if scheme.axis == 0 else scales
    return mine.reshape((-1,) + (1,) * (rank - scheme.axis - 1))


def _extremes(weights: Array, scheme: Scheme) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The lowest and the highest weight of each channel or block."""
    shape = scheme.scale_shape(weights.shape)
    low, high = np.zeros(shape), np.zeros(shape)
    started = False
    for rows in _slabs(weights.shape, scheme):
        part = weights[rows].astype(_wide(weights.dtype), copy=False)
        if part.size == 0:
            continue
        if scheme.block:
            part = _cut(part, scheme)
            where = slice(rows.start // scheme.block, rows.stop // scheme.block) if scheme.axis == 0 else rows
            low[where], high[where] = part.min(scheme.axis + 1), part.max(scheme.axis + 1)
            continue
        others = tuple(axis for axis in range(part.ndim) if axis != scheme.axis)
        least, most = part.min(others), part.max(others)
        if scheme.axis == 0:
            low[rows], high[rows] = least, most
        elif started:
            np.minimum(low, least, out=low)
            np.maximum(high, most, out=high)
        else:
            low[:], high[:] = least, most
        started = True
    return low, high
