"""Random networks with exits and loops: every sample gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.rows import bucket
from tests.bundles.samples.compare import Samples
from tests.bundles.samples.nets import Net

COUNTS = st.lists(st.sampled_from([0, 1, 2, 3, 7]), min_size=1, max_size=2)


class Buckets(PlainBackend):
    """Blocks that run on powers of two only, and refuse everything else."""

    def __init__(self, session: Callable[[str], Any]) -> None:
        super().__init__(session)
        self.sizes: set[int] = set()

    def rows(self, count: int) -> int:
        return bucket(count)

    def block(self, name: str, inputs: Any, outputs: Any) -> Any:
        call = super().block(name, inputs, outputs)

        def checked(values: Any) -> Any:
            made = call(values)
            self.sizes.update(len(array) for array in (*values, *made) if array.ndim and array.shape[0] > 3)
            return made

        return checked


def check(seed: int, counts: list[int], backend: Any) -> None:
    net = Net(random.Random(seed))
    samples = Samples(net.model, backend)
    for turn, count in enumerate(counts):
        samples.check(net.feeds(count, seed + turn))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 20), counts=COUNTS, backend=st.sampled_from([PlainBackend, OrtBackend, Buckets]))
def test_random_nets(seed: int, counts: list[int], backend: Any) -> None:
    check(seed, counts, backend)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 500, 50))
def test_more_random_nets(first: int) -> None:
    for seed in range(first, first + 50):
        check(seed, [1, 2, 7, 32], (PlainBackend, OrtBackend, Buckets)[seed % 3])
