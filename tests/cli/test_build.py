"""``graphopt build`` from the outside: exit codes, and what goes to which stream."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.cli.main import main

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
