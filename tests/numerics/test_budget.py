from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.budget import Site, allocate, energy_rank, same_density, tail_losses
from graphopt.numerics.low_rank import Form, elements

Array = npt.NDArray[Any]


def used(sites: list[Site], ranks: list[int | None]) -> int:
    return sum(site.elements(rank) for site, rank in zip(sites, ranks, strict=True))


def lost(sites: list[Site], ranks: list[int | None]) -> float:
    return sum(site.loss(rank) for site, rank in zip(sites, ranks, strict=True))


def options(site: Site) -> list[int | None]:
    return [*site.ranks(), *([None] if site.dense else [])]


def best_of_all(sites: list[Site], budget: int) -> float | None:
    every = (list(chosen) for chosen in itertools.product(*map(options, sites)))
    return min((lost(sites, chosen) for chosen in every if used(sites, chosen) <= budget), default=None)


@st.composite
def small_sites(draw: st.DrawFn) -> Site:
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = draw(st.lists(st.floats(0, 10), min_size=min(m, n), max_size=min(m, n)))
    multiple = draw(st.integers(1, 3))
    return Site(
        m,
        n,
        tail_losses(np.sort(np.array(values))[::-1], draw(st.floats(0.01, 100))),
        form=draw(st.sampled_from(["factors", "pivot"])),
        dense=draw(st.booleans()),
        multiple=multiple,
        minimum=draw(st.integers(0, min(m, n))),
    )


@settings(deadline=None, max_examples=200)
@given(st.lists(small_sites(), min_size=1, max_size=3), st.integers(1, 250))
def test_within_the_budget_and_near_the_best(sites: list[Site], budget: int) -> None:
    best = best_of_all(sites, budget)
    if best is None:
        with pytest.raises(ValueError):
            allocate(sites, budget)
        return
    ranks = allocate(sites, budget)
    assert used(sites, ranks) <= budget
    assert all(rank in options(site) for site, rank in zip(sites, ranks, strict=True))
    # No more than one step of a hull is missing, and no step is larger than all that its site can lose.
    worst = max(max(site.loss(rank) for rank in options(site)) for site in sites)
    assert best - 1e-9 * (1 + best) <= lost(sites, ranks) <= best + worst + 1e-9 * (1 + best)


@settings(deadline=None, max_examples=100)
@given(st.lists(small_sites(), min_size=1, max_size=4), st.integers(1, 400))
def test_nothing_that_still_fits_would_help(sites: list[Site], budget: int) -> None:
    try:
        ranks = allocate(sites, budget)
    except ValueError:
        return
    left = budget - used(sites, ranks)
    for site, rank in zip(sites, ranks, strict=True):
        for other in options(site):
            if site.loss(other) < site.loss(rank):
                assert site.elements(other) - site.elements(rank) > left


def test_smooth_curves_are_within_a_hundredth_of_the_best() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        sites = []
        for _ in range(3):
            m, n = (int(size) for size in random.integers(12, 30, 2))
            k = min(m, n)
            values = np.exp(-random.uniform(1, 8) * np.arange(k) / k)
            form: Form = "pivot" if random.random() < 0.5 else "factors"
            sites.append(Site(m, n, tail_losses(values, random.uniform(0.1, 10)), form=form))
        budget = int(0.6 * sum(site.m * site.n for site in sites))
        best, whole = best_of_all(sites, budget), sum(site.loss(site.ranks()[0]) for site in sites)
        assert best is not None
        assert lost(sites, allocate(sites, budget)) - best <= 0.01 * whole


def test_a_large_budget_leaves_every_site_dense() -> None:
    sites = [Site(8, 6, tail_losses(np.arange(6, 0, -1.0))), Site(5, 5, tail_losses(np.ones(5)), multiple=2)]
    assert allocate(sites, 48 + 25) == [None, None]


def test_the_more_sensitive_site_gets_the_higher_rank() -> None:
    values = np.exp(-np.arange(64) / 16)
    plain, sensitive = (Site(64, 64, tail_losses(values, s), dense=False, multiple=8) for s in (1.0, 50.0))
    ranks = allocate([plain, sensitive], 4096)
    assert ranks[0] is not None and ranks[1] is not None and ranks[0] < ranks[1]
    assert all(rank is not None and rank % 8 == 0 for rank in ranks)
    assert used([plain, sensitive], ranks) <= 4096


def test_a_cost_of_its_own() -> None:
    # Three weights of (8, 8) that share their right factor.
    site = Site(24, 8, tail_losses(np.arange(8, 0, -1.0)), cost=lambda rank: rank * (24 + 8), dense=False)
    assert allocate([site], 5 * 32) == [5]


def test_impossible_budgets() -> None:
    site = Site(8, 8, tail_losses(np.ones(8)), minimum=4)
    with pytest.raises(ValueError, match="less than the least"):
        allocate([site], 40)
    with pytest.raises(ValueError, match="multiple of 16"):
        allocate([Site(8, 8, tail_losses(np.ones(4)), multiple=16, dense=False)], 100)
    assert allocate([], 0) == []


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), max_size=5),
    st.floats(0.01, 1),
    st.sampled_from(["factors", "pivot"]),
    st.sampled_from([1, 8, 16]),
)
def test_one_density_everywhere(shapes: list[tuple[int, int]], density: float, form: Form, multiple: int) -> None:
    for (m, n), rank in zip(shapes, same_density(shapes, density, form, multiple), strict=True):
        assert 1 <= rank <= min(m, n)
        assert rank % multiple == 0 or rank == min(m, n)
        assert rank <= multiple or elements(m, n, rank, form) <= density * m * n


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0, 1), st.sampled_from([1, 4]))
def test_energy(values: list[float], fraction: float, multiple: int) -> None:
    ordered = np.sort(np.array(values))[::-1]
    rank = energy_rank(ordered, fraction, multiple)
    whole = float((ordered**2).sum())
    assert 1 <= rank <= len(values)
    assert float((ordered[:rank] ** 2).sum()) >= fraction * whole * (1 - 1e-12)
    if rank > multiple:
        assert float((ordered[: rank - multiple] ** 2).sum()) < fraction * whole * (1 + 1e-12)
    with pytest.raises(ValueError):
        energy_rank(ordered, 1.5)
