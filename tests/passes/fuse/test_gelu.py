"""fuse-gelu."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.fuse.gelu import FuseGelu
from tests.passes.common import applications, op_types, run_pass
from tests.passes.fuse.common import FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons

ROOT = math.sqrt(2)


def _erf(g: G, x: str) -> str:
    return g.op("Add", g.op("Erf", g.op("Div", x, g.const(ROOT))), g.const(1.0))


def _erf_by_mul(g: G, x: str) -> str:
    return g.op("Add", g.const(1.0), g.op("Erf", g.op("Mul", g.const(1 / ROOT), x)))


def _tanh_pow(g: G, x: str) -> str:
    cube = g.op("Mul", g.op("Pow", x, g.const(3.0)), g.const(0.044715))
    inner = g.op("Mul", g.op("Add", x, cube), g.const(math.sqrt(2 / math.pi)))
    return g.op("Add", g.op("Tanh", inner), g.const(1.0))


def _tanh_mul(g: G, x: str) -> str:
    cube = g.op("Mul", g.const(0.044715), g.op("Mul", x, g.op("Mul", x, x)))
    inner = g.op("Mul", g.const(math.sqrt(2 / math.pi)), g.op("Add", cube, x))
    return g.op("Add", g.const(1.0), g.op("Tanh", inner))


def _tanh_factored(g: G, x: str) -> str:
    """sqrt(2/pi) x (1 + 0.044715 x^2), as TensorFlow's models write it."""
    square = g.op("Add", g.op("Mul", g.op("Mul", x, g.const(0.044715)), x), g.const(1.0))
    inner = g.op("Mul", g.op("Mul", x, g.const(math.sqrt(2 / math.pi))), square)
    return g.op("Add", g.op("Tanh", inner), g.const(1.0))


GATES: list[Callable[[G, str], str]] = [_erf, _erf_by_mul, _tanh_pow, _tanh_mul, _tanh_factored]
PRODUCTS: list[Callable[[G, str, str], str]] = [
    lambda g, x, e: g.op("Mul", g.op("Mul", x, g.const(0.5)), e),
    lambda g, x, e: g.op("Mul", e, g.op("Mul", g.const(0.5), x)),
    lambda g, x, e: g.op("Mul", g.op("Mul", x, e), g.const(0.5)),
    lambda g, x, e: g.op("Mul", g.const(0.5), g.op("Mul", e, x)),
    lambda g, x, e: g.op("Mul", x, g.op("Mul", g.const(0.5), e)),
    lambda g, x, e: g.op("Mul", g.op("Mul", e, g.const(0.5)), x),
    lambda g, x, e: g.op("Div", g.op("Mul", x, e), g.const(2.0)),
    lambda g, x, e: g.op("Mul", g.op("Div", x, g.const(2.0)), e),
]


def _model(gate: Callable[[G, str], str], product: Callable[[G, str, str], str], **options: object) -> G:
    g = G(int(options.get("opset", 20)), int(options.get("dtype", FLOAT)))  # type: ignore[call-overload]
    x = g.input("x", *options.get("shape", ("n", 8)))  # type: ignore[misc]
    g.output(product(g, x, gate(g, x)), rank=len(options.get("shape", ("n", 8))))  # type: ignore[arg-type]
    return g


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_spelling(gate: Callable[[G, str], str], product: Callable[[G, str, str], str]) -> None:
    before = _model(gate, product).model()
    after, records = run_pass(before, FuseGelu)
    assert op_types(after) == ["Gelu"], reasons(records)
    wanted = "none" if gate in (_erf, _erf_by_mul) else "tanh"
    assert only(after, "Gelu").attributes.get_string("approximate", "none") == wanted
    assert_rounding(before, after, {"x": random((5, 8), scale=3.0)})


@settings(max_examples=25, deadline=None)
@given(
    gate=st.sampled_from(GATES),
    product=st.sampled_from(PRODUCTS),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([FLOAT, FLOAT16]),
    opset=st.sampled_from([20, 22]),
)
def test_property(
    gate: Callable[[G, str], str], product: Callable[[G, str, str], str], shape: list[int], dtype: int, opset: int
) -> None:
    before = _model(gate, product, shape=tuple(shape), dtype=dtype, opset=opset).model()
    after, _ = run_pass(before, FuseGelu)
    assert op_types(after) == ["Gelu"]
    assert_rounding(before, after, {"x": random(shape, dtype, scale=2.0)})


def test_contrib_before_opset_20() -> None:
    before = _model(_erf, PRODUCTS[0], opset=17).model()
    after, _ = run_pass(before, FuseGelu)
    node = only(after, "Gelu")
    assert (node.domain, after.opset_imports["com.microsoft"]) == ("com.microsoft", 1)
    assert_rounding(before, after, {"x": random((3, 8))})


def test_no_contrib_on_another_target() -> None:
    after, records = run_pass(_model(_erf, PRODUCTS[0], opset=17).model(), FuseGelu, target="onnx")
    assert "Gelu" not in op_types(after) and "com.microsoft" not in after.opset_imports
    assert "opset 17" in reasons(records)


def test_no_contrib_for_float16() -> None:
    after, records = run_pass(_model(_erf, PRODUCTS[0], opset=17, dtype=FLOAT16).model(), FuseGelu)
    assert applications(records) == 0 and "float16" in reasons(records)
    assert "Erf" in op_types(after)


def test_inside_a_body() -> None:
    before = in_body(_model(_erf, PRODUCTS[2]).model())
    after, records = run_pass(before, FuseGelu)
    assert applications(records) == 1
    assert "Gelu" in op_types(after)
    feeds = {"condition": np.array(True), "x": random((3, 8))}
    assert_rounding(before, after, feeds)


