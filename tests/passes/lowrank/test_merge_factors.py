"""merge-factors: two products in a row as one, and everything that only looks like two products in a row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.lowrank.merge_factors import MergeFactors
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons


def _weight(g: G, inputs: int, outputs: int, seed: int, *, scale: float = 0.3) -> str:
    return g.const(random((inputs, outputs), g.dtype, seed=seed, scale=scale))


def _merged(g: G, *kinds: str, feed: np.ndarray | None = None, count: int = 1) -> ir.Model:
    """The model of a graph whose input is x, merged into these operators; the result is right."""
    before = g.model()
    after, records = run_pass(before, MergeFactors)
    assert op_types(after) == list(kinds), reasons(records)
    assert applications(records) == count
    shape = [d.dim_value or 3 for d in before.graph.input[0].type.tensor_type.shape.dim]
    assert_rounding(before, after, {"x": random(shape, g.dtype) if feed is None else feed})
    return after


def _left(g: G, *why: str) -> None:
    """Nothing is merged, and the reason is told; "" for what does not even look alike."""
    before = g.model()
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 0 and op_types(after) == op_types(ir.from_proto(before))
    told = reasons(records)
    assert all(part in told for part in why) and (told if any(why) else not told), told


# ---- every way of writing the two products ------------------------------------------------------------------------

N, R, M = 6, 5, 4


def _matmul(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("MatMul", x, _weight(g, inputs, outputs, seed))


def _turned(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("MatMul", x, g.op("Transpose", _weight(g, outputs, inputs, seed), perm=[1, 0]))


def _gemm(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("Gemm", x, _weight(g, outputs, inputs, seed), g.const(random((outputs,), seed=seed + 10)), transB=1)


def _plain_gemm(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("Gemm", x, _weight(g, inputs, outputs, seed), alpha=-1.5)


def _row_bias(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    bias = g.const(random((1, outputs), seed=seed + 10))
    return g.op("Gemm", x, _weight(g, inputs, outputs, seed), bias, alpha=0.5)


def _scalar_bias(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("Gemm", x, _weight(g, inputs, outputs, seed), g.const(0.75))


def _fused(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    name = g.op("FusedMatMul", x, _weight(g, outputs, inputs, seed), transB=1, alpha=0.5, domain="com.microsoft")
    return g.declare(name, 3, outputs)


PRODUCTS: dict[str, Callable[[G, str, int, int, int], str]] = {
    "MatMul": _matmul,
    "MatMul of a Transpose": _turned,
    "Gemm transB with bias": _gemm,
    "Gemm with alpha": _plain_gemm,
    "Gemm with a row": _row_bias,
    "Gemm with a number": _scalar_bias,
}
VECTORS: dict[str, Callable[[G, str, int], str]] = {
    "nothing": lambda g, t, r: t,
    "scale": lambda g, t, r: g.op("Mul", t, g.const(random((r,), seed=7))),
    "scale on the left": lambda g, t, r: g.op("Mul", g.const(random((1, r), seed=7)), t),
    "number": lambda g, t, r: g.op("Mul", t, g.const(0.25)),
    "quotient": lambda g, t, r: g.op("Div", t, g.const(random((r,), seed=7) + 4)),
    "shift": lambda g, t, r: g.op("Add", g.const(random((r,), seed=8)), t),
    "difference": lambda g, t, r: g.op("Sub", t, g.const(random((1,), seed=8))),
    "shift then scale": lambda g, t, r: g.op(
        "Mul", g.op("Add", t, g.const(random((r,), seed=8))), g.const(random((r,), seed=9))
    ),
    "scale then shift": lambda g, t, r: g.op(
        "Sub", g.op("Div", t, g.const(random((r,), seed=8) + 4)), g.const(random((r,), seed=9))
    ),
    "identities": lambda g, t, r: g.op("Dropout", g.op("Identity", t)),
}


@pytest.mark.parametrize("second", PRODUCTS)
@pytest.mark.parametrize("first", PRODUCTS)
def test_rows(first: str, second: str) -> None:
    g = G(17)
    y = PRODUCTS[second](g, PRODUCTS[first](g, g.input("x", "rows", N), N, R, 1), R, M, 2)
    g.output(y)
    before = g.model()
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 1 and op_types(after)[-1] in ("MatMul", "Gemm", "Add")
    assert {"MatMul", "Gemm"} & set(op_types(after)) and len(op_types(after)) <= 2
    for rows in (0, 1, 7):
        assert_rounding(before, after, {"x": random((rows, N))})


@settings(max_examples=40, deadline=None)
@given(
    between=st.sampled_from(sorted(VECTORS)),
    first=st.sampled_from(sorted(PRODUCTS)),
    second=st.sampled_from(sorted(PRODUCTS)),
    sizes=st.tuples(*[st.integers(1, 7)] * 4),
    opset=st.sampled_from([11, 13, 17, 21]),
)
def test_property_between(between: str, first: str, second: str, sizes: tuple[int, ...], opset: int) -> None:
    rows, n, r, m = sizes
    rows *= 32  # of one or two numbers the factors may happen to give one without any error
    g = G(opset)
    inner = VECTORS[between](g, PRODUCTS[first](g, g.input("x", rows, n), n, r, 1), r)
    g.output(PRODUCTS[second](g, inner, r, m, 2))
    before = g.model()
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 1 and not reasons(records)
    assert_rounding(before, after, {"x": random((rows, n))})


@pytest.mark.parametrize("between", VECTORS)
@pytest.mark.parametrize("shape", [(N,), (3, N), (2, 3, N), (2, 1, 3, N)])
def test_axes_before_the_channels(shape: tuple[int, ...], between: str) -> None:
    if len(shape) == 1 and between == "scale on the left":
        pytest.skip("[1, r] adds an axis to a vector: below")
    g = G(17)
    inner = VECTORS[between](g, _matmul(g, g.input("x", *shape), N, R, 1), R)
    g.output(_matmul(g, inner, R, M, 2))
    shifts = any(word in between for word in ("shift", "difference"))
    _merged(g, *(["MatMul", "Add"] if shifts else ["MatMul"]))


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, DOUBLE])
def test_dtypes(dtype: int) -> None:
    g = G(17, dtype)
    inner = VECTORS["shift then scale"](g, _matmul(g, g.input("x", 3, N), N, R, 1), R)
    g.output(_gemm(g, inner, R, M, 2))
    _merged(g, "Gemm")


def test_bfloat16() -> None:
    """No runtime at hand multiplies it: the constant is looked at."""
    g = G(22)
    x, dtype = g.input("x", 3, N, dtype=TensorProto.BFLOAT16), TensorProto.BFLOAT16
    v, u = random((N, R), seed=1), random((R, M), seed=2)
    names = [g.op("Cast", g.const(array), to=dtype) for array in (v, u)]
    g.output(g.op("MatMul", g.op("MatMul", x, names[0]), names[1]), dtype=dtype)
    after, records = run_pass(g.model(), MergeFactors, target="onnx")
    assert applications(records) == 1 and op_types(after) == ["MatMul"]
    weight = only(after, "MatMul").inputs[1]
    assert weight is not None and weight.const_value is not None and weight.const_value.dtype is ir.DataType.BFLOAT16
    rounded = [a.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float64) for a in (v, u)]
    np.testing.assert_allclose(weight.const_value.numpy().astype(np.float64), rounded[0] @ rounded[1], rtol=2**-8)


def test_a_large_product_is_computed_when_it_is_saved() -> None:
    g = G(17)
    g.output(_matmul(g, _matmul(g, g.input("x", 3, 200), 200, 180, 1), 180, 150, 2))
    after = _merged(g, "MatMul")
    weight = only(after, "MatMul").inputs[1]
    assert weight is not None and isinstance(weight.const_value, ir.LazyTensor)


@pytest.mark.parametrize("axes", [2, 3])
def test_the_constant_on_the_left(axes: int) -> None:
    g = G(17)
    x = g.input("x", *(2,) * (axes - 2), N, 3)
    inner = g.op("MatMul", g.const(random((R, N), seed=1)), x)
    inner = g.op("Add", g.op("Mul", inner, g.const(random((R, 1), seed=3))), g.const(random((R, 1), seed=4)))
    g.output(g.op("MatMul", g.const(random((M, R), seed=2)), inner))
    _merged(g, "MatMul", "Add")


@pytest.mark.parametrize("second", ["MatMul", "Gemm transB with bias"])
@pytest.mark.parametrize("axis", [0, -2])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_table(shape: tuple[int, ...], axis: int, second: str) -> None:
    if second != "MatMul" and len(shape) != 1:
        pytest.skip("Gemm multiplies matrices")
    g = G(17)
    ids = g.input("x", *shape, dtype=TensorProto.INT64)
    rows = g.op("Gather", g.const(random((9, 12), seed=1)), ids, axis=axis)
    g.output(PRODUCTS[second](g, rows, 12, M, 2))
    feed = np.random.default_rng(0).integers(-9, 9, shape)
    _merged(g, *(["Gather"] if second == "MatMul" else ["Gather", "Add"]), feed=np.asarray(feed))


def test_gemm_that_transposes_what_it_multiplies() -> None:
    g = G(17)
    inner = g.op("Gemm", g.input("x", N, 3), _weight(g, N, R, 1), transA=1)
    g.output(_gemm(g, inner, R, M, 2))
    after = _merged(g, "Gemm")
    assert only(after, "Gemm").attributes.get_int("transA", 0) == 1


def test_fused_matmul() -> None:
    g = G(17)
    g.output(_fused(g, _fused(g, g.input("x", 3, N), N, R, 1), R, M, 2), 3, M)
    nodes = g.nodes
    graph = helper.make_graph(nodes, "g", g.inputs, g.outputs, g.initializers, value_info=g.infos)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    before = helper.make_model(graph, opset_imports=imports, ir_version=10)
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 1
    feed = {"x": random((3, N))}
    np.testing.assert_allclose(run_ort(before, feed)[0], run_ort(after, feed)[0], rtol=1e-5, atol=1e-6)


def test_three_in_a_row_become_one() -> None:
    g = G(17)
    y = g.input("x", 3, N)
    for seed, (inputs, outputs) in enumerate([(N, R), (R, M), (M, 3)]):
        y = _gemm(g, y, inputs, outputs, seed)
    g.output(y)
    _merged(g, "Gemm", count=2)


def test_weights_behind_casts_and_quantised_biases() -> None:
    g = G(17)
    half = g.const(random((N, R), FLOAT16, seed=1), FLOAT16)
    inner = g.op("MatMul", g.input("x", 3, N), g.op("Cast", half, to=FLOAT))
    shift = g.op("Reshape", g.const(random((R, 1), seed=3)), g.ints(R))
    g.output(_matmul(g, g.op("Add", inner, shift), R, M, 2))
    _merged(g, "MatMul", "Add")


# ---- convolutions -------------------------------------------------------------------------------------------------


def _conv(g: G, x: str, inputs: int, outputs: int, kernel: tuple[int, ...], seed: int, **options: object) -> str:
    bias = [g.const(random((outputs,), seed=seed + 10))] if options.pop("bias", False) else []
    return g.op("Conv", x, g.const(random((outputs, inputs, *kernel), seed=seed, scale=0.3)), *bias, **options)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), axes=st.integers(1, 3), wide_first=st.booleans(), between=st.sampled_from(["", "Mul", "Add"]))
def test_property_a_kernel_and_a_position(data: st.DataObject, axes: int, wide_first: bool, between: str) -> None:
    draw = data.draw
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    options: dict[str, object] = {
        "strides": [draw(st.integers(1, 2)) for _ in range(axes)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(axes)],
    }
    padding = draw(st.sampled_from(["pads", "none", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if padding == "pads":
        options["pads"] = [draw(st.integers(0, 1)) for _ in range(2 * axes)]
    elif padding != "none":
        options["auto_pad"] = padding
        if padding.startswith("SAME"):
            options["dilations"] = [1] * axes
    if draw(st.booleans()):
        options["kernel_shape"] = list(kernel)
    first_bias, second_bias = draw(st.booleans()), draw(st.booleans())
    g = G(17)
    x = g.input("x", 2, N, *(7,) * axes)
    one = (1,) * axes
    inner = _conv(g, x, N, R, kernel if wide_first else one, 1, bias=first_bias, **(options if wide_first else {}))
    if between:
        inner = g.op(between, inner, g.const(random((R, *one), seed=5)))
    g.output(
        _conv(g, inner, R, M, one if wide_first else kernel, 2, bias=second_bias, **({} if wide_first else options))
    )
    before = g.model()
    after, records = run_pass(before, MergeFactors)
    shifted = first_bias or between == "Add"
    if applications(records) == 0:
        assert shifted and not wide_first and "padding" in reasons(records), reasons(records)
    else:
        assert op_types(after) == ["Conv"]
    assert_rounding(before, after, {"x": random((2, N, *(7,) * axes))})


@settings(max_examples=40, deadline=None)
@given(
    tall=st.integers(1, 3),
    wide=st.integers(1, 3),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    bias=st.booleans(),
)
def test_property_a_column_and_a_row(
    tall: int, wide: int, strides: tuple[int, int], dilations: tuple[int, int], pads: tuple[int, ...], bias: bool
) -> None:
    g = G(17)
    down = {"strides": [strides[0], 1], "dilations": [dilations[0], 1], "pads": [pads[0], 0, pads[1], 0]}
    along = {"strides": [1, strides[1]], "dilations": [1, dilations[1]], "pads": [0, pads[2], 0, pads[3]]}
    inner = _conv(g, g.input("x", 2, N, 8, 9), N, R, (tall, 1), 1, bias=bias, **down)
    g.output(_conv(g, inner, R, M, (1, wide), 2, bias=True, **along))
    before = g.model()
    after, records = run_pass(before, MergeFactors)
    if bias and any(pads[2:]):
        assert applications(records) == 0 and "padding" in reasons(records)
    else:
        assert op_types(after) == ["Conv"], reasons(records)
    assert_rounding(before, after, {"x": random((2, N, 8, 9))})


@pytest.mark.parametrize("pad", ["SAME_UPPER", "VALID"])
def test_a_column_and_a_row_with_automatic_padding(pad: str) -> None:
    g = G(17)
    inner = _conv(g, g.input("x", 2, N, 8, 9), N, R, (3, 1), 1, auto_pad=pad)
    g.output(_conv(g, inner, R, M, (1, 3), 2, auto_pad=pad))
    if pad == "VALID":
        _merged(g, "Conv")
    else:
        _left(g, "auto_pad")


def test_convolutions_that_look_beside_the_same_axis() -> None:
    g = G(17)
    g.output(_conv(g, _conv(g, g.input("x", 2, N, 8), N, R, (3,), 1), R, M, (3,), 2))
    _left(g, "look beside a position of one axis")


@pytest.mark.parametrize("kernel", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("options", [{}, {"strides": [2, 1]}, {"strides": [2, 3], "pads": [1, 0, 2, 0]}])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stride_behind_a_kernel(kernel: tuple[int, int], options: dict[str, object], bias: bool) -> None:
    g = G(17)
    inner = _conv(g, g.input("x", 2, N, 15, 14), N, R, kernel, 1, bias=bias, **options)
    g.output(_conv(g, inner, R, M, (1, 1), 2, bias=True, strides=[2, 2]))
    _merged(g, "Conv")


def test_a_kernel_behind_a_stride() -> None:
    g = G(17)
    inner = _conv(g, g.input("x", 2, N, 15), N, R, (1,), 1, strides=[2])
    g.output(_conv(g, inner, R, M, (3,), 2))
    _left(g, "look beside a position of one axis")


def test_a_stride_behind_automatic_padding() -> None:
    """The padding that the runtime chose depends on the stride."""
    g = G(17)
    inner = _conv(g, g.input("x", 2, N, 14), N, R, (3,), 1, strides=[2], auto_pad="SAME_UPPER")
    g.output(_conv(g, inner, R, M, (1,), 2, strides=[2]))
    _left(g, "auto_pad")


def test_groups() -> None:
    g = G(17)
    inner = g.op("Conv", g.input("x", 2, N, 8), g.const(random((N, 2, 3), seed=1)), group=3)
    g.output(_conv(g, inner, N, M, (1,), 2))
    _left(g, "")


def test_a_shift_of_positions_is_none_of_channels() -> None:
    g = G(17)
    inner = g.op("Add", _conv(g, g.input("x", 2, N, 5), N, 5, (1,), 1), g.const(random((5,), seed=4)))
    g.output(_conv(g, inner, 5, M, (1,), 2))
    _left(g, "no constant of the channels")


# ---- what only looks like it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["Relu", "Sigmoid", "Tanh", "Erf", "Softmax"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_nonlinearity(operator: str, bias: bool) -> None:
    g = G(17)
    inner = _matmul(g, g.input("x", 3, N), N, R, 1)
    inner = g.op("Add", inner, g.const(random((R,), seed=3))) if bias else inner
    g.output(_matmul(g, g.op(operator, inner), R, M, 2))
    _left(g, f"{operator} stands between")


def test_a_norm() -> None:
    g = G(17)
    inner = _matmul(g, g.input("x", 3, N), N, R, 1)
    g.output(_matmul(g, g.op("LayerNormalization", inner, g.const(np.ones(R))), R, M, 2))
    _left(g, "LayerNormalization stands between")


@pytest.mark.parametrize("operator", ["Add", "Mul", "Sub", "Div"])
def test_an_activation_between(operator: str) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(_matmul(g, g.op(operator, _matmul(g, x, N, R, 1), g.input("gate", R)), R, M, 2))
    _left(g, "no constant of the channels")


@pytest.mark.parametrize("operator", ["Sub", "Div"])
def test_a_constant_on_the_left(operator: str) -> None:
    g = G(17)
    inner = g.op(operator, g.const(random((R,), seed=3)), _matmul(g, g.input("x", 3, N), N, R, 1))
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "no constant of the channels")


@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (5, 1)])
def test_a_constant_of_the_rows(shape: tuple[int, int]) -> None:
    g = G(17)
    inner = g.op("Add", _matmul(g, g.input("x", shape[0], N), N, 5, 1), g.const(random(shape, seed=3)))
    g.output(_matmul(g, inner, 5, M, 2))
    _left(g, "no constant of the channels")


@pytest.mark.parametrize("operator", ["Add", "Mul"])
@pytest.mark.parametrize("shape", [(1, 1, R), (1, 1, 1)])
def test_a_constant_that_adds_axes(shape: tuple[int, ...], operator: str) -> None:
    g = G(17)
    inner = g.op(operator, _matmul(g, g.input("x", 3, N), N, R, 1), g.const(random(shape, seed=3)))
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "no constant of the channels")


def test_a_constant_that_may_add_axes() -> None:
    """Of how many axes x is nobody says."""
    g = G(17)
    inner = g.op("Add", _matmul(g, g.input("x"), N, R, 1), g.const(random((1, R), seed=3)))
    g.output(_matmul(g, inner, R, M, 2), rank=2)
    g.inputs[0].type.tensor_type.ClearField("shape")
    before = helper.make_model(
        helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    _, records = run_pass(before, MergeFactors)
    assert applications(records) == 0


def test_a_constant_that_widens_the_axis() -> None:
    g = G(17)
    inner = g.op("Add", _matmul(g, g.input("x", 3, N), N, 1, 1), g.const(random((R,), seed=3)))
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "different axes")


def test_an_axis_of_size_one() -> None:
    g = G(17)
    inner = g.op("Add", _matmul(g, g.input("x", 3, N), N, 1, 1), g.const(random((3, 1), seed=3)))
    g.output(_matmul(g, inner, 1, M, 2))
    _left(g, "no constant of the channels")


def test_dropout_that_trains() -> None:
    g = G(17)
    training = g.op("Constant", value=numpy_helper.from_array(np.array(True)))
    inner = g.op("Dropout", _matmul(g, g.input("x", 3, N), N, R, 1), g.const(0.5), training)
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "Dropout")


def test_a_batch_of_matrices() -> None:
    g = G(17)
    inner = _matmul(g, g.input("x", 2, 3, N), N, R, 1)
    g.output(g.op("MatMul", inner, g.const(random((2, R, M), seed=2))))
    _left(g, "")


@pytest.mark.parametrize("returned", ["product", "scaled"])
def test_the_value_between_is_returned(returned: str) -> None:
    g = G(17)
    product = _matmul(g, g.input("x", 3, N), N, R, 1)
    scaled = g.op("Mul", product, g.const(0.5))
    g.output(_matmul(g, scaled, R, M, 2))
    g.output(product if returned == "product" else scaled)
    _left(g, "read elsewhere")


@pytest.mark.parametrize("read", ["product", "scaled"])
def test_the_value_between_is_read_elsewhere(read: str) -> None:
    g = G(17)
    product = _matmul(g, g.input("x", 3, N), N, R, 1)
    scaled = g.op("Mul", product, g.const(0.5))
    g.output(_matmul(g, scaled, R, M, 2))
    g.output(g.op("Relu", product if read == "product" else scaled))
    _left(g, "read elsewhere")


def test_a_table_and_a_constant_on_its_left() -> None:
    """As many positions as channels: the second product mixes positions."""
    g = G(17)
    rows = g.op("Gather", g.const(random((9, 4), seed=1)), g.input("x", 4, dtype=TensorProto.INT64))
    g.output(g.op("MatMul", g.const(random((3, 4), seed=2)), rows))
    _left(g, "different axes")


def test_products_of_different_sides() -> None:
    g = G(17)
    inner = _matmul(g, g.input("x", 4, N), N, 4, 1)
    g.output(g.op("MatMul", g.const(random((3, 4), seed=2)), inner))
    _left(g, "different axes")


def test_gemm_that_transposes_what_the_first_made() -> None:
    g = G(17)
    inner = _matmul(g, g.input("x", 4, N), N, 4, 1)
    g.output(g.op("Gemm", inner, _weight(g, 4, M, 2), transA=1))
    _left(g, "different axes")


def test_gemm_that_transposes_behind_a_constant_on_the_left() -> None:
    g = G(17)
    inner = g.op("MatMul", g.const(random((4, N), seed=1)), g.input("x", N, 4))
    g.output(g.op("Gemm", inner, _weight(g, 4, 4, 2), transA=1))
    _left(g, "different axes")


@pytest.mark.parametrize("which", [0, 1])
def test_a_weight_that_a_caller_may_override(which: int) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    made = [g.overridable(random((N, R))) if which == 0 else _weight(g, N, R, 1)]
    made.append(g.overridable(random((R, M))) if which == 1 else _weight(g, R, M, 2))
    g.output(g.op("MatMul", g.op("MatMul", x, made[0]), made[1]))
    _left(g, "")


@pytest.mark.parametrize(("options", "bias"), [({"beta": 0.5}, (M,)), ({}, (3, 1)), ({}, (3, M))])
def test_what_gemm_adds(options: dict[str, object], bias: tuple[int, ...]) -> None:
    """A second product that adds something else than a vector of its channels is left."""
    g = G(17)
    inner = _matmul(g, g.input("x", 3, N), N, R, 1)
    g.output(g.op("Gemm", inner, _weight(g, R, M, 2), g.const(random(bias, seed=3)), **options))
    _left(g, "")


def test_gemm_that_adds_an_activation() -> None:
    g = G(17)
    inner = g.op("Gemm", g.input("x", 3, N), _weight(g, N, R, 1), g.input("c", R))
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "")


def test_quantised_factors() -> None:
    g = G(17)
    name = g.const(np.zeros(1, np.int64))
    g.initializers[-1].CopyFrom(numpy_helper.from_array(np.ones((N, R), np.int8), name))
    inner = g.op("MatMul", g.input("x", 3, N), g.op("DequantizeLinear", name, g.const(0.1)))
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "quantised")


def test_a_low_rank_stays() -> None:
    g = G(17)
    g.output(_matmul(g, _matmul(g, g.input("x", 3, 160), 160, 20, 1), 20, 170, 2))
    _left(g, "of rank 20 the factors hold 6,600 weights, their product 27,200")


def test_a_small_product_may_take_more_bytes() -> None:
    g = G(17)
    g.output(_matmul(g, _matmul(g, g.input("x", 1, 40), 40, 4, 1), 4, 40, 2))
    _merged(g, "MatMul")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_scale_that_is_not_finite(value: float) -> None:
    g = G(17)
    scale = random((R,), seed=3)
    scale[2] = value
    operator = "Div" if value == 0 else "Mul"
    inner = g.op(operator, _matmul(g, g.input("x", 3, N), N, R, 1), g.const(scale))
    g.output(_matmul(g, inner, R, M, 2))
    _left(g, "not finite")


@pytest.mark.parametrize("magnitude", [300.0, 1e-4])
def test_a_product_that_float16_does_not_hold(magnitude: float) -> None:
    g = G(17, FLOAT16)
    x = g.input("x", 3, N)
    made = [g.const(random(shape, seed=s) * magnitude) for s, shape in enumerate([(N, R), (R, M)])]
    g.output(g.op("MatMul", g.op("MatMul", x, made[0]), made[1]))
    _left(g, "may not hold the product")


def test_a_shift_that_float16_does_not_hold() -> None:
    g = G(17, FLOAT16)
    inner = g.op("Add", _matmul(g, g.input("x", 3, N), N, R, 1), g.const(np.full(R, 6e4)))
    g.output(g.op("MatMul", inner, g.const(np.full((R, M), 0.5))))
    _left(g, "does not hold what the shift")


def test_weights_that_are_not_finite() -> None:
    g = G(17)
    broken = random((N, R))
    broken[0, 0] = np.nan
    g.output(_matmul(g, g.op("MatMul", g.input("x", 3, N), g.const(broken)), R, M, 2))
    _left(g, "may not hold")


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int]) -> None:
    g = G(17)
    n, r, m = sizes
    g.output(_matmul(g, g.op("Add", _matmul(g, g.input("x", 3, n), n, r, 1), g.const(np.ones(r))), r, m, 2), 3, m)
    before = g.model()
    after, _ = run_pass(before, MergeFactors)
    feed = {"x": random((3, n))}
    np.testing.assert_array_equal(run_ort(before, feed)[0], run_ort(after, feed)[0])


# ---- shared -------------------------------------------------------------------------------------------------------


def _twins(*, second_scale: str = "Mul", turned: bool = False, other: bool = False) -> G:
    """Two pairs that read the same constants."""
    g = G(17)
    u, v, s = (g.const(random(shape, seed=i) + 2) for i, shape in enumerate([(5, 5), (5, 5), (5,)]))
    for name, operator in (("x", "Mul"), ("z", second_scale)):
        inner = g.op(operator, g.op("MatMul", g.input(name, 3, 5), v), s)
        g.output(g.op("Gemm", inner, u, transB=int(turned and name == "z")))
    if other:
        g.output(g.op("MatMul", "x", v))
    return g


def _feeds() -> dict[str, np.ndarray]:
    return {"x": random((3, 5), seed=8), "z": random((3, 5), seed=9)}


def test_siamese_pairs_share_the_product() -> None:
    before = _twins().model()
    after, records = run_pass(before, MergeFactors)
    assert op_types(after) == ["Gemm", "Gemm"] and applications(records) == 2
    assert len(after.graph.initializers) == 1
    assert_rounding(before, after, _feeds())


@pytest.mark.parametrize("options", [{"second_scale": "Div"}, {"turned": True}])
def test_the_same_constants_used_differently_are_two_products(options: dict[str, object]) -> None:
    before = _twins(**options).model()  # type: ignore[arg-type]
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 2 and len(after.graph.initializers) == 2
    assert_rounding(before, after, _feeds())


def test_factors_that_something_else_reads() -> None:
    before = _twins(other=True).model()
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 0 and "something else reads a factor" in reasons(records)
    assert op_types(after) == op_types(ir.from_proto(before))


def test_a_factor_that_a_body_reads() -> None:
    g = _twins()
    shape = helper.make_tensor_value_info("b", FLOAT, [3, 5])
    product = helper.make_node("MatMul", ["x", g.initializers[1].name], ["b"])
    body = helper.make_graph([product], "then", [], [shape])
    copy = helper.make_node("Identity", ["x"], ["e"])
    other = helper.make_graph([copy], "else", [], [helper.make_tensor_value_info("e", FLOAT, [3, 5])])
    condition = g.input("c", dtype=TensorProto.BOOL)
    g.nodes.append(helper.make_node("If", [condition], ["chosen"], then_branch=body, else_branch=other))
    g.output("chosen", 3, 5)
    _left(g, "something else reads a factor")


def test_a_factor_that_is_returned() -> None:
    g = G(17)
    v = _weight(g, N, R, 1)
    g.output(_matmul(g, g.op("MatMul", g.input("x", 3, N), v), R, M, 2))
    g.output(v, N, R)
    _left(g, "something else reads a factor")


def test_one_constant_for_both_factors() -> None:
    g = G(17)
    w = _weight(g, 5, 5, 1)
    g.output(g.op("Gemm", g.op("Gemm", g.input("x", 3, 5), w), w, transB=1))
    after = _merged(g, "Gemm")
    assert len(after.graph.initializers) == 1


# ---- bodies and functions --------------------------------------------------------------------------------------------


def test_in_a_body() -> None:
    g = G(17)
    g.output(_gemm(g, _matmul(g, g.input("x", 3, N), N, R, 1), R, M, 2))
    before = in_body(g.model())
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 1 and op_types(after).count("Gemm") == 1 and "MatMul" not in op_types(after)
    assert_rounding(before, after, {"x": random((3, N)), "condition": np.array(True)})


def test_a_loop_does_not_repeat_what_stood_outside() -> None:
    g = G(17)
    inner = _matmul(g, g.input("x", 3, N), N, R, 1)
    u = _weight(g, R, M, 2)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", [inner, u], ["y"], name="in_body"),
            helper.make_node("Identity", ["go"], ["going"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", FLOAT, [3, M]),
        ],
    )
    count = g.const(np.array(4, np.int64))
    g.nodes.append(helper.make_node("Loop", [count, ""], ["all"], body=body))
    g.output("all", 4, 3, M)
    _left(g, "outside the body")


def _function(*, alpha: bool) -> onnx.ModelProto:
    first = helper.make_node("Gemm", ["x", "v"], ["t"])
    if alpha:
        first.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="a", type=onnx.AttributeProto.FLOAT))
    nodes = [
        helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(random((N, R), seed=1))),
        helper.make_node("Constant", [], ["u"], value=numpy_helper.from_array(random((R, M), seed=2))),
        first,
        helper.make_node("MatMul", ["t", "u"], ["y"]),
    ]
    attributes = ["a"] if alpha else []
    function = helper.make_function("local", "f", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)], attributes)
    g = G(17)
    given = {"a": 0.5} if alpha else {}
    g.nodes.append(helper.make_node("f", [g.input("x", 3, N)], ["out"], domain="local", **given))
    g.output("out", 3, M)
    return g.model([function])


def test_in_a_function() -> None:
    before = _function(alpha=False)
    after, records = run_pass(before, MergeFactors)
    assert applications(records) == 1
    feed = {"x": random((3, N))}
    np.testing.assert_allclose(run_ort(before, feed)[0], run_ort(after, feed)[0], rtol=1e-5, atol=1e-6)


def test_an_attribute_of_the_function_around() -> None:
    before = _function(alpha=True)
    _, records = run_pass(before, MergeFactors)
    assert applications(records) == 0
