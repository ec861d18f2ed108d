from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.low_rank import balance
from graphopt.numerics.pivot import Pivoted, choose_pivots, pivot_columns, pivot_rows

Array = npt.NDArray[Any]
HALF, BRAIN = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
TYPES = [HALF, BRAIN, np.dtype(np.float32), np.dtype(np.float64)]

seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(["plain", "zero", "zero rows", "equal rows", "dependent columns", "ill-conditioned"])


@st.composite
def factors(draw: st.DrawFn) -> tuple[Array, Array]:
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, m))  # also above n
    random = np.random.default_rng(draw(seeds))
    left, right = random.standard_normal((m, rank)), random.standard_normal((rank, n))
    kind = draw(kinds)
    if kind == "zero":
        left[:] = 0
    if kind == "zero rows":
        left[::2] = 0
    if kind == "equal rows":
        left[:] = left[0]
    if kind == "dependent columns":
        left[:, -1] = left[:, 0]
    if kind == "ill-conditioned":
        right *= 10.0 ** -np.linspace(0, 6, rank)[:, None]
    return left, right


def eps(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def noise(basis: Array, pivots: Array) -> float:
    """||C||_F of the exact coefficients."""
    q = np.linalg.qr(basis)[0]
    sizes = np.linalg.svd(q[pivots], compute_uv=False)
    return float(np.sqrt(max((1 / sizes**2).sum() - q.shape[1], 0)))


@settings(deadline=None, max_examples=200)
@given(factors(), st.integers(0, 3), st.sampled_from(TYPES), st.booleans())
def test_the_product_is_kept(pair: tuple[Array, Array], extra: int, dtype: np.dtype[Any], columns: bool) -> None:
    left, right = pair
    count = min(left.shape[1] + extra, len(left))
    weight = left @ right
    if columns:
        found = pivot_columns(right.T, left.T, count=count, dtype=dtype)
        weight = weight.T
        product = found.product().T
    else:
        found = pivot_rows(left, right, count=count, dtype=dtype)
        product = found.product()
    assert np.array_equal(np.sort(found.order), np.arange(len(left)))
    assert found.kept.shape == (count, right.shape[1])
    assert found.coefficients.shape == (len(left) - count, count)
    assert found.kept.dtype == found.coefficients.dtype == dtype
    # Each rounding of W_p and of C is amplified by no more than the norm of C, which pivoting keeps small.
    error = np.linalg.norm(product - weight)
    assert error <= (1e-11 + 4 * len(left) * eps(dtype)) * np.linalg.norm(weight)
    # What an output owes to one pivot, beside the largest pivot: a short pivot row may have a large coefficient.
    lengths = np.linalg.norm(found.kept.astype(np.float64), axis=1)
    owed = np.abs(found.coefficients.astype(np.float64)) * np.maximum(lengths / (lengths.max() or 1), 1e-3)
    assert owed.max(initial=0) <= 40


def test_columns_are_rows_of_the_transpose() -> None:
    random = np.random.default_rng(0)
    left, right = random.standard_normal((20, 5)), random.standard_normal((5, 12))
    x = random.standard_normal(12)
    by_columns = pivot_columns(left, right, dtype=np.float64)
    moved = x[by_columns.order]
    y = by_columns.kept.T @ (moved[:5] + by_columns.coefficients.T @ moved[5:])
    np.testing.assert_allclose(y, left @ (right @ x), atol=1e-12)
    by_rows = pivot_rows(left, right, dtype=np.float64)
    kept = by_rows.kept @ x
    y = np.empty(20)
    y[by_rows.order] = np.concatenate([kept, by_rows.coefficients @ kept])
    np.testing.assert_allclose(y, left @ (right @ x), atol=1e-12)
    np.testing.assert_allclose(by_rows.kept, (left @ right)[by_rows.order[:5]], atol=1e-12)


@settings(deadline=None)
@given(factors(), st.integers(0, 4))
def test_one_basis(pair: tuple[Array, Array], extra: int) -> None:
    left = pair[0]
    m, rank = left.shape
    count = min(m, rank + extra)
    order = choose_pivots([left], [count])
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(m))
    assert np.all(np.diff(order[:count]) > 0) and np.all(np.diff(order[count:]) > 0)
    if np.linalg.matrix_rank(left) == rank:
        least = noise(left, choose_pivots([left])[:rank])
        assert noise(left, order[:count]) <= least * (1 + 1e-9) + 1e-6  # more pivots never add noise


