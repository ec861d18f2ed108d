"""BlockDrop (Wu et al., CVPR 2018) on ResNet-110: a small network says beforehand which of 54 blocks are run.

DyCL's ninth family is called FlatResNet32 after its class; what it builds is ResNet-110 for CIFAR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.dynamic.models.dynamic import Example, Gates, example
from benchmarks.dynamic.models.parts import conv, conv_relu, stages
from benchmarks.dynamic.seeding import seeded, settle_policy


class Halve(nn.Module):
    """The map halved by means, and as many channels of zeros beside it: a shortcut without weights."""

    def forward(self, features: Tensor) -> Tensor:
        half = F.avg_pool2d(features, 2)
        return torch.cat([half, torch.zeros_like(half)], 1)


class FlatResNet(nn.Module):
    """A residual network whose blocks can be left out one by one."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        shapes = list(stages(widths[0], widths, blocks))
        self.stem = conv_relu(3, widths[0])
        self.shortcuts = nn.ModuleList(Halve() if stride == 2 else nn.Identity() for _, _, stride in shapes)
        self.branches = nn.ModuleList(
            nn.Sequential(conv_relu(inputs, outputs, stride=stride), conv(outputs, outputs))
            for inputs, outputs, stride in shapes
        )


class Policy(nn.Module):
    """The probability that a block is run, for each block, [batch, blocks]; from three blocks of its own."""

    def __init__(self, widths: Sequence[int], size: int, decisions: int) -> None:
        super().__init__()
        self.net = FlatResNet(widths, 1)
        self.linear = nn.Sequential(nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(widths[2], decisions))

    def forward(self, image: Tensor) -> Tensor:
        features = self.net.stem(image)
        for shortcut, branch in zip(self.net.shortcuts, self.net.branches, strict=True):
            features = F.relu(shortcut(features) + branch(features))
        return self.linear(features).sigmoid()


class BlockDrop(Gates):
    """The network and the policy that chooses its blocks."""

    def __init__(self, size: int, width: float, blocks: int) -> None:
        super().__init__(3 * blocks, size)
        widths = [int(channels * width) for channels in (16, 32, 64)]
        self.policy = Policy(widths, size, 3 * blocks)
        self.net = FlatResNet(widths, blocks)
        self.head = nn.Sequential(nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(widths[2], 10))

    def forward(self, image: Tensor, thresholds: Tensor | None = None) -> Tensor:
        if thresholds is None:
            thresholds = self.thresholds
        needed = self.policy(image).amax(0)
        features = self.net.stem(image)
        for place, (shortcut, branch) in enumerate(zip(self.net.shortcuts, self.net.branches, strict=True)):
            before, features = features, shortcut(features)
            if needed[place] > thresholds[place]:
                features = F.relu(features + branch(before))
        return self.head(features)

    def judges(self) -> tuple[Sequence[nn.Module], Callable[[Tensor], Tensor]]:
        return [self.policy], lambda output: output.amax(0)


def network(size: int = 32, width: float = 1, blocks: int = 18) -> BlockDrop:
    """Images of ``size``, channels ``width`` times those of DyCL, and ``blocks`` in each of three stages."""
    with seeded():
        return settle_policy(BlockDrop(size, width, blocks))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
