"""Percentiles, and the ratio of paired timings with its bootstrap interval. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 1000


@dataclass(frozen=True)
class Percentiles:
    """Of a set of timings, in the unit they were given in."""

    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1: only then is one faster than the other."""
        return self.low > 1 or self.high < 1


def percentiles(samples: Sequence[float] | np.ndarray[Any, Any]) -> Percentiles:
    """The 50th, 90th, 95th and 99th percentile. Raises ValueError for no samples."""
    if len(samples) == 0:
        raise ValueError("no samples")
    p50, p90, p95, p99 = np.percentile(np.asarray(samples, np.float64), [50, 90, 95, 99])
    return Percentiles(float(p50), float(p90), float(p95), float(p99))


def ratio_interval(
    numerator: Sequence[float] | np.ndarray[Any, Any],
    denominator: Sequence[float] | np.ndarray[Any, Any],
    *,
    blocks: Sequence[int] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ratio:
    """How many times larger ``numerator`` is than ``denominator``, from paired rounds.

    The ratio is taken within each round, so that what slows a whole round down cancels; the median over the
    rounds is the estimate, and the percentile bootstrap over the rounds its interval. Where rounds come in
    blocks (a model loaded anew lies elsewhere in memory, and is a little faster or slower for all rounds of that
    load), blocks are drawn first and rounds within them: the interval then covers the next load too.

    Args:
        numerator: One positive timing a round.
        denominator: One positive timing a round, of the same rounds.
        blocks: The block that each round belongs to; None if there is but one.
        confidence: Of the interval.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: The two differ in length, are empty, or hold values that are not positive.
    """
    above = np.asarray(numerator, np.float64)
    below = np.asarray(denominator, np.float64)
    if above.shape != below.shape or above.ndim != 1 or above.size == 0:
        raise ValueError(f"paired rounds are needed, got {above.shape} and {below.shape}")
    if not (np.all(above > 0) and np.all(below > 0)):
        raise ValueError("timings must be positive")
    labels = np.zeros(above.size, np.int64) if blocks is None else np.asarray(blocks)
    if labels.shape != above.shape:
        raise ValueError(f"a block is needed for each of the {above.size} rounds, got {labels.size}")
    ratios = above / below
    groups = [ratios[labels == label] for label in np.unique(labels)]
    rng = np.random.default_rng(seed)
    medians = _resampled_medians(groups, rng)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _resampled_medians(groups: Sequence[np.ndarray[Any, Any]], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if len(groups) == 1:
        rounds = groups[0]
        medians: np.ndarray[Any, Any] = np.median(
            rounds[rng.integers(0, rounds.size, size=(_RESAMPLES, rounds.size))], axis=1
        )
        return medians
    found = np.empty(_RESAMPLES)
    for turn in range(_RESAMPLES):
        drawn = [groups[index] for index in rng.integers(0, len(groups), size=len(groups))]
        found[turn] = np.median(np.concatenate([rounds[rng.integers(0, rounds.size, rounds.size)] for rounds in drawn]))
    return found
