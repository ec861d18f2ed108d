"""When two tensors count as the same, and how far apart they are.

``rounding``: the candidate may be no further from the float64 result than four times the original is, plus one eps of
the dtype, both measured in the largest absolute difference over the tensor and the eps relative to the largest
magnitude in it. Integers, booleans and strings are compared exactly, and so is everything under ``bitwise``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

SLACK = 4.0
"""How many times further from the float64 result than the original a candidate may be."""


@dataclass
class Distance:
    """How far a candidate is from a reference.

    Attributes:
        max_abs: Largest absolute difference.
        max_rel: ``max_abs`` over the largest magnitude in the reference.
        cosine: Cosine between the two, flattened; 1.0 where both are zero.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    cosine: float = 1.0


def is_float(array: Array) -> bool:
    """Whether an array holds floating-point numbers, the narrow ones of ``ml_dtypes`` included."""
    return array.dtype.kind in "fc" or array.dtype.name.startswith(("bfloat", "float"))


def eps_of(dtype: np.dtype[Any]) -> float:
    """The distance from 1.0 to the next number of a floating-point dtype."""
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same dtype, shape and bits (all NaNs count as one)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "OUS":
        return bool(np.array_equal(a, b))
    if a.tobytes() == b.tobytes():
        return True
    if not is_float(a):
        return False
    wide_a, wide_b = _wide(a), _wide(b)
    both_nan = np.isnan(wide_a) & np.isnan(wide_b)
    return bool(np.all(both_nan | ((wide_a == wide_b) & (np.signbit(wide_a) == np.signbit(wide_b)))))


def distance(candidate: Array, reference: Array) -> Distance:
    """How far two arrays of one shape are apart. Positions where both are the same infinity or NaN do not count."""
    if candidate.size == 0 or not (is_float(reference) or reference.dtype.kind in "iub"):
        return Distance()
    c, r = _wide(candidate).ravel(), _wide(reference).ravel()
    finite = np.isfinite(r)
    if not np.array_equal(finite, np.isfinite(c)) or not np.array_equal(c[~finite], r[~finite], equal_nan=True):
        return Distance(float("inf"), float("inf"), 0.0)
    c, r = c[finite], r[finite]
    if r.size == 0:
        return Distance()
    largest = float(np.max(np.abs(r)))
    worst = float(np.max(np.abs(c - r)))
    cosine = 1.0 if worst == 0.0 else _cosine(c, r)
    return Distance(worst, worst / largest if largest > 0 else (0.0 if worst == 0 else float("inf")), min(cosine, 1.0))


def _cosine(a: Array, b: Array) -> float:
    """Of two flat finite arrays; scaled first, since squares of very large and very small numbers do not exist."""
    largest_a, largest_b = float(np.max(np.abs(a))), float(np.max(np.abs(b)))
    if largest_a == 0 or largest_b == 0:
        return 0.0
    a, b = a / largest_a, b / largest_b
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def rounding_limit(original: Array, exact: Array, dtype: np.dtype[Any], *, noise: float = 0.0) -> float:
    """The largest absolute distance from ``exact`` that a candidate of ``dtype`` may have.

    Args:
        original: What the original computes.
        exact: The float64 result.
        dtype: The dtype of the output.
        noise: A further error that the original is known to have, absolute (0: none).
    """
    scale = float(np.max(np.abs(exact[np.isfinite(exact)]), initial=0.0))
    return SLACK * max(distance(original, exact).max_abs, noise) + eps_of(dtype) * scale


def within_eps(candidate: Array, original: Array) -> bool:
    """Whether two float arrays differ by no more than one eps of the dtype, relative to the largest magnitude.

    Then the candidate passes the rounding rule whatever the float64 result is, and need not be compared with it.
    """
    c, r = _wide(candidate), _wide(original)
    finite = np.isfinite(r)
    if not finite.all():
        if not np.array_equal(c[~finite], r[~finite], equal_nan=True):
            return False
        c, r = c[finite], r[finite]
    # Where the candidate alone is infinite or NaN, so is the difference, which is not within anything.
    worst = float(np.max(np.abs(c - r), initial=0.0))
    return worst <= eps_of(original.dtype) * float(np.max(np.abs(r), initial=0.0))


def why_different(
    candidate: Array,
    original: Array,
    *,
    exact: Array | None = None,
    noise: float = 0.0,
    bitwise: bool = False,
) -> str | None:
    """Why a candidate does not count as the same as the original, or None where it does.

    Args:
        candidate: What the rewritten graph computes.
        original: What the original computes, optimizations off.
        exact: The float64 result of the original; None where it cannot be had.
        noise: Without ``exact``: an absolute error that the original is known to have.
        bitwise: Whether the bits must be the same.
    """
    if candidate.dtype != original.dtype:
        return f"dtype {candidate.dtype} where the original has {original.dtype}"
    if candidate.shape != original.shape:
        return f"shape {list(candidate.shape)} where the original has {list(original.shape)}"
    if same_bits(candidate, original):
        return None
    if not is_float(original) or original.dtype.kind == "c":
        return f"{_count_different(candidate, original)} of {original.size} values differ"
    noise = noise if np.isfinite(noise) else 0.0  # an infinite error would allow anything
    gap = distance(candidate, original)
    if bitwise:
        return f"bits differ (largest difference {gap.max_abs:.3g})"
    if within_eps(candidate, original):
        return None
    if exact is None:
        finite = np.isfinite(_wide(original))
        scale = float(np.max(np.abs(_wide(original)[finite]), initial=0.0))
        limit = 4 * SLACK * noise + 64 * eps_of(original.dtype) * scale
        if gap.max_abs <= limit:
            return None
        return f"differs by {gap.max_abs:.3g}, allowed {limit:.3g} (no float64 result to compare with)"
    wide, finite = _wide(original), np.isfinite(exact)
    # Where the original overflows and float64 does not, or the other way round, the original is what there is to meet,
    # or the float64 result, which is better.
    agree = (np.isfinite(wide) & finite) | (wide == exact) | (np.isnan(wide) & np.isnan(exact))
    yardstick = np.where(agree, exact, wide)
    limit = rounding_limit(original, yardstick, original.dtype, noise=noise)
    better = ~agree & finite & (np.abs(_wide(candidate) - exact) <= limit)
    error = distance(np.where(better, yardstick, _wide(candidate)), yardstick).max_abs
    if error <= limit:
        return None
    own = distance(original, yardstick).max_abs
    return f"is {error:.3g} from the float64 result, the original {own:.3g}, allowed {limit:.3g}"


def _count_different(a: Array, b: Array) -> int:
    return int(np.sum(a != b))


def _wide(array: Array) -> Array:
    if array.dtype.kind == "c":
        return np.stack((array.real, array.imag)).astype(np.float64)
    return array.astype(np.float64) if array.dtype != np.float64 else array
