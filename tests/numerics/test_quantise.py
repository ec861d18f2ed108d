"""Round-to-nearest codes against a float64 reference written out element by element."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphopt.numerics import quantise
from graphopt.numerics.quantise import Scheme

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def group_of(index: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    if scheme.block == 0:
        return (index[scheme.axis],)
    return tuple(i // scheme.block if axis == scheme.axis else i for axis, i in enumerate(index))


def reference(weights: np.ndarray[Any, Any], scheme: Scheme) -> dict[tuple[int, ...], tuple[float, float]]:
    """Group -> the lowest and the highest weight in it, in float64."""
    found: dict[tuple[int, ...], list[float]] = {}
    for index in np.ndindex(weights.shape):
        found.setdefault(group_of(index, scheme), []).append(float(weights[index]))
    return {group: (min(values), max(values)) for group, values in found.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], Scheme]:
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(0, rank - 1))
    block = draw(st.sampled_from([0, 1, 2, 4]))
    shape = [draw(st.integers(1, 5)) for _ in range(rank)]
    if block:
        shape[axis] = block * draw(st.integers(1, 3))
    dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS)))]
    values = draw(
        hnp.arrays(np.float32, tuple(shape), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False))
    )
    scheme = Scheme(draw(st.sampled_from([2, 3, 4, 8])), axis, block, draw(st.booleans()))
    return values.astype(dtype), scheme


@settings(max_examples=150, deadline=None)
@given(cases())
def test_codes_are_the_nearest(case: tuple[np.ndarray[Any, Any], Scheme]) -> None:
    weights, scheme = case
    scales, zeros = quantise.scales_of(weights, scheme)
    codes = quantise.codes_of(weights, scales, zeros, scheme)
    back = quantise.dequantise(codes, scales, zeros, scheme)

    lowest, highest = scheme.code_range()
    eps = float(ml_dtypes.finfo(weights.dtype).eps)
    assert scales.dtype == weights.dtype
    assert scales.shape == scheme.scale_shape(weights.shape)
    assert (scales.astype(np.float64) > 0).all()
    assert codes.shape == weights.shape
    assert codes.dtype == (np.int8 if scheme.symmetric else np.uint8)
    assert codes.min() >= lowest
    assert codes.max() <= highest
    extremes = reference(weights, scheme)
    for index in np.ndindex(weights.shape):
        group = group_of(index, scheme)
        scale = float(scales[group])
        zero = 0.0 if zeros is None else float(zeros[group])
        low, high = extremes[group]
        span = max(-low, high) if scheme.symmetric else max(high, 0) - min(low, 0)
        steps = highest if scheme.symmetric else highest - lowest
        tiny = float(ml_dtypes.finfo(weights.dtype).smallest_normal)
        assert scale == pytest.approx(max(span / steps, tiny) if span else 1.0, rel=eps)
        # The code is one that is nearest in float64 (a quotient may round onto a tie), unless clipped.
        exact = float(weights[index]) / scale + zero
        nearest = min(max(exact, lowest), highest)
        assert abs(float(codes[index]) - nearest) <= 0.5 + 1e-6 * abs(nearest) + 1e-6
        # Read back: half a step, and what rounding zero point, scale and result adds.
        bound = scale * (0.5 if scheme.symmetric else 1.0) + 2 * eps * max(abs(low), abs(high), scale)
        assert abs(float(back[index]) - float(weights[index])) <= bound


def test_ties_round_to_even() -> None:
    weights = np.array([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    scales, zeros = quantise.scales_of(weights, Scheme(4, 0))
    assert scales.tolist() == [1.0]
    assert quantise.codes_of(weights, scales, zeros, Scheme(4, 0)).tolist() == [[7, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [0, 2])
def test_zeros_stay_zero_and_give_no_zero_scale(symmetric: bool, block: int) -> None:
    weights = np.zeros((4, 4), np.float16)
    weights[0] = [0, 3, 0, -1]
    scheme = Scheme(8, 0, block, symmetric)
    scales, zeros = quantise.scales_of(weights, scheme)
    assert (scales > 0).all()
    back = quantise.dequantise(quantise.codes_of(weights, scales, zeros, scheme), scales, zeros, scheme)
    assert (back[weights == 0] == 0).all()


def test_a_scale_does_not_vanish_in_float16() -> None:
    weights = np.full((1, 4), 6e-8, np.float16)
    scales, _ = quantise.scales_of(weights, Scheme(8, 0))
    assert scales[0] == np.finfo(np.float16).smallest_normal


def test_extremes_are_exact_when_one_sided() -> None:
    weights = np.linspace(2, 6, 16, dtype=np.float32).reshape(2, 8)
    scheme = Scheme(8, 0, symmetric=False)
    scales, zeros = quantise.scales_of(weights, scheme)
    assert zeros is not None
    assert zeros.tolist() == [0, 0]
    back = quantise.dequantise(quantise.codes_of(weights, scales, zeros, scheme), scales, zeros, scheme)
    np.testing.assert_allclose(back[:, -1], weights[:, -1], rtol=1e-6)


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (0, 16), (1, 16)])
def test_slabs_do_not_matter(axis: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    scheme = Scheme(4, axis, block, symmetric=False)
    whole = quantise.scales_of(weights, scheme)
    codes = quantise.codes_of(weights, *whole, scheme)
    monkeypatch.setattr(quantise, "_SLAB", 50)
    parts = quantise.scales_of(weights, scheme)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])
    np.testing.assert_array_equal(codes, quantise.codes_of(weights, *parts, scheme))


def test_blocks_must_divide() -> None:
    with pytest.raises(ValueError, match="blocks of 32 do not divide an axis of 48"):
        Scheme(4, 0, 32).scale_shape((48, 8))


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_four_bits_are_packed_low_half_first(count: int) -> None:
    codes = np.array([-7, 7, -1, 0, 3, -8, 5], np.int8)[:count]
    packed = quantise.pack4(codes)
    assert packed.dtype == np.uint8
    assert packed.size == (count + 1) // 2
    halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
    np.testing.assert_array_equal(np.where(halves > 7, halves - 16, halves), codes)


def test_an_empty_weight() -> None:
    weights = np.zeros((0, 4), np.float32)
    scales, zeros = quantise.scales_of(weights, Scheme(8, 1))
    assert scales.tolist() == [1.0] * 4
    assert quantise.codes_of(weights, scales, zeros, Scheme(8, 1)).shape == (0, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite(bad: float) -> None:
    weights = np.zeros((300, 4000), np.float32)
    assert quantise.all_finite(weights)
    weights[299, 3999] = bad
    assert not quantise.all_finite(weights)
