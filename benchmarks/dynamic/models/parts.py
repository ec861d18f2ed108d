"""Layers that several of the families are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its normalisation; ``size`` is odd, the map keeps its size but for the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


def conv_relu(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """The same and a ReLU."""
    return nn.Sequential(*conv(inputs, outputs, size, stride, groups), nn.ReLU())


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_relu(inputs, outputs, stride=stride), conv(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.branch(features) + self.shortcut(features))


def stages(inputs: int, widths: Sequence[int], blocks: int) -> Iterator[tuple[int, int, int]]:
    """Inputs, outputs and stride of each block of a residual network; a stage but the first halves the map."""
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            yield inputs, outputs, 2 if stage and block == 0 else 1
            inputs = outputs
