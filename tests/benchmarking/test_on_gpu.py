"""Timing on a GPU, on the stand-in driver: what is measured where, and that the same numbers come out.

The figures themselves mean nothing here. ONNX Runtime's CUDA provider and torch's CUDA are played by their CPU builds,
put into the stand-in's streams.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.benchmarking import bench, on_gpu, timing
from graphopt.benchmarking.device import DeviceCall
from graphopt.benchmarking.on_gpu import OnnxCudaRunner, _flat, _numpy_name
from graphopt.cli.main import main
from graphopt.cli.output import to_plain
from graphopt.engines import loading
from graphopt.engines.backends import BACKENDS
from graphopt.engines.running import EngineRunner
from graphopt.errors import BadInput, MissingDependency
from graphopt.gpu.driver import find_driver
from tests.engines import fake_runtime
from tests.engines.test_running import DOUBLE
from tests.gpu_driver.standin import StandIn, standing_in
from tests.gpu_driver.torch_cuda import TorchOnTheStandIn

ADD = '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 4] x) => (float[n, 4] y) { y = Add(x, x) }'
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(loading, "find_backend", lambda name: BACKENDS[name])
    monkeypatch.setattr(loading, "import_library", lambda backend: fake_runtime.module(rtx=backend.name != "tensorrt"))
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.005)
    with standing_in(tmp_path, monkeypatch) as made:
        yield made
        gc.collect()
        assert made.complaints == []


class CudaSession:
    """A session of ONNX Runtime's CUDA provider: the CPU's, run when the stream comes to it."""

    def __init__(self, path: str, sess_options: Any, providers: list[Any]) -> None:
        import onnxruntime as ort

        (name, options), fallback = providers
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        self.stream = int(options["user_compute_stream"])
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._kept: list[Any] = []

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self._session)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        settings = "disable_synchronize_execution_providers"
        assert options.get_run_config_entry(settings) == "1"
        function = _HOST_FUNCTION(lambda _: self._session.run_with_iobinding(binding.real))
        self._kept.append(function)
        cuda = ctypes.CDLL(os.environ["GRAPHOPT_LIBCUDA"])
        assert cuda.cuLaunchHostFunc(ctypes.c_void_p(self.stream), function, None) == 0


class Binding:
    def __init__(self, session: Any) -> None:
        self.real = session.io_binding()

    def bind_input(self, name: str, device: str, index: int, kind: Any, shape: list[int], address: int) -> None:
        assert device == "cuda" and address
        self.real.bind_input(name, "cpu", index, kind, shape, address)

    def bind_output(self, name: str, device: str, index: int, *rest: Any) -> None:
        assert device == "cuda"
        self.real.bind_output(name, "cpu", index, *rest)

    def clear_binding_outputs(self) -> None:
        self.real.clear_binding_outputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()


@pytest.fixture
def cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    class Played:
        __version__, SessionOptions, RunOptions = ort.__version__, ort.SessionOptions, ort.RunOptions
        InferenceSession = CudaSession

        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(on_gpu, "import_onnxruntime", lambda: Played)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return fake_runtime.write_engine(tmp_path / "m.engine", **DOUBLE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(ADD), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_a_call_brings_the_inputs_up_and_the_outputs_down(driver: StandIn, engine: Path) -> None:
    with EngineRunner(engine) as runner:
        given = np.arange(8, dtype=np.float32).reshape(2, 4)
        call = DeviceCall(runner.program({"x": given}), {"x": given})
        for _ in range(3):
            call()
        np.testing.assert_array_equal(call.results()["y"], 2 * given)
        assert len(call.times) == 3
        for part in (call.times.enqueue, call.times.upload, call.times.compute, call.times.download):
            assert len(part) == 3 and min(part) >= 0
        assert call.pipelined(4) > 0 and len(call.times) == 3


def test_onnx_runtime_on_cuda_uses_our_stream_and_memory(driver: StandIn, cuda_provider: None, model: Path) -> None:
    runner = OnnxCudaRunner(model)
    assert runner.library.startswith("onnxruntime 1.") and runner.library.endswith(", CUDA")
    for rows in (1, 3):
        given = np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)
        np.testing.assert_array_equal(runner.run({"x": given})["y"], 2 * given)
    with pytest.raises(BadInput, match="the dtype differs"):
        runner.program({"x": np.ones((1, 4))})


def test_without_a_cuda_provider(driver: StandIn, model: Path) -> None:
    with pytest.raises(MissingDependency, match="this onnxruntime has no CUDA provider"):
        bench([model], device="cuda", seconds=0.01)


def test_an_engine_against_onnx_runtime(driver: StandIn, cuda_provider: None, model: Path, engine: Path) -> None:
    result = bench([model, engine], seconds=0.05)
    first, second = result.models
    assert first.gpu is not None and second.gpu is not None
    assert second.max_abs_difference == 0 and second.max_abs_output > 0
    assert second.gpu.library == "TensorRT 10.13.3.9" and second.gpu.cuda_graph and not first.gpu.cuda_graph
    assert second.gpu.compute_speedup is not None and first.peak_bytes is None
    assert result.gpu == "Stand-in GPU, driver for CUDA 12.8"
    assert result.timed_on == {"x": "float32[2, 4]"}  # the shape that the engine is to be fastest at
    assert result.environment["TensorRT"] == "10.13.3.9"
    assert json.dumps(to_plain(result), allow_nan=False)


def test_an_engine_against_the_cpu(driver: StandIn, model: Path, engine: Path) -> None:
    result = bench([model, engine], seconds=0.05, device="cpu")
    assert result.models[0].gpu is None and result.models[0].peak_bytes
    assert result.models[1].gpu is not None and result.models[1].gpu.compute_speedup is None


def test_engines_alone(driver: StandIn, engine: Path, tmp_path: Path) -> None:
    other = fake_runtime.write_engine(tmp_path / "other.engine", magic="vtrt", **DOUBLE)
    result = bench([engine, other], seconds=0.05, shapes={"x": (3, 4)})
    assert result.timed_on == {"x": "float32[3, 4]"} and result.models[1].max_abs_difference == 0
    assert "onnxruntime" not in result.environment


def test_the_table(
    driver: StandIn, cuda_provider: None, model: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model), str(engine), "--seconds", "0.05", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    for part in ("on the GPU, ms", "latency", "H2D", "compute", "D2H", "enqueue", "compute speedup"):
        assert part in text
    assert "m.engine: TensorRT 10.13.3.9, replayed from a CUDA graph" in text
    assert "GPU: Stand-in GPU, driver for CUDA 12.8." in text


def test_without_a_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", "libcuda-of-nowhere.so")
    assert main(["bench", str(engine)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: no GPU") and captured.err.count("\n") == 1


FACTORY = """
import torch