def test_constant_nodes() -> None:
    g = G(20)
    x = g.input("x", 4)

    def number(value: float) -> str:
        return g.op("Constant", value_float=value)

    gate = g.op("Add", g.op("Erf", g.op("Div", x, number(ROOT))), number(1.0))
    g.output(g.op("Mul", g.op("Mul", x, number(0.5)), gate), 4)
    before = g.model()
    after, _ = run_pass(before, FuseGelu)
    assert op_types(after) == ["Gelu"]
    assert_rounding(before, after, {"x": random((4,))})


def test_a_scaled_input_is_not_taken_for_the_half() -> None:
    """x = 3 h: the 3 belongs to x, which the gate reads too."""
    g = G(20)
    x = g.op("Mul", g.input("h", 6), g.const(3.0))
    g.output(g.op("Mul", g.op("Mul", x, g.const(0.5)), _erf(g, x)), 6)
    before = g.model()
    after, _ = run_pass(before, FuseGelu)
    assert op_types(after) == ["Mul", "Gelu"]
    assert_rounding(before, after, {"h": random((6,))})


def _wrong(name: str) -> G:
    """Look-alikes, each wrong in one place."""
    g = G(20)
    x = g.input("x", 3, 4)
    one, half, root = 1.0, 0.5, ROOT
    if name == "erf of x / 2":
        root = 2.0
    elif name == "2 + erf":
        one = 2.0
    elif name == "a quarter":
        half = 0.25
    elif name == "root off by 1e-4":
        root = ROOT * 1.0001
    if name in ("exponent 2", "exponent 4", "wrong cubic", "missing cubic"):
        exponent = {"exponent 2": 2.0, "exponent 4": 4.0}.get(name, 3.0)
        weight = {"wrong cubic": 0.0447, "missing cubic": 0.0}.get(name, 0.044715)
        cube = g.op("Mul", g.op("Pow", x, g.const(exponent)), g.const(weight))
        gate = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.const(math.sqrt(2 / math.pi))))
    elif name == "reciprocal argument":
        gate = g.op("Erf", g.op("Div", g.const(ROOT), x))
    elif name == "another x in the gate":
        gate = g.op("Erf", g.op("Div", g.input("y", 3, 4), g.const(root)))
    else:
        gate = g.op("Erf", g.op("Div", x, g.const(root)))
    plus = g.op("Sub", gate, g.const(1.0)) if name == "erf - 1" else g.op("Add", gate, g.const(one))
    if name == "overridable half":
        scaled = g.op("Mul", x, g.overridable(0.5))
    elif name == "half of higher rank":
        scaled = g.op("Mul", x, g.const([[[0.5]]]))
    elif name == "a vector of halves":
        scaled = g.op("Mul", x, g.const([0.5, 0.5, 0.5, 0.5]))
    elif name == "another x in the product":
        scaled = g.op("Mul", g.input("y", 3, 4), g.const(half))
    else:
        scaled = g.op("Mul", x, g.const(half))
    if name == "divided by the gate":
        result = g.op("Div", scaled, plus)
    elif name == "the gate squared":
        result = g.op("Mul", g.op("Mul", plus, plus), scaled)
    else:
        result = g.op("Mul", scaled, plus)
    g.output(result)
    if name == "the gate is an output":
        g.output(plus)
    elif name == "erf is an output":
        g.output(gate)
    elif name == "the gate has a second reader":
        g.output(g.op("Neg", plus))
    return g


@pytest.mark.parametrize(
    "name",
    [
        *("erf of x / 2", "2 + erf", "erf - 1", "a quarter", "root off by 1e-4", "exponent 2", "exponent 4"),
        *("wrong cubic", "missing cubic", "reciprocal argument", "another x in the gate", "overridable half"),
        *("half of higher rank", "a vector of halves", "another x in the product", "divided by the gate"),
        *("the gate squared", "the gate is an output", "erf is an output", "the gate has a second reader"),
    ],
)
def test_look_alikes(name: str) -> None:
    after, records = run_pass(_wrong(name).model(), FuseGelu)
    assert applications(records) == 0
    assert "Gelu" not in op_types(after)


def test_the_half_read_elsewhere_stays() -> None:
    """x / 2 is an output too: what remains after it is not x times a gate."""
    g = G(20)
    x = g.input("x", 4)
    half = g.op("Mul", x, g.const(0.5))
    g.output(g.op("Mul", half, _erf(g, x)), 4)
    g.output(half, 4)
    after, records = run_pass(g.model(), FuseGelu)
    assert applications(records) == 0 and "Erf" in op_types(after)


def test_not_moved_into_a_loop() -> None:
    """The gate is computed once outside; a loop body only multiplies with it."""
    from onnx import TensorProto, helper

    g = G(20)
    x = g.input("x", 4)
    gate = _erf(g, x)
    half = g.const(0.5)
    body = helper.make_graph(
        [
            helper.make_node("Mul", [x, gate], ["b1"]),
            helper.make_node("Mul", ["b1", half], ["b2"]),
            helper.make_node("Identity", ["keep"], ["kept"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("kept", TensorProto.BOOL, []), helper.make_tensor_value_info("b2", FLOAT, None)],
    )
    g.nodes.append(helper.make_node("Loop", [g.ints(3), ""], ["y"], body=body))
    g.initializers[-1].ClearField("dims")
    g.output("y", 3, 4)
    after, records = run_pass(g.model(), FuseGelu)
    assert applications(records) == 0, op_types(after)
    assert "another graph" in reasons(records)
