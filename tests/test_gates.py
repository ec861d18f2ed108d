"""The user's own conditions and metric."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt import gates
from graphopt.errors import BadInput, GateFailed
from graphopt.report import Verification
from graphopt.rewrite.manager import PassRecord

FOUND = Verification(max_abs=0.5, max_rel=0.25, cosine_min=0.99)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("cosine<0.999", True), ("cosine<0.99", False), ("cosine<=0.99", True), ("cosine>0.9", True),
        ("max_abs>0.4", True), ("max_abs>0.5", False), ("max_abs>=0.5", True), ("max_abs > 5e-1", False),
        ("max_rel>1e-3", True), (" max_rel < +0.3 ", True), ("max_rel>.3", False),
    ],
)  # fmt: skip
def test_conditions(text: str, holds: bool) -> None:
    condition = gates.parse_fail_if(text)
    assert condition.holds(FOUND) is holds
    if holds:
        with pytest.raises(GateFailed, match="nothing was written"):
            condition.check(FOUND)
    else:
        condition.check(FOUND)


@pytest.mark.parametrize("metric", ["cosine<0.5", "max_abs>1e9", "max_rel>1e9"])
def test_a_number_that_is_none_fails(metric: str) -> None:
    nan = float("nan")
    assert gates.parse_fail_if(metric).holds(Verification(max_abs=nan, max_rel=nan, cosine_min=nan))


@pytest.mark.parametrize(
    "text",
    ["", "cosine", "cosine<", "cosine=0.9", "cosine==0.9", "cos<0.9", "<0.9", "cosine<0.9<1", "cosine<abc",
     "cosine<nan", "cosine<1e", "cosine<1-2", "verdict<1"],
)  # fmt: skip
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        gates.parse_fail_if(text)
    assert "--fail-if" in str(caught.value)


def test_functions_by_module_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scoring.py").write_text("import helping\ndef score(run): return helping.VALUE\n")
    (tmp_path / "helping.py").write_text("VALUE = 3\n")
    assert gates.load_function("os.path:join", "--evaluate") is __import__("os").path.join
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert gates.load_function("scoring:score", "--evaluate")(None) == 3
        assert gates.load_function(str(tmp_path / "scoring.py") + ":score", "--evaluate")(None) == 3
    finally:
        for name in ("scoring", "helping"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scoring", "cannot read --evaluate scoring (write MODULE:FUNCTION)"),
        (":score", "cannot read --evaluate :score"),
        ("scoring:", "cannot read --evaluate scoring:"),
        ("no_such_module_here:score", "cannot be imported: ModuleNotFoundError"),
        ("nowhere.py:score", "nowhere.py: no such file"),
        ("os.path:no_such_function", "module os.path has no function 'no_such_function'"),
        ("os:sep", "module os has no function 'sep'"),
        ("broken.py:score", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_functions_that_cannot_be_had(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(BadInput) as caught:
        gates.load_function(spec, "--evaluate")
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [1, 1.5, True, __import__("numpy").float32(2)])
def test_metrics_give_numbers(value: Any) -> None:
    assert gates.evaluate(lambda run: value, lambda feeds: {}, "m:f") == float(value)


@pytest.mark.parametrize("value", [None, "x", [1, 2], 1j])
def test_metrics_that_give_none(value: Any) -> None:
    with pytest.raises(GateFailed, match="--evaluate m:f"):
        gates.evaluate(lambda run: value, lambda feeds: {}, "m:f")


def test_what_a_metric_raises_is_one_line() -> None:
    def fail(run: object) -> float:
        raise ValueError("first\nsecond")

    with pytest.raises(GateFailed) as caught:
        gates.evaluate(fail, lambda feeds: {}, "m:f")
    assert str(caught.value) == "--evaluate m:f: ValueError: first (it takes run(feeds))"


def lossy(name: str = "round", **how: Any) -> PassRecord:
    return PassRecord(name, "lossy", "quantise", **how)


@pytest.mark.parametrize(
    ("records", "undone", "message"),
    [
        ([lossy()], {}, "round changed nothing: there is nothing that it matches"),
        ([lossy(reason="too small")], {}, "round changed nothing: too small"),
        ([lossy(error="ValueError: oh")], {}, "round changed nothing: ValueError: oh"),
        ([lossy(reason="x")], {"other:a@b": "no", "round:a@b": "bits differ"}, "changed nothing: undone: bits differ"),
        ([lossy(), PassRecord("fold", "bitwise", "eliminate", kept=3)], {}, "round changed nothing"),
    ],
)
def test_lossy_passes_have_to_change_something(records: list[PassRecord], undone: dict[str, str], message: str) -> None:
    with pytest.raises(GateFailed) as caught:
        gates.require_lossy_effect(records, undone, "m.onnx")
    assert str(caught.value).startswith("m.onnx: ")
    assert message in str(caught.value)
    assert "nothing was written" in str(caught.value)


@pytest.mark.parametrize(
    "records", [[], [PassRecord("fold", "bitwise", "eliminate")], [lossy(), lossy("other", kept=1)]]
)
def test_one_lossy_pass_that_changes_something_is_enough(records: list[PassRecord]) -> None:
    gates.require_lossy_effect(records, {}, "m.onnx")
