"""Seeded images that differ enough for decisions to depend on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SEED = 5


def pictures(count: int, size: int, seed: int = SEED) -> Tensor:
    """Noise of different coarseness, contrast and brightness, float32 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        coarseness, contrast, brightness = torch.rand(3, generator=generator).tolist()
        edge = int(4 * (size / 4) ** coarseness)
        grid = torch.randn(1, 3, edge, edge, generator=generator)
        noise = F.interpolate(grid, (size, size), mode="bilinear", align_corners=False)
        fine = torch.randn(noise.shape, generator=generator)
        made.append(noise * (0.4 + 1.6 * contrast) + (brightness - 0.5) + fine / 4)
    return torch.cat(made)
