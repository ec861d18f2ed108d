"""fuse-matmul-add."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.passes.fuse.matmul_add import FuseMatMulAdd
from tests.passes.common import applications, op_types, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons


def _model(bias: tuple[int, ...], *, rows: int | str = "m", inner: int = 6, columns: int = 5, **options: object) -> G:
    g = G(int(options.get("opset", 17)), int(options.get("dtype", FLOAT)))  # type: ignore[call-overload]
    a = g.input("a", rows, inner)
    product = g.op("MatMul", a, g.const(random((inner, columns), seed=1)))
    operands = [product, g.const(random(bias, seed=2))]
    if options.get("swapped"):
        operands.reverse()
    g.output(g.op("Add", *operands))
    return g


@settings(max_examples=30, deadline=None)
@given(
    bias=st.sampled_from([(), (1,), (5,), (1, 1), (1, 5), (4, 1), (4, 5)]),
    swapped=st.booleans(),
    dtype=st.sampled_from([FLOAT, FLOAT16, DOUBLE]),
    opset=st.sampled_from([9, 11, 13, 17, 21]),
)
def test_property(bias: tuple[int, ...], swapped: bool, dtype: int, opset: int) -> None:
    before = _model(bias, rows=4, swapped=swapped, dtype=dtype, opset=opset).model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"a": random((4, 6), dtype)})


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_unknown_number_of_rows(rows: int) -> None:
    before = _model((5,)).model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"a": random((rows, 6))})


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("explicit", [True, False])
def test_transposes_are_absorbed(side: str, explicit: bool) -> None:
    g = G(17)
    perm = {"perm": [1, 0]} if explicit else {}
    a = g.input("a", *((6, "m") if side != "right" else ("m", 6)))
    b = g.const(random((5, 6) if side != "left" else (6, 5), seed=1))
    left = g.op("Transpose", a, **perm) if side != "right" else a
    right = g.op("Transpose", b, **perm) if side != "left" else b
    g.output(g.op("Add", g.op("MatMul", left, right), g.const(random((5,), seed=2))))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    gemm = only(after, "Gemm")
    assert op_types(after) == ["Gemm"]
    assert gemm.attributes.get_int("transA", 0) == (side != "right")
    assert gemm.attributes.get_int("transB", 0) == (side != "left")
    assert_rounding(before, after, {"a": random((6, 3) if side != "right" else (3, 6))})


def test_an_identity_permutation_is_no_transpose() -> None:
    g = G(17)
    right = g.op("Transpose", g.const(random((6, 5), seed=1)), perm=[0, 1])
    g.output(g.op("Add", g.op("MatMul", g.input("a", 3, 6), right), g.const(random((5,)))))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert only(after, "Gemm").attributes.get_int("transB", 0) == 0
    assert_rounding(before, after, {"a": random((3, 6))})


def test_two_computed_matrices_and_a_computed_bias() -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", "m", 4), g.input("b", 4, 3))
    g.output(g.op("Add", product, g.input("c", 3)))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"a": random((2, 4)), "b": random((4, 3), seed=1), "c": random((3,), seed=2)})


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("first", [(5,), (1, 5), (1,)])
def test_second_bias_is_merged(beta: float, first: tuple[int, ...]) -> None:
    g = G(17)
    weight, bias = g.const(random((5, 6), seed=1)), g.const(random(first, seed=2))
    product = g.op("Gemm", g.input("a", "m", 6), weight, bias, transB=1, alpha=0.25, beta=beta)
    g.output(g.op("Add", g.const(random((5,), seed=3)), product))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    gemm = only(after, "Gemm")
    assert op_types(after) == ["Gemm"] and gemm.attributes.get_float("alpha", 1.0) == 0.25
    assert_rounding(before, after, {"a": random((4, 6))})


def test_gemm_without_bias_takes_a_computed_one() -> None:
    g = G(13)
    product = g.op("Gemm", g.input("a", 6, "m"), g.const(random((6, 5), seed=1)), transA=1)
    g.output(g.op("Add", product, g.input("c", 5)))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"a": random((6, 4)), "c": random((5,), seed=2)})


def test_gemm_with_a_computed_bias_is_left() -> None:
    g = G(13)
    product = g.op("Gemm", g.input("a", "m", 6), g.const(random((6, 5), seed=1)), g.input("c", 5))
    g.output(g.op("Add", product, g.const(random((5,), seed=2))))
    after, records = run_pass(g.model(), FuseMatMulAdd)
    assert op_types(after) == ["Gemm", "Add"] and "not constants" in reasons(records)


def test_merged_bias_that_overflows_is_left() -> None:
    g = G(13, FLOAT16)
    product = g.op("Gemm", g.input("a", "m", 2), g.const(np.ones((2, 1))), g.const([60000.0]))
    g.output(g.op("Add", product, g.const([60000.0])))
    assert applications(run_pass(g.model(), FuseMatMulAdd)[1]) == 0


@pytest.mark.parametrize(
    ("bias", "rows", "columns"),
    [
        ((5,), "m", 1),  # one column spread over five
        ((4, 5), "m", 5),  # m may be one
        ((4, 5), 1, 5),  # one row spread over four
        ((4, 1), 1, 5),
        ((1, 4, 5), 4, 5),  # a third axis
        ((2, 1, 1), 4, 5),
        ((1, 1, 1), 4, 5),
    ],
)
def test_a_bias_that_may_enlarge_the_product(bias: tuple[int, ...], rows: int | str, columns: int) -> None:
    before = _model(bias, rows=rows, columns=columns)
    after, records = run_pass(before.model(), FuseMatMulAdd)
    assert op_types(after) == ["MatMul", "Add"]
    assert "may broadcast" in reasons(records)


def test_same_name_of_rows_is_the_same_size() -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", "m", 6), g.const(random((6, 5), seed=1)))
    g.output(g.op("Add", product, g.input("c", "m", 5)))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"a": random((3, 6)), "c": random((3, 5))})


def test_other_name_of_rows_may_be_another_size() -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", "m", 6), g.const(random((6, 5), seed=1)))
    g.output(g.op("Add", product, g.input("c", "k", 5)))
    assert op_types(run_pass(g.model(), FuseMatMulAdd)[0]) == ["MatMul", "Add"]


@pytest.mark.parametrize("shape", [(2, 3, 6), (6,)])
def test_other_ranks(shape: tuple[int, ...]) -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", *shape), g.const(random((6, 5), seed=1)))
    g.output(g.op("Add", product, g.const(random((5,), seed=2))))
    after, records = run_pass(g.model(), FuseMatMulAdd)
    assert op_types(after) == ["MatMul", "Add"] and "Gemm multiplies matrices" in reasons(records)


def test_a_declared_rank_is_not_believed() -> None:
    """The file says that a Reshape to a computed shape has two axes; nothing proves it."""
    g = G(17)
    reshaped = g.declare(g.op("Reshape", g.input("a", "n", "m"), g.input("s", "r", dtype=TensorProto.INT64)), "n", 6)
    g.output(g.op("Add", g.op("MatMul", reshaped, g.const(random((6, 5)))), g.const(random((5,)))), None, 5)
    assert op_types(run_pass(g.model(), FuseMatMulAdd)[0]) == ["Reshape", "MatMul", "Add"]


def test_empty_inner_axis() -> None:
    after, records = run_pass(_model((5,), rows=3, inner=0).model(), FuseMatMulAdd)
    assert op_types(after) == ["MatMul", "Add"] and "inner axis" in reasons(records)


def test_integers() -> None:
    g = G(17)
    a = g.input("a", 2, 3, dtype=TensorProto.INT32)
    product = g.op("MatMul", a, g.input("b", 3, 4, dtype=TensorProto.INT32))
    g.output(g.op("Add", product, g.input("c", 4, dtype=TensorProto.INT32)), dtype=TensorProto.INT32)
    assert op_types(run_pass(g.model(), FuseMatMulAdd)[0]) == ["MatMul", "Add"]


@pytest.mark.parametrize("how", ["reader", "output"])
def test_the_product_is_read_elsewhere(how: str) -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", 2, 6), g.const(random((6, 5))))
    g.output(g.op("Add", product, g.const(random((5,)))))
    g.output(product if how == "output" else g.op("Neg", product))
    after, records = run_pass(g.model(), FuseMatMulAdd)
    assert "Gemm" not in op_types(after) and "read elsewhere" in reasons(records)


def test_the_product_added_to_itself() -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", 2, 6), g.const(random((6, 5))))
    g.output(g.op("Add", product, product))
    assert op_types(run_pass(g.model(), FuseMatMulAdd)[0]) == ["MatMul", "Add"]


def test_shared_weight_and_overridable_bias() -> None:
    """Nothing here has to be constant: the weight stays, the bias can still be overridden."""
    g = G(17)
    weight, bias = g.const(random((6, 6), seed=1)), g.overridable(random((6,), seed=2))
    first = g.op("Add", g.op("MatMul", g.input("a", 2, 6), weight), bias)
    g.output(g.op("Add", g.op("MatMul", first, weight), bias))
    before = g.model()
    after, _ = run_pass(before, FuseMatMulAdd)
    assert op_types(after) == ["Gemm", "Gemm"] and len(after.graph.initializers) == 2
    feeds = {"a": random((2, 6)), bias: random((6,), seed=5)}
    assert_rounding(before, after, feeds)


def test_inside_a_body() -> None:
    before = in_body(_model((5,), rows=4).model())
    after, _ = run_pass(before, FuseMatMulAdd)
    assert "Gemm" in op_types(after) and "MatMul" not in op_types(after)
    assert_rounding(before, after, {"condition": np.array(True), "a": random((4, 6))})


def test_not_moved_into_a_loop() -> None:
    g = G(17)
    product = g.op("MatMul", g.input("a", 2, 6), g.const(random((6, 5))))
    bias = g.const(random((5,)))
    keep = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("keep", "kept")]
    body = helper.make_graph(
        [helper.make_node("Add", [product, bias], ["b"]), helper.make_node("Identity", ["keep"], ["kept"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), keep[0]],
        [keep[1], helper.make_tensor_value_info("b", FLOAT, None)],
    )
    trips = g.op("Constant", value_int=3)
    g.nodes.append(helper.make_node("Loop", [trips, ""], ["y"], body=body))
    g.output("y", 3, 2, 5)
    after, records = run_pass(g.model(), FuseMatMulAdd)
    assert "Gemm" not in op_types(after) and "a loop must not repeat it" in reasons(records)
