"""merge-adapter: a low-rank branch beside a weight as part of it, and branches that are to stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.lowrank.merge_adapter import MergeAdapter
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons

N, R, M = 8, 2, 6


def _weight(g: G, inputs: int, outputs: int, seed: int) -> str:
    return g.const(random((inputs, outputs), g.dtype, seed=seed, scale=0.4))


def _base(g: G, x: str, *, bias: bool = False, seed: int = 0, weight: str | None = None) -> str:
    y = g.op("MatMul", x, weight or _weight(g, N, M, seed))
    return g.op("Add", y, g.const(random((M,), seed=30))) if bias else y


def _adapter(g: G, x: str, *, scale: float | str | None = 0.5, seed: int = 1) -> str:
    y = g.op("MatMul", g.op("MatMul", x, _weight(g, N, R, seed)), _weight(g, R, M, seed + 1))
    if scale is None:
        return y
    return g.op("Mul", y, g.const(scale) if isinstance(scale, float) else scale)


def _merged(g: G, *kinds: str, count: int = 1) -> ir.Model:
    before = g.model()
    after, records = run_pass(before, MergeAdapter)
    assert op_types(after) == list(kinds), reasons(records)
    assert applications(records) == count
    shape = [d.dim_value or 3 for d in before.graph.input[0].type.tensor_type.shape.dim]
    assert_rounding(before, after, {"x": random(shape, g.dtype)})
    return after


def _left(g: G, why: str) -> None:
    before = g.model()
    after, records = run_pass(before, MergeAdapter)
    assert applications(records) == 0 and op_types(after) == op_types(ir.from_proto(before))
    told = reasons(records)
    assert why in told and bool(told) == bool(why), told


SCALES: dict[str, Callable[[G, str], str]] = {
    "none": lambda g, y: y,
    "initializer": lambda g, y: g.op("Mul", y, g.const(0.5)),
    "constant": lambda g, y: g.op("Mul", y, g.op("Constant", value=numpy_helper.from_array(np.array(0.5, np.float32)))),
    "on the left": lambda g, y: g.op("Mul", g.const(2.0), y),
    "of one element": lambda g, y: g.op("Mul", y, g.const([-0.25])),
    "quotient": lambda g, y: g.op("Div", y, g.const(4.0)),
    "two": lambda g, y: g.op("Div", g.op("Mul", y, g.const(0.5)), g.const(3.0)),
    "identity": lambda g, y: g.op("Identity", g.op("Mul", y, g.const(0.5))),
}


@settings(max_examples=40, deadline=None)
@given(
    scale=st.sampled_from(sorted(SCALES)),
    swapped=st.booleans(),
    bias=st.booleans(),
    batch=st.sampled_from([(3,), (2, 3), (), (0,)]),
    dtype=st.sampled_from([FLOAT, DOUBLE, FLOAT16]),
    opset=st.sampled_from([11, 13, 17, 21]),
)
def test_property(scale: str, swapped: bool, bias: bool, batch: tuple[int, ...], dtype: int, opset: int) -> None:
    g = G(opset, dtype)
    x = g.input("x", *batch, N)
    if scale == "constant" and dtype != FLOAT:
        scale = "initializer"
    sides = [_base(g, x, bias=bias), SCALES[scale](g, _adapter(g, x, scale=None))]
    g.output(g.op("Add", *(reversed(sides) if swapped else sides)))
    before = g.model()
    after, records = run_pass(before, MergeAdapter)
    assert applications(records) == 1 and op_types(after) == (["MatMul", "Add"] if bias else ["MatMul"])
    assert_rounding(before, after, {"x": random((*batch, N), dtype)})


def test_bias_behind() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", g.op("Add", _base(g, x), _adapter(g, x)), g.const(random((M,), seed=4))))
    _merged(g, "MatMul", "Add")


def test_gemm_with_bias() -> None:
    g = G(17)
    x = g.input("x", "rows", N)
    weight, bias = g.const(random((M, N), seed=1)), g.const(random((M,), seed=2))
    base = g.op("Gemm", x, weight, bias, transB=1, alpha=0.5)
    down = g.op("Gemm", x, g.const(random((R, N), seed=3)), transB=1)
    up = g.op("Gemm", down, g.const(random((M, R), seed=4)), transB=1, alpha=2.0)
    g.output(g.op("Add", base, up))
    after = _merged(g, "Gemm")
    assert [v.name for v in only(after, "Gemm").inputs if v is not None][2] == bias


@pytest.mark.parametrize("nested", [False, True])
def test_several_adapters(nested: bool) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    one, two = _adapter(g, x), _adapter(g, x, scale=-0.25, seed=5)
    base = _base(g, x, bias=nested)
    g.output(g.op("Add", two, g.op("Add", base, one)) if nested else g.op("Add", g.op("Add", base, one), two))
    _merged(g, *(["MatMul", "Add"] if nested else ["MatMul"]), count=2)


def test_one_of_several_adapters_stays() -> None:
    g = G(17)
    x, gate = g.input("x", 3, N), g.input("gate", 3, R)
    inner = g.op("Mul", g.op("MatMul", x, _weight(g, N, R, 9)), gate)
    other = g.op("MatMul", inner, _weight(g, R, M, 10))
    g.output(g.op("Add", g.op("Add", _base(g, x), other), _adapter(g, x)))
    before = g.model()
    after, records = run_pass(before, MergeAdapter)
    # ``other`` is no pair: what it adds is an activation like any other.
    assert applications(records) == 0 and op_types(after) == op_types(ir.from_proto(before))


def test_scales_between_the_factors_and_before_them() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    inner = g.op("MatMul", g.op("Mul", x, g.const(3.0)), _weight(g, N, R, 1))
    inner = g.op("Mul", inner, g.const(random((R,), seed=2)))
    g.output(g.op("Add", _base(g, x), g.op("MatMul", inner, _weight(g, R, M, 3))))
    _merged(g, "MatMul")


def test_both_read_a_scaled_input() -> None:
    g = G(17)
    x = g.op("Mul", g.input("x", 3, N), g.const(3.0))
    g.output(g.op("Add", _base(g, x), _adapter(g, x)))
    _merged(g, "Mul", "MatMul")


def test_dropout_that_does_nothing_before_the_adapter() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x), _adapter(g, g.op("Identity", x))))
    _merged(g, "MatMul")


def test_a_table() -> None:
    g = G(17)
    ids = g.input("x", 4, dtype=TensorProto.INT64)
    base = g.op("Gather", g.const(random((9, M), seed=1)), ids)
    inner = g.op("Gather", g.const(random((9, R), seed=2)), ids)
    g.output(g.op("Add", base, g.op("Mul", g.op("MatMul", inner, _weight(g, R, M, 3)), g.const(0.5))))
    before = g.model()
    after, _ = run_pass(before, MergeAdapter)
    assert op_types(after) == ["Gather"]
    assert_rounding(before, after, {"x": np.array([0, 8, -1, 3])})


def test_a_large_weight_is_computed_when_it_is_saved() -> None:
    g = G(17)
    x = g.input("x", 3, 200)
    down, up = _weight(g, 200, 4, 2), _weight(g, 4, 150, 3)
    g.output(g.op("Add", g.op("MatMul", x, _weight(g, 200, 150, 1)), g.op("MatMul", g.op("MatMul", x, down), up)))
    weight = only(_merged(g, "MatMul"), "MatMul").inputs[1]
    assert weight is not None and isinstance(weight.const_value, ir.LazyTensor)


def test_the_constant_on_the_left() -> None:
    g = G(17)
    x = g.input("x", N, 3)
    base = g.op("MatMul", g.const(random((M, N), seed=1)), x)
    inner = g.op("MatMul", g.const(random((R, N), seed=2)), x)
    g.output(g.op("Add", base, g.op("MatMul", g.const(random((M, R), seed=3)), inner)))
    _merged(g, "MatMul")


# ---- convolutions --------------------------------------------------------------------------------------------------


def _conv(g: G, x: str, inputs: int, outputs: int, kernel: int, seed: int, **options: object) -> str:
    bias = [g.const(random((outputs,), seed=seed + 9))] if options.pop("bias", False) else []
    weight = g.const(random((outputs, inputs, kernel, kernel), seed=seed, scale=0.3))
    return g.op("Conv", x, weight, *bias, **options)


@pytest.mark.parametrize("wide_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"pads": [1] * 4}, {"strides": [2, 2], "pads": [1, 0, 1, 0]}, {"auto_pad": "SAME_UPPER"}]
)
def test_convolutions(options: dict[str, object], wide_first: bool) -> None:
    g = G(17)
    x = g.input("x", 2, N, 7, 7)
    inner = _conv(g, x, N, R, 3 if wide_first else 1, 2, **(options if wide_first else {}))
    branch = _conv(g, inner, R, M, 1 if wide_first else 3, 3, **({} if wide_first else options))
    g.output(g.op("Add", _conv(g, x, N, M, 3, 1, bias=True, **options), g.op("Mul", branch, g.const(0.5))))
    _merged(g, "Conv")


@pytest.mark.parametrize("explicit", ["base", "adapter"])
def test_defaults_that_one_of_them_spells_out(explicit: str) -> None:
    g = G(17)
    x = g.input("x", 2, N, 7, 7)
    told = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1, "kernel_shape": [3, 3]}
    inner = _conv(g, x, N, R, 3, 2, **(told if explicit == "adapter" else {}))
    base = _conv(g, x, N, M, 3, 1, **(told if explicit == "base" else {}))
    g.output(g.op("Add", base, _conv(g, inner, R, M, 1, 3)))
    _merged(g, "Conv")


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ((3, {"pads": [1] * 4}), (1, {})),
        ((1, {}), (3, {"pads": [1] * 4})),
        ((3, {"pads": [1] * 4}), (3, {"pads": [2] * 4, "dilations": [2, 2]})),
    ],
)
def test_convolutions_of_other_windows(
    base: tuple[int, dict[str, object]], adapter: tuple[int, dict[str, object]]
) -> None:
    g = G(17)
    x = g.input("x", 2, N, 7, 7)
    inner = _conv(g, x, N, R, adapter[0], 2, **adapter[1])
    g.output(g.op("Add", _conv(g, x, N, M, base[0], 1, **base[1]), _conv(g, inner, R, M, 1, 3)))
    _left(g, "another kernel, stride or padding")


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_a_quantised_weight() -> None:
    g = G(17)
    name = g.const(np.zeros(1, np.int64))
    g.initializers[-1].CopyFrom(numpy_helper.from_array(np.ones((N, M), np.int8), name))
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x, weight=g.op("DequantizeLinear", name, g.const(0.1))), _adapter(g, x)))
    _left(g, "quantised: merged it would be stored as floats")


def test_a_quantised_adapter() -> None:
    g = G(17)
    name = g.const(np.zeros(1, np.int64))
    g.initializers[-1].CopyFrom(numpy_helper.from_array(np.ones((N, R), np.int8), name))
    x = g.input("x", 3, N)
    inner = g.op("MatMul", x, g.op("DequantizeLinear", name, g.const(0.1)))
    g.output(g.op("Add", _base(g, x), g.op("MatMul", inner, _weight(g, R, M, 3))))
    _left(g, "the adapter is quantised")


def _pruned() -> np.ndarray:
    array = random((N, M))
    array[:2] = 0
    return array


def test_a_pruned_weight() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x, weight=g.const(_pruned())), _adapter(g, x)))
    _left(g, "25% of the weight beside the adapter are zeros")


def test_a_pruned_weight_whose_zeros_the_adapter_keeps() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    down = random((N, R), seed=2)
    down[:2] = 0
    inner = g.op("MatMul", x, g.const(down))
    g.output(g.op("Add", _base(g, x, weight=g.const(_pruned())), g.op("MatMul", inner, _weight(g, R, M, 3))))
    weight = only(_merged(g, "MatMul"), "MatMul").inputs[1]
    assert weight is not None and weight.const_value is not None and not weight.const_value.numpy()[:2].any()


def test_a_weight_that_something_else_reads() -> None:
    g = G(17)
    x, w = g.input("x", 3, N), _weight(g, N, M, 1)
    g.output(g.op("Add", _base(g, x, weight=w), _adapter(g, x)))
    g.output(g.op("Relu", w))
    _left(g, "something else reads the weight")


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_is_read_elsewhere(bias: bool) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    base = _base(g, x, bias=bias)
    g.output(g.op("Add", base, _adapter(g, x)))
    g.output(g.op("Relu", base))
    _left(g, "read elsewhere")


def test_a_branch_that_is_read_elsewhere() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    branch = _adapter(g, x)
    g.output(g.op("Add", _base(g, x), branch))
    g.output(branch)
    _left(g, "")


def test_another_input() -> None:
    g = G(17)
    g.output(g.op("Add", _base(g, g.input("x", 3, N)), _adapter(g, g.input("z", 3, N))))
    _left(g, "another input")


def test_other_axes_of_a_square_input() -> None:
    g = G(17)
    x = g.input("x", N, N)
    base = g.op("Gemm", x, _weight(g, N, M, 1), transA=1)
    g.output(g.op("Add", base, _adapter(g, x)))
    _left(g, "other channels")


def test_fewer_outputs() -> None:
    """An adapter of one output is added to all of them: that is no adapter."""
    g = G(17)
    x = g.input("x", 3, N)
    branch = g.op("MatMul", g.op("MatMul", x, _weight(g, N, R, 1)), _weight(g, R, 1, 2))
    g.output(g.op("Add", _base(g, x), branch))
    _left(g, "other channels")


def test_a_difference() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Sub", _base(g, x), _adapter(g, x)))
    _left(g, "")


@pytest.mark.parametrize("shape", [(M,), (1, 1, 1)])
def test_a_scale_that_is_no_number(shape: tuple[int, ...]) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x), g.op("Mul", _adapter(g, x, scale=None), g.const(random(shape)))))
    _left(g, "")


def test_a_scale_that_is_an_activation() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x), _adapter(g, x, scale=g.input("s"))))
    _left(g, "")


def test_a_scale_that_a_caller_may_override() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x), _adapter(g, x, scale=g.overridable(0.5))))
    _left(g, "")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_scale_that_is_not_finite(value: float) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x), _adapter(g, x, scale=value)))
    _left(g, "not finite")


def test_an_adapter_that_float16_does_not_hold() -> None:
    g = G(17, FLOAT16)
    x = g.input("x", 3, N)
    inner = g.op("MatMul", x, g.const(np.full((N, R), 300.0)))
    g.output(g.op("Add", _base(g, x), g.op("MatMul", inner, g.const(np.full((R, M), 300.0)))))
    _left(g, "may not hold")


def test_a_nonlinearity_in_the_adapter() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    inner = g.op("Relu", g.op("MatMul", x, _weight(g, N, R, 1)))
    g.output(g.op("Add", _base(g, x), g.op("MatMul", inner, _weight(g, R, M, 2))))
    _left(g, "")


def test_a_shift_in_the_adapter() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    inner = g.op("Add", g.op("MatMul", x, _weight(g, N, R, 1)), g.const(random((R,))))
    g.output(g.op("Add", _base(g, x), g.op("MatMul", inner, _weight(g, R, M, 2))))
    _left(g, "a shift stands between")


def test_a_weight_that_a_caller_may_override() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x, weight=g.overridable(random((N, M)))), _adapter(g, x)))
    _left(g, "")


def test_a_residual_is_no_weight() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    branch = g.op("MatMul", g.op("MatMul", x, _weight(g, N, R, 1)), _weight(g, R, N, 2))
    g.output(g.op("Add", x, branch))
    _left(g, "")


def test_a_residual_beside_both_stays() -> None:
    g = G(17)
    x = g.input("x", 3, M)
    base = g.op("MatMul", x, _weight(g, M, M, 1))
    branch = g.op("MatMul", g.op("MatMul", x, _weight(g, M, R, 2)), _weight(g, R, M, 3))
    g.output(g.op("Add", x, g.op("Add", base, branch)))
    _merged(g, "MatMul", "Add")


def test_two_pairs_are_no_adapter_of_each_other() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _adapter(g, x), _adapter(g, x, seed=5)))
    before = g.model()
    _, records = run_pass(before, MergeAdapter)
    assert applications(records) == 0


# ---- bodies --------------------------------------------------------------------------------------------------------


def test_in_a_body() -> None:
    g = G(17)
    x = g.input("x", 3, N)
    g.output(g.op("Add", _base(g, x, bias=True), _adapter(g, x)))
    before = in_body(g.model())
    after, records = run_pass(before, MergeAdapter)
    assert applications(records) == 1 and op_types(after).count("MatMul") == 1
    assert_rounding(before, after, {"x": random((3, N)), "condition": np.array(True)})


@pytest.mark.parametrize("inside", ["base", "adapter", "sum"])
def test_parts_outside_a_loop_stay_there(inside: str) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    parts: dict[str, str] = {}
    moved: list[onnx.NodeProto] = []
    for name, make in (("base", _base), ("adapter", _adapter)):
        before = len(g.nodes)
        parts[name] = make(g, x)
        if name == inside:
            moved, g.nodes = g.nodes[before:], g.nodes[:before]
    nodes = [
        *moved,
        helper.make_node("Add", [parts["base"], parts["adapter"]], ["y"], name="sum"),
        helper.make_node("Identity", ["go"], ["going"]),
    ]
    body = helper.make_graph(
        nodes,
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
    g.nodes.append(helper.make_node("Loop", [g.const(np.array(2, np.int64)), ""], ["all"], body=body))
    g.output("all", 2, 3, M)
    _left(g, "outside the body")


def test_matmul_nbits() -> None:
    g = G(17)
    x = g.input("x", 3, 32)
    codes = g.const(np.zeros(1, np.int64))
    g.initializers[-1].CopyFrom(numpy_helper.from_array(np.full((M, 1, 16), 0x99, np.uint8), codes))
    base = g.op(
        "MatMulNBits", x, codes, g.const(np.ones((M, 1))), K=32, N=M, bits=4, block_size=32, domain="com.microsoft"
    )
    g.declare(base, 3, M)
    inner = g.op("MatMul", x, _weight(g, 32, R, 1))
    g.output(g.op("Add", base, g.op("MatMul", inner, _weight(g, R, M, 2))), 3, M)
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers, value_info=g.infos)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    before = helper.make_model(graph, opset_imports=imports, ir_version=10)
    after, records = run_pass(before, MergeAdapter)
    assert applications(records) == 0 and "quantised" in reasons(records)
    assert run_ort(after, {"x": random((3, 32))})[0].shape == (3, M)
