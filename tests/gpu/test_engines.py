"""Engines on a real GPU. Run by `make gpu`; elsewhere these are left out, not passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphopt.engines import build_engine
from graphopt.engines.worker import find_gpu
from tests.models.text import model_from_text

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8] x) => (float[batch, 4] y) <float[8, 4] w> { h = MatMul (x, w) y = Relu (h) }
"""


@pytest.mark.gpu
def test_an_engine_loads_on_the_gpu(tmp_path: Path) -> None:
    """What was built without looking at the GPU is accepted by the runtime that has one."""
    assert find_gpu() is not None, "run by `make gpu` only"
    trt: Any = pytest.importorskip("tensorrt_rtx_bindings")
    source = tmp_path / "m.onnx"
    import onnx_ir as ir

    ir.save(model_from_text(MODEL), source)
    result = build_engine(source, tmp_path / "m.engine", backend="tensorrt-rtx", shapes=["x=1x8/2x8/4x8"])
    assert result.gpu is not None
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine((tmp_path / "m.engine").read_bytes())
    assert engine is not None
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["x", "y"]
