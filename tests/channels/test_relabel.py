"""Relabelling a region: overrides, boundaries, orders of nodes, shared constants, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.channels import ChannelClass, Group, channel_classes, is_current, region_of, relabel, rescale
from graphopt.shapes import infer_shapes
from graphopt.verification.structure import check_structure, interface_of
from tests.channels.common import assert_close, check_free, context, feeds_of, free, network

LOW_RANK = (
    """(float[n,8] x) => (float[n,6] y) {
    t = MatMul(x, v) u = MatMul(t, w) b = Add(u, bias) c = Relu(b) y = MatMul(c, w2) }""",
    {"v": (8, 4), "w": (4, 12), "bias": (12,), "w2": (12, 6)},
)


def class_of(model: ir.Model, name: str, axis: int = 1) -> ChannelClass:
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    cls = channel_classes(model).whole(value, axis)
    assert cls is not None
    return cls


def node_of(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == output)


def test_a_pair_of_factors_as_pivots() -> None:
    """What a pivot pass does: products and a Concat in the order of the pivots, and no Gather."""
    before = network(LOW_RANK[0], **LOW_RANK[1])
    model = before.clone()
    infer_shapes(model)
    ctx = context(model)
    first, second = node_of(model, "t"), node_of(model, "u")
    tensors = [model.graph.initializers[name].const_value for name in ("v", "w")]
    v, w = (tensor.numpy().astype(np.float64) for tensor in tensors if tensor is not None)
    product = v @ w
    order = np.random.default_rng(2).permutation(12)
    kept = product[:, order[:4]]
    coefficients = np.linalg.lstsq(kept, product[:, order[4:]], rcond=None)[0]

    def pivot(value_of: Callable[[ir.Value], ir.Value]) -> tuple[list[ir.Node], Mapping[ir.Value, ir.Value]]:
        x, u = first.inputs[0], second.outputs[0]
        assert x is not None
        t = ctx.node("MatMul", [value_of(x), ctx.constant(kept.astype(np.float32), "kept")])
        s = ctx.node("MatMul", [t.outputs[0], ctx.constant(coefficients.astype(np.float32), "c")])
        y = ctx.node("Concat", [t.outputs[0], s.outputs[0]], {"axis": -1}, like=u)
        return [t, s, y], {u: y.outputs[0]}

    def vanish(value_of: Callable[[ir.Value], ir.Value]) -> tuple[list[ir.Node], Mapping[ir.Value, ir.Value]]:
        return [], {}

    cls = class_of(model, "u")
    assert relabel(ctx, cls, order, rule="pivot", overrides={first: vanish, second: pivot}, certain=True)
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Concat", "Add", "Relu", "MatMul"]
    assert set(model.graph.initializers) & {"v", "w"} == set()
    assert check_structure(model, interface_of(before)) == []
    assert_close(before, model, feeds_of(before))
    (application,) = ctx.applications
    assert [old for old, _ in application.outputs] == ["y"]  # what is compared carries no label
    assert not is_current(cls)


def test_an_override_must_give_what_is_read() -> None:
    model = network(LOW_RANK[0], **LOW_RANK[1])
    second = node_of(model, "u")
    with pytest.raises(ValueError, match="no value for 'u'"):
        relabel(
            context(model), class_of(model, "u"), np.arange(12)[::-1], rule="r", overrides={second: lambda _: ([], {})}
        )


def test_wrong_arguments() -> None:
    model = network(LOW_RANK[0], **LOW_RANK[1])
    ctx, cls, pinned = context(model), class_of(model, "u"), class_of(model, "y")
    with pytest.raises(ValueError, match="pinned: graph output"):
        relabel(ctx, pinned, np.arange(6), rule="r")
    with pytest.raises(ValueError, match="no permutation"):
        relabel(ctx, cls, np.zeros(12, np.int64), rule="r")
    with pytest.raises(ValueError, match="no permutation"):
        relabel(ctx, cls, np.arange(11), rule="r")
    with pytest.raises(ValueError, match="positive"):
        rescale(ctx, cls, np.full(12, -1.0), rule="r")


def test_no_gain_and_skipped_change_nothing() -> None:
    model = network(LOW_RANK[0], **LOW_RANK[1])
    ctx, cls = context(model), class_of(model, "u")
    assert not relabel(ctx, cls, np.arange(12)[::-1], rule="r")  # by the cost profile it gains nothing
    ctx.limit = 0
    assert not relabel(ctx, cls, np.arange(12)[::-1], rule="r", certain=True)
    assert check_structure(model, interface_of(model)) == []
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Add", "Relu", "MatMul"]


def test_an_old_class_is_noticed() -> None:
    """The second class was found before the first one was relabelled, and its region has been rewritten since."""
    model = network(LOW_RANK[0], **LOW_RANK[1])
    ctx = context(model)
    one, other = class_of(model, "t"), class_of(model, "u")
    assert relabel(ctx, one, np.arange(4)[::-1], rule="r", certain=True)
    assert not is_current(other)
    assert not relabel(ctx, other, np.arange(12)[::-1], rule="r", certain=True)
    assert "has changed" in next(iter(ctx.near_misses["nothing"].values()))


def test_an_old_class_is_noticed_by_its_constants() -> None:
    """The class before the one that was relabelled: all its values are as they were, but one reader has new columns."""
    model = network("(float[n,8] x) => (float[n,6] y) { a = MatMul(x, w1) b = MatMul(a, w2) y = MatMul(b, w3) }",
                    w1=(8, 4), w2=(4, 5), w3=(5, 6))  # fmt: skip
    ctx = context(model)
    before = class_of(model, "a")
    assert relabel(ctx, class_of(model, "b"), np.arange(5)[::-1], rule="r", certain=True)
    assert not is_current(before)
    assert not relabel(ctx, before, np.arange(4)[::-1], rule="r", certain=True)
    assert "has changed" in next(iter(ctx.near_misses["nothing"].values()))


def test_an_old_node_or_value_of_an_override_is_noticed() -> None:
    """Behind the first class lies a second one, still as it was; an override for it has old things in its hands."""
    model = network(
        "(float[n,8] x) => (float[n,6] y) { a = MatMul(x, w1) b = MatMul(a, w2) c = MatMul(b, w3) y = MatMul(c, w4) }",
        w1=(8, 4), w2=(4, 5), w3=(5, 7), w4=(7, 6),
    )  # fmt: skip
    ctx = context(model)
    last, gone = node_of(model, "c"), node_of(model, "b")
    old, behind = last.inputs[0], class_of(model, "c")
    assert old is not None
    assert relabel(ctx, class_of(model, "a"), np.arange(4)[::-1], rule="r", certain=True)
    assert is_current(behind)
    order = np.arange(7)[::-1]
    assert not relabel(ctx, behind, order, rule="r", overrides={last: lambda of: ([], {last.outputs[0]: of(old)})})
    assert not relabel(ctx, behind, order, rule="r", overrides={gone: lambda of: ([], {})})
    assert all("has changed" in why for why in ctx.near_misses["nothing"].values())
    assert relabel(ctx, behind, order, rule="r", certain=True)


LEAVES_AND_RETURNS = (
    """(float[n,8] x) => (float[n,6] y, float[n,5] z) {
    a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) d = Softmax(c) e = MatMul(d, w3) z = Neg(c)
    f = Add(b, e) y = MatMul(f, w4) }""",
    {"w1": (8, 12), "w2": (12, 5), "w3": (5, 12), "w4": (12, 6)},
)


def test_what_leaves_and_comes_back_is_cloned_too() -> None:
    model = network(LEAVES_AND_RETURNS[0], **LEAVES_AND_RETURNS[1])
    cls = class_of(model, "a")
    assert [node.outputs[0].name for node in region_of(cls)] == ["a", "b", "c", "d", "e", "f", "y"]
    check_free(model)


def test_a_body_in_between_is_refused() -> None:
    text = """(float[n,8] x, bool[1] k) => (float[n,6] y) {
        a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2)
        d = If(k) <then_branch = then () => (float[n,5] t) { t = Relu(c) },
                   else_branch = other () => (float[n,5] o) { o = Neg(c) }>
        e = MatMul(d, w3) f = Add(b, e) y = MatMul(f, w4) }"""
    model = network(text, w1=(8, 12), w2=(12, 5), w3=(5, 12), w4=(12, 6))
    ctx = context(model)
    assert not relabel(ctx, class_of(model, "a"), np.arange(12)[::-1], rule="r", certain=True)
    assert "stands between" in next(iter(ctx.near_misses["nothing"].values()))


def test_a_body_behind_reads_the_new_value() -> None:
    text = """(float[n,8] x, bool[1] k) => (float[n,5] y) {
        a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2)
        y = If(k) <then_branch = then () => (float[n,5] t) { t = Relu(c) },
                   else_branch = other () => (float[n,5] o) { o = Neg(c) }> }"""
    check_free(network(text, w1=(8, 12), w2=(12, 5)))


TANGLED = (
    """(float[n,8] x) => (float[n,6] y, float[n,4] z) {
    a = MatMul(x, w1) b = Relu(a) p = MatMul(x, w5) q = Tanh(p) c = Add(b, q) d = MatMul(c, w2) z = Sigmoid(s)
    s = MatMul(b, w3) e = Neg(d) h = Mul(x, two) i = MatMul(h, w6) f = Add(c, i) y = MatMul(f, w4) }""",
    {"w1": (8, 12), "w5": (8, 12), "w2": (12, 6), "w3": (12, 4), "w6": (8, 12), "w4": (12, 6), "two": (1,)},
)


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_nodes(seed: int) -> None:
    """Readers of the region before what it reads: the clone still finds its place."""
    text, weights = TANGLED
    head, body = text.split("{")
    nodes = [f"{line}".strip() + ")" for line in body.replace("}", "").split(")")[:-1]]
    rng = np.random.default_rng(seed)
    placed: list[str] = []
    made = {"x"}
    waiting = list(nodes)
    while waiting:
        ready = [
            line
            for line in waiting
            if all(
                name in made or name in weights for name in line.split("(")[1].rstrip(")").replace(" ", "").split(",")
            )
        ]
        line = ready[int(rng.integers(len(ready)))]
        waiting.remove(line)
        placed.append(line)
        made.add(line.split("=")[0].strip())
    check_free(network(head + "{" + " ".join(placed) + "}", **weights), seed)


def test_readers_before_inputs() -> None:
    """The first reader of the region stands before a node that the region reads; and so does a Constant."""
    text = """(float[n,8] x) => (float[n,6] y, float[n,5] z) {
        a = MatMul(x, w1) s = MatMul(a, w2) z = Softmax(s) late = Tanh(x) k = Constant<value_floats = [0.5, 1.5]>()
        l = MatMul(late, w3) m = Add(a, l) n0 = ReduceSum<keepdims = 0>(k) o = Mul(m, n0) y = MatMul(o, w4) }"""
    check_free(network(text, w1=(8, 12), w2=(12, 5), w3=(8, 12), w4=(12, 6)))


def test_dead_nodes_between() -> None:
    """What nobody reads stays, and reads what takes the place of what it read."""
    text = """(float[n,6] x) => (float[n,5] y) {
        a = MatMul(x, w0) b = MatMul(a, w1) c = Add(b, w2) d = Mul(c, a) e = MatMul(b, w3) y = MatMul(e, w4) }"""
    check_free(network(text, w0=(6, 4), w1=(4, 4), w2=(4,), w3=(4, 6), w4=(6, 5)))


def test_shared_constants() -> None:
    """A weight of two products ties them; a bias that another class reads as well pins neither."""
    text = """(float[n,8] x) => (float[n,6] y) {
        a = MatMul(x, w) b = Tanh(x) c = MatMul(b, w) d = Mul(a, c) e = Add(d, v) f = Mul(e, v) y = MatMul(f, w2) }"""
    model = network(text, w=(8, 12), v=(12,), w2=(12, 6))
    assert [cls.size for cls in free(model)] == [12]
    check_free(model)


def test_a_tied_weight_and_its_transpose() -> None:
    """W and its transpose in one class each way: both axes of one constant are relabelled."""
    text = """(float[n,8] x) => (float[n,6] y) {
        a = MatMul(x, w1) b = MatMul(a, w) c = Add(a, b) t = Transpose(w) d = MatMul(c, t) e = Add(c, d)
        y = MatMul(e, w2) }"""
    model = network(text, w1=(8, 10), w=(10, 10), w2=(10, 6))
    assert [cls.size for cls in free(model)] == [10]
    check_free(model)


def test_large_constants_are_computed_when_they_are_saved() -> None:
    model = network(LOW_RANK[0].replace("12", "300").replace("[n,6]", "[n,90]"), v=(8, 4), w=(4, 300), bias=(300,),
                    w2=(300, 90))  # fmt: skip
    assert relabel(context(model), class_of(model, "u"), np.arange(300)[::-1], rule="r", certain=True)
    kinds = {value.name: type(value.const_value).__name__ for value in model.graph.initializers.values()}
    assert kinds["w2_relabelled"] == "LazyTensor"
    assert kinds["bias_relabelled"] != "LazyTensor"


def test_float16_scales_stay_in_range() -> None:
    model = network(LOW_RANK[0], **LOW_RANK[1])
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16))
    ctx = context(model)
    (cls,) = [c for c in free(model, Group.SCALE) if c.size == 12]
    assert not rescale(ctx, cls, np.full(12, 1e6), rule="r", certain=True)
    assert "range" in next(iter(ctx.near_misses["nothing"].values()))


# -- random networks ---------------------------------------------------------------------------------------------------

WIDTHS = (4, 6)
UNARY = ("Relu", "Tanh", "Neg", "Softmax", "Abs", "LeakyRelu")


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """Layers in a row, with residuals, gates, splits, gathers, heads and norms between them, chosen at random."""
    values: dict[str, int] = {"x": 6}
    lines: list[str] = []
    weights: dict[str, tuple[int, ...]] = {}
    extra: dict[str, np.ndarray] = {}
    count = itertools.count()

    def add(line: str, width: int) -> str:
        name = f"v{next(count)}"
        lines.append(f"{name} = {line}")
        values[name] = width
        return name

    def weight(*shape: int) -> str:
        known = [name for name, other in weights.items() if other == shape]
        if known and draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(known))
        name = f"w{len(weights)}"
        weights[name] = shape
        return name

    for _ in range(draw(st.integers(3, 12))):
        source = draw(st.sampled_from(list(values)[-4:]))
        width = values[source]
        kind = draw(st.sampled_from(["matmul", "unary", "bias", "scale", "add", "mul", "norm", "concat", "split",
                                     "gather", "heads", "slice", "pool", "flip"]))  # fmt: skip
        if kind == "matmul":
            new = draw(st.sampled_from(WIDTHS))
            add(f"MatMul({source}, {weight(width, new)})", new)
        elif kind == "unary":
            add(f"{draw(st.sampled_from(UNARY))}({source})", width)
        elif kind in ("bias", "scale"):
            add(f"{'Add' if kind == 'bias' else 'Mul'}({source}, {weight(width)})", width)
        elif kind in ("add", "mul"):
            other = draw(st.sampled_from([name for name, found in values.items() if found == width]))
            add(f"{kind.capitalize()}({source}, {other})", width)
        elif kind == "norm":
            add(f"LayerNormalization<axis = -1, epsilon = 0.1>({source}, {weight(width)}, {weight(width)})", width)
        elif kind == "concat" and width <= 12:
            other = draw(st.sampled_from(list(values)))
            add(f"Concat<axis = -1>({source}, {other})", width + values[other])
        elif kind == "split" and width % 2 == 0:
            one, two = f"v{next(count)}", f"v{next(count)}"
            lines.append(f"{one}, {two} = Split<axis = -1, num_outputs = 2>({source})")
            values[one] = values[two] = width // 2
        elif kind == "gather":
            name = f"i{len(extra)}"
            extra[name] = np.array(draw(st.permutations(range(width))))
            add(f"Gather<axis = -1>({source}, {name})", width)
        elif kind == "heads" and width % 2 == 0:
            extra["apart"], extra["together"] = np.array([3, 2, -1]), np.array([3, -1])
            axis = draw(st.sampled_from([1, 2]))
            parts = add(f"Reshape({source}, apart)", -1)
            soft = add(f"Softmax<axis = {axis}>({parts})", -1)
            turned = add(f"Transpose<perm = [0, 2, 1]>({soft})", -1) if draw(st.booleans()) else soft
            add(f"Reshape({turned}, together)", width)
            for name in (parts, soft, turned):
                values.pop(name, None)
        elif kind == "slice" and width > 2:
            extra["one"], extra["last"], extra["end"] = np.array([1]), np.array([-1]), np.array([99])
            add(f"Slice({source}, one, end, last)", width - 1)
        elif kind == "pool":
            mean = add(f"ReduceMax<keepdims = 1>({source}, rows)", -1)
            values.pop(mean)
            extra["rows"] = np.array([-1])
            add(f"Sub({source}, {mean})", width)
        elif kind == "flip":
            add(f"Sum({source}, {source})", width)
    last = list(values)[-1]
    lines.append(f"y = MatMul({last}, {weight(values[last], 5)})")
    return f"(float[3,6] x) => (float[3,5] y) {{ {' '.join(lines)} }}", weights, extra


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks())
def test_random_networks(made: tuple[str, dict[str, tuple[int, ...]], dict[str, np.ndarray]]) -> None:
    text, weights, extra = made
    check_free(network(text, extra=extra, **weights))
