"""What a splitter of ONNX networks has to get right, point by point: each against the network as it was, every way."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import graphopt
from graphopt import graphs
from graphopt.bundles import read_bundle, split, write_bundle
from graphopt.bundles.merge import merge
from graphopt.bundles.plan import Branch, Loop, Run, walk
from graphopt.bundles.rehearsal import rehearse
from graphopt.bundles.sending import Outcome
from graphopt.runtime.session import create_session, run
from graphopt.shapes import infer_shapes
from graphopt.verification.whole import make_reference
from tests.bundles.test_split import check, run_fast
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
X = np.array([1.0, -2.0], np.float32)


def network(text: str) -> ir.Model:
    made = model_from_text(text)
    graphs.name_control_flow(made)
    infer_shapes(made)
    return made


def every_way(text: str, folder: Path, *feeds: Mapping[str, Any]) -> Outcome:
    """A network and its bundle, bit for bit, on feeds and on every way that can be forced."""
    write_bundle(split(network(text)), folder / "bundle")
    reference = make_reference(network(text), [dict(case) for case in feeds])
    found = rehearse(reference, lambda: network(text), folder / "bundle", bitwise=True)
    assert found.differences == []
    assert found.ways.failing == {} and found.ways.refused == ""
    return found


# -- 1: captures -------------------------------------------------------------------------------------------------------

DEEP = f"""
{HEAD}
g (float[2] x, bool c, int64 n) => (float[2] y) <float[2] w = {{3, 4}}> {{
    outer = Neg (x)
    y = If (c) <
        then_branch = t () => (float[2] p) {{
            middle = Mul (outer, w)
            p = Loop (n, , x) <body = b (int64 i, bool go, float[2] s) => (bool again, float[2] after) {{
                again = Identity (go)
                zero = Constant <value = float {{0}}> ()
                first = ReduceMax <keepdims = 0> (s)
                up = Greater (first, zero)
                after = If (up) <
                    then_branch = t2 () => (float[2] q) {{ k = Add (outer, w) j = Mul (middle, s) q = Sub (k, j) }},
                    else_branch = e2 () => (float[2] r) {{ r = Add (x, outer) }}>
            }}>
        }},
        else_branch = e () => (float[2] z) {{ z = Identity (w) }}>
}}
"""


def test_what_is_taken_from_around_at_any_depth(tmp_path: Path) -> None:
    feeds = [{"x": X, "c": np.array(c), "n": np.array(n)} for c in (True, False) for n in (0, 3)]
    found = every_way(DEEP, tmp_path, *feeds)
    assert {name for name, sides in found.ways.sides.items() if "never" not in sides.values()} == {
        "If of y",
        "If of after",
    }


def test_a_branch_that_returns_what_is_outside_as_it_is() -> None:
    """No file may have it and ONNX Runtime takes none; passes may leave it, and a host needs no node for it."""
    text = f"""{HEAD}
    g (float[2] x, bool c) => (float[2] y) {{
        a = Neg (x)
        b = Exp (x)
        y = If (c) <then_branch = t () => (float[2] p) {{ p = Identity (a) }},
                    else_branch = e () => (float[2] q) {{ q = Identity (b) }}>
    }}"""
    made = network(text)
    (node,) = [node for node in made.graph if node.op_type == "If"]
    for name in ("then_branch", "else_branch"):
        body = node.attributes[name].as_graph()
        (copy,) = body
        (returned,) = copy.inputs
        assert returned is not None
        body.outputs[0] = returned
        graphs.detach(copy)
        body.remove(copy)
    parts = split(made)
    (branch,) = [step for step in parts.plan.steps if isinstance(step, Branch)]
    assert branch.then == branch.otherwise == []
    assert branch.gives == {"y": ("a", "b")}
    for c in (True, False):
        (found,) = run_fast(parts, {"x": X, "c": np.array(c)})
        np.testing.assert_allclose(found["y"], -X if c else np.exp(X), rtol=1e-6)


# -- 2: names ----------------------------------------------------------------------------------------------------------


def test_names_that_siblings_and_their_bodies_use_again(tmp_path: Path) -> None:
    text = f"""{HEAD}
    g (float[2] x, bool c, bool d) => (float[2] y) {{
        u = If (c) <
            then_branch = t () => (float[2] p) {{
                v = Exp (x)
                p = If (d) <then_branch = t1 () => (float[2] r) {{ w = Sin (v) r = Neg (w) }},
                            else_branch = e1 () => (float[2] r) {{ w = Cos (v) r = Abs (w) }}> }},
            else_branch = e () => (float[2] p) {{
                v = Abs (x)
                p = If (d) <then_branch = t1 () => (float[2] r) {{ w = Tanh (v) r = Neg (w) }},
                            else_branch = e1 () => (float[2] r) {{ w = Neg (v) r = Sin (w) }}> }}>
        y = If (d) <then_branch = t2 () => (float[2] p) {{ v = Add (u, x) p = Exp (v) }},
                    else_branch = e2 () => (float[2] p) {{ v = Mul (u, x) p = Neg (v) }}>
    }}"""
    feeds = [{"x": X, "c": np.array(c), "d": np.array(d)} for c in (True, False) for d in (True, False)]
    found = every_way(text, tmp_path, *feeds)
    assert len(found.ways.sides) == 4


# -- 3: weights --------------------------------------------------------------------------------------------------------


def weighted(uses: int, size: int = 512) -> onnx.ModelProto:
    """A table of ``size`` squared that each of some branches looks rows up in, each in a way of its own."""
    table = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    initializers = [onnx.numpy_helper.from_array(table, "table")]
    nodes, now = [], "x"
    for use in range(uses):
        initializers.append(onnx.numpy_helper.from_array(np.array(use), f"number{use}"))
        nodes.append(helper.make_node("Equal", ["k", f"number{use}"], [f"is{use}"]))
        chain = [f"sum{use}", *(f"tanh{use}_{step}" for step in range(use + 1))]
        then = [
            helper.make_node("Gather", ["table", "k"], [f"row{use}"]),
            helper.make_node("Add", [now, f"row{use}"], [f"sum{use}"]),
            *(helper.make_node("Tanh", [a], [b]) for a, b in itertools.pairwise(chain)),
        ]
        bodies = {
            "then_branch": helper.make_graph(
                then, f"then{use}", [], [helper.make_tensor_value_info(chain[-1], TensorProto.FLOAT, [size])]
            ),
            "else_branch": helper.make_graph(
                [helper.make_node("Neg", [now], [f"neg{use}"])],
                f"else{use}",
                [],
                [helper.make_tensor_value_info(f"neg{use}", TensorProto.FLOAT, [size])],
            ),
        }
        nodes.append(helper.make_node("If", [f"is{use}"], [f"out{use}"], name=f"gate{use}", **bodies))
        now = f"out{use}"
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [size]),
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info(now, TensorProto.FLOAT, [size])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_weights_of_several_branches_are_stored_once(tmp_path: Path) -> None:
    version = write_bundle(split(ir.from_proto(weighted(6))), tmp_path / "bundle")
    (data,) = version.glob("*.data")
    assert data.stat().st_size == 512 * 512 * 4
    assert all(file.stat().st_size < 10_000 for file in version.glob("*.onnx"))
    feeds = [{"x": np.zeros(512, np.float32), "k": np.array(k)} for k in range(6)]
    check(weighted(6), *feeds)


MEASURE = """
import sys, numpy as np, graphopt
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
graphopt.load(sys.argv[1], threads=1)
before = anonymous()
runner = graphopt.load(sys.argv[2], threads=1)
for k in range(int(sys.argv[3])):
    runner.run({"x": np.zeros(2048, np.float32), "k": np.array(k)})
