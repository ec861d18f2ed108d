from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.low_rank import Factors, weighted_truncated_svd
from graphopt.numerics.reconstruct import reconstruct

Array = npt.NDArray[Any]

sizes = st.integers(1, 12)


class Case:
    """A weight and explicit inputs of both networks."""

    def __init__(self, m: int, n: int, samples: int, noise: float, seed: int, mix: float = 0.25) -> None:
        random = np.random.default_rng(seed)
        self.weight = random.standard_normal((m, n))
        self.dense = random.standard_normal((n, n)) @ random.standard_normal((n, samples))
        off = noise / np.sqrt(n) * random.standard_normal((n, n))  # what compressed sites before this one do to inputs
        self.used = self.dense + off @ self.dense + noise * random.standard_normal((n, samples))
        self.gram, self.cross = self.used @ self.used.T, self.dense @ self.used.T
        self.target = self.weight @ ((1 - mix) * self.used + mix * self.dense)

    def factors(self, rank: int) -> Factors:
        return weighted_truncated_svd(self.weight, rank, self.dense @ self.dense.T)

    def loss(self, factors: Factors) -> float:
        return float(((self.target - factors.product() @ self.used) ** 2).sum())

    def objective(self, factors: Factors, damping: float = 1e-3) -> float:
        a = damping * float(np.trace(self.gram)) / len(self.gram)
        return self.loss(factors) + a * float(((self.weight - factors.product()) ** 2).sum())


@settings(deadline=None)
@given(sizes, sizes, st.data(), st.integers(1, 30), st.sampled_from([0, 0.3, 3]), st.integers(0, 2**32 - 1))
def test_no_step_raises_the_objective(
    m: int, n: int, data: st.DataObject, samples: int, noise: float, seed: int
) -> None:
    case = Case(m, n, samples, noise, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    first = case.factors(rank)
    values = [case.objective(first)]
    for steps in range(1, 6):
        found = reconstruct(case.weight, first, case.gram, case.cross, steps=steps)
        assert found.rank == rank
        values.append(case.objective(found))
    whole = case.objective(Factors(first.left, 0 * first.right))
    assert all(then <= now + 1e-9 * whole for now, then in pairwise(values))


@settings(deadline=None)
@given(sizes, sizes, st.data(), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_nothing_changes_where_nothing_was_lost(m: int, n: int, data: st.DataObject, samples: int, seed: int) -> None:
    case = Case(m, n, samples, 0, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    exact = weighted_truncated_svd(case.weight, rank)
    found = reconstruct(exact.product(), exact, case.gram, case.cross)
    np.testing.assert_allclose(found.product(), exact.product(), atol=1e-7 * np.abs(case.weight).max())


@pytest.mark.parametrize("samples", [5, 200])
def test_it_beats_the_factors_that_know_one_flow(samples: int) -> None:
    case = Case(20, 16, samples, 0.8, 0)
    first = case.factors(6)
    assert case.loss(reconstruct(case.weight, first, case.gram, case.cross)) < 0.9 * case.loss(first)


@pytest.mark.parametrize("mix", [0, 0.25, 1])
def test_each_step_is_the_least_squares_fit_to_the_data(mix: float) -> None:
    case = Case(9, 7, 60, 0.5, 3, mix=mix)
    first = case.factors(3)
    a = 1e-3 * np.trace(case.gram) / 7
    # The damping as samples of their own, sqrt(a) times the identity, of which the dense weight makes the outputs.
    inputs = np.concatenate([case.used, np.sqrt(a) * np.eye(7)], axis=1)
    outputs = np.concatenate([case.target, np.sqrt(a) * case.weight], axis=1)
    left = np.linalg.lstsq((first.right @ inputs).T, outputs.T)[0].T
    one = reconstruct(case.weight, first, case.gram, case.cross, mix=mix, steps=1)
    np.testing.assert_allclose(one.product(), left @ first.right, atol=1e-8)
    free = np.linalg.lstsq(inputs.T, outputs.T)[0].T
    right = np.linalg.lstsq(left, free)[0]
    two = reconstruct(case.weight, first, case.gram, case.cross, mix=mix)
    np.testing.assert_allclose(two.product(), left @ right, atol=1e-8)


def test_the_number_of_samples_does_not_matter() -> None:
    case = Case(9, 7, 60, 0.5, 3)
    first = case.factors(3)
    few = reconstruct(case.weight, first, case.gram, case.cross)
    for scale in (1e-12, 1e12):
        many = reconstruct(case.weight, first, scale * case.gram, scale * case.cross)
        np.testing.assert_allclose(many.product(), few.product(), atol=1e-9)


def test_what_was_not_calibrated_stays() -> None:
    case = Case(9, 7, 60, 0.5, 3)
    first = case.factors(3)
    found = reconstruct(case.weight, first, np.zeros((7, 7)), np.zeros((7, 7)))
    np.testing.assert_array_equal(found.left, first.left)
    np.testing.assert_array_equal(found.right, first.right)
    none = reconstruct(case.weight, first, case.gram, case.cross, steps=0)
    np.testing.assert_array_equal(none.product(), first.product())


def test_moments_of_a_narrow_type_and_dead_inputs() -> None:
    case = Case(9, 40, 3, 0.5, 3)  # rank 3 of 40
    first = case.factors(4)
    gram, cross = case.gram.astype(np.float32), case.cross.astype(np.float32)
    gram[5], gram[:, 5], cross[5], cross[:, 5] = 0, 0, 0, 0
    gram -= np.float32(2e-3 * np.trace(case.gram) / 40) * np.eye(40, dtype=np.float32)  # more than the damping mends
    found = reconstruct(case.weight, first, gram, cross)
    assert np.isfinite(found.product()).all()
    assert np.linalg.norm(found.product()) < 3 * np.linalg.norm(case.weight)


def test_dependent_factors() -> None:
    case = Case(9, 7, 60, 0.5, 3)
    first = case.factors(3)
    left, right = first.left.copy(), first.right.copy()
    left[:, 2], right[2] = 0, right[1]
    found = reconstruct(case.weight, Factors(left, right), case.gram, case.cross)
    assert found.rank == 3
    assert case.objective(found) < case.objective(Factors(left, right))


@pytest.mark.parametrize("change", ["gram", "cross", "left", "mix", "damping", "steps", "nan"])
def test_wrong_arguments(change: str) -> None:
    case = Case(5, 4, 10, 0.1, 0)
    first, gram, cross = case.factors(2), case.gram, case.cross
    options: dict[str, Any] = {"mix": {"mix": 2}, "damping": {"damping": 0}, "steps": {"steps": -1}}.get(change, {})
    if change == "gram":
        gram = gram[:3]
    if change == "cross":
        cross = np.eye(5)
    if change == "left":
        first = Factors(first.left[:3], first.right)
    if change == "nan":
        gram = np.full_like(gram, np.nan)
    with pytest.raises(ValueError):
        reconstruct(case.weight, first, gram, cross, **options)