@settings(deadline=None)
@given(st.integers(1, 30), st.data(), seeds)
def test_joint_and_nested_pivots(m: int, data: st.DataObject, seed: int) -> None:
    random = np.random.default_rng(seed)
    ranks = data.draw(st.lists(st.integers(1, m), min_size=2, max_size=3))
    counts = [data.draw(st.integers(rank, m)) for rank in ranks]
    bases = [random.standard_normal((m, rank)) for rank in ranks]
    order = choose_pivots(bases, counts)
    assert np.array_equal(np.sort(order), np.arange(m))
    for basis, count in zip(bases, counts, strict=True):
        right = random.standard_normal((basis.shape[1], 7))
        found = pivot_rows(basis, right, order=order, count=count, dtype=np.float64)
        np.testing.assert_allclose(found.product(), basis @ right, atol=1e-6)


def test_joint_pivots_serve_every_basis() -> None:
    random = np.random.default_rng(0)
    bases = [random.standard_normal((300, 60)) for _ in range(2)]
    alone = [noise(basis, choose_pivots([basis])[:60]) for basis in bases]
    joint = choose_pivots(bases)[:60]
    of_other = noise(bases[0], choose_pivots([bases[1]])[:60])
    for basis, best in zip(bases, alone, strict=True):
        assert noise(basis, joint) < 1.7 * best
    assert of_other > 4 * alone[0]


def naive_elimination(bases: list[Array], count: int) -> Array:
    """A-optimal elimination from its definition."""
    rows = list(range(len(bases[0])))
    orthonormal = [np.linalg.qr(basis)[0] for basis in bases]
    while len(rows) > count:
        costs = []
        for row in rows:
            rest = [each for each in rows if each != row]
            costs.append(sum(float(np.trace(np.linalg.inv(q[rest].T @ q[rest]))) for q in orthonormal))
        rows.pop(int(np.argmin(costs)))
    return np.array(rows)


@pytest.mark.parametrize("seed", range(3))
def test_elimination_is_as_good_as_from_its_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    bases = [random.standard_normal((60, 12)) for _ in range(2)]
    wanted, found = naive_elimination(bases, 12), choose_pivots(bases)[:12]

    def both(pivots: Array) -> float:
        return sum(noise(basis, pivots) ** 2 for basis in bases)

    assert both(found) <= 1.5 * both(wanted)
    many = naive_elimination(bases, 55)
    assert np.array_equal(choose_pivots(bases, [55, 55])[:55], many)  # where scores are far apart, the very same


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.data(), seeds)
def test_blocks_hold_the_same_number_of_pivots(blocks: int, height: int, data: st.DataObject, seed: int) -> None:
    random = np.random.default_rng(seed)
    each = data.draw(st.integers(1, height))
    count = blocks * each
    basis = random.standard_normal((blocks * height, data.draw(st.integers(1, count))))
    order = choose_pivots([basis, basis], [count, blocks * height], blocks=blocks)
    assert np.array_equal(np.bincount(order[:count] // height, minlength=blocks), np.full(blocks, each))
    found = pivot_rows(basis, np.eye(basis.shape[1]), order=order, count=count, dtype=np.float64)
    np.testing.assert_allclose(found.product(), basis, atol=1e-6)


def test_a_block_whose_rows_do_not_suffice() -> None:
    basis = np.random.default_rng(0).standard_normal((8, 4))
    basis[:4] = 0
    with pytest.raises(ValueError, match="no row can be dropped"):
        choose_pivots([basis], blocks=2)
    order = choose_pivots([basis], [8], blocks=2)
    assert np.array_equal(order, np.arange(8))


def emulated_error(form: Pivoted, left: Array, right: Array, dtype: np.dtype[Any]) -> float:
    """The relative error of outputs when inputs and the result of each product are rounded to a type."""
    x = np.random.default_rng(9).standard_normal((64, right.shape[1])).astype(dtype).astype(np.float32)
    kept = (x @ form.kept.astype(np.float32).T).astype(dtype)
    others = (kept.astype(np.float32) @ form.coefficients.astype(np.float32).T).astype(dtype)
    y = np.empty((64, len(left)))
    y[:, form.order] = np.concatenate([kept, others], axis=1)
    wanted = x.astype(np.float64) @ (left @ right).T
    return float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))


