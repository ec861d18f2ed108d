"""Where a bundle is given for one file, and where its folder is written to; content that was changed; bad samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.bundles import read_bundle, split, write_bundle
from graphopt.bundles.contents import BundleContents
from graphopt.cli.main import main
from graphopt.errors import BadInput
from graphopt.files import save_model
from graphopt.inspection import Inspection
from tests.cli.test_bundle import TEXT
from tests.models.text import model_from_text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(model_from_text(TEXT), tmp_path / "net.onnx")
    write_bundle(split(model_from_text(TEXT)), tmp_path / "net.bundle")
    (tmp_path / "state.safetensors").write_bytes(b"")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said of bad input."""
    assert main(list(arguments)) == 2
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1
    return told.err.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "net.bundle"],
        ["optimize", "net.bundle", "-r", "static", "-o", "other.bundle"],
        ["bisect", "net.bundle"],
        ["package", "net.bundle", "--triton", "models"],
    ],
)
def test_a_bundle_where_one_file_is_asked_for(
    arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, *arguments)
    wanted = "net.bundle: is a bundle, and here one file is asked for (graphopt bundle merge net.bundle -o net.onnx)"
    assert told == f"error: {wanted}"
    with pytest.raises(BadInput) as raised:
        graphopt.optimize("net.bundle")
    assert str(raised.value) == wanted


def test_a_folder_that_is_no_bundle_is_called_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "models").mkdir()
    assert "models: is a folder (give the .onnx file)" in refused(capsys, "optimize", "models")


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "net.onnx", "-o", "net.bundle/x.onnx"],
        ["optimize", "net.onnx", "-r", "static", "-o", "net.bundle/x.bundle"],
        ["optimize", "net.onnx", "-o", "net.bundle/VERSION/x.onnx"],
        ["package", "net.onnx", "--triton", "net.bundle"],
        ["package", "net.onnx", "--triton", "net.bundle/models"],
        ["bundle", "merge", "net.bundle", "-o", "net.bundle/x.onnx"],
    ],
)
def test_nothing_is_written_into_a_bundle(arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = read_bundle("net.bundle")[0].name
    before = sorted(here.rglob("*"))
    told = refused(capsys, *(word.replace("VERSION", version) for word in arguments))
    assert "bundle, which holds nothing of others (write beside it, into" in told
    assert sorted(here.rglob("*")) == before


def test_a_file_that_is_called_current_makes_no_bundle(here: Path) -> None:
    (here / "current").write_text("something else")
    assert main(["optimize", "net.onnx", "-o", "out.onnx"]) == 0


def test_a_bundle_is_not_called_like_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("out.onnx", "out.engine"):
        told = refused(capsys, "optimize", "net.onnx", "-r", "static", "-o", name)
        assert f"{name}: the result is a bundle, which is a folder" in told


def test_inspect_from_python(here: Path) -> None:
    found, model = graphopt.inspect("net.bundle"), graphopt.inspect("net.onnx")
    assert isinstance(found, BundleContents) and isinstance(model, Inspection)
    assert found.changed is None and [block.name for block in found.blocks] == [*found.plan.blocks]
    whole = graphopt.inspect(here / "net.bundle", weights=True)
    assert isinstance(whole, BundleContents) and whole.changed == ()


def test_control_flow_inside_a_block_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "net.bundle"]) == 0
    assert "holds" not in capsys.readouterr().out
    write_bundle(split(model_from_text(TEXT), keep=lambda node: True), here / "whole.bundle")
    assert main(["inspect", "whole.bundle"]) == 0
    said = capsys.readouterr().out
    assert "holds" in said and "If 1" in said
    assert main(["inspect", "whole.bundle", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]["block_1"]["control_flow"] == {"If": 1}


@pytest.mark.parametrize("which", ["weights", "block", "plan"])
def test_what_was_changed_is_told(which: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version, plan = read_bundle("net.bundle")
    (data,) = version.glob("*.data")
    changed = {"weights": data, "block": version / plan.blocks["block_2"].file, "plan": version / "plan.json"}[which]
    content = bytearray(changed.read_bytes())
    if which == "plan":
        content += b" "
    elif which == "weights":
        content[-1] ^= 1  # the sign of the last weight, or a bit of it: as long as before
    else:
        content = bytearray(bytes(content).replace(b"Tanh", b"Sinh"))
    assert main(["inspect", "net.bundle", "--weights"]) == 0
    assert "as written yes" in " ".join(capsys.readouterr().out.split())
    changed.write_bytes(content)
    assert main(["inspect", "net.bundle", "--weights", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["changed"]
    assert told == [data.name if which == "weights" else "a file beside the weights"]
    assert main(["verify", "net.bundle", "net.bundle", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "changed since it was written" in report["reason"] and report["changed"] == [f"{version}: {told[0]}"]
    assert graphopt.load("net.bundle").outputs[0].name == "y"  # loading reads no weights, and asks nobody


def test_engines_are_not_verified(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = split(model_from_text(TEXT))
    block = parts.plan.blocks["block_1"]
    block.file, block.backend = "block_1.engine", "tensorrt-rtx"
    parts.blocks.pop("block_1")
    (here / "block_1.engine").write_bytes(b"engine")
    write_bundle(parts, here / "rtx.bundle", files=[here / "block_1.engine"])
    for models in (("net.onnx", "rtx.bundle"), ("rtx.bundle", "net.onnx")):
        told = refused(capsys, "verify", *models)
        assert told.startswith("error: rtx.bundle: its blocks are engines, which ONNX Runtime does not run (verify the")


def test_a_sample_that_the_network_does_not_take(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[n, m] x, bool c) => (float[n, 4] y) <float[4, 4] w> {
        y = If (c) <
            then_branch = t () => (float[n, 4] p) { p = MatMul (x, w) },
            else_branch = e () => (float[n, 4] q) { h = MatMul (x, w) q = Neg (h) }
        >
    }"""
    save_model(model_from_text(text), here / "m.onnx")
    write_bundle(split(model_from_text(text)), here / "m.bundle")
    (here / "own").mkdir()
    for number, width in enumerate((4, 4, 3)):
        x = np.ones((2, width), np.float32)
        np.savez(here / "own" / f"{number}.npz", x=x, c=np.array(True))
    np.savez(here / "own.npz", x=np.ones((3, 2, 3), np.float32), c=np.array([True, False, True]))
    for given, where in (("own", "own/2.npz"), ("own.npz", "own.npz, sample 0")):
        for command in (
            ["inspect", "m.bundle"],
            ["optimize", "m.onnx", "-o", "n.onnx"],
            ["optimize", "m.onnx", "-r", "static", "-o", "n.bundle"],
            ["verify", "m.onnx", "m.bundle"],
            ["bisect", "m.onnx"],
            ["bench", "m.onnx", "m.bundle", "--seconds", "0.1"],
        ):
            told = refused(capsys, *command, "--calibration", given)
            assert told.startswith(f"error: {where}: the network does not run on it: ")
            assert "MatMul" in told and "Non-zero status code" not in told
    assert not list(here.glob("n.*"))
