"""Shallow-Deep WideResNet-32-4: three stages of five wide blocks (Zagoruyko and Komodakis, 2016), six exits."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.early_exit import Layer, ShallowDeep
from benchmarks.dynamic.models.parts import stages
from benchmarks.dynamic.seeding import seeded, settle_exits

EXITS = (2, 4, 6, 8, 10, 12)


class Wide(nn.Module):
    """Two convolutions, each after its normalisation, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.Dropout(0.3),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, stride, padding=1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        return self.branch(features) + self.shortcut(features)


def network(size: int = 256, width: float = 1, classes: int = 1000) -> ShallowDeep:
    """Images of ``size`` and channels ``width`` times those of DyCL."""
    with seeded():
        narrow, *widths = [int(channels * width) for channels in (16, 64, 128, 256)]
        stem, edge = nn.Conv2d(3, narrow, 3, 2, padding=1), size // 2
        layers: list[Layer] = []
        for inputs, outputs, stride in stages(narrow, widths, 5):
            edge //= stride
            block = Wide(inputs, outputs, stride)
            layers.append((block if layers else nn.Sequential(stem, block), outputs, edge))
        head = nn.Sequential(
            nn.BatchNorm2d(widths[2]),
            nn.ReLU(),
            nn.AvgPool2d(edge // 4),
            nn.Flatten(),
            nn.Linear(widths[2] * 16, classes),
        )
        return settle_exits(ShallowDeep(layers, EXITS, head, classes=classes, size=size))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
