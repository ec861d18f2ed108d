"""Straight lines for paths: they compute what the network does, on every input, and nothing runs that must not."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import graphs
from graphopt.bundles import BundleRunner, read_bundle, split, write_bundle
from graphopt.bundles.merge import merge_bundle
from graphopt.bundles.plan import Branch, Plan, Run, walk
from graphopt.bundles.profile import Counts
from graphopt.bundles.rehearsal import rehearse
from graphopt.bundles.sending import Outcome, on_lines
from graphopt.bundles.specialised import Unfit, early_decisions, specialise
from graphopt.bundles.trails import goes, trails
from graphopt.runtime.session import create_session, run
from graphopt.shapes import infer_shapes
from graphopt.verification import runnable
from graphopt.verification.whole import make_reference, narrow_feeds
from tests.models.nests import Nest
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'

# Two gates, of which the second one waits for the first; an If in a side; a loop behind them.
GATES = f"""
{HEAD}
g (float[2, 4] x) => (float[2, 4] y, float[2, 4] z) <float[4, 4] w> {{
    zero = Constant <value = float {{0}}> ()
    top = ReduceMax <keepdims = 0> (x)
    one = Greater (top, zero)
    a = If (one) <
        then_branch = t () => (float[2, 4] p) {{ o = MatMul (x, w) p = Tanh (o) }},
        else_branch = e () => (float[2, 4] q) {{
            low = ReduceMin <keepdims = 0> (x)
            two = Greater (low, zero)
            q = If (two) <
                then_branch = t1 () => (float[2, 4] r) {{ r = Exp (x) }},
                else_branch = e1 () => (float[2, 4] k) {{ k = Neg (x) }}>
        }}>
    peak = ReduceMax <keepdims = 1> (a)
    half = Constant <value = float {{0.5}}> ()
    far = Greater (peak, half)
    alone = Squeeze (far)
    b = If (alone) <
        then_branch = t2 () => (float[2, 4] u) {{ u = Identity (a) }},
        else_branch = e2 () => (float[2, 4] v) {{ v = Abs (a) }}>
    three = Constant <value = int64 {{3}}> ()
    y = Loop (three, , b) <body = l (int64 i, bool go, float[2, 4] s) => (bool more, float[2, 4] after) {{
        more = Identity (go)
        after = Sin (s)
    }}>
    z = Relu (x)
}}
"""
ONE, TWO, THREE = "If of a", "If of q", "If of b"


def network(text: str) -> ir.Model:
    made = model_from_text(text)
    graphs.make_names_unique(made)
    graphs.name_control_flow(made)
    infer_shapes(made)
    return made


def with_lines(made: ir.Model, *paths: Mapping[str, bool]) -> ir.Model:
    specialise(made, paths)
    return made


def outputs_of(model: ir.Model, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    session = create_session(ir.to_proto(model).SerializeToString(), optimized=False, threads=1)
    return [run(session, feed) for feed in feeds]


def same_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


def rows(*firsts: float) -> list[dict[str, np.ndarray]]:
    """Two samples each, of which none decides for itself."""
    return [{"x": np.array([[first, -0.5, 0.25, -1], [0.2, -0.5, -1, -2]], np.float32)} for first in firsts]


def line_of(plan: Plan) -> Branch:
    (line,) = [step for step in walk(plan.steps) if isinstance(step, Branch) and step.path]
    return line


# -- the same as the network -------------------------------------------------------------------------------------------


def nest_against_its_line(seed: int, folder: Path) -> bool:
    """Compare a random nest with itself with lines for random parts of paths that inputs take, on every input.

    Whether there was anything to compare.
    """
    nest, draw = Nest(seed), random.Random(seed)
    feeds, content = nest.feeds(6), nest.model.SerializeToString()  # what is read shares the names of weights

    def load() -> ir.Model:
        made = ir.from_proto(onnx.load_model_from_string(content))
        graphs.make_names_unique(made)
        graphs.name_control_flow(made)
        return made

    found_ways = trails(load(), feeds)
    drawn = [[*trail.items()] for trail in draw.sample(found_ways, draw.randint(1, 2))]
    paths = [dict(trail[: draw.randint(1, len(trail))]) for trail in drawn if trail]
    if not paths:
        return False
    made = load()
    try:
        specialise(made, paths)
    except Unfit:
        return False
    expected = outputs_of(load(), feeds)
    for found, wanted in zip(outputs_of(made, feeds), expected, strict=True):
        same_bits(found, wanted)
    write_bundle(split(made), folder)
    runner = BundleRunner(folder, 1, optimized=False)
    for feed, wanted in zip(feeds, expected, strict=True):
        same_bits(runner.run(feed), wanted)
    return True


def test_random_nests_are_the_same_on_every_input(tmp_path: Path) -> None:
    compared = sum(nest_against_its_line(seed, tmp_path / f"{seed}") for seed in range(10))
    assert compared >= 6


@pytest.mark.slow
def test_many_random_nests_are_the_same_on_every_input(tmp_path: Path) -> None:
    compared = sum(nest_against_its_line(seed, tmp_path / f"{seed}") for seed in range(10, 150))
    assert compared >= 75


@pytest.mark.parametrize(
    "paths",
    [
        [{ONE: True}],
        [{ONE: False}],
        [{ONE: True, THREE: True}],
        [{ONE: False, TWO: False, THREE: False}],
        [{ONE: False, TWO: False}, {ONE: True, THREE: False}],
    ],
)
def test_every_input_gets_what_the_network_gives(paths: list[dict[str, bool]], tmp_path: Path) -> None:
    """A loop, a nested If and an output around a path."""
    feeds = rows(0.1, 3.0, -0.1, -3.0, float("nan"), float("inf"))
    feeds.append({"x": np.abs(feeds[0]["x"])})
    expected = outputs_of(network(GATES), feeds)
    made = with_lines(network(GATES), *paths)
    for found, wanted in zip(outputs_of(made, feeds), expected, strict=True):
        same_bits(found, wanted)
    write_bundle(split(made), tmp_path / "b")
    counts = Counts()
    runner = BundleRunner(tmp_path / "b", 1, optimized=False, course=counts)
    for feed, wanted in zip(feeds, expected, strict=True):
        same_bits(runner.run(feed), wanted)
    ways = trails(network(GATES), feeds)
    lines = [step for step in walk(read_bundle(tmp_path / "b")[1].steps) if isinstance(step, Branch) and step.path]
    assert [line.path for line in lines] == paths
    for line, path in zip(lines, paths, strict=True):
        assert counts.profile.branches[line.branch].then == sum(goes(way, path) for way in ways)


def test_nan_in_a_condition_goes_the_way_that_it_goes(tmp_path: Path) -> None:
    """NaN is not greater than anything, so the path to `else` is taken, and by no means both or none."""
    write_bundle(split(with_lines(network(GATES), {ONE: False, TWO: False, THREE: False})), tmp_path / "b")
    counts = Counts()
    runner = BundleRunner(tmp_path / "b", 1, course=counts)
    found = runner.run({"x": np.full((2, 4), np.nan, np.float32)})
    assert np.isnan(found["y"]).all()
    assert (counts.profile.branches["path 1"].then, counts.profile.branches["path 1"].otherwise) == (1, 0)


def condition_of(shape: str) -> str:
    value = "bool" if shape == "[]" else f"bool{shape}"
    return f"""{HEAD} g (float[2, 3] x, {value} c) => (y, z) {{
        y = If (c) <then_branch = t () => (float[2, 3] p) {{ p = Neg (x) }},
                    else_branch = e () => (float[1, 6] q) {{ q = Flatten <axis = 0> (x) }}>
        z = Abs (x)
    }}"""


@pytest.mark.parametrize("shape", ["[]", "[1]", "[1, 1]"])
@pytest.mark.parametrize("side", [True, False])
def test_conditions_with_axes_and_sides_of_other_ranks(shape: str, side: bool, tmp_path: Path) -> None:
    made = model_from_text(condition_of(shape).replace("(y, z)", "(float[r, 3] y, float[2, 3] z)"))
    made.graph.outputs[0].shape = None
    graphs.name_control_flow(made)
    write_bundle(split(with_lines(made, {"If of y": side})), tmp_path / "b")
    runner = BundleRunner(tmp_path / "b", 1)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for truth in (True, False):
        found = runner.run({"x": x, "c": np.full(ast.literal_eval(shape.replace("[]", "()")), truth)})
        np.testing.assert_array_equal(found["y"], -x if truth else x.reshape(1, 6))
        np.testing.assert_array_equal(found["z"], x)


# -- what runs when ----------------------------------------------------------------------------------------------------


def test_a_path_is_one_block_and_the_rest_waits(tmp_path: Path) -> None:
    """One block up to the last condition and one behind it; nothing of the other ways is run, or loaded."""
    path = {ONE: True, THREE: True}
    made = with_lines(network(GATES), path)
    write_bundle(split(made, keep=lambda node: node.op_type == "Loop"), tmp_path / "b")
    plan = read_bundle(tmp_path / "b")[1]
    assert [type(step) for step in plan.steps] == [Run, Branch]
    line = line_of(plan)
    assert [type(step) for step in line.then] == [Run]
    runner = BundleRunner(tmp_path / "b", 1)
    (feed,) = [feed for feed in rows(0.4, 3.0) if goes(trails(network(GATES), [feed])[0], path)][:1]
    runner.run(feed)
    assert [*runner.runs.values()] == [1, 1, *[0] * (len(plan.blocks) - 2)]


POLICY = f"""
{HEAD}
g (float[1, 4] x, bool[2] open) => (float[1, 4] y) <float[4, 4] w> {{
    zero = Constant <value = int64 {{0}}> ()
    first = Gather (open, zero)
    one = Constant <value = int64 {{1}}> ()
    second = Gather (open, one)
    a = If (first) <
        then_branch = t () => (float[1, 4] p) {{ p = MatMul (x, w) }},
        else_branch = e () => (float[1, 4] q) {{ q = Identity (x) }}>
    y = If (second) <
        then_branch = t2 () => (float[1, 4] u) {{ u = MatMul (a, w) }},
        else_branch = e2 () => (float[1, 4] v) {{ v = Identity (a) }}>
}}
"""


def test_what_is_known_beforehand_costs_nothing_on_other_paths(tmp_path: Path) -> None:
    made = network(POLICY)
    assert early_decisions(made, ["If of a", "If of y"]) == ["If of a", "If of y"]
    assert early_decisions(network(GATES), [ONE, TWO, THREE]) == [ONE]
    plan = split(with_lines(made, {"If of a": True, "If of y": True})).plan
    first, line = plan.steps
    assert isinstance(first, Run) and isinstance(line, Branch)
    parts = split(with_lines(network(POLICY), {"If of a": True, "If of y": True}))
    ops = {name: [node.op_type for node in block.graph] for name, block in parts.blocks.items()}
    assert "MatMul" not in ops[first.run]
    assert [*first.makes.values()] == [line.condition]  # all other ways find out by themselves
    assert isinstance(line.otherwise[0], Run) and ops[line.otherwise[0].run].count("Gather") == 2
    (straight,) = line.then
    assert isinstance(straight, Run) and ops[straight.run] == ["MatMul", "MatMul"]


def test_two_lines_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    paths = [{"If of a": True, "If of y": True}, {"If of a": False, "If of y": True}]
    write_bundle(split(with_lines(network(POLICY), *paths)), tmp_path / "b")
    counts = Counts()
    runner = BundleRunner(tmp_path / "b", 1, course=counts)
    for ways in ([True, True], [False, True], [False, True], [True, False]):
        runner.run({"x": np.ones((1, 4), np.float32), "open": np.array(ways)})
    sides = counts.profile.branches
    assert (sides["path 1"].then, sides["path 1"].otherwise) == (1, 3)
    assert (sides["path 2"].then, sides["path 2"].otherwise) == (2, 1)
    assert sides["If of a"].asked == 1


def test_weights_are_there_once(tmp_path: Path) -> None:
    text = POLICY.replace("float[4, 4] w", "float[512, 512] w").replace("[1, 4]", "[1, 512]")
    write_bundle(split(network(text)), tmp_path / "plain")
    write_bundle(split(with_lines(network(text), {"If of a": True, "If of y": True})), tmp_path / "lines")
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).rglob("*.data")) for name in ("plain", "lines")]
    assert sizes[0] == sizes[1] > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def gated(side: str, *, inputs: str = "float[2, 3] x", before: str = "", imports: str = "") -> ir.Model:
    """A gate with something in its side, and another gate that waits for what it gives."""
    head = HEAD.replace("]>", f"{imports}]>")
    return network(f"""{head} g ({inputs}) => (float[2, 3] y) {{
        {before}
        zero = Constant <value = float {{0}}> ()
        top = ReduceMax <keepdims = 0> (x)
        c = Greater (top, zero)
        a = If (c) <then_branch = t () => (float[2, 3] p) {{ {side} }},
                    else_branch = e () => (float[2, 3] q) {{ q = Neg (x) }}>
        low = ReduceSum <keepdims = 0> (a)
        d = Greater (low, zero)
        y = If (d) <then_branch = t2 () => (float[2, 3] r) {{ r = Exp (a) }},
                    else_branch = e2 () => (float[2, 3] s) {{ s = Tanh (a) }}>
    }}""")


BOTH = {"If of a": True, "If of y": True}


@pytest.mark.parametrize(
    ("side", "why"),
    [
        ("n = RandomNormalLike (x) p = Add (x, n)", "RandomNormalLike draws random numbers"),
        ("p = other.Thing (x)", "the custom operator Thing"),
    ],
)
@pytest.mark.parametrize("path", [{"If of a": True}, {"If of a": False}, BOTH])
def test_effects_are_not_there_twice(side: str, why: str, path: dict[str, bool]) -> None:
    made = gated(side, imports=', "other" : 1')
    with pytest.raises(Unfit, match=why):
        specialise(made, [path])


def test_what_no_decision_stands_before_runs_once() -> None:
    """Random numbers too, and all ways see the same ones."""
    made = gated("p = Tanh (x)", before="n = RandomNormalLike (x) x0 = Add (x, n)")
    for node in made.graph:
        if node.op_type == "ReduceMax":
            node.replace_input_with(0, next(n for n in made.graph if n.op_type == "Add").outputs[0])
    specialise(made, [BOTH])
    assert sum(node.op_type == "RandomNormalLike" for node in graphs.all_nodes(made)) == 1


@pytest.mark.parametrize(
    "side",
    [
        # an index that is not there, a whole number divided by 0, a shape that the condition may depend on, a loop
        "i = Cast <to = 7> (top) g0 = Gather (x, i) p = Add (x, g0)",
        "i = Cast <to = 7> (x) o = Div (i, i) p = Cast <to = 1> (o)",
        "k = Cast <to = 7> (x) k0 = Shape (k) i = Cast <to = 7> (top) l = Add (k0, i) p = Reshape (x, l)",
        """two = Constant <value = int64 {2}> ()
        p = Loop (two, , x) <body = l (int64 i, bool go, float[2, 3] s) => (bool on, float[2, 3] n) {
            on = Identity (go) n = Sin (s) }>""",
    ],
)
def test_what_may_fail_is_not_run_before_it_is_wanted(side: str) -> None:
    with pytest.raises(Unfit, match="would run before it is known that it is wanted, and may fail there"):
        specialise(gated(side), [BOTH])
    specialise(gated(side), [{"If of a": True}])  # where nothing waits for it, it is behind the question


def test_unknown_sizes_that_sides_may_depend_on() -> None:
    """Rows may be as many as they are; other axes have to be known, since an If may be there for their sake."""
    text = f"""{HEAD} g (float[ROWS, COLUMNS] x) => (float[ROWS, COLUMNS] y) <float[3, 3] w> {{
        zero = Constant <value = float {{0}}> ()
        top = ReduceMax <keepdims = 0> (x)
        c = Greater (top, zero)
        a = If (c) <then_branch = t () => (float[ROWS, COLUMNS] p) {{ p = Neg (x) }},
                    else_branch = e () => (float[ROWS, COLUMNS] q) {{ q = MatMul (x, w) }}>
        low = ReduceSum <keepdims = 0> (a)
        d = Greater (low, zero)
        y = If (d) <then_branch = t2 () => (float[ROWS, COLUMNS] r) {{ r = Exp (a) }},
                    else_branch = e2 () => (float[ROWS, COLUMNS] s) {{ s = Tanh (a) }}>
    }}"""
    specialise(network(text.replace("ROWS", "n").replace("COLUMNS", "3")), [{"If of a": False, "If of y": True}])
    specialise(network(text.replace("ROWS", "2").replace("COLUMNS", "3")), [{"If of a": False, "If of y": True}])
    with pytest.raises(Unfit, match="may fail there"):
        specialise(network(text.replace("ROWS", "n").replace("COLUMNS", "m")), [{"If of a": False, "If of y": True}])


def test_a_condition_of_unknown_size() -> None:
    text = condition_of("[n]").replace("(y, z)", "(float[r, 3] y, float[2, 3] z)")
    with pytest.raises(Unfit, match="the condition 'c' is not known to have one element"):
        specialise(network(text), [{"If of y": True}])


@pytest.mark.parametrize("path", [{}, {"nobody": True}, {TWO: True}])
def test_a_path_that_asks_for_nothing(path: dict[str, bool]) -> None:
    """The last one is in a side of an If that the path leaves open."""
    with pytest.raises(Unfit, match="no "):
        specialise(network(GATES), [path])


def test_an_opset_that_is_too_old() -> None:
    made = network(POLICY)
    made.opset_imports[""] = 6
    with pytest.raises(Unfit, match="opset 6"):
        specialise(made, [{"If of a": True}])


def test_a_path_that_no_input_goes() -> None:
    text = POLICY.replace("y = If (second)", "y = If (first)")
    with pytest.raises(Unfit, match="no input goes this way"):
        specialise(network(text), [{"If of a": True, "If of y": False}])


# -- verified, merged, drawn -------------------------------------------------------------------------------------------


def judged(bundle: Path, text: str = GATES, feeds: Sequence[Mapping[str, Any]] = ()) -> Outcome:
    model = network(text)
    preparation = runnable.prepare(model)
    reference = make_reference(model, narrow_feeds(list(feeds) or rows(0.1, 3.0), preparation), preparation=preparation)
    return rehearse(reference, lambda: network(text), bundle, bitwise=True)


@pytest.mark.parametrize("kept", [False, True])
def test_every_way_is_forced_and_the_line_as_well(kept: bool, tmp_path: Path) -> None:
    """Inputs that never go the path: it is verified all the same, by force."""
    path = {ONE: False, TWO: True, THREE: True}
    made = with_lines(network(GATES), path)
    write_bundle(split(made, keep=lambda node: kept and not graphs.path_of(node)), tmp_path / "b")
    found = judged(tmp_path / "b")
    assert found.differences == []
    assert found.ways.sides["path 1"] == {"then": "forced", "else": "inputs"}
    assert found.ways.failing == {} and found.ways.free == []


@pytest.mark.parametrize(
    ("where", "path"), [("then", {ONE: False, TWO: True}), ("otherwise", {ONE: False, TWO: True, THREE: True})]
)
def test_a_wrong_side_is_found(where: str, path: dict[str, bool], tmp_path: Path) -> None:
    """Another operator in the straight line, or in what stands for all other ways: where no input leads."""
    parts = split(with_lines(network(GATES), path))
    steps = getattr(line_of(parts.plan), where)
    for step in walk(steps):
        if isinstance(step, Run):
            for node in parts.blocks[step.run].graph:
                node.op_type = "Cos" if node.op_type == "Exp" else node.op_type
    write_bundle(parts, tmp_path / "b")
    found = judged(tmp_path / "b")
    assert found.differences and all(line.startswith("forced") for line in found.differences)
    assert f"{TWO} = 1" in found.differences[0]


def test_ways_of_the_network_are_ways_of_its_lines() -> None:
    paths = {"path 1": {"a": True, "b": False}}
    assert on_lines({}, paths) == {}
    assert on_lines({"a": 1, "b": 0}, paths)["path 1"] == 1
    assert on_lines({"a": 1}, paths)["path 1"] == 0  # the other may go elsewhere
    sent = on_lines({"a": 1, "b": 0, "steps": 3}, paths)
    assert (sent["path 1"], sent["steps on path 1"]) == (1, 3)


def test_merged_and_split_again(tmp_path: Path) -> None:
    write_bundle(split(with_lines(network(GATES), {ONE: True, THREE: True})), tmp_path / "b")
    merged = merge_bundle(tmp_path / "b")
    feeds = rows(0.1, 3.0, -1.0)
    for found, wanted in zip(outputs_of(merged, feeds), outputs_of(network(GATES), feeds), strict=True):
        same_bits(found, wanted)
    ir.save(merged, tmp_path / "merged.onnx")
    report = graphopt.verify(tmp_path / "merged.onnx", tmp_path / "b", bitwise=True)
    assert report.passed, report.reason
    assert report.verification.coverage["ways"]["sides"]["path 1"].keys() == {"then", "else"}
    again = split(merged).plan
    assert line_of(again).path == {ONE: True, THREE: True}
    assert [type(step) for step in walk(again.steps)] == [
        type(step) for step in walk(read_bundle(tmp_path / "b")[1].steps)
    ]
