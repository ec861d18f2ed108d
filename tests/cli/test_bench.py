from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from graphopt.cli.bench import _figure, _short_names
from graphopt.cli.main import main

MODEL = '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 64] x) => (float[n, 64] y) { y = OP }'


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    paths = []
    for name, body in (("first", "Add(x, x)"), ("same", "Add(x, x)"), ("wrong", "Mul(x, x)")):
        onnx.save(onnx.parser.parse_model(MODEL.replace("OP", body)), tmp_path / f"{name}.onnx")
        paths.append(str(tmp_path / f"{name}.onnx"))
    return paths


def test_the_table_fits_and_says_what_it_means(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *models, "--seconds", "0.1", "--shapes", "x=4x64", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    heading = out.splitlines()[0]
    for column in ("model", "p50 ms", "p90 ms", "p99 ms", "CPU ms", "calls/s", "peak MB", "size MB", "speedup (95 %)"):
        assert column in heading
    text = " ".join(out.split())
    assert "same.onnx" in text and ("No difference in speed is shown" in text or "as fast" in text)
    assert "warning: the outputs of wrong.onnx are not those of first.onnx" in text
    assert "the outputs of same.onnx" not in text
    assert "Timed on x float32[4, 64]" in text and "1 thread" in text


def test_json_holds_everything(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *models[:2], "--seconds", "0.05", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert [model["path"] for model in result["models"]] == models[:2]
    assert result["models"][1]["max_abs_difference"] == 0
    assert set(result["models"][1]["speedup"]) == {"value", "low", "high"}
    assert result["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.onnx"], "no such file"),
        (["MODEL", "--shapes", "x"], "--shapes: 'x' is not name=sizes"),
        (["MODEL", "--shapes", "y=2"], "input 'y': the model has no such input (inputs: x)"),
        (["MODEL", "--threads", "0"], "Invalid value for '--threads'"),
        (["MODEL", "--seconds", "-1"], "seconds must be above 0"),
        (["MODEL", "--calibration", "absent.npz"], "absent.npz: no such file"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_two(
    models: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", *(models[0] if argument == "MODEL" else argument for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346")]
)
def test_figures(value: float, text: str) -> None:
    assert _figure(value) == text


def test_names_are_told_apart() -> None:
    assert _short_names([Path("a/m.onnx"), Path("a/n.onnx")]) == ["m.onnx", "n.onnx"]
    assert _short_names([Path("a/m.onnx"), Path("b/m.onnx")]) == ["a/m.onnx", "b/m.onnx"]
    assert _short_names([Path("m.onnx"), Path("m.onnx")]) == ["m.onnx", "m.onnx (2)"]