print(anonymous() - before)
"""


@pytest.mark.slow
def test_weights_of_several_branches_are_in_memory_once(tmp_path: Path) -> None:
    """Sessions map one file; 8 of them with a table of 16 MB take no more than one has."""
    kilobytes = {}
    write_bundle(split(ir.from_proto(weighted(1, 8))), tmp_path / "small")
    for uses in (1, 8):
        write_bundle(split(ir.from_proto(weighted(uses, 2048))), tmp_path / f"of{uses}")
        arguments = [str(tmp_path / "small"), str(tmp_path / f"of{uses}"), str(uses)]
        found = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
        kilobytes[uses] = int(found.stdout)
    assert kilobytes[8] - kilobytes[1] < 16_000


def test_weights_wherever_they_lie(tmp_path: Path) -> None:
    """In the graph around, in a body's own initializers, in Constant nodes of both."""
    text = f"""{HEAD}
    g (float[2] x, bool c) => (float[2] y) <float[2] w = {{3, 4}}> {{
        k = Constant <value = float[2] {{5, 6}}> ()
        y = If (c) <
            then_branch = t () => (float[2] p) <float[2] own = {{7, 8}}> {{
                j = Constant <value = float[2] {{9, 10}}> ()
                a = Mul (x, own) b = Add (a, j) p = Sub (b, k) }},
            else_branch = e () => (float[2] q) {{ a = Mul (x, w) q = Sub (a, k) }}>
    }}"""
    every_way(text, tmp_path, {"x": X, "c": np.array(True)})


