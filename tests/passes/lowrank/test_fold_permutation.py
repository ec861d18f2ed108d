from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.passes.lowrank.fold_permutation import FoldPermutation
from tests.channels.common import assert_close, feeds_of, network
from tests.passes.common import applications, op_types, run_pass

RNG = np.random.default_rng(0)
P, Q, HALF = (RNG.permutation(n) for n in (12, 12, 6))


def fold(model: ir.Model) -> tuple[ir.Model, list[str], dict[str, str]]:
    """The folded model, its operators, and why what was refused was."""
    folded, records = run_pass(model, FoldPermutation)
    feeds = feeds_of(model)
    assert_close(model, folded, feeds)
    assert applications(records) > 0 or op_types(folded) == op_types(model)
    return folded, op_types(folded), records[0].near_misses


@pytest.mark.parametrize("order", [P, P - 12], ids=["positive", "negative"])
def test_after_a_product(order: np.ndarray) -> None:
    """Into the bias and the weights behind it."""
    model = network(
        """(float[n,8] x) => (float[n,6] y) {
        a = MatMul(x, w1) b = Gather<axis = -1>(a, order) c = Add(b, b1) d = Relu(c) y = MatMul(d, w2) }""",
        extra={"order": order},
        w1=(8, 12),
        b1=(12,),
        w2=(12, 6),
    )
    assert fold(model)[1] == ["MatMul", "Add", "Relu", "MatMul"]


def test_into_what_makes_it() -> None:
    """The output is pinned; the weights before it are not."""
    model = network(
        "(float[n,8] x) => (float[n,12] y) { a = MatMul(x, w1) b = Tanh(a) y = Gather<axis = 1>(b, order) }",
        extra={"order": P},
        w1=(8, 12),
    )
    folded, ops, _ = fold(model)
    assert ops == ["MatMul", "Tanh"]
    assert folded.graph.outputs[0].name == "y"


def test_of_an_input() -> None:
    """Of an input into the weight that reads it: the column form's permutation."""
    model = network(
        "(float[n,12] x) => (float[n,4] y) { b = Gather<axis = 1>(x, order) y = MatMul(b, w) }",
        extra={"order": P},
        w=(12, 4),
    )
    assert fold(model)[1] == ["MatMul"]


def test_pivoted_layer() -> None:
    """The row form of a pivoted layer loses its Gather, and keeps its Concat."""
    model = network(
        """(float[n,8] x) => (float[n,6] y) {
        t = MatMul(x, kept) s = MatMul(t, c) u = Concat<axis = -1>(t, s) v = Gather<axis = -1>(u, order)
        b = Add(v, b1) d = Gelu(b) y = MatMul(d, w2) }""",
        extra={"order": P},
        kept=(8, 4),
        c=(4, 8),
        b1=(12,),
        w2=(12, 6),
    )
    assert fold(model)[1] == ["MatMul", "MatMul", "Concat", "Add", "Gelu", "MatMul"]


def test_most_of_several() -> None:
    """Three Gathers of one class: the order of two goes, the third stays with other numbers."""
    model = network(
        """(float[n,8] x) => (float[n,6] y) {
        a = MatMul(x, w1) b = Gather<axis = 1>(a, p) c = MatMul(x, w2) d = Gather<axis = 1>(c, q)
        e = MatMul(x, w3) f = Gather<axis = 1>(e, q2) s = Add(b, d) t = Add(s, f) u = Relu(t) y = MatMul(u, w4) }""",
        extra={"p": P, "q": Q, "q2": Q.copy()},
        w1=(8, 12),
        w2=(8, 12),
        w3=(8, 12),
        w4=(12, 6),
    )
    assert "Gather" not in fold(model)[1]  # the third goes into its own product


def test_most_of_several_that_are_pinned_before() -> None:
    model = network(
        """(float[n,12] x) => (float[n,6] y) {
        b = Gather<axis = 1>(x, p) d = Gather<axis = 1>(x, q) e = Neg(x) f = Gather<axis = 1>(e, q2)
        s = Add(b, d) t = Add(s, f) u = Relu(t) y = MatMul(u, w4) }""",
        extra={"p": P, "q": Q, "q2": Q.copy()},
        w4=(12, 6),
    )
    folded, ops, _ = fold(model)
    assert ops.count("Gather") == 1
    (left,) = [node for node in folded.graph if node.op_type == "Gather"]
    indices = left.inputs[1]
    assert indices is not None and indices.const_value is not None
    np.testing.assert_array_equal(indices.const_value.numpy(), P[np.argsort(Q)])