class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.two = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.two

def double():
    return Double(), {"x": torch.ones(2, 4)}, {"x": {0: "n"}}
"""


def test_torch_beside_an_engine(driver: StandIn, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    TorchOnTheStandIn(monkeypatch)
    (tmp_path / "nets.py").write_text(FACTORY)
    runner = on_gpu.TorchRunner(f"{tmp_path}/nets.py:double")
    assert [(item.name, item.shape) for item in runner.inputs] == [("x", ("n", 4))]
    assert runner.parameter_bytes == 4
    runner.names = ["y"]
    program = runner.program({"x": np.full((2, 4), 3, np.float32)})
    program.enqueue()
    np.testing.assert_array_equal(program.outputs["y"].numpy(), np.full((2, 4), 6))
    with pytest.raises(BadInput, match="input 'x': no value was given"):
        runner.program({})


def test_an_engine_onnx_runtime_and_torch_in_one_run(
    driver: StandIn, cuda_provider: None, model: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All on the GPU's clock, with intervals, percentiles and the differences of their outputs."""
    pytest.importorskip("torch")
    TorchOnTheStandIn(monkeypatch)
    (tmp_path / "nets.py").write_text(FACTORY)
    result = bench([model, engine], torch=[f"{tmp_path}/nets.py:double"], seconds=0.1)
    libraries = [one.gpu.library.split()[0] for one in result.models if one.gpu is not None]
    assert libraries == ["onnxruntime", "TensorRT", "torch"]
    for one in result.models:
        assert one.gpu is not None and one.gpu.compute_speedup is not None
        assert one.max_abs_difference == 0 and one.max_abs_output > 0 and one.calls_per_second > 0
        for ratio in (one.speedup, one.gpu.compute_speedup):
            assert 0 < ratio.low <= ratio.value <= ratio.high
        gpu = one.gpu
        parts = (gpu.latency_ms, gpu.compute_ms, gpu.upload_ms, gpu.download_ms, gpu.enqueue_ms, one.wall_ms)
        for part in parts:
            assert 0 <= part.p50 <= part.p90 <= part.p95 <= part.p99
    assert result.models[2].file_bytes == 4


def test_torch_without_cuda(driver: StandIn, engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "nets.py").write_text(FACTORY)
    with pytest.raises(MissingDependency, match="has no CUDA"):
        bench([engine], torch=[f"{tmp_path}/nets.py:double"])


def test_outputs_of_modules() -> None:
    torch = pytest.importorskip("torch")
    one, two = torch.ones(1), torch.zeros(1)
    assert _flat({"a": one, "b": [two, None, (one,)]}) == [one, two, one]
    assert [_numpy_name(kind) for kind in (torch.float, torch.half, torch.long, torch.bfloat16)] == [
        "float32",
        "float16",
        "int64",
        "bfloat16",
    ]


def test_the_stand_in_takes_only_its_own_streams(driver: StandIn) -> None:
    """A guard on these tests: work for a stream that is none fails."""
    context = find_driver().open()
    cuda = ctypes.CDLL(os.environ["GRAPHOPT_LIBCUDA"])
    assert cuda.cuLaunchHostFunc(ctypes.c_void_p(12345678), None, None) != 0
    driver.log.unlink()
    context.close()
