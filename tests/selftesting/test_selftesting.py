"""The self-test on the stand-in driver: kernels in the emulator, engines on a fake library. No GPU was asked."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.benchmarking import timing
from graphopt.cli.main import main
from graphopt.engines import loading
from graphopt.engines.backends import BACKENDS
from graphopt.engines.plugins import Plugin, find_plugins
from graphopt.errors import MissingDependency
from graphopt.gpu.driver import find_driver
from graphopt.kernels.compile import find_nvrtc
from graphopt.kernels.emulate import find_compiler
from graphopt.kernels.gemm import half_gemm
from graphopt.kernels.sample import Sample
from graphopt.plugins.pivot_linear.samples import example, sample, samples
from graphopt.selftesting import engines, kernels, machine, products, run, selftest
from graphopt.selftesting.report import Finding, KernelResult, SelftestReport
from tests.engines import fake_runtime
from tests.gpu_driver.standin import StandIn, standing_in

pytestmark = [
    pytest.mark.skipif(find_nvrtc("nvidia-cuda-nvrtc-cu12") is None, reason="NVRTC is not installed"),
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(tmp_path, monkeypatch) as made:
        made.compile_kernels()
        yield made
        gc.collect()


@pytest.fixture
def few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tactic of one product: the machinery, not the kernels, is what is tested here."""
    one = next(iter(products.groups(small=True)))
    kept = products.Group(one.name, one.dtype, {1: one.kernels[1]}, one.samples)
    monkeypatch.setattr(products, "groups", lambda *, small: iter([kept]))
    monkeypatch.setattr(kernels, "find_plugins", dict)


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise MissingDependency(f"{BACKENDS[name].title} is not installed")

    monkeypatch.setattr(machine, "find_backend", absent)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", "libcuda-of-nowhere.so")
    assert main(["selftest"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: no GPU: NVIDIA's driver (libcuda-of-nowhere.so) is not installed"
        " (nvidia-smi shows whether there is one)\n"
    )


def test_a_machine_where_all_is_well(
    driver: StandIn, few_kernels: None, no_libraries: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", "--small", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    assert "Stand-in GPU: compute capability 8.9, 1.1 GB; the driver is for CUDA 12.8" in text
    assert "graphopt_gemm_half float16 1 2" in text
    assert "All is well: 2 launches and 0 engines gave the right numbers; 2 skipped." in text
    assert "No engine was built: no TensorRT that runs here is installed." in text
    assert driver.complaints == []


def test_json(driver: StandIn, few_kernels: None, no_libraries: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["gpu"] == "Stand-in GPU" and found["kernels"][0]["status"] == "ok"
    assert found["kernels"][0]["launches"] == 2 and found["kernels"][0]["worst"] <= 1
    assert {one["what"]: one["status"] for one in found["findings"]} == {
        "PTX": "ok",
        "kernels": "ok",
        "NVRTC": "ok",
        "TensorRT": "skipped",
        "TensorRT-RTX": "skipped",
    }


def test_a_driver_that_is_too_old_is_told(
    driver: StandIn, few_kernels: None, no_libraries: None, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.play(version=12040, isa=804)
    assert main(["selftest", "--small"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "install a driver for CUDA 12.8 or newer (570 on Linux)" in text
    assert "the driver is too old: this PTX is of ISA 8.7, and the driver (CUDA 12.4) takes up to 8.4" in text
    assert "2 of 6 checks did not pass" in text


def test_a_gpu_that_is_too_old_is_told(driver: StandIn, few_kernels: None, no_libraries: None) -> None:
    driver.play(capability=75)
    report = selftest(small=True)
    assert not report.ok
    assert report.kernels[0].detail == "Stand-in GPU has compute capability 7.5; the kernels need 8.0 or newer"


def test_wrong_numbers_are_found(driver: StandIn) -> None:
    """What the launch gives is compared: with another expectation, it is wrong."""
    group = next(iter(products.groups(small=True)))
    good = group.samples[1]
    shifted = Sample(good.label, good.inputs, good.dtypes, [good.wanted[0] + 0.1], good.off)
    context = find_driver().open()
    found = kernels.run_kernel(context, "kit", "float16", 3, group.kernels[3], [good, shifted])
    assert found.status == "wrong" and found.launches == 2
    assert found.worst is not None and found.worst > 1 and "17 x 70 x 24: off by" in found.detail


def test_what_is_not_written_is_found() -> None:
    good = next(iter(products.groups(small=True))).samples[1]
    assert good.worst([np.full(good.wanted[0].shape, np.nan, np.float16)]) == float("inf")
    assert good.worst([good.wanted[0].astype(np.float16)]) <= 1


def test_a_kernel_that_breaks_down_is_told(driver: StandIn) -> None:
    kernel = half_gemm("float16")[3]
    good = next(iter(products.groups(small=True))).samples[1]
    short = Sample("short", (good.inputs[0], good.inputs[1], good.inputs[2][:3]), good.dtypes, good.wanted, good.off)
    found = kernels.run_kernel(find_driver().open(), "kit", "float16", 3, kernel, [short])
    assert found.status == "failed" and found.detail.startswith("short: the GPU's driver: ")
    assert "CUDA_ERROR_LAUNCH_FAILED" in found.detail


@pytest.mark.slow
def test_every_kernel(driver: StandIn, no_libraries: None) -> None:
    """All dtypes and tactics, from PTX to comparison."""
    report = selftest(small=True)
    assert report.ok and driver.complaints == []
    assert {one.plugin for one in report.kernels} >= {"kit", "PivotLinear"}
    assert all(one.launches >= 2 for one in report.kernels)


def test_one_pivot_kernel(driver: StandIn) -> None:
    from graphopt.plugins.pivot_linear.kernels import kernels_for

    made = [sample("row", "float16", (3,), (24, 5, 13)), sample("row", "float16", (0,), (24, 5, 13))]
    found = kernels.run_kernel(
        find_driver().open(), "PivotLinear", "float16", 1, kernels_for("row", "float16")[1], made
    )
    assert found.status == "ok", found.detail
    assert found.launches == 2 and driver.complaints == []


@pytest.mark.parametrize("form", ["row", "column"])
def test_samples_say_what_the_example_computes(form: Any) -> None:
    """The model of the engines, run by ONNX Runtime, is within what the sample allows."""
    ort = pytest.importorskip("onnxruntime")
    made = example("float32", form, small=True)
    session = ort.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": made.sample.inputs[0]})
    assert np.max(np.abs(y - made.sample.wanted[0]) / made.sample.off[0]) <= 1


def test_samples_cover_both_forms_and_ragged_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.plugins.pivot_linear.samples._LARGE", ())
    found = list(samples(["float16"]))
    assert {int(one.attributes["form"][0]) for one in found} == {0, 1}
    assert {one.inputs[0].ndim for one in found} == {1, 2, 3}
    assert any(one.inputs[0].size == 0 for one in found)


# -- engines -----------------------------------------------------------------------------------------------------------


def with_types(*wanted: str) -> Plugin:
    """PivotLinear for fewer types: each costs two engines and their timing."""
    plugin = find_plugins()["PivotLinear"]
    return replace(plugin, types=tuple(types for types in plugin.types if types[0] in wanted))


class Library:
    """Stands in for building: what it writes the fake runtime runs, by the example's own definition."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        wrong: float = 0.0,
        layers: int = 1,
        types: Sequence[str] = ("float16",),
    ) -> None:
        self.wrong, self.layers = wrong, layers
        self.asked: list[tuple[str, str]] = []
        monkeypatch.setattr(engines, "build_engine", self.build)
        monkeypatch.setattr(engines, "find_plugins", lambda: {"PivotLinear": with_types(*types)})
        monkeypatch.setattr(run, "_SECONDS", 0.02)
        monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.005)
        monkeypatch.setattr(loading, "find_backend", lambda name: BACKENDS[name])
        monkeypatch.setattr(
            loading, "import_library", lambda backend: fake_runtime.module(rtx=backend.name != "tensorrt")
        )
        monkeypatch.setattr(machine, "find_backend", lambda name: BACKENDS[name])
        monkeypatch.setattr(machine, "import_library", lambda b: fake_runtime.module(rtx=b.name != "tensorrt"))
        monkeypatch.setattr(machine, "cuda_generation", lambda name: 12)

    def build(self, model: Path, out: Path, *, backend: str, plugins: str) -> Any:
        import onnx
        import onnxruntime as ort

        self.asked.append((backend, plugins))
        proto = onnx.load(model)
        kind = {1: "FLOAT", 10: "HALF", 16: "BF16"}[proto.graph.input[0].type.tensor_type.elem_type]
        shapes = [
            [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (proto.graph.input[0], proto.graph.output[0])
        ]
        if kind == "BF16":
            raise MissingDependency("not in this test")
        session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])

        def compute(x: np.ndarray) -> Sequence[np.ndarray]:
            (y,) = session.run(None, {"x": x})
            return [y + y.dtype.type(self.wrong if plugins == "always" else 0)]

        name = f"{out}"
        fake_runtime.FUNCTIONS[name] = compute
        magic = "ftrt" if backend == "tensorrt" else "vtrt"
        fake_runtime.write_engine(out, name, {"x": (kind, shapes[0])}, {"y": (kind, shapes[1])}, magic=magic)

        class Layer:
            plugin = plugins == "always" and self.layers > 0

        class Built:
            class inspection:
                layers = (Layer,)

        return Built


def run_engines(backend: str, form_and_dtype: str) -> Any:
    found = engines.run_all(backend, "10.13.3.9", small=True, seconds=0.02, say=lambda what: None)
    return next(one for one in found if one.case == form_and_dtype)


def test_engines_with_and_without_the_plugin(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    found = run_engines("tensorrt", "row, float16")
    assert (found.status, found.layers, found.detail) == ("ok", 1, "")
    assert found.worst <= 1 and found.compute_ms is not None and found.speedup.low <= found.speedup.high
    assert library.asked == [("tensorrt", "never"), ("tensorrt", "always")]
    assert driver.complaints == []


def test_rtx_runs_what_the_plugin_means(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    found = run_engines("tensorrt-rtx", "row, float16")
    assert (found.status, found.layers, found.speedup) == ("ok", None, None)
    assert library.asked == [("tensorrt-rtx", "never")]


def test_a_wrong_engine_is_found(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch, wrong=1.0)
    found = run_engines("tensorrt", "row, float16")
    assert found.status == "wrong" and "times what is allowed" in found.detail


def test_an_engine_without_the_plugin_is_told(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch, layers=0)
    found = run_engines("tensorrt", "row, float16")
    assert (found.status, found.detail) == ("failed", "the engine was built without the plugin")


def test_a_build_that_fails_is_a_row(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch, types=("bfloat16",))
    found = list(engines.run_all("tensorrt", "10.13", small=True, seconds=0.02, say=lambda what: None))
    failed = [one for one in found if one.status == "failed"]
    assert [one.case for one in failed] == ["row, bfloat16", "column, bfloat16"]
    assert failed[0].detail == "not in this test"


def test_all_of_it(
    driver: StandIn, few_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Library(monkeypatch)
    assert main(["selftest", "--small"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    for part in ("TensorRT 10.13.3.9", "TensorRT-RTX 1.7.1.116", "row, float16", "speedup (95 %)"):
        assert part in text
    assert "All is well: 2 launches and 4 engines gave the right numbers." in text


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_library_for_a_newer_cuda_is_explained(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch)
    monkeypatch.setattr(machine, "cuda_generation", lambda name: 13)
    found = machine.look_at_library("tensorrt", find_driver())
    assert found == Finding(
        "TensorRT",
        "failed",
        "10.13.3.9 is built for CUDA 13, and the driver is for CUDA 12.8: install a driver for CUDA 13 (580 or newer)",
    )


def test_a_version_that_builds_no_plugins_is_told(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch)
    monkeypatch.setattr(machine, "import_library", lambda b: fake_runtime.module(version="10.14.1.48"))
    found = machine.look_at_library("tensorrt", find_driver())
    assert found.status == "warning" and "10.14.1.48: TensorRT 10.14.1.48 cannot build plugins" in found.detail


def test_what_a_wheel_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def __init__(self, name: str) -> None:
            self.name = name

    names = ("tensorrt_rtx_cu13_libs", "tensorrt-cu12-bindings", "tensorrt_lean_cu12_libs", "numpy")
    monkeypatch.setattr(machine.importlib.metadata, "distributions", lambda: map(Distribution, names))
    assert (machine.cuda_generation("tensorrt"), machine.cuda_generation("tensorrt-rtx")) == (12, 13)


def test_skipped_is_not_wrong_and_not_passed() -> None:
    report = SelftestReport(
        "G", (8, 9), 1, (12, 8), kernels=[KernelResult("p", "k", "d", 1, 0, None, None, None, "skipped")]
    )
    assert report.ok and report.states == ["skipped"]
