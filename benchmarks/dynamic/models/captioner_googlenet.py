"""The captioner on GoogLeNet (Szegedy et al., 2015) with batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.dynamic.models.captioner import Captioner
from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.parts import conv_relu
from benchmarks.dynamic.seeding import seeded, settle_exits

# Channels of each module: 1 x 1; before and of 3 x 3; before and of 5 x 5; after the pooling. 0: halve the map.
INCEPTIONS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (0,),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (0,),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class Inception(nn.Module):
    """Four views of a map side by side."""

    def __init__(self, inputs: int, one: int, to_three: int, three: int, to_five: int, five: int, pooled: int) -> None:
        super().__init__()
        self.views = nn.ModuleList(
            [
                conv_relu(inputs, one, 1),
                nn.Sequential(conv_relu(inputs, to_three, 1), conv_relu(to_three, three, 3)),
                nn.Sequential(conv_relu(inputs, to_five, 1), conv_relu(to_five, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv_relu(inputs, pooled, 1)),
            ]
        )
        self.outputs = one + three + five + pooled

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([view(features) for view in self.views], 1)


def encoder(width: float) -> tuple[nn.Module, int]:
    """A network from images to maps of a 32nd of their size, and its channels."""
    narrow, inputs = int(64 * width), int(192 * width)
    layers: list[nn.Module] = [
        conv_relu(3, narrow, 7, 2),
        nn.MaxPool2d(3, 2, padding=1),
        conv_relu(narrow, narrow, 1),
        conv_relu(narrow, inputs, 3),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for first, *others in INCEPTIONS:
        if not others:
            layers.append(nn.MaxPool2d(3, 2, padding=1))
            continue
        layers.append(Inception(inputs, *(int(channels * width) for channels in (first, *others))))
        inputs = layers[-1].outputs
    return nn.Sequential(*layers), inputs


def network(size: int = 256, width: float = 1, hidden: int = 512, words: int = 2633) -> Captioner:
    """Images of ``size`` and channels ``width`` times those of DyCL."""
    with seeded():
        layers, channels = encoder(width)
        return settle_exits(Captioner(layers, channels, hidden=hidden, words=words, size=size))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
