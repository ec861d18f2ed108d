"""Samples for the kernel kit's matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from graphopt.kernels.gemm import half_gemm, int8_gemm
from graphopt.kernels.kernel import Kernel
from graphopt.kernels.sample import Sample, draw, off_of_sum, rounding

# Rows, columns, length of the sums: one of each; no multiples; whole tiles; longer than all stages.
_SMALL = ((1, 1, 1), (17, 70, 24))
_SIZES = (*_SMALL, (33, 70, 130), (64, 128, 256), (129, 257, 1000), (300, 520, 4096))


@dataclass(frozen=True)
class Group:
    """Kernels that compute the same, by tactic, with the samples they share."""

    name: str
    dtype: str
    kernels: Mapping[int, Kernel]
    samples: list[Sample]


def groups(*, small: bool = False) -> Iterator[Group]:
    """Every dtype."""
    sizes = _SMALL if small else _SIZES
    for dtype in ("float16", "bfloat16"):
        yield Group("half_gemm", dtype, half_gemm(dtype), [_half(dtype, *size) for size in sizes])
    for out in ("float16", "bfloat16", "float32"):
        yield Group("int8_gemm", f"int8 to {out}", int8_gemm(out), [_int8(out, *size) for size in sizes])


def _half(dtype: str, rows: int, columns: int, length: int) -> Sample:
    rng = np.random.default_rng([rows, columns, length])
    x, weight, bias = (draw(rng, shape, dtype) for shape in ((rows, length), (columns, length), (columns,)))
    wide = [array.astype(np.float64) for array in (x, weight, bias)]
    magnitude = np.abs(wide[0]) @ np.abs(wide[1]).T + np.abs(wide[2])
    return Sample(
        label=f"{rows} x {columns} x {length}",
        inputs=(x, weight, bias),
        dtypes=(dtype,),
        wanted=(wide[0] @ wide[1].T + wide[2],),
        off=(off_of_sum(magnitude, length + 1, dtype),),
    )


def _int8(out: str, rows: int, columns: int, length: int) -> Sample:
    rng = np.random.default_rng([rows, columns, length])
    x, weight = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((rows, length), (columns, length)))
    scales = [rng.uniform(0.001, 0.01, size).astype(np.float32) for size in (rows, columns)]
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T * scales[0][:, None] * scales[1].astype(np.float64)
    unit, smallest = rounding(out)
    # The sums are exact; they become float32, are multiplied twice, and rounded.
    off = np.abs(wanted) * (unit + 4 * 2.0**-24) + smallest
    return Sample(f"{rows} x {columns} x {length}", (x, weight, *scales), (out,), (wanted,), (off,))
