from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.numerics import half


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (65504.0, None),
        (65519.99, None),
        (65520.0, 65520.0),
        (-65520.0, -65520.0),
        (-3.4e38, np.float32(-3.4e38)),
        (np.inf, None),
        (-np.inf, None),
        (np.nan, None),
    ],
)
def test_beyond_half(value: float, found: float | None) -> None:
    assert half.beyond_half(np.array([1, value, np.nan], np.float32)) == found
    assert half.beyond_half(np.array([1, value], np.float32)) == found


@given(st.floats(width=32))
def test_beyond_half_agrees_with_the_rounding(value: float) -> None:
    array = np.array([value], np.float32)
    assert (half.beyond_half(array) is not None) == bool(np.isfinite(array) & ~np.isfinite(half.to_half(array)))


@pytest.mark.parametrize(
    ("value", "found"), [(0.0, None), (-0.0, None), (2.0**-14, None), (1e-5, 1e-5), (-1e-12, -1e-12)]
)
def test_below_half(value: float, found: float | None) -> None:
    assert half.below_half(np.array([1, value], np.float64)) == found


def test_the_last_block_counts() -> None:
    values = np.zeros(3 * half._BLOCK + 5, np.float32)
    assert half.beyond_half(values) is None
    values[-1] = 1e6
    assert half.beyond_half(values) == 1e6


def test_rounding_is_to_nearest_even_and_silent() -> None:
    with np.errstate(over="raise"):
        rounded = half.to_half(np.array([2049, 2051, 1e9, -np.inf], np.float32))
    assert rounded.tolist() == [2048, 2052, np.inf, -np.inf]


def test_nothing() -> None:
    assert half.beyond_half(np.zeros((0, 3), np.float32)) is None
    assert half.below_half(np.zeros((0, 3), np.float32)) is None
