"""The programs behind `make gpu`, rehearsed on the stand-in driver. Times mean nothing here, and are not kept."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_kernels, gpu_pivot
from benchmarks.cublas import Cublas, CublasLt, Product
from benchmarks.gpu_pivot import Case, Contender, Row, find_libraries, interval, measure, measurements, write_measured
from benchmarks.torch_products import Torch
from graphopt.benchmarking import on_gpu
from graphopt.engines.plugins.measured import load_measurements
from graphopt.errors import GraphoptError, MissingDependency
from graphopt.gpu import arrays
from graphopt.gpu.context import Context
from graphopt.gpu.driver import find_driver
from graphopt.kernels.compile import find_nvrtc
from graphopt.kernels.emulate import find_compiler
from graphopt.selftesting import EngineResult, SelftestReport
from tests.gpu_driver.standin import StandIn, standing_in
from tests.gpu_driver.torch_cuda import TorchOnTheStandIn

needs_kernels = pytest.mark.skipif(
    find_nvrtc("nvidia-cuda-nvrtc-cu12") is None or find_compiler() is None, reason="no NVRTC or no C++ compiler"
)
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(tmp_path, monkeypatch) as made:
        made.compile_kernels()
        yield made
        gc.collect()
        assert made.complaints == []


@pytest.fixture
def one_tactic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a kernel takes seconds."""
    every = gpu_pivot.kernels_for
    monkeypatch.setattr(gpu_pivot, "kernels_for", lambda form, dtype: {1: every(form, dtype)[1]})


@pytest.fixture
def context(driver: StandIn) -> Context:
    return find_driver().open()


class ColumnMajor:
    """cublasGemmEx and cublasLtMatmul as their documentation defines them: C = op(A) op(B), column by column."""

    def __init__(self) -> None:
        self.stream: int | None = None
        self.layouts: dict[int, tuple[int, int, int]] = {}
        self.operations: dict[int, dict[int, int]] = {}
        self._kept: list[Any] = []

    # cuBLAS
    def cublasCreate_v2(self, handle: Any) -> int:
        handle._obj.value = 77
        return 0

    def cublasSetStream_v2(self, handle: Any, stream: Any) -> int:
        self.stream = stream.value
        return 0

    def cublasSetWorkspace_v2(self, handle: Any, memory: Any, size: Any) -> int:
        return 0 if memory.value and size.value else 7

    def cublasGemmEx(self, handle: Any, ta: Any, tb: Any, m: Any, n: Any, k: Any, *rest: Any) -> int:
        alpha, a, akind, lda, b, bkind, ldb, beta, c, ckind, ldc, compute, algorithm = rest
        assert handle.value == 77 and (ta.value, tb.value) == (1, 0)
        assert (akind.value, bkind.value, ckind.value, compute.value, algorithm.value) == (0, 0, 0, 68, -1)
        assert (alpha._obj.value, beta._obj.value) == (1, 0)
        assert self.stream is not None
        sizes = (m.value, n.value, k.value)
        self._enqueue(sizes, (a.value, lda.value), (b.value, ldb.value), (c.value, ldc.value), self.stream)
        return 0

    # cuBLASLt
    def cublasLtCreate(self, handle: Any) -> int:
        handle._obj.value = 78
        return 0

    def _new(self, target: Any) -> int:
        target._obj.value = 1000 + len(self.layouts) + len(self.operations)
        return int(target._obj.value)

    def cublasLtMatmulDescCreate(self, target: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (68, 0)
        self.operations[self._new(target)] = {}
        return 0

    def cublasLtMatmulDescSetAttribute(self, target: Any, which: Any, value: Any, size: Any) -> int:
        assert size.value == 4
        self.operations[target.value][which.value] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, target: Any, kind: Any, rows: Any, columns: Any, ld: Any) -> int:
        assert kind.value == 0 and ld.value >= rows.value
        self.layouts[self._new(target)] = (rows.value, columns.value, ld.value)
        return 0

    def cublasLtMatmulPreferenceCreate(self, target: Any) -> int:
        target._obj.value = 5
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, target: Any, which: Any, value: Any, size: Any) -> int:
        return 0 if (which.value, size.value) == (1, 8) else 7

    def cublasLtMatmulAlgoGetHeuristic(self, handle: Any, *rest: Any) -> int:
        *_, wanted, found, count = rest
        count._obj.value = 2
        found[1].state = 3  # not for this shape
        return 0 if wanted.value == 8 else 7

    def cublasLtMatmul(
        self, handle: Any, operation: Any, alpha: Any, a: Any, la: Any, b: Any, lb: Any, *rest: Any
    ) -> int:
        _, c, lc, d, ld, heuristic, _, _, stream = rest
        assert self.operations[operation.value] == {3: 1, 4: 0} and (c.value, lc.value) == (d.value, ld.value)
        (k, m, lda), (k2, n, ldb), (m2, n2, ldc) = (self.layouts[one.value] for one in (la, lb, ld))
        assert (k, m, n) == (k2, m2, n2) and heuristic._obj.state == 0
        self._enqueue((m, n, k), (a.value, lda), (b.value, ldb), (d.value, ldc), stream.value)
        return 0

    def _enqueue(self, sizes: tuple[int, int, int], a: Any, b: Any, c: Any, stream: int) -> None:
        m, n, k = sizes

        def work(_: Any) -> None:
            one, other, result = (
                _columns(*pair, rows, count) for pair, rows, count in ((a, k, m), (b, k, n), (c, m, n))
            )
            result[...] = one.T @ other

        function = _HOST_FUNCTION(work)
        self._kept.append(function)
        cuda = ctypes.CDLL(os.environ["GRAPHOPT_LIBCUDA"])
        assert cuda.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None) == 0


