"""``optimize --recipe static`` and ``verify`` of bundles: what they print, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.cli.main import main
from tests.models.text import model_from_text
from tests.test_optimize_bundle import NET, spoiled


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    ir.save(model_from_text(NET), "net.onnx")
    return Path("net.onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_bundle_is_told(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "optimize", str(net), "-r", "static", "--target", "onnx")
    assert (code, err) == (0, "")
    assert "bundle: 4 blocks, 6 steps, " in out
    assert "7 ways forced" not in out and "5 ways forced, each decision on its own and all alike" in out
    assert "2 sides of branches: 1 taken by the inputs, 1 only by force, 0 not at all" in out
    assert "wrote net.bundle in" in out
    assert max(map(len, out.splitlines())) <= 100


def test_what_stays_inside_is_told(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "optimize", str(net), "-r", "static", "-o", "small.bundle")
    assert code == 0
    assert "bundle: 1 block, 1 step" in out
    assert "If of b stays inside a block: a cut adds about " in out
    assert "inside a block, forced there: If of b, Loop of y" in out
    assert "no control flow" not in out


def test_a_model_without_control_flow(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(
        model_from_text('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Exp (x) }'),
        "m.onnx",
    )
    code, out, _ = run(capsys, "optimize", "m.onnx", "-r", "static")
    assert code == 0
    assert "bundle: 1 block, 1 step" in out
    assert "there is no control flow to split at" in out
    assert "forced" not in out


def test_json_has_all_of_it(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "optimize", str(net), "-r", "static", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["bundle"]["blocks"] == report["bundle"]["steps"] == 1
    assert set(report["bundle"]["kept"]) == {"If of b", "Loop of y"}
    assert report["verification"]["coverage"]["ways"]["tried"] == 5


def test_verify_takes_a_bundle(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "optimize", str(net), "-r", "static", "--target", "onnx")
    code, out, err = run(capsys, "verify", "net.onnx", "net.bundle", "-v")
    assert (code, err) == (0, "")
    assert out.startswith("same\n")
    assert "5 ways forced" in out
    assert "Loop of y turned" in out
    code, out, _ = run(capsys, "verify", "net.onnx", "net.bundle", "--json")
    assert json.loads(out)["verification"]["coverage"]["ways"]["sides"]["If of b"]["then"] == "forced"


def test_a_difference_that_only_force_shows_exits_with_1(
    net: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch)
    code, _, err = run(capsys, "optimize", str(net), "-r", "static", "--target", "onnx")
    assert code == 1
    assert "the bundle is not the same: forced If of b = 1: output y" in err and "nothing was written" in err
    assert not Path("net.bundle").exists()
    run(capsys, "optimize", str(net), "-r", "static", "--target", "onnx", "--no-verify")
    code, out, _ = run(capsys, "verify", "net.onnx", "net.bundle")
    assert code == 1
    assert out.startswith("different: forced If of b = 1: output y")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["optimize", "net.onnx", "-r", "static", "-o", "x.onnx"],
            "error: x.onnx: the result is a bundle, which is a folder",
        ),
        (["verify", "net.onnx", "none.bundle"], "error: none.bundle: no such file"),
        (["verify", "net.onnx", "."], "error: .: is a folder"),
    ],
)
def test_bad_input(arguments: list[str], said: str, net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith(said)
    assert err.count("\n") == 1
