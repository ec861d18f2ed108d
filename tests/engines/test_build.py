"""Engines: built by the real library where it is installed, and what its failures become."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt.engines.backends as backends
from graphopt.engines import build_engine
from graphopt.errors import BadInput, GraphoptError, MissingDependency

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed",
)


def save(text: str, path: Path, weights: dict[str, np.ndarray] | None = None) -> Path:
    model = ir.from_onnx_text(text)
    for name, array in (weights or {}).items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    ir.save(model, path)
    return path


STATIC = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }
"""
DYNAMIC = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3] x) => (float[batch, 3] y) { y = Relu(x) }
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(STATIC, tmp_path / "model.onnx")


def fake_library(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Make ``--backend tensorrt-rtx`` import this code, which plays a library that goes wrong."""
    (folder / "fake_trt.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(
        backends.BACKENDS, "tensorrt-rtx", backends.Backend("tensorrt-rtx", "FakeRT", ("fake_trt",), "rtx", (1, 0))
    )


LOGGING_LIBRARY = """
import os, signal
__version__ = "1.7"
class ILogger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    def __init__(self): pass
class Builder:
    def __init__(self, logger):
        logger.log(3, "fusing layers")
        logger.log(1, "[x.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)")
        {end}
"""


@pytest.mark.parametrize(
    ("end", "what"),
    [
        (
            "os.abort()",
            "FakeRT crashed (SIGABRT); its last words: info: fusing layers"
            " (a fault of the library; --verbose shows its log)",
        ),
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "FakeRT crashed (SIGSEGV); its last words: info: fusing layers"
            " (a fault of the library; --verbose shows its log)",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "FakeRT crashed (SIGKILL); its last words: info: fusing layers (out of memory?)",
        ),
        ("raise KeyError('plan')", "the FakeRT build stopped with exit code 1: KeyError: 'plan'"),
        ("os._exit(3)", "the FakeRT build stopped with exit code 3: info: fusing layers"),
    ],
)
def test_a_crash_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, what: str
) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end=end))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GraphoptError) as caught:
        build_engine(model, tmp_path / "model.engine", backend="tensorrt-rtx")
    assert str(caught.value) == f"{model}: {what}"
    assert caught.value.exit_code == 1
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_an_engine_that_is_there_survives_a_crash(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"the engine of yesterday")
    with pytest.raises(GraphoptError):
        build_engine(model, engine, backend="tensorrt-rtx")
    assert engine.read_bytes() == b"the engine of yesterday"


def test_the_log_is_handed_on_without_the_search_for_a_gpu(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    lines: list[str] = []
    with pytest.raises(GraphoptError):
        build_engine(model, tmp_path / "e", backend="tensorrt-rtx", on_log=lines.append)
    assert lines == ["info: fusing layers"]


def test_a_library_that_is_too_old(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, "__version__ = '0.9.1'")
    with pytest.raises(GraphoptError) as caught:
        build_engine(model, tmp_path / "e", backend="tensorrt-rtx")
    assert str(caught.value) == f"{model}: FakeRT 0.9.1 is too old (1.0 or newer is needed)"


def test_a_library_that_does_not_load(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, "raise OSError('libfake.so.1: no such file')")
    with pytest.raises(GraphoptError) as caught:
        build_engine(model, tmp_path / "e", backend="tensorrt-rtx")
    assert str(caught.value) == f"{model}: cannot load fake_trt: libfake.so.1: no such file"


def test_a_library_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = backends.Backend("tensorrt", "TensorRT", ("no_such_tensorrt",), "tensorrt", (10, 9))
    monkeypatch.setitem(backends.BACKENDS, "tensorrt", absent)
    with pytest.raises(MissingDependency) as caught:
        build_engine(model, tmp_path / "e", backend="tensorrt")
    assert str(caught.value) == "TensorRT is not installed (in graphopt's folder: pip install '.[tensorrt]')"


def test_bad_arguments(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    cases = [
        ("tensort", tmp_path / "e", "no backend 'tensort' (did you mean 'tensorrt'?)"),
        ("tensorrt-rtx", model, f"{model}: is the model itself (give the engine another name)"),
        ("tensorrt-rtx", tmp_path, f"{tmp_path}: is a folder (give the name of the engine to write)"),
        (
            "tensorrt-rtx",
            tmp_path / "no" / "e",
            f"{tmp_path / 'no' / 'e'}: the folder '{tmp_path / 'no'}' does not exist",
        ),
    ]
    for backend, out, line in cases:
        with pytest.raises(BadInput) as caught:
            build_engine(model, out, backend=backend)
        assert str(caught.value) == line


@needs_rtx
def test_rtx_builds_a_static_model(model: Path, tmp_path: Path) -> None:
    result = build_engine(model, tmp_path / "e", backend="tensorrt-rtx")
    assert result.bytes == (tmp_path / "e").stat().st_size > 0
    assert result.profiles == {}
    assert result.layers == 1
    assert result.status.startswith("built, not run")
    assert not list(tmp_path.glob(".*"))


@needs_rtx
def test_rtx_builds_dynamic_axes_and_external_data(tmp_path: Path) -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((3, 4), np.float32), name="w"))
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 3] x) => (float[batch, 4] y)'
        " <float[3, 4] w = {1,1,1,1,1,1,1,1,1,1,1,1}> { y = MatMul(x, w) }"
    )
    model.graph.initializers["w"].const_value = weight.const_value
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    assert (tmp_path / "model.data").exists()
    result = build_engine(tmp_path / "model.onnx", tmp_path / "e", backend="tensorrt-rtx", shapes=["batch=1/4/8"])
    assert result.profiles["x"].max == (8, 3)


@needs_rtx
def test_functions_are_inlined_before_the_parser_sees_them(tmp_path: Path) -> None:
    # Left to itself the parser takes its built-in Gelu for the function of that name, silently.
    path = save(
        """
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) { y = own.Gelu(x) }
        <domain: "own", opset_import: ["" : 20]>
        Gelu (a) => (b) { c = Neg(a)  d = Neg(c)  b = Neg(d) }
        """,
        tmp_path / "model.onnx",
    )
    result = build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert result.layers == 3


@needs_rtx
def test_functions_and_external_data_together(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g (float[2, 3] x) => (float[2, 2] y)'
        " <float[3, 2] w = {1,2,3,4,5,6}> { y = own.Twice(x, w) }"
        ' <domain: "own", opset_import: ["" : 20]> Twice (a, w) => (b) { c = MatMul(a, w) b = Add(c, c) }'
    )
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    assert (tmp_path / "model.data").exists()
    assert build_engine(tmp_path / "model.onnx", tmp_path / "e", backend="tensorrt-rtx").bytes > 0


@needs_rtx
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            """<ir_version: 10, opset_import: ["" : 20]> g (uint8[2, 3] x, uint8[3, 2] w) => (int32[2, 2] y)
            { [product] y = MatMulInteger(x, w) }""",
            "node 'product': TensorRT-RTX does not support MatMulInteger"
            " (int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs)",
        ),
        (
            """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]> g (float[2, 3] x) => (float[2, 3] y)
            { [n] y = mine.Magic(x) }""",
            "node 'n': TensorRT-RTX has no operator 'Magic'"
            " (a custom operator needs a plugin, or a function body of standard operators)",
        ),
        (
            """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x) => (float[2, 3] y, int64[k] v)
            { y = Relu(x)  [first] u, v = Unique(x)  }""",
            "node 'first': TensorRT-RTX does not support Unique",
        ),
    ],
)
def test_what_the_parser_refuses(tmp_path: Path, text: str, line: str) -> None:
    path = save(text, tmp_path / "model.onnx")
    with pytest.raises(GraphoptError) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert str(caught.value) == f"{path}: {line}"
    assert caught.value.exit_code == 1
    assert not (tmp_path / "e").exists()


@needs_rtx
def test_a_dynamic_input_needs_sizes(tmp_path: Path) -> None:
    path = save(DYNAMIC, tmp_path / "model.onnx")
    with pytest.raises(BadInput) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert str(caught.value) == ("dynamic inputs without sizes: x [batch, 3] (for example --shapes batch=1/4/8)")


@needs_rtx
def test_an_input_that_decides_a_shape(tmp_path: Path) -> None:
    path = save(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x, int64[2] s) => (float[a, b] y)
        { y = Reshape(x, s) }""",
        tmp_path / "model.onnx",
    )
    with pytest.raises(GraphoptError) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert str(caught.value) == (
        f"{path}: the input 's' decides a shape; TensorRT-RTX needs its range of values"
        " (make it a constant of the model, or an axis of another input)"
    )
