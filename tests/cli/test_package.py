"""`graphopt package`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.cli.main import main
from tests.packaging.common import engine, saved, sizes, tensor
from tests.packaging.server import check_onnxruntime

MODEL = "g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }"


def test_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(MODEL, tmp_path, "net.onnx")
    assert main(["package", str(path), "--triton", str(tmp_path / "models")]) == 0
    told = " ".join(capsys.readouterr().out.split())  # where lines break depends on how long the folder's name is
    assert "net: version 1" in told and "backend onnxruntime" in told
    assert "batches up to 4: Triton's default; --max-batch sets another" in told
    assert "not loaded by a server" in told
    check_onnxruntime(tmp_path / "models" / "net")


def test_json_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(MODEL, tmp_path)
    options = ["--name", "n", "--version", "7", "--max-batch", "16", "--instances", "2", "--device", "cpu", "--json"]
    assert main(["package", str(path), "--triton", str(tmp_path / "models"), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["version"], told["max_batch"]) == ("n", 7, 16)
    assert check_onnxruntime(tmp_path / "models" / "n", 7).instance_group[0].count == 2


def test_verbose_shows_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(MODEL, tmp_path)
    assert main(["package", str(path), "--triton", str(tmp_path / "models"), "-v"]) == 0
    assert (tmp_path / "models/m/config.pbtxt").read_text() in capsys.readouterr().out


def test_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"x": sizes((1, 3), (4, 3), (8, 3))}
    path = engine(tmp_path, inputs=[tensor("x", -1, 3)], outputs=[tensor("y", -1, 3)], profiles=shapes)
    assert main(["package", str(path), "--triton", str(tmp_path / "models")]) == 0
    told = capsys.readouterr().out
    assert "batches up to 8: the largest that the engine was built for" in told
    assert "the server needs TensorRT 10.9.0.34" in told


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(MODEL, tmp_path)
    models = str(tmp_path / "models")
    rtx = engine(tmp_path, "rtx.engine", backend="tensorrt-rtx")
    for arguments, hint in (
        ([str(path)], "Missing option '--triton'"),
        ([str(tmp_path / "none.onnx"), "--triton", models], "no such file"),
        ([str(path), "--triton", models, "--name", "a/b"], "--name takes"),
        ([str(rtx), "--triton", models], "--backend tensorrt"),
    ):
        assert main(["package", *arguments]) == 2
        told = capsys.readouterr().err
        assert hint in told and len(told.splitlines()) == 1
