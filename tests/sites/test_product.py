"""Products of factors: against loops, and whether a dtype holds them."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.sites.product import bounded, fits, fits_numbers, multiply

HALF, BRAIN, SINGLE = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 4)] * 3),
    kernel=st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=3),
)
def test_property_products_of_kernels(sizes: tuple[int, int, int], kernel: list[tuple[bool, int]]) -> None:
    rng = np.random.default_rng(0)
    m, r, n = sizes
    left = rng.standard_normal((m, r, *(k if first else 1 for first, k in kernel)))
    right = rng.standard_normal((r, n, *(1 if first else k for first, k in kernel)))
    found = multiply(left, right)
    assert found.shape == (m, n, *(k for _, k in kernel)) and found.dtype == np.float64
    for place in itertools.product(*(range(k) for _, k in kernel)):
        one = tuple(i if first else 0 for i, (first, _) in zip(place, kernel, strict=True))
        other = tuple(0 if first else i for i, (first, _) in zip(place, kernel, strict=True))
        np.testing.assert_allclose(found[(..., *place)], left[(..., *one)] @ right[(..., *other)], atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "one", "other", "holds"),
    [
        (HALF, 1.0, 1.0, True),
        (HALF, 300.0, 300.0, False),
        (HALF, 1e-4, 1e-4, False),
        (HALF, 1e-3, 1.0, True),
        (HALF, 0.0, 1.0, True),
        (BRAIN, 300.0, 300.0, True),
        (BRAIN, 1e-4, 1e-4, True),
        (BRAIN, 1e30, 1e30, False),
        (SINGLE, 1e30, 1e30, False),
        (SINGLE, 1e-10, 1e-10, True),
        (SINGLE, np.inf, 1.0, False),
        (SINGLE, np.nan, 1.0, False),
    ],
)
def test_what_a_dtype_holds(dtype: ir.DataType, one: float, other: float, holds: bool) -> None:
    left, right = np.full((40, 3), one), np.full((3, 500), other)
    assert fits(left, right, dtype) == holds
    assert fits(left[:, :, None, None], right[:, :, None, None], dtype) == holds


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-3, 4), rank=st.integers(1, 5))
def test_property_what_is_bounded_does_not_overflow(seed: int, exponent: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((4, rank)) * 10.0**exponent, rng.standard_normal((rank, 5)) * 10
    if bounded(left, right, HALF):
        assert np.abs(left @ right).max() <= 65504


@pytest.mark.parametrize("shapes", [((0, 2), (2, 3)), ((2, 0), (0, 3)), ((2, 2), (2, 0))])
def test_nothing_is_held(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    assert fits(np.zeros(shapes[0]), np.zeros(shapes[1]), HALF)


def test_numbers() -> None:
    assert fits_numbers(np.array([65504.0, -65504.0]), HALF)
    assert not fits_numbers(np.array([65504.0, 70000.0]), HALF)
    assert not fits_numbers(np.array([np.nan]), SINGLE)
    assert fits_numbers(np.array([3e38]), BRAIN) and not fits_numbers(np.array([3.4e38]), BRAIN)
    assert fits_numbers(np.zeros(0), HALF)
    assert float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) < 3.4e38
