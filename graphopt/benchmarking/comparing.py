"""How far the outputs of models are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.benchmarking.inputs import known_inputs
from graphopt.errors import BadInput
from graphopt.feeds import Feeds
from graphopt.runtime.loading import Runner


def compare(paths: Sequence[Path], runners: Sequence[Runner], feeds: Sequence[Feeds]) -> list[tuple[float, float]]:
    """For each model, how far its outputs are from the first one's at most, and how large those are."""
    found = [(0.0, 0.0) for _ in runners]
    for feed in feeds:
        reference = runners[0].run(known_inputs(runners[0], feed))
        largest = max((magnitude(value) for value in reference.values()), default=0.0)
        for index, (path, runner) in enumerate(zip(paths, runners, strict=True)):
            outputs = runner.run(known_inputs(runner, feed)) if index else reference
            if set(outputs) != set(reference):
                listed = f"{', '.join(reference)} and {', '.join(outputs)}"
                raise BadInput(f"the models give different outputs: {listed}", where=str(path))
            apart = max((difference(reference[name], outputs[name]) for name in reference), default=0.0)
            found[index] = (max(found[index][0], apart), max(found[index][1], largest))
    return found


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
