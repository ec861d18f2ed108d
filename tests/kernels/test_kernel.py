"""What a kernel is made of; and one that uses every primitive of the kit, compiled for each GPU and emulated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from graphopt.errors import MissingDependency
from graphopt.kernels.compile import PINNED_ISA, CompilerName, compile_ptx
from graphopt.kernels.emulate import emulate, find_compiler
from graphopt.kernels.kernel import ARCHITECTURES, Kernel, Launch, Parameter, Shape, ceil_div

INSTRUCTIONS = [
    "cp.async.cg.shared.global",
    "cp.async.commit_group",
    "cp.async.wait_group 1",
    "cp.async.wait_group 0",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    "shfl.sync.bfly.b32",
    "bar.sync",
    "bar.warp.sync",
    "ld.global.cg.u16",
    "ld.global.cg.u32",
    "ld.global.cg.v4.u32",
    "prefetch.global.L2",
    "atom.acq_rel.gpu.global.add.u32",
    "atom.relaxed.gpu.global.add.u32",
    "atom.acq_rel.gpu.global.cas.b32",
    "atom.acq_rel.gpu.global.cas.b64",
    "ld.acquire.gpu.global.u32",
    "ld.acquire.gpu.global.u64",
    "st.release.gpu.global.u32",
    "st.release.gpu.global.u64",
    "fence.acq_rel.gpu",
    "nanosleep.u32",
    "cvt.f32.f16",
    "cvt.rn.f16.f32",
    "cvt.rn.bf16.f32",
    "cvt.rni.sat.s8.f32",
]


class Symbol:
    """A size with the arithmetic that TensorRT's symbolic sizes have, and no more."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: int) -> Symbol:
        return Symbol(f"({self.text} + {other})")

    def __floordiv__(self, other: int) -> Symbol:
        return Symbol(f"({self.text} // {other})")


def every_primitive() -> Kernel:
    def launch(shapes: Sequence[Shape]) -> Launch:
        return Launch((1, 1, 1), (shapes[1][0],))

    return Kernel(
        name="every_primitive",
        source=Path(__file__).parent / "sources" / "every_primitive.cu",
        parameters=(
            Parameter("x", "input", "float16"),
            Parameter("z", "input", "bfloat16"),
            Parameter("q", "input", "int8"),
            Parameter("n", "scalar", "int32"),
            Parameter("y", "output", "float16"),
            Parameter("sums", "output", "float32"),
            Parameter("counts", "output", "int32"),
        ),
        threads=128,
        launch=launch,
        shared=2048,
        # The kit uses no names that kernels have their macros set to.
        defines=(("T", "half"), ("M", "3"), ("N", "5"), ("K", "7"), ("WARPS", "4"), ("TYPE", "float")),
    )


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (130, 64, 3)])
def test_ceil_div(a: int, b: int, expected: int) -> None:
    assert ceil_div(a, b) == expected


def test_ceil_div_of_a_symbolic_size() -> None:
    assert ceil_div(Symbol("rows"), 64).text == "((rows + 63) // 64)"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compiler", ["nvrtc", "nvrtc-13", "nvcc"])
def test_every_primitive_compiles(architecture: str, compiler: CompilerName) -> None:
    try:
        ptx = compile_ptx(every_primitive(), architecture, compiler=compiler)
    except MissingDependency as error:
        pytest.skip(str(error))
    missing = [name for name in INSTRUCTIONS if name not in ptx.text]
    # From sm_90 on bfloat16 has conversions of its own, and the compiler may spell others anew.
    assert not [name for name in missing if not name.startswith("cvt")], missing
    assert ".entry every_primitive(" in ptx.text
    if compiler == "nvrtc":
        assert ptx.isa <= PINNED_ISA


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler to emulate kernels with")
def test_every_primitive_runs_emulated_alike_whatever_the_schedule() -> None:
    n = 128
    inputs = [np.linspace(-1, 1, 512).astype(np.float16), np.ones(n, ml_dtypes.bfloat16), np.ones(2048, np.int8)]
    outputs = [((n,), "float16"), ((n,), "float32"), ((n,), "int32")]
    first, *others = (emulate(every_primitive(), inputs, outputs, seed=seed) for seed in range(4))
    assert np.isfinite(first[0]).all() and np.isfinite(first[1]).all() and first[0].any()
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