def _columns(address: int, leading: int, rows: int, columns: int) -> np.ndarray:
    """A matrix that is stored column by column: element (i, j) at i + j * leading."""
    count = leading * (columns - 1) + rows
    raw = (ctypes.c_float * count).from_address(address)
    flat = np.frombuffer(raw, np.float32)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (4, 4 * leading))


@pytest.fixture
def torch_there(monkeypatch: pytest.MonkeyPatch) -> TorchOnTheStandIn:
    pytest.importorskip("torch")
    return TorchOnTheStandIn(monkeypatch)


def library_of(kind: Any, context: Context, stream: Any, request: pytest.FixtureRequest) -> Any:
    if kind is Torch:
        request.getfixturevalue("torch_there")
        return Torch(context, stream)
    return kind(context, stream, ColumnMajor())


@pytest.mark.parametrize("kind", [Cublas, CublasLt, Torch])
def test_products_in_each_librarys_words(context: Context, kind: Any, request: pytest.FixtureRequest) -> None:
    """x Wᵀ into some columns of y, from some columns of x."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 9)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)
    on_gpu = [arrays.upload(context, array) for array in (x, weight, np.zeros((3, 7), np.float32))]
    stream = context.stream()
    library = library_of(kind, context, stream, request)
    product = Product("float32", 3, 4, 5, on_gpu[0].pointer + 2 * 4, on_gpu[1].pointer, on_gpu[2].pointer + 3 * 4, 9, 7)
    call = library.prepare(product)
    call()
    stream.synchronize()
    y = on_gpu[2].numpy()
    np.testing.assert_allclose(y[:, 3:], x[:, 2:7] @ weight.T, rtol=1e-6)
    assert not y[:, :3].any()


@pytest.fixture
def no_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cublas._candidates", lambda name: ["libcublas-of-nowhere.so"])


def test_what_is_not_installed_is_told(
    context: Context, no_cublas: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: None)
    assert find_libraries(context, context.stream()) == []
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    said = " ".join(out.split())
    assert "left out: cublas is not installed" in said and "left out: cublasLt is not installed" in said
    assert "left out: torch is not installed" in said


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("cpu", "has no CUDA"),
        ("no start", "is built for CUDA 12.8, which does not start here"),
        ("other GPU", "failed: CUDA error: no kernel image is available"),
    ],
)
def test_a_torch_that_does_not_run_is_told(
    context: Context,
    no_cublas: None,
    torch_there: TorchOnTheStandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: str,
    says: str,
) -> None:
    import torch

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nSearch for it.")

    changes: dict[str, tuple[Any, str, Any]] = {
        "cpu": (torch.version, "cuda", None),
        "no start": (torch.cuda, "is_available", lambda: False),
        "other GPU": (torch, "mm", fail),
    }
    monkeypatch.setattr(*changes[state])
    assert find_libraries(context, context.stream()) == []
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: torch {torch.__version__} {says}" in said and "Search" not in said


def test_a_torch_that_runs(
    context: Context, no_cublas: None, torch_there: TorchOnTheStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    (found,) = find_libraries(context, context.stream())
    assert found.title == f"torch {torch.__version__}" and "torch" not in capsys.readouterr().out


@needs_kernels
@pytest.mark.parametrize("form", ["row", "column"])
def test_a_shape_is_measured(context: Context, one_tactic: None, torch_there: TorchOnTheStandIn, form: Any) -> None:
    stream = context.stream()
    libraries = [Cublas(context, stream, ColumnMajor()), Torch(context, stream)]
    before = torch_there.products
    row = measure(context, stream, Case(form, "float32", 2, 16), libraries, rounds=3, copies=2)
    torch_title = libraries[1].title
    assert [one.name for one in row.contenders] == [
        "tactic 1",
        "two products, cuBLAS",
        "dense, cuBLAS",
        f"two products, {torch_title}",
        f"dense, {torch_title}",
    ]
    assert all(len(one.microseconds) == 3 for one in row.contenders)
    off = [one.worst for one in row.contenders]
    assert off[2] is None and off[4] is None
    assert all(off[index] is not None and off[index] <= 1 for index in (0, 1, 3))
    # Once to warm up, and the rest replayed from the graph: to compare (not the dense one), to warm up, and 3 rounds.
    assert torch_there.products - before == 2 * 2 * (1 + 1 + 1 + 3) + 2 * (1 + 1 + 3)
    plain = row.to_json()
    assert json.dumps(plain, default=vars)
    assert set(plain["contenders"]) == {one.name for one in row.contenders}
    fastest = min(float(np.median(one.microseconds)) for one in row.contenders if one.name.startswith("two products"))
    assert plain["speedup"]["two products"].value > 0
    assert row.best("two products").microseconds and np.median(row.best("two products").microseconds) == fastest  # type: ignore[union-attr]


class Idle:
    """A library that computes nothing."""

    title = "nothing"

    def prepare(self, product: Product) -> Any:
        return lambda: None


@needs_kernels
def test_products_that_are_not_computed_are_found(context: Context, one_tactic: None) -> None:
    """The right numbers stood there before: our own kernel's, and another library's."""
    stream = context.stream()
    case = Case("row", "float32", 2, 16)
    row = measure(context, stream, case, [Cublas(context, stream, ColumnMajor()), Idle()], rounds=2, copies=2)
    assert [one.name for one in row.contenders if one.wrong] == ["two products, nothing"]
    best = row.best("two products")
    assert best is not None and best.name == "two products, cuBLAS"


@needs_kernels
@pytest.mark.parametrize("kind", [Cublas, Torch])
def test_two_products_are_the_pivot_form_without_its_permutation(
    context: Context, kind: Any, request: pytest.FixtureRequest
) -> None:
    """The other side does the same work: with rows in pivot order and no bias its y is the form's."""
    stream = context.stream()
    case = Case("row", "float32", 3, 12)
    drawn = gpu_pivot.sample("row", "float32", (3,), (12, 6, 12))
    x, kept, coefficients = (arrays.upload(context, array) for array in drawn.inputs[:3])
    y, inner = arrays.allocate(context, (3, 12), np.float32), arrays.allocate(context, (3, 6), np.float32)
    library = library_of(kind, context, stream, request)
    for call in gpu_pivot._two_products(library, case, x, [(kept, coefficients)], y, inner):
        call()
    stream.synchronize()
    positions, bias = drawn.inputs[4], drawn.inputs[3]
    wanted = (drawn.wanted[0] - bias)[:, positions]
    np.testing.assert_allclose(y.numpy(), wanted, atol=1e-4)
    np.testing.assert_allclose(gpu_pivot._products_of(case, drawn).wanted[0], wanted, atol=1e-12)


