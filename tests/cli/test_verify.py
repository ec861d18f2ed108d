"""``graphopt verify``: what it prints and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.cli.main import main
from tests.rewrite.toys import model

NET = "g (float[N,8] x) => (float[N,8] y, float[N,8] z) { y = Softmax(x) z = Sub(x, x) }"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    ir.save(model(NET), tmp_path / "a.onnx")
    ir.save(model(NET.replace("Softmax(x)", "Softmax<axis = 0>(x)")), tmp_path / "b.onnx")
    return str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["verify", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_same(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, pair[0], pair[0])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "same"
    assert "made-up inputs; yardstick: float64" in out
    assert "says nothing (constant on every input tried): z" in out
    assert max(map(len, lines)) <= 100


def test_different(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *pair)
    assert (code, err) == (1, "")
    assert out.startswith("different: output y, case 0: ")
    assert max(map(len, out.splitlines())) <= 100
    code, long, _ = run(capsys, *pair, "--verbose")
    assert code == 1
    assert long.count("output y, case") > out.count("output y, case")


def test_json(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *pair, "--json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert report["passed"] is False
    assert report["reason"] == report["differences"][0]
    code, out, _ = run(capsys, pair[0], pair[0], "--json", "--bitwise")
    assert code == 0
    assert json.loads(out)["verification"]["max_abs"] == 0


def test_conditions(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *pair, "--fail-if", "max_abs>100")[0] == 0
    code, out, _ = run(capsys, *pair, "--fail-if", "max_abs>1e-9")
    assert code == 1
    assert out.startswith("different: max_abs>1e-9 holds")
    assert run(capsys, *pair, "--fail-if", "x")[0] == 2
    assert run(capsys, pair[0], "nowhere.onnx")[0] == 2
