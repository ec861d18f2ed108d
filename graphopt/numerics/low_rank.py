"""Low-rank forms of a weight: the best factors in the metric of its inputs, hidden rank, sizes at a density.

A linear map y = W x with W (m, n) is stored as ``left @ right``, (m, r) and (r, n). With the Gram matrix
G = sum x x^T of the inputs that a calibration saw, the error that counts is that of the outputs,
``sum ||(W - left right) x||^2 = ||(W - left right) G^(1/2)||_F^2``. Every root of G gives the same optimum: SVD-LLM
(Wang et al. 2024, "truncation-aware data whitening") takes a Cholesky root, EoRA (Liu et al. 2024) an eigen root.

No root is taken here. With U the left singular vectors of ``W G^(1/2)``, the best product of rank r is
``U_r U_r^T W``, and U are the eigenvectors of ``W G W^T``. So nothing is divided by a small eigenvalue of G, and a G of
any rank will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Form = Literal["factors", "pivot"]

_BLOCK = 1 << 21  # elements of a weight that are widened at once
_TIE = 1e-12  # of the trace of G: what decides between directions that G does not see
_PROBES = 8
_OVERSAMPLING = 16
_FIRST = 32  # columns of the first sketch


@dataclass(frozen=True)
class Factors:
    """W (m, n) as ``left @ right``.

    Attributes:
        left: (m, r).
        right: (r, n).
    """

    left: Array
    right: Array

    @property
    def rank(self) -> int:
        """The inner size r."""
        return int(self.right.shape[0])

    def product(self) -> Array:
        """W, (m, n)."""
        result: Array = self.left @ self.right
        return result


def weighted_truncated_svd(weight: Array, rank: int, gram: Array | None = None) -> Factors:
    """The factors of a rank that minimise ``||(W - left right) G^(1/2)||_F``, in float64.

    Directions that G does not see are decided by the plain error, so that the full rank gives W back for every G. Each
    column of ``left`` is as long as its row of ``right``: neither side takes the range of a narrow type alone.

    Args:
        weight: W, (m, n), any float type.
        rank: 1 to min(m, n).
        gram: G, (n, n), symmetric and positive semidefinite, of any rank; None: the identity.

    Raises:
        ValueError: The rank is out of range, the shapes do not fit, or a number is not finite.
    """
    _check(weight, gram)
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} of a weight of {m} x {n}")
    wide, scale = _normalised(weight)
    if gram is None and _precise(weight):
        from scipy.linalg import svd

        u, s, vt = svd(wide, full_matrices=False, overwrite_a=True, check_finite=False)
        root = np.sqrt(s[:rank] * scale)
        return Factors(u[:, :rank] * root, root[:, None] * vt[:rank])
    basis, core = _core(wide)
    directions = _eigen(core, None if gram is None else _tie_broken(gram))[1][:, :rank]
    right = directions.T @ core
    left = directions if basis is None else basis @ directions
    lengths = np.linalg.norm(right, axis=1)
    root = np.sqrt(lengths * scale)
    return Factors(left * root, right * _ratio(root, lengths)[:, None])


def weighted_singular_values(weight: Array, gram: Array | None = None) -> npt.NDArray[np.float64]:
    """The singular values of ``W G^(1/2)``, descending, (min(m, n),), float64.

    The sum of the squares from r on is what ``weighted_truncated_svd`` leaves at the rank r. Values below about 1e-8 of
    the largest are noise, as they are in a G that was summed in float64 and in a weight of float32; those of a float64
    weight without a G have all their digits.

    Raises:
        ValueError: The shapes do not fit or a number is not finite.
    """
    _check(weight, gram)
    wide, scale = _normalised(weight)
    if gram is None and _precise(weight):
        from scipy.linalg import svdvals

        values: npt.NDArray[np.float64] = svdvals(wide, overwrite_a=True, check_finite=False)
        return values * scale
    size = 1.0 if gram is None else float(np.trace(gram, dtype=np.float64))
    if size <= 0:
        return np.zeros(min(weight.shape))
    squares = _eigen(_core(wide)[1], None if gram is None else _symmetric(gram) / size, vectors=False)[0]
    result: npt.NDArray[np.float64] = np.sqrt(np.maximum(squares, 0)) * (scale * math.sqrt(size))
    return result


def balance(left: Array, right: Array) -> Factors:
    """The same product from the singular vectors, half of each singular value on either side, in float64.

    Rounding such factors to a narrow type costs every row and every column of the product about one rounding of its own
    length, however the given factors were scaled.

    Args:
        left: (m, r).
        right: (r, n).

    Returns:
        Factors of the inner size min(m, r, n).
    """
    from scipy.linalg import qr, svd

    down, down_core = qr(left.astype(np.float64), mode="economic")
    across, across_core = qr(right.astype(np.float64).T, mode="economic")
    u, s, vt = svd(down_core @ across_core.T, full_matrices=False)
    root = np.sqrt(s)
    return Factors((down @ u) * root, root[:, None] * (vt @ across.T))


def default_rtol(dtype: npt.DTypeLike, inner: int) -> float:
    """How far a product of hidden rank may be from a stored weight, relative to the lengths of its rows and columns.

    Two things keep a merged weight from its exact low rank. Storing it rounds each entry: 0.42 u of it in the root mean
    square (u = eps / 2); storing factors instead costs 0.6 u. And the product was summed in float32, whose partial sums
    of r terms leave 0.2 eps' sqrt(r / 2). Let pass are eps of the type, two and a half times the first, plus
    2 eps / sqrt(inner), since the roundings of few numbers do not average out, and eps' sqrt(inner) / 4. More than that
    is no rounding, and the weight has no hidden rank. Weights of float64 get (16 + 4 sqrt(inner)) eps, since the search
    itself computes in float64.

    Args:
        dtype: Of the weight.
        inner: What the rank is at most, min(m, n).
    """
    if np.dtype(dtype).itemsize > 4:
        return _eps(np.float64) * (16 + 4 * math.sqrt(inner))
    return _eps(dtype) * (1 + 2 / math.sqrt(inner)) + _eps(np.float32) * math.sqrt(inner) / 4


def find_rank(weight: Array, limit: int, *, rtol: float | None = None, seed: int = 0) -> Factors | None:
    """The factors of a weight that was merged from factors of a small inner size, or None where its rank is larger.

    The factors are found in the range of a growing random sketch, never from a full decomposition, and rounded to the
    type of the weight they reproduce W: each row and each column within ``rtol`` of its own length, and each entry
    within eight times that of the largest in its row. That is measured on the whole weight, so a tail in one row or one
    entry does not hide. Rows and columns are scaled to equal length first, so small ones count as much as large ones.

    O(m n r) work. W is widened a block of rows at a time; the sketches take 3 (m + n) r numbers.

    Args:
        weight: (m, n), any float type.
        limit: The largest rank that is of interest.
        rtol: What counts as equal; None: ``default_rtol``, the rounding of the weight's own type.
        seed: Of the sketch.

    Returns:
        Factors, float32 for weights narrower than that, else float64. The rank is at least 1, also of zeros.

    Raises:
        ValueError: The limit is below 1, the weight is no matrix, or a number is not finite.
    """
    _check(weight, None)
    if limit < 1:
        raise ValueError(f"a rank of at most {limit}")
    m, n = weight.shape
    limit = min(limit, m, n)
    rtol = default_rtol(weight.dtype, min(m, n)) if rtol is None else rtol
    scaled = _Scaled(weight)
    random = np.random.default_rng(seed)
    probes = random.standard_normal((n, _PROBES)).astype(scaled.dtype)
    probed = scaled.times(probes)
    most = min(m, n, limit + _OVERSAMPLING)
    basis = np.empty((m, 0), scaled.dtype)
    while True:
        size = basis.shape[1]
        more = min(most, max(_FIRST, 2 * size)) - size
        sketch = scaled.times(random.standard_normal((n, more)).astype(scaled.dtype))
        basis = np.concatenate([basis, _new_directions(sketch, basis)], axis=1)
        basis[scaled.row_lengths == 0] = 0  # but for rounding it is
        missed = _row_lengths(probed - basis @ (basis.T @ probed)) / math.sqrt(_PROBES)
        # The range of a sketch misses up to about sqrt(r) of the noise; the second pass, below, does not.
        if bool((missed <= rtol * (4 + 4 * math.sqrt(basis.shape[1])) * scaled.row_lengths).all()):
            found = _factors_in(scaled, basis, probes, probed, limit, rtol)
            if found is not None:
                return found
        if basis.shape[1] >= most:
            return None


def elements(m: int, n: int, rank: int, form: Form) -> int:
    """Weight elements of a form of W (m, n): r (m + n) for two factors, r (m + n - r) for pivots and coefficients."""
    return rank * (m + n) if form == "factors" else rank * (m + n - rank)


def rank_at_density(m: int, n: int, density: float, form: Form) -> int:
    """The largest rank whose form has at most ``density`` of the m n elements of W, but at least 1.

    PIFA's code counts r indices beside the weights of the pivot form. They are left out: the permutation is folded into
    the neighbours, or is not a weight.

    Raises:
        ValueError: The density is not positive.
    """
    if density <= 0:
        raise ValueError(f"density {density}")
    most, budget = min(m, n), density * m * n
    if form == "factors":
        rank = int(budget / (m + n))
    else:
        inside = (m + n) ** 2 - 4 * budget
        rank = most if inside <= 0 else int((m + n - math.sqrt(inside)) / 2)
    rank = min(max(rank, 1), most)
    while rank < most and elements(m, n, rank + 1, form) <= budget:  # where the root was rounded
        rank += 1
    while rank > 1 and elements(m, n, rank, form) > budget:
        rank -= 1
    return rank


class _Scaled:
    """A weight with rows and columns brought to about equal length by powers of two, read a block of rows at a time.

    The rank is that of the weight. The scale of a row of zeros is 1.
    """

    def __init__(self, weight: Array) -> None:
        self.weight = weight
        self.dtype = np.dtype(np.float64 if weight.dtype.itemsize >= 4 else np.float32)
        self.rows = np.ones(weight.shape[0], np.float64)
        self.columns = np.ones(weight.shape[1], np.float64)
        for rows, block in self._wide():
            self.rows[rows] = _inverse_power_of_two(np.abs(block).max(axis=1, initial=0))
        self._set_rows()
        squares = sum(((block * block).sum(axis=0) for _, block in self.blocks()), np.zeros(weight.shape[1]))
        self.columns = _inverse_power_of_two(np.sqrt(squares))
        self.empty_columns = squares == 0
        self.row_lengths = self._set_rows()

    def _set_rows(self) -> npt.NDArray[np.float64]:
        lengths = np.concatenate([_row_lengths(block) for _, block in self.blocks()])
        again = _inverse_power_of_two(lengths)
        self.rows *= again
        result: npt.NDArray[np.float64] = lengths * again
        return result

    def _wide(self) -> Iterator[tuple[slice, Array]]:
        for rows in _row_blocks(self.weight.shape):
            yield rows, self.weight[rows].astype(np.float64)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Ranges of rows, and those rows scaled, in the type to compute in."""
        for rows, block in self._wide():
            block *= self.rows[rows, None]
            block *= self.columns
            yield rows, block.astype(self.dtype, copy=False)

    def times(self, columns: Array) -> Array:
        """W columns, (m, k)."""
        return np.concatenate([block @ columns for _, block in self.blocks()])

    def transposed_times(self, columns: Array) -> Array:
        """W^T columns, (n, k)."""
        result = np.zeros((self.weight.shape[1], columns.shape[1]), self.dtype)
        for rows, block in self.blocks():
            result += block.T @ columns[rows]
        return result