# -- 4: sequences and optionals ----------------------------------------------------------------------------------------

SEQUENCE = f"""
{HEAD}
g (float[2] x, int64 n, bool c) => (float[2] y, seq(float[2]) all) {{
    start = SequenceConstruct (x)
    more = If (c) <
        then_branch = t () => (seq(float[2]) p) {{ a = Neg (x) p = SequenceInsert (start, a) }},
        else_branch = e () => (seq(float[2]) q) {{ q = Identity (start) }}>
    all = Loop (n, , more) <body = b (int64 i, bool go, seq(float[2]) s) => (bool again, seq(float[2]) after) {{
        again = Identity (go)
        last = Constant <value = int64 {{-1}}> ()
        part = SequenceAt (s, last)
        next = Exp (part)
        after = SequenceInsert (s, next)
    }}>
    zero = Constant <value = int64 {{0}}> ()
    y = SequenceAt (all, zero)
}}
"""


def test_sequences_between_blocks(tmp_path: Path) -> None:
    feeds = [{"x": X, "n": np.array(n), "c": np.array(c)} for n in (0, 2) for c in (True, False)]
    found = every_way(SEQUENCE, tmp_path, *feeds)
    assert found.ways.turns["Loop of all"] == {"inputs": [0, 2], "forced": [1, 3]}


