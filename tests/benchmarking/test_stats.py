from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.benchmarking import Ratio, percentiles, ratio_interval

timings = st.floats(min_value=1e-6, max_value=1e3)


def test_percentiles_of_a_known_series() -> None:
    found = percentiles(list(range(101)))
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)


def test_an_exact_ratio_has_an_interval_of_no_width() -> None:
    rng = np.random.default_rng(0)
    slow = rng.uniform(1, 5, 50)
    found = ratio_interval(slow, slow / 2)
    assert found.value == found.low == found.high == 2
    assert found.differs


def test_what_slows_a_whole_round_down_cancels() -> None:
    rng = np.random.default_rng(0)
    disturbance = rng.lognormal(0, 1, 200)
    found = ratio_interval(1.3 * disturbance * rng.normal(1, 0.01, 200), disturbance * rng.normal(1, 0.01, 200))
    assert found.low < 1.3 < found.high
    assert found.high - found.low < 0.02


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        noise = rng.lognormal(0, 0.1, 40)  # its median is 1
        found = ratio_interval(1.1 * noise, np.ones(40), seed=seed)
        hits += found.low <= 1.1 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_blocks_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(8), 50)
    of_block = rng.normal(1, 0.02, 8)[blocks]
    above = of_block * rng.normal(1, 0.001, blocks.size)
    ignoring = ratio_interval(above, np.ones_like(above))
    heeding = ratio_interval(above, np.ones_like(above), blocks=blocks.tolist())
    assert heeding.high - heeding.low > 2 * (ignoring.high - ignoring.low)
    assert heeding.low < 1 < heeding.high


@settings(deadline=None)
@given(st.lists(st.tuples(timings, timings), min_size=1, max_size=20), st.integers(0, 3))
def test_an_interval_holds_its_ratio_and_both_lie_among_the_rounds(pairs: list[tuple[float, float]], seed: int) -> None:
    above, below = (np.array(side) for side in zip(*pairs, strict=True))
    found = ratio_interval(above, below, seed=seed)
    ratios = above / below
    assert ratios.min() <= found.low <= found.high <= ratios.max()
    assert found == ratio_interval(above, below, seed=seed)
    assert found.low <= found.value * (1 + 1e-9) or len(pairs) < 6
    scaled = ratio_interval(above * 8, below, seed=seed)
    np.testing.assert_allclose(
        [scaled.value, scaled.low, scaled.high], [found.value * 8, found.low * 8, found.high * 8]
    )


@pytest.mark.parametrize(
    ("above", "below", "blocks"),
    [([], [], None), ([1.0], [1.0, 2.0], None), ([0.0], [1.0], None), ([1.0], [-1.0], None), ([1.0], [1.0], [0, 1])],
)
def test_what_is_no_pair_of_timings(above: list[float], below: list[float], blocks: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"paired|positive|block"):
        ratio_interval(above, below, blocks=blocks)


@pytest.mark.parametrize(("low", "high", "differs"), [(0.9, 1.1, False), (1.01, 1.2, True), (0.8, 0.99, True)])
def test_only_an_interval_without_one_is_a_difference(low: float, high: float, differs: bool) -> None:
    assert Ratio((low + high) / 2, low, high).differs is differs
