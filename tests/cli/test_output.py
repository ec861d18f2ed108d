from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from graphopt.cli.output import common_options, console, print_json, progress, table, tell_bytes, to_plain


@dataclass
class Report:
    path: Path
    ratio: float
    sizes: tuple[int, ...]


class Own:
    def to_json(self) -> dict[str, object]:
        return {"b": 1, "a": Path("x")}


def test_json_takes_what_reports_are_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "report": Report(Path("a/b.onnx"), float("nan"), (1, 2)),
            "own": Own(),
            "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.arange(2), np.float64("inf")],
            "set": {"y", "x"},
            "text": "größer",
        }
    )
    out = capsys.readouterr().out
    assert "größer" in out
    assert json.loads(out) == {
        "report": {"path": "a/b.onnx", "ratio": None, "sizes": [1, 2]},
        "own": {"b": 1, "a": "x"},
        "numpy": [0.5, 3, True, [0, 1], None],
        "set": ["x", "y"],
        "text": "größer",
    }
    assert list(json.loads(out)) == ["report", "own", "numpy", "set", "text"]
    assert out.index('"b"') < out.index('"a"')


@pytest.mark.parametrize("value", [object(), b"bytes", 1j])
def test_json_refuses_what_it_cannot_write(value: object) -> None:
    with pytest.raises(TypeError, match="cannot write"):
        to_plain(value)


def test_a_table_fits_and_prints_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"tensor[{'very long ' * 20}]", 12, None), ("float32[2, 3]", 1, "[bold]x[/bold] :smile:")]
    console().print(table(["name", ("count", "right"), "note"], rows, title="What [is] there"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "\x1b" not in out
    assert "float32[2, 3]" in out and "[bold]x[/bold] :smile:" in out and "What [is] there" in out
    assert "None" not in out


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", total=2) as advance:
        advance()
        advance(1, "the rest")
    assert capsys.readouterr() == ("", "")


def test_common_options() -> None:
    @click.command()
    @common_options
    def command(as_json: bool, verbose: bool) -> None:
        click.echo(f"{as_json} {verbose}")

    run = CliRunner().invoke
    assert run(command, ["--json", "-v"]).output == "True True\n"
    assert run(command, []).output == "False False\n"


def test_small_files_have_a_size_too() -> None:
    assert [tell_bytes(size) for size in (0, 9_800, 1_000_000, 12_345_678)] == ["0.0 kB", "9.8 kB", "1.0 MB", "12.3 MB"]
