"""fuse-layer-norm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from graphopt.passes.fuse.layer_norm import FuseLayerNorm
from tests.passes.common import applications, op_types, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons

EPS = 1e-5


def _mean(g: G, x: str, axes: list[int], **attributes: object) -> str:
    if g.opset >= 18:
        return g.op("ReduceMean", x, g.ints(*axes), **attributes)
    return g.op("ReduceMean", x, axes=axes, **attributes)


def _normalised(
    g: G,
    x: str,
    axes: list[int],
    *,
    square: str = "pow",
    quotient: str = "div",
    twice: bool = False,
    eps: float = EPS,
    centred: bool = True,
) -> str:
    d = g.op("Sub", x, _mean(g, x, axes)) if centred else x
    d2 = g.op("Sub", x, _mean(g, x, axes)) if twice else d
    squared = g.op("Mul", d2, d2) if square == "mul" else g.op("Pow", d2, g.const(2.0))
    variance = g.op("Add", _mean(g, squared, axes), g.const(eps))
    if quotient == "pow":
        return g.op("Mul", d, g.op("Pow", variance, g.const(-0.5)))
    root = g.op("Pow", variance, g.const(0.5)) if quotient == "pow root" else g.op("Sqrt", variance)
    if quotient == "reciprocal":
        return g.op("Mul", g.op("Reciprocal", root), d)
    if quotient == "one over":
        return g.op("Mul", d, g.op("Div", g.const(1.0), root))
    return g.op("Div", d, root)


def _scaled(g: G, y: str, gamma: tuple[int, ...] | None, beta: tuple[int, ...] | None) -> str:
    if gamma is not None:
        y = g.op("Mul", y, g.const(random(gamma, seed=1)))
    if beta is not None:
        y = g.op("Add", g.const(random(beta, seed=2)), y)
    return y


@settings(max_examples=50, deadline=None)
@given(
    square=st.sampled_from(["pow", "mul"]),
    quotient=st.sampled_from(["div", "reciprocal", "one over", "pow", "pow root"]),
    twice=st.booleans(),
    axes=st.sampled_from([[-1], [2], [-2, -1], [1, 2], [-1, -2], [2, -2]]),
    scaled=st.sampled_from(["neither", "gamma", "beta", "both"]),
    opset=st.sampled_from([17, 18, 21]),
    dtype=st.sampled_from([FLOAT, FLOAT16]),
    batch=st.integers(0, 3),
)
def test_property(
    square: str, quotient: str, twice: bool, axes: list[int], scaled: str, opset: int, dtype: int, batch: int
) -> None:
    g = G(opset, dtype)
    eps = 1e-3 if dtype == FLOAT16 else EPS
    sizes = (6,) if len(axes) == 1 else (4, 6)
    y = _normalised(g, g.input("x", "n", 4, 6), axes, square=square, quotient=quotient, twice=twice, eps=eps)
    gamma = sizes if scaled in ("gamma", "both") else None
    beta = sizes if scaled in ("beta", "both") else None
    g.output(_scaled(g, y, gamma, beta))
    before = g.model()
    after, records = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization"], reasons(records)
    assert only(after, "LayerNormalization").attributes.get_int("axis", 0) == -len(axes)
    assert_rounding(before, after, {"x": random((batch, 4, 6), dtype, scale=2.0)})


@pytest.mark.parametrize("gamma", [(6,), (1,), (), (1, 6), (1, 1, 6), (1, 1, 1)])
@pytest.mark.parametrize("beta", [None, (), (6,), (1, 1, 6)])
def test_spread_parameters(gamma: tuple[int, ...], beta: tuple[int, ...] | None) -> None:
    g = G(17)
    g.output(_scaled(g, _normalised(g, g.input("x", 2, 4, 6), [-1]), gamma, beta))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization"]
    assert_rounding(before, after, {"x": random((2, 4, 6))})


def test_computed_parameters_of_the_right_shape() -> None:
    g = G(17)
    y = g.op("Mul", _normalised(g, g.input("x", 2, 6), [-1]), g.input("gamma", 6))
    g.output(g.op("Add", y, g.input("beta", 6)))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization"]
    assert_rounding(before, after, {"x": random((2, 6)), "gamma": random((6,), seed=1), "beta": random((6,), seed=2)})


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 1), (4, 6), (2, 1, 6)])
def test_gamma_over_other_axes_stays_outside(shape: tuple[int, ...]) -> None:
    g = G(17)
    g.output(_scaled(g, _normalised(g, g.input("x", 2, 4, 6), [-1]), shape, (6,)))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization", "Mul", "Add"]
    assert_rounding(before, after, {"x": random((2, 4, 6))})


def test_gamma_that_enlarges_the_result_stays_outside() -> None:
    g = G(17)
    g.output(_scaled(g, _normalised(g, g.input("x", 4, 6), [-1]), (3, 1, 6), None))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization", "Mul"]
    assert_rounding(before, after, {"x": random((4, 6))})


def test_normalised_value_read_twice_keeps_gamma_outside() -> None:
    g = G(17)
    y = _normalised(g, g.input("x", 4, 6), [-1])
    g.output(_scaled(g, y, (6,), None))
    g.output(g.op("Neg", y))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization", "Mul", "Neg"]
    assert_rounding(before, after, {"x": random((4, 6))})


def test_the_mean_may_be_read_elsewhere() -> None:
    """What is still needed stays; the rest is one operator."""
    g = G(17)
    x = g.input("x", 4, 6)
    mean = _mean(g, x, [-1])
    d = g.op("Sub", x, mean)
    variance = g.op("Add", _mean(g, g.op("Mul", d, d), [-1]), g.const(EPS))
    g.output(g.op("Div", d, g.op("Sqrt", variance)))
    g.output(mean)
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert sorted(op_types(after)) == ["LayerNormalization", "ReduceMean"]
    assert_rounding(before, after, {"x": random((4, 6))})


def _in_float32(g: G, gamma: np.ndarray | None, *, inside: bool) -> None:
    x = g.op("Cast", g.input("x", 3, 6), to=TensorProto.FLOAT)
    g.dtype = FLOAT
    y = _normalised(g, x, [-1])
    if gamma is not None and inside:
        y = g.op("Mul", y, g.const(gamma))
    y = g.op("Cast", y, to=TensorProto.FLOAT16)
    if gamma is not None and not inside:
        y = g.op("Mul", y, g.const(gamma, FLOAT16))
    g.dtype = FLOAT16
    g.output(y)


@pytest.mark.parametrize("inside", [False, True])
def test_casts_around_are_absorbed(inside: bool) -> None:
    g = G(17, FLOAT16)
    _in_float32(g, random((6,), FLOAT16, seed=1), inside=inside)
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization"]
    assert_rounding(before, after, {"x": random((3, 6), FLOAT16)})


def test_gamma_that_float16_cannot_hold_keeps_the_casts() -> None:
    g = G(17, FLOAT16)
    _in_float32(g, np.full((6,), 1 + 2.0**-20), inside=True)
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["Cast", "LayerNormalization", "Cast"]
    assert_rounding(before, after, {"x": random((3, 6), FLOAT16)})


def _tensorflow(g: G, *, gamma: bool = True, beta_shape: tuple[int, ...] = (6,)) -> str:
    """x * m + (beta - mean * m), m = gamma / sqrt(variance + eps)."""
    x = g.input("x", 3, 6)
    mean = _mean(g, x, [-1])
    d = g.op("Sub", x, mean)
    inverse = g.op("Reciprocal", g.op("Sqrt", g.op("Add", _mean(g, g.op("Mul", d, d), [-1]), g.const(EPS))))
    m = g.op("Mul", inverse, g.const(random((6,), seed=1))) if gamma else inverse
    rest = g.op("Sub", g.const(random(beta_shape, seed=2)), g.op("Mul", mean, m))
    return g.op("Add", g.op("Mul", x, m), rest)


@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("opset", [17, 18])
def test_as_tensorflow_writes_it(gamma: bool, opset: int) -> None:
    g = G(opset)
    g.output(_tensorflow(g, gamma=gamma))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["LayerNormalization"]
    assert_rounding(before, after, {"x": random((3, 6))})


def test_tensorflow_form_with_a_beta_of_another_shape() -> None:
    g = G(17)
    g.output(_tensorflow(g, beta_shape=(3, 6)))
    after, records = run_pass(g.model(), FuseLayerNorm)
    assert "LayerNormalization" not in op_types(after) and "shape of the normalised axes" in reasons(records)


@pytest.mark.parametrize("quotient", ["div", "reciprocal", "one over", "pow"])
@pytest.mark.parametrize("gamma", [None, (6,)])
def test_rms_norm(quotient: str, gamma: tuple[int, ...] | None) -> None:
    g = G(23)
    g.output(_scaled(g, _normalised(g, g.input("x", 3, 6), [-1], quotient=quotient, centred=False), gamma, None))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["RMSNormalization"]
    assert_rounding(before, after, {"x": random((3, 6))})


def test_rms_norm_leaves_an_added_constant() -> None:
    g = G(23)
    g.output(_scaled(g, _normalised(g, g.input("x", 3, 6), [-1], centred=False), (6,), (6,)))
    before = g.model()
    after, _ = run_pass(before, FuseLayerNorm)
    assert op_types(after) == ["RMSNormalization", "Add"]
    assert_rounding(before, after, {"x": random((3, 6))})


@pytest.mark.parametrize(("centred", "opset", "needed"), [(True, 16, "17"), (False, 22, "23")])
def test_old_opsets(centred: bool, opset: int, needed: str) -> None:
    g = G(opset)
    g.output(_normalised(g, g.input("x", 3, 6), [-1], centred=centred))
    _, records = run_pass(g.model(), FuseLayerNorm)
    assert applications(records) == 0 and f"needs opset {needed}" in reasons(records)


def test_float64_is_left() -> None:
    """The operator computes in float32 whatever comes in."""
    g = G(17, DOUBLE)
    g.output(_normalised(g, g.input("x", 3, 6), [-1]))
    _, records = run_pass(g.model(), FuseLayerNorm)
    assert applications(records) == 0 and "float32" in reasons(records)


def test_inside_a_body() -> None:
    g = G(17)
    g.output(_scaled(g, _normalised(g, g.input("x", 3, 6), [-1]), (6,), (6,)))
    before = in_body(g.model())
    after, records = run_pass(before, FuseLayerNorm)
    assert applications(records) == 1
    assert_rounding(before, after, {"condition": np.array(True), "x": random((3, 6))})


def _wrong(name: str) -> G:
    g = G(17)
    if name == "size of the axis is not known":
        x = g.input("x", 3, "d")
    elif name == "rank is not known":
        x = g.op("Reshape", g.input("y", 18), g.input("s", "r", dtype=TensorProto.INT64))
    else:
        x = g.input("x", 3, 6)
    axes = [0] if name == "first axis" else [1] if name == "rank is not known" else [-1]
    if name == "no axes":
        mean = g.op("ReduceMean", x)
    elif name == "axis dropped":
        mean = g.op("Unsqueeze", _mean(g, x, [-1], keepdims=0), g.ints(1))
    else:
        mean = _mean(g, x, axes)
    if name == "mean of another value":
        mean = _mean(g, g.input("y", 3, 6), [-1])
    if name == "mean over other axes":
        mean = _mean(g, x, [0])
    d = g.op("Sub", mean, x) if name == "mean less x" else g.op("Sub", x, mean)
    exponent = {"exponent 3": 3.0, "exponent 2.0001": 2.0001}.get(name, 2.0)
    base = {"square of x": x, "square of the mean": mean}.get(name, d)
    squared = g.op("Pow", base, g.const(exponent))
    if name == "product of two":
        squared = g.op("Mul", d, x)
    elif name == "two to the power":
        squared = g.op("Pow", g.const(2.0), d)
    elif name == "a vector of exponents":
        squared = g.op("Pow", d, g.const([2.0] * 6))
    reduction = "ReduceSum" if name == "sum for mean" else "ReduceMean"
    if name == "axis dropped":
        variance = g.op("Unsqueeze", _mean(g, squared, [-1], keepdims=0), g.ints(1))
    elif reduction == "ReduceSum":
        variance = g.op("ReduceSum", squared, g.ints(-1))
    elif name == "no axes":
        variance = g.op("ReduceMean", squared)
    else:
        variance = _mean(g, squared, axes)
    if name == "epsilon is computed":
        shifted = g.op("Add", variance, g.input("e", 1))
    elif name == "epsilon is overridable":
        shifted = g.op("Add", variance, g.overridable(EPS))
    elif name == "epsilon is a vector":
        shifted = g.op("Add", variance, g.const([[EPS], [EPS], [EPS]]))
    elif name == "epsilon adds axes":
        shifted = g.op("Add", variance, g.const([[[EPS]]]))
    elif name == "epsilon is negative":
        shifted = g.op("Add", variance, g.const(-EPS))
    elif name == "no epsilon":
        shifted = variance
    else:
        shifted = g.op("Add", variance, g.const(EPS))
    if name == "no root":
        root = shifted
    elif name == "a third root":
        root = g.op("Pow", shifted, g.const(1 / 3))
    else:
        root = g.op("Sqrt", shifted)
    dividend = x if name == "x divided" else d
    if name == "inverted":
        g.output(g.op("Div", root, d))
    elif name == "multiplied by the root":
        g.output(g.op("Mul", d, root))
    elif name == "two over the root":
        g.output(g.op("Mul", d, g.op("Div", g.const(2.0), root)))
    elif name == "rank is not known":
        g.output(g.op("Div", dividend, root), None, None)
    else:
        g.output(g.op("Div", dividend, root))
    return g


@pytest.mark.parametrize(
    "name",
    [
        *("size of the axis is not known", "rank is not known", "first axis", "no axes", "axis dropped"),
        *("mean of another value", "mean over other axes", "mean less x", "exponent 3", "exponent 2.0001"),
        *("square of x", "square of the mean", "product of two", "two to the power", "a vector of exponents"),
        *("sum for mean", "epsilon is computed", "epsilon is overridable", "epsilon is a vector", "epsilon adds axes"),
        *("epsilon is negative", "no epsilon", "no root", "a third root", "x divided", "inverted"),
        *("multiplied by the root", "two over the root"),
    ],
)
def test_look_alikes(name: str) -> None:
    model = _wrong(name).model()
    after, records = run_pass(model, FuseLayerNorm)
    assert applications(records) == 0
    assert op_types(after) == [n.op_type for n in model.graph.node]


def test_the_right_one_is_no_look_alike() -> None:
    assert op_types(run_pass(_wrong("none of these").model(), FuseLayerNorm)[0]) == ["LayerNormalization"]
