"""Inputs for kernels with what they have to give, and how far that may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.kernels.emulate import emulate
from graphopt.kernels.kernel import Kernel

Array = npt.NDArray[Any]
Values = Literal["whole", "real"]

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    for name in ("float16", "bfloat16", "float32", "int8", "int32")
}


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        inputs: In the order of the kernel's parameters.
        wanted: The outputs, exactly (float64).
        off: How far from that each element may be, before it is rounded to the output's dtype; the same shapes.
        dtypes: Of the outputs.
    """

    inputs: Sequence[Array]
    wanted: Sequence[Array]
    off: Sequence[Array]
    dtypes: Sequence[np.dtype[Any]]


def draw(rng: np.random.Generator, shape: Sequence[int], dtype: str, values: Values, largest: int = 2) -> Array:
    """Random elements: small whole numbers, whose sums every dtype holds exactly, or of a normal distribution."""
    if values == "whole":
        return rng.integers(-largest, largest + 1, shape).astype(DTYPES[dtype])
    return rng.normal(size=shape).astype(DTYPES[dtype])


def wide(array: Array) -> Array:
    """In float64: exact."""
    return array.astype(np.float64)


def half_gemm_case(dtype: str, M: int, N: int, K: int, values: Values, seed: int) -> Case:
    """y = x Wᵀ + bias. Whole numbers: of K at most 255 the result is exact, also in bfloat16."""
    rng = np.random.default_rng([seed, M, N, K])
    x = draw(rng, (M, K), dtype, values, 1)
    weight = draw(rng, (N, K), dtype, values, 1)
    bias = draw(rng, (N,), dtype, values, 1)
    wanted = wide(x) @ wide(weight).T + wide(bias)
    off = np.zeros_like(wanted)
    if values == "real":
        # Each of the K additions in float32 rounds, and tensor cores may cut off instead.
        off = (K + 1) * 2.0**-23 * (np.abs(wide(x)) @ np.abs(wide(weight)).T + np.abs(wide(bias)))
    return Case([x, weight, bias], [wanted], [off], [DTYPES[dtype]])


def int8_gemm_case(out: str, M: int, N: int, K: int, values: Values, seed: int) -> Case:
    """y = (x Wᵀ) · x_scale · weight_scale. Whole: powers of two as scales, so that float32 has every bit of the sum."""
    rng = np.random.default_rng([seed, M, N, K])
    largest = 127 if out == "float32" or values == "real" else 2
    x = rng.integers(-largest - 1, largest + 1, (M, K)).astype(np.int8)
    weight = rng.integers(-largest - 1, largest + 1, (N, K)).astype(np.int8)
    if values == "whole":
        x_scale, weight_scale = (2.0 ** rng.integers(-2, 2, size) for size in (M, N))
    else:
        x_scale, weight_scale = (rng.uniform(0.001, 0.01, size) for size in (M, N))
    x_scale, weight_scale = x_scale.astype(np.float32), weight_scale.astype(np.float32)
    wanted = (wide(x) @ wide(weight).T) * wide(x_scale)[:, None] * wide(weight_scale)
    off = np.zeros_like(wanted) if values == "whole" else 3 * 2.0**-24 * np.abs(wanted)
    return Case([x, weight, x_scale, weight_scale], [wanted], [off], [DTYPES[out]])


def run(kernel: Kernel, case: Case, seed: int = 0) -> list[Array]:
    """The outputs, emulated."""
    shapes = [(wanted.shape, dtype.name) for wanted, dtype in zip(case.wanted, case.dtypes, strict=True)]
    return emulate(kernel, case.inputs, shapes, seed=seed)


def differences(case: Case, outputs: Sequence[Array]) -> list[str]:
    """Where outputs are further off than they may be, in words; none where all is well."""
    told = []
    for index, (wanted, off, output) in enumerate(zip(case.wanted, case.off, outputs, strict=True)):
        low, high = (wide((wanted + sign * off).astype(output.dtype)) for sign in (-1, 1))
        wrong = ~((low <= wide(output)) & (wide(output) <= high))
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            told.append(
                f"output {index}: {int(wrong.sum())} of {wrong.size} are wrong, "
                f"at {place} {float(output[place])!r} for {float(wanted[place])!r}"
            )
    return told


def pivot_case(form: str, dtype: str, rows: int, n: int, r: int, m: int, seed: int) -> Case:
    """PivotLinear on whole numbers, few of them other than zero: also what is between the two products is exact.

    The inputs of graphopt_pivot_rows or graphopt_pivot_columns. By the seed, channels are in a random order, or (column
    form) those that are no pivots are side by side, in front of the pivots or behind them, or only begin as if.
    """
    from graphopt.plugins.pivot_linear.reference import row_form

    rng = np.random.default_rng([seed, rows, n, r, m])

    def sparse(*shape: int) -> Array:
        # Of r = 40 or fewer products each: no sum is beyond what bfloat16 counts to.
        kept = rng.random(shape) < 0.3
        return (rng.integers(-2, 3, shape) * kept).astype(DTYPES[dtype])

    x = draw(rng, (rows, n), dtype, "whole", 1)
    bias = draw(rng, (m,), dtype, "whole", 4)
    if form == "row":
        kept, coefficients, order = sparse(r, n), sparse(m - r, r), rng.permutation(m)
        inner = wide(x) @ wide(kept).T
        y = row_form(x, kept, coefficients, order, bias)
    else:
        kept, coefficients, order = sparse(m, r), sparse(r, n - r), rng.permutation(n)
        if seed % 4 == 1:
            order = np.concatenate([n - r + rng.permutation(r), np.arange(n - r)])
        elif seed % 4 == 2:
            order = np.concatenate([rng.permutation(r), np.arange(r, n)])
        elif seed % 4 == 3:
            order = np.concatenate([1 + rng.permutation(r), [0], r + 1 + rng.permutation(n - r - 1)])
        y, inner = column_results(x, kept, coefficients, bias, order)
    assert np.abs(inner).max(initial=0) <= 256
    inputs = [x, kept, coefficients, bias, order.astype(np.int32)]
    return Case(inputs, [y, inner], [np.zeros_like(y), np.zeros_like(inner)], [DTYPES[dtype]] * 2)


def column_results(x: Array, kept: Array, coefficients: Array, bias: Array, positions: Array) -> tuple[Array, Array]:
    """y and inner of the column form, (rows, m) and (rows, r) in float64."""
    from graphopt.plugins.pivot_linear.reference import column_form

    pivots, others = np.split(positions, [kept.shape[1]])
    inner = wide(x)[:, pivots] + wide(x)[:, others] @ wide(coefficients).T
    return column_form(x, kept, coefficients, positions, bias), inner
