"""What is counted while a bundle runs, what is likely by it, and what is loaded before it is asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt.bundles.running as running
from graphopt.background import in_background
from graphopt.bundles import BundleRunner, read_bundle, split, write_bundle
from graphopt.bundles.drawing import draw, shortened, used_by
from graphopt.bundles.plan import Plan, Run, walk
from graphopt.bundles.profile import Counts, Profile, Sides, Turns, likely_blocks, read_profile
from graphopt.bundles.sessions import Sessions
from graphopt.errors import BadInput, GraphoptError
from tests.models.text import model_from_text

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2] x, bool sure, int64 trips) => (float[2] y) {
    a = Neg (x)
    b = [exit] If (sure) <
        then_branch = t () => (float[2] p) { p = Tanh (a) },
        else_branch = e () => (float[2] q) {
            q = [steps] Loop (trips, , a) <body = l (int64 i, bool go, float[2] s) => (bool more, float[2] after) {
                more = Identity (go)
                after = Sin (s)
            }>
        }
    >
    y = Abs (b)
}
"""


def text_model() -> Any:
    made = model_from_text(TEXT.replace("[exit] ", "").replace("[steps] ", ""))
    for node in made.graph:
        if node.op_type == "If":
            node.name = "exit"
            next(iter(node.attributes["else_branch"].as_graph())).name = "steps"
    return made


def feeds(sure: bool, trips: int) -> dict[str, Any]:
    return {"x": np.array([1, -2], np.float32), "sure": np.array(sure), "trips": np.array(trips, np.int64)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(split(text_model()), tmp_path / "net")
    return tmp_path / "net"


def counted(bundle: Path) -> Profile:
    counts = Counts()
    runner = BundleRunner(bundle, course=counts)
    for case in (feeds(True, 9), feeds(False, 3), feeds(False, 5), feeds(False, 0)):
        runner.run(case)
        counts.profile.inputs += 1
    return counts.profile


def block_of(plan: Plan, op: str, version: Path) -> str:
    """The block that holds an operator."""
    from graphopt.files import load_model

    return next(
        name for name, one in plan.blocks.items() if any(n.op_type == op for n in load_model(version / one.file).graph)
    )


def test_what_is_counted(bundle: Path) -> None:
    profile = counted(bundle)
    assert profile.branches == {"exit": Sides(then=1, otherwise=3)}
    assert profile.loops == {"steps": Turns(entered=3, begun=2, turns=8, most=5)}
    assert sorted(profile.runs.values()) == [1, 4, 4, 8]
    assert Profile.model_validate_json(profile.to_json()) == profile


def test_counting_changes_nothing(bundle: Path) -> None:
    watched, alone = BundleRunner(bundle, course=Counts()), BundleRunner(bundle)
    for case in (feeds(True, 1), feeds(False, 2)):
        np.testing.assert_array_equal(watched.run(case)["y"], alone.run(case)["y"])
    assert watched.runs == alone.runs


def test_what_is_likely(bundle: Path) -> None:
    version, plan = read_bundle(bundle)
    neg, tanh, sin, absolute = (block_of(plan, op, version) for op in ("Neg", "Tanh", "Sin", "Abs"))
    assert likely_blocks(plan, None) == [neg, absolute]

    def likely(sides: Sides, turns: Turns) -> list[str]:
        return likely_blocks(plan, Profile(inputs=100, branches={"exit": sides}, loops={"steps": turns}))

    assert likely(Sides(then=100), Turns()) == [neg, tanh, absolute]
    assert likely(Sides(then=50, otherwise=50), Turns(entered=50, begun=50)) == [neg, tanh, sin, absolute]
    assert likely(Sides(otherwise=100), Turns(entered=100, begun=5)) == [neg, absolute]
    # A loop that hardly anybody comes to, however often it turns then.
    assert likely(Sides(then=95, otherwise=5), Turns(entered=5, begun=5, turns=5000)) == [neg, tanh, absolute]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ('{"version": 2}', "is of version 2"),
        ('{"version": 1, "runs": {"a": "many"}}', "is no profile: runs.a"),
        ('{"version": 1, "walks": 3}', "is no profile: walks"),
    ],
)
def test_a_profile_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    assert read_profile(tmp_path) is None
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        read_profile(tmp_path)


def test_the_likely_blocks_are_loaded_before_they_are_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version, plan = read_bundle(bundle)
    (version / "profile.json").write_text(counted(bundle).to_json())
    loaded: list[tuple[str, str]] = []
    make = running.create_session

    def watched(file: Path, **how: Any) -> Any:
        loaded.append((file.stem, threading.current_thread().name))
        return make(file, **how)

    monkeypatch.setattr(running, "create_session", watched)
    runner = BundleRunner(bundle)
    for _ in range(len(plan.blocks)):
        in_background(lambda: None).result()  # each load asks for the next one
    wanted = likely_blocks(plan, read_profile(version))
    assert [name for name, _ in loaded] == wanted and len(wanted) == 4
    assert all(thread.startswith("graphopt") for _, thread in loaded)
    runner.run(feeds(False, 2))
    runner.run(feeds(True, 2))
    assert len(loaded) == 4  # each once


def test_what_went_wrong_in_the_background_is_told_when_it_is_asked_for() -> None:
    def make(name: str) -> Any:
        if name == "broken":
            raise BadInput("onnxruntime refuses the model", where=name)
        return name

    sessions = Sessions(make)
    sessions.prefetch(["broken", "whole"])
    for _ in range(2):
        in_background(lambda: None).result()
    assert sessions("whole") == "whole"
    with pytest.raises(BadInput, match="refuses"):
        sessions("broken")


