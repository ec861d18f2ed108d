"""Two bundles against each other on inputs that go different ways, each way counted as often as it is gone."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.benchmarking.stats import Ratio, ratio_interval
from graphopt.benchmarking.timing import Samples, time_block
from graphopt.bundles.running import BundleRunner

_LOADS = 4  # a load is a per cent faster or slower than the next one
_FEWEST_ROUNDS = 12
_PASS_SECONDS = 0.25  # of the inputs of one way, as far as one takes less
MOST_FEEDS = 4
"""Of a way, so many at most are timed."""


@dataclass(frozen=True)
class Way:
    """Inputs that go one way.

    Attributes:
        share: How often it is gone, of all inputs.
        feeds: Some that go it, at least one; the first few are timed.
    """

    share: float
    feeds: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """How many times as fast one bundle is as another: over all ways, and on each."""

    overall: Ratio
    each: tuple[float, ...]


def compare_ways(
    first: Path, second: Path, ways: Sequence[Way], *, seconds: float, custom_ops: Path | None = None, seed: int = 0
) -> Comparison:
    """Time two bundles by processor time, one thread, interleaved; loaded anew several times.

    Args:
        first: A bundle.
        second: One that takes the same inputs; above 1: it is the faster one.
        ways: At least one.
        seconds: How long to time; at least twelve rounds are timed however long they take.
        custom_ops: A library of custom operators.
        seed: Of the order within rounds and of the interval.
    """
    rng = np.random.default_rng(seed)
    samples = [(Samples(), Samples()) for _ in ways]
    counts: list[int] = []
    for load in range(_LOADS):
        pair = [BundleRunner(path, 1, custom_ops=custom_ops) for path in (first, second)]
        counts = counts or [_count(pair[0], way.feeds) for way in ways]
        calls = [_all_of(runner, way.feeds[:count]) for way, count in zip(ways, counts, strict=True) for runner in pair]
        taken = [one for both in samples for one in both]
        fewest = -(-_FEWEST_ROUNDS // _LOADS)
        time_block(calls, taken, load, rng, seconds / _LOADS, fewest, lambda *_: None, seconds)
        del calls, pair
        gc.collect()  # sessions are found by nothing else, and the collector may be paused
    weights = [way.share / count for way, count in zip(ways, counts, strict=True)]
    spent = [
        np.sum([weight * np.asarray(both[side].cpu) for weight, both in zip(weights, samples, strict=True)], axis=0)
        for side in (0, 1)
    ]
    overall = ratio_interval(*spent, blocks=samples[0][0].blocks, seed=seed)
    return Comparison(overall, tuple(ratio_interval(one.cpu, other.cpu).value for one, other in samples))


def _count(runner: BundleRunner, feeds: Sequence[Mapping[str, Any]]) -> int:
    """How many of some inputs to time."""
    call = runner.bind(feeds[0])
    call()
    began = time.perf_counter()
    call()
    most = int(_PASS_SECONDS / max(time.perf_counter() - began, 1e-9))
    return max(1, min(most, MOST_FEEDS, len(feeds)))


def _all_of(runner: BundleRunner, feeds: Sequence[Mapping[str, Any]]) -> Callable[[], object]:
    """A run on some inputs, one after the other."""
    calls = [runner.bind(feed) for feed in feeds]

    def run() -> None:
        for call in calls:
            call()

    return run
