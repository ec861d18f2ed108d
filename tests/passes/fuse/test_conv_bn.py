"""fuse-conv-bn."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.passes.fuse.conv_bn import FuseConvBn
from tests.passes.common import applications, op_types, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons


def _positive(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.abs(random(shape, seed=seed)) + 0.1


def _norm(g: G, x: str, channels: int, **attributes: object) -> str:
    parameters = [g.const(random((channels,), seed=s)) for s in (11, 12, 13)]
    return g.op("BatchNormalization", x, *parameters, g.const(_positive((channels,), 14)), **attributes)


def _conv(
    g: G, *, axes: int = 2, groups: int = 1, bias: bool = True, transposed: bool = False, **attributes: object
) -> tuple[str, int]:
    """A convolution of 4 * groups inputs into 3 * groups channels; the value and the number of channels."""
    inputs, outputs = 2 * groups, 3 * groups
    kernel = (3, 2, 2)[:axes]
    shape = (inputs, 3, *kernel) if transposed else (outputs, 2, *kernel)
    operands = [g.input("x", "n", inputs, *(5,) * axes), g.const(random(shape, seed=1))]
    if bias:
        operands.append(g.const(random((outputs,), seed=2)))
    return g.op("ConvTranspose" if transposed else "Conv", *operands, group=groups, **attributes), outputs


@settings(max_examples=30, deadline=None)
@given(
    axes=st.integers(1, 3),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    transposed=st.booleans(),
    batch=st.integers(0, 2),
    opset=st.sampled_from([9, 11, 14, 15, 18]),
)
def test_property(axes: int, groups: int, bias: bool, transposed: bool, batch: int, opset: int) -> None:
    g = G(opset)
    x, channels = _conv(g, axes=axes, groups=groups, bias=bias, transposed=transposed)
    g.output(_norm(g, x, channels, epsilon=1e-3))
    before = g.model()
    after, records = run_pass(before, FuseConvBn)
    assert op_types(after) == ["ConvTranspose" if transposed else "Conv"], reasons(records)
    assert_rounding(before, after, {"x": random((batch, 2 * groups, *(5,) * axes))})


@pytest.mark.parametrize("dtype", [FLOAT16, DOUBLE])
def test_other_floats(dtype: int) -> None:
    g = G(15, dtype)
    x, channels = _conv(g)
    g.output(_norm(g, x, channels))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert op_types(after) == ["Conv"]
    if dtype == FLOAT16:  # ONNX Runtime's CPU has no float64 kernel of every convolution
        assert_rounding(before, after, {"x": random((2, 2, 5, 5), dtype)})


def test_float32_parameters_of_a_float16_normalisation() -> None:
    g = G(15, FLOAT16)
    x, channels = _conv(g)
    parameters = [g.const(random((channels,), seed=s), FLOAT) for s in (11, 12, 13)]
    g.output(g.op("BatchNormalization", x, *parameters, g.const(_positive((channels,), 14), FLOAT)))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert op_types(after) == ["Conv"]
    assert {v.dtype for v in after.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert_rounding(before, after, {"x": random((1, 2, 5, 5), FLOAT16)})


def test_attributes_stay() -> None:
    g = G(15)
    x, channels = _conv(g, strides=[2, 1], pads=[1, 0, 1, 2], dilations=[1, 2])
    g.output(_norm(g, x, channels))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert list(only(after, "Conv").attributes.get_ints("strides")) == [2, 1]
    assert_rounding(before, after, {"x": random((2, 2, 5, 5))})


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1), (1,), (), (1, 1, 1)])
@pytest.mark.parametrize("op_type", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("transposed", [False, True])
def test_channel_constants(op_type: str, shape: tuple[int, ...], transposed: bool) -> None:
    g = G(15)
    x, _ = _conv(g, transposed=transposed)
    g.output(g.op(op_type, x, g.const(_positive(shape, 5))))
    before = g.model()
    after, records = run_pass(before, FuseConvBn)
    assert op_types(after) == ["ConvTranspose" if transposed else "Conv"], reasons(records)
    assert_rounding(before, after, {"x": random((2, 2, 5, 5))})


def test_a_whole_chain() -> None:
    g = G(15)
    x, channels = _conv(g, bias=False)
    x = g.op("Mul", g.const(_positive((3, 1, 1), 5)), x)
    x = g.op("Add", g.const(random((3, 1, 1), seed=6)), x)
    g.output(g.op("Relu", _norm(g, x, channels)))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert op_types(after) == ["Conv", "Relu"]
    assert_rounding(before, after, {"x": random((2, 2, 5, 5))})


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_gemm(transposed: int, beta: float) -> None:
    g = G(15)
    weight = g.const(random((4, 6) if transposed else (6, 4), seed=1))
    x = g.op(
        "Gemm", g.input("x", "n", 6), weight, g.const(random((4,), seed=2)), transB=transposed, alpha=0.5, beta=beta
    )
    g.output(_norm(g, x, 4))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"x": random((3, 6))})


def test_matmul() -> None:
    g = G(15)
    g.output(_norm(g, g.op("MatMul", g.input("x", "n", 6), g.const(random((6, 4), seed=1))), 4))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert op_types(after) == ["Gemm"]
    assert_rounding(before, after, {"x": random((3, 6))})


def test_matmul_of_three_axes_is_left() -> None:
    """There the channels are on axis 1, not on the weight's."""
    g = G(15)
    g.output(_norm(g, g.op("MatMul", g.input("x", "n", 4, 6), g.const(random((6, 5), seed=1))), 4))
    after, records = run_pass(g.model(), FuseConvBn)
    assert op_types(after) == ["MatMul", "BatchNormalization"] and "axis 1" in reasons(records)