@pytest.mark.parametrize("form", ["row", "column"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_may_be_off_by_their_rounding(form: Any, dtype: str) -> None:
    """Each product rounded to the dtype is right; with one channel of the sum left out it is wrong."""
    case = Case(form, dtype, 4, 64)
    drawn = gpu_pivot.sample(form, dtype, (4,), (64, 32, 64))
    products = gpu_pivot._products_of(case, drawn)
    x, kept, coefficients = drawn.inputs[:3]
    kind = x.dtype

    def two(x: Any) -> Any:
        wide = [array.astype(np.float32) for array in (x, kept, coefficients)]
        if form == "row":
            first = (wide[0] @ wide[1].T).astype(kind)
            return np.concatenate([first, (first.astype(np.float32) @ wide[2].T).astype(kind)], axis=1)
        first = (wide[0][:, 32:] @ wide[2].T).astype(kind)
        return (first.astype(np.float32) @ wide[1].T).astype(kind)

    assert products.worst([two(x)]) <= 1
    less = x.copy()
    less[:, 40] = 0
    assert products.worst([two(less)]) > 1


@needs_kernels
def test_a_rehearsal_writes_nothing(
    driver: StandIn, one_tactic: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a rehearsal wrote a result")

    monkeypatch.setattr(gpu_pivot, "write_result", refuse)
    monkeypatch.setattr(gpu_pivot, "write_measured", refuse)
    monkeypatch.setattr(gpu_pivot, "cases", lambda *, quick: [Case("row", "float32", 1, 16)])
    monkeypatch.setattr(gpu_pivot, "find_libraries", lambda context, stream: [])
    monkeypatch.setattr(gpu_pivot, "measure", partial(measure, rounds=2, copies=2))
    gpu_pivot.run()
    out = capsys.readouterr().out
    assert "nothing was written: this was no measurement" in out
    assert max(map(len, out.splitlines())) <= 100


def finished(rows: int, plugin: float, other: float, worst: float = 0.5, torch: tuple[float, float] = (99, 0.5)) -> Row:
    made = [
        Contender(name, None, None, off, [time] * 5)  # type: ignore[arg-type]
        for name, time, off in (
            ("tactic 1", 2 * plugin, worst),
            ("tactic 3", plugin, worst),
            ("two products, cuBLAS", other, 0.5),
            ("dense, cuBLAS", 2 * other, None),
            ("two products, cuBLASLt", 1.5 * other, 0.5),
            ("dense, cuBLASLt", 3 * other, None),
            ("two products, torch 2.13.0", torch[0], torch[1]),
            ("dense, torch 2.13.0", 99, None),
        )
    ]
    return Row(Case("row", "float16", rows, 4096), 4, made)


def test_what_is_measured_decides_about_plugins(tmp_path: Path) -> None:
    found = measurements(
        [finished(1, 10, 13), finished(16, 20, 15), finished(256, 9, 99, worst=2)], "GPU X", "CUDA 12.8"
    )
    assert [(one["rows"], one["tactic"], one["library"]) for one in found] == [
        (1, 3, "cuBLAS, CUDA 12.8"),
        (16, 3, "cuBLAS, CUDA 12.8"),
    ]  # wrong results are no measurement
    path = tmp_path / "measured.json"
    old = {**found[0], "gpu": "GPU Y"}
    path.write_text(json.dumps({"format": 1, "note": "", "measurements": [old, {**found[0], "rows": 7}]}))
    write_measured(found, path)
    read = load_measurements(path)
    assert [(one.gpu, one.rows) for one in read.measurements] == [("GPU Y", 1), ("GPU X", 1), ("GPU X", 16)]
    sizes = {"inputs": 4096, "outputs": 4096, "rank": 2048}
    ask: dict[str, Any] = {"gpu": "GPU X", "variant": "row", "dtype": "float16", "sizes": sizes}
    assert read.why_not(rows=(1, 1), **ask) is None
    assert "at 16 rows it takes 20 µs, the products 15 µs" in str(read.why_not(rows=(1, 16), **ask))


def test_the_fastest_library_is_what_counts() -> None:
    """torch where it is fastest; not with wrong results."""
    rows = [finished(1, 10, 13, torch=(12, 0.5)), finished(16, 10, 13, torch=(12, 7))]
    first, second = measurements(rows, "GPU X", "CUDA 12.8")
    assert (first["library"], first["other"]["median"]) == ("torch 2.13.0, CUDA 12.8", 12)
    assert (second["library"], second["other"]["median"]) == ("cuBLAS, CUDA 12.8", 13)
    assert [row.to_json()["speedup"]["two products"].value for row in rows] == pytest.approx([1.2, 1.3])
    nothing_right = finished(1, 10, 13, torch=(12, 7))
    nothing_right.contenders[2].worst = nothing_right.contenders[4].worst = 2
    assert measurements([nothing_right], "GPU X", "CUDA 12.8") == []


def test_the_table_has_every_row_and_says_where_the_goal_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_pivot.show([finished(1, 10, 13), finished(16, 20, 15), finished(4096, 20, 10)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    assert "d 4096, 1 rows: 20 % faster than two products: yes (1.30 (1.30-1.30))" in text
    assert "d 4096, 16 rows: 20 % faster than two products: no (0.75 (0.75-0.75))" in text
    assert "4096 4096 tactic 3 20.0 10.0 20.0 0.50 (0.50-0.50) 1.00 (1.00-1.00) 0.50" in text
    assert "4096 1 cuBLASLt 19.5 39.0 1.95 (1.95-1.95) 3.90 (3.90-3.90) 0.50" in text  # losses too, each for itself
    assert text.count("torch 2.13.0 99.0 99.0") == 3


def test_intervals() -> None:
    found = interval([3, 1, 2, 2, 2, 5, 2])
    assert found["low"] <= found["median"] == 2 <= found["high"]


def test_all_shapes_of_the_issue_are_there() -> None:
    row = {
        (case.width, case.rows)
        for case in gpu_pivot.cases(quick=False)
        if (case.form, case.dtype) == ("row", "float16")
    }
    assert row == {(width, rows) for width in (4096, 8192) for rows in (1, 16, 256, 4096)}


# -- make gpu ----------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", "libcuda-of-nowhere.so")
    assert gpu.main() == 2
    assert "nothing was run" in capsys.readouterr().out
    assert gpu_kernels.main() == 2
    assert capsys.readouterr().err.startswith("error: no GPU")


REPORT = SelftestReport("GPU X", (8, 9), 24, (12, 8))


@pytest.fixture
def rehearsed(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All parts of `make gpu` in place, none of them run; what was written."""
    written: list[Any] = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""))
    monkeypatch.setattr(gpu, "selftest", lambda: REPORT)
    monkeypatch.setattr(gpu, "sanitize", lambda: {"memcheck": "clean"})
    monkeypatch.setattr(gpu.gpu_pivot, "run", lambda: [finished(1, 10, 13)])
    monkeypatch.setattr(gpu, "write_result", lambda name, result: written.append((name, result)))
    return written


def test_a_rehearsal_of_all_of_it(rehearsed: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main() == 0
    assert rehearsed == [] and "nothing was written" in capsys.readouterr().out


def test_what_is_written(rehearsed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.gpu_pivot, "is_rehearsal", lambda: False)
    assert gpu.main() == 0
    ((name, result),) = rehearsed
    assert name == "gpu" and result["gpu"] == "Stand-in GPU" and result["tests"] == 0
    assert result["sanitizer"] == {"memcheck": "clean"} and result["rtx_engines_run_here"].startswith("not found out")


@pytest.mark.parametrize("part", ["tests", "sanitizer", "numbers", "timing"])
def test_what_goes_wrong_is_an_exit_code(rehearsed: list[Any], monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def stop() -> list[Row]:
        raise GraphoptError("out of memory")

    changes: dict[str, tuple[Any, str, Any]] = {
        "tests": (gpu.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1)),
        "sanitizer": (gpu, "sanitize", lambda: {"memcheck": "2 errors: Invalid read"}),
        "numbers": (gpu.gpu_pivot, "run", lambda: [finished(1, 10, 13, worst=3)]),
        "timing": (gpu.gpu_pivot, "run", stop),
    }
    monkeypatch.setattr(*changes[part])
    assert gpu.main() == 1


def test_whether_rtx_runs_is_told() -> None:
    def report(*states: str) -> SelftestReport:
        engines = [
            EngineResult("p", "TensorRT-RTX 1.7", "row", None, 0.5, 1, None, state, "not this GPU")  # type: ignore[arg-type]
            for state in states
        ]
        return SelftestReport("GPU X", (9, 0), 80, (12, 8), engines=engines)

    assert gpu.summary(report())["rtx_engines_run_here"].startswith("not found out")
    assert gpu.summary(report("ok", "ok"))["rtx_engines_run_here"] == "yes: 2 engines gave the right numbers"
    assert gpu.summary(report("ok", "failed"))["rtx_engines_run_here"] == "no: row: not this GPU"


@pytest.mark.parametrize(
    ("said", "code", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "clean"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "clean"),
        (
            "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors",
            9,
            "2 errors: Invalid __global__ read of size 4 bytes",
        ),
        ("Segmentation fault", 139, "exit code 139, and no summary"),
        ("========= ERROR SUMMARY: 0 errors", 1, "exit code 1"),
    ],
)
def test_what_the_sanitizer_says(said: str, code: int, found: str) -> None:
    assert gpu.read_sanitizer(said, code) == found


def test_every_tool_of_the_sanitizer_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program of that name that notes how it was called, and finds something with one tool."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$2" in
racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
initcheck) echo "========= Uninitialized __global__ memory read"; echo "========= ERROR SUMMARY: 3 errors"; exit 9;;
*) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = gpu.sanitize()
    assert {tool: found[tool] for tool in ("memcheck", "racecheck", "synccheck")} == dict.fromkeys(
        ("memcheck", "racecheck", "synccheck"), "clean"
    )
    assert found["initcheck"] == "3 errors: Uninitialized __global__ memory read"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == list(gpu.TOOLS)
    assert all(call.endswith("-m benchmarks.gpu_kernels") and "--error-exitcode 9" in call for call in calls)


def test_without_a_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitize() == {"all": gpu.NOT_THERE}


def test_missing_libraries_are_told() -> None:
    with pytest.raises(MissingDependency, match="no-such-library is not installed"):
        from benchmarks.cublas import find

        find("no-such-library")