def spread(m: int, n: int, rank: int) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    fall = np.exp(-3 * np.arange(rank) / rank)
    return random.standard_normal((m, rank)) * fall, random.standard_normal((rank, n)) / n


@pytest.mark.parametrize(("dtype", "most"), [(HALF, 1.0e-3), (BRAIN, 8e-3)], ids=str)
def test_rounding_is_amplified_less_than_by_the_papers_way(dtype: np.dtype[Any], most: float) -> None:
    left, right = spread(1024, 1024, 512)
    assert emulated_error(pivot_rows(left, right, dtype=dtype), left, right, dtype) <= most


def test_refitting_and_padding_lower_the_error() -> None:
    left, right = spread(300, 300, 150)
    order = choose_pivots([left])
    weight = left @ right
    q = np.linalg.qr(left)[0]
    exact = q[order[150:]] @ np.linalg.inv(q[order[:150]])
    plain = Pivoted(order, weight[order[:150]].astype(HALF), exact.astype(HALF))
    fitted = pivot_rows(left, right, dtype=HALF)
    padded = pivot_rows(left, right, count=160, dtype=HALF)
    errors = [emulated_error(form, left, right, HALF) for form in (plain, fitted, padded)]
    assert errors[1] < 0.85 * errors[0]
    assert errors[2] < 0.85 * errors[1]


def test_many_more_pivots_than_the_rank() -> None:
    random = np.random.default_rng(0)
    left, right = random.standard_normal((100, 3)), random.standard_normal((3, 80))
    found = pivot_rows(left, right, count=50, dtype=HALF)
    assert np.abs(found.coefficients.astype(np.float64)).max() < 2
    assert np.linalg.norm(found.product() - left @ right) < 1e-3 * np.linalg.norm(left @ right)


def test_the_scale_of_factors_does_not_matter() -> None:
    left, right = spread(40, 30, 10)
    found = pivot_rows(left, right, dtype=np.float64)
    scaled = pivot_rows(left * 2.0**400, right * 2.0**-400, dtype=np.float64)
    np.testing.assert_allclose(scaled.product(), found.product(), rtol=1e-9, atol=1e-14)
    same = balance(left, right)
    np.testing.assert_allclose(pivot_rows(same.left, same.right, dtype=np.float64).product(), left @ right, atol=1e-12)


def test_a_range_too_small_is_an_error() -> None:
    with pytest.raises(ValueError, match="float16 cannot hold"):
        pivot_rows(np.full((3, 1), 1e4), np.full((1, 3), 1e4), dtype=np.float16)


@pytest.mark.parametrize(
    ("bases", "counts", "blocks"),
    [
        ([], None, 1),
        ([np.ones((3, 1)), np.ones((4, 1))], None, 1),
        ([np.ones((3, 2))], [1], 1),
        ([np.ones((3, 2))], [4], 1),
        ([np.ones((3, 2))], [2, 2], 1),
        ([np.ones((4, 2))], [2], 3),
        ([np.ones((4, 2))], [3], 2),
        ([np.ones((2, 3))], None, 1),
    ],
)
def test_wrong_arguments(bases: list[Array], counts: list[int] | None, blocks: int) -> None:
    with pytest.raises(ValueError):
        choose_pivots(bases, counts, blocks)


def test_wrong_orders() -> None:
    left, right = np.eye(4)[:, :2], np.eye(2)
    for order in (np.array([0, 1, 2, 2]), np.array([0, 1])):
        with pytest.raises(ValueError, match="an order of"):
            pivot_rows(left, right, order=order)
    with pytest.raises(ValueError, match="do not span"):
        pivot_rows(left, right, order=np.array([2, 3, 0, 1]))
    with pytest.raises(ValueError, match="factors of"):
        pivot_rows(left, np.eye(3))
