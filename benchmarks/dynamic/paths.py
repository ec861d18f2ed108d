"""Which paths are taken, and whether every path gives what eager torch gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.dynamic.models.dynamic import Dynamic, Exits
from benchmarks.dynamic.seeding import asked, calibration, outcomes
from graphopt.benchmarking.comparing import difference
from graphopt.runtime.loading import Runner


def taken(network: Dynamic) -> list[int]:
    """For each calibration image of a network with exits, which it took; for one with gates, how many it opened."""
    return [_path(network, image) for image in calibration(network).split(1)]


def shares(network: Dynamic) -> list[float]:
    """Of the calibration images: how many took each exit; or for each gate, how many took its rarer side."""
    if isinstance(network, Exits):
        exits = taken(network)
        return [exits.count(exit) / len(exits) for exit in range(outcomes(network))]
    values = [asked(network, image, network.thresholds) for image in calibration(network).split(1)]
    opened = (torch.stack(values) > network.thresholds).float().mean(0)
    return [float(share) for share in torch.minimum(opened, 1 - opened)]


def _path(network: Dynamic, image: Tensor) -> int:
    values = asked(network, image, network.thresholds)
    if not isinstance(network, Exits):
        return int((values > network.thresholds).sum())
    ended = bool(values[-1] >= network.thresholds[len(values) - 1])
    return min(len(values) - ended, outcomes(network) - 1)


def forced_difference(network: Dynamic, runners: Mapping[str, Runner]) -> tuple[int, dict[str, float]]:
    """Force every path, each on another image, and compare with eager torch.

    Args:
        network: Eager.
        runners: Take ``image`` and ``thresholds``; one output.

    Returns:
        How many paths, and for each runner the largest absolute difference; infinite where a shape differs.
    """
    images = calibration(network).split(1)
    worst = dict.fromkeys(runners, 0.0)
    paths = network.paths()
    for place, thresholds in enumerate(paths):
        image = images[place % len(images)]
        with torch.inference_mode():
            expected = network(image, thresholds)
        _compare(expected, {"image": image, "thresholds": thresholds}, runners, worst)
    return len(paths), worst


def natural_difference(network: Dynamic, runners: Mapping[str, Runner]) -> dict[str, float]:
    """The same with the network's own thresholds, on every image; runners take ``image``."""
    worst = dict.fromkeys(runners, 0.0)
    for image in calibration(network).split(1):
        with torch.inference_mode():
            expected = network(image)
        _compare(expected, {"image": image}, runners, worst)
    return worst


def _compare(
    expected: Tensor, tensors: Mapping[str, Tensor], runners: Mapping[str, Runner], worst: dict[str, float]
) -> None:
    feeds: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, runner in runners.items():
        (found,) = runner.run(feeds).values()
        worst[name] = max(worst[name], difference(expected.numpy(), found))
