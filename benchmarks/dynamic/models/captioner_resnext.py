"""The captioner on ResNeXt-50 32x4d (Xie et al., 2017), whose last stage is left away as in DyCL."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.dynamic.models.captioner import Captioner
from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.parts import conv, conv_relu
from benchmarks.dynamic.seeding import seeded, settle_exits

GROUPS = 32


class Bottleneck(nn.Module):
    """1 x 1, grouped 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv_relu(inputs, middle, 1), conv_relu(middle, middle, 3, stride, GROUPS), conv(middle, outputs, 1)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        return (self.branch(features) + self.shortcut(features)).relu()


def encoder(width: float) -> tuple[nn.Module, int]:
    """A network from images to maps of a sixteenth of their size, and its channels."""
    inputs = int(64 * width)
    layers: list[nn.Module] = [conv_relu(3, inputs, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    for stage, blocks in enumerate((3, 4, 6)):
        outputs = int(256 * width) << stage
        for block in range(blocks):
            layers.append(Bottleneck(inputs, outputs // 2, outputs, 2 if stage and block == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers), inputs


def network(size: int = 256, width: float = 1, hidden: int = 512, words: int = 2633) -> Captioner:
    """Images of ``size`` and channels ``width`` times those of DyCL, at least a quarter."""
    with seeded():
        layers, channels = encoder(width)
        return settle_exits(Captioner(layers, channels, hidden=hidden, words=words, size=size))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
