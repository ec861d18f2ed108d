from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.low_rank import (
    Factors,
    Form,
    balance,
    default_rtol,
    elements,
    find_rank,
    rank_at_density,
    weighted_singular_values,
    weighted_truncated_svd,
)

Array = npt.NDArray[Any]
TYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)]

sizes = st.integers(1, 20)
seeds = st.integers(0, 2**32 - 1)
grams = st.sampled_from(["none", "full", "deficient", "zero", "identity", "wide range", "huge"])


def gram_of(kind: str, n: int, random: np.random.Generator) -> Array | None:
    x = random.standard_normal((n, 1 + n // 2 if kind == "deficient" else 3 * n))
    return {
        "none": None,
        "full": x @ x.T,
        "deficient": x @ x.T,
        "zero": np.zeros((n, n)),
        "identity": 3.0 * np.eye(n),
        "wide range": np.diag(10.0 ** np.linspace(-200, 100, n)),
        "huge": 1e300 * np.eye(n),
    }[kind]


def loss(weight: Array, product: Array, gram: Array | None) -> float:
    error = weight - product
    return float(np.trace(error @ (np.eye(weight.shape[1]) if gram is None else gram) @ error.T))


def weight_of(kind: str, m: int, n: int, random: np.random.Generator) -> Array:
    weight = random.standard_normal((m, n))
    if kind == "zero":
        weight[:] = 0
    if kind == "zero rows":
        weight[::2] = 0
    if kind == "zero columns":
        weight[:, ::2] = 0
    if kind == "equal rows":
        weight[:] = weight[0]
    return weight


kinds = st.sampled_from(["plain", "zero", "zero rows", "zero columns", "equal rows"])


@settings(deadline=None)
@given(sizes, sizes, kinds, grams, seeds)
def test_the_full_rank_gives_the_weight_back(m: int, n: int, kind: str, gram: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = weight_of(kind, m, n, random)
    found = weighted_truncated_svd(weight, min(m, n), gram_of(gram, n, random))
    assert found.left.dtype == found.right.dtype == np.float64
    assert np.linalg.norm(found.product() - weight) <= 1e-12 * np.linalg.norm(weight)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5), (4, 4), (1, 3), (3, 1)])
def test_the_full_rank_of_every_type(m: int, n: int, dtype: np.dtype[Any]) -> None:
    weight = np.random.default_rng(0).standard_normal((m, n)).astype(dtype)
    found = weighted_truncated_svd(weight, min(m, n))
    np.testing.assert_allclose(found.product(), weight.astype(np.float64), atol=1e-13)


@settings(deadline=None)
@given(sizes, sizes, st.data(), st.sampled_from(["none", "full", "deficient", "identity"]), seeds)
def test_no_other_factors_of_the_rank_lose_less(m: int, n: int, data: st.DataObject, gram: str, seed: int) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    random = np.random.default_rng(seed)
    weight, g = weight_of("plain", m, n, random), gram_of(gram, n, random)
    found = weighted_truncated_svd(weight, rank, g)
    lost = loss(weight, found.product(), g)
    whole = loss(weight, np.zeros_like(weight), g)
    values = weighted_singular_values(weight, g)
    assert np.all(np.diff(values) <= 0)
    assert lost == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-6, abs=1e-10 * whole)
    for step in (1e-3, 1e-1, 10):
        left = found.left + step * random.standard_normal(found.left.shape)
        right = found.right + step * random.standard_normal(found.right.shape)
        assert lost <= loss(weight, left @ right, g) + 1e-12 * whole


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12), (20, 20), (1, 9), (9, 1)])
def test_it_equals_whitening_with_a_cholesky_root(m: int, n: int) -> None:
    random = np.random.default_rng(m)
    weight, gram = random.standard_normal((m, n)), gram_of("full", n, random)
    assert gram is not None
    rank = max(1, min(m, n) // 3)
    root = np.linalg.cholesky(gram)
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    wanted = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    np.testing.assert_allclose(weighted_truncated_svd(weight, rank, gram).product(), wanted, atol=1e-9)
    np.testing.assert_allclose(weighted_singular_values(weight, gram), s, rtol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12)])
