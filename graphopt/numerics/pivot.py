"""A low-rank weight as some of its own rows and the others as combinations of them.

A weight W (m, n) of rank r has r rows W_p that span all of them: ``W[order] = [W_p; C W_p]``, with r (m + n - r)
elements instead of the r (m + n) of two factors (PIFA, Zhao et al., ICML 2025, arXiv 2501.19090; the classical row
interpolative decomposition). Which rows, and how C is found, decides how much rounding is amplified, and both are done
differently here from the paper's QR of W^T with column pivoting followed by least squares:

* Rows are chosen on an orthonormal basis Q (m, r) of the columns of W, so that the sizes of the singular values of W
  play no part, and W is never formed: by QR of Q^T with column pivoting.
* Several weights that are to have the same pivots, or quotas of pivots in blocks of rows, need another way: of all rows
  the one whose loss raises the sum of ``||Q_p^+||_F^2`` least is dropped until as many are left as are wanted
  (A-optimal elimination). Since ``||C||_F^2 = ||Q_p^+||_F^2 - r``, it is the noise that C adds that is minimised.
* Pivots beyond the rank are chosen to lower the same sum, and only help: C is then the solution of least norm, and no
  noise is divided by.
* W_p is rounded with the errors in mind that C makes of it, C is fitted to W_p as rounded, and then rounded likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CANDIDATES = 128  # rows considered for dropping in one step
_SLACK = 0.05  # how far above the lowest score of the others theirs may grow meanwhile: costs no quality, saves half
_SLAB = 64  # rows whose errors are carried on one by one
_LEAST_NOISE = 1e-12  # so that float64, in which this is computed, has digits to spare
_FULL = 1 - 1e-9  # a row of this leverage cannot be dropped: the others do not span it


@dataclass(frozen=True)
class Pivoted:
    """W (m, n) by rows: ``W[order] = [kept; coefficients @ kept]``; by columns the same of its transpose.

    Attributes:
        order: (m,) int64, every row once; the first r are the pivots.
        kept: W_p, (r, n).
        coefficients: C, (m - r, r).
    """

    order: npt.NDArray[np.int64]
    kept: Array
    coefficients: Array

    def product(self) -> npt.NDArray[np.float64]:
        """The matrix that is represented, (m, n), in its own order of rows, float64."""
        kept = self.kept.astype(np.float64)
        result = np.empty((len(self.order), kept.shape[1]))
        result[self.order] = np.concatenate([kept, self.coefficients.astype(np.float64) @ kept])
        return result


def choose_pivots(bases: Sequence[Array], counts: Sequence[int] | None = None, blocks: int = 1) -> Array:
    """An order of rows whose first rows span all of them well, for one basis or several at once.

    Args:
        bases: Each (m, r_k), its columns spanning those of a weight. They may be of any length,
            and dependent.
        counts: How many pivots each is to have, at least r_k; None: r_k. With different counts, the pivots of the
            smaller count are a prefix of those of the larger.
        blocks: The rows are this many equal blocks (attention heads), each to hold the same number of pivots.

    Returns:
        (m,) int64: pivots first, then the others, each ascending (with several counts: those of each count).

    Raises:
        ValueError: The shapes, counts or blocks do not fit, or no rows that are left could be dropped: with that many
            pivots in each block, elimination finds no rows that span the others.
    """
    if not bases:
        raise ValueError("no basis")
    m = len(bases[0])
    counts = [basis.shape[1] for basis in bases] if counts is None else counts
    if any(len(basis) != m for basis in bases) or len(counts) != len(bases):
        raise ValueError("bases of different heights, or not one count a basis")
    if not all(0 < basis.shape[1] <= count <= m for basis, count in zip(bases, counts, strict=True)):
        raise ValueError(f"{list(counts)} pivots for bases of {[basis.shape[1] for basis in bases]} columns, {m} rows")
    if blocks < 1 or m % blocks or any(count % blocks for count in counts):
        raise ValueError(f"{blocks} equal blocks of {m} rows with {list(counts)} pivots")
    rows = np.arange(m, dtype=np.int64)
    parts = []
    wanted = [(count, _orthonormal(basis)) for count, basis in zip(counts, bases, strict=True)]
    if len(wanted) == 1 and blocks == 1:
        rows = _greedy(wanted[0][1], counts[0])
        return np.concatenate([rows, np.delete(np.arange(m), rows)])
    for count in sorted(set(counts), reverse=True):
        kept = _eliminate([basis[rows] for most, basis in wanted if most <= count], rows * blocks // m, count, blocks)
        parts.append(np.delete(rows, kept))
        rows = rows[kept]
    return np.concatenate([rows, *reversed(parts)])


def pivot_rows(
    left: Array,
    right: Array,
    *,
    order: Array | None = None,
    count: int | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Pivoted:
    """``left @ right`` as pivot rows and coefficients.

    C starts as Q_np Q_p^+ and is refitted to W_p as rounded, minimising
    ``||C W_p - W_np||^2 + u^2 / 3 ||C diag(row lengths of W_p)||^2``. The second term is what rounding C and the
    products with W_p to the type (unit roundoff u) adds for inputs of no preferred direction. Both are rounded so that
    what one number loses is made up for by the next: entries of W_p may be off by more than one rounding, the outputs
    are off by less.

    Args:
        left: (m, r). Its columns may be dependent.
        right: (r, n).
        order: As ``choose_pivots`` gives; None: chosen here.
        count: Pivots, at least r; None: r. More than r, to pad the rank, lowers the error.
        dtype: The type that W_p and C are rounded to.

    Raises:
        ValueError: The shapes do not fit, the order is no permutation, its first rows do not span the others, or a
            result does not fit the type.
    """
    count = left.shape[1] if count is None else count
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors of {left.shape} and {right.shape}")
    if order is None:
        order = choose_pivots([left], [count])
    elif not left.shape[1] <= count <= len(left) or not np.array_equal(np.sort(order), np.arange(len(left))):
        raise ValueError(f"an order of {len(order)} rows with {count} pivots for factors of {left.shape}")
    from scipy.linalg import qr

    basis, core = qr(left.astype(np.float64), mode="economic", check_finite=False)
    across = core @ right.astype(np.float64)
    exact = basis[order[:count]] @ across
    coefficients = _coefficients(basis[order[:count]], basis[order[count:]])
    reach = qr(np.concatenate([coefficients, np.eye(count)]), mode="r", check_finite=False)[0][:count]
    kept = _rounded(exact, reach, dtype)
    correction, metric = _correction(exact, kept.astype(np.float64), dtype)
    fitted = coefficients + coefficients @ correction
    return Pivoted(np.asarray(order, np.int64), kept, _rounded(fitted.T, metric, dtype).T.copy())


def pivot_columns(
    left: Array,
    right: Array,
    *,
    order: Array | None = None,
    count: int | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Pivoted:
    """``left @ right`` as pivot columns and coefficients: ``W[:, order] = [kept^T, kept^T coefficients^T]``.

    ``y = kept^T (x_p + coefficients^T x_np)``. Everything else is as for ``pivot_rows`` of the transpose.
    """
    return pivot_rows(right.T, left.T, order=order, count=count, dtype=dtype)


def _greedy(basis: Array, count: int) -> npt.NDArray[np.int64]:
    """The pivots of QR with column pivoting, then those that lower ||Q_p^+||_F most, ascending."""
    from scipy.linalg import cho_solve, qr

    rank = basis.shape[1]
    chosen = qr(basis.T, mode="r", pivoting=True, check_finite=False)[1][:rank]
    if count > rank:
        # The factor comes from QR of the pivots: their product would square its condition.
        inverse = cho_solve((np.linalg.qr(basis[chosen], mode="r"), False), np.eye(rank), check_finite=False)
        free = np.ones(len(basis), bool)
        free[chosen] = False
        for _ in range(count - rank):
            solved = basis @ inverse
            gains = np.einsum("ij,ij->i", solved, solved) / (1 + np.einsum("ij,ij->i", solved, basis))
            best = int(np.argmax(np.where(free, gains, -1)))
            free[best] = False
            inverse -= np.outer(solved[best], solved[best]) / (1 + solved[best] @ basis[best])
        chosen = np.flatnonzero(~free)
    return np.sort(chosen).astype(np.int64)


class _Elimination:
    """What is known of one basis while rows are dropped.

    With M = U^T U of the rows that are left: ``inverse`` is M^-1, ``leverage`` u M^-1 u of each row and ``weight``
    |M^-1 u|^2. Dropping a row raises tr(M^-1) by weight / (1 - leverage).
    """

    def __init__(self, rows: Array) -> None:
        self.rows = rows
        self.refresh(np.ones(len(rows), bool))

    def refresh(self, alive: npt.NDArray[np.bool_]) -> None:
        """Compute everything anew, with the rows that are alive alone."""
        from scipy.linalg import cho_factor, cho_solve

        self.rows = self.rows[alive]
        factor = cho_factor(self.rows.T @ self.rows, check_finite=False)
        self.inverse: Array = cho_solve(factor, np.eye(self.rows.shape[1]), check_finite=False)
        solved = self.rows @ self.inverse
        self.leverage = np.einsum("ij,ij->i", solved, self.rows)
        self.weight = np.einsum("ij,ij->i", solved, solved)

    def scores(self) -> Array:
        return np.where(self.leverage < _FULL, self.weight / np.maximum(1 - self.leverage, 1 - _FULL), np.inf)

    def among(self, chosen: Array) -> tuple[Array, Array, Array]:
        """M^-1 U^T, U M^-1 U^T and U M^-2 U^T of some rows."""
        solved = self.inverse @ self.rows[chosen].T
        return solved, self.rows[chosen] @ solved, solved.T @ solved

    def drop(self, solved: Array, leverages: Array) -> None:
        """Drop rows, given M^-1 U^T and U M^-1 U^T of them."""
        from scipy.linalg import cholesky, solve_triangular

        factor = cholesky(np.eye(len(leverages)) - leverages, lower=True, check_finite=False)
        update = solve_triangular(factor, solved.T, lower=True, check_finite=False).T  # M^-1 grows by update update^T
        both = self.rows @ np.concatenate([update, self.inverse @ update], axis=1)
        first, second = np.split(both, 2, axis=1)
        self.leverage += np.einsum("ij,ij->i", first, first)
        self.weight += np.einsum("ij,ij->i", first, 2 * second + first @ (update.T @ update))
        self.inverse += update @ update.T


def _eliminate(bases: Sequence[Array], block_of: Array, count: int, blocks: int) -> Array:
    """The rows that are left, ascending, when all but ``count``, the same number in each block, are dropped."""
    left = np.arange(len(block_of))
    spare = np.bincount(block_of, minlength=blocks) - count // blocks
    if not spare.any():
        return left
    states = [_Elimination(basis) for basis in bases]
    alive = np.ones(len(left), bool)
    while spare.any():
        if alive.sum() < 0.75 * len(alive):  # also where rounding of the updates is got rid of
            for state in states:
                state.refresh(alive)
            left, alive = left[alive], np.ones(int(alive.sum()), bool)
        scores = sum((state.scores() for state in states), np.zeros(len(left)))
        scores[~alive | (spare[block_of[left]] == 0)] = np.inf
        dropped = _step(states, scores, block_of[left], spare)
        alive[dropped] = False
    return left[alive]


def _step(states: Sequence[_Elimination], scores: Array, block_of: Array, spare: Array) -> Array:
    """Drop the rows of the lowest scores, one after another, while no other row's score is lower.

    The scores of the candidates are kept exact meanwhile, in matrices of their own size; those of the other rows are
    as of the beginning, and they only grow.
    """
    many = min(_CANDIDATES, len(scores) - 1)
    nearest = np.argpartition(scores, many)[: many + 1]
    nearest = nearest[np.argsort(scores[nearest], kind="stable")]
    chosen, bound = nearest[:many], scores[nearest[many]]
    chosen = chosen[np.isfinite(scores[chosen])]
    if not len(chosen):
        raise ValueError("no row can be dropped: too many pivots are asked of a block whose rows are dependent")
    among = [state.among(chosen) for state in states]
    first = [leverages.copy() for _, leverages, _ in among]
    blocks = block_of[chosen]
    open_ = np.ones(len(chosen), bool)
    dropped: list[int] = []
    while True:
        current = np.where(open_ & (spare[blocks] > 0), 0.0, np.inf)
        for _, leverages, weights in among:
            own, cost = leverages.diagonal(), weights.diagonal()
            current += np.where(own < _FULL, cost / np.maximum(1 - own, 1 - _FULL), np.inf)
        best = int(np.argmin(current))
        if not np.isfinite(current[best]) or (dropped and current[best] > bound * (1 + _SLACK)):
            break
        dropped.append(best)
        open_[best] = False
        spare[blocks[best]] -= 1
        for _, leverages, weights in among:
            row, cross = leverages[best].copy(), weights[best].copy()
            share = 1 / (1 - row[best])
            weights += share * (np.outer(cross, row) + np.outer(row, cross))
            weights += (share * share * cross[best]) * np.outer(row, row)
            leverages += share * np.outer(row, row)
    for state, (solved, _, _), leverages in zip(states, among, first, strict=True):
        state.drop(solved[:, dropped], leverages[np.ix_(dropped, dropped)])
    return chosen[dropped]


def _coefficients(pivots: Array, others: Array) -> Array:
    """others pivots^+, the combinations of pivots, of least norm, that give the others."""
    from scipy.linalg import qr, solve_triangular

    down, triangle = qr(pivots, mode="economic", check_finite=False)
    sizes = np.abs(triangle.diagonal())
    if sizes.min() <= 1e-12 * max(sizes.max(), 1e-300):
        raise ValueError("the pivots do not span the other rows")
    result: Array = solve_triangular(triangle, others.T, trans="T", check_finite=False).T @ down.T
    return result


def _correction(exact: Array, rounded: Array, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """F such that C + C F fits ``rounded`` where C fits ``exact``; T such that being off by D costs ||T D^T||^2 more.

    ``C exact - (C + D) rounded`` is to be small, D = C F: least squares of ``C (exact - rounded)`` by D, with the
    noise of rounding as the second term.
    """
    from scipy.linalg import qr_multiply, solve_triangular

    noise = max(_unit_roundoff(dtype) / np.sqrt(3), _LEAST_NOISE)
    lengths = np.sqrt(np.einsum("ij,ij->i", rounded, rounded))
    damp = np.diag(noise * np.maximum(lengths, 1e-3 * (lengths.max() or 1.0)))
    turned, triangle = qr_multiply(
        np.concatenate([rounded.T, damp]), np.concatenate([exact - rounded, -damp], axis=1), mode="right"
    )
    return solve_triangular(triangle, turned.T, check_finite=False).T, triangle


def _orthonormal(columns: Array) -> Array:
    from scipy.linalg import qr

    result: Array = qr(columns.astype(np.float64), mode="economic", check_finite=False)[0]
    return result


def _rounded(values: Array, metric: Array, dtype: npt.DTypeLike) -> Array:
    """Values (k, a) rounded to a type so that ``||metric (values - result)||`` is small.

    The metric is (k, k), upper triangular. From the last row to the first, each row makes up for the errors of those
    below it as far as it can, as in Babai's nearest plane algorithm (and GPTQ). Rounding each number for itself would
    pay the mean of the eigenvalues of metric^T metric; this pays about their geometric mean.
    """
    result = np.empty(values.shape, np.dtype(dtype))
    errors = np.zeros(values.shape)
    scaled = metric / metric.diagonal()[:, None]
    with np.errstate(over="ignore"):
        for stop in range(len(values), 0, -_SLAB):
            start = max(0, stop - _SLAB)
            shifts = scaled[start:stop, stop:] @ errors[stop:]
            for i in range(stop - 1, start - 1, -1):
                shift = shifts[i - start] + scaled[i, i + 1 : stop] @ errors[i + 1 : stop]
                result[i] = (values[i] + shift).astype(result.dtype)
                errors[i] = values[i] - result[i].astype(np.float64)
    if not np.isfinite(result).all():
        raise ValueError(f"values that {result.dtype} cannot hold")
    return result


def _unit_roundoff(dtype: npt.DTypeLike) -> float:
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2  # type: ignore[no-untyped-call]
