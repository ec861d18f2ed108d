"""``ctx.replace``: what it redirects, keeps, removes, refuses, names and tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.rewrite import Application, Context, Kind, Saves
from graphopt.rewrite.application import Checkpoint
from graphopt.verification.structure import check_structure, interface_of
from tests.rewrite import toys
from tests.rewrite.toys import bypass, dangling, model, ops, producer, rule, running, swap, value

W = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)


def sound(made: ir.Model) -> None:
    """The model is a graph, nothing dangles, and it can be written and checked."""
    assert check_structure(made) == []
    assert dangling(made) == []
    onnx.checker.check_model(ir.to_proto(made))


def rewrite(made: ir.Model, old: str, op: str, *, inputs: Sequence[str] | None = None, **how: object) -> Context:
    """Replace the value ``old`` by a new node ``op`` on the given values (default: those of its node)."""
    ctx = running(made, **how)  # type: ignore[arg-type]
    node = producer(made, old)
    operands = list(node.inputs) if inputs is None else [value(made, name) for name in inputs]
    new = ctx.node(op, operands, like=value(made, old))
    assert ctx.replace({value(made, old): new.outputs[0]}, [new], rule="r", certain=True)
    return ctx


# -- what is redirected and what is kept -------------------------------------------------------------------------------


def test_every_consumer_reads_the_replacement() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Relu(x) y = Neg(a) z = Mul(a, a) }")
    rewrite(made, "a", "Abs")
    assert ops(made) == ["Abs", "Neg", "Mul"]
    new = producer(made, "a").outputs[0]
    assert len(new.uses()) == 3
    sound(made)


def test_an_interior_node_with_another_consumer_stays() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Relu(x) y = Neg(a) z = Exp(a) }")
    rewrite(made, "y", "Softplus", inputs=["x"])
    assert sorted(ops(made)) == ["Exp", "Relu", "Softplus"]
    sound(made)


def test_an_interior_node_that_is_an_output_stays() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] a) { a = Relu(x) y = Neg(a) }")
    rewrite(made, "y", "Softplus", inputs=["x"])
    assert sorted(ops(made)) == ["Relu", "Softplus"]
    sound(made)


def test_a_graph_output_keeps_name_type_shape_and_place() -> None:
    made = model("g (float[N,4] x) => (float[M,4] first, float[2,4] y, float[N,4] z) "
                 "{ first = Abs(x) y = Relu(x) z = Exp(y) }")  # fmt: skip
    before = interface_of(made)
    rewrite(made, "y", "Neg")
    assert interface_of(made) == before
    assert producer(made, "y").op_type == "Neg"
    assert producer(made, "z").inputs[0] is made.graph.outputs[1]
    sound(made)


def test_an_output_listed_twice_is_replaced_twice() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    made.graph.outputs.append(made.graph.outputs[0])
    rewrite(made, "y", "Neg")
    assert [v.producer().op_type for v in made.graph.outputs] == ["Neg", "Neg"]


def test_two_outputs_that_become_one_value_stay_two() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x) z = Relu(x) }")
    before = interface_of(made)
    ctx = running(made)
    assert ctx.replace({value(made, "z"): value(made, "y")}, rule="r")
    assert interface_of(made) == before
    assert ops(made) == ["Relu", "Identity"]
    sound(made)


def test_two_outputs_replaced_by_one_new_value_stay_two() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x) z = Relu(x) }")
    before = interface_of(made)
    ctx = running(made)
    new = ctx.node("Abs", [made.graph.inputs[0]], like=value(made, "y"))
    mapping = {value(made, "y"): new.outputs[0], value(made, "z"): new.outputs[0]}
    assert ctx.replace(mapping, [new], rule="r", certain=True)
    assert interface_of(made) == before
    assert ops(made) == ["Abs", "Identity"]
    sound(made)


@pytest.mark.parametrize("source", ["x", "w"])
def test_an_output_replaced_by_an_input_or_initializer_keeps_a_node(source: str) -> None:
    made = model("g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { a = Mul(x, w) b = Neg(a) y = Neg(b) }")
    before = interface_of(made)
    ctx = running(made)
    assert ctx.replace({value(made, "y"): value(made, source)}, rule="r")
    assert interface_of(made) == before
    assert ops(made) == ["Identity"]
    sound(made)


def test_replacing_an_identity_output_by_its_input_gains_nothing_and_is_refused() -> None:
    made = model("g (float[4] x) => (float[4] y) { y = Identity(x) }")
    ctx = running(made)
    assert not ctx.replace({value(made, "y"): value(made, "x")}, rule="r")
    assert ops(made) == ["Identity"]
    assert dangling(made) == []
    assert ctx.not_cheaper["toy"] == 1


def test_an_output_may_be_taken_over_by_a_value_of_its_graph() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) i = Identity(a) y = Identity(i) }")
    before = interface_of(made)
    ctx = running(made)
    assert ctx.replace({value(made, "y"): value(made, "a")}, rule="r")
    assert interface_of(made) == before
    assert ops(made) == ["Relu"]
    sound(made)


def test_what_inference_knew_of_an_output_is_not_replaced_by_its_declaration() -> None:
    from graphopt.shapes import trusted_shape

    made = model("g (float[N,4] x) => (float[7,9] y) { a = Relu(x) y = Identity(a) }")
    ctx = running(made)
    assert ctx.replace({value(made, "y"): value(made, "a")}, rule="r")
    known = trusted_shape(made.graph.outputs[0])
    assert known is not None
    assert str(known) == "[N,4]"
    assert str(made.graph.outputs[0].shape) == "[7,9]"


IF = """g (float[N,4] x, bool c) => (float[N,4] y) <float[4] w = {1, 2, 3, 4}> {
    a = Relu(x)
    MORE
    y = If(c) <then_branch = t () => (float[N,4] u) { u0 = Add(a, w) u = Neg(u0) },
               else_branch = e () => (float[N,4] v) { v = Abs(a) }>
}"""


def test_a_value_read_only_in_bodies_is_redirected_there() -> None:
    made = model(IF.replace("MORE", ""))
    rewrite(made, "a", "Exp")
    assert sorted(ops(made)) == ["Abs", "Add", "Exp", "If", "Neg"]
    sound(made)


def test_replacing_in_a_body_keeps_the_bodys_output() -> None:
    made = model(IF.replace("MORE", ""))
    rewrite(made, "u", "Exp")
    assert "Neg" not in ops(made)
    assert [v.name for v in next(graphs.subgraphs(producer(made, "y"))).outputs] == ["u"]
    sound(made)


@pytest.mark.parametrize("outer", ["a", "w", "x"])
def test_a_body_output_replaced_by_an_outer_value_keeps_a_node_in_the_body(outer: str) -> None:
    made = model(IF.replace("MORE", ""))
    ctx = running(made)
    assert ctx.replace({value(made, "u"): value(made, outer)}, rule="r")
    body = next(graphs.subgraphs(producer(made, "y")))
    assert [node.op_type for node in body] == ["Identity"]
    assert body.outputs[0].name == "u"
    sound(made)


def test_a_removed_if_releases_what_its_bodies_read() -> None:
    made = model(IF.replace("MORE", "b = Neg(x)").replace("Abs(a)", "Mul(a, b)"))
    ctx = running(made)
    assert ctx.replace({value(made, "y"): value(made, "x")}, rule="r")
    assert ops(made) == ["Identity"]
    assert list(made.graph.initializers) == []
    sound(made)


LOOP = """g (float[4] x, int64 n) => (float[4] last, float[T,4] all) <bool yes = {1}, float[4] w = {1, 2, 3, 4}> {
    last, all = Loop(n, yes, x) <body = b (int64 i, bool go, float[4] s) => (bool more, float[4] next, float[4] step) {
        more = Identity(go) k = Mul(s, w) next = Add(k, x) step = Neg(next) }>
}"""
SCAN = """g (float[4] s, float[T,4] xs) => (float[4] last, float[T,4] all) <float[4] w = {1, 2, 3, 4}> {
    last, all = Scan <num_scan_inputs = 1, body = b (float[4] a, float[4] b) => (float[4] next, float[4] step) {
        k = Mul(a, w) next = Add(k, b) step = Neg(next) }>(s, xs)
}"""


@pytest.mark.parametrize("text", [LOOP, SCAN])
@pytest.mark.parametrize("old", ["step", "next", "k"])
def test_loop_and_scan_bodies_are_rewritten_in_place(text: str, old: str) -> None:
    made = model(text)
    body = next(graphs.subgraphs(producer(made, "last")))
    names = [v.name for v in body.outputs]
    rewrite(made, old, "Exp", inputs=[producer(made, old).inputs[0].name])  # type: ignore[union-attr,list-item]
    assert [v.name for v in body.outputs] == names
    assert "Exp" in ops(made)
    sound(made)


def test_two_body_outputs_that_become_one_value_stay_two() -> None:
    made = model(LOOP)
    ctx = running(made)
    assert ctx.replace({value(made, "step"): value(made, "next")}, rule="r") or ops(made).count("Neg") == 1
    body = next(graphs.subgraphs(producer(made, "last")))
    assert [v.name for v in body.outputs] == ["more", "next", "step"]
    sound(made)


# -- constants ---------------------------------------------------------------------------------------------------------


def test_a_shared_initializer_goes_with_its_last_reader_only() -> None:
    made = model(
        "g (float[4] x) => (float[4] y, float[4] z) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) z = Mul(x, w) }"
    )
    rewrite(made, "y", "Neg", inputs=["x"])
    assert list(made.graph.initializers) == ["w"]
    rewrite(made, "z", "Abs", inputs=["x"])
    assert list(made.graph.initializers) == []
    sound(made)


def test_an_initializer_read_in_a_body_stays() -> None:
    made = model(IF.replace("MORE", "").replace("Relu(x)", "Mul(x, w)"))
    rewrite(made, "a", "Exp", inputs=["x"])
    assert list(made.graph.initializers) == ["w"]
    sound(made)


def test_an_overridable_initializer_is_part_of_the_interface_and_stays() -> None:
    made = model("g (float[4] x, float[4] w) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }")
    assert not graphs.is_constant(value(made, "w"))
    before = interface_of(made)
    rewrite(made, "y", "Neg", inputs=["x"])
    assert list(made.graph.initializers) == ["w"]
    assert interface_of(made) == before


def test_an_initializer_that_is_an_output_stays() -> None:
    made = model("g (float[4] x) => (float[4] y, float[4] w) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }")
    made.graph.outputs[1] = made.graph.initializers["w"]
    rewrite(made, "y", "Neg", inputs=["x"])
    assert list(made.graph.initializers) == ["w"]


@pytest.mark.parametrize("where", ["main", "body", "function"])
def test_a_new_constant_lands_where_it_is_read(where: str) -> None:
    if where == "function":
        made = model('g (float[4] x) => (float[4] y) { y = local.f(x) }\n<domain: "local", opset_import: ["": 17]>\n'
                     "f (a) => (b) { k = Neg(a) c = Abs(k) b = Exp(c) }", imports=', "local": 1')  # fmt: skip
        old = "c"
    else:
        made = model(IF.replace("MORE", ""))
        old = "a" if where == "main" else "v"
    ctx = running(made)
    node = producer(made, old)
    # The name is taken in every case: by a value here, by one of the function there.
    constant = ctx.constant(np.array(2.0, np.float32), "c" if where == "function" else "w")
    new = ctx.node("Mul", [node.inputs[0], constant], like=value(made, old))
    assert ctx.replace({value(made, old): new.outputs[0]}, [new], rule="r", certain=True)
    if where == "function":
        function = next(iter(made.functions.values()))
        assert not function.graph.initializers
        assert [n.op_type for n in function] == ["Neg", "Constant", "Mul", "Exp"]
    else:
        assert constant.graph is new.graph
        assert new.graph.initializers["w_1"] is constant  # type: ignore[union-attr]
    sound(made)
    feeds = {"x": np.full((4,) if where == "function" else (2, 4), -3, np.float32)}
    assert toys.ort(made, feeds if where == "function" else {**feeds, "c": np.array(False)})


def test_a_constant_read_only_in_the_body_of_a_new_node_is_installed() -> None:
    made = model(IF.replace("MORE", ""))
    ctx = running(made)
    old = producer(made, "y")
    constant = ctx.constant(np.ones(4, np.float32), "ones")
    body = ir.Graph([], [], nodes=[])
    inner = ir.Node("", "Add", [value(made, "a"), constant], outputs=[ir.Value(name="inner")])
    inner.outputs[0].type, inner.outputs[0].shape = value(made, "v").type, value(made, "v").shape
    body.append(inner)
    body.outputs.append(inner.outputs[0])
    body.name = "then"
    new = ctx.node("If", [old.inputs[0]], {"then_branch": body}, like=old.outputs[0])
    new.attributes["else_branch"] = ir.AttrGraph("else_branch", body.clone(allow_outer_scope_values=True))
    assert ctx.replace({old.outputs[0]: new.outputs[0]}, [new], rule="r", certain=True)
    assert "ones" in made.graph.initializers
    assert check_structure(made) == []


def test_replace_with_constant() -> None:
    made = model("g (float[4] x) => (float[4] y, float[4] z) { a = Neg(x) y = Abs(a) z = Exp(y) }")
    before = interface_of(made)
    ctx = running(made)
    assert ctx.replace_with_constant(value(made, "a"), np.zeros(4, np.float32), rule="inner")
    assert ops(made) == ["Abs", "Exp"]
    assert ctx.replace_with_constant(value(made, "y"), np.zeros(4, np.float32), rule="output")
    assert ops(made) == ["Identity", "Exp"]
    assert interface_of(made) == before
    sound(made)


@pytest.mark.parametrize("array", [np.array(2.0), np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T])
def test_a_constant_keeps_its_shape_and_values(array: np.ndarray) -> None:
    made = running(model("g (float[4] x) => (float[4] y) { y = Neg(x) }")).constant(array, "c")
    assert made.const_value is not None
    assert graphs.static_shape(made) == array.shape
    np.testing.assert_array_equal(made.const_value.numpy(), array)


def test_constants_are_read_from_initializers_and_constant_nodes_alone() -> None:
    made = model("g (float[4] x, float[4] o) => (float[4] y) <float[4] w = {1, 2, 3, 4}, float[4] o = {1, 1, 1, 1}> {"
                 " c = Constant<value_floats = [1.0, 2.0]>() i = Constant<value_int = 3>() a = Add(x, w)"
                 " b = Mul(a, o) y = Identity(b) }")  # fmt: skip
    np.testing.assert_array_equal(graphs.constant_array(value(made, "w")), [1, 2, 3, 4])
    np.testing.assert_array_equal(graphs.constant_array(value(made, "c")), np.array([1, 2], np.float32))
    assert graphs.scalar_of(value(made, "i")) == 3.0
    assert graphs.constant_array(value(made, "w"), limit=3) is None
    for name in ("x", "o", "a", "y"):
        assert graphs.constant_tensor(value(made, name)) is None
        assert not graphs.is_constant(value(made, name))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_not_cheaper_is_refused_and_leaves_no_trace() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    text = ir.to_proto(made).SerializeToString()
    ctx = running(made)
    first = ctx.node("Neg", [made.graph.inputs[0]], like=made.graph.outputs[0])
    second = ctx.node("Neg", [first.outputs[0]], like=made.graph.outputs[0])
    assert not ctx.replace({made.graph.outputs[0]: second.outputs[0]}, [first, second], rule="r")
    assert ctx.applications == []
    assert ctx.not_cheaper["toy"] == 1
    assert ctx.near_misses["toy"].keys() == {"Relu of y"}
    assert dangling(made) == []
    assert ir.to_proto(made).SerializeToString() == text


def test_what_a_rewrite_saves_counts_only_where_it_goes() -> None:
    """Relu stays for its other reader, so nothing is saved by computing it anew."""
    made = model("g (float[N,4] x) => (float[N,4] y, float[N,4] a) { a = Relu(x) y = Neg(a) }")
    ctx = running(made)
    nodes = [ctx.node("Abs", [made.graph.inputs[0]], like=made.graph.outputs[0])]
    nodes.append(ctx.node("Exp", [nodes[0].outputs[0]], like=made.graph.outputs[0]))
    assert not ctx.replace({value(made, "y"): nodes[1].outputs[0]}, nodes, rule="r")


def narrower(ctx: Context, made: ir.Model, narrow: ir.Value, old: str = "y") -> bool:
    """Let MatMul read its weight in another type: a node more, judged by bytes."""
    node = producer(made, old)
    cast = ctx.node("Cast", [narrow], {"to": int(ir.DataType.FLOAT)}, like=node.inputs[1])
    product = ctx.node("MatMul", [node.inputs[0], cast.outputs[0]], like=node.outputs[0])
    return ctx.replace({node.outputs[0]: product.outputs[0]}, [cast, product], rule="r")


@pytest.mark.parametrize(("saves", "dtype", "done"), [
    (Saves.TIME, np.float16, False),
    (Saves.BYTES, np.float16, True),
    (Saves.BYTES, np.float32, False),
    (Saves.BYTES, np.float64, False),
])  # fmt: skip
def test_a_pass_that_saves_bytes_is_judged_by_them(saves: Saves, dtype: type[np.generic], done: bool) -> None:
    made = model("g (float[N,8] x) => (float[N,4] y) <float[8,4] w> { y = MatMul(x, w) }", weights={"w": W})
    ctx = running(made, saves=saves)
    assert narrower(ctx, made, ctx.constant(W.astype(dtype), "narrow")) is done
    assert ops(made) == (["Cast", "MatMul"] if done else ["MatMul"])
    assert dangling(made) == []
    if not done:
        (reason,) = ctx.near_misses["toy"].values()
        assert reason.startswith("not cheaper" if saves is Saves.TIME else "its constants would take ")
    assert ctx.not_cheaper["toy"] == (saves is Saves.TIME)


def test_bytes_of_a_weight_that_several_read() -> None:
    """Each reader is judged for itself, in a body too; the old weight goes with the last."""
    text = (
        "g (float[N,8] x, bool c) => (float[N,4] y, float[N,4] z) <float[8,4] w> { y = MatMul(x, w) "
        "z = If(c) <then_branch = t () => (float[N,4] u) { u = MatMul(x, w) }, "
        "else_branch = e () => (float[N,4] v) { v = MatMul(x, w) }> }"
    )
    made = model(text, weights={"w": W})
    ctx = running(made, saves=Saves.BYTES)
    narrow = ctx.constant(W.astype(np.float16), "narrow")
    assert all(narrower(ctx, made, narrow, old) for old in "yuv")
    assert list(made.graph.initializers) == ["narrow"]
    sound(made)


def test_bytes_of_a_constant_node() -> None:
    numbers = ", ".join(["1"] * W.size)
    constant = f"w = Constant<value = float[8,4] {{{numbers}}}>()"
    made = model(f"g (float[N,8] x) => (float[N,4] y) {{ {constant} y = MatMul(x, w) }}")
    ctx = running(made, saves=Saves.BYTES)
    assert narrower(ctx, made, ctx.constant(W.astype(np.float16), "narrow"))
    assert ops(made) == ["Cast", "MatMul"]


@pytest.mark.parametrize(
    ("op", "domain", "target", "runs"),
    [
        ("Gelu", "", "onnxruntime", False),  # opset 20
        ("Gelu", "com.microsoft", "onnxruntime", True),
        ("Gelu", "com.microsoft", "onnx", False),
        ("NoSuchOp", "", "onnxruntime", False),
        ("BitwiseNot", "", "tensorrt", False),
    ],
)
def test_what_the_target_does_not_run_is_refused(op: str, domain: str, target: str, runs: bool) -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Neg(a) }", imports=', "com.microsoft": 1')
    ctx = running(made, target=target)
    new = ctx.node(op, [made.graph.inputs[0]], like=made.graph.outputs[0], domain=domain)
    assert ctx.replace({made.graph.outputs[0]: new.outputs[0]}, [new], rule="r") is runs
    assert dangling(made) == []
    if not runs:
        assert f"{target} does not run {op} (opset 17)" in next(iter(ctx.near_misses["toy"].values()))


def chain(length: int = 6) -> ir.Model:
    steps = " ".join(f"v{i + 1} = Neg(v{i})" for i in range(length))
    return model(f"g (float[N,4] x) => (float[N,4] v{length}) {{ v0 = Identity(x) {steps} }}")


def test_skipped_applications_are_left_out_and_the_rest_stays_the_same() -> None:
    full, _ = toys.run(chain(), swap("Neg", "Abs"))
    keys = [a.key for a in full.applications]
    assert keys == [f"toy:Neg-to-Abs@v{i}" for i in range(1, 7)]
    made = chain()
    part, _ = toys.run(made, swap("Neg", "Abs"), skip=[keys[2]])
    assert [a.key for a in part.applications] == keys[:2] + keys[3:]
    assert ops(made).count("Neg") == 1
    sound(made)


@pytest.mark.parametrize("limit", range(7))
def test_a_limit_gives_a_prefix_of_the_applications(limit: int) -> None:
    full, _ = toys.run(chain(), swap("Neg", "Abs"), bypass("Identity"))
    part, _ = toys.run(chain(), swap("Neg", "Abs"), bypass("Identity"), limit=limit)
    assert [a.key for a in part.applications] == [a.key for a in full.applications][:limit]


def test_keys_are_unique_over_rounds_and_the_same_in_every_run() -> None:
    """The same value is rewritten three times over: Neg -> Abs -> Exp -> Sign."""

    def cycle(node: ir.Node, ctx: Context) -> bool:
        following = {"Neg": "Abs", "Abs": "Exp", "Exp": "Sign"}.get(node.op_type)
        if following is None:
            return False
        new = ctx.node(following, node.inputs, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule="next", certain=True)

    runs = []
    for _ in range(2):
        made = chain(2)
        ctx, _ = toys.run(made, rule(cycle))
        runs.append([a.key for a in ctx.applications])
        assert ops(made) == ["Identity", "Sign", "Sign"]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0]) == 6
    assert "toy:next@v1#2" in runs[0]
    assert "toy:next@v1#3" in runs[0]
    skipped, _ = toys.run(chain(2), rule(cycle), skip=["toy:next@v1#2"])
    assert [a.key for a in skipped.applications if "@v1" in a.key] == ["toy:next@v1"]


# -- names and tags ----------------------------------------------------------------------------------------------------


def test_new_nodes_are_tagged_with_pass_rule_and_sources() -> None:
    made = model("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Neg(a) }")
    for node, name in zip(made.graph, ("first", "second"), strict=True):
        node.name = name
    ctx = rewrite(made, "y", "Abs", inputs=["x"])
    tags = producer(made, "y").metadata_props
    assert tags["graphopt.pass"] == "toy"
    assert tags["graphopt.rule"] == "r"
    assert set(tags["graphopt.from"].split()) == {"first", "second"}
    assert ctx.applications[0].sources == ["second", "first"]
    proto = ir.to_proto(made)
    assert {p.key for p in proto.graph.node[0].metadata_props} == {"graphopt.pass", "graphopt.rule", "graphopt.from"}


def test_names_of_new_values_clash_with_nothing() -> None:
    made = model('g (float[N,4] x) => (float[N,4] y, float[N,4] z) { "y/Abs" = Exp(x) a = Relu(x) y = Neg(a) '
                 'z = Identity("y/Abs") }')  # fmt: skip
    ctx = running(made)
    nodes = [ctx.node("Abs", [made.graph.inputs[0]], like=made.graph.outputs[0])]
    nodes.append(ctx.node("Abs", [nodes[0].outputs[0]], like=made.graph.outputs[0]))
    nodes.append(ctx.node("Exp", [nodes[1].outputs[0]], like=made.graph.outputs[0]))
    assert ctx.replace({value(made, "y"): nodes[2].outputs[0]}, nodes, rule="r", certain=True)
    names = [o.name for node in made.graph for o in node.outputs]
    assert len(set(names)) == len(names)
    assert len({node.name for node in nodes}) == 3
    sound(made)


def test_names_keep_their_meaning_over_many_rewrites() -> None:
    made = chain(5)
    for op in ("Abs", "Exp", "Sign"):
        rewrite(made, "v3", op)
    assert producer(made, "v3").op_type == "Sign"
    assert [node.outputs[0].name for node in made.graph] == ["v0", "v1", "v2", "v3", "v4", "v5"]


def test_a_node_of_two_outputs_half_replaced_stays_whole() -> None:
    made = model("g (float[4,4] x) => (float[2,4] y, float[2,4] z) { a, b = Split<axis = 0>(x) y = Neg(a) z = Exp(b) }")
    ctx = running(made)
    new = ctx.node("Abs", [value(made, "b")], like=value(made, "a"))
    assert ctx.replace({value(made, "a"): new.outputs[0]}, [new], rule="r", certain=True)
    assert sorted(ops(made)) == ["Abs", "Exp", "Neg", "Split"]
    split = next(n for n in made.graph if n.op_type == "Split")
    assert all(o.name for o in split.outputs)
    assert split.outputs[1].name == "b"
    assert producer(made, "a") is new
    made.graph.sort()  # the new node stands where the old one stood; the manager sorts where a pass left that
    sound(made)


def test_both_outputs_of_a_node_replaced_at_once() -> None:
    made = model("g (float[4,4] x) => (float[2,4] a, float[2,4] b) { a, b = Split<axis = 0>(x) }", opset=13)
    before = interface_of(made)
    ctx = running(made)
    split = producer(made, "a")
    new = ctx.node("Split", split.inputs, {"axis": 0}, like=list(split.outputs))
    assert ctx.replace(dict(zip(split.outputs, new.outputs, strict=True)), [new], rule="r", certain=True)
    assert list(made.graph) == [new]
    assert interface_of(made) == before
    sound(made)


def test_observers_hear_of_a_replacement_before_it_happens() -> None:
    heard: list[tuple[str, list[str]]] = []

    class Ear:
        def replacing(
            self, application: Application, outputs: Mapping[ir.Value, ir.Value], nodes: Sequence[ir.Node]
        ) -> None:
            heard.append((application.key, [v.name or "" for v in outputs if v.uses() or v.is_graph_output()]))

        def rewritten(self, model: ir.Model) -> None:
            raise AssertionError("nothing foreign ran")

        def checkpoint(self, model: ir.Model, reached: Checkpoint) -> None:
            heard.append((reached.value, []))

    toys.run(chain(2), swap("Neg", "Abs"), observers=[Ear()])
    assert heard == [("toy:Neg-to-Abs@v1", ["v1"]), ("toy:Neg-to-Abs@v2", ["v2"]), ("round done", [])]


def test_applications_say_where_and_what() -> None:
    made = model(IF.replace("MORE", ""))
    ctx = running(made, kind=Kind.ROUNDING)
    new = ctx.node("Exp", producer(made, "v").inputs, like=value(made, "v"))
    assert ctx.replace({value(made, "v"): new.outputs[0]}, [new], rule="r", certain=True)
    (application,) = ctx.applications
    assert (application.pass_name, application.rule, application.kind) == ("toy", "r", Kind.ROUNDING)
    assert application.graph == "e"
    assert application.outputs[0][0] == "v"


def test_remove_obeys_skip_and_limit() -> None:
    for how, expected in (({}, ["y"]), ({"skip": ["toy:dead@a"]}, ["a", "y"]), ({"limit": 0}, ["a", "y"])):
        made = model("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Neg(x) }")
        ctx = running(made, **how)  # type: ignore[arg-type]
        node = producer(made, "a")
        assert ctx.remove("a", lambda ctx=ctx, node=node: ctx.remove_dead([node]), rule="dead") is (not how)
        assert [n.outputs[0].name for n in made.graph] == expected


def test_a_near_miss_of_a_node_without_a_name_hides_no_other() -> None:
    ctx = running(model("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Relu(a) }"))
    for node, reason in zip(ctx.model.graph, ("first", "second"), strict=True):
        ctx.refuse(node, reason)
    assert ctx.near_misses["toy"] == {"Relu of a": "first", "Relu of y": "second"}


def test_near_misses_are_kept_up_to_a_number() -> None:
    ctx = running(chain(200))
    for node in ctx.model.graph:
        ctx.refuse(node, "because")
    assert 1 <= len(ctx.near_misses["toy"]) <= 50
