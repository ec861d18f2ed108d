"""Shallow-Deep MobileNet: depthwise and pointwise convolutions (Howard et al., 2017), five exits."""

from __future__ import annotations

from torch import nn

from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.early_exit import Layer, ShallowDeep
from benchmarks.dynamic.models.parts import conv_relu
from benchmarks.dynamic.seeding import seeded, settle_exits

CHANNELS = (128, 256, 256, 512, 512, *[1024] * 6, 2048, 2048)
HALVED = (1, 3, 5, 11)
EXITS = (2, 4, 6, 8, 11)


def network(size: int = 256, width: float = 1, classes: int = 1000) -> ShallowDeep:
    """Images of ``size`` and channels ``width`` times those of DyCL."""
    with seeded():
        inputs = int(64 * width)
        stem, edge = conv_relu(3, inputs), size
        layers: list[Layer] = []
        for place, outputs in enumerate(int(channels * width) for channels in CHANNELS):
            stride = 2 if place in HALVED else 1
            edge //= stride
            layer = nn.Sequential(
                conv_relu(inputs, inputs, stride=stride, groups=inputs), conv_relu(inputs, outputs, 1)
            )
            layers.append((layer if layers else nn.Sequential(stem, layer), outputs, edge))
            inputs = outputs
        head = nn.Sequential(nn.AvgPool2d(edge), nn.Flatten(), nn.Linear(inputs, classes))
        return settle_exits(ShallowDeep(layers, EXITS, head, classes=classes, size=size))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