def test_a_multiple_of_the_identity_gives_the_plain_decomposition(m: int, n: int) -> None:
    weight = np.random.default_rng(0).standard_normal((m, n)).astype(np.float32)
    plain = weighted_truncated_svd(weight, 5)
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(plain.product(), (u[:, :5] * s[:5]) @ vt[:5], atol=1e-10)
    np.testing.assert_allclose(
        weighted_truncated_svd(weight.astype(np.float64), 5).product(), plain.product(), atol=1e-9
    )
    np.testing.assert_allclose(weighted_singular_values(weight), s, rtol=1e-9)
    np.testing.assert_allclose(weighted_singular_values(weight.astype(np.float64)), s, rtol=1e-12)
    weighted = weighted_truncated_svd(weight, 5, 7.0 * np.eye(n))
    np.testing.assert_allclose(weighted.product(), plain.product(), atol=1e-10)
    for each in (plain, weighted):
        np.testing.assert_allclose(np.linalg.norm(each.left, axis=0), np.linalg.norm(each.right, axis=1), rtol=1e-9)


def test_what_the_inputs_do_not_reach_is_decided_by_the_plain_error() -> None:
    weight = np.diag([1.0, 5.0, 3.0, 2.0])
    gram = np.diag([4.0, 0, 0, 0])
    found = weighted_truncated_svd(weight, 2, gram).product()
    np.testing.assert_allclose(found, np.diag([1.0, 5.0, 0, 0]), atol=1e-6)


def test_the_scale_of_a_weight_does_not_matter() -> None:
    random = np.random.default_rng(0)
    weight, gram = random.standard_normal((6, 8)), np.eye(8)
    for scale in (1e-250, 1e250):
        for g in (None, gram):
            found = weighted_truncated_svd(scale * weight, 3, g).product()
            np.testing.assert_allclose(found / scale, weighted_truncated_svd(weight, 3, g).product(), rtol=1e-9)


@pytest.mark.parametrize(
    ("weight", "rank", "gram"),
    [
        (np.ones((3, 4)), 0, None),
        (np.ones((3, 4)), 4, None),
        (np.ones(3), 1, None),
        (np.ones((0, 4)), 1, None),
        (np.ones((3, 4)), 1, np.eye(3)),
        (np.full((3, 4), np.nan), 1, None),
        (np.ones((3, 4)), 1, np.full((4, 4), np.inf)),
    ],
)
def test_wrong_arguments(weight: Array, rank: int, gram: Array | None) -> None:
    with pytest.raises(ValueError):
        weighted_truncated_svd(weight, rank, gram)


@settings(deadline=None)
@given(sizes, sizes, sizes, seeds)
def test_balancing_keeps_the_product(m: int, n: int, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((m, rank)) * 1e6, random.standard_normal((rank, n))
    found = balance(left, right)
    assert found.rank == min(m, rank, n)
    np.testing.assert_allclose(found.product(), left @ right, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.left, axis=0), np.linalg.norm(found.right, axis=1), rtol=1e-6)


def merged(m: int, n: int, rank: int, dtype: np.dtype[Any], random: np.random.Generator) -> Array:
    """What merging factors leaves, with singular values that fall by e^3."""
    sums = np.float64 if dtype.itemsize == 8 else np.float32
    left = random.standard_normal((m, rank)) * np.exp(-3 * np.arange(rank) / rank)
    right: Array = (left.astype(sums) @ random.standard_normal((rank, n)).astype(sums)).astype(dtype)
    return right


