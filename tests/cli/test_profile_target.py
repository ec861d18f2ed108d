"""``graphopt profile-target``: writes a target that ``optimize`` takes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.cli.main import main
from graphopt.targets import load_target, profiling
from tests.rewrite.toys import model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 1)


def test_a_profile_is_written_and_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.yaml"
    assert main(["profile-target", "-o", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert max(map(len, captured.out.splitlines())) <= 100 + len(str(path))
    for words in ("launching an operator", "matrix product", "elementwise", "entering a branch", f"wrote {path}"):
        assert words.replace(" ", "") in "".join(captured.out.split())
    assert load_target(str(path)).costs.node > 0
    ir.save(model("g (float[N,4] x) => (float[N,4] y) { i = Identity(x) y = Exp(i) }"), tmp_path / "m.onnx")
    assert main(["optimize", str(tmp_path / "m.onnx"), "--target", str(path)]) == 0


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile-target", "-o", str(tmp_path / "t.yaml"), "--json", "--target", "onnx"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert {"node", "gigaflops", "gigabytes", "control_flow"} <= set(profile)
    assert load_target(str(tmp_path / "t.yaml")).name == "onnx"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "t.yaml", "--target", "tensorrt"], 2, "the backend tensorrt cannot be measured here"),
        (["-o", "t.yaml", "--target", "abacus"], 2, "no target 'abacus'"),
        (["-o", "nowhere/t.yaml"], 2, "nowhere: no such folder (mkdir -p nowhere)"),
        (["-o", "."], 2, ".: is a folder"),
    ],
)
def test_mistakes(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile-target", *arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
