"""``graphopt passes``: the list, and one explained."""

from __future__ import annotations

import json

import pytest

from graphopt.cli.main import main
from graphopt.rewrite.discovery import all_passes


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["passes", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    for name in all_passes():
        assert name in out
    assert "explain one: graphopt passes NAME" in out


@pytest.mark.parametrize("name", list(all_passes()))
def test_one_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, name)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"{name}: ")
    for heading in ("kind", "stage", "matches", "refuses", "costs", "source", "recipes"):
        assert any(line.strip().startswith(heading) for line in lines), heading


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [p["name"] for p in listed] == list(all_passes())
    _, out, _ = run(capsys, "remove-dead", "--json")
    assert json.loads(out) == next(p for p in listed if p["name"] == "remove-dead")
    assert {"kind", "stage", "matches", "refuses", "costs", "source", "parameters", "recipes"} <= set(json.loads(out))
    assert json.loads(out)["recipes"][0] == "safe" or "safe" in json.loads(out)["recipes"]


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "remove-deed")
    assert (code, out) == (2, "")
    assert err == "error: no pass 'remove-deed' (did you mean remove-dead?)\n"
