"""Single products: what they are, their matrix, and products written like them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.rewrite import Context
from graphopt.shapes import infer_shapes
from graphopt.sites import Linear, Spelling, is_channel_vector, linear_at
from graphopt.store import digest
from graphopt.targets import load_target
from tests.passes.common import run_ort
from tests.passes.fuse.common import FLOAT, G, random

N, M = 6, 4


def _read(model: onnx.ModelProto) -> ir.Model:
    read = ir.from_proto(model)
    infer_shapes(read)
    return read


def _last(g: G) -> Linear | str:
    return linear_at(list(_read(g.model()).graph)[-1])


def _one(g: G) -> Linear:
    found = _last(g)
    assert isinstance(found, Linear), found
    return found


def _apply(linear: Linear, x: np.ndarray) -> np.ndarray:
    """y = W x + b by the matrix, along the axes that the site names."""
    matrix = linear.matrix(17).astype(np.float64)
    y = np.moveaxis(np.moveaxis(x, linear.x_axis, -1) @ matrix.T, -1, linear.y_axis)
    if linear.bias is not None:
        assert linear.bias.const_value is not None
        y = y + linear.bias.const_value.numpy()
    return np.asarray(y)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["MatMul", "left", "Gemm"]),
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([1.0, -0.5, 3.0]),
    bias=st.sampled_from([None, (M,), (1, M), (1,), ()]),
    square=st.booleans(),
)
def test_property_the_matrix_is_what_is_multiplied(
    kind: str, trans_a: bool, trans_b: bool, alpha: float, bias: tuple[int, ...] | None, square: bool
) -> None:
    g, n = G(17), M if square else N
    if kind == "MatMul":
        shape: tuple[int, ...] = (2, 3, n)
        g.output(g.op("MatMul", g.input("x", *shape), g.const(random((n, M), seed=1))))
    elif kind == "left":
        shape = (2, n, 3)
        g.output(g.op("MatMul", g.const(random((M, n), seed=1)), g.input("x", *shape)))
    else:
        shape = (n, 3) if trans_a else (3, n)
        weight = g.const(random((M, n) if trans_b else (n, M), seed=1))
        more = [] if bias is None else [g.const(random(bias, seed=2))]
        flips = {"transA": int(trans_a), "transB": int(trans_b)}
        g.output(g.op("Gemm", g.input("x", *shape), weight, *more, alpha=alpha, **flips))
    linear = _one(g)
    assert (linear.inputs, linear.outputs, linear.elements) == (n, M, n * M)
    x = random(shape)
    (expected,) = run_ort(g.model(), {"x": x})
    np.testing.assert_allclose(_apply(linear, x), expected, rtol=1e-5, atol=1e-5)


def test_a_table() -> None:
    g = G(17)
    g.output(g.op("Gather", g.const(random((9, M))), g.input("x", 3, dtype=TensorProto.INT64)))
    linear = _one(g)
    assert (linear.spelling, linear.inputs, linear.outputs, linear.y_axis) == (Spelling.GATHER, 9, M, -1)
    np.testing.assert_array_equal(linear.matrix(17), random((9, M)).T)


@pytest.mark.parametrize(
    ("kernel", "options", "spatial", "padded"),
    [
        ((1, 1), {}, (False, False), False),
        ((3, 1), {}, (True, False), False),
        ((1, 1), {"strides": [1, 2]}, (False, True), False),
        ((1, 1), {"pads": [0, 1, 0, 0]}, (False, True), True),
        ((1, 1), {"pads": [0, 0, 1, 0]}, (True, False), True),
        ((1, 1), {"auto_pad": "SAME_UPPER"}, (False, False), False),
        ((3, 3), {"auto_pad": "SAME_LOWER"}, (True, True), True),
        ((3, 3), {"auto_pad": "VALID"}, (True, True), False),
        ((1, 1), {"dilations": [2, 2]}, (False, False), False),
    ],
)
def test_what_a_convolution_looks_at(
    kernel: tuple[int, int], options: dict[str, object], spatial: tuple[bool, ...], padded: bool
) -> None:
    g = G(17)
    g.output(g.op("Conv", g.input("x", 2, N, 5, 5), g.const(random((M, N, *kernel))), **options))
    linear = _one(g)
    assert (linear.spatial, linear.padded, linear.pointwise) == (spatial, padded, not any(spatial))
    assert (linear.kernel, linear.x_axis, linear.y_axis) == (kernel, 1, 1)


def test_products_written_alike_compute_the_same() -> None:
    """``constant`` and ``apply`` hold the matrix the way the spelling reads it."""
    for make in (_matmul, _left, _gemm, _turned_gemm, _conv, _table):
        g = G(17)
        make(g)
        before = g.model()
        model = _read(before)
        linear = linear_at(list(model.graph)[-1])
        assert isinstance(linear, Linear)
        ctx = Context(model, load_target("onnxruntime"))
        shape = (linear.outputs, linear.inputs, *linear.kernel)
        constant = linear.constant(ctx, "again", shape, lambda linear=linear: linear.matrix(17))  # type: ignore[misc]
        node = linear.apply(ctx, linear.x, constant, linear.bias)
        model.graph.initializers["again"] = constant
        model.graph.append(node)
        node.outputs[0].name = "again_y"
        model.graph.outputs.append(node.outputs[0])
        shapes = [d.dim_value for d in before.graph.input[0].type.tensor_type.shape.dim]
        x = np.array([8, 0, -3]) if make is _table else random(shapes)
        first, second = run_ort(model, {"x": x})
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)


def _matmul(g: G) -> None:
    g.output(g.op("MatMul", g.input("x", 2, 3, N), g.const(random((N, M)))))


def _left(g: G) -> None:
    g.output(g.op("MatMul", g.const(random((M, N))), g.input("x", 2, N, 3)))


def _gemm(g: G) -> None:
    g.output(g.op("Gemm", g.input("x", 3, N), g.const(random((N, M))), g.const(random((M,))), alpha=0.5))


def _turned_gemm(g: G) -> None:
    g.output(g.op("Gemm", g.input("x", N, 3), g.const(random((M, N))), g.const(random((M,))), transA=1, transB=1))


def _conv(g: G) -> None:
    weight = g.const(random((M, N, 3, 2)))
    g.output(g.op("Conv", g.input("x", 2, N, 5, 5), weight, g.const(random((M,))), strides=[2, 1], pads=[1, 0, 0, 1]))


def _table(g: G) -> None:
    g.output(g.op("Gather", g.const(random((9, M))), g.input("x", 3, dtype=TensorProto.INT64)))


def test_digests_tell_the_products_of_one_constant_apart() -> None:
    g = G(17)
    w, x = g.const(random((4, 4))), g.input("x", 4, 4)
    for made in (
        g.op("MatMul", x, w),
        g.op("MatMul", w, x),
        g.op("Gemm", x, w, alpha=2.0),
        g.op("Gemm", x, w, transB=1, alpha=2.0),
        g.op("MatMul", x, g.op("Identity", w)),
    ):
        g.output(made)
    found = [linear_at(node) for node in _read(g.model()).graph if node.op_type != "Identity"]
    keys = [digest(*linear.parts()) for linear in found if isinstance(linear, Linear)]
    assert len(keys) == len(set(keys)) == 5


# ---- what is none --------------------------------------------------------------------------------------------------


def test_two_activations() -> None:
    g = G(17)
    g.output(g.op("MatMul", g.input("x", 3, N), g.input("z", N, M)))
    assert _last(g) == "both operands are activations"


def test_two_constants() -> None:
    g = G(17)
    g.output(g.op("MatMul", g.const(random((3, N))), g.const(random((N, M)))))
    assert _last(g) == "both operands are constants"


def test_a_batch_of_matrices() -> None:
    g = G(17)
    g.output(g.op("MatMul", g.input("x", 2, 3, N), g.const(random((2, N, M)))))
    assert "a product for each batch" in str(_last(g))


@pytest.mark.parametrize("shape", [(), (N,)])
def test_a_vector_on_the_right(shape: tuple[int, ...]) -> None:
    """A matrix times a vector has no axis of positions; nor is known whether there is one where the rank is not."""
    g = G(17)
    g.output(g.op("MatMul", g.const(random((M, N))), g.input("x", *shape)) if shape else _unknown_rank(g), rank=1)
    model = g.model() if shape else _without_shape(g)
    assert isinstance(linear_at(list(_read(model).graph)[-1]), str)


def _unknown_rank(g: G) -> str:
    g.input("x")
    g.inputs[0].type.tensor_type.ClearField("shape")
    return g.op("MatMul", g.const(random((M, N))), "x")


def _without_shape(g: G) -> onnx.ModelProto:
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_a_vector_as_weight() -> None:
    g = G(17)
    g.output(g.op("MatMul", g.input("x", 3, N), g.const(random((N,)))))
    assert "1 axes" in str(_last(g))


@pytest.mark.parametrize(("options", "bias"), [({"beta": 2.0}, (M,)), ({}, (3, 1)), ({}, (3, M))])
def test_gemm_that_adds_something_else(options: dict[str, object], bias: tuple[int, ...]) -> None:
    g = G(17)
    g.output(g.op("Gemm", g.input("x", 3, N), g.const(random((N, M))), g.const(random(bias)), **options))
    assert isinstance(_last(g), str)


@pytest.mark.parametrize("attribute", ["alpha", "transB", "transA"])
@pytest.mark.parametrize(("operator", "domain"), [("Gemm", ""), ("FusedMatMul", "com.microsoft")])
def test_an_attribute_of_the_function_around(operator: str, domain: str, attribute: str) -> None:
    kind = onnx.AttributeProto.FLOAT if attribute == "alpha" else onnx.AttributeProto.INT
    node = helper.make_node(operator, ["x", "w"], ["y"], domain=domain)
    node.attribute.append(onnx.AttributeProto(name=attribute, ref_attr_name="a", type=kind))
    constant = helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(random((4, 4))))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "f", ["x"], ["y"], [constant, node], imports[:2], ["a"])
    value = 0.5 if attribute == "alpha" else 1
    call = helper.make_node("f", ["x"], ["y"], domain="local", a=value)
    values = [helper.make_tensor_value_info(name, FLOAT, [4, 4]) for name in "xy"]
    graph = helper.make_graph([call], "g", values[:1], values[1:])
    model = ir.from_proto(helper.make_model(graph, functions=[function], opset_imports=imports))
    (inner,) = model.functions.values()
    assert linear_at(list(inner)[-1]) == ""


@pytest.mark.parametrize("options", [{"transA": 1}, {"transBatchA": 1}, {"transBatchB": 1}])
def test_fused_products_that_move_axes(options: dict[str, int]) -> None:
    g = G(17)
    x = g.input("x", 4, 4)
    g.output(g.op("FusedMatMul", x, g.const(random((4, 4))), domain="com.microsoft", **options), 4, 4)
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    assert "FusedMatMul" in str(linear_at(list(ir.from_proto(model).graph)[-1]))


def test_columns_of_a_table() -> None:
    g = G(17)
    g.output(g.op("Gather", g.const(random((9, M))), g.input("x", 3, dtype=TensorProto.INT64), axis=1))
    assert _last(g) == "not rows of a table"


def test_rows_that_are_always_the_same() -> None:
    g = G(17)
    g.output(g.op("Add", g.op("Gather", g.const(random((9, M))), g.ints(1, 2)), g.input("x", 2, M)))
    gather = next(iter(_read(g.model()).graph))
    assert linear_at(gather) == "the indices are constants"


@pytest.mark.parametrize(
    ("shape", "axis", "result"),
    [
        ((M,), -1, True),
        ((1, M), -1, True),
        ((1,), -1, True),
        ((), -1, True),
        ((M, 1), -1, False),
        ((3, M), -1, False),
        ((M, 1), -2, True),
        ((M,), -2, False),
        ((1, M, 1, 1), -3, True),
        ((1, 1, M), -3, False),
        ((0,), -1, False),
    ],
)
def test_channel_vectors(shape: tuple[int, ...], axis: int, result: bool) -> None:
    g = G(17)
    g.output(g.op("Identity", g.const(random(shape))))
    value = next(iter(ir.from_proto(g.model()).graph)).inputs[0]
    assert is_channel_vector(value, M, axis) == result


def test_readings_tell_the_products_of_one_constant_apart() -> None:
    g = G(17)
    w, x = g.const(random((4, 4))), g.input("x", 4, 4)
    turned = g.op("Transpose", w)
    for made in (
        g.op("MatMul", x, w),
        g.op("MatMul", x, turned),
        g.op("Gemm", x, w),
        g.op("Gemm", x, turned, transB=1),
        g.op("Gemm", x, w, alpha=2.0),
        g.op("MatMul", x, g.op("Transpose", w, perm=[0, 1])),
    ):
        g.output(made)
    found = [linear_at(node) for node in _read(g.model()).graph if node.op_type != "Transpose"]
    readings = [linear.reading for linear in found if isinstance(linear, Linear)]
    assert readings[0] == readings[2]
    assert len(set(readings)) == 5