def test_optionals_between_blocks() -> None:
    one = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    optional = helper.make_optional_type_proto(one)

    def body(name: str, nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_value_info(output, optional)])

    branches = {
        "then_branch": body("t", [helper.make_node("Optional", ["x"], ["p"])], "p"),
        "else_branch": body("e", [helper.make_node("Optional", [], ["q"], type=one)], "q"),
    }
    nodes = [
        helper.make_node("If", ["c"], ["maybe"], **branches),
        helper.make_node("OptionalHasElement", ["maybe"], ["has"]),
        helper.make_node("If", ["has"], ["y"],
            then_branch=helper.make_graph([helper.make_node("OptionalGetElement", ["maybe"], ["got"])], "t2", [],
                                          [helper.make_tensor_value_info("got", TensorProto.FLOAT, [2])]),
            else_branch=helper.make_graph([helper.make_node("Neg", ["x"], ["not"])], "e2", [],
                                          [helper.make_tensor_value_info("not", TensorProto.FLOAT, [2])])),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        value_info=[helper.make_value_info("maybe", optional)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    check(model, *({"x": X, "c": np.array(c)} for c in (True, False)), plain=True)


# -- 5: loops ----------------------------------------------------------------------------------------------------------


# Without a limit, the body has to end it.
@pytest.mark.parametrize(("trips", "ends"), [("n", True), ("n", False), ("three", True), ("three", False), ("", True)])
@pytest.mark.parametrize("condition", ["c", "yes", ""])
def test_loops_of_every_kind(trips: str, condition: str, ends: bool, tmp_path: Path) -> None:
    """A limit or none, a condition or none, a body that ends it or does not; what turns make stacked, also of none."""
    text = f"""{HEAD}
    g (float[2] x, int64 n, bool c) => (float[2] y, float[t, 2] rows, int64[t] numbers) {{
        three = Constant <value = int64 {{3}}> ()
        yes = Constant <value = bool {{1}}> ()
        unused = Identity (n)
        also = Identity (c)
        y, rows, numbers = Loop ({trips}, {condition}, x) <body = b (int64 i, bool go, float[2] s)
            => (bool again, float[2] after, float[2] row, int64 number) {{
            limit = Constant <value = int64 {{2}}> ()
            again = {"Less (i, limit)" if ends else "Identity (go)"}
            after = Tanh (s)
            row = Exp (s)
            number = Identity (i)
        }}>
    }}"""
    feeds = [{"x": X, "n": np.array(n), "c": np.array(c)} for n in (0, 1, 5) for c in (True, False)]
    found = every_way(text, tmp_path, *feeds)
    ((_, counts),) = found.ways.turns.items()
    assert {0, 1} <= {*counts["inputs"], *counts["forced"]}


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scans_along_any_axis_either_way(backwards: int, axis: int) -> None:
    text = f"""{HEAD}
    g (float[2] s, float[3, 3, 2] x) => (float[2] f, float[3, a, b] rows) {{
        f, rows = Scan <num_scan_inputs = 1, scan_input_axes = [{axis if axis == 1 else 0}],
            scan_input_directions = [{backwards}], scan_output_axes = [{axis}],
            scan_output_directions = [{1 - backwards}],
            body = b (float[2] state, float[3, 2] part) => (float[2] after, float[3, 2] row) {{
                axes = Constant <value = int64[1] {{0}}> ()
                sum = ReduceSum <keepdims = 0> (part, axes)
                after = Sub (sum, state)
                row = Mul (part, state)
            }}> (s, x)
    }}"""
    x = np.random.default_rng(0).standard_normal((3, 3, 2)).astype(np.float32)
    check(ir.to_proto(model_from_text(text)), {"s": X, "x": x})


# -- 6: states ---------------------------------------------------------------------------------------------------------


def test_states_that_change_places_and_states_that_grow(tmp_path: Path) -> None:
    text = f"""{HEAD}
    g (float[2] x, int64 n) => (float[2] a, float[2] b, float[k] all) {{
        m = Neg (x)
        a, b, all = Loop (n, , x, m, x) <body = l (int64 i, bool go, float[2] s, float[2] t, float[j] u)
            => (bool again, float[2] s2, float[2] t2, float[h] u2) {{
            again = Identity (go)
            s2 = Identity (t)
            t2 = Identity (s)
            u2 = Concat <axis = 0> (u, s)
        }}>
    }}"""
    every_way(text, tmp_path, *({"x": X, "n": np.array(n)} for n in (0, 1, 4)))


# -- 7: conditions -----------------------------------------------------------------------------------------------------


def test_conditions_that_do_not_wait_for_each_other_come_from_one_block() -> None:
    """As in BlockDrop: a policy says which of the residual blocks are done."""
    gates = "\n".join(
        f"""n{i} = Constant <value = int64 {{{i}}}> ()
        p{i} = Gather (policy, n{i})
        q{i} = Greater (p{i}, half)
        a{i + 1} = If (q{i}) <
            then_branch = t{i} () => (float[4] d{i}) {{ e{i} = MatMul (w{i}, a{i}) d{i} = Add (a{i}, e{i}) }},
            else_branch = f{i} () => (float[4] g{i}) {{ g{i} = Identity (a{i}) }}>"""
        for i in range(8)
    )
    weights = ", ".join(f"float[4, 4] w{i}" for i in range(8))
    text = f"""{HEAD}
    g (float[4] x) => (float[4] y) <float[8, 4] v, {weights}> {{
        score = MatMul (v, x)
        policy = Sigmoid (score)
        half = Constant <value = float {{0.5}}> ()
        a0 = Tanh (x)
        {gates}
        y = Neg (a8)
    }}"""
    parts = check(ir.to_proto(model_from_text(text)), {"x": np.arange(4, dtype=np.float32) - 1.5})
    steps = parts.plan.steps
    assert [type(step) for step in steps] == [Run, *[Branch] * 8, Run]
    first = steps[0]
    assert isinstance(first, Run)
    assert {f"q{i}" for i in range(8)} <= set(first.makes.values())
    # A gate that is not taken costs no call.
    assert all(
        step.otherwise == [] or step.then == [] or len(step.then) == 1 for step in steps if isinstance(step, Branch)
    )


# -- 8: only what is needed --------------------------------------------------------------------------------------------


def test_only_the_side_that_is_taken_runs(tmp_path: Path) -> None:
    write_bundle(split(network(DEEP)), tmp_path / "bundle")
    runner = graphopt.load(tmp_path / "bundle")
    runner.run({"x": X, "c": np.array(False), "n": np.array(3)})
    _, plan = read_bundle(tmp_path / "bundle")
    then = {
        step.run
        for branch in plan.steps
        if isinstance(branch, Branch)
        for step in walk(branch.then)
        if isinstance(step, Run)
    }
    assert then
    assert all(runner.runs[name] == 0 for name in then)  # type: ignore[attr-defined]


# -- 10: shapes --------------------------------------------------------------------------------------------------------


def test_branches_that_give_other_shapes_and_other_ranks(tmp_path: Path) -> None:
    text = f"""{HEAD}
    g (float[2, 3] x, bool c, bool d) => (float[...] y) {{
        a = If (c) <
            then_branch = t () => (float[...] p) {{ p = Transpose <perm = [1, 0]> (x) }},
            else_branch = e () => (float[...] q) {{ z = Constant <value = int64[1] {{-1}}> () q = Reshape (x, z) }}>
        y = If (d) <
            then_branch = t2 () => (float[...] r) {{ r = Exp (a) }},
            else_branch = e2 () => (float[...] s) {{ s = ReduceMax <keepdims = 0> (a) }}>
    }}""".replace("float[...]", "float")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    text = text.replace("(float y)", "(float[a, b] y)")
    made = network(text)
    for graph in graphs.all_graphs(made):
        for value in graph.outputs:
            value.shape = None
    model = ir.to_proto(made)
    feeds = [{"x": x, "c": np.array(c), "d": np.array(d)} for c in (True, False) for d in (True, False)]
    session = create_session(model.SerializeToString(), optimized=False)
    parts = split(ir.from_proto(model))
    shapes = set()
    for case, ours in zip(feeds, run_fast(parts, *feeds), strict=True):
        theirs = run(session, case)["y"]
        assert ours["y"].shape == theirs.shape and np.array_equal(ours["y"], theirs)
        shapes.add(theirs.shape)
    assert shapes == {(3, 2), (6,), ()}


# -- 12: effects -------------------------------------------------------------------------------------------------------

RANDOM = f"""
{HEAD}
g (float[2] x, bool c, int64 n) => (float[2] y, float[t, 3] rows, float[3] last) {{
    a = If (c) <
        then_branch = t () => (float[2] p) {{ r = RandomNormal <seed = 5.0, shape = [2]> () p = Add (x, r) }},
        else_branch = e () => (float[2] q) {{ r2 = RandomNormal <seed = 5.0, shape = [2]> () q = Add (x, r2) }}>
    b, rows = Loop (n, , a) <body = l (int64 i, bool go, float[2] s) => (bool again, float[2] after, float[3] row) {{
        again = Identity (go)
        after = Neg (s)
        row = RandomUniform <seed = 7.0, shape = [3]> ()
    }}>
    last = RandomUniform <seed = 7.0, shape = [3]> ()
    y = Neg (b)
}}
"""


def test_random_numbers_are_drawn_as_often_and_in_the_same_order() -> None:
    """Each place draws from a stream of its own: run after run both give the same."""
    model = ir.to_proto(model_from_text(RANDOM))
    session = create_session(model.SerializeToString(), optimized=False)
    parts = split(ir.from_proto(model))
    drawing = [name for name, block in parts.blocks.items() if any(n.op_type in graphs.RANDOM for n in block.graph)]
    assert len(drawing) == 4
    feeds = [
        {"x": X, "c": np.array(c), "n": np.array(n)}
        for c, n in ((True, 2), (False, 1), (True, 3), (True, 0), (False, 2))
    ]
    for case, ours in zip(feeds, run_fast(parts, *feeds), strict=True):
        theirs = run(session, case)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_what_draws_is_not_shared_and_what_does_not_is() -> None:
    text = RANDOM.replace("RandomNormal <seed = 5.0, shape = [2]> ()", "Exp (x)")
    assert split(model_from_text(text)).shared == 1


# -- 13: how it is checked: test_rehearsal.py --------------------------------------------------------------------------
# -- 14: rewriting in branches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [False, True])
def test_convolutions_in_branches_take_their_normalisation(inner: bool, tmp_path: Path) -> None:
    """With weights of the graph around, as torch writes them, and of the branch itself."""
    weights = "<float[4, 3, 3, 3] w, float[4] s, float[4] b, float[4] m, float[4] v>"
    text = f"""{HEAD}
    g (float[1, 3, 8, 8] x, bool c) => (float[1, 4, 8, 8] y) {"" if inner else weights} {{
        y = If (c) <
            then_branch = t () => (float[1, 4, 8, 8] p) {weights if inner else ""} {{
                k = Conv <pads = [1, 1, 1, 1]> (x, w)
                p = BatchNormalization (k, s, b, m, v)
            }},
            else_branch = e () => (float[1, 4, 8, 8] q) {{
                zero = Constant <value = int64[1] {{0}}> ()
                one = Constant <value = int64[1] {{1}}> ()
                four = Constant <value = int64[4] {{1, 4, 1, 1}}> ()
                first = Slice (x, zero, one, one)
                q = Expand (first, four)
            }}>
    }}"""
    rng = np.random.default_rng(0)
    values = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "s": rng.uniform(0.5, 2, 4).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float32),
        "m": rng.standard_normal(4).astype(np.float32),
        "v": rng.uniform(0.5, 2, 4).astype(np.float32),
    }
    made = onnx.parser.parse_model(text)
    holder = made.graph.node[0].attribute[0].g if inner else made.graph
    holder.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
    del holder.value_info[:]
    onnx.save(made, tmp_path / "m.onnx")
    report = graphopt.optimize(tmp_path / "m.onnx", recipe=["static"], target="onnx")
    assert not report.undone
    kinds = [node.op_type for path in (tmp_path / "m.bundle").rglob("*.onnx") for node in onnx.load(path).graph.node]
    assert "Conv" in kinds and "BatchNormalization" not in kinds
    assert report.verification.coverage["ways"]["tried"] == 2


