"""The classes of whole networks are what theory says, and every free one can be relabelled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.channels import Group, channel_classes
from tests.channels.common import check_free, free, network, sizes

MLP = (
    """(float[n,8] x) => (float[n,6] y) {
    a = MatMul(x, w1) b = Add(a, b1) c = Relu(b) d = MatMul(c, w2) y = Add(d, b2) }""",
    {"w1": (8, 16), "b1": (16,), "w2": (16, 6), "b2": (6,)},
)
GATED = (
    """(float[n,8] x) => (float[n,8] y) {
    g = MatMul(x, wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, wu) h = Mul(a, u) y = MatMul(h, wd) }""",
    {"wg": (8, 16), "wu": (8, 16), "wd": (16, 8)},
)
RESIDUAL = (
    """(float[n,8] x) => (float[n,4] y) {
    e = MatMul(x, we) l = LayerNormalization<axis = -1>(e, g, b) a = MatMul(l, w1) c = Gelu(a) d = MatMul(c, w2)
    r = Add(e, d) f = LayerNormalization<axis = -1>(r, g2, b2) y = MatMul(f, wo) }""",
    {"we": (8, 12), "g": (12,), "b": (12,), "w1": (12, 20), "w2": (20, 12), "g2": (12,), "b2": (12,), "wo": (12, 4)},
)
CONVS = (
    """(float[n,3,8,8] x) => (float[n,5] y) {
    a = Conv<pads = [1,1,1,1]>(x, w1) b = BatchNormalization(a, g, s, m, posv) c = Relu(b)
    d = Conv<pads = [1,1,1,1], group = 12>(c, w2, b2) e = BatchNormalization(d, g2, s2, m2, posv2) f = Relu(e)
    h = Conv(f, w3, b3) i = Add(h, b) p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(i) q = Flatten(p)
    y = Gemm<transB = 1>(q, w4, b4) }""",
    {
        "w1": (12, 3, 3, 3),
        "g": (12,),
        "s": (12,),
        "m": (12,),
        "posv": (12,),
        "w2": (12, 1, 3, 3),
        "b2": (12,),
        "g2": (12,),
        "s2": (12,),
        "m2": (12,),
        "posv2": (12,),
        "w3": (12, 12, 1, 1),
        "b3": (12,),
        "w4": (5, 192),
        "b4": (5,),
    },
)
GROUPED = (
    """(float[n,6,5,5] x) => (float[n,4,5,5] y) {
    a = Conv(x, w1, b1) b = Relu(a) c = Conv<group = 3>(b, w2, b2) d = GroupNormalization<num_groups = 3>(c, g, s)
    e = ConvTranspose<group = 2>(d, w3, b3) y = Conv(e, w4) }""",
    {
        "w1": (12, 6, 1, 1),
        "b1": (12,),
        "w2": (24, 4, 1, 1),
        "b2": (24,),
        "g": (24,),
        "s": (24,),
        "w3": (24, 8, 1, 1),
        "b3": (16,),
        "w4": (4, 16, 1, 1),
    },
)
SPLIT = (
    """(float[n,8] x) => (float[n,6] y) {
    a = MatMul(x, w1) p, q, r = Split<axis = -1>(a, sizes) s = Relu(p) t = Tanh(r) c = Concat<axis = -1>(t, q, s)
    d = MatMul(c, w2) o = Slice(d, zero, seven, last) y = MatMul(o, w3) }""",
    {"w1": (8, 12), "w2": (12, 10), "w3": (7, 6)},
)
SPLIT_EXTRA = {"sizes": np.array([5, 3, 4]), "zero": np.array([0]), "seven": np.array([7]), "last": np.array([-1])}


def attention(rope: bool, kv_heads: int, heads: int = 4, size: int = 6, model: int = 10) -> ir.Model:
    """Self-attention as exporters spell it, with repeated key and value heads and rotary positions."""
    half = size // 2
    turn = """
        {x}1 = Slice({x}t, zero, half, last) {x}2 = Slice({x}t, half, end, last) {x}n = Neg({x}2)
        {x}o = Concat<axis = -1>({x}n, {x}1) {x}c = Mul({x}t, cos) {x}s = Mul({x}o, sin) {x}e = Add({x}c, {x}s)"""
    repeat = """
        {x}u = Unsqueeze({x}e, two) {x}x = Expand({x}u, wide) {x}h = Reshape({x}x, all)"""
    plain = " {x}e = Identity({x}t)"
    rotate = turn if rope else plain
    text = f"""(float[n,5,{model}] x) => (float[n,5,{model}] y) {{
        q = MatMul(x, wq) qb = Add(q, bq) k = MatMul(x, wk) v = MatMul(x, wv)
        qr = Reshape(qb, qshape) kr = Reshape(k, kshape) vr = Reshape(v, kshape)
        qt = Transpose<perm = [0, 2, 1, 3]>(qr) kt = Transpose<perm = [0, 2, 1, 3]>(kr)
        vt = Transpose<perm = [0, 2, 1, 3]>(vr)
        {rotate.format(x="q")} {rotate.format(x="k")} {plain.format(x="v")}
        {repeat.format(x="k")} {repeat.format(x="v")}
        kk = Transpose<perm = [0, 1, 3, 2]>(kh) l = MatMul(qe, kk) m = Mul(l, scale) p = Softmax<axis = -1>(m)
        c = MatMul(p, vh) ct = Transpose<perm = [0, 2, 1, 3]>(c) cr = Reshape(ct, merged) y = MatMul(cr, wo) }}"""
    rng = np.random.default_rng(5)
    angle = rng.uniform(0, 3, (5, half))
    angle = np.concatenate([angle, angle], 1).astype(np.float32)
    extra: dict[str, np.ndarray] = {
        "qshape": np.array([0, 0, heads, size]),
        "kshape": np.array([0, 0, kv_heads, size]),
        "zero": np.array([0]),
        "half": np.array([half]),
        "end": np.array([2**62]),
        "last": np.array([-1]),
        "two": np.array([2]),
        "wide": np.array([1, 1, heads // kv_heads, 1, 1]),
        "all": np.array([0, heads, 5, size]),
        "merged": np.array([0, 0, heads * size]),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "scale": np.array(0.4, np.float32),
    }
    return network(
        text,
        extra=extra,
        wq=(model, heads * size),
        bq=(heads * size,),
        wk=(model, kv_heads * size),
        wv=(model, kv_heads * size),
        wo=(heads * size, model),
    )


TIED = (
    """(int64[n,4] ids) => (float[n,4,9] y) {
    e = Gather<axis = 0>(table, ids) r = MatMul(e, w1) a = Relu(r) d = MatMul(a, w2) s = Add(e, d)
    t = Transpose<perm = [1, 0]>(table) y = MatMul(s, t) }""",
    {"table": (9, 8), "w1": (8, 12), "w2": (12, 8)},
)


@pytest.mark.parametrize(
    ("text", "weights", "permutations", "scales"),
    [
        (*MLP, [16], [16]),
        (*GATED, [16], [16]),
        # The norms' outputs can be scaled, not their inputs; Gelu lets no scale pass.
        (*RESIDUAL, [12, 20], [12, 12]),
        # BatchNormalization and depthwise weights take up a scale, so that there is one class on either side.
        (*CONVS, [12], [12, 12, 12, 12]),
        # One table embeds and predicts: its columns are the residual stream, its rows the words that are asked for.
        (*TIED, [8, 12], [12]),
    ],
    ids=["mlp", "gated", "residual", "convs", "tied"],
)
def test_networks(text: str, weights: dict[str, tuple[int, ...]], permutations: list[int], scales: list[int]) -> None:
    model = network(text, **weights)
    assert sizes(model) == permutations
    assert sizes(model, Group.SCALE) == scales
    check_free(model)


def test_parts_of_an_axis() -> None:
    model = network(SPLIT[0], extra=SPLIT_EXTRA, **SPLIT[1])
    assert sizes(model) == [3, 3, 4, 5, 7]
    assert sizes(model, Group.SCALE) == [3, 3, 5, 7]  # Tanh has the four
    check_free(model)


def test_groups() -> None:
    """Two groups of twelve and three of eight do not go into each other; what is within groups is free."""
    model = network(GROUPED[0], opset=21, **GROUPED[1])
    assert sizes(model) == [4, 8]
    check_free(model)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention(rope: bool, kv: int) -> None:
    """Heads with their keys and values, heads that share them, q with k (pairs of them with rotations), v with o."""
    model = attention(rope, kv)
    heads = {1: [4], 2: [2, 2], 4: [4]}[kv]
    assert sizes(model) == sorted([*heads, 3 if rope else 6, 6])
    check_free(model)


def test_values_and_keys_as_scales() -> None:
    """q by s and k by 1/s: the products stay."""
    model = attention(rope=False, kv_heads=4)
    (cls,) = [c for c in free(model, Group.SCALE) if any(s.value.name == "wk" and s.outer == 4 for s in c.slots)]
    signs = {s.value.name: s.inverse for s in cls.slots}
    assert signs["wq"] != signs["wk"]
    assert signs["q"] is False


def test_residual_of_unit_rms_norms_can_be_rotated() -> None:
    """What QuaRot needs: with unit gammas the residual stream is free for orthogonal matrices."""
    text = """(int64[n,4] ids) => (float[n,4,9] y) {
        e = Gather(table, ids) a = RMSNormalization(e, gamma) b = MatMul(a, w1) c = Sigmoid(b) d = MatMul(c, w2)
        r = Add(e, d) f = RMSNormalization(r, gamma) y = MatMul(f, w3) }"""
    shapes = {"table": (7, 8), "w1": (8, 12), "w2": (12, 8), "w3": (8, 9)}
    ones = network(text, opset=23, extra={"gamma": np.ones(8, np.float32)}, **shapes)
    assert sizes(ones, Group.ORTHOGONAL) == [8]
    assert sizes(ones, Group.LINEAR) == []
    others = network(text, opset=23, extra={"gamma": np.full(8, 2, np.float32)}, **shapes)
    assert sizes(others, Group.ORTHOGONAL) == []
    assert sizes(others) == [8, 12]
    check_free(others)


PINNED = [
    ("(float[n,8] x) => (float[n,8] y) { y = Relu(x) }", {}, "x", 1, "graph input 'x'"),
    ("(float[n,8] x) => (float[n,8] y) { y = Relu(x) }", {}, "y", 1, "graph input 'x'"),
    ("(float[n,4] x) => (float[n,8] y) { y = MatMul(x, w) }", {"w": (4, 8)}, "w", 1, "graph output 'y'"),
    (
        "(float[n,4] x, float[4,8] w) => (float[n,3] y) { a = MatMul(x, w) y = MatMul(a, w2) }",
        {"w": (4, 8), "w2": (8, 3)}, "a", 1, "a caller may override 'w'",
    ),
    (
        "(float[n,4] x) => (float[n,3] y) { a = MatMul(x, w) b = CumSum(a, one) y = MatMul(b, w2) }",
        {"w": (4, 8), "w2": (8, 3), "one": ()}, "w", 1, "op CumSum is not known",
    ),
    (
        "(float[9,4] x, int64[n] i) => (float[n,4] y) { a = MatMul(t, x) y = Gather(a, i) }",
        {"t": (6, 9)}, "t", 0, "computed indices of Gather",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "weights", "name", "axis", "reason"), PINNED)
def test_pinned(text: str, weights: dict[str, tuple[int, ...]], name: str, axis: int, reason: str) -> None:
    model = network(text, **weights)
    values = {v.name: v for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None}
    cls = channel_classes(model).whole(values[name], axis)
    assert cls is not None
    assert any(reason in why for why in cls.pinned), cls.pinned


def test_bodies_pin_what_they_capture() -> None:
    text = """(float[n,4] x, bool[1] c) => (float[n,3] y) {
        a = MatMul(x, w1) b = MatMul(x, w2)
        d = If(c) <then_branch = then () => (float[n,8] t) { t = Relu(a) },
                   else_branch = other () => (float[n,8] e) { e = Neg(a) }>
        f = Add(d, b) g = MatMul(x, w3) h = Relu(g) i = MatMul(f, w4) j = MatMul(h, w5) y = Add(i, j) }"""
    model = network(text, w1=(4, 8), w2=(4, 8), w3=(4, 8), w4=(8, 3), w5=(8, 3))
    assert sizes(model) == [8]
    assert check_free(model) == 2
    reasons = [why for cls in channel_classes(model).classes for why in cls.pinned]
    assert any(why.startswith("read or made by If") for why in reasons)


def test_sequences_are_pinned() -> None:
    text = """(float[n,4] x) => (float[n,3] y) {
        a = MatMul(x, w1) s = SequenceConstruct(a) b = SequenceAt(s, i) y = MatMul(b, w2) }"""
    model = network(text, extra={"i": np.array(0)}, w1=(4, 8), w2=(8, 3))
    assert sizes(model) == []


def test_deterministic_and_read_nothing() -> None:
    """The same classes in the same order each time; a weight is never looked at."""
    model = network(RESIDUAL[0], **RESIDUAL[1])

    def boom() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.LazyTensor(boom, dtype=value.const_value.dtype, shape=ir.Shape(value.const_value.shape))
    told = [
        [(cls.size, cls.pinned, [(s.value.name, s.axis) for s in cls.slots]) for cls in channel_classes(model).classes]
        for _ in range(2)
    ]
    assert told[0] == told[1]
    frees = [not pinned for _, pinned, _ in told[0]]
    assert frees == sorted(frees, reverse=True)


def test_sizes_that_exporters_leave_open() -> None:
    """Batch and sequence read off the input, the number of heads and the merged axis left to the runtime."""
    text = """(float[batch,sequence,10] x) => (float[b,s,10] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) shape = Shape<start = 0, end = 2>(x)
        apart = Concat<axis = 0>(shape, rest, width) together = Concat<axis = 0>(shape, rest)
        qr = Reshape(q, apart) kr = Reshape(k, apart) vr = Reshape(v, apart)
        qt = Transpose<perm = [0, 2, 1, 3]>(qr) kt = Transpose<perm = [0, 2, 3, 1]>(kr)
        vt = Transpose<perm = [0, 2, 1, 3]>(vr) l = MatMul(qt, kt) p = Softmax<axis = -1>(l) c = MatMul(p, vt)
        ct = Transpose<perm = [0, 2, 1, 3]>(c) cr = Reshape(ct, together) y = MatMul(cr, wo) }"""
    extra = {"rest": np.array([-1]), "width": np.array([6])}
    model = network(text, extra=extra, wq=(10, 24), wk=(10, 24), wv=(10, 24), wo=(24, 10))
    assert sizes(model) == [4, 6, 6]
    check_free(model)
