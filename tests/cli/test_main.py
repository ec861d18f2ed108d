"""The command line as a whole: help, exit codes, errors in one line, tracebacks only on demand."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from graphopt.cli import main as entry
from graphopt.cli.main import COMMANDS, main
from graphopt.errors import BadInput, GateFailed, GraphoptError, MissingDependency


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``graphopt passes`` raise."""

    @click.command()
    @click.option("--verbose", "-v", is_flag=True)
    def command(verbose: bool) -> None:
        raise error

    monkeypatch.setattr(entry.LazyGroup, "get_command", lambda self, ctx, name: command)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], *([name, flag] for name in COMMANDS for flag in ("--help", "-h"))]
)
def test_help_fits_a_screen(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 5 < len(lines) <= 60
    assert max(map(len, lines)) <= 100


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in out
        assert text in " ".join(out.split())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bundle"])
def test_every_command_takes_json_and_verbose(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])
    out = capsys.readouterr().out
    assert "--json" in out
    assert "-v, --verbose" in out
    assert COMMANDS[name][1].rstrip(".").split()[0] in out


def test_so_do_those_of_bundles(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bundle", "--help"])
    assert "merge" in capsys.readouterr().out
    main(["bundle", "merge", "--help"])
    out = capsys.readouterr().out
    assert "--json" in out and "-v, --verbose" in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert "graphopt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInput("cannot be read", where="m.onnx", hint="export it again"), 2,
         "error: m.onnx: cannot be read (export it again)"),
        (MissingDependency("is not installed", where="torch"), 2, "error: torch: is not installed"),
        (GateFailed("cosine is 0.5", hint="nothing was written"), 1, "error: cosine is 0.5 (nothing was written)"),
        (GraphoptError("went wrong"), 1, "error: went wrong"),
        (click.UsageError("no such thing"), 2, "error: no such thing (see: graphopt passes --help)"),
        (click.exceptions.Abort(), 1, "interrupted"),
        (ValueError("first\nsecond"), 1,
         "error: internal: ValueError: first (this is a bug in graphopt; --verbose shows where)"),
        (AssertionError(), 1, "error: internal: AssertionError:  (this is a bug in graphopt; --verbose shows where)"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    fails_with(monkeypatch, error)
    assert main(["passes"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == line + "\n"


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_a_traceback_comes_with_the_flag_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    fails_with(monkeypatch, BadInput("cannot be read"))
    assert main(["passes", flag]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: cannot be read\n")
    fails_with(monkeypatch, ValueError("inside"))
    with pytest.raises(ValueError, match="inside"):
        main(["passes", flag])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimise", "m.onnx"], "No such command 'optimise'"),
        (["optimize"], "Missing argument 'IN.onnx'. (see: graphopt optimize --help)"),
        (["optimize", "m.onnx", "--colour"], "No such option"),
        (["optimize", "m.onnx", "--min", "x"], "'x' is not a valid float"),
        (["verify", "a.onnx"], "Missing argument 'B'"),
        (["profile-target"], "Missing option '-o'"),
        (["profile-target", "-o", "t.yaml", "--threads", "0"], "0 is not in the range"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_without_arguments_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    captured = capsys.readouterr()
    assert "Start here:" in captured.out
    assert captured.err == ""


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "passes", "xyzzy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no pass 'xyzzy' (see: graphopt passes)\n"


def test_a_closed_pipe_is_no_crash() -> None:
    done = subprocess.run(
        f"{sys.executable} -m graphopt passes --json | head -c 10",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert len(done.stdout) == 10


def test_a_request_to_end_takes_back_what_was_begun(tmp_path: Path) -> None:
    """As a service manager or a job's time limit asks: SIGTERM."""
    code = (
        "import tempfile, time\n"
        "import graphopt.cli.main as cli\n"
        "def main():\n"
        f"    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.main = main\n"
        "cli.run()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    assert len(list(tmp_path.iterdir())) == 1
    child.terminate()
    assert child.wait(20) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