def test_what_is_asked_for_does_not_wait_for_what_was_not() -> None:
    began, go = threading.Event(), threading.Event()
    made: list[str] = []

    def make(name: str) -> Any:
        made.append(name)
        if name == "slow":
            began.set()
            assert go.wait(10)
        return name, threading.current_thread() is threading.main_thread()

    sessions = Sessions(make)
    sessions.prefetch(["slow", "other"])
    assert began.wait(10)
    assert sessions("other") == ("other", True)
    go.set()
    assert sessions("slow") == ("slow", False)
    in_background(lambda: None).result()
    assert made == ["slow", "other"]  # each once


def test_nothing_is_loaded_for_a_runner_that_is_gone() -> None:
    made: list[str] = []
    go = threading.Event()

    def make(name: str) -> Any:
        made.append(name)
        assert go.wait(10)

    sessions = Sessions(make)
    sessions.prefetch(["one", "two", "three"])
    while not made:
        pass
    del sessions
    go.set()
    for _ in range(3):
        in_background(lambda: None).result()
    assert made == ["one"]


def test_a_process_that_ends_does_not_wait_for_what_nobody_asked_for() -> None:
    code = """
import time
from graphopt.bundles.sessions import Sessions
def make(name):
    print(name, flush=True)
    time.sleep(0.2)
sessions = Sessions(make)
sessions.prefetch([f"block {n}" for n in range(100)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) <= 3 and not done.stderr


def test_a_block_that_fails_says_which_one(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[n] x, float[m] z, bool c) => (float[k] y) {
        a = Add (x, z)
        y = If (c) <
            then_branch = t () => (float[k] p) { p = Tanh (a) }, else_branch = e () => (float[k] q) { q = Exp (a) }>
    }"""
    write_bundle(split(model_from_text(text)), tmp_path / "net")
    given = {"x": np.ones(2, np.float32), "z": np.ones(3, np.float32), "c": np.array(True)}
    with pytest.raises(GraphoptError, match=r"block_1: onnxruntime failed"):
        BundleRunner(tmp_path / "net").run(given)


# -- drawings ----------------------------------------------------------------------------------------------------------


def test_a_plan_drawn(bundle: Path) -> None:
    _, plan = read_bundle(bundle)
    drawn = ["  " * line.depth + line.text for line in draw(plan)]
    assert drawn == [
        "takes x, sure, trips",
        "run block_1: x -> a",
        "if sure:  [exit]",
        "  run block_2: a -> p",
        "  b = p",
        "else:",
        "  loop at most trips turns:  [steps]",
        "    begin with s = a",
        "    run block_3: s -> after",
        "    hand on s = after",
        "  then q = s",
        "  b = q",
        "run block_4: b -> y",
        "gives y",
    ]


def test_a_plan_drawn_with_what_was_counted(bundle: Path) -> None:
    _, plan = read_bundle(bundle)
    ran = {line.text: line.ran for line in draw(plan, counted(bundle))}
    assert ran["takes x, sure, trips"] == "4 inputs"
    assert ran["if sure:  [exit]"] == "1 of 4 (25%)"
    assert ran["else:"] == "3 of 4 (75%)"
    assert ran["loop at most trips turns:  [steps]"] == "8 turns in 3, 5 at most"
    assert ran["run block_3: s -> after"] == "8"
    assert all(line.ran in ("", "0", "0 of 0", "0 inputs", "0 turns in 0, 0 at most") for line in draw(plan, Profile()))


def test_long_names_and_lists_are_shortened(bundle: Path) -> None:
    _, plan = read_bundle(bundle)
    long = "a/very/long/scope/of/a/framework/that/names/everything"
    run = next(step for step in walk(plan.steps) if isinstance(step, Run))
    run.makes = {f"o{n}": f"{long}/{n}" for n in range(6)}
    short, whole = (draw(plan, whole=whole)[1].text for whole in (False, True))
    assert short.endswith("and 3 more") and all(len(word) <= 29 for word in short.split())
    assert f"{long}/5" in whole and "more" not in whole


def test_shortened_names_differ() -> None:
    ends = [f"If_{side}_branch/decoder/of/all/output_{number}" for side in ("then", "else") for number in range(2)]
    middles = [f"a_long_beginning/{letter}/and_a_long_end_of_it" for letter in "pq"]
    names = [*ends, *middles, "short", "the_only_one_that_ends_in_a_tail_of_its_own"]
    short = shortened(names)
    assert "short" not in short and len(set(short.values())) == len(short) == len(names) - 1
    assert all(len(text) <= 30 for text in short.values())
    assert short[ends[0]].startswith("If_then") and short[ends[2]].startswith("If_else")
    assert short[names[-1]].startswith("...")


def test_samples_that_go_their_own_ways_are_drawn(bundle: Path) -> None:
    _, plan = read_bundle(bundle)
    for step in walk(plan.steps):
        if not isinstance(step, Run):
            step.each = True
    drawn = [line.text for line in draw(plan)]
    assert "if sure, each sample for itself:  [exit]" in drawn
    assert "loop at most trips turns, each sample for itself:  [steps]" in drawn


def test_how_often_blocks_are_used(bundle: Path) -> None:
    _, plan = read_bundle(bundle)
    assert used_by(plan) == dict.fromkeys(plan.blocks, 1)
