"""Shallow-Deep ResNet-56: three stages of nine residual blocks (He et al., 2016), six exits."""

from __future__ import annotations

from torch import nn

from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.early_exit import Layer, ShallowDeep
from benchmarks.dynamic.models.parts import Residual, conv_relu, stages
from benchmarks.dynamic.seeding import seeded, settle_exits

EXITS = (3, 7, 11, 15, 19, 23)


def network(size: int = 256, width: float = 1, classes: int = 1000) -> ShallowDeep:
    """Images of ``size`` and channels ``width`` times those of DyCL."""
    with seeded():
        widths = [int(channels * width) for channels in (16, 32, 64)]
        stem, edge = conv_relu(3, widths[0], stride=2), size // 2
        layers: list[Layer] = []
        for inputs, outputs, stride in stages(widths[0], widths, 9):
            edge //= stride
            block = Residual(inputs, outputs, stride)
            layers.append((block if layers else nn.Sequential(stem, block), outputs, edge))
        head = nn.Sequential(nn.AvgPool2d(edge // 4), nn.Flatten(), nn.Linear(widths[2] * 16, classes))
        return settle_exits(ShallowDeep(layers, EXITS, head, classes=classes, size=size))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
