"""graphopt.numerics.affine: the arithmetic of folding, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.affine import (
    all_finite,
    batch_norm_affine,
    fold_bias,
    scale_axis,
    scale_transposed_conv,
)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@given(st.integers(1, 6), st.integers(0, 100))
def test_batch_norm_is_affine(channels: int, seed: int) -> None:
    gamma, beta, mean, x = _normal(seed, 4, channels)
    variance = np.abs(_normal(seed + 1, channels))
    scale, shift = batch_norm_affine(gamma, beta, mean, variance, 1e-5)
    np.testing.assert_allclose(scale * x + shift, gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta, rtol=1e-9)


def test_batch_norm_in_float16_is_computed_in_float64() -> None:
    variance = np.array([6e-8], np.float16)  # its square root with epsilon is lost in float16
    scale, _ = batch_norm_affine(*(np.ones(1, np.float16) for _ in range(3)), variance, 1e-9)
    np.testing.assert_allclose(scale, 1 / np.sqrt(float(variance[0]) + 1e-9), rtol=1e-12)


@pytest.mark.parametrize("variance", [-1.0, -1e-5, np.nan])
def test_batch_norm_without_a_root_is_not_finite(variance: float) -> None:
    one = np.ones(1)
    assert not all_finite(*batch_norm_affine(one, one, one, np.array([variance]), 1e-5))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.sampled_from([np.float16, np.float32, np.float64]), st.integers(0, 100))
def test_scale_axis_rounds_once(axis: int, dtype: type, seed: int) -> None:
    weight = _normal(seed, 3, 4, 5).astype(dtype)
    scale = _normal(seed + 1, weight.shape[axis])
    scaled = scale_axis(weight, scale, axis)
    exact = np.moveaxis(np.moveaxis(weight.astype(np.float64), axis, -1) * scale, -1, axis)
    assert scaled.dtype == dtype
    np.testing.assert_array_equal(scaled, exact.astype(dtype))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 2)])
def test_scale_transposed_conv_scales_output_channels(groups: int, kernel: tuple[int, ...]) -> None:
    weight = _normal(1, 6, 2, *kernel)
    scale = _normal(2, 2 * groups)
    scaled = scale_transposed_conv(weight, scale, groups)
    for i in range(6):
        for j in range(2):
            group = i // (6 // groups)
            np.testing.assert_allclose(scaled[i, j], weight[i, j] * scale[group * 2 + j])


def test_fold_bias() -> None:
    scale, shift = np.array([2.0, 3.0]), np.array([0.5, -0.5])
    np.testing.assert_array_equal(
        fold_bias(np.array([1.0, 2.0], np.float32), scale, shift, np.dtype(np.float32)), [2.5, 5.5]
    )
    folded = fold_bias(None, scale, shift, np.dtype(np.float16))
    assert folded.dtype == np.float16
    np.testing.assert_array_equal(folded, shift)


def test_all_finite() -> None:
    assert all_finite(np.ones(2), np.zeros(0))
    assert not all_finite(np.ones(2), np.array([np.inf]))
    assert not all_finite(np.array([1.0, np.nan], np.float16))