def _factors_in(scaled: _Scaled, basis: Array, probes: Array, probed: Array, limit: int, rtol: float) -> Factors | None:
    """Factors of the least rank, in about the range of ``basis``, that reproduce the weight; None: there are none."""
    from scipy.linalg import qr, svd

    # Once more through W and W^T: this basis of the rows misses little more than the best one would.
    across = _orthonormal(scaled.transposed_times(basis))
    down = scaled.times(across)
    missed = _row_lengths(probed - down @ (across.T @ probes)) ** 2 / _PROBES
    triangle = qr(down, mode="r", check_finite=False)[0][: down.shape[1]]
    _, values, turned = svd(triangle, full_matrices=False, check_finite=False)
    # What is no larger than the rounding of this very computation is none of the weight's.
    floor = 8 * _eps(scaled.dtype) * math.sqrt(max(scaled.weight.shape)) * values[0]
    values = values[: max(1, int((values > floor).sum()))]
    turned = turned[: len(values)]
    down = down @ turned.T  # columns orthogonal, as long as the singular values; rows of zeros stay zeros
    tails = np.cumsum((down.astype(np.float64) ** 2)[:, ::-1], axis=1)[:, ::-1]
    tails = np.concatenate([tails, np.zeros((len(down), 1))], axis=1)
    allowed = np.maximum((0.8 * rtol * scaled.row_lengths) ** 2 - missed, 0)[:, None]
    rank = max(1, int(np.argmax((tails <= allowed).all(axis=0))))
    if rank > limit:
        return None
    across = (across @ turned.T).T
    for _ in range(4):
        root = np.sqrt(values[:rank])
        left = down[:, :rank] * _ratio(np.ones(rank), root) / scaled.rows[:, None]
        right = across[:rank] * root[:, None] / scaled.columns
        right[:, scaled.empty_columns] = 0
        found = Factors(left.astype(scaled.dtype), right.astype(scaled.dtype))
        if _reproduces(scaled.weight, found, rtol):
            return found
        if rank == min(limit, len(values)):
            return None
        rank = min(limit, len(values), rank + max(1, rank // 32))
    return None


def _reproduces(weight: Array, factors: Factors, rtol: float) -> bool:
    """Whether factors, rounded to the type of the weight, give it back as ``find_rank`` promises."""
    wide = factors.left.dtype
    with np.errstate(over="ignore"):
        left = factors.left.astype(weight.dtype).astype(wide)
        right = factors.right.astype(weight.dtype).astype(wide)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return False
    missed, own = np.zeros(weight.shape[1]), np.zeros(weight.shape[1])
    for rows in _row_blocks(weight.shape):
        block = weight[rows].astype(np.float64)
        error = left[rows] @ right - block
        if not (_row_lengths(error) <= rtol * _row_lengths(block)).all():
            return False
        if not (np.abs(error).max(axis=1) <= 8 * rtol * np.abs(block).max(axis=1)).all():
            return False
        missed += (error * error).sum(axis=0)
        own += (block * block).sum(axis=0)
    return bool((missed <= rtol**2 * own).all())


def _new_directions(columns: Array, basis: Array) -> Array:
    """An orthonormal basis of what columns add to a basis."""
    for _ in range(2):  # the second time removes what rounding left of the first
        columns = _orthonormal(columns - basis @ (basis.T @ columns))
    return columns


def _orthonormal(columns: Array) -> Array:
    from scipy.linalg import qr

    result: Array = qr(columns, mode="economic", overwrite_a=True, check_finite=False)[0]
    return result


def _core(wide: Array) -> tuple[Array | None, Array]:
    """W as ``basis @ core`` with orthonormal columns in ``basis`` and no more rows in ``core`` than columns."""
    if wide.shape[0] <= wide.shape[1]:
        return None, wide
    from scipy.linalg import qr

    basis, core = qr(wide, mode="economic", overwrite_a=True, check_finite=False)
    return basis, core


def _precise(weight: Array) -> bool:
    """Whether W has more digits than the eigenvalues of W W^T keep, which take a quarter of the time of its SVD."""
    return weight.dtype.itemsize > 4


def _eigen(core: Array, gram: Array | None, vectors: bool = True) -> tuple[Array, Array]:
    """Eigenvalues, descending, and eigenvectors (empty where not wanted) of core G core^T."""
    from scipy.linalg import eigh

    moment = np.empty((len(core), len(core)))
    for rows in _row_blocks(core.shape):
        moment[rows] = (core[rows] if gram is None else core[rows] @ gram) @ core.T
    moment = _symmetric(moment)
    if not vectors:
        return eigh(moment, eigvals_only=True, overwrite_a=True, check_finite=False)[::-1], np.empty((len(core), 0))
    squares, directions = eigh(moment, overwrite_a=True, check_finite=False, driver="evd")
    return squares[::-1], directions[:, ::-1]


def _tie_broken(gram: Array) -> Array:
    """G of trace 1, and a little of the identity: directions that G does not see are ranked by the plain error."""
    result = _symmetric(gram)
    size = float(np.trace(result))
    if size > 0:
        result /= size
    result[np.diag_indices_from(result)] += _TIE if size > 0 else 1.0
    return result


def _symmetric(matrix: Array) -> npt.NDArray[np.float64]:
    result = matrix.astype(np.float64)
    result += result.T.copy()
    result *= 0.5
    return result


def _normalised(weight: Array) -> tuple[npt.NDArray[np.float64], float]:
    """W over a power of two near its largest entry, and that: squares of it neither overflow nor vanish."""
    wide = weight.astype(np.float64)
    scale = float(1 / _inverse_power_of_two(np.abs(wide).max(initial=0)))
    wide /= scale
    return wide, scale


def _inverse_power_of_two(sizes: Array) -> npt.NDArray[np.float64]:
    """1 over the power of two next above each size; 1 for 0."""
    exponents = np.clip(-np.frexp(sizes)[1], -1000, 1000)
    result: npt.NDArray[np.float64] = np.ldexp(1.0, np.where(sizes > 0, exponents, 0))
    return result


def _ratio(numerators: Array, denominators: Array) -> Array:
    """Numerators over denominators, 0 where the denominator is."""
    return np.divide(numerators, denominators, out=np.zeros_like(denominators), where=denominators > 0)


def _row_lengths(matrix: Array) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    return result


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _eps(dtype: npt.DTypeLike) -> float:
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps)  # type: ignore[no-untyped-call]


def _check(weight: Array, gram: Array | None) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight of the shape {weight.shape}, not a matrix")
    if not all(np.isfinite(weight[rows]).all() for rows in _row_blocks(weight.shape)):
        raise ValueError("a weight with NaN or infinity")
    if gram is None:
        return
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a Gram matrix of the shape {gram.shape} for inputs of {weight.shape[1]}")
    if not np.isfinite(gram).all():
        raise ValueError("a Gram matrix with NaN or infinity")
