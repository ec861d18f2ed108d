"""Plans that no host can follow are told when they are read: one line, with the step."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.bundles import BundleRunner, read_bundle, split, write_bundle
from graphopt.bundles.checks import check_plan
from graphopt.bundles.plan import Block, Plan, Port, Run
from graphopt.bundles.samples import for_samples
from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.session import create_session, run
from tests.bundles.samples.test_control import EXITS, TURNS
from tests.bundles.test_split import corpus
from tests.models.nests import Nest
from tests.models.text import model_from_text

NET = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2, 3] x, bool c, int64 trips) => (float[2, 3] y, float[n, 3] all, float[2, 3] last) {
    a = Neg (x)
    b = If (c) <
        then_branch = t () => (float[2, 3] p) { p = Abs (a) },
        else_branch = e () => (float[2, 3] q) { q = Exp (a) }
    >
    y, all = Loop (trips, c, b) <body = l (int64 i, bool go, float[2, 3] s)
        => (bool again, float[2, 3] after, float[3] part)
    {
        zero = Constant <value = int64 {0}> ()
        part = Gather (s, zero)
        number = Cast <to = 1> (i)
        after = Add (s, number)
        four = Constant <value = int64 {4}> ()
        again = Less (i, four)
    }>
    last = Scan <num_scan_inputs = 1, body = m (float[2, 3] u, float[3] row) => (float[2, 3] v) { v = Add (u, row) }>
        (y, x)
}
"""
FEEDS = {"x": np.ones((2, 3), np.float32), "c": np.array(True), "trips": np.array(3, np.int64)}

Json = Any


def plan_of(text: str) -> Json:
    return json.loads(split(model_from_text(text)).plan.to_json())


def refused(content: Json) -> str:
    with pytest.raises(BadInput) as caught:
        check_plan(Plan.model_validate(content), Path("plan.json"))
    assert caught.value.where == "plan.json"
    assert "\n" not in str(caught.value)
    return caught.value.what


def step_of(content: Json, kind: str) -> Json:
    return next(step for step in content["steps"] if kind in step)


def at(*place: str | int) -> Callable[[Json], tuple[Json, str | int]]:
    """What holds a place of a plan, and the last key to it."""

    def find(content: Json) -> tuple[Json, str | int]:
        for key in place[:-1]:
            content = step_of(content, str(key)[1:]) if str(key).startswith(":") else content[key]
        return content, place[-1]

    return find


@pytest.mark.parametrize(
    ("place", "new", "said"),
    [
        (("steps", 0, "run"), "nope", "steps.0: there is no block 'nope'"),
        (("steps", 0, "reads"), {"x": "nope"}, "steps.0: reads 'nope', which is not there"),
        (("steps", 0, "reads"), {"x": "y"}, "steps.0: reads 'y', which is not there"),
        (("steps", 0, "reads"), {"x": "c"}, "steps.0: reads 'c', a tensor(bool), as a tensor(float)"),
        (("steps", 0, "reads"), {}, "the input of 'block_1' 'x' is left out"),
        (("steps", 0, "reads"), {"x": "x", "z": "x"}, "there is no input of 'block_1' 'z'"),
        (("steps", 0, "makes"), {"a": "a", "z": "z"}, "there is no output of 'block_1' 'z'"),
        (("steps", 0, "makes"), {"a": "x"}, "makes 'x', which is made already"),
        (("steps", 0, "makes"), {"a": ""}, "a value without a name"),
        (("steps", 0, "makes"), {}, "for nothing"),
        ((":branch", "if"), "trips", "steps.1: reads 'trips', a tensor(int64), as a tensor(bool)"),
        ((":branch", "if"), "p", "steps.1: reads 'p', which is not there"),
        ((":branch", "gives"), {"b": ["p", "p"]}, "steps.1.else: reads 'p', which is not there"),
        ((":branch", "gives"), {"b": ["p", "c"]}, "steps.1.else: reads 'c', a tensor(bool)"),
        ((":branch", "gives"), {}, "reads 'b', which is not there"),
        ((":branch", "each"), True, "steps.1: takes samples apart, and nothing has samples"),
        ((":loop", "loop"), "If of b", "the name 'If of b' is given twice"),
        ((":loop", "trips"), "c", "as a tensor(int64)"),
        ((":loop", "trips"), "i", "reads 'i', which is not there"),
        ((":loop", "condition"), "trips", "as a tensor(bool)"),
        ((":loop", "again"), "s", "body: reads 's', a tensor(float), as a tensor(bool)"),
        ((":loop", "again"), "nope", "body: reads 'nope', which is not there"),
        ((":loop", "counter"), None, "reads 'i', which is not there"),
        ((":loop", "counter", "type"), "tensor(float)", "is a tensor(float), and not a tensor(int64)"),
        ((":loop", "counter", "name"), "x", "makes 'x', which is made already"),
        ((":loop", "state", 0, "start"), "c", "reads 'c', a tensor(bool), as a tensor(float)"),
        ((":loop", "state", 0, "start"), "after", "reads 'after', which is not there"),
        ((":loop", "state", 0, "next"), "c", "body: reads 'c', a tensor(bool)"),
        ((":loop", "state", 0, "like", "type"), "tensor(int8)", "as a tensor(int8)"),
        ((":loop", "stacks", 0, "each"), "c", "reads 'c', a tensor(bool)"),
        ((":loop", "stacks", 0, "part", "type"), "tensor(foo)", "the unknown type 'tensor(foo)'"),
        ((":loop", "stacks", 0, "axis"), 1 << 40, "there is no axis"),
        ((":loop", "stacks", 0, "gives"), "b", "makes 'b', which is made already"),
        (("gives", "y"), "after", "gives: reads 'after', which is not there"),
        (("gives", "y"), "c", "gives: reads 'c', a tensor(bool), as a tensor(float)"),
        (("gives",), {"y": "y"}, "gives: the output 'all' is left out"),
        (("gives", "more"), "y", "gives: there is no output 'more'"),
        (("samples",), {"nope": 0}, "samples: there is no value 'nope'"),
        (("samples",), {"a": 0}, "samples: no input has samples"),
        (("samples",), {"x": 0}, "samples: the output 'y' has none"),
        (("samples",), {"x": -1}, "there is no axis -1"),
        (("inputs", 0, "type"), "tensor(double)", "steps.0: reads 'x', a tensor(double)"),
        (("inputs", 0, "type"), "float", "of the unknown type 'float'"),
        (("inputs", 0, "type"), "seq(" * 5000, "of the unknown type"),
        (("inputs", 0, "name"), "c", "inputs: two have the same name"),
        (("outputs", 0, "type"), "tensor(undefined2)", "of the unknown type"),
        (("blocks", "block_1", "inputs", 0, "type"), "tensor()", "blocks.block_1.inputs: 'x' is of the unknown type"),
        (("blocks", "block_1", "backend"), "abacus", "blocks.block_1: is built for 'abacus'"),
    ],
)
def test_what_no_host_can_follow(place: tuple[str | int, ...], new: Json, said: str) -> None:
    content = plan_of(NET)
    check_plan(Plan.model_validate(content), Path("plan.json"))
    holder, key = at(*place)(content)
    holder[key] = new
    assert said in refused(content)


