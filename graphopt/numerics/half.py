"""float16: what fits into it, and rounding to it, a block at a time so that no copy of a large weight is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

HALF_MAX = 65504.0
"""The largest finite number of float16."""
HALF_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to infinity: half a step above the largest finite number, ties to even."""
HALF_NORMAL = 2.0**-14
"""The smallest number that float16 holds with all of its 11 bits; below it bits are lost, below 2^-25 all of them."""

_BLOCK = 1 << 20


def to_half(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Round to float16, to nearest, ties to even. Infinities and NaN stay; finite values may become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def beyond_half(values: npt.NDArray[Any]) -> float | None:
    """The first finite number in ``values`` that float16 cannot hold, or None. Infinities and NaN can be held."""
    for block in _blocks(values):
        # NaN compares false: a block is cleared only where its extremes are known to fit.
        if float(block.max()) < HALF_OVERFLOW and float(block.min()) > -HALF_OVERFLOW:
            continue
        outside = block[np.isfinite(block) & (np.abs(block) >= HALF_OVERFLOW)]
        if outside.size:
            return float(outside[0])
    return None


def below_half(values: npt.NDArray[Any]) -> float | None:
    """The first number in ``values``, not zero, too small for float16 to hold with full precision, or None."""
    for block in _blocks(values):
        small = block[(block != 0) & (np.abs(block) < HALF_NORMAL)]
        if small.size:
            return float(small[0])
    return None


def _blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]
