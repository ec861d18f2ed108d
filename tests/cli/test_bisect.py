"""``graphopt bisect``: what it prints and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.cli.main import main
from graphopt.rewrite import Kind
from tests.rewrite.toys import model, register, swap
from tests.verification.test_shadow import once

WRONG = once(swap("Sub", "Sub", swap_inputs=True, name="wrong", kind=Kind.ROUNDING))


@pytest.fixture
def net(tmp_path: Path) -> str:
    made = model("g (float[N,8] x) => (float[N,8] y) { a = Abs(x) i = Identity(a) b = Sub(i, x) y = Tanh(b) }")
    ir.save(made, tmp_path / "m.onnx")
    return str(tmp_path / "m.onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["bisect", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_no_culprit(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, net) == (0, "no rewrite breaks the tolerance\n", "")
    code, out, _ = run(capsys, net, "--json")
    assert code == 0
    assert json.loads(out) == {"culprit": None}


def test_the_culprit(net: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (setting,) = register(monkeypatch, WRONG)
    code, out, err = run(capsys, net, "--set", setting)
    assert (code, err) == (1, "")
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    assert "application 2 of 2: wrong:Sub-to-Sub@b" in text or "application 1 of 2: wrong:Sub-to-Sub@b" in text
    assert "first tensor b (differs by " in text
    assert "leave it out --set wrong.enabled=false" in text
    code, out, err = run(capsys, net, "--set", setting, "--json")
    assert (code, err) == (1, "")
    culprit = json.loads(out)["culprit"]
    assert culprit["application"]["key"] == "wrong:Sub-to-Sub@b"
    assert culprit["tensor"] == "b"
    assert [p.name for p in Path(net).parent.iterdir()] == ["m.onnx"]


def test_bad_input(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, net, "--fail-if", "x")[0] == 2
    assert run(capsys, "nowhere.onnx")[0] == 2
