"""``graphopt build`` from the outside: exit codes, and what goes to which stream."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.cli.main import main
from graphopt.engines.coverage import Coverage

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed",
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    ir.save(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 3] x) => (float[batch, 3] y) { y = Relu(x) }'
        ),
        tmp_path / "model.onnx",
    )
    return Path("model.onnx")


def test_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["build", str(model), "-o", "e", "--backend", "tensorrt-rtx", "--shapes", "batch=1/2/4"])
    printed = capsys.readouterr()
    assert code == 0
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split() == ["input", "min", "opt", "max"]
    assert lines[1].split() == ["x", "1×3", "2×3", "4×3"]
    assert lines[-1].startswith("built, not run")


def test_json_is_all_there_is_on_standard_output(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(model), "-o", "e", "--backend", "tensorrt-rtx", "--shapes", "x=1x3/2x3/4x3"]
    assert main([*arguments, "--json", "--verbose"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["bytes"] == Path("e").stat().st_size
    assert report["profiles"]["x"] == {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}
    assert "info: " in printed.err  # the library's log
    assert "cudaError" not in printed.err


def test_bad_input_is_exit_code_2(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(model), "-o", "e", "--backend", "tensorrt-rtx"]) == 2
    assert capsys.readouterr().err == (
        "error: dynamic inputs without sizes: x [batch, 3] (for example --shapes batch=1/4/8)\n"
    )
    assert main(["build", "absent.onnx", "-o", "e", "--backend", "tensorrt-rtx"]) == 2
    assert "absent.onnx" in capsys.readouterr().err


REFUSED = """
<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x) => (float[k] y, float d)
{ [first] y = Unique(x) [second] d = Det(x) }
"""


def test_nodes_that_do_not_run_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ir.save(ir.from_onnx_text(REFUSED), "model.onnx")
    assert main(["build", "model.onnx", "-o", "e", "--backend", "tensorrt-rtx"]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["node", "type", "why", "not", "what", "to", "do"]
    starts = [line.split()[:2] for line in lines]
    assert ["first", "Unique"] in starts and ["second", "Det"] in starts
    assert printed.err.startswith("error: model.onnx: ") and "1 more" in printed.err
    assert main(["build", "model.onnx", "-o", "e", "--backend", "tensorrt-rtx", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [refused["node"] for refused in told["coverage"]["refused"]] == ["first", "second"]
    assert all(refused["reason"] and refused["hint"] for refused in told["coverage"]["refused"])
    assert not Path("e").exists()


def test_nodes_that_the_library_refuses_all_the_same_are_in_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Coverage("tensorrt-rtx", "TensorRT-RTX", "1.7", 2, (), ())
    monkeypatch.setattr("graphopt.engines.build.predict", lambda *_, **__: nothing)
    monkeypatch.chdir(tmp_path)
    ir.save(ir.from_onnx_text(REFUSED), "model.onnx")
    assert main(["build", "model.onnx", "-o", "e", "--backend", "tensorrt-rtx", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [refused["node"] for refused in told["refused"]] == ["first", "second"]


def test_options_reach_the_build(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("c.npz", x=np.zeros((5, 3), np.float32))
    arguments = ["build", str(model), "-o", "e", "--backend", "tensorrt-rtx", "--calibration", "c.npz", "--json"]
    arguments += ["--workspace", "256MiB", "--optimization-level", "1", "--sparsity", "--weight-streaming"]
    arguments += ["--compute-capability", "8.6,sm120", "--plugins", "never"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["profiles"]["x"] == {"min": [1, 3], "opt": [1, 3], "max": [1, 3]}
    options = report["options"]
    assert (options["workspace"], options["optimization_level"]) == (256 << 20, 1)
    assert options["compute_capabilities"] == ["sm86", "sm120"]
    assert options["sparsity"] and options["weight_streaming"] and not options["refit"]
    beside = json.loads(Path("e.json").read_text())
    assert beside["options"] == options and beside["hash"] == report["hash"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--timing-cache", "c"], "--timing-cache: TensorRT-RTX has no timing cache: it times nothing when it builds"),
        (["--version-compatible"], "--version-compatible: TensorRT-RTX does not come with the lean runtime"),
        (["--hardware-compatibility", "ampere-plus"], "name the GPUs: --compute-capability sm86,sm89"),
        (["--compute-capability", "sm90"], "does not build for sm90"),
        (["--optimization-level", "7"], "--optimization-level: 7 is not a level (there are 0 to 5)"),
        (["--workspace", "much"], "--workspace: 'much' is not a size"),
        (["--plugins", "sometimes"], "there are measured, always, never"),
        (["--timing-cache", "no/such/c"], "--timing-cache: TensorRT-RTX has no timing cache"),
    ],
)
def test_options_that_do_not_fit(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert main(["build", str(model), "-o", "e", "--backend", "tensorrt-rtx", "--shapes", "batch=1", *arguments]) == 2
    assert line in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["model.onnx"]


def test_values_that_decide_shapes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "g (float[2, 8] x, int64[2] s) => (float[a, b] y) { y = Reshape(x, s) }"
    ir.save(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}'), "model.onnx")
    np.savez("c.npz", x=np.zeros((3, 2, 8), np.float32), s=np.array([[2, 8], [4, 4], [16, 1]]))
    arguments = ["build", "model.onnx", "-o", "e", "--backend", "tensorrt-rtx", "--calibration", "c.npz"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["s,", "its", "values", "2", "1", "4", "4", "16", "8"]
    assert ", 1 layer, " not in printed and "; 1 layer before fusion, tensorrt-rtx" in printed and " kB in " in printed


def test_buckets_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(model), "-o", "e", "--backend", "tensorrt-rtx", "--shapes", "batch=1/2/5", "--buckets"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Only these sizes: batch=1; batch=2; batch=4; batch=5." in printed
    assert "Layers of the engine: not known (" in printed or "layers in the engine" in printed