def assert_reproduces(weight: Array, found: Factors | None, rtol: float) -> Factors:
    assert found is not None
    assert found.left.dtype == (np.float64 if weight.dtype.itemsize >= 4 else np.float32)
    left, right = (each.astype(weight.dtype).astype(np.float64) for each in (found.left, found.right))
    wide = weight.astype(np.float64)
    error = left @ right - wide
    for axis in (0, 1):
        # A little more than was promised: the promise was checked with sums in float32.
        assert np.all(np.linalg.norm(error, axis=axis) <= 1.01 * rtol * np.linalg.norm(wide, axis=axis))
    return found


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "rank"), [(300, 200, 40), (150, 400, 100), (2000, 30, 7), (1, 9, 1), (9, 1, 1)])
def test_a_hidden_rank_is_found(m: int, n: int, rank: int, dtype: np.dtype[Any]) -> None:
    weight = merged(m, n, rank, dtype, np.random.default_rng(m + n))
    found = assert_reproduces(weight, find_rank(weight, min(m, n)), default_rtol(dtype, min(m, n)))
    assert found.rank == rank
    again = find_rank(weight, rank)
    assert again is not None
    np.testing.assert_allclose(again.product(), found.product(), rtol=0, atol=1e-2 * np.abs(found.product()).max())
    if rank > 1:
        assert find_rank(weight, rank - 1) is None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_and_columns_of_any_scale_have_the_same_rank(dtype: np.dtype[Any]) -> None:
    random = np.random.default_rng(0)
    weight = merged(200, 150, 20, dtype, random).astype(np.float64)
    weight *= 2.0 ** random.integers(-4, 4, (200, 1)) * 2.0 ** random.integers(-3, 3, (1, 150))
    stored = weight.astype(dtype)
    found = assert_reproduces(stored, find_rank(stored, 60), default_rtol(dtype, 150))
    assert found.rank == 20


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("where", ["row", "column", "entry", "entry of a small row"])
def test_a_tail_in_one_place_does_not_hide(where: str, dtype: np.dtype[Any]) -> None:
    random = np.random.default_rng(1)
    weight = merged(200, 150, 20, dtype, random)
    if where == "row":
        weight[77] = random.standard_normal(150).astype(dtype)
    elif where == "column":
        weight[:, 77] = random.standard_normal(200).astype(dtype)
    else:
        if where == "entry of a small row":
            weight[77] = (weight[77].astype(np.float64) * 2.0**-10).astype(dtype)
        weight[77, 77] += np.abs(weight[77]).max()
    assert find_rank(weight, 20) is None
    found = assert_reproduces(weight, find_rank(weight, 21), default_rtol(dtype, 150))
    assert found.rank == 21


@settings(deadline=None)
@given(sizes, sizes, kinds, st.sampled_from(TYPES), st.integers(1, 25), seeds)
def test_any_weight_is_reproduced_or_refused(
    m: int, n: int, kind: str, dtype: np.dtype[Any], limit: int, seed: int
) -> None:
    weight = weight_of(kind, m, n, np.random.default_rng(seed)).astype(dtype)
    found = find_rank(weight, limit)
    rank = max(1, np.linalg.matrix_rank(weight.astype(np.float64)))
    if found is not None:
        assert_reproduces(weight, found, default_rtol(dtype, min(m, n)))
        assert found.rank <= min(limit, rank)
    elif dtype.itemsize >= 4:
        assert limit < rank


def test_a_weight_of_full_rank_is_refused_and_a_decaying_one_is_not_low_rank() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((300, 400)).astype(np.float32)
    assert find_rank(weight, 250) is None
    u, _, vt = np.linalg.svd(weight, full_matrices=False)
    decaying = ((u * np.exp(-6 * np.arange(300) / 300)) @ vt).astype(np.float32)  # down to 0.25 % of the largest
    assert find_rank(decaying, 250) is None
    loose = find_rank(decaying, 250, rtol=0.05)
    assert loose is not None
    assert_reproduces(decaying, loose, 0.05)


def test_the_search_can_be_repeated() -> None:
    weight = merged(100, 80, 10, np.dtype(np.float32), np.random.default_rng(0))
    first, second = find_rank(weight, 40), find_rank(weight, 40)
    assert first is not None and second is not None
    np.testing.assert_array_equal(first.left, second.left)
    np.testing.assert_array_equal(first.right, second.right)


def test_a_limit_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 0"):
        find_rank(np.ones((3, 3)), 0)
    with pytest.raises(ValueError, match="NaN"):
        find_rank(np.full((3, 3), np.nan), 1)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.floats(1e-4, 1.5),
    st.sampled_from(["factors", "pivot"]),
)
def test_the_rank_at_a_density_is_the_largest_within_it(m: int, n: int, density: float, form: Form) -> None:
    rank = rank_at_density(m, n, density, form)
    assert 1 <= rank <= min(m, n)
    assert rank == 1 or elements(m, n, rank, form) <= density * m * n
    assert rank == min(m, n) or elements(m, n, rank + 1, form) > density * m * n


def test_known_ranks() -> None:
    densities = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    assert [rank_at_density(4096, 4096, d, "factors") for d in densities] == [1843, 1638, 1433, 1228, 1024, 819]
    assert [rank_at_density(4096, 4096, d, "pivot") for d in densities] == [
        math.floor(4096 * (1 - math.sqrt(1 - d))) for d in densities
    ]
    assert rank_at_density(3072, 768, 0.5, "factors") == 307
    assert rank_at_density(8, 8, 1.0, "pivot") == 8
    with pytest.raises(ValueError):
        rank_at_density(8, 8, 0, "pivot")
