"""Decisions forced in an ONNX model: what each input means, which decisions go together, which ways are tried."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.bundles import forcing
from graphopt.bundles.forcing import FREE_TURNS, Decision, Forced, decisions, force, ways
from graphopt.runtime.session import create_session, run
from tests.models.nests import Nest
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'

IFS = f"""
{HEAD}
g (float[2] x, bool c) => (float[2] y) {{
    n = Not (c)
    a = If (c) <
        then_branch = t () => (float[2] p) {{ p = Neg (x) }},
        else_branch = e () => (float[2] q) {{
            q = If (n) <
                then_branch = t1 () => (float[2] r) {{ r = Exp (x) }},
                else_branch = e1 () => (float[2] s) {{ s = Abs (x) }}>
        }}>
    total = ReduceSum <keepdims = 0> (x)
    zero = Constant <value = float {{0}}> ()
    up = Greater (total, zero)
    b = If (up) <
        then_branch = t2 () => (float[2] v) {{ v = Add (a, a) }},
        else_branch = e2 () => (float[2] w) {{ w = Identity (a) }}>
    total2 = ReduceSum <keepdims = 0> (x)
    up2 = Greater (total2, zero)
    y = If (up2) <
        then_branch = t3 () => (float[2] k) {{ k = Add (b, x) }},
        else_branch = e3 () => (float[2] m) {{ m = Identity (b) }}>
}}
"""

LOOP = f"""
{HEAD}
g (float[2] x, int64 n, bool c) => (float[2] y, float[t, 2] rows, bool last) {{
    y, last, rows = Loop (%s, %s, x, c) <body = b (int64 i, bool go, float[2] s, bool before)
        => (bool again, float[2] after, bool now, float[2] row) {{
        one = Constant <value = float {{1}}> ()
        limit = Constant <value = int64 {{1}}> ()
        again = Less (i, limit)
        after = Add (s, one)
        now = Identity (go)
        row = Identity (s)
    }}>
}}
"""


def session(text: str) -> tuple[Any, list[str], list[Decision]]:
    made = model_from_text(text)
    graphs.name_control_flow(made)
    found = decisions(made)
    names = force(made)
    return create_session(ir.to_proto(made).SerializeToString(), optimized=False), names, found


def sent(names: list[str], way: dict[str, int]) -> dict[str, Any]:
    return {f"force/{name}": np.array(forcing.sent(name, way), np.int64) for name in names}


def test_conditions_that_agree_or_never_do_go_together() -> None:
    _, names, found = session(IFS)
    assert names == ["If of a", "If of b", "If of y", "If of q"]
    by_name = {decision.name: decision for decision in found}
    a, q, b, y = (by_name[f"If of {name}"] for name in "aqby")
    assert a.condition == q.condition and a.opposite != q.opposite
    assert b.condition == y.condition and b.opposite == y.opposite
    assert a.condition != b.condition
    assert q.inside == (("If of a", 0),)
    # Two conditions: four single ways, of which one needs c to be true and false, and all alike, which is one of both.
    tried = ways(found, by_name)
    assert tried == [
        {"If of a": 1, "If of q": 0},
        {"If of a": 0, "If of q": 1},
        {"If of b": 1, "If of y": 1},
        {"If of b": 0, "If of y": 0},
        {"If of a": 1, "If of q": 0, "If of b": 1, "If of y": 1},
        {"If of a": 0, "If of q": 1, "If of b": 0, "If of y": 0},
    ]


def test_what_was_taken_out_goes_its_own_way_unless_it_was_merged() -> None:
    _, _, found = session(IFS)
    # What is on the same condition went with it; on other conditions, as the values say.
    assert ways(found, {"If of q"}) == [{"If of a": 0, "If of q": 1}, {"If of a": 1, "If of q": 0}]
    merged = ways(found, {"If of b"}, decided={"If of b": {"If of a": False}})
    assert merged == [
        {"If of b": 1, "If of y": 1, "If of a": 0},
        {"If of b": 0, "If of y": 0, "If of a": 1},
    ]


@pytest.mark.parametrize("c", [True, False])
@pytest.mark.parametrize("x", [[1.0, 2.0], [-1.0, -2.0]])
def test_both_sides(c: bool, x: list[float]) -> None:
    made, names, _ = session(IFS)
    feeds = {"x": np.array(x, np.float32), "c": np.array(c)}
    plain = run(create_session(ir.to_proto(model_from_text(IFS)).SerializeToString(), optimized=False), feeds)
    assert np.array_equal(run(made, {**feeds, **sent(names, {})})["y"], plain["y"])
    array = feeds["x"]
    for a in (0, 1):
        for b in (0, 1):
            way = {"If of a": a, "If of q": 0, "If of b": b, "If of y": b}
            first = -array if a else np.abs(array)
            wanted = first + first + array if b else first
            assert np.array_equal(run(made, {**feeds, **sent(names, way)})["y"], wanted)


@pytest.mark.parametrize(("trips", "condition"), [("n", "c"), ("n", ""), ("", "c"), ("", "")])
@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_turns(trips: str, condition: str, turns: int) -> None:
    """With and without a limit and a condition, whatever they say."""
    text = LOOP % (trips, condition)
    made, names, found = session(text)
    assert [(one.name, one.is_loop, one.limit) for one in found] == [("Loop of y", True, None)]
    taken = [spec.name for spec in made.get_inputs()]
    for c in (True, False):
        feeds = {"x": np.zeros(2, np.float32), "n": np.array(3, np.int64), "c": np.array(c)}
        feeds = {name: value for name, value in feeds.items() if name in taken}
        forced = run(made, {**feeds, **sent(names, {"Loop of y": turns})})
        assert forced["y"].tolist() == [turns, turns]
        assert forced["rows"].shape == (turns, 2)
        assert bool(forced["last"]) is (c if turns == 0 else True)  # a turn is told that it goes on
        natural = run(made, {**feeds, **sent(names, {})})["y"][0]
        assert natural == (0 if condition and not c else 2)  # the body ends it


def test_loops_are_tried_with_no_one_and_the_most_turns() -> None:
    fixed = Decision("fixed", True, limit=7)
    free = Decision("free", True)
    inner = Decision("inner", False, 0, inside=(("free", 1),))
    tried = ways([fixed, free, inner], {"fixed", "free", "inner"}, {"free": 4})
    assert tried[:3] == [{"fixed": 0}, {"fixed": 1}, {"fixed": 7}]
    assert tried[3:6] == [{"free": 0}, {"free": 1}, {"free": 4}]
    assert tried[6:] == [{"free": 1, "inner": 1}, {"free": 1, "inner": 0}, {"inner": 1}, {"inner": 0}]


def test_a_loop_is_not_sent_beyond_what_it_is_compared_with() -> None:
    found = [Decision("fixed", True, limit=7), Decision("free", True), Decision("never", True)]
    tried = ways(found, {"fixed", "free", "never"}, {"free": 4}, limits={"fixed": 5, "free": 3, "never": 0})
    assert tried == [{"fixed": 0}, {"fixed": 1}, {"fixed": 5}, {"free": 0}, {"free": 1}, {"free": 3}, {"never": 0}]
    assert forcing.sent("free", {"fixed": 1}, {"free": 3}) == -4
    assert forcing.sent("free", {"fixed": 1}) == forcing.sent("free", {"fixed": 1}, {"free": 1000}) == -65
    assert forcing.sent("free", {}, {"free": 3}) == -1


def test_what_no_output_depends_on_is_no_decision() -> None:
    text = IFS.replace("y = If (up2)", "unread = If (up2)").replace("(float[2] y)", "(float[2] b)")
    made = model_from_text(text)
    graphs.name_control_flow(made)
    assert "If of unread" not in {decision.name for decision in decisions(made)}


@pytest.mark.parametrize("seed", range(8))
def test_unforced_a_model_is_what_it_was(seed: int) -> None:
    nest = Nest(seed)
    plain = create_session(nest.model.SerializeToString(), optimized=False)
    made = ir.from_proto(nest.model)
    graphs.name_control_flow(made)
    names = force(made)
    forced = create_session(ir.to_proto(made).SerializeToString(), optimized=False)
    for feeds in nest.feeds(4):
        wanted, found = run(plain, feeds), run(forced, {**feeds, **sent(names, {})})
        assert all(np.array_equal(wanted[name], found[name], equal_nan=True) for name in wanted)


def test_a_decision_that_stands_in_two_places_has_one_input() -> None:
    """As in a part that a pass has copied into both branches of an If."""
    made = model_from_text(IFS)
    inner = next(node for node in graphs.all_nodes(made) if node.outputs[0].name == "q" and node.op_type == "If")
    inner.name = made.graph[-1].name = "same"
    names = force(made)
    assert names.count("same") == 1
    found = create_session(ir.to_proto(made).SerializeToString(), optimized=False)
    x = np.array([1.0, -3.0], np.float32)
    feeds = {"x": x, "c": np.array(False)}
    made_of = {goes: run(found, {**feeds, **sent(names, {"same": goes})})["y"] for goes in (0, 1)}
    np.testing.assert_array_equal(made_of[0], np.abs(x))
    np.testing.assert_allclose(made_of[1], np.exp(x) + x, rtol=1e-6)


def test_the_course_sends_and_remembers() -> None:
    course = Forced({"a": 1, "l": 2})
    assert course.branch("a", False) and not course.branch("b", False) and course.branch("b", True)
    assert [course.turn("l", number, False) for number in range(3)] == [True, True, False]
    assert course.sides == {"a": {True}, "b": {True, False}}
    assert course.turns == {"l": {2}}


def test_names_are_kept_where_they_can_be_and_made_alike_where_not() -> None:
    def named(*names: str) -> list[str]:
        made = model_from_text(IFS)
        nodes = [node for node in graphs.all_nodes(made) if node.op_type == "If"]
        for node, name in zip(nodes, names, strict=True):
            node.name = name
        graphs.name_control_flow(made)
        return [node.name or "" for node in nodes]

    assert named("a", "b", "c", "d") == ["a", "b", "c", "d"]
    assert named("gate", "gate", "", "gate_1") == ["gate", "gate_2", "If of y", "gate_1"]
    assert named("", "If of a", "x", "x") == ["If of a_1", "If of a", "x", "x_1"]


ENDLESS = f"""
{HEAD}
g (int64 start, bool go) => (int64 last, int64[turns] counts) {{
    one = Constant <value = int64 {{1}}> ()
    many = Constant <value = int64 {{5}}> ()
    last, counts = Loop (, go, start) <body = l (int64 i, bool was, int64 n) => (bool again, int64 after, int64 seen) {{
        odd = Less (n, start)
        after = If (odd) <then_branch = t () => (int64 p) {{ p = Identity (n) }},
                          else_branch = e () => (int64 q) {{ q = Add (n, one) }}>
        again = Less (after, many)
        seen = Identity (after)
    }}>
}}
"""


def test_a_loop_that_what_is_forced_makes_endless_ends() -> None:
    """Sent to `then`, nothing is counted; both sides stop after the same number of turns."""
    made, names, _ = session(ENDLESS)
    feeds = {"start": np.array(0), "go": np.array(True)}
    assert len(run(made, {**feeds, **sent(names, {})})["counts"]) == 5
    stuck = run(made, {**feeds, **sent(names, {"If of after": 1})})
    assert stuck["last"] == 0 and len(stuck["counts"]) == FREE_TURNS
    course = Forced({"If of after": 1})
    assert [course.turn("Loop of last", number, True) for number in (0, FREE_TURNS - 1, FREE_TURNS)] == [
        True,
        True,
        False,
    ]
    long = {"start": np.array(5 - 3 * FREE_TURNS), "go": np.array(True)}
    assert len(run(made, {**long, **sent(names, {})})["counts"]) == 3 * FREE_TURNS  # not forced: as long as it takes
