"""Inputs for a kernel with what it has to give and how far that may be off: what a machine with a GPU is checked by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One launch.

    Attributes:
        label: The sizes, in a few words.
        inputs: In the order of the kernel's parameters, of its dtypes.
        dtypes: Of the outputs.
        wanted: The outputs in float64.
        off: For each output how far every element may be from that; the same shape.
        attributes: Of the plugin, where it is one.
    """

    label: str
    inputs: Sequence[Array]
    dtypes: Sequence[str]
    wanted: Sequence[Array]
    off: Sequence[Array]
    attributes: Mapping[str, Array] = field(default_factory=dict)

    @property
    def outputs(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each output."""
        return [(tuple(array.shape), dtype) for array, dtype in zip(self.wanted, self.dtypes, strict=True)]

    def worst(self, outputs: Sequence[Array]) -> float:
        """How far the outputs are off at most, as a part of what is allowed: above 1 is wrong; infinite for a NaN."""
        worst = 0.0
        for got, wanted, off in zip(outputs, self.wanted, self.off, strict=True):
            if got.size == 0:
                continue
            with np.errstate(invalid="ignore", over="ignore"):
                parts = np.abs(got.astype(np.float64) - wanted) / off
            worst = max(worst, float("inf") if np.isnan(parts).any() else float(parts.max()))
        return worst


SUM_UNIT = 2.0**-23
"""Twice float32's rounding unit: tensor cores cut off what they add."""


def rounding(dtype: str) -> tuple[float, float]:
    """Half of the distance from 1 to the next number of a dtype, and its smallest number."""
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    finfo: Any = ml_dtypes.finfo(kind)  # type: ignore[no-untyped-call]
    return float(finfo.eps) / 2, float(finfo.smallest_subnormal)


def off_of_sum(magnitude: Array, terms: int, dtype: str, inherited: Array | float = 0.0) -> Array:
    """How far a sum of products in float32, rounded to a dtype, may be from the exact one.

    k products are off by at most (k + 2) e times the sum of their magnitudes, with e as `SUM_UNIT`; rounding adds the
    dtype's unit times the magnitude, or its smallest number.

    Args:
        magnitude: The sum of the magnitudes of the products.
        terms: How many products there are.
        dtype: Of the result.
        inherited: How far the sum is off already since its operands are.
    """
    unit, smallest = rounding(dtype)
    summed = inherited + (terms + 2) * SUM_UNIT * (magnitude + inherited)
    return np.asarray(summed + unit * (magnitude + summed) + smallest)


def draw(rng: np.random.Generator, shape: Sequence[int], dtype: str, scale: float = 1.0) -> Array:
    """Normal numbers of a dtype."""
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    return (scale * rng.standard_normal(tuple(shape))).astype(np.float32).astype(kind)
