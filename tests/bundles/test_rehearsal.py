"""A bundle against its network on every way: what is wrong where no input leads is found, what was tried is told."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.bundles import Split, read_bundle, split, write_bundle
from graphopt.bundles.forcing import decisions
from graphopt.bundles.plan import Branch, Loop, walk
from graphopt.bundles.rehearsal import rehearse
from graphopt.bundles.sending import Outcome, Rehearsal
from graphopt.errors import BadInput
from graphopt.shapes import infer_shapes
from graphopt.verification import runnable
from graphopt.verification.whole import make_reference, narrow_feeds
from tests.models.nests import Nest
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'

GATES = f"""
{HEAD}
g (float[2] x) => (float[2] y, float[t, 2] rows) {{
    top = ReduceMax <keepdims = 0> (x)
    thousand = Constant <value = float {{1000}}> ()
    large = Greater (top, thousand)
    a = If (large) <
        then_branch = t () => (float[2] p) {{
            even = Greater (thousand, top)
            p = If (even) <
                then_branch = t1 () => (float[2] r) {{ r = Exp (x) }},
                else_branch = e1 () => (float[2] k) {{ k = Neg (x) }}>
        }},
        else_branch = e () => (float[2] q) {{ q = Abs (x) }}>
    three = Constant <value = int64 {{3}}> ()
    y, rows = Loop (three, , a) <body = b (int64 i, bool go, float[2] s) => (bool more, float[2] after, float[2] row) {{
        more = Identity (go)
        after = Sin (s)
        row = Cos (s)
    }}>
}}
"""


def network(text: str) -> ir.Model:
    made = model_from_text(text)
    graphs.name_control_flow(made)
    infer_shapes(made)
    return made


def compare(
    text: str,
    bundle: Path,
    *,
    spoil: Callable[[Split], object] = lambda parts: None,
    keep: Callable[[ir.Node], bool] = lambda node: False,
    feeds: list[dict[str, Any]] | None = None,
    **how: Any,
) -> Outcome:
    """Split a network, change something, and compare."""
    parts = split(network(text), keep=keep)
    spoil(parts)
    write_bundle(parts, bundle)
    return judged(text, bundle, feeds, **how)


def judged(text: str, bundle: Path, feeds: list[dict[str, Any]] | None = None, **how: Any) -> Outcome:
    cases = feeds or [{"x": np.array([0.5, -0.25], np.float32)}, {"x": np.array([3.0, 1.0], np.float32)}]
    model = network(text)
    preparation = runnable.prepare(model)
    reference = make_reference(model, narrow_feeds(cases, preparation), preparation=preparation)
    return rehearse(reference, lambda: network(text), bundle, **{"bitwise": True, **how})


def operator(parts: Split, old: str, new: str) -> None:
    """Another operator in the place of one, in whichever block has it."""
    (found,) = [node for block in parts.blocks.values() for node in graphs.all_nodes(block) if node.op_type == old]
    found.op_type = new


def test_what_was_tried_is_told(tmp_path: Path) -> None:
    found = compare(GATES, tmp_path / "b")
    assert found.differences == []
    assert found.at is None
    assert found.ways.sides == {
        "If of a": {"then": "forced", "else": "inputs"},
        "If of p": {"then": "forced", "else": "forced"},
    }
    assert found.ways.turns == {"Loop of y": {"inputs": [3], "forced": [0, 1]}}
    assert found.ways.tried == 2 + 2 + 3 + 1  # all to `then` is the way of the inner If
    assert (found.ways.free, found.ways.inside, found.ways.failing, found.ways.refused) == ([], [], {}, "")


@pytest.mark.parametrize(
    ("old", "new", "way"),
    [
        ("Exp", "Tanh", "forced If of a = 1: output y"),
        ("Neg", "Abs", "forced If of a = 1, If of p = 0: output y"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_wrong_where_no_input_leads(old: str, new: str, way: str, kept: bool, tmp_path: Path) -> None:
    """In a branch inside one that is never taken, as a step of the plan and inside a block."""
    keep = (lambda node: node.op_type == "If") if kept else (lambda node: False)
    found = compare(GATES, tmp_path / "b", spoil=lambda parts: operator(parts, old, new), keep=keep)
    assert found.differences and found.differences[0].startswith(way)
    assert all(line.startswith("forced") for line in found.differences)
    assert found.at is not None and found.at.forced
    assert found.worst.max_abs == 0 < found.forced.max_abs
    if kept:
        assert found.ways.inside == ["If of a", "If of p"]


def test_what_is_wrong_on_the_inputs_themselves(tmp_path: Path) -> None:
    found = compare(GATES, tmp_path / "b", spoil=lambda parts: operator(parts, "Abs", "Neg"))
    assert found.differences[0].startswith("output y, case 0: ")
    assert found.at is None


def test_a_loop_without_turns_gives_what_the_network_gives(tmp_path: Path) -> None:
    def spoil(parts: Split) -> None:
        (loop,) = [step for step in walk(parts.plan.steps) if isinstance(step, Loop)]
        loop.stacks[0].part.shape = [7]

    found = compare(GATES, tmp_path / "b", spoil=spoil)
    assert found.differences
    assert all(line.startswith("forced Loop of y = 0: output rows") for line in found.differences)


def test_a_plan_with_its_sides_swapped(tmp_path: Path) -> None:
    def spoil(parts: Split) -> None:
        inner = next(step for step in walk(parts.plan.steps) if isinstance(step, Branch) and step.branch == "If of p")
        inner.then, inner.otherwise = inner.otherwise, inner.then
        inner.gives = {name: (other, one) for name, (one, other) in inner.gives.items()}

    assert compare(GATES, tmp_path / "b", spoil=spoil).differences


ROUNDING = f"""
{HEAD}
g (float[2] x) => (float[2] y) <float[2] w> {{
    top = ReduceMax <keepdims = 0> (x)
    thousand = Constant <value = float {{1000}}> ()
    large = Greater (top, thousand)
    y = If (large) <
        then_branch = t () => (float[2] p) {{ v = Mul (x, w) p = Mul (v, w) }},
        else_branch = e () => (float[2] q) {{ q = Abs (x) }}>
}}
"""


def test_rounding_is_measured_against_float64(tmp_path: Path) -> None:
    def spoil(parts: Split) -> None:
        """(x w) w as x (w w), which rounds otherwise."""
        (block,) = [one for one in parts.blocks.values() if [n.op_type for n in one.graph] == ["Mul", "Mul"]]
        first, second = block.graph
        weight = first.inputs[1]
        first.replace_input_with(0, weight)
        second.replace_input_with(1, block.graph.inputs[0])

    cases = [{"x": np.random.default_rng(1).standard_normal(2).astype(np.float32)} for _ in range(2)]
    assert compare(ROUNDING, tmp_path / "one", spoil=spoil, feeds=cases).differences
    assert not compare(ROUNDING, tmp_path / "two", spoil=spoil, feeds=cases, bitwise=False).differences


FAILING = f"""
{HEAD}
g (float[3] x, int64 n) => (float[1] y) {{
    zero = Constant <value = float[1] {{0}}> ()
    y = Loop (n, , zero) <body = b (int64 i, bool go, float[1] s) => (bool again, float[1] after) {{
        again = Identity (go)
        axis = Constant <value = int64[1] {{0}}> ()
        at = Unsqueeze (i, axis)
        part = Gather (x, at)
        after = Add (s, part)
    }}>
}}
"""


def test_ways_on_which_the_network_itself_fails_do_not_count(tmp_path: Path) -> None:
    feeds = [{"x": np.arange(3, dtype=np.float32), "n": np.array(3, np.int64)}]
    found = compare(FAILING, tmp_path / "b", feeds=feeds)
    assert not found.differences
    assert list(found.ways.failing) == ["forced Loop of y = 4"]
    assert "out of" in found.ways.failing["forced Loop of y = 4"]
    assert found.ways.turns == {"Loop of y": {"inputs": [3], "forced": [0, 1]}}
    assert found.ways.tried == 2


def test_a_block_that_fails_where_the_network_does_not(tmp_path: Path) -> None:
    def spoil(parts: Split) -> None:
        (block,) = [one for one in parts.blocks.values() if any(n.op_type == "Exp" for n in one.graph)]
        (node,) = block.graph
        axis = ir.Value(name="axis", const_value=ir.tensor(np.array([9]), name="axis"))
        block.graph.register_initializer(axis)
        node.op_type = "Squeeze"
        node.resize_inputs(2)
        node.replace_input_with(1, axis)

    found = compare(GATES, tmp_path / "b", spoil=spoil)
    assert any("the bundle fails" in line for line in found.differences)


def test_decisions_that_are_gone_are_checked_as_they_fall(tmp_path: Path) -> None:
    """The bundle of a network without the inner If: right on the inputs, and forced only where both can go."""
    text = GATES.replace(
        """p = If (even) <
                then_branch = t1 () => (float[2] r) { r = Exp (x) },
                else_branch = e1 () => (float[2] k) { k = Neg (x) }>""",
        "p = Neg (x)",
    )
    assert text != GATES
    write_bundle(split(network(text)), tmp_path / "b")
    found = judged(GATES, tmp_path / "b")
    # Forced to `then`, the network asks whether the top is below 1000, which it is: Exp. That shows.
    assert found.ways.free == ["If of p"]
    assert found.differences[0].startswith("forced If of a = 1: output y")


MERGED = f"""
{HEAD}
g (float[2] x, bool c) => (float[2] y) {{
    a = If (c) <
        then_branch = t () => (float[2] p) {{ p = Neg (x) }},
        else_branch = e () => (float[2] q) {{ q = Abs (x) }}>
    n = Not (c)
    y = %s
}}
"""
LATER = """If (n) <
        then_branch = t2 () => (float[2] r) { r = Exp (a) },
        else_branch = e2 () => (float[2] s) { s = Sin (a) }>"""


@pytest.mark.parametrize("c", [True, False])
def test_a_decision_that_was_merged_or_became_a_choice_of_values(c: bool, tmp_path: Path) -> None:
    feeds = [{"x": np.array([1.0, -2.0], np.float32), "c": np.array(c)}]
    text = MERGED % LATER
    # One If does both: where it goes, the other went.
    both = text.replace("p = Neg (x)", "u = Neg (x) p = Sin (u)").replace("q = Abs (x)", "v = Abs (x) q = Exp (v)")
    both = both.replace("y = " + LATER, "y = Identity (a)")
    write_bundle(split(network(both)), tmp_path / "merged")
    assert not judged(text, tmp_path / "merged", feeds).differences
    # Both values are computed, and the condition itself chooses: that If is not forced.
    chosen = MERGED % "Where (n, r, s)"
    chosen = chosen.replace("    y = ", "    r = Exp (a)\n    s = Sin (a)\n    y = ")
    write_bundle(split(network(chosen)), tmp_path / "chosen")
    assert not judged(text, tmp_path / "chosen", feeds).differences
    # Neither: it is wrong.
    wrong = both.replace("p = Sin (u)", "p = Cos (u)").replace("q = Exp (v)", "q = Tan (v)")
    write_bundle(split(network(wrong)), tmp_path / "wrong")
    assert judged(text, tmp_path / "wrong", feeds).differences


@pytest.mark.parametrize("shape", ["", "[1]"])
@pytest.mark.parametrize("keep", [False, True])
def test_conditions_of_one_element_and_of_none(shape: str, keep: bool, tmp_path: Path) -> None:
    text = MERGED % LATER
    text = text.replace("bool c", f"bool{shape} c")
    feeds = [
        {"x": np.array([1.0, -2.0], np.float32), "c": np.full([1] if shape else [], value)} for value in (0 > 1, 1 > 0)
    ]
    found = compare(text, tmp_path / "b", feeds=feeds, keep=lambda node: keep)
    assert not found.differences
    assert found.ways.tried == 2  # one condition


def test_nan_in_a_condition(tmp_path: Path) -> None:
    """NaN is neither greater nor not: it goes where the runtime goes."""
    nan = [{"x": np.array([np.nan, 1.0], np.float32)}, {"x": np.array([np.nan, np.nan], np.float32)}]
    assert not compare(GATES, tmp_path / "b", feeds=nan).differences
    cast = GATES.replace("large = Greater (top, thousand)", "large = Cast <to = 9> (top)")
    found = compare(cast, tmp_path / "c", feeds=nan)
    assert not found.differences
    assert found.ways.sides["If of a"]["then"] == "inputs"  # as a boolean, NaN is true


def test_random_numbers_compare_by_their_shapes(tmp_path: Path) -> None:
    text = GATES.replace("k = Neg (x)", "k = RandomNormalLike (x)").replace("q = Abs (x)", "q = RandomNormalLike (x)")
    assert not compare(text, tmp_path / "b").differences


def test_narrow_floats_that_nothing_here_runs_go_as_float32(tmp_path: Path) -> None:
    text = GATES.replace("float[2] x", "bfloat16[2] x").replace(
        "(float[2] y, float[t, 2]", "(bfloat16[2] y, bfloat16[t, 2]"
    )
    text = text.replace("float[2]", "bfloat16[2]").replace("value = float {1000}", "value = float {1000}")
    text = text.replace("thousand = Constant", "wide = Constant").replace(
        "large =", "thousand = Cast <to = 16> (wide) large ="
    )
    text = text.replace("bbfloat16", "bfloat16")
    feeds = [{"x": np.array([0.5, -0.25], np.float32).astype(ir.DataType.BFLOAT16.numpy())}]
    found = compare(text, tmp_path / "b", feeds=feeds)
    assert not found.differences
    assert found.ways.sides["If of p"] == {"then": "forced", "else": "forced"}
    assert found.ways.turns["Loop of y"]["forced"] == [0, 1]


def test_an_operator_that_nothing_here_knows(tmp_path: Path) -> None:
    text = GATES.replace('["" : 18]', '["" : 18, "mine" : 1]').replace("a = If", "z = mine.Op (x)\n    a = If")
    made = network(text.replace("q = Abs (x)", "q = Abs (z)"))
    value = next(node.outputs[0] for node in made.graph if node.domain == "mine")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    write_bundle(split(made), tmp_path / "b")
    reference = make_reference(network(GATES), [{"x": np.ones(2, np.float32)}])
    reference.preparation.opaque.append("Op_1")
    with pytest.raises(BadInput, match="ONNX Runtime does not know Op_1"):
        rehearse(reference, lambda: network(GATES), tmp_path / "b", bitwise=True)


def check_nest(nest: Nest, folder: Path, keep: Callable[[ir.Node], bool]) -> Outcome:
    content = nest.model.SerializeToString()

    def fresh() -> ir.Model:
        made = ir.from_proto(onnx.load_from_string(content))
        graphs.name_control_flow(made)
        infer_shapes(made)
        return made

    reference = make_reference(fresh(), list(nest.feeds(2)))
    write_bundle(split(fresh(), keep=keep), folder)
    found = rehearse(reference, fresh, folder, bitwise=True)
    assert not found.differences
    assert found.ways.tried > 0 or not decisions(fresh())
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_nests_every_way(seed: int, tmp_path: Path) -> None:
    some = lambda node: seed % 3 == 0 and zlib.crc32((node.name or "").encode()) % 2 == 0  # noqa: E731
    check_nest(Nest(seed), tmp_path / "b", some)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12, 132, 20))
def test_more_random_nests_every_way(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 20):
        check_nest(Nest(seed, depth=2 + seed % 3), tmp_path / str(seed), lambda node: False)


@pytest.mark.parametrize("kept", [False, True])
def test_an_old_network_is_checked_on_its_inputs_alone(kept: bool, tmp_path: Path) -> None:
    text = """
    <ir_version: 4, opset_import: ["" : 8]>
    g (float[2] x, bool c) => (float[2] y) {
        a = Neg (x)
        y = If (c) <then_branch = t () => (float[2] p) { p = Exp (a) },
                    else_branch = e () => (float[2] q) { q = Abs (a) }>
    }"""
    feeds = [{"x": np.ones(2, np.float32), "c": np.array(True)}]
    found = compare(text, tmp_path / "b", feeds=feeds, keep=lambda node: kept)
    assert not found.differences
    assert found.ways.refused == "opset 8 has no operators to force decisions with"
    assert found.ways.tried == 0


def test_a_rehearsal_goes_where_it_is_sent(tmp_path: Path) -> None:
    parts = split(network(GATES), keep=lambda node: node.name == "If of p")
    write_bundle(parts, tmp_path / "b")
    run = Rehearsal(tmp_path / "b", optimized=True)
    assert run.names == {"If of a", "If of p", "Loop of y"}
    x = np.array([0.5, -0.25], np.float32)
    made = run.run({"x": x}, {"If of a": 1, "If of p": 0, "Loop of y": 2})
    np.testing.assert_allclose(made["y"], np.sin(np.sin(-x)), rtol=1e-6)
    assert made["rows"].shape == (2, 2)
    np.testing.assert_allclose(run.run({"x": x})["y"], np.sin(np.sin(np.sin(np.abs(x)))), rtol=1e-6)
    assert read_bundle(tmp_path / "b")[1] == parts.plan  # forced inputs are not written
