"""Engines on a real GPU: built, loaded, run, against ONNX Runtime on the CPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.benchmarking import bench
from graphopt.engines import build_engine
from graphopt.engines.backends import find_backend
from graphopt.engines.loading import import_library
from graphopt.engines.running import EngineRunner
from graphopt.errors import BadInput, MissingDependency
from graphopt.gpu.driver import find_driver
from graphopt.runtime import load
from tests.models.text import model_from_text

pytestmark = pytest.mark.gpu

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8] x) => (float[batch, 4] y) <float[8, 4] w> { h = MatMul (x, w) y = Relu (h) }
"""


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        import_library(find_backend(request.param))
    except MissingDependency as error:
        pytest.skip(str(error))
    find_driver()  # run by `make gpu` only
    return str(request.param)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(model_from_text(MODEL), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def engine(backend: str, model: Path, tmp_path: Path) -> Path:
    built = build_engine(model, tmp_path / "m.engine", backend=backend, shapes=["x=1x8/2x8/4x8"])
    assert built.gpu is not None
    return built.path


def rows(count: int) -> dict[str, Any]:
    return {"x": np.random.default_rng(count).standard_normal((count, 8)).astype(np.float32)}


def test_an_engine_gives_what_the_model_gives(engine: Path, model: Path) -> None:
    reference = load(model)
    with EngineRunner(engine) as runner:
        for count in (1, 2, 2, 2, 4, 1, 1, 1):  # captured and replayed on the way
            feeds = rows(count)
            found = runner.run(feeds)["y"]
            np.testing.assert_allclose(found, reference.run(feeds)["y"], rtol=2e-2, atol=2e-2)
        assert runner.graphs_refused is None
        with pytest.raises(BadInput, match="the engine takes 1x8 to 4x8, not 5x8"):
            runner.run(rows(5))


def test_torch_tensors_go_in_and_come_out(engine: Path, model: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    reference = load(model)
    with EngineRunner(engine) as runner:
        for count in (2, 2, 2, 2):
            feeds = rows(count)
            y = torch.from_dlpack(runner.run({"x": torch.from_numpy(feeds["x"]).cuda()})["y"])
            np.testing.assert_allclose((y + 0).cpu().numpy(), reference.run(feeds)["y"], rtol=2e-2, atol=2e-2)
        del y
        gc.collect()


def test_it_can_be_timed(engine: Path, model: Path) -> None:
    result = bench([model, engine], seconds=0.3, device="cpu")
    timed = result.models[1].gpu
    assert timed is not None and timed.compute_ms.p50 > 0
    assert timed.latency_ms.p50 >= timed.compute_ms.p50
    assert result.models[1].max_abs_difference < 2e-2 * max(result.models[1].max_abs_output, 1)
