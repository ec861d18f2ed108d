"""`optimize` with calibration data tries straight lines for paths: which, when they are kept, what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import specialising
from graphopt.benchmarking.stats import Ratio
from graphopt.benchmarking.weighted import Comparison, Way, compare_ways
from graphopt.bundles import BundleRunner, making, read_bundle, specialised
from graphopt.bundles.plan import Branch, Plan, walk
from graphopt.bundles.profile import Trial, read_profile
from graphopt.bundles.trails import candidates, usual_path
from graphopt.cli.main import main
from graphopt.report import Report
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
FIRST, SECOND = "If of a", "If of y"

# What the first value of `open` says decides the first gate; the second gate waits for it.
NET = f"""
{HEAD}
g (float[1, 8] x, float[2] open) => (float[1, 8] y) <float[8, 8] w> {{
    half = Constant <value = float {{0.5}}> ()
    none = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    said = Gather (open, none)
    first = Greater (said, half)
    a = If (first) <
        then_branch = t () => (float[1, 8] p) {{ p = MatMul (x, w) }},
        else_branch = e () => (float[1, 8] q) {{ q = Neg (x) }}>
    top = ReduceMax <keepdims = 0> (a)
    after = Gather (open, one)
    kept = Mul (top, none_as_float)
    sum = Add (kept, after)
    second = Greater (sum, half)
    y = If (second) <
        then_branch = t2 () => (float[1, 8] u) {{ u = Exp (a) }},
        else_branch = e2 () => (float[1, 8] v) {{ v = Abs (a) }}>
}}
""".replace("kept = Mul (top, none_as_float)", "zero = Constant <value = float {0}> () kept = Mul (top, zero)")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    ir.save(model_from_text(NET), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def data(folder: Path, ways: Sequence[tuple[int, int]]) -> Path:
    path = folder / "data.npz"
    x = np.random.default_rng(0).standard_normal((len(ways), 1, 8)).astype(np.float32)
    np.savez(path, x=x, open=np.array(ways, np.float32))
    return path


def timed_as(monkeypatch: pytest.MonkeyPatch, *found: tuple[float, float]) -> list[list[Way]]:
    """What is measured, one after the other: value and lower end. Returns what was asked for."""
    asked: list[list[Way]] = []
    left: Iterator[tuple[float, float]] = iter(found)

    def compare(first: Path, second: Path, ways: Sequence[Way], **_: Any) -> Comparison:
        for path in (first, second):  # both can be run
            BundleRunner(path, 1).run(ways[0].feeds[0])
        asked.append([*ways])
        value, low = next(left)
        return Comparison(Ratio(value, low, 2 * value - low), (value,) * len(ways))

    monkeypatch.setattr(specialising, "compare_ways", compare)
    return asked


def optimized(net: Path, ways: Sequence[tuple[int, int]], **how: Any) -> tuple[Report, list[Trial], Plan]:
    report = graphopt.optimize(net, recipe=["static"], calibration=data(net.parent, ways), **how)
    assert report.bundle is not None
    version, plan = read_bundle(net.with_name("net.bundle"))
    profile = read_profile(version)
    assert profile is not None and profile.trials == report.bundle.trials
    return report, profile.trials, plan


def lines(plan: Plan) -> list[dict[str, bool]]:
    return [step.path for step in walk(plan.steps) if isinstance(step, Branch) and step.path]


MOSTLY = [(1, 1)] * 9 + [(0, 1)]


def test_a_line_that_pays_is_kept_and_verified(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed_as(monkeypatch, (1.01, 1.0), (1.2, 1.1))
    report, trials, plan = optimized(net, MOSTLY)
    assert [trial.paths for trial in trials] == [[{FIRST: True}], [{FIRST: True, SECOND: True}]]
    assert [trial.shares for trial in trials] == [[0.9], [0.9]]
    assert [trial.kept for trial in trials] == [False, True]
    assert trials[0].reason == "not surely 1.02 times"
    assert lines(plan) == [{FIRST: True, SECOND: True}]
    assert [way.share for way in asked[1]] == [0.9, 0.1]
    assert [len(way.feeds) for way in asked[1]] == [4, 1]
    ways = report.verification.coverage["ways"]
    assert ways["sides"]["path 1"]["then"] == "inputs"
    profile = read_profile(read_bundle(net.with_name("net.bundle"))[0])
    assert profile is not None
    assert (profile.branches["path 1"].then, profile.branches["path 1"].otherwise) == (9, 1)
    assert [path.name for path in sorted(net.parent.iterdir())] == ["data.npz", "net.bundle", "net.onnx"]
    runner, plain = graphopt.load(net.with_name("net.bundle")), graphopt.load(net)
    for first in (0.0, 1.0):
        for second in (0.0, 1.0):
            feeds = {"x": np.ones((1, 8), np.float32), "open": np.array([first, second], np.float32)}
            np.testing.assert_allclose(runner.run(feeds)["y"], plain.run(feeds)["y"], rtol=1e-5)


def test_the_best_is_kept(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(monkeypatch, (1.3, 1.2), (1.2, 1.1))
    _, trials, plan = optimized(net, MOSTLY)
    assert [(trial.kept, trial.reason) for trial in trials] == [(True, ""), (False, "another is faster")]
    assert lines(plan) == [{FIRST: True}]


@pytest.mark.parametrize("low", [0.9, 1.0, 1.02])
def test_what_does_not_surely_pay_is_not_kept(low: float, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(monkeypatch, (1.05, low), (1.05, low))
    _, trials, plan = optimized(net, MOSTLY)
    assert lines(plan) == [] and not any(trial.kept for trial in trials)
    assert {trial.reason for trial in trials} == {"not surely 1.02 times"}
    assert sorted(path.name for path in net.parent.iterdir()) == ["data.npz", "net.bundle", "net.onnx"]


def test_few_inputs_tell_nothing(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed_as(monkeypatch)
    _, trials, plan = optimized(net, [(1, 1)] * 3)
    assert asked == [] and lines(plan) == []
    (trial,) = trials
    assert trial.reason == "not tried, since fewer than 8 inputs do not tell how often it is taken"
    assert trial.told().startswith("a path of 2 decisions, taken by 100% of the inputs: not tried")


def test_without_calibration_or_verification_or_this_runtime_nothing_is_tried(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialising, "compare_ways", None)
    report = graphopt.optimize(net, recipe=["static"])
    assert report.bundle is not None and report.bundle.trials == []
    report = graphopt.optimize(net, recipe=["static"], calibration=data(net.parent, MOSTLY), verify=False)
    assert report.bundle is not None and report.bundle.trials == []
    for target in ("onnx", "tensorrt"):
        _, trials, plan = optimized(net, MOSTLY, target=target)
        assert trials == [] and lines(plan) == []


def test_a_line_that_is_wrong_is_not_kept(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What verification refuses is told, and the bundle is the one without."""
    timed_as(monkeypatch, (1.3, 1.2), (1.2, 1.1))
    real = making.make_parts

    def wrong(model: ir.Model, *arguments: Any, **how: Any) -> Any:
        for node in model.graph:
            for name in ("then_branch",) if node.metadata_props.get("graphopt.path") else ():
                for inner in node.attributes[name].as_graph():
                    inner.op_type = "Tanh" if inner.op_type == "Exp" else inner.op_type
        return real(model, *arguments, **how)

    monkeypatch.setattr(specialising, "make_parts", wrong)
    monkeypatch.setattr(specialising, "candidates", lambda found, early: [[{FIRST: True, SECOND: True}]])
    report, trials, plan = optimized(net, MOSTLY)
    (trial,) = trials
    assert not trial.kept and "the bundle is not the same" in trial.reason
    assert lines(plan) == []
    assert "path 1" not in report.verification.coverage["ways"]["sides"]


