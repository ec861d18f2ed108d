"""SkipNet-38 with a recurrent gate, for images of CIFAR's size."""

from __future__ import annotations

from benchmarks.dynamic.models.dynamic import Example, example
from benchmarks.dynamic.models.skipnet import RecurrentSkipNet
from benchmarks.dynamic.seeding import seeded, settle_gates


def network(size: int = 32, width: float = 1) -> RecurrentSkipNet:
    """Images of ``size`` and channels ``width`` times those of DyCL."""
    with seeded():
        return settle_gates(RecurrentSkipNet(size, width))


def factory() -> Example:
    return example(network())


def forced() -> Example:
    return example(network(), forced=True)
