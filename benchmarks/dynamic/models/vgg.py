"""Shallow-Deep VGG-16 with batch normalisation (Simonyan and Zisserman, 2015), six exits."""

from __future__ import annotations

from torch import nn

from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.early_exit import Layer, ShallowDeep
from benchmarks.dynamic.models.parts import conv_relu
from benchmarks.dynamic.seeding import seeded, settle_exits

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
HALVED = (1, 3, 6, 9, 12)
EXITS = (1, 3, 5, 6, 8, 9)


def network(size: int = 256, width: float = 1, classes: int = 1000) -> ShallowDeep:
    """Images of ``size`` and channels ``width`` times those of DyCL."""
    with seeded():
        inputs, edge = 3, size
        layers: list[Layer] = []
        for place, outputs in enumerate(int(channels * width) for channels in CHANNELS):
            layer = conv_relu(inputs, outputs)
            if place in HALVED:
                layer.append(nn.MaxPool2d(2))
                edge //= 2
            layers.append((layer, outputs, edge))
            inputs = outputs
        wide, narrow = int(2048 * width), int(1024 * width)
        head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs * edge**2, wide),
            nn.ReLU(),
            nn.Linear(wide, narrow),
            nn.Linear(narrow, classes),
        )
        return settle_exits(ShallowDeep(layers, EXITS, head, classes=classes, size=size))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