def test_chain_and_identity() -> None:
    model = network(
        """(float[n,12] x) => (float[n,12] y) {
        a = Gather<axis = 1>(x, p) b = Gather<axis = 1>(a, q) y = Relu(b) }""",
        extra={"p": P, "q": np.argsort(P)},
    )
    assert fold(model)[1] == ["Relu"]


def test_heads() -> None:
    """The same permutation within each head, of an axis that is split into heads later."""
    order = (np.arange(2)[:, None] * 6 + HALF).reshape(-1)
    text = """(float[n,5,8] x) => (float[n,5,7] y) {
        a = MatMul(x, w1) b = Gather<axis = 2>(a, order) c = Reshape(b, shape)
        d = Softmax<axis = 2>(c) e = Reshape(d, merged) y = MatMul(e, w2) }"""
    extra = {"order": order, "shape": np.array([0, 0, 2, 6]), "merged": np.array([0, 0, 12])}
    model = network(text, extra=extra, w1=(8, 12), w2=(12, 7))
    assert "Gather" not in fold(model)[1]
    # Any other order goes before the split: there all twelve may move.
    model = network(text, extra={**extra, "order": P}, w1=(8, 12), w2=(12, 7))
    assert "Gather" not in fold(model)[1]


def test_convolution() -> None:
    model = network(
        """(float[n,3,6,6] x) => (float[n,5] y) {
        a = Conv(x, w1, b1) b = Gather<axis = 1>(a, order) c = Relu(b) d = Conv<group = 12>(c, w2, b2)
        e = BatchNormalization(d, g, s, m, posv) f = Flatten(e) y = MatMul(f, w3) }""",
        extra={"order": P},
        w1=(12, 3, 3, 3),
        b1=(12,),
        w2=(12, 1, 1, 1),
        b2=(12,),
        g=(12,),
        s=(12,),
        m=(12,),
        posv=(12,),
        w3=(192, 5),
    )
    assert "Gather" not in fold(model)[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[n,12] x) => (float[n,12] y) { y = Gather<axis = 1>(x, order) }", "graph output"),
        (
            "(float[n,12] x) => (float[n,12] y) { a = Gather<axis = 1>(x, order) b = CumSum(a, one) y = Relu(b) }",
            "CumSum",
        ),
        (
            """(float[n,8] x) => (float[n,4] y) {
            a = MatMul(x, w1) b = Gather<axis = 1>(a, order) c = Add(a, b) y = MatMul(c, w2) }""",
            "one class",
        ),
    ],
)
def test_refused(text: str, reason: str) -> None:
    weights = {"w1": (8, 12), "w2": (12, 4)} if "w1" in text else {}
    model = network(text, extra={"order": P, "one": np.array(1)}, **weights)
    _, ops, misses = fold(model)
    assert "Gather" in ops
    assert any(reason in why for why in misses.values()), misses


@pytest.mark.parametrize(
    "extra",
    [np.arange(12)[:11], np.array([0] * 12), P.reshape(1, 12), np.array(3)],
    ids=["part", "repeated", "matrix", "one"],
)
def test_no_permutation(extra: np.ndarray) -> None:
    model = network(
        """(float[n,8] x) => (float y) {
        a = MatMul(x, w1) b = Gather<axis = 1>(a, order) y = ReduceSum<keepdims = 0>(b) }""",
        extra={"order": extra},
        w1=(8, 12),
    )
    assert "Gather" in fold(model)[1]


def test_computed_or_overridable_indices() -> None:
    model = network(
        "(float[n,8] x, int64[12] order) => (float[n,4] y) { a = MatMul(x, w) b = Gather<axis = 1>(a, order) "
        "y = MatMul(b, w2) }",
        extra={"order": P},
        w=(8, 12),
        w2=(12, 4),
    )
    _, records = run_pass(model, FoldPermutation)
    assert applications(records) == 0


def test_symbolic_axis() -> None:
    model = network("(float[n,m] x) => (float[a,b] y) { y = Gather<axis = 1>(x, order) }", extra={"order": P})
    _, records = run_pass(model, FoldPermutation)
    assert applications(records) == 0