def test_steps_in_another_order() -> None:
    content = plan_of(NET)
    content["steps"].reverse()
    assert "which is not there at this point" in refused(content)


def test_what_is_made_inside_is_not_seen_outside() -> None:
    content = plan_of(NET)
    (inside,) = step_of(content, "branch")["then"]
    later = copy.deepcopy(inside)
    later["reads"] = dict.fromkeys(inside["reads"], "p")
    later["makes"] = {name: f"{name}/later" for name in inside["makes"]}
    content["steps"].append(later)
    assert "steps.4: reads 'p', which is not there" in refused(content)


@pytest.mark.parametrize("seed", range(40))
def test_nests_are_accepted(seed: int) -> None:
    check_plan(split(ir.from_proto(Nest(seed, depth=2 + seed % 3).model)).plan, Path("plan.json"))


def test_control_flow_that_shares_a_name_is_told_apart(tmp_path: Path) -> None:
    network = model_from_text(NET)
    for node in network.graph:
        if node.op_type in ("If", "Loop", "Scan"):
            node.name = "same"
    write_bundle(split(network), tmp_path / "net")
    read_bundle(tmp_path / "net")


@pytest.mark.slow
def test_the_node_corpus_is_accepted() -> None:
    for case in corpus():
        check_plan(split(ir.from_proto(case.model)).plan, Path("plan.json"))


@pytest.mark.parametrize("text", [EXITS, TURNS])
def test_plans_of_samples_are_accepted_and_keep_their_samples(text: str) -> None:
    plan = split(for_samples(model_from_text(text))).plan
    check_plan(plan, Path("plan.json"))
    for name in plan.gives.values():
        content = json.loads(plan.to_json())
        del content["samples"][name]
        assert "has none" in refused(content)
    content = json.loads(plan.to_json())
    for step in content["steps"]:
        step.pop("each", None)
    assert "which has samples, once for all" in refused(content)


def test_a_step_is_looked_at_once() -> None:
    """Long plans, and deep ones: each value is looked up no more often than it is read."""
    asked: list[str] = []

    class Watched(dict[str, str]):
        def items(self) -> Any:
            asked.extend(self)
            return super().items()

    port = [Port(name="v", type="tensor(float)")]
    out = [Port(name="w", type="tensor(float)")]
    steps = [Run(run="b", reads={"v": f"v{i}"}, makes={"w": f"v{i + 1}"}) for i in range(1000)]
    for step in steps:
        step.reads = Watched(step.reads)
    plan = Plan(
        inputs=[Port(name="v0", type="tensor(float)")],
        outputs=out,
        gives={"w": "v1000"},
        blocks={"b": Block(file="b.onnx", inputs=port, outputs=out, nodes=1)},
    )
    plan.steps = list(steps)
    check_plan(plan, Path("plan.json"))
    assert len(asked) == 1000


