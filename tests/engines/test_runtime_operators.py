"""A model made for ONNX Runtime is refused with the way out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.engines import build_engine
from graphopt.errors import GraphoptError

if importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("TensorRT-RTX is not installed", allow_module_level=True)

IN_THE_GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[2, 3] x) => (float[2, 3] y) { [n] y = com.microsoft.QuickGelu(x) }
"""
IN_A_FUNCTION = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "own" : 1]>
g (float[2, 3] x) => (float[2, 3] y) { y = own.Twice(x) }
<domain: "own", opset_import: ["" : 20, "com.microsoft" : 1]>
Twice (a) => (b) { c = com.microsoft.QuickGelu(a) b = Add(c, c) }
"""


@pytest.mark.parametrize("text", [IN_THE_GRAPH, IN_A_FUNCTION])
def test_an_operator_of_onnx_runtime_is_called_that(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(ir.from_onnx_text(text), path)
    with pytest.raises(GraphoptError) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert caught.value.hint is not None
    assert "ONNX Runtime's own" in caught.value.hint
    assert "optimize with --target tensorrt-rtx" in caught.value.hint


def test_other_operators_are_not_called_that(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(ir.from_onnx_text(IN_THE_GRAPH.replace("com.microsoft", "mine")), path)
    with pytest.raises(GraphoptError) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("a custom operator needs a plugin, or a function body of standard operators")