def test_shared_weight_keeps_its_values_for_the_other_reader() -> None:
    g = G(15)
    x, channels = _conv(g)
    g.output(_norm(g, x, channels))
    weight, bias = (t.name for t in g.initializers[:2])
    g.output(g.op("Conv", "x", weight, bias))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert op_types(after) == ["Conv", "Conv"]
    assert_rounding(before, after, {"x": random((2, 2, 5, 5))})


def test_big_weights_are_computed_when_saved() -> None:
    g = G(15)
    weight = g.const(random((600, 500, 1, 1), seed=1))
    x = g.op("Conv", g.input("x", 1, 500, 2, 2), weight)
    g.output(_norm(g, x, 600))
    before = g.model()
    after, _ = run_pass(before, FuseConvBn)
    assert isinstance(only(after, "Conv").inputs[1].const_value, ir.LazyTensor)  # type: ignore[union-attr]
    assert_rounding(before, after, {"x": random((1, 500, 2, 2))})


def test_inside_a_body() -> None:
    g = G(15)
    x, channels = _conv(g)
    g.output(_norm(g, x, channels))
    before = in_body(g.model())
    after, _ = run_pass(before, FuseConvBn)
    assert "BatchNormalization" not in op_types(after)
    assert_rounding(before, after, {"condition": np.array(True), "x": random((2, 2, 5, 5))})