# -- changed at random -------------------------------------------------------------------------------------------------


def places_in(content: Json) -> Iterator[tuple[Json, Any]]:
    """Each place of JSON: what holds it, and its key."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in list(items):
        yield content, key
        yield from places_in(inner)


def change(content: Json, chance: random.Random) -> None:
    """Some damage that somebody could do by hand: other names, other numbers, things gone, twice or elsewhere."""
    places = list(places_in(content))
    holder, key = chance.choice(places)
    other_holder, other_key = chance.choice(places)
    words = [inner[name] for inner, name in places if isinstance(inner[name], str)]
    how = chance.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1:
        holder[key] = copy.deepcopy(other_holder[other_key])
    elif how == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[chance.randrange(len(holder))]))
    elif how == 3 and isinstance(holder, dict):
        holder[chance.choice(words)] = holder.pop(key)
    elif isinstance(holder[key], str):
        holder[key] = chance.choice(words)
    else:
        holder[key] = chance.choice([None, True, False, -1, 0, 1, 2, 7, 1 << 70, 0.5, "", "x", [], {}])


class Bounded:
    """A course that ends loops; what was changed may turn for ever."""

    def __init__(self) -> None:
        self.ended = False

    def branch(self, name: str, truth: bool) -> bool:
        return truth

    def turn(self, name: str, number: int, truth: bool) -> bool:
        self.ended |= truth and number >= 6
        return truth and number < 6

    def run(self, block: str, makes: object) -> None:
        pass


def check_changed(model: ir.Model, feeds: dict[str, Any], folder: Path, seeds: range) -> None:
    version = write_bundle(split(model), folder / "net")
    before = (version / "plan.json").read_text()
    refusals = 0
    for seed in seeds:
        content, chance = json.loads(before), random.Random(seed)
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            change(content, chance)
        (version / "plan.json").write_text(json.dumps(content))
        try:
            read_bundle(folder / "net")
        except BadInput:
            refusals += 1
            continue
        course = Bounded()
        try:
            BundleRunner(folder / "net", 1, optimized=False, course=course).run(feeds)
            if not course.ended:
                BundleRunner(folder / "net", 1, optimized=False).run(feeds)
        except GraphoptError:
            pass  # what only values tell, such as a shape that does not fit
    assert refusals


@pytest.mark.parametrize("first", [0, 200, 400])
def test_plans_changed_at_random_are_refused_or_run(first: int, tmp_path: Path) -> None:
    check_changed(model_from_text(NET), FEEDS, tmp_path, range(first, first + 200))


@pytest.mark.parametrize("seed", [1, 5, 8])
def test_nests_changed_at_random_are_refused_or_run(seed: int, tmp_path: Path) -> None:
    nest = Nest(seed)
    check_changed(ir.from_proto(nest.model), nest.feeds(1)[0], tmp_path, range(100))


@pytest.mark.parametrize("text", [EXITS, TURNS])
def test_plans_of_samples_changed_at_random_are_refused_or_run(text: str, tmp_path: Path) -> None:
    model = for_samples(model_from_text(text))
    feeds: dict[str, Any] = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else 5 for size in value.shape]
        feeds[value.name or ""] = np.random.default_rng(0).uniform(0, 3, shape).astype(value.dtype.numpy())
    check_changed(model, feeds, tmp_path, range(150))


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("slices", {"axis": 5}, "a value does not fit the plan"),
        ("stacks", {"axis": 9}, "a value does not fit the plan"),
    ],
)
def test_what_only_values_tell_is_one_line(kind: str, part: Json, said: str, tmp_path: Path) -> None:
    version = write_bundle(split(model_from_text(NET)), tmp_path / "net")
    content = json.loads((version / "plan.json").read_text())
    next(step[kind][0] for step in content["steps"] if kind in step).update(part)
    (version / "plan.json").write_text(json.dumps(content))
    with pytest.raises(GraphoptError, match=said):
        BundleRunner(tmp_path / "net").run(FEEDS)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"version":1,"steps":' + '[{"branch":"b","if":"c","then":' * 900 + "[]" + "}]" * 900 + "}"]
)
def test_what_is_nested_too_deep_is_one_line(text: str, tmp_path: Path) -> None:
    version = write_bundle(split(model_from_text(NET)), tmp_path / "net")
    (version / "plan.json").write_text(text)
    with pytest.raises(BadInput, match="plan"):
        read_bundle(tmp_path / "net")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 6000, 500))
def test_more_plans_changed_at_random(first: int, tmp_path: Path) -> None:
    check_changed(model_from_text(NET), FEEDS, tmp_path, range(first, first + 500))


def test_what_is_accepted_is_right(tmp_path: Path) -> None:
    """The network that the damage is done to runs as it should."""
    write_bundle(split(model_from_text(NET)), tmp_path / "net")
    wanted = run(create_session(ir.to_proto(model_from_text(NET)).SerializeToString(), optimized=False), FEEDS)
    found = BundleRunner(tmp_path / "net", optimized=False).run(FEEDS)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