def test_a_line_that_others_take_is_not_kept(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that says something else than the path."""
    timed_as(monkeypatch, (1.3, 1.2))
    real = specialised.specialise

    def wrong(model: ir.Model, paths: Any) -> None:
        real(model, paths)
        (line,) = [node for node in model.graph if node.metadata_props.get("graphopt.path")]
        line.replace_input_with(0, next(n for n in model.graph if n.op_type == "Greater").outputs[0])

    monkeypatch.setattr(specialising, "specialise", wrong)
    monkeypatch.setattr(specialising, "candidates", lambda found, early: [[{FIRST: True, SECOND: True}]])
    _, (trial,), plan = optimized(net, [*MOSTLY, (1, 0)])
    assert trial.reason == "10 inputs take it, and 9 should" and lines(plan) == []


def test_what_is_said(net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timed_as(monkeypatch, (1.01, 1.0), (1.2, 1.1))
    bundle, calibration = str(net.with_name("net.bundle")), str(data(net.parent, MOSTLY))
    kept = (
        "a path of 2 decisions, taken by 90% of the inputs: as a straight line 1.20 times as fast (1.10 to 1.30), kept"
    )
    refused = "as a straight line 1.01 times as fast (1.00 to 1.02), not kept: not surely 1.02 times"

    def said(*words: str) -> str:
        assert main([*words]) == 0
        return " ".join(capsys.readouterr().out.split())

    text = said("optimize", str(net), "--recipe", "static", "--calibration", calibration, "-o", bundle)
    assert kept in text and refused in text
    for more in ([], ["--calibration", calibration]):
        text = said("inspect", bundle, *more)
        assert kept in text and "[path 1, 2 decisions]" in text
    found = json.loads(said("inspect", bundle, "--json"))
    assert [trial["kept"] for trial in found["profile"]["trials"]] == [False, True]
    timed_as(monkeypatch, (1.01, 1.0), (1.0, 0.9))
    found = json.loads(said("optimize", str(net), "--recipe", "static", "--calibration", calibration, "--json"))
    assert [trial["faster"]["low"] for trial in found["bundle"]["trials"]] == [1.0, 0.9]


# -- which are tried ---------------------------------------------------------------------------------------------------


def test_usual_paths_go_on_as_long_as_inputs_do() -> None:
    one = {"a": True, "b": True, "c": True}
    other = {"a": True, "b": True, "c": False, "d": True}
    assert usual_path([one] * 8 + [other] * 2) == one
    assert usual_path([one] * 7 + [other] * 3) == {"a": True, "b": True}
    assert usual_path([one] * 5 + [{"a": False}] * 5) == {}
    assert usual_path([{"a": True}] * 9 + [one]) == {"a": True}  # most end there
    assert usual_path([{}]) == {} == usual_path([])


def test_candidates() -> None:
    one, other, third = ({"a": a, "b": b} for a, b in ((True, True), (False, True), (False, False)))
    spread = [one] * 4 + [other] * 3 + [third] * 3
    assert candidates(spread, ["a", "b"]) == [[one], [one, other]]
    assert candidates(spread, ["a"]) == [[{"a": False}], [{"a": False}, {"a": True}]]
    assert candidates(spread, []) == []  # nobody usually goes one way
    assert candidates([one] * 9 + [third], []) == [[one]]
    assert candidates([one] * 9 + [third], ["a", "b"]) == [[one]]
    long = dict.fromkeys("abcdef", True)
    assert candidates([long] * 5 + [{**long, "a": False}] * 5, ["a"]) == []  # nearly all branches would stay
    many = [{name: bool(number >> place & 1) for place, name in enumerate("abc")} for number in range(8)]
    assert candidates(many, ["a", "b", "c"]) == []


def test_bundles_are_timed_on_both_ways(net: Path) -> None:
    """A bundle against itself, with weights of each way: both ways are run, and nothing is far off."""
    graphopt.optimize(net, recipe=["static"], verify=False)
    bundle = net.with_name("net.bundle")
    feeds = [{"x": np.ones((1, 8), np.float32), "open": np.array(way, np.float32)} for way in ((1, 1), (0, 0))]
    found = compare_ways(bundle, bundle, [Way(0.75, feeds[:1]), Way(0.25, feeds[1:])], seconds=0.1)
    assert len(found.each) == 2 and min(found.each) > 0
    assert found.overall.low <= found.overall.value <= found.overall.high


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blockdrop", "resnet"])
def test_nine_in_ten_images_take_one_path(name: str) -> None:
    pytest.importorskip("torch")
    from benchmarks.dynamic.families import FAMILIES
    from benchmarks.dynamic.seeding import asked, calibration
    from benchmarks.paths import one_usual_path

    (family,) = [family for family in FAMILIES if family.name == name]
    network = family.network(small=True)
    one_usual_path(network)
    ways = [
        tuple((asked(network, image, network.thresholds) > network.thresholds[: len(found)]).tolist())
        for image in calibration(network).split(1)
        for found in [asked(network, image, network.thresholds)]
    ]
    most = max(ways.count(way) for way in ways)
    assert 0.85 * len(ways) <= most < len(ways)


def test_the_table_tells_what_was_refused() -> None:
    pytest.importorskip("torch")
    from benchmarks.dynamic_tables import paths

    faster = {"value": 1.1, "low": 1.05, "high": 1.15, "on": 1.2, "off": 0.5}
    trials = [
        {"paths": [{"a": True}], "shares": [0.9], "faster": faster, "kept": True, "reason": ""},
        {
            "paths": [{"a": True}, {"a": False}],
            "shares": [0.9, 0.05],
            "faster": {},
            "kept": False,
            "reason": "no loops",
        },
    ]
    seconds = {"without images": 1.2, "with images": 9.8}
    rows = paths({"networks": [{"title": "Net", "usual": True, "trials": trials, "seconds": seconds}]}).splitlines()
    assert rows[2] == "| Net | one for nine in ten | 1 | 90% | 1.20 | 0.50 | 1.10 (1.05 to 1.15) | yes | 1 | 10 |"
    assert rows[3] == "|  |  | 1 and 1 | 95% |  |  | no loops | no |  |  |"
