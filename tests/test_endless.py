"""Networks with a loop that made-up inputs may not end: refused, or checked on the inputs that end, and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import optimize, verify
from graphopt.cli.main import main
from graphopt.errors import GraphoptError
from graphopt.feeds import feeds_that_run
from graphopt.files import load_model
from graphopt.runtime import ending
from graphopt.runtime.ending import Endless
from graphopt.runtime.session import create_session, run
from tests.models.endless import IF_POSITIVE, LONG, NEVER, endless


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "PATIENCE", 0.1)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        onnx.save(endless(text), tmp_path / "net.onnx")
        return tmp_path / "net.onnx"

    return write


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "net.onnx"],
        ["optimize", "net.onnx", "--recipe", "static", "-o", "net.bundle"],
        ["verify", "net.onnx", "net.onnx"],
        ["bench", "net.onnx", "net.onnx"],
        ["bisect", "net.onnx", "--fail-if", "max_abs>1"],
    ],
)
def test_no_input_ends(
    arguments: list[str],
    file: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file(NEVER)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said == [
        "error: no end after 0.1 s in loop 'spin'"
        " (the inputs are made up, which may be why; give real ones with --calibration)"
    ]
    assert [found.name for found in tmp_path.iterdir()] == ["net.onnx"]


@pytest.fixture
def some_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first made-up input of `IF_POSITIVE` ends, the second never does, the third ends."""
    from graphopt.feeds.synthesis import Synthesis

    plain = Synthesis.feeds

    def signed(self: Synthesis, case: int, *how: Any) -> dict[str, Any]:
        made = plain(self, case, *how)
        return {"x": np.abs(made["x"]) * np.float32(-1 if case == 1 else 1)}

    monkeypatch.setattr(Synthesis, "feeds", signed)
    yield


@pytest.mark.usefixtures("some_end")
@pytest.mark.parametrize("bundle", [False, True])
def test_what_was_left_out_is_told(
    bundle: bool, file: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = file(IF_POSITIVE)
    out = tmp_path / ("made" if bundle else "made.onnx")
    assert main(["optimize", str(source), "-o", str(out), *(["--recipe", "static"] if bundle else [])]) == 0
    said = "2 made-up inputs (not on 1 more, on which a loop had no end)"
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(source), str(out)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    found = verify(source, out).verification
    assert (found.cases, found.coverage["endless"]) == (2, 1)


def test_no_further_inputs_are_tried_after_a_few_without_an_end(file: Callable[[str], Path]) -> None:
    source = file(NEVER)
    session, runs = create_session(source, optimized=False, threads=1), []

    def once(feeds: dict[str, Any]) -> object:
        runs.append(feeds)
        return run(session, feeds)

    with pytest.raises(Endless):
        feeds_that_run(load_model(source), once, cases=50)
    assert len(runs) <= ending.MOST_CUT + 1  # a case may be tried with large values first


def test_another_error_is_not_taken_for_an_endless_loop(file: Callable[[str], Path]) -> None:
    def refuse(feeds: dict[str, Any]) -> object:
        raise GraphoptError("not these")

    with pytest.raises(GraphoptError, match="no inputs were found that the model runs on: not these") as error:
        feeds_that_run(load_model(file(NEVER)), refuse)
    assert not isinstance(error.value, Endless)


@pytest.mark.parametrize("recipe", ["safe", "static"])
def test_inputs_of_the_users_take_as_long_as_they_take(
    recipe: str, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is never cut; what is compared with it has as much time, and some more."""
    monkeypatch.setattr(ending, "PATIENCE", 0.001)
    source = file(LONG)
    np.savez(tmp_path / "real.npz", x=np.array([[0.5, 0.25]], np.float32), n=np.array([20_000]))
    report = optimize(source, tmp_path / "out", recipe=[recipe], calibration=tmp_path / "real.npz")
    assert report.verification.cases == 1
    assert report.verification.coverage["endless"] == 0


def test_a_candidate_that_goes_on_where_its_original_ends_is_not_the_same(
    file: Callable[[str], Path], tmp_path: Path
) -> None:
    """On inputs of the user's as well, which nobody may blame."""
    source = file(IF_POSITIVE)
    onnx.save(endless(NEVER), tmp_path / "never.onnx")
    np.savez(tmp_path / "real.npz", x=np.full((1, 2), 0.5, np.float32))
    found = verify(source, tmp_path / "never.onnx", calibration=tmp_path / "real.npz")
    assert not found.passed
    assert found.reason.startswith("it fails: no end after ")
    assert found.reason.endswith(" s in loop 'spin'")  # nobody blames the input
