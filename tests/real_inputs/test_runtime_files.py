"""Files that ONNX Runtime's own tools wrote: quantised ones (QDQ, dynamic) and offline-optimised ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.models import RUNNABLE, draw_feeds
from tests.real_inputs.common import ops, optimize_and_compare

LEVELS = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def save(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    ir.save(RUNNABLE[name](), path)
    return path


def cases(name: str) -> list[dict[str, np.ndarray]]:
    return [draw_feeds(RUNNABLE[name](), size=size, seed=size) for size in (2, 3, 5)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["transformer_block", "convnet", "if_on_input", "qdq_int8"])
def test_optimised_offline(name: str, level: str, tmp_path: Path) -> None:
    source = save(name, tmp_path)
    path = tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the file fits this machine only
    options.graph_optimization_level = LEVELS[level]
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    domains = {node.domain for node in onnx.load(path).graph.node}
    if level != "basic" and name in ("transformer_block", "qdq_int8"):
        assert "com.microsoft" in domains
    optimize_and_compare(path, cases(name), rtol=2e-2 if name == "qdq_int8" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["convnet", "transformer_block"])
def test_quantised_static(name: str, per_channel: bool, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(cases(name))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    path = tmp_path / "quantised.onnx"
    quantize_static(
        save(name, tmp_path),
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    before = ops(path).count("DequantizeLinear")
    assert before > 3
    # As deployed the runtime computes in int8 and rounds where this rounds in float32: one code of 256 apart.
    optimize_and_compare(path, cases(name), rtol=1e-5, deployed_rtol=5e-2)
    assert ops(tmp_path / "quantised.opt.onnx").count("QuantizeLinear") > 0


@pytest.mark.slow
def test_quantised_dynamic(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = tmp_path / "quantised.onnx"
    quantize_dynamic(save("transformer_block", tmp_path), path)
    assert "MatMulInteger" in ops(path)
    # A rounding difference before a quantiser can move a value by one code.
    optimize_and_compare(path, cases("transformer_block"), rtol=2e-2)
    assert "MatMulInteger" in ops(tmp_path / "quantised.opt.onnx")
