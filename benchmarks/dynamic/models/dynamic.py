"""What the nine have in common: decisions that compare a number with a threshold."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.dynamic.images import pictures

FAR = 1e4
"""Beyond every number that a decision is made on."""

Example = tuple[nn.Module, dict[str, Tensor], None]


class Dynamic(nn.Module):
    """A network that takes one path of several.

    Attributes:
        thresholds: One a decision; float32 [decisions]. ``forward(image, thresholds)`` takes others instead.
        size: Height and width of the images, float32 [batch, 3, size, size].
    """

    thresholds: Tensor

    def __init__(self, decisions: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("thresholds", torch.zeros(decisions))

    @abstractmethod
    def judges(self) -> tuple[Sequence[nn.Module], Callable[[Tensor], Tensor]]:
        """The modules whose outputs decide, and what of an output of theirs is compared with a threshold."""

    @abstractmethod
    def paths(self, seed: int = 0) -> Tensor:
        """Thresholds that force a path each, [paths, decisions]."""


class Exits(Dynamic):
    """A network that ends at the first decision whose number reaches its threshold."""

    def paths(self, seed: int = 0) -> Tensor:
        """Every exit, and none."""
        decisions = len(self.thresholds)
        return torch.full((decisions + 1, decisions), -FAR) + 2 * FAR * torch.ones(decisions + 1, decisions).tril(-1)


class Gates(Dynamic):
    """A network in which each decision is whether a block is run: where its number is above its threshold."""

    def paths(self, seed: int = 0) -> Tensor:
        """All blocks first; then none, each alone, all but each, and 64 drawn sets, each set once."""
        decisions = len(self.thresholds)
        alone = torch.eye(decisions)
        drawn = torch.randint(0, 2, (64, decisions), generator=torch.Generator().manual_seed(seed))
        runs = torch.cat([torch.ones(1, decisions), torch.zeros(1, decisions), alone, 1 - alone, drawn])
        return (FAR - 2 * FAR * runs).unique(dim=0)


def example(network: Dynamic, *, forced: bool = False) -> Example:
    """What a factory returns; with the thresholds as an input if ``forced``."""
    inputs = {"image": pictures(1, network.size)}
    if forced:
        inputs["thresholds"] = network.thresholds.clone()
    return network, inputs, None
