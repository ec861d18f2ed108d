"""How much rounding the pivot form of a low-rank weight amplifies, beside two factors and the dense weight.

python -m benchmarks.pivot_error

Random factors whose singular values fall by e^3, weights and results of each product rounded to the type, sums in
float32. The official way is written from its description: QR of W^T with column pivoting, then least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.common import print_table, write_result
from graphopt.numerics.low_rank import balance
from graphopt.numerics.pivot import Pivoted, pivot_columns, pivot_rows

Array = npt.NDArray[Any]

SIZE, RANK, ROWS, SEEDS = 1024, 512, 256, 3
TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def main() -> None:
    """Run, print, record."""
    errors = {name: [_errors(seed, dtype) for seed in range(SEEDS)] for name, dtype in TYPES.items()}
    means = {
        name: {form: float(np.mean([one[form] for one in runs])) for form in runs[0]} for name, runs in errors.items()
    }
    print_table(
        ["form", *((name, "right") for name in TYPES)],
        [[form, *(f"{means[name][form]:.2e}" for name in TYPES)] for form in means["float16"]],
        f"relative L2 error of outputs, {SIZE} x {SIZE}, rank {RANK}, mean of {SEEDS} weights",
    )
    write_result("pivot_error", {"size": SIZE, "rank": RANK, "rows": ROWS, "errors": errors, "means": means})


def _errors(seed: int, dtype: np.dtype[Any]) -> dict[str, float]:
    """The relative error of each form for one weight."""
    random = np.random.default_rng(seed)
    left = random.standard_normal((SIZE, RANK)) * np.exp(-3 * np.arange(RANK) / RANK)
    right = random.standard_normal((RANK, SIZE)) / SIZE
    x = random.standard_normal((ROWS, SIZE)).astype(dtype).astype(np.float64)
    wanted = x @ (left @ right).T
    factors = balance(left, right)

    def product(values: Array, weight: Array) -> Array:
        rounded = weight.astype(dtype).astype(np.float32)
        return (values.astype(np.float32) @ rounded.T).astype(dtype).astype(np.float64)

    def by_rows(form: Pivoted) -> Array:
        kept = product(x, form.kept)
        y = np.empty_like(wanted)
        y[:, form.order] = np.concatenate([kept, product(kept, form.coefficients)], axis=1)
        return y

    def by_columns(form: Pivoted) -> Array:
        moved = x[:, form.order]
        count = len(form.kept)
        summed = (moved[:, :count] + product(moved[:, count:], form.coefficients.T)).astype(dtype).astype(np.float64)
        return product(summed, form.kept.T)

    padded = RANK + 16
    forms: dict[str, Callable[[], Array]] = {
        "dense": lambda: product(x, left @ right),
        "two factors": lambda: product(product(x, factors.right), factors.left),
        "pivots, official way": lambda: by_rows(_official(left, right)),
        "pivot rows": lambda: by_rows(pivot_rows(left, right, dtype=dtype)),
        f"pivot rows, {padded} of them": lambda: by_rows(pivot_rows(left, right, count=padded, dtype=dtype)),
        "pivot columns": lambda: by_columns(pivot_columns(left, right, dtype=dtype)),
    }
    return {name: float(np.linalg.norm(form() - wanted) / np.linalg.norm(wanted)) for name, form in forms.items()}


def _official(left: Array, right: Array) -> Pivoted:
    """Pivots by QR of W^T, coefficients by least squares on the unrounded pivots, both in float32."""
    from scipy.linalg import lstsq, qr

    weight = (left @ right).astype(np.float32)
    pivots = np.sort(qr(weight.T, mode="r", pivoting=True)[1][:RANK])
    others = np.delete(np.arange(SIZE), pivots)
    coefficients = lstsq(weight[pivots].T, weight[others].T)[0].T
    return Pivoted(np.concatenate([pivots, others]), weight[pivots], coefficients)


if __name__ == "__main__":
    main()
