"""Each operator between two products: which groups pass, that they do, and that the others do not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.channels import ChannelClass, Group, Slot, channel_classes
from tests.channels.common import assert_close, check_free, feeds_of, free, network
from tests.passes.common import run_ort

P, S, O, L = Group.PERMUTATION, Group.SCALE, Group.ORTHOGONAL, Group.LINEAR  # noqa: E741
ALL = {P, S, O, L}


def element(group: Group, size: int, seed: int = 3) -> np.ndarray:
    """A random element of a group, as a matrix."""
    rng = np.random.default_rng(seed)
    if group is P:
        return np.eye(size)[rng.permutation(size)]
    if group is S:
        return np.diag(np.exp(rng.uniform(-1, 1, size)))
    orthogonal = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return orthogonal if group is O else orthogonal @ np.diag(np.exp(rng.uniform(-0.5, 0.5, size))) @ orthogonal[::-1]


def transform(model: ir.Model, slots: list[Slot], size: int, group: Group) -> ir.Model:
    """A copy with the constants of a class changed where they are: all that the class asks of them."""
    copy = model.clone()
    matrix = element(group, size)
    contragredient = np.linalg.inv(matrix).T
    for slot in slots:
        value = copy.graph.initializers.get(slot.value.name or "")
        if value is None:
            continue
        assert slot.axis is not None and value.const_value is not None
        array = np.moveaxis(value.const_value.numpy().astype(np.float64), slot.axis, 0).copy()
        end = slot.offset + slot.outer * size * slot.inner
        part = array[slot.offset : end].reshape(slot.outer, size, slot.inner, *array.shape[1:])
        used = contragredient if slot.inverse else matrix
        array[slot.offset : end] = np.einsum("ij,ojk...->oik...", used, part).reshape(-1, *array.shape[1:])
        value.const_value = ir.tensor(np.moveaxis(array, 0, slot.axis).astype(np.float32))
    return copy


def check_matrices(model: ir.Model) -> None:
    """Every free class of orthogonal and of general matrices leaves the outputs as they are."""
    for group in (O, L):
        for cls in free(model, group):
            names = [(s.value.name, s.axis, s.offset, s.outer, s.inner, s.inverse) for s in cls.slots]
            assert_close(model, transform(model, list(cls.slots), cls.size, group), feeds_of(model), f"{group} {names}")


def class_of(model: ir.Model, name: str, axis: int, group: Group) -> ChannelClass | None:
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    return channel_classes(model, group).whole(value, axis)


UNARY = [
    ("Relu(a)", {P, S}),
    ("LeakyRelu(a)", {P, S}),
    ("Abs(a)", {P, S}),
    ("Sigmoid(a)", {P}),
    ("Tanh(a)", {P}),
    ("Gelu(a)", {P}),
    ("Softmax<axis = -1>(a)", {P}),
    ("LogSoftmax<axis = 1>(a)", {P}),
    ("LpNormalization(a)", {P, O}),
    ("LpNormalization<p = 1>(a)", {P}),
    ("Identity(a)", ALL),
    ("Neg(a)", ALL),
    ("Cast<to = 11>(a)", ALL),
    ("Dropout(a)", ALL),
    ("Clip(a, zero)", {P, S}),
    ("Clip(a, zero, one)", {P}),
    ("Add(a, one)", {P}),
    ("Mul(a, one)", ALL),
    ("Div(a, two)", ALL),
    ("Pow(a, two)", {P}),
    ("Max(a, zero)", {P, S}),
    ("Max(a, one)", {P}),
    ("Add(a, zero)", ALL),
    ("PRelu(a, slope)", {P, S}),
    ("CumSum(a, axis)", set()),
    ("Transpose<perm = [0, 1]>(a)", ALL),
    ("Pad(a, nowhere)", ALL),
    ("Slice(a, start, big, axes)", ALL),
    ("Sum(a, a)", ALL),
    ("Mean(a, a, a)", ALL),
    ("Mul(a, a)", {P}),
    ("Where(less, a, one)", {P}),
]


@pytest.mark.parametrize(("op", "groups"), UNARY, ids=[op for op, _ in UNARY])
def test_between_products(op: str, groups: set[Group]) -> None:
    extra = {
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "two": np.array(2, np.float32),
        "slope": np.array([0.1], np.float32),
        "axis": np.array(1),
        "nowhere": np.array([0, 0, 0, 0]),
        "start": np.array([0]),
        "big": np.array([2**62]),
        "axes": np.array([1]),
    }
    back = "c = Cast<to = 1>(b)" if op.startswith("Cast") else "c = Identity(b)"
    if "less" in op:
        back = "c = Identity(b)"
        op = op.replace("less", "l")
        extra["zero"] = np.array(0, np.float32)
    before = "l = Less(a, zero)" if op.startswith("Where") else ""
    used = {name: array for name, array in extra.items() if name in op or (before and name == "zero")}
    model = network(
        f"(float[n,6] x) => (float[n,4] y) {{ a = MatMul(x, w1) {before} b = {op} {back} y = MatMul(c, w2) }}",
        extra=used,
        w1=(6, 8),
        w2=(8, 4),
    )
    feeds = feeds_of(model)
    (expected,) = run_ort(model, feeds)
    for group in Group:
        cls = class_of(model, "a", 1, group)
        assert cls is not None
        assert cls.free == (group in groups), (group, cls.pinned)
        if cls.free:
            continue
        # It is pinned for a reason: the products alone would be wrong.
        w1, w2 = model.graph.initializers["w1"], model.graph.initializers["w2"]
        slots = [Slot(w1, 1, 0, 1, 1, False), Slot(w2, 0, 0, 1, 1, True)]
        (found,) = run_ort(transform(model, slots, 8, group), feeds)
        assert not np.allclose(found, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())
    check_free(model)
    check_matrices(model)


# Networks of one thing each: what is free for permutations and for scales (sizes, in order), and for matrices.
Case = tuple[str, dict[str, tuple[int, ...]], dict[str, np.ndarray], list[int], list[int], list[int], list[int]]
CASES: dict[str, Case] = {
    "gemm": (
        """(float[5,n] x) => (float[n,3] y) { a = Gemm<transA = 1, transB = 1, alpha = 0.5, beta = 2.0>(x, w1, c)
        b = Relu(a) y = Gemm<transA = 0>(b, w2, d) }""",
        {"w1": (7, 5), "c": (7,), "w2": (7, 3), "d": (1, 3)}, {}, [7], [7], [], [],
    ),
    "gemm of one constant": (
        "(float[n,5] x) => (float[n,3] y) { a = Gemm(x, w1, c) y = MatMul(a, w2) }",
        {"w1": (5, 7), "c": (1,), "w2": (7, 3)}, {}, [7], [], [], [],
    ),
    "bias on either side": (
        "(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b = Add(c, a) d = Sub(b, e) y = MatMul(d, w2) }",
        {"w1": (5, 7), "c": (7,), "w2": (7, 3), "e": (1, 7)}, {}, [7], [7], [7], [7],
    ),
    "affine": (
        """(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b = Mul(a, c) d = Add(b, e) f = Div(d, posg)
        y = MatMul(f, w2) }""",
        {"w1": (5, 7), "c": (7,), "w2": (7, 3), "e": (7,), "posg": (7,)}, {}, [7], [7, 7, 7], [], [],
    ),
    "reciprocal of a constant": (
        "(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b = Exp(a) d = Div(c, b) y = MatMul(d, w2) }",
        {"w1": (5, 7), "c": (7,), "w2": (7, 3)}, {}, [7], [7], [], [],
    ),
    "product of two": (
        "(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b = MatMul(x, w2) c = Mul(a, b) y = MatMul(c, w3) }",
        {"w1": (5, 7), "w2": (5, 7), "w3": (7, 3)}, {}, [7], [7], [], [],
    ),
    "product of two layers": (
        "(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b = MatMul(a, w2) y = MatMul(b, w3) }",
        {"w1": (5, 7), "w2": (7, 6), "w3": (6, 3)}, {}, [6, 7], [6, 7], [6, 7], [6, 7],
    ),
    "layer norm": (
        """(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b = LayerNormalization<axis = -1>(a, g, s)
        y = MatMul(b, w2) }""",
        {"w1": (5, 7), "g": (7,), "s": (7,), "w2": (7, 3)}, {}, [7], [7], [], [],
    ),
    "instance norm": (
        """(float[n,3,4] x) => (float[n,2,4] y) { a = Conv(x, w1) b = InstanceNormalization(a, g, s) c = Relu(b)
        y = Conv(c, w2) }""",
        {"w1": (6, 3, 1), "g": (6,), "s": (6,), "w2": (2, 6, 1)}, {}, [6], [6], [], [],
    ),
    "batch norm": (
        """(float[n,3,4] x) => (float[n,2,4] y) { a = Conv(x, w1, b1) b = BatchNormalization(a, g, s, m, posv)
        y = Conv(b, w2) }""",
        {"w1": (6, 3, 1), "b1": (6,), "g": (6,), "s": (6,), "m": (6,), "posv": (6,), "w2": (2, 6, 1)}, {},
        [6], [6, 6], [], [],
    ),
    "depthwise": (
        """(float[n,3,4] x) => (float[n,2,4] y) { a = Conv(x, w1, b1) b = Conv<group = 6>(a, w, b2) c = Conv(b, w2)
        y = Tanh(c) }""",
        {"w1": (6, 3, 1), "b1": (6,), "w": (6, 1, 1), "b2": (6,), "w2": (2, 6, 1)}, {}, [6], [6, 6], [], [],
    ),
    "depthwise, two a channel": (
        "(float[n,3,4] x) => (float[n,2,4] y) { a = Conv(x, w1) b = Conv<group = 3>(a, w, b2) y = Conv(b, w2) }",
        {"w1": (3, 3, 1), "w": (6, 1, 1), "b2": (6,), "w2": (2, 6, 1)}, {}, [2, 3], [2], [2], [2],
    ),
    "groups": (
        "(float[n,3,4] x) => (float[n,2,4] y) { a = Conv(x, w1) b = Conv<group = 2>(a, w, b2) y = Conv(b, w2) }",
        {"w1": (6, 3, 1), "w": (10, 3, 1), "b2": (10,), "w2": (2, 10, 1)}, {}, [2, 3, 5], [3, 5], [3, 5], [3, 5],
    ),
    "transposed convolution": (
        "(float[n,3,4] x) => (float[n,2,5] y) { a = Conv(x, w1) b = ConvTranspose(a, w, b2) y = Conv(b, w2) }",
        {"w1": (6, 3, 1), "w": (6, 5, 2), "b2": (5,), "w2": (2, 5, 1)}, {}, [5, 6], [5, 6], [5, 6], [5, 6],
    ),
    "transposed convolution in groups": (
        """(float[n,3,4] x) => (float[n,2,5] y) { a = Conv(x, w1) b = ConvTranspose<group = 2>(a, w, b2)
        y = Conv(b, w2) }""",
        {"w1": (6, 3, 1), "w": (6, 5, 2), "b2": (10,), "w2": (2, 10, 1)}, {}, [2, 3, 5], [3, 5], [3, 5], [3, 5],
    ),
    "pools": (
        """(float[n,3,4,4] x) => (float[n,2] y) { a = Conv(x, w1) b = AveragePool<kernel_shape = [2,2]>(a)
        c = GlobalAveragePool(b) d = Flatten(c) y = MatMul(d, w2) }""",
        {"w1": (6, 3, 1, 1), "w2": (6, 2)}, {}, [6], [6], [6], [6],
    ),
    "largest": (
        """(float[n,3,4,4] x) => (float[n,2] y) { a = Conv(x, w1) b = MaxPool<kernel_shape = [2,2]>(a)
        c = GlobalMaxPool(b) d = Flatten(c) y = MatMul(d, w2) }""",
        {"w1": (6, 3, 1, 1), "w2": (6, 2)}, {}, [6], [6], [], [],
    ),
    "channels and places merged": (
        "(float[n,3,2,2] x) => (float[n,2] y) { a = Conv(x, w1) d = Reshape(a, shape) y = MatMul(d, w2) }",
        {"w1": (6, 3, 1, 1), "w2": (24, 2)}, {"shape": np.array([-1, 24])}, [6], [6], [6], [6],
    ),
    "pixel shuffle": (
        """(float[2,3,2,2] x) => (float[2,2,4,4] y) { a = Conv(x, w1) b = Reshape(a, s1)
        c = Transpose<perm = [0, 1, 4, 2, 5, 3]>(b) d = Reshape(c, s2) y = Conv(d, w2) }""",
        {"w1": (20, 3, 1, 1), "w2": (2, 5, 1, 1)},
        {"s1": np.array([2, 5, 2, 2, 2, 2]), "s2": np.array([2, 5, 4, 4])}, [5], [5], [5], [5],
    ),
    "means": (
        """(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) m = ReduceMean<keepdims = 1>(a, last) b = Sub(a, m)
        y = MatMul(b, w2) }""",
        {"w1": (5, 7), "w2": (7, 3)}, {"last": np.array([-1])}, [7], [], [], [],
    ),
    "sum over rows": (
        """(float[4,5] x) => (float[1,3] y) { a = MatMul(x, w1) b = ReduceSum(a, first) y = MatMul(b, w2) }""",
        {"w1": (5, 7), "w2": (7, 3)}, {"first": np.array([0])}, [7], [7], [7], [7],
    ),
    "largest of rows": (
        """(float[4,5] x) => (float[3] y) { a = MatMul(x, w1) b = ReduceMax<keepdims = 0>(a, first)
        y = MatMul(b, w2) }""",
        {"w1": (5, 7), "w2": (7, 3)}, {"first": np.array([0])}, [7], [7], [], [],
    ),
    "argmax": (
        "(float[n,5] x) => (int64[n] y) { a = MatMul(x, w1) y = ArgMax<axis = 1, keepdims = 0>(a) }",
        {"w1": (5, 7)}, {}, [], [], [], [],
    ),
    "split and concat": (
        """(float[n,5] x) => (float[n,3] y) { a = MatMul(x, w1) b, c = Split<axis = 1, num_outputs = 2>(a)
        d = Concat<axis = 1>(c, x, b) y = MatMul(d, w2) }""",
        {"w1": (5, 8), "w2": (13, 3)}, {}, [4, 4], [4, 4], [4, 4], [4, 4],
    ),
    "fused projections of heads": (
        """(float[2,3,5] x) => (float[2,3,4] y) { a = MatMul(x, w1) b = Reshape(a, s)
        q, k, v = Split<axis = 3>(b, ones) c = Mul(q, k) d = Add(c, v) e = Reshape(d, m) y = MatMul(e, w2) }""",
        {"w1": (5, 24), "w2": (8, 4)},
        {"s": np.array([2, 3, 2, 3, 4]), "ones": np.array([1, 1, 1]), "m": np.array([2, 3, 8])},
        [2, 4], [], [], [],
    ),
    "halves within heads": (
        """(float[2,3,5] x) => (float[2,3,4] y) { a = MatMul(x, w1) b = Reshape(a, s)
        q, k = Split<axis = 3>(b, sizes) c = Relu(q) e = Reshape(c, m) f = MatMul(e, w2) g = Reshape(k, m2)
        h = MatMul(g, w3) y = Add(f, h) }""",
        {"w1": (5, 14), "w2": (6, 4), "w3": (8, 4)},
        {"s": np.array([2, 3, 2, 7]), "sizes": np.array([3, 4]), "m": np.array([2, 3, 6]), "m2": np.array([2, 3, 8])},
        [2, 3, 4], [2, 3, 4], [4], [4],
    ),
    "expanded": (
        "(float[3,1,5] x) => (float[3,4,2] y) { a = MatMul(x, w1) b = Expand(a, s) c = Add(b, e) y = MatMul(c, w2) }",
        {"w1": (5, 7), "w2": (7, 2), "e": (4, 7)}, {"s": np.array([3, 4, 7])}, [7], [7], [7], [7],
    ),
    "tiled": (
        "(float[n,5] x) => (float[n,2] y) { a = MatMul(x, w1) b = Tile(a, r) y = MatMul(b, w2) }",
        {"w1": (5, 7), "w2": (21, 2)}, {"r": np.array([1, 3])}, [3, 7], [], [], [],
    ),
    "part by part": (
        "(float[n,5] x) => (float[n,2] y) { a = MatMul(x, w1) b = Slice(a, s, e, one, one) y = MatMul(b, w2) }",
        {"w1": (5, 9), "w2": (4, 2)}, {"s": np.array([-7]), "e": np.array([-3]), "one": np.array([1])},
        [2, 3, 4], [2, 3, 4], [2, 3, 4], [2, 3, 4],
    ),
    "every second": (
        "(float[n,5] x) => (float[n,2] y) { a = MatMul(x, w1) b = Slice(a, s, e, one, two) y = MatMul(b, w2) }",
        {"w1": (5, 8), "w2": (4, 2)},
        {"s": np.array([0]), "e": np.array([8]), "one": np.array([1]), "two": np.array([2])}, [], [], [], [],
    ),
    "some of the channels": (
        "(float[n,5] x) => (float[n,2] y) { a = MatMul(x, w1) b = Gather<axis = 1>(a, i) y = MatMul(b, w2) }",
        {"w1": (5, 8), "w2": (4, 2)}, {"i": np.array([3, -1, 3, 0])}, [4, 8], [], [], [],
    ),
    "one of the rows": (
        "(float[4,5] x) => (float[2] y) { a = MatMul(x, w1) b = Gather<axis = 0>(a, i) y = MatMul(b, w2) }",
        {"w1": (5, 8), "w2": (8, 2)}, {"i": np.array(2)}, [8], [8], [8], [8],
    ),
    "embedding": (
        "(int64[n] i) => (float[n,2] y) { a = Gather(table, i) y = MatMul(a, w) }",
        {"table": (9, 6), "w": (6, 2)}, {}, [6], [6], [6], [6],
    ),
    "squeezed": (
        """(float[n,5] x) => (float[n,2] y) { a = MatMul(x, w1) b = Unsqueeze(a, one) c = Relu(b) d = Squeeze(c, one)
        y = MatMul(d, w2) }""",
        {"w1": (5, 8), "w2": (8, 2)}, {"one": np.array([1])}, [8], [8], [], [],
    ),
    "resized": (
        """(float[2,3,4,4] x) => (float[2,2,8,8] y) { a = Conv(x, w1) b = Resize(a, , s) y = Conv(b, w2) }""",
        {"w1": (6, 3, 1, 1), "w2": (2, 6, 1, 1)}, {"s": np.array([1, 1, 2, 2], np.float32)}, [6], [6], [6], [6],
    ),
    "padded": (
        "(float[2,3,4] x) => (float[2,2,6] y) { a = Conv(x, w1) b = Pad(a, p) y = Conv(b, w2) }",
        {"w1": (6, 3, 1), "w2": (2, 6, 1)}, {"p": np.array([0, 0, 1, 0, 0, 1])}, [6], [6], [6], [6],
    ),
    "padded with ones": (
        "(float[2,3,4] x) => (float[2,2,6] y) { a = Conv(x, w1) b = Pad(a, p, one) y = Conv(b, w2) }",
        {"w1": (6, 3, 1), "w2": (2, 6, 1)},
        {"p": np.array([0, 0, 1, 0, 0, 1]), "one": np.array(1, np.float32)}, [6], [], [], [],
    ),
    "einsum": (
        """(float[n,4,5] x) => (float[n,4,2] y) { a = Einsum<equation = "bsd,dh->bsh">(x, w1)
        b = Relu(a) y = Einsum<equation = "bsh,ho->bso">(b, w2) }""",
        {"w1": (5, 8), "w2": (8, 2)}, {}, [8], [8], [], [],
    ),
    "blocks of codes": (
        """(float[n,8] x) => (float[n,3] y) { w = DequantizeLinear<axis = 0, block_size = 4>(codes, poss)
        a = MatMul(x, w) y = MatMul(a, w2) }""",
        {"poss": (2, 6), "w2": (6, 3)},
        {"codes": np.arange(48, dtype=np.int8).reshape(8, 6)}, [6], [], [], [],
    ),
    "codes with a scale a column": (
        """(float[n,8] x) => (float[n,3] y) { w = DequantizeLinear<axis = 1>(codes, poss, zero) a = MatMul(x, w)
        b = Relu(a) y = MatMul(b, w2) }""",
        {"poss": (6,), "w2": (6, 3)},
        {"codes": np.arange(48, dtype=np.int8).reshape(8, 6), "zero": np.arange(6, dtype=np.int8)}, [6], [6], [], [],
    ),
    "weight behind operators": (
        """(float[n,5] x) => (float[n,3] y) { t = Transpose(w1) i = Cast<to = 1>(t) a = MatMul(x, i) b = Relu(a)
        y = MatMul(b, w2) }""",
        {"w1": (7, 5), "w2": (7, 3)}, {}, [7], [7], [], [],
    ),
    "batched weight": (
        """(float[3,n,5] x) => (float[3,n,2] y) { a = MatMul(x, w1) b = Relu(a) y = MatMul(b, w2) }""",
        {"w1": (3, 5, 7), "w2": (3, 7, 2)}, {}, [7], [7], [], [],
    ),
    "vectors": (
        "(float[5] x) => (float y) { a = MatMul(x, w1) b = Relu(a) y = MatMul(b, w2) }",
        {"w1": (5, 7), "w2": (7,)}, {}, [7], [7], [], [],
    ),
    "counted": (
        """(float[n,5] x) => (float[n,7] y) { a = MatMul(x, w1) s = Shape(a) z = ConstantOfShape(s) b = Add(a, z)
        c = Relu(b) y = MatMul(c, w2) }""",
        {"w1": (5, 6), "w2": (6, 7)}, {}, [6], [], [], [],
    ),
    "own inverse": (
        "(float[n,5] x) => (float[n,n] y) { a = MatMul(x, w1) b = Transpose(a) y = MatMul(a, b) }",
        {"w1": (5, 7)}, {}, [7], [], [7], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    text, weights, extra, *expected = CASES[name]
    model = network(text, opset=21, extra=extra, **weights)
    found = [sorted(cls.size for cls in free(model, group) if cls.activations()) for group in Group]
    check_free(model)
    check_matrices(model)
    assert found == list(expected)
