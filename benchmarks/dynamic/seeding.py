"""Seeded weights and thresholds: untrained networks whose decisions depend on their input.

A random network gives almost the same for every image, so that one path would be taken always. Here the statistics of
the normalisations are those of seeded images, as training leaves them, and thresholds stand at quantiles of what is
compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.dynamic.images import SEED, pictures
from benchmarks.dynamic.models.dynamic import Dynamic, Exits, Gates

_SPREAD = 2.0
"""The deviation of what a linear layer gives: large enough for sure and unsure answers."""

AnyExits = TypeVar("AnyExits", bound=Exits)
AnyGates = TypeVar("AnyGates", bound=Gates)


@contextmanager
def seeded() -> Iterator[None]:
    """Weights drawn inside are the same each time; what is drawn outside is not disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def settle_exits(network: AnyExits) -> AnyExits:
    """Normalise, and let the same number of images leave at each exit."""
    _normalise(network, whole=network.paths()[-1])
    values = _asked_by_all(network, network.paths()[-1])
    leaving = len(values) // outcomes(network)
    left = torch.arange(len(values))
    for exit, column in enumerate(values.T):
        order = left[column[left].argsort(descending=True)]
        leave = min(leaving, len(order) - 1)
        network.thresholds[exit] = column[order[leave - 1 : leave + 1]].mean()
        left = order[leave:]
    return network


def settle_gates(network: AnyGates) -> AnyGates:
    """Normalise, and let half of the images through each gate; what a gate sees follows from those before it."""
    _normalise(network, whole=network.paths()[0])
    for gate in range(len(network.thresholds)):
        network.thresholds[gate] = _middle(_asked_by_all(network, network.thresholds)[:, gate])
    return network


def settle_policy(network: AnyGates) -> AnyGates:
    """The same where all gates are asked before the first block."""
    _normalise(network, whole=network.paths()[0])
    for gate, column in enumerate(_asked_by_all(network, network.thresholds).T):
        network.thresholds[gate] = _middle(column)
    return network


def calibration(network: Dynamic) -> Tensor:
    """The images that a network's thresholds are set by, float32 [images, 3, size, size]."""
    count = 32 if isinstance(network, Gates) else 3 * outcomes(network) if outcomes(network) > 7 else 0
    return pictures(count or 5 * outcomes(network), network.size)


def outcomes(network: Dynamic) -> int:
    """How many paths there are to share images among, where they are few: the last two stops of ten are one length."""
    return min(len(network.thresholds) + 1, 10)


def asked(network: Dynamic, image: Tensor, thresholds: Tensor) -> Tensor:
    """The numbers that decide the path of one image, in order, float32 [decisions made]."""
    judges, number = network.judges()
    found: list[Tensor] = []
    hooks = [judge.register_forward_hook(lambda _, __, output: found.append(number(output))) for judge in judges]
    try:
        with torch.inference_mode():
            network(image, thresholds)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([value.reshape(-1) for value in found])


def _asked_by_all(network: Dynamic, thresholds: Tensor) -> Tensor:
    return torch.stack([asked(network, image, thresholds) for image in calibration(network).split(1)]).clone()


def _middle(values: Tensor) -> Tensor:
    """Between the two in the middle."""
    half = len(values) // 2
    return values.sort().values[half - 1 : half + 1].mean()


def _normalise(network: Dynamic, *, whole: Tensor) -> None:
    """Give normalisations the statistics of seeded images, and linear layers weights that tell images apart."""
    hooks = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # what is kept is the mean over the batches seen, and one is
            nn.init.ones_(module.bias)  # with 0, random layers amplify rounding, by about 1.5 each
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_SPREAD / module.in_features**0.5)
            if isinstance(network, Exits):
                # What a residual network hands on grows from block to block; scores must not, or all become sure.
                hooks.append(module.register_forward_pre_hook(_scale))
    network.train()
    with torch.no_grad():
        network(pictures(8, network.size), whole)
    for hook in hooks:
        hook.remove()
    network.eval().requires_grad_(False)


def _scale(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
    linear.weight.mul_(_SPREAD / nn.functional.linear(inputs[0], linear.weight).std())
