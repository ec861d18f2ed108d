"""SkipNet-38 (Wang et al., ECCV 2018): three stages of six residual blocks; a gate before each but the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.dynamic.models.dynamic import Gates
from benchmarks.dynamic.models.parts import Residual, conv_relu, stages

Shapes = list[tuple[int, int]]


class SkipNet(Gates):
    """What both kinds of gates have in common: the blocks, and the layers around them."""

    def __init__(self, size: int, width: float) -> None:
        widths = [int(channels * width) for channels in (16, 32, 64)]
        shapes = list(stages(widths[0], widths, 6))
        super().__init__(len(shapes) - 1, size)
        self.first = nn.Sequential(conv_relu(3, widths[0]), Residual(*shapes[0]))
        self.blocks = nn.ModuleList(Residual(*shape) for shape in shapes[1:])
        self.head = nn.Sequential(nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(widths[2], 10))
        # What a gate sees: the channels and the height and width of the map before its block.
        self.seen, edge = [], size
        for inputs, _, stride in shapes[1:]:
            self.seen.append((inputs, edge))
            edge //= stride


class FeedForwardGate(nn.Module):
    """The probability that a block is needed, from two convolutions on the halved map, [batch]."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.MaxPool2d(2),
            conv_relu(channels, channels),
            conv_relu(channels, channels, stride=2),
            nn.AvgPool2d(size // 4),
            nn.Flatten(),
            nn.Linear(channels, 2),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).softmax(1)[:, 1]


class FeedForwardSkipNet(SkipNet):
    """A gate of its own for each block."""

    def __init__(self, size: int, width: float) -> None:
        super().__init__(size, width)
        self.gates = nn.ModuleList(FeedForwardGate(*seen) for seen in self.seen)

    def forward(self, image: Tensor, thresholds: Tensor | None = None) -> Tensor:
        if thresholds is None:
            thresholds = self.thresholds
        features = self.first(image)
        for place, (gate, block) in enumerate(zip(self.gates, self.blocks, strict=True)):
            needed = gate(features)
            before, features = features, block.shortcut(features)
            if needed.max() > thresholds[place]:
                features = F.relu(block.branch(before) + features)
        return self.head(features)

    def judges(self) -> tuple[Sequence[nn.Module], Callable[[Tensor], Tensor]]:
        return list(self.gates), torch.max


class RecurrentGate(nn.Module):
    """The probability that a block is needed, [batch], by one LSTM over all blocks."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.linear = nn.LSTMCell(inputs, hidden), nn.Linear(hidden, 1)

    def forward(self, seen: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = self.cell(seen, state)
        return self.linear(state[0]).sigmoid()[:, 0], state


class RecurrentSkipNet(SkipNet):
    """One recurrent gate, which sees the mean of each map through a layer of its own."""

    HIDDEN = 10

    def __init__(self, size: int, width: float) -> None:
        super().__init__(size, width)
        self.views = nn.ModuleList(
            nn.Sequential(nn.AvgPool2d(edge), nn.Conv2d(channels, self.HIDDEN, 1), nn.Flatten())
            for channels, edge in self.seen
        )
        self.gate = RecurrentGate(self.HIDDEN, self.HIDDEN)

    def forward(self, image: Tensor, thresholds: Tensor | None = None) -> Tensor:
        if thresholds is None:
            thresholds = self.thresholds
        features = self.first(image)
        nothing = features.new_zeros(features.shape[0], self.HIDDEN)
        state = (nothing, nothing)
        for place, (view, block) in enumerate(zip(self.views, self.blocks, strict=True)):
            needed, state = self.gate(view(features), state)
            before, features = features, block.shortcut(features)
            if needed.max() > thresholds[place]:
                features = F.relu(block.branch(before) + features)
        return self.head(features)

    def judges(self) -> tuple[Sequence[nn.Module], Callable[[Tensor], Tensor]]:
        return [self.gate], lambda output: output[0].max()
