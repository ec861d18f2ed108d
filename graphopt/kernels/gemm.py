"""Matrix products on the tensor cores, y = x Wᵀ: float16 and bfloat16 with a bias, int8 with scales.

They are the kit's proof, and a beginning for ops that multiply by more than a weight as it is; for a plain product
TensorRT has its own. In the emulator they are right for every size; how fast they are is known only where a GPU is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from graphopt.kernels.kernel import Kernel, Launch, Parameter, Shape, Size, ceil_div

C_TYPES = {"float16": "half", "bfloat16": "bfloat16", "float32": "float", "int8": "int8"}
_FOLDER = Path(__file__).parent / "cuda"


class Tiling(NamedTuple):
    """How the work is cut: a block's tile of y, its steps along K (in chunks of 16 bytes), its warps, its pipeline."""

    tile_m: int
    tile_n: int
    chunks: int
    warps_m: int
    warps_n: int
    stages: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return (self.tile_m + self.tile_n) * self.chunks * 16 * self.stages


TILINGS: Mapping[int, Tiling] = {
    1: Tiling(64, 64, 4, 2, 2, 4),
    2: Tiling(128, 128, 4, 2, 4, 3),  # many rows: each value loaded is used most often
    3: Tiling(16, 64, 8, 1, 2, 4),  # few rows
    4: Tiling(64, 128, 8, 2, 4, 2),
}


def half_gemm(dtype: str) -> Mapping[int, Kernel]:
    """y = x Wᵀ + bias, summed in float32 and rounded once.

    Kernel inputs: x (..., K), W (N, K), bias (N,), all of ``dtype``. Output: y (..., N) of ``dtype``.

    Args:
        dtype: ``float16`` or ``bfloat16``.

    Returns:
        The kernels by tactic.
    """
    parameters = (
        Parameter("x", "input", dtype),
        Parameter("weight", "input", dtype),
        Parameter("bias", "input", dtype),
        *_SIZES,
        Parameter("y", "output", dtype),
    )
    return _kernels("graphopt_gemm_half", "half_gemm.cu", parameters, ("REAL", C_TYPES[dtype]))


def int8_gemm(out: str) -> Mapping[int, Kernel]:
    """y = (x Wᵀ) · x_scale · weight_scale, with exact int32 sums for K < 131072.

    Kernel inputs: x (..., K) and W (N, K) int8, x_scale (...) with one value for each row of x, and weight_scale (N,),
    both float32. Output: y (..., N) of dtype ``out``.

    Args:
        out: ``float16``, ``bfloat16`` or ``float32``.

    Returns:
        The kernels by tactic.
    """
    parameters = (
        Parameter("x", "input", "int8"),
        Parameter("weight", "input", "int8"),
        Parameter("x_scale", "input", "float32"),
        Parameter("weight_scale", "input", "float32"),
        *_SIZES,
        Parameter("y", "output", out),
    )
    return _kernels("graphopt_gemm_int8", "int8_gemm.cu", parameters, ("OUT", C_TYPES[out]))


def kernels() -> Sequence[Kernel]:
    """All of them: every dtype, every tactic."""
    groups = [*map(half_gemm, ("float16", "bfloat16")), *map(int8_gemm, ("float16", "float32"))]
    return [kernel for group in groups for kernel in group.values()]


_SIZES = tuple(Parameter(name, "scalar", "int32") for name in ("M", "N", "K"))


def _kernels(name: str, source: str, parameters: tuple[Parameter, ...], dtype: tuple[str, str]) -> Mapping[int, Kernel]:
    return {
        tactic: Kernel(
            name=name,
            source=_FOLDER / source,
            parameters=parameters,
            threads=tiling.threads,
            launch=partial(_launch, tiling),
            defines=(dtype, *((field.upper(), str(value)) for field, value in tiling._asdict().items())),
        )
        for tactic, tiling in TILINGS.items()
    }


def _launch(tiling: Tiling, shapes: Sequence[Shape]) -> Launch:
    x, weight = shapes[0], shapes[1]
    rows: Size = math.prod(x[1:-1], start=x[0]) if len(x) > 1 else 1
    grid = ceil_div(rows, tiling.tile_m), ceil_div(weight[0], tiling.tile_n), 1
    return Launch(grid, (rows, weight[0], weight[1]))