def test_every_point_has_loops_and_branches_by_name() -> None:
    parts = split(network(DEEP))
    names = [
        s.branch if isinstance(s, Branch) else s.loop for s in walk(parts.plan.steps) if isinstance(s, Branch | Loop)
    ]
    assert names == ["If of y", "Loop of p", "If of after"]


@pytest.mark.parametrize("trips", [0, 2])
def test_a_value_that_is_called_as_the_host_calls_a_constant(trips: int) -> None:
    made = network(f"""{HEAD}
    g (float[2] x, int64 n) => (float[2] y) <float[2] w = {{3, 4}}> {{
        other = Neg (x)
        last = Loop (n, , w) <body = b (int64 i, bool on, float[2] s) => (bool more, float[2] t) {{
            more = Identity (on) t = Mul (s, other)
        }}>
        y = Sub (last, other)
    }}""")
    next(node for node in made.graph if node.op_type == "Neg").outputs[0].name = "w:value"
    check(ir.to_proto(made), {"x": X, "n": np.array(trips)})


# -- what only some operators and ranks have ---------------------------------------------------------------------------


def test_constants_of_strings() -> None:
    """No weights, so they stay nodes of the blocks that read them."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (bool c) => (string[2] y, string[2] z) {
        y, z = If (c) <
            then_branch = t () => (string[2] p, string[2] q) {
                p = Constant <value_strings = ["a", "b"]> ()
                q = StringConcat (p, p)
            },
            else_branch = e () => (string[2] r, string[2] s) {
                s = Constant <value_strings = ["c", "d"]> ()
                r = Identity (s)
            }>
    }"""
    check(ir.to_proto(network(text)), *({"c": np.array(c)} for c in (True, False)), plain=True)


