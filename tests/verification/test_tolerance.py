"""When two tensors count as the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from graphopt.verification.tolerance import (
    SLACK,
    distance,
    eps_of,
    is_float,
    rounding_limit,
    same_bits,
    why_different,
    within_eps,
)

Array = np.ndarray[Any, Any]
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
NAN, INF = float("nan"), float("inf")


def floats(size: int = 6) -> st.SearchStrategy[Array]:
    return npst.arrays(np.float32, size, elements=st.floats(-1e3, 1e3, width=32))


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_floats(dtype: type) -> None:
    a = np.array([1.5, -0.0, NAN, 2], dtype)
    assert is_float(a)
    assert same_bits(a, a.copy())
    assert not same_bits(a, np.array([1.5, 0.0, NAN, 2], dtype))
    assert not same_bits(a, np.array([1.5, -0.0, NAN, NAN], dtype))
    assert not same_bits(a, np.array([1.75, -0.0, NAN, 2], dtype))
    assert not same_bits(a, a.reshape(2, 2))


def test_all_nans_are_one() -> None:
    quiet, other = np.array([0x7FC00000, 0], np.uint32).view(np.float32), np.array([0xFFC00001, 0], np.uint32)
    assert same_bits(quiet, other.view(np.float32))
    assert not same_bits(quiet, f32(NAN, -0.0))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.array([1, 2], np.int64), np.array([1, 3], np.int64)),
        (np.array([1, 2], np.int64), np.array([1, 2], np.int32)),
        (np.array([True]), np.array([False])),
        (np.array(["a", "b"], object), np.array(["a", "c"], object)),
        (np.array([1 + 1j], np.complex64), np.array([1 + 2j], np.complex64)),
        (np.array([1, 2], ml_dtypes.int4), np.array([1, 3], ml_dtypes.int4)),
        (f32(1), np.float64([1])),
        (f32(), np.zeros((0, 2), np.float32)),
    ],
)
def test_what_has_other_bits_is_different(a: Array, b: Array) -> None:
    assert same_bits(a, a.copy())
    assert same_bits(b, b.copy())
    assert not same_bits(a, b)
    assert why_different(a, b) is not None
    assert why_different(a, b, bitwise=True) is not None
    assert why_different(a, a.copy(), bitwise=True) is None


def test_integers_count_the_values_that_differ() -> None:
    reason = why_different(np.array([1, 2, 3]), np.array([1, 5, 7]))
    assert reason == "2 of 3 values differ"


@pytest.mark.parametrize("bitwise", [True, False])
def test_dtype_and_shape_come_first(bitwise: bool) -> None:
    assert why_different(f32(1), np.float64([1]), bitwise=bitwise) == "dtype float32 where the original has float64"
    assert why_different(f32(1), f32(1, 1), bitwise=bitwise) == "shape [1] where the original has [2]"


# -- distance ----------------------------------------------------------------------------------------------------------


def test_distance() -> None:
    gap = distance(f32(1, 2, 3), f32(1, 2, 4))
    assert gap.max_abs == 1
    assert gap.max_rel == 0.25
    assert gap.cosine == pytest.approx((1 + 4 + 12) / np.sqrt(14 * 21))
    assert distance(f32(), f32()).max_abs == 0
    assert distance(np.array([True, False]), np.array([True, True])).max_abs == 1
    assert distance(np.array([1], np.uint8), np.array([255], np.uint8)).max_abs == 254


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        (f32(NAN, 1), f32(NAN, 1), 0),
        (f32(INF, 1), f32(INF, 2), 1),
        (f32(INF, 1), f32(-INF, 1), INF),
        (f32(NAN, 1), f32(INF, 1), INF),
        (f32(NAN, 1), f32(1, 1), INF),
        (f32(1, 1), f32(NAN, 1), INF),
        (f32(1, 1), f32(INF, 1), INF),
        (f32(NAN), f32(NAN), 0),
    ],
)
def test_positions_of_nan_and_infinity_must_agree(a: Array, b: Array, apart: float) -> None:
    gap = distance(a, b)
    assert gap.max_abs == apart
    if apart == INF:
        assert gap.cosine == 0.0
        assert why_different(a, b) is not None


@pytest.mark.parametrize(("c", "r", "cosine"), [((0, 0), (0, 0), 1), ((0, 0), (1, 0), 0), ((1, 0), (0, 0), 0)])
def test_cosine_of_zeros(c: tuple[float, ...], r: tuple[float, ...], cosine: float) -> None:
    assert distance(f32(*c), f32(*r)).cosine == cosine


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_cosine_of_very_large_and_very_small_numbers(scale: float) -> None:
    gap = distance(np.array([1.0, 1.0]) * scale, np.array([1.0, 0.0]) * scale)
    assert gap.cosine == pytest.approx(np.sqrt(0.5))


@settings(max_examples=50, deadline=None)
@given(floats(), floats(), st.sampled_from([2.0, 0.5, 1024.0, -4.0]))
def test_distance_scales(a: Array, b: Array, factor: float) -> None:
    """Powers of two are exact: absolute distances scale, relative ones and cosines stay."""
    one, other = distance(a, b), distance(a * np.float32(factor), b * np.float32(factor))
    assert other.max_abs == one.max_abs * abs(factor)
    assert other.max_rel == pytest.approx(one.max_rel)
    assert other.cosine == pytest.approx(one.cosine)
    assert -1 - 1e-9 <= one.cosine <= 1


# -- the rounding rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_eps_of_the_largest_magnitude_is_always_allowed(dtype: type) -> None:
    eps = eps_of(np.dtype(dtype))
    original = np.array([2.0, 1.0, 0.0], dtype)
    assert within_eps(np.array([2.0, 1.0, eps], dtype), original)
    near = np.array([2.0, 1.0 + eps, 0.0], dtype)
    assert within_eps(near, original)
    assert why_different(near, original) is None
    assert why_different(near, original, exact=original.astype(np.float64)) is None
    assert why_different(near, original, bitwise=True) is not None
    far = np.array([2.0, 1.0 + 4 * eps, 0.0], dtype)
    assert not within_eps(far, original)
    assert why_different(far, original, exact=original.astype(np.float64)) is not None


@pytest.mark.parametrize("other", [0.0, 1.0, -np.inf, np.nan])
def test_what_is_infinite_stays_infinite(other: float) -> None:
    original = np.array([1.0, np.inf, np.nan], np.float32)
    assert within_eps(original.copy(), original)
    assert not within_eps(np.array([1.0, other, np.nan], np.float32), original)
    assert not within_eps(np.array([np.inf, np.inf, np.nan], np.float32), original)
    assert not within_eps(np.array([1.0, np.inf, 0.0], np.float32), original)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("error", [0.0, 3.0, 10.0])
def test_four_times_the_originals_error_and_one_eps(dtype: type, error: float) -> None:
    """The original is ``error`` eps off; the candidate may be 4 error + 1."""
    eps = eps_of(np.dtype(dtype))
    exact = np.array([1.0, 0.5])
    original = np.array([1 + error * eps, 0.5], dtype)
    allowed = SLACK * error + 1
    for off, passes in ((0, True), (error, True), (allowed, True), (allowed + 2, False), (10 * allowed + 2, False)):
        reason = why_different(np.array([1 + off * eps, 0.5], dtype), original, exact=exact)
        assert (reason is None) is passes, off
        if reason is not None:
            assert "from the float64 result" in reason


@settings(max_examples=50, deadline=None)
@given(floats(), st.floats(0, 1), st.floats(0, 1))
def test_what_is_nearer_passes_where_what_is_further_does(exact: Array, small: float, large: float) -> None:
    small, large = sorted((small, large))
    original = exact + np.float32(1e-3)
    outcomes = [
        why_different((exact + np.float32(off)).astype(np.float32), original, exact=exact.astype(np.float64)) is None
        for off in (small, large)
    ]
    assert outcomes[0] or not outcomes[1]


@settings(max_examples=50, deadline=None)
@given(floats(), floats(), floats(), st.sampled_from([2.0, 0.25, 2.0**20]))
def test_the_verdict_does_not_depend_on_the_scale(
    candidate: Array, original: Array, exact: Array, factor: float
) -> None:
    wide = exact.astype(np.float64)
    f = np.float32(factor)
    one = why_different(candidate, original, exact=wide)
    assert (why_different(candidate * f, original * f, exact=wide * factor) is None) is (one is None)


@settings(max_examples=30, deadline=None)
@given(floats(), floats())
def test_the_original_itself_always_passes(original: Array, exact: Array) -> None:
    assert why_different(original.copy(), original, exact=exact.astype(np.float64)) is None
    assert why_different(original.copy(), original) is None
    assert why_different(original.copy(), original, bitwise=True) is None


def test_without_a_float64_result_the_noise_is_the_measure() -> None:
    original = f32(1, 2)
    assert why_different(f32(1.001, 2), original) is not None
    assert why_different(f32(1.001, 2), original, noise=1e-3) is None
    assert why_different(f32(1.1, 2), original, noise=1e-3) is not None
    assert "no float64 result" in (why_different(f32(1.1, 2), original) or "")


@pytest.mark.parametrize("noise", [INF, NAN])
def test_endless_noise_does_not_allow_everything(noise: float) -> None:
    assert why_different(f32(5, 5), f32(1, 2), noise=noise) is not None
    assert why_different(f32(5, 5), f32(1, 2), noise=noise, exact=np.array([1.0, 2.0])) is not None


OVERFLOW = (f32(INF, 1, 2), np.array([1e39, 1.0, 2.0]))
UNDEFINED = (f32(NAN, 1, 2), np.array([0.5, 1.0, 2.0]))
TOO_EXACT = (f32(3, 1, 2), np.array([NAN, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("case", "candidate", "passes"),
    [
        (OVERFLOW, f32(INF, 1, 2), True),
        (OVERFLOW, f32(INF, 1, 2.0000002), True),
        (OVERFLOW, f32(INF, 7, 2), False),  # one overflow does not excuse the rest
        (OVERFLOW, f32(-INF, 1, 2), False),
        (OVERFLOW, f32(5, 1, 2), False),
        (OVERFLOW, f32(NAN, 1, 2), False),
        (UNDEFINED, f32(0.5, 1, 2), True),  # better than the original
        (UNDEFINED, f32(NAN, 1, 2), True),
        (UNDEFINED, f32(0.6, 1, 2), False),
        (UNDEFINED, f32(NAN, 1, 3), False),
        (TOO_EXACT, f32(3, 1, 2), True),
        (TOO_EXACT, f32(9, 1, 2), False),
        (TOO_EXACT, f32(NAN, 1, 2), False),
    ],
)
def test_where_the_original_and_float64_disagree_on_what_is_finite(
    case: tuple[Array, Array], candidate: Array, passes: bool
) -> None:
    original, exact = case
    assert (why_different(candidate, original, exact=exact) is None) is passes


def test_the_limit_in_numbers() -> None:
    exact = np.array([2.0, -8.0])
    original = f32(2.5, -8.0)
    assert rounding_limit(original, exact, np.dtype(np.float32)) == pytest.approx(4 * 0.5 + 8 * 2**-23)
    assert rounding_limit(original, exact, np.dtype(np.float32), noise=1.0) == pytest.approx(4 * 1.0 + 8 * 2**-23)
    assert rounding_limit(f32(), np.zeros(0), np.dtype(np.float32)) == 0


def test_nothing_is_compared_as_something() -> None:
    assert why_different(f32(), f32()) is None
    assert why_different(f32(), f32(), exact=np.zeros(0)) is None
    zeros = np.zeros(3, np.float32)
    assert why_different(f32(1e-30, 0, 0), zeros, exact=np.zeros(3)) is not None
