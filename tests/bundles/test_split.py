"""Networks split at their control flow compute the same, bit by bit, and no control flow is left in a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.bundles.actions import Actions
from graphopt.bundles.backend import Backend
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Branch, Loop, Plan, Run, walk
from graphopt.bundles.split import SPLIT, Split, split
from graphopt.errors import BadInput
from graphopt.runtime.session import create_session, run
from tests.models.nests import Nest
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'


def session_of(parts: Split, name: str) -> Any:
    return create_session(ir.to_proto(parts.blocks[name]).SerializeToString(), optimized=False)


def run_plain(parts: Split, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return Program(parts.plan, PlainBackend(lambda name: session_of(parts, name))).run(feeds)


def run_fast(parts: Split, *many: Mapping[str, Any]) -> list[dict[str, Any]]:
    backend = OrtBackend(lambda name: session_of(parts, name))
    program = Program(parts.plan, backend)
    made = []
    for feeds in many:
        outputs = program.run({name: backend.value(array) for name, array in feeds.items()})
        made.append({name: backend.array(value) for name, value in outputs.items()})
    return made


def same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def check(model: onnx.ModelProto, *many: Mapping[str, Any], plain: bool = False) -> Split:
    """Split a model, run both on some feeds, and compare."""
    reference = create_session(model.SerializeToString(), optimized=False)
    parts = split(ir.from_proto(model))
    left = {node.op_type for block in parts.blocks.values() for node in graphs.all_nodes(block)}
    assert left.isdisjoint(SPLIT)
    assert Plan.model_validate_json(parts.plan.to_json()) == parts.plan
    got = [run_plain(parts, feeds) for feeds in many] if plain else run_fast(parts, *many)
    for feeds, ours in zip(many, got, strict=True):
        theirs = run(reference, feeds)
        assert list(ours) == list(theirs)
        for name in theirs:
            assert same(theirs[name], ours[name]), (name, theirs[name], ours[name])
    return parts


@pytest.mark.parametrize("seed", range(24))
def test_random_nests(seed: int) -> None:
    nest = Nest(seed)
    check(nest.model, *nest.feeds(4), plain=seed % 4 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(24, 524, 50))
def test_more_random_nests(first: int) -> None:
    for seed in range(first, first + 50):
        nest = Nest(seed, depth=2 + seed % 3)
        check(nest.model, *nest.feeds(4))


def corpus() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    def holds(graph: onnx.GraphProto) -> bool:
        return any(
            node.op_type in SPLIT or any(holds(a.g) for a in node.attribute if a.HasField("g")) for node in graph.node
        )

    with np.errstate(all="ignore"):
        return [case for case in collect_testcases() if case.model is not None and holds(case.model.graph)]


def runs_of_the_corpus() -> Iterator[tuple[onnx.ModelProto, dict[str, Any], dict[str, Any], str]]:
    """Network, inputs, what ONNX Runtime makes of them, and the case's name: every case of ONNX's corpus that has
    control flow and that it runs."""
    for case in corpus():
        try:
            reference = create_session(case.model.SerializeToString(), optimized=False)
        except BadInput:
            continue  # a type or opset that the runtime does not have
        for inputs, _ in case.data_sets:
            feeds = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
            yield case.model, feeds, run(reference, feeds), case.name


def test_the_node_corpus() -> None:
    checked = 0
    for model, feeds, theirs, name in runs_of_the_corpus():
        ours = run_plain(split(ir.from_proto(model)), feeds)
        assert all(same(theirs[output], ours[output]) for output in theirs), name
        checked += 1
    assert checked >= 20


LATE = f"""
{HEAD}
g (float[4] x, bool early, bool late) => (float[4] y) <float[4] w = {{1, 2, 3, 4}}> {{
    a = Mul (x, w)
    b = If (early) <
        then_branch = t () => (float[4] p) {{ p = Neg (a) }},
        else_branch = e () => (float[4] q) {{ q = Abs (a) }}>
    c = Mul (b, w)
    free = Tanh (x)
    d = If (late) <
        then_branch = t2 () => (float[4] r) {{ r = Add (c, free) }},
        else_branch = e2 () => (float[4] s) {{ s = Identity (c) }}>
    y = Relu (d)
}}
"""


def test_nodes_go_to_the_first_block_that_can_have_them() -> None:
    x = np.array([1, -2, 3, -4], np.float32)
    feeds = [
        {"x": x, "early": np.array(early), "late": np.array(late)} for early in (True, False) for late in (True, False)
    ]
    parts = check(ir.to_proto(model_from_text(LATE)), *feeds)
    steps = parts.plan.steps
    assert [type(step) for step in steps] == [Run, Branch, Run, Branch, Run]
    first = steps[0]
    assert isinstance(first, Run)
    assert set(first.makes.values()) == {"a", "free"}  # nothing of it waits for a condition


def test_a_branch_that_is_not_taken_is_not_loaded() -> None:
    parts = split(model_from_text(LATE))
    loaded: list[str] = []

    def session(name: str) -> Any:
        loaded.append(name)
        return session_of(parts, name)

    backend: Backend = PlainBackend(session)
    program = Program(parts.plan, backend)
    feeds = {"x": np.ones(4, np.float32), "early": np.array(True), "late": np.array(True)}
    program.run(feeds)
    before = list(loaded)
    assert len(before) < len(parts.blocks)
    program.run({**feeds, "early": np.array(False)})
    assert len(loaded) == len(before) + 1


TWICE = f"""
{HEAD}
g (float[2, 2] x, bool c) => (float[2, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}, float[2, 2] v = {{1, 2, 3, 5}}> {{
    a = If (c) <
        then_branch = t () => (float[2, 2] p) {{ p = MatMul (x, w) }},
        else_branch = e () => (float[2, 2] q) {{ q = MatMul (x, v) }}>
    y = If (c) <
        then_branch = t2 () => (float[2, 2] p) {{ p = MatMul (a, w) }},
        else_branch = e2 () => (float[2, 2] q) {{ q = Neg (a) }}>
}}
"""


def test_identical_blocks_are_stored_once() -> None:
    """The same operators on the same weights; not on others."""
    feeds = [{"x": np.eye(2, dtype=np.float32), "c": np.array(c)} for c in (True, False)]
    parts = check(ir.to_proto(model_from_text(TWICE)), *feeds)
    assert parts.shared == 1
    assert len(parts.blocks) == 3


def test_what_is_kept_stays_in_a_block() -> None:
    model = model_from_text(LATE)
    parts = split(model, keep=lambda node: node.outputs[0].name == "b")
    kinds = [sorted(node.op_type for node in block.graph) for block in parts.blocks.values()]
    assert ["If", "Mul", "Mul", "Tanh"] in kinds
    feeds = {"x": np.array([1, -2, 3, -4], np.float32), "early": np.array(True), "late": np.array(False)}
    reference = create_session(ir.to_proto(model_from_text(LATE)).SerializeToString(), optimized=False)
    assert same(run_fast(parts, feeds)[0]["y"], run(reference, feeds)["y"])


CONSTANTS = f"""
{HEAD}
g (float[2] x, int64 n) => (float[2] y, float[2] w, float[t, 2] rows) <float[2] w = {{1, 2}}, bool yes = {{1}}> {{
    y, rows = Loop (n, yes, w) <body = b (int64 i, bool c, float[2] s) => (bool again, float[2] after, float[2] row)
        <float[2] five = {{5, 5}}> {{
        again = Identity (yes)
        after = Add (s, x)
        row = Identity (five)
    }}>
}}
"""


@pytest.mark.parametrize("trips", [0, 1, 3])
def test_constants_that_the_host_hands_on(trips: int) -> None:
    """As the start of a state, as a condition, as an output of the network."""
    check(
        ir.to_proto(model_from_text(CONSTANTS)),
        {"x": np.array([1, 2], np.float32), "n": np.array(trips, np.int64)},
    )


def test_places_are_emptied_after_their_last_reader() -> None:
    parts = split(model_from_text(LATE))
    backend = PlainBackend(lambda name: session_of(parts, name))
    plan, actions = parts.plan, Actions(backend, None)
    inputs = frozenset(port.name for port in plan.inputs)
    program = actions.of_steps(plan.steps, frozenset(plan.gives.values()), inputs)
    places: list[Any] = [None] * actions.count
    for name, value in {"x": np.ones(4, np.float32), "early": np.array(True), "late": np.array(True)}.items():
        places[actions.at(name)] = value
    for action in program:
        action(places)
    assert [at for at, value in enumerate(places) if value is not None] == [actions.at("y")]


def test_every_value_is_made_before_it_is_read() -> None:
    for seed in range(10):
        plan = split(ir.from_proto(Nest(seed).model)).plan
        names = [name for step in walk(plan.steps) if isinstance(step, Run) for name in step.makes.values()]
        assert len(names) == len(set(names))
        assert all(step.body for step in walk(plan.steps) if isinstance(step, Loop))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD} g (float[2] x) => (float[2] y) <float[2] x = {{1, 2}}> {{ y = Neg (x) }}", "has a default"),
        (
            '<ir_version: 10, opset_import: ["" : 18, "f" : 1]> g (float[2] x) => (float[2] y) { y = f.n (x) }'
            ' <domain: "f", opset_import: ["" : 18]> n (a) => (b) { b = Neg (a) }',
            "has functions",
        ),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        split(model_from_text(text))


@pytest.mark.parametrize("trips", [0, 2])
@pytest.mark.parametrize(
    ("carried", "given", "made"),
    [
        ("float[3] s", "float[] p", "p = Neg(s)"),
        ("float[3] s", "float[q] p", "p = Neg(s)"),
        ("float[] s", "float[3] p", "p = Neg(z)"),
        ("float[] s", "float[2,q] p", "p = Reshape(z, k)"),
    ],
)
def test_the_shape_of_a_stack_of_no_turns(carried: str, given: str, made: str, trips: int) -> None:
    model = onnx.parser.parse_model(f"""{HEAD}
    g (float[3] x, float[n] z, int64[2] k, int64 trips) => (int64[rank] sizes)
    {{
        last, all = Loop (trips, , x) <body = b (int64 i, bool on, {carried}) => (bool on2, float[] t, {given}) {{
            on2 = Identity (on)
            t = Tanh (s)
            {made}
        }}>
        sizes = Shape (all)
    }}""")
    feeds = {"x": np.ones(3, np.float32), "k": np.array([2, 2]), "trips": np.array(trips)}
    check(model, {**feeds, "z": np.ones(4 if "Reshape" in made else 3, np.float32)})
