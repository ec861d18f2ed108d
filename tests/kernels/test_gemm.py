"""The matrix products, emulated, against numpy in float64: every dtype and tactic, sizes that fit no tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphopt.kernels.catalogue import all_kernels, describe
from graphopt.kernels.emulate import EmulationError, emulate, find_compiler
from graphopt.kernels.gemm import TILINGS, half_gemm, int8_gemm
from graphopt.kernels.kernel import SHARED_LIMIT, Kernel
from tests.kernels.common import Case, Values, differences, draw, half_gemm_case, int8_gemm_case, run

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler to emulate kernels with")

Make = Callable[[str, int, int, int, Values, int], Case]
GROUPS: dict[str, tuple[Mapping[int, Kernel], Make, str]] = {
    **{dtype: (half_gemm(dtype), half_gemm_case, dtype) for dtype in ("float16", "bfloat16")},
    **{f"int8 to {out}": (int8_gemm(out), int8_gemm_case, out) for out in ("float16", "bfloat16", "float32")},
}
KERNELS = [(name, tactic) for name, (kernels, _, _) in GROUPS.items() for tactic in kernels]

# (M, N, K): K of whole 16 bytes in both, in int8 alone, in neither; fewer, as many, and more steps than stages.
SAMPLE = ((1, 1, 1), (33, 70, 16), (65, 17, 129), (17, 129, 240))
ROWS = (1, 2, 15, 16, 17, 63, 64, 65, 129)
COLUMNS = (1, 7, 8, 64, 66, 129)
SUMS = (1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 128, 136, 200, 255)


def launch(name: str, tactic: int, sizes: tuple[int, int, int], values: Values, seed: int) -> list[str]:
    kernels, make, dtype = GROUPS[name]
    case = make(dtype, *sizes, values, seed)
    return differences(case, run(kernels[tactic], case, seed))


@pytest.mark.parametrize(("name", "tactic"), KERNELS)
def test_a_sample_of_sizes(name: str, tactic: int) -> None:
    for seed, sizes in enumerate(SAMPLE):
        assert launch(name, tactic, sizes, "whole", seed) == [], sizes
    assert launch(name, tactic, (20, 24, 1000), "real", 5) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tactic"), KERNELS)
def test_all_sizes(name: str, tactic: int) -> None:
    for seed, sizes in enumerate(itertools.product(ROWS, COLUMNS, SUMS)):
        assert launch(name, tactic, sizes, "whole", seed) == [], sizes
    for seed, sizes in enumerate([(1, 1, 1), (65, 63, 33), (129, 65, 1000), (3, 200, 4096)]):
        for values, again in itertools.product(("whole", "real"), range(3)):
            if values == "real" or sizes[2] <= 255:
                assert launch(name, tactic, sizes, values, seed + 10 * again) == [], (sizes, values)


@pytest.mark.parametrize("name", GROUPS)
def test_any_schedule_gives_the_same_bits(name: str) -> None:
    kernels, make, dtype = GROUPS[name]
    case = make(dtype, 70, 67, 150, "real", 1)
    first = run(kernels[1], case, 0)
    for seed in range(1, 6):
        assert run(kernels[1], case, seed)[0].tobytes() == first[0].tobytes()


def test_tactics_differ_in_time_alone() -> None:
    """The order of additions may differ; sums of whole numbers have only one value."""
    case = half_gemm_case("float16", 50, 60, 255, "whole", 0)
    (first, *others) = (run(kernel, case)[0] for kernel in half_gemm("float16").values())
    assert len(others) >= 2
    assert all(np.array_equal(first, other) for other in others)


def test_leading_axes_are_rows() -> None:
    case = half_gemm_case("float16", 12, 10, 24, "whole", 0)
    x, weight, bias = case.inputs
    for shape in ((12, 24), (3, 4, 24), (3, 2, 2, 24)):
        (y,) = emulate(half_gemm("float16")[1], [x.reshape(shape), weight, bias], [((*shape[:-1], 10), "float16")])
        assert differences(case, [y.reshape(12, 10)]) == []
    (y,) = emulate(half_gemm("float16")[1], [x[0], weight, bias], [((10,), "float16")])
    assert np.array_equal(y, case.wanted[0][0])


class Symbol:
    """A size as TensorRT has it at build time: only ``symbol op number`` and ``symbol op symbol`` work."""

    def __init__(self, value: int) -> None:
        self.value = value

    def _with(self, other: object, operation: Callable[[int, int], int]) -> Symbol:
        return Symbol(operation(self.value, other.value if isinstance(other, Symbol) else int(other)))  # type: ignore[call-overload]

    def __add__(self, other: object) -> Symbol:
        return self._with(other, int.__add__)

    def __sub__(self, other: object) -> Symbol:
        return self._with(other, int.__sub__)

    def __mul__(self, other: object) -> Symbol:
        return self._with(other, int.__mul__)

    def __floordiv__(self, other: object) -> Symbol:
        return self._with(other, int.__floordiv__)


@pytest.mark.parametrize("shape", [(130, 40), (13, 10, 40), (1, 40)])
def test_the_launch_of_symbolic_sizes(shape: tuple[int, ...]) -> None:
    for kernel in [*half_gemm("float16").values(), *int8_gemm("float32").values()]:
        numbers = kernel.launch([shape, (70, 40)])
        symbols = kernel.launch([[Symbol(size) for size in shape], [Symbol(70), Symbol(40)]])
        values = [
            [size.value if isinstance(size, Symbol) else size for size in part]
            for part in (symbols.grid, symbols.scalars)
        ]
        assert values == [list(numbers.grid), list(numbers.scalars)]


def test_tilings() -> None:
    assert len(TILINGS) >= 3
    for tiling in TILINGS.values():
        assert tiling.shared <= SHARED_LIMIT
        assert tiling.threads <= 1024


def test_all_kernels_are_found_and_told_apart() -> None:
    found = all_kernels()
    names = [describe(kernel) for kernel in found]
    assert len(set(names)) == len(names)
    assert {kernel.name for kernel in found} >= {"graphopt_gemm_half", "graphopt_gemm_int8", "graphopt_pivot_rows"}


def test_extremes_of_int8() -> None:
    """-128 times -128, summed: the largest sum, and what ends up as infinite in float16."""
    x, weight = np.full((3, 1000), -128, np.int8), np.full((5, 1000), -128, np.int8)
    scales = [np.ones(size, np.float32) for size in (3, 5)]
    (y,) = emulate(int8_gemm("float32")[1], [x, weight, *scales], [((3, 5), "float32")])
    assert (y == 128 * 128 * 1000).all()
    (y,) = emulate(int8_gemm("float16")[1], [x, weight, *scales], [((3, 5), "float16")])
    assert np.isinf(y).all()


def test_infinities_and_nan_stay_in_their_row_and_column() -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (draw(rng, shape, "float16", "whole") for shape in ((20, 40), (10, 40), (10,)))
    x[3, 17], weight[7, 2] = np.inf, np.nan
    (y,) = emulate(half_gemm("float16")[1], [x, weight, bias], [((20, 10), "float16")])
    with np.errstate(invalid="ignore"):
        wanted = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    assert np.array_equal(y, wanted.astype(np.float16), equal_nan=True)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("row < M && column < N", "row < M"),
        ("sum + to_float(bias[column])", "sum"),
        ("y[u64(row) * N + column]", "y[u64(row) * N + column / 2 * 2]"),
    ],
)
def test_a_wrong_kernel_is_seen(right: str, wrong: str, tmp_path: Path) -> None:
    kernel = half_gemm("float16")[1]
    text = kernel.source.read_text()
    assert right in text
    changed = tmp_path / "half_gemm.cu"
    changed.write_text(text.replace(right, wrong))
    case = half_gemm_case("float16", 20, 30, 40, "whole", 0)
    try:
        assert differences(case, run(replace(kernel, source=changed), case))
    except EmulationError:
        return
