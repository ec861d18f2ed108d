from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.passes.lowrank.fold_scale import FoldScale
from graphopt.shapes import infer_shapes
from tests.channels.common import assert_close, feeds_of, network
from tests.passes.common import applications, op_types, run_pass


def fold(model: ir.Model) -> tuple[list[str], dict[str, str]]:
    """The operators of the folded model, and why what was refused was."""
    folded, records = run_pass(model, FoldScale)
    assert_close(model, folded, feeds_of(model))
    assert applications(records) > 0 or op_types(folded) == op_types(model)
    return op_types(folded), records[0].near_misses


@pytest.mark.parametrize("spelling", ["Mul(a, poss)", "Mul(poss, a)", "Div(a, poss)"])
def test_through_relu(spelling: str) -> None:
    model = network(
        f"(float[n,8] x) => (float[n,6] y) {{ a = MatMul(x, w1) b = {spelling} c = Relu(b) y = MatMul(c, w2) }}",
        w1=(8, 12),
        poss=(12,),
        w2=(12, 6),
    )
    assert fold(model)[0] == ["MatMul", "Relu", "MatMul"]


def test_into_what_makes_it() -> None:
    model = network(
        "(float[n,8] x) => (float[n,12] y) { a = MatMul(x, w1) b = Add(a, b1) c = Relu(b) y = Mul(c, poss) }",
        w1=(8, 12),
        b1=(12,),
        poss=(12,),
    )
    assert fold(model)[0] == ["MatMul", "Add", "Relu"]


def test_into_what_reads_it() -> None:
    model = network("(float[n,8] x) => (float[n,6] y) { a = Mul(x, poss) y = MatMul(a, w1) }", w1=(8, 6), poss=(8,))
    assert fold(model)[0] == ["MatMul"]


def test_into_a_norm() -> None:
    model = network(
        """(float[n,8] x) => (float[n,8] y) {
        a = LayerNormalization<axis = -1>(x, g, b) c = Mul(a, poss) y = Tanh(c) }""",
        g=(8,),
        b=(8,),
        poss=(8,),
    )
    assert fold(model)[0] == ["LayerNormalization", "Tanh"]


def test_convolutions() -> None:
    model = network(
        """(float[n,3,6,6] x) => (float[n,4,4,4] y) {
        a = Conv(x, w1, b1) b = Mul(a, poss) c = Relu(b) p = MaxPool<kernel_shape = [1,1]>(c)
        d = Conv<group = 12>(p, w2, b2) e = Div(d, post) y = Conv(e, w3) }""",
        w1=(12, 3, 3, 3),
        b1=(12,),
        poss=(12, 1, 1),
        w2=(12, 1, 1, 1),
        b2=(12,),
        post=(1, 12, 1, 1),
        w3=(4, 12, 1, 1),
    )
    ops, _ = fold(model)
    assert "Mul" not in ops and "Div" not in ops


def test_shared_constant() -> None:
    model = network(
        """(float[n,8] x) => (float[n,6] y) {
        a = MatMul(x, w1) b = Mul(a, poss) c = Relu(b) d = MatMul(c, w2) e = Mul(d, poss) y = MatMul(e, w3) }""",
        w1=(8, 12),
        poss=(12,),
        w2=(12, 12),
        w3=(12, 6),
    )
    assert "Mul" not in fold(model)[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("b = Mul(a, s) c = Relu(b) y = MatMul(c, w2)", "positive"),
        ("t = Tanh(a) b = Mul(t, poss) y = Softmax(b)", "Softmax"),
        ("b = Mul(a, poss) c = Add(a, b) y = MatMul(c, w2)", "one class"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    weights = {name: shape for name, shape in {"s": (12,), "poss": (12,), "w2": (12, 6)}.items() if name in text}
    model = network(f"(float[n,8] x) => (float[n,k] y) {{ a = MatMul(x, w1) {text} }}", w1=(8, 12), **weights)
    ops, misses = fold(model)
    assert "Mul" in ops
    assert any(reason in why for why in misses.values()), misses


def test_range_of_float16() -> None:
    """A weight that would overflow, or lose its small values, keeps the multiplication."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float16[n,4] x) => (float16[n,4] y) { a = MatMul(x, w) b = Mul(a, s) y = Relu(b) }"""
    for number, expected in ((64.0, ["MatMul", "Mul", "Relu"]), (0.5, ["MatMul", "Relu"])):
        proto = onnx.parser.parse_model(text)
        weight = np.full((4, 4), 2000, np.float16)
        scales = np.full(4, number, np.float16)
        for name, array in (("w", weight), ("s", scales)):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model = ir.from_proto(proto)
        infer_shapes(model)
        folded, _ = run_pass(model, FoldScale)
        assert op_types(folded) == expected
