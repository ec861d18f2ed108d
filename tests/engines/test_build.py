"""Engines: built by the real library where it is installed, and what its failures become."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt.engines.backends as backends
import graphopt.engines.build as build_module
from graphopt.engines import BuildOptions, Profile, build_engine, read_report
from graphopt.engines.build import NotCovered
from graphopt.engines.child.worker import describe_gpu
from graphopt.engines.coverage import Coverage
from graphopt.engines.spawning import Refused
from graphopt.errors import BadInput, GraphoptError, MissingDependency

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed",
)


def save(text: str, path: Path) -> Path:
    ir.save(ir.from_onnx_text(text), path)
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
def init_libnvinfer_plugins(logger, namespace): pass
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
    assert isinstance(caught.value, MissingDependency)
    assert str(caught.value) == (
        "cannot load FakeRT: libfake.so.1: no such file (in graphopt's folder: pip install '.[rtx]')"
    )


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
        ("tensorrt-rtx", tmp_path, f"{tmp_path}: is a folder (give the name of the file to write)"),
        (
            "tensorrt-rtx",
            tmp_path / "no" / "e",
            f"{tmp_path / 'no'}: no such folder (mkdir -p {tmp_path / 'no'})",
        ),
    ]
    for backend, out, line in cases:
        with pytest.raises(BadInput) as caught:
            build_engine(model, out, backend=backend)
        assert str(caught.value) == line


def test_nothing_that_is_there_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    model = save(DYNAMIC, tmp_path / "model.onnx")
    model.rename(tmp_path / "net.json")
    external = ir.from_onnx_text(DYNAMIC.replace("Relu(x)", "Add(x, w)"))
    external.graph.initializers["w"] = ir.Value(
        name="w", const_value=ir.tensor(np.ones((64, 3), np.float32), name="w"), type=ir.TensorType(ir.DataType.FLOAT)
    )
    ir.save(external, tmp_path / "external.onnx", external_data="weights.data", size_threshold_bytes=10)
    np.savez(tmp_path / "c.npz", x=np.zeros((2, 3), np.float32))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", x=np.zeros((2, 3), np.float32))
    (tmp_path / "settings.json").write_text('{"a": 1}')
    os.mkfifo(tmp_path / "pipe")
    another = "(give the engine another name)"
    cases = [
        ("net.json", "net", f"net.json: its report is the model itself {another}"),
        (
            "external.onnx",
            "weights.data",
            f"weights.data: is a data file of the model {another}",
        ),
        ("external.onnx", "data/0.npz", f"data/0.npz: is what --calibration names {another}"),
        ("external.onnx", "c.npz", f"c.npz: is what --calibration names {another}"),
        (
            "external.onnx",
            "settings",
            f"settings: the report would be written to settings.json, and something else is there {another}",
        ),
        ("external.onnx", "pipe", "pipe: is no ordinary file (give the name of the engine to write)"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, out, line in cases:
        with pytest.raises(BadInput) as caught:
            calibration = tmp_path / ("data" if out.startswith("data") else "c.npz")
            build_engine(tmp_path / source, tmp_path / out, backend="tensorrt-rtx", calibration=calibration)
        assert str(caught.value) == f"{tmp_path}/{line}"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_cannot_be_written_to_is_told_before_the_build(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    with pytest.raises(BadInput, match="no permission to write here"):
        build_engine(model, tmp_path / "e", backend="tensorrt-rtx")


def test_one_build_of_an_engine_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    second: list[str] = []

    def run_child(*_: object) -> None:
        with pytest.raises(BadInput) as caught:
            build_engine(model, tmp_path / "e", backend="tensorrt-rtx")
        second.append(str(caught.value))
        assert (tmp_path / ".e.partial").exists()  # the second one left it to the first
        raise GraphoptError("enough")

    monkeypatch.setattr(build_module, "run_child", run_child)
    with pytest.raises(GraphoptError, match="enough"):
        build_engine(model, tmp_path / "e", backend="tensorrt-rtx")
    assert second == [f"{tmp_path / 'e'}: another build is writing it (wait for it, or give another name)"]
    assert not (tmp_path / ".e.partial").exists()


def test_a_name_that_no_file_can_have(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    with pytest.raises(BadInput, match="cannot be written: File name too long"):
        build_engine(model, tmp_path / ("e" * 250), backend="tensorrt-rtx")


@pytest.mark.parametrize("library", ["", ctypes.util.find_library("m") or "", "/no/such/library.so"])
def test_a_library_that_is_no_driver_is_no_gpu(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", library)
    if library:  # without a name the driver of this machine is asked, which may be there
        assert describe_gpu() is None
    else:
        describe_gpu()


def test_an_input_that_is_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    path = save(STATIC.replace("(float[2, 3] y)", "(float[2, 3] y, float[2, 3] x)"), tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="'x' is an input and an output; FakeRT needs two names"):
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")


@needs_rtx
def test_what_a_parser_says_among_noise_is_told(tmp_path: Path) -> None:
    text = DYNAMIC.replace("Relu(x)", "MatMul(x, w)").replace("y) {", "y) <float[4, 3] w = {" + "1, " * 11 + "1}> {")
    with pytest.raises(GraphoptError, match="must match") as caught:
        build_engine(save(text, tmp_path / "m.onnx"), tmp_path / "e", backend="tensorrt-rtx", shapes=["batch=1"])
    assert "MatMul" in str(caught.value) and "cudaError" not in str(caught.value)


def test_buckets_of_a_static_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    with pytest.raises(BadInput) as caught:
        build_engine(model, tmp_path / "e", backend="tensorrt-rtx", buckets=True)
    assert str(caught.value) == "--buckets: every input has one size (leave it out)"


def test_nodes_that_do_not_run_are_told_before_sizes_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library(tmp_path, monkeypatch, LOGGING_LIBRARY.format(end="os.abort()"))
    path = save(DYNAMIC.replace("float[batch, 3]", "string[batch]").replace("Relu", "Identity"), tmp_path / "m.onnx")
    with pytest.raises(NotCovered):
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")


@needs_rtx
def test_rtx_builds_a_static_model(model: Path, tmp_path: Path) -> None:
    result = build_engine(model, tmp_path / "e", backend="tensorrt-rtx")
    assert result.bytes == (tmp_path / "e").stat().st_size > 0
    assert read_report(tmp_path / "e") == result
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


NOTHING_REFUSED = Coverage(
    target="tensorrt-rtx", title="TensorRT-RTX", version="1.7", nodes=1, refused=(), shape_inputs=()
)
REFUSED = [
    (
        """<ir_version: 10, opset_import: ["" : 20]> g (uint8[2, 3] x, uint8[3, 2] w) => (int32[2, 2] y)
        { [product] y = MatMulInteger(x, w) }""",
        "node 'product': TensorRT-RTX does not support MatMulInteger"
        " (int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs)",
        ["product"],
    ),
    (
        """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]> g (float[2, 3] x) => (float[2, 3] y)
        { [n] y = mine.Magic(x) }""",
        "node 'n': TensorRT-RTX has no operator 'Magic'"
        " (a custom operator needs a plugin, or a function body of standard operators)",
        ["n"],
    ),
    (
        """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x) => (float[2, 3] y, int64[k] v)
        { y = Relu(x)  [first] u, v = Unique(x)  }""",
        "node 'first': TensorRT-RTX does not support Unique",
        ["first"],
    ),
    (
        """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[2, 3] x) => (float[2, 3] y)
        { [n] y = com.microsoft.QuickGelu(x) }""",
        "node 'n': TensorRT-RTX has no operator 'QuickGelu'"
        " (QuickGelu is ONNX Runtime's own: optimize with --target tensorrt-rtx, which uses none of those)",
        ["n"],
    ),
]


@pytest.mark.parametrize(("text", "_line", "nodes"), REFUSED)
def test_nodes_that_do_not_run_are_told_before_the_library_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, _line: str, nodes: list[str]
) -> None:
    fake_library(tmp_path, monkeypatch, "raise AssertionError('loaded')")
    path = save(text, tmp_path / "model.onnx")
    with pytest.raises(NotCovered) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert [refused.node for refused in caught.value.coverage.refused] == nodes
    assert str(caught.value).startswith(f"{path}: ") and caught.value.hint
    assert caught.value.exit_code == 2
    assert not (tmp_path / "e").exists()


@needs_rtx
@pytest.mark.parametrize(("text", "line", "nodes"), REFUSED)
def test_what_the_parser_refuses_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: str, nodes: list[str]
) -> None:
    """Where the prediction is wrong, the library has the last word."""
    monkeypatch.setattr(build_module, "predict", lambda *_, **__: NOTHING_REFUSED)
    path = save(text, tmp_path / "model.onnx")
    with pytest.raises(Refused) as caught:
        build_engine(path, tmp_path / "e", backend="tensorrt-rtx")
    assert str(caught.value) == f"{path}: {line}"
    assert [refused["node"] for refused in caught.value.nodes] == nodes
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
        " (give --calibration with inputs of yours, or make it a constant of the model)"
    )
    assert caught.value.exit_code == 2
    np.savez(tmp_path / "c.npz", x=np.zeros((3, 2, 3), np.float32), s=np.array([[3, 2], [6, 1], [1, 6]]))
    result = build_engine(path, tmp_path / "e", backend="tensorrt-rtx", calibration=tmp_path / "c.npz")
    assert result.values == {"s": Profile((1, 1), (3, 2), (6, 6))}


@needs_rtx
def test_sizes_come_from_data(tmp_path: Path) -> None:
    path = save(DYNAMIC, tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for index, batch in enumerate((2, 5, 2)):
        np.savez(tmp_path / "data" / f"{index}.npz", x=np.zeros((batch, 3), np.float32))
    result = build_engine(path, tmp_path / "e", backend="tensorrt-rtx", calibration=tmp_path / "data")
    assert result.profiles == {"x": Profile((2, 3), (2, 3), (5, 3))}
    given = build_engine(
        path, tmp_path / "e", backend="tensorrt-rtx", calibration=tmp_path / "data", shapes=["batch=1/4/8"]
    )
    assert given.profiles == {"x": Profile((1, 3), (4, 3), (8, 3))}


@needs_rtx
def test_a_profile_for_each_bucket(tmp_path: Path) -> None:
    path = save(DYNAMIC, tmp_path / "model.onnx")
    result = build_engine(path, tmp_path / "e", backend="tensorrt-rtx", shapes=["batch=1/5/6"], buckets=True)
    assert result.buckets == ({"batch": 1}, {"batch": 2}, {"batch": 4}, {"batch": 5}, {"batch": 6})
    assert result.profiles == {"x": Profile((1, 3), (5, 3), (6, 3))}


@needs_rtx
def test_what_rtx_can_be_told_without_a_gpu(tmp_path: Path) -> None:
    path = save(DYNAMIC, tmp_path / "model.onnx")
    options = BuildOptions(
        workspace=1 << 28,
        optimization_level=1,
        sparsity=True,
        weight_streaming=True,
        compute_capabilities=("sm86", "sm120"),
    )
    phases: list[tuple[str, float]] = []
    result = build_engine(
        path,
        tmp_path / "e",
        backend="tensorrt-rtx",
        shapes=["batch=1/4/8"],
        options=options,
        on_progress=lambda phase, fraction: phases.append((phase, fraction)),
    )
    assert read_report(tmp_path / "e").options == options
    fractions = [fraction for _, fraction in phases]
    assert fractions == sorted(fractions) and 0.5 < fractions[-1] <= 1
    if result.gpu is None:
        assert result.inspection.reason == "an engine is opened on a GPU only, and there is none here"


@needs_rtx
def test_too_little_scratch_memory(tmp_path: Path) -> None:
    path = save(
        """<ir_version: 10, opset_import: ["" : 20]> g (float16[b, 16] x, float16[16, 16] w)
        => (float16[b, 16] y) { y = MatMul(x, w) }""",
        tmp_path / "model.onnx",
    )
    with pytest.raises(GraphoptError, match="no tactics to implement the operation within workspace limit") as caught:
        build_engine(
            path, tmp_path / "e", backend="tensorrt-rtx", shapes=["b=1/4/8"], options=BuildOptions(workspace=1 << 20)
        )
    assert caught.value.hint == "give more --workspace"


def test_an_option_that_the_library_does_not_know_is_bad_input(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library(tmp_path, monkeypatch, "raise AssertionError('loaded')")
    with pytest.raises(BadInput, match="--timing-cache: FakeRT has no timing cache"):
        build_engine(
            model, tmp_path / "e", backend="tensorrt-rtx", options=BuildOptions(timing_cache=tmp_path / "cache")
        )


CHILD = """
import sys
from tests.engines.fake_backend.library import make_library
sys.modules[__name__] = make_library({version!r}, faults={faults!r})
"""


def play(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, *faults: str) -> None:
    """Make ``--backend tensorrt`` import the fake of a version, in the child."""
    (folder / "played_trt.py").write_text(CHILD.format(version=version, faults=faults))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    played = backends.Backend("tensorrt", "TensorRT", ("played_trt",), "tensorrt", (10, 9))
    monkeypatch.setitem(backends.BACKENDS, "tensorrt", played)


def test_a_whole_build_with_every_option_of_tensorrt(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch, "tensorrt 11.4")
    options = BuildOptions(
        timing_cache=tmp_path / "timings",
        workspace=1 << 30,
        optimization_level=4,
        strip_weights=True,
        hardware_compatibility="ampere-plus",
        version_compatible=True,
    )
    result = build_engine(model, tmp_path / "e", backend="tensorrt", options=options)
    assert result.version == "11.4.0.106"
    assert (tmp_path / "timings").read_bytes().startswith(b"FAKECACHE")
    assert read_report(tmp_path / "e") == result
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == sorted(
        ["model.onnx", "played_trt.py", "e", "e.json", "timings"]
    )


def test_an_engine_outlives_a_crash_of_the_inspector(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch, "tensorrt 10.9", "inspector")
    driver = tmp_path / "driver.c"
    driver.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", str(driver), "-o", str(tmp_path / "driver.so")], check=True)
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", str(tmp_path / "driver.so"))
    result = build_engine(model, tmp_path / "e", backend="tensorrt", plugins="never")
    assert (result.gpu, result.compute_capability) == ("played GPU", "8.9")
    assert result.inspection.reason == "the library crashed when it was asked about the engine's layers"
    assert read_report(tmp_path / "e") == result


# A driver that knows one GPU, as far as it is asked here.
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = 0; return 0; }
int cuDeviceGetName(char *to, int size, int device) {
    const char *from = "played GPU";
    while ((*to++ = *from++)) {}
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 9; return 0; }
"""
