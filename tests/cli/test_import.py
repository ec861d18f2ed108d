"""``graphopt import``: the table, JSON, and one line where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")

from graphopt.cli.main import main
from tests.importing.common import Dense, adapter, op_types, pivot_state, random, save_state


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    state, matrix = pivot_state("layers.0.fc", 12, 8, 4)
    model = Dense(8).linear("layers.0.fc", matrix, random(12)).save(tmp_path / "m.onnx")
    return str(model), str(save_state(tmp_path / "s.safetensors", state)), str(tmp_path / "o.onnx")


def test_a_table(files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, state, out = files
    assert main(["import", model, state, "-o", out, "-v"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:6] == ["layers.0.fc", "pivot", "12x8", "4", "96", "64"]
    assert "layers.0.fc: found by weight name, 1 product" in printed
    assert "96 elements became 64; 0 other tensors of the state dict were not read" in printed
    assert "verified: largest difference" in printed
    assert max(map(len, printed.splitlines())) <= 100 or out in printed
    assert op_types(Path(out)) == ["MatMul", "MatMul", "Concat", "Gather", "Add"]


def test_json(files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, state, out = files
    assert main(["import", model, state, "-o", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modules"][0]["form"] == "pivot"
    assert found["verification"]["verdict"] == "passed"
    assert (found["path"], found["unread"], found["replaced"]) == (out, 0, False)


def test_an_adapter_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Dense(8).linear("layers.0.fc", random(12, 8)).save(tmp_path / "m.onnx")
    tensors = {"layers.0.fc.lora_A.weight": random(2, 8), "layers.0.fc.lora_B.weight": random(12, 2)}
    folder = adapter(tmp_path / "lora", tensors)
    assert main(["import", str(model), str(folder), "-o", str(tmp_path / "o.onnx")]) == 0
    assert "not judged, since the meaning may change" in capsys.readouterr().out


def test_another_network(files: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, state, out = files
    model = Dense(8).linear("layers.0.fc", random(12, 8, seed=3)).save(tmp_path / "other.onnx")
    assert main(["import", str(model), state, "-o", out]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "layers.0.fc: the product of its factors is not the weight in the graph" in told.err
    assert "--replace" in told.err
    assert len(told.err.splitlines()) == 1
    assert not Path(out).exists()
    assert main(["import", str(model), state, "-o", out, "--replace"]) == 0


def test_files_that_are_not_there(files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, state, out = files
    for arguments in (["no.onnx", state], [model, "no.safetensors"], [state, model]):
        assert main(["import", *arguments, "-o", out]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["import", model, state, "-o", "no/folder/o.onnx"]) == 2