@pytest.mark.parametrize("outer", ["", "[1]"])
@pytest.mark.parametrize("inner", ["", "[1]"])
@pytest.mark.parametrize("trips", [-1, 0, 3])
def test_numbers_of_turns_with_an_axis_or_none(outer: str, inner: str, trips: int) -> None:
    """As the body says, whatever the limit has: all of it is one element."""
    rows = "[k, 1]" if inner else "[k]"
    text = f"""{HEAD}
    g (float[2] x, int64{outer} n) => (float[2] y, int64{rows} all, bool{rows} said) {{
        y, all, said = Loop (n, , x) <body = b (int64{inner} i, bool{inner} on, float[2] s)
            => (bool{inner} more, float[2] t, int64{inner} number, bool{inner} not) {{
            more = Identity (on) number = Identity (i) not = Not (on) t = Neg (s)
        }}>
    }}"""
    parts = check(ir.to_proto(network(text)), {"x": X, "n": np.full((1,) if outer else (), trips)})
    merged = create_session(ir.to_proto(merge(parts.plan, parts.blocks)).SerializeToString(), optimized=False)
    feeds = {"x": X, "n": np.full((1,) if outer else (), trips)}
    (ours,) = run_fast(parts, feeds)
    for name, array in run(merged, feeds).items():
        assert array.shape == ours[name].shape
        np.testing.assert_array_equal(array, ours[name])
