"""A small network that ends early where it is sure: four stages, each with a classifier of its own. Seeded weights.

graphopt export examples/early_exit.py:network -o early.onnx
graphopt optimize early.onnx --recipe static --target onnx -o early.bundle
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

SURE = 0.13


class EarlyExit(nn.Module):
    """Four stages of 32 channels on an image; ends after the first whose classifier is sure enough."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (3, 32, 32, 32, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        )
        self.classifiers = nn.ModuleList(nn.Linear(width, 10) for width in widths[1:])

    def forward(self, image: Tensor) -> Tensor:
        """Logits, [1, 10], of an image [1, 3, 64, 64]."""
        for stage, classifier in zip(self.stages, self.classifiers, strict=True):
            image = stage(image)
            logits: Tensor = classifier(image.mean((2, 3)))
            if logits.softmax(1).max() > SURE:
                return logits
        return logits


def network() -> tuple[EarlyExit, dict[str, Tensor], None]:
    """As `graphopt export` takes it: module, example inputs, no dynamic axes."""
    return EarlyExit().eval(), {"image": torch.randn(1, 3, 64, 64)}, None