def test_not_moved_into_a_loop() -> None:
    g = G(15)
    x, _ = _conv(g)
    factor = g.const(_positive((3, 1, 1), 3))
    keep = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("keep", "kept")]
    body = helper.make_graph(
        [helper.make_node("Mul", [x, factor], ["b"]), helper.make_node("Identity", ["keep"], ["kept"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), keep[0]],
        [keep[1], helper.make_tensor_value_info("b", FLOAT, None)],
    )
    g.nodes.append(helper.make_node("Loop", [g.op("Constant", value_int=3), ""], ["y"], body=body))
    g.output("y", None, None, None, None, None)
    after, records = run_pass(g.model(), FuseConvBn)
    assert "Mul" in op_types(after) and "a loop must not repeat it" in reasons(records)


def _refused(name: str) -> G:
    """A convolution and something after it that must not be folded."""
    g = G(15)
    if name in ("weight is computed", "weight is overridable", "bias is computed"):
        array = random((3, 2, 3, 2), seed=1)
        weight = g.const(array)
        if name == "weight is computed":
            weight = g.op("Neg", weight)
        if name == "weight is overridable":
            weight = g.overridable(array)
        bias = g.input("b", 3) if name == "bias is computed" else g.const(random((3,)))
        x, channels = g.op("Conv", g.input("x", 1, 2, 5, 5), weight, bias), 3
    else:
        x, channels = _conv(g)
    if name == "parameters are computed":
        ones = g.op("Abs", g.const(np.ones(3)))
        g.output(g.op("BatchNormalization", x, ones, ones, ones, ones))
    elif name == "parameters are overridable":
        zeros = g.const(np.zeros(3))
        g.output(g.op("BatchNormalization", x, g.overridable(np.ones(3)), zeros, zeros, g.const(np.ones(3))))
    elif name == "negative variance":
        zeros = g.const(np.zeros(3))
        g.output(g.op("BatchNormalization", x, zeros, zeros, zeros, g.const(-np.ones(3))))
    elif name == "training mode":
        parameters = [g.const(np.ones(3)) for _ in range(4)]
        outputs = ["y", "running_mean", "running_variance"]
        g.nodes.append(helper.make_node("BatchNormalization", [x, *parameters], outputs, training_mode=1))
        g.output("y")
    elif name == "constant varies over positions":
        g.output(g.op("Mul", x, g.const(_positive((4,), 3))))
    elif name == "constant of another batch":
        g.output(g.op("Mul", x, g.const(_positive((2, 1, 1, 1), 3))), "n", 3, 3, 4)
    elif name == "constant adds an axis":
        g.output(g.op("Mul", x, g.const(_positive((1, 1, 3, 1, 1), 3))), 1, "n", 3, 3, 4)
    elif name == "constant divided by it":
        g.output(g.op("Div", g.const(_positive((3, 1, 1), 3)), x))
    elif name == "it subtracted from a constant":
        g.output(g.op("Sub", g.const(_positive((3, 1, 1), 3)), x))
    elif name == "divided by zero":
        g.output(g.op("Div", x, g.const([[[1.0]], [[0.0]], [[2.0]]])))
    elif name == "added to a computed value":
        g.output(g.op("Add", x, g.input("y", 3, 1, 1)))
    elif name == "added to itself":
        g.output(g.op("Add", x, x))
    elif name == "infinite weight":
        g.output(g.op("Mul", x, g.const(np.full((3, 1, 1), 3.4e38))))
    else:
        g.output(_norm(g, x, channels))
    if name == "second reader":
        g.output(g.op("Relu", x))
    elif name == "also an output":
        g.output(x)
    return g


@pytest.mark.parametrize(
    "name",
    [
        *("weight is computed", "weight is overridable", "bias is computed", "parameters are computed"),
        *("parameters are overridable", "negative variance", "training mode", "constant varies over positions"),
        *("constant of another batch", "constant adds an axis", "constant divided by it"),
        *("it subtracted from a constant", "divided by zero", "added to a computed value", "added to itself"),
        *("infinite weight", "second reader", "also an output"),
    ],
)
def test_refused(name: str) -> None:
    model = _refused(name).model()
    after, records = run_pass(model, FuseConvBn)
    assert applications(records) == 0
    assert op_types(after) == [n.op_type for n in model.graph.node]


def test_one_channel_constant_after_one_channel() -> None:
    """A constant of three numbers after one channel makes three channels of one."""
    g = G(15)
    x = g.op("Conv", g.input("x", 1, 2, 5, 5), g.const(random((1, 2, 3, 3))))
    g.output(g.op("Mul", x, g.const(_positive((3, 1, 1), 3))))
    assert op_types(run_pass(g.model(), FuseConvBn)[0]) == ["Conv", "Mul"]


def test_float16_weight_that_overflows_is_left() -> None:
    g = G(15, FLOAT16)
    x = g.op("Conv", g.input("x", 1, 2, 5, 5), g.const(np.full((3, 2, 1, 1), 600.0)))
    g.output(g.op("Mul", x, g.const(np.full((3, 1, 1), 600.0))))
    after, records = run_pass(g.model(), FuseConvBn)
    assert op_types(after) == ["Conv", "Mul"] and "not finite" in reasons(records)


def test_old_training_outputs_are_left() -> None:
    """Before opset 14 further outputs say that statistics are collected."""
    g = G(9)
    x, _ = _conv(g)
    parameters = [g.const(np.ones(3)) for _ in range(4)]
    outputs = ["y", "mean", "variance", "saved_mean", "saved_variance"]
    g.nodes.append(helper.make_node("BatchNormalization", [x, *parameters], outputs))
    g.output("y", "n", 3, 3, 4)
    g.output("mean", 3)
    after, records = run_pass(g.model(), FuseConvBn)
    assert "BatchNormalization" in op_types(after) and "statistics" in reasons(records)
