"""Eager torch, the unsplit network and the bundle, timed in turn on images that take different paths."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphopt
from benchmarks.dynamic.models.dynamic import Dynamic, Exits
from benchmarks.dynamic.paths import taken
from benchmarks.dynamic.seeding import calibration, outcomes
from graphopt.benchmarking.stats import ratio_interval

_LOADS = 8  # sessions are made anew: where weights come to lie in memory changes the speed a little
_FEWEST_ROUNDS = 16
_SAMPLE_SECONDS = 0.05  # a sample lasts at least that long
_GATED_ROUND = 8

Call = Callable[[], object]


def time_all(network: Dynamic, files: Mapping[str, Path], seconds: float, *, seed: int = 0) -> dict[str, Any]:
    """Time eager torch and some files against each other, one thread.

    A round takes one image of each exit, or eight where a network has gates, all contenders on one image before the
    next, in an order drawn anew; its time is the sum over the images.

    Args:
        network: Eager.
        files: What `graphopt.load` loads; inputs are called ``image``. The first two are compared with each other.
        seconds: How long to time; at least sixteen rounds are timed however long they take.
        seed: Of the orders and intervals.

    Returns:
        For each contender the median milliseconds an image, and ratios with their intervals, each by processor time
        and by wall time.
    """
    rng = np.random.default_rng(seed)
    names = ("eager", *files)
    spent: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in names}
    blocks: list[int] = []
    groups = _rounds(network)
    for load in range(_LOADS):
        runners = {name: graphopt.load(path, threads=1) for name, path in files.items()}
        calls = [
            [{"eager": _eager(network, image), **_bound(runners, image)} for image in group.split(1)]
            for group in groups
        ]
        # Every path once before: blocks are loaded when they are first needed, and sessions grow their memory at first.
        for image_calls in (one for group in calls for one in group):
            for call in image_calls.values():
                call()
        repeats = {name: _repeats([group[0][name] for group in calls]) for name in names}
        began = time.perf_counter()
        done = 0
        gc.disable()
        try:
            while done < _FEWEST_ROUNDS / _LOADS or time.perf_counter() - began < seconds / _LOADS:
                sums = {name: np.zeros(2) for name in names}
                for image_calls in calls[len(blocks) % len(calls)]:
                    for index in rng.permutation(len(names)):
                        name = names[index]
                        sums[name] += _sample(image_calls[name], repeats[name]) / len(groups[0])
                for name in names:
                    spent[name].append(sums[name])
                blocks.append(load)
                done += 1
        finally:
            gc.enable()
    return {
        "rounds": len(blocks),
        "loads": _LOADS,
        **{
            kind: _figures({name: [one[column] for one in spent[name]] for name in names}, blocks, seed)
            for column, kind in enumerate(("cpu", "wall"))
        },
    }


def _figures(seconds: Mapping[str, Sequence[float]], blocks: Sequence[int], seed: int) -> dict[str, Any]:
    eager, unsplit, bundle = seconds.values()
    return {
        "ms": {name: float(np.median(own) * 1e3) for name, own in seconds.items()},
        "unsplit_over_eager": ratio_interval(eager, unsplit, blocks=blocks, seed=seed),
        "bundle_over_eager": ratio_interval(eager, bundle, blocks=blocks, seed=seed),
        "bundle_over_unsplit": ratio_interval(unsplit, bundle, blocks=blocks, seed=seed),
    }


def _rounds(network: Dynamic) -> list[Tensor]:
    """The images of each round."""
    images = calibration(network)
    if not isinstance(network, Exits):
        return list(images.split(_GATED_ROUND))
    by_exit = torch.tensor(taken(network)).argsort(stable=True)
    each = len(images) // outcomes(network)
    return [images[by_exit[start::each]] for start in range(each)]


def _eager(network: Dynamic, image: Tensor) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return network(image)

    return call


def _bound(runners: Mapping[str, Any], image: Tensor) -> dict[str, Call]:
    feeds = {"image": image.numpy()}
    return {name: runner.bind(feeds) for name, runner in runners.items()}


def _repeats(calls: Sequence[Call]) -> int:
    """How many calls make a sample; runs each once before, since sessions grow their memory at first."""
    for call in calls:
        call()
    began = time.perf_counter()
    calls[0]()
    return max(1, int(_SAMPLE_SECONDS / max(time.perf_counter() - began, 1e-6)))


def _sample(call: Call, repeats: int) -> np.ndarray[Any, Any]:
    """Processor and wall seconds of one call."""
    if repeats > 1:
        call()  # brings the weights back into the caches that others filled
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    return np.array([time.process_time() - cpu, time.perf_counter() - wall]) / repeats
