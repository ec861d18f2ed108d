"""How far the outputs of models are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.benchmarking.inputs import known_inputs, samples_plan
from graphopt.bundles.plan import Plan
from graphopt.bundles.samples.cutting import count_samples, result_of, sample_of
from graphopt.calibration import failing_on
from graphopt.errors import BadInput
from graphopt.feeds import Feeds
from graphopt.runtime.loading import Runner


def compare(paths: Sequence[Path], runners: Sequence[Runner], feeds: Sequence[Feeds]) -> list[tuple[float, float]]:
    """For each model, how far its outputs are from the first one's at most, and how large those are.

    Where samples go their own ways in one of the two, what it gives for a sample is compared with what the other gives
    for that sample alone.
    """
    found = [(0.0, 0.0) for _ in runners]
    plans = [samples_plan(path) for path in paths]
    for feed in feeds:
        with failing_on(feed):
            reference = _run(runners[0], feed)
            for index, (path, runner) in enumerate(zip(paths, runners, strict=True)):
                outputs = _run(runner, feed) if index else reference
                if set(outputs) != set(reference):
                    listed = f"{', '.join(reference)} and {', '.join(outputs)}"
                    raise BadInput(f"the models give different outputs: {listed}", where=str(path))
                ours, theirs = plans[0], plans[index]
                pairs = [(reference, outputs)]
                if ours is not None and theirs is None:
                    pairs = [(one, alone) for alone, one in _one_by_one(ours, reference, runner, feed)]
                elif theirs is not None and ours is None:
                    pairs = _one_by_one(theirs, outputs, runners[0], feed)
                for expected, got in pairs:
                    apart = max((difference(expected[name], got[name]) for name in expected), default=0.0)
                    largest = max((magnitude(value) for value in expected.values()), default=0.0)
                    found[index] = (max(found[index][0], apart), max(found[index][1], largest))
    return found


def _run(runner: Runner, feeds: Feeds) -> dict[str, Any]:
    return runner.run(known_inputs(runner, feeds))


def _one_by_one(
    plan: Plan, outputs: dict[str, Any], other: Runner, feeds: Feeds
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each sample what another model gives for it alone, and what a bundle gave for it among the others."""
    count = count_samples(plan, feeds)
    alone = [_run(other, sample_of(plan, feeds, index)) for index in range(count)]
    return [(one, result_of(plan, outputs, index, count, one)) for index, one in enumerate(alone)]


def magnitude(value: Any) -> float:
    if isinstance(value, list):
        return max((magnitude(item) for item in value), default=0.0)
    array = _numbers(value)
    if array is None or array.size == 0:
        return 0.0
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0


def difference(one: Any, other: Any) -> float:
    """The largest absolute difference; infinite where shapes, NaNs, infinities or strings differ."""
    if isinstance(one, list) or isinstance(other, list):
        if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other)):
            return float("inf")
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    ours, theirs = _numbers(one), _numbers(other)
    if ours is None or theirs is None:
        return 0.0 if np.array_equal(np.asarray(one), np.asarray(other)) else float("inf")
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if bool(np.all(same)):
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(ours[~same] - theirs[~same])
    return float(apart.max()) if bool(np.all(np.isfinite(apart))) else float("inf")


def _numbers(value: Any) -> np.ndarray[Any, Any] | None:
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return None
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
