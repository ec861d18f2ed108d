"""hoist-reshape: what stands between two products and keeps the channels goes before or behind both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import graphs
from graphopt.passes.lowrank.hoist_reshape import HoistReshape
from graphopt.passes.lowrank.merge_factors import MergeFactors
from graphopt.rewrite.manager import PassRecord
from graphopt.shapes import infer_shapes
from graphopt.sites import Pair, pair_at
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, random, reasons

N, R, M, B, T = 10, 3, 8, 2, 5
"""Inputs, rank, outputs, batch and length."""


def hoisted(before: onnx.ModelProto, *, target: str = "onnxruntime") -> tuple[ir.Model, list[PassRecord]]:
    return run_pass(before, HoistReshape, target=target)


def pairs(model: ir.Model) -> int:
    made = model.clone()
    infer_shapes(made)
    return sum(isinstance(pair_at(node), Pair) for node in graphs.all_nodes(made))


def weight(g: G, inputs: int, outputs: int, *, flip: bool = False, seed: int = 0) -> str:
    array = random((outputs, inputs) if flip else (inputs, outputs), g.dtype, seed=seed + inputs, scale=inputs**-0.5)
    return g.const(array)


def down(g: G, x: str, inputs: int = N) -> str:
    return g.op("MatMul", x, weight(g, inputs, R))


def up(g: G, x: str, outputs: int = M) -> str:
    return g.op("MatMul", x, weight(g, R, outputs))


def gemm(g: G, x: str, inputs: int, outputs: int) -> str:
    bias = g.const(random((outputs,), g.dtype, seed=7))
    return g.op("Gemm", x, weight(g, inputs, outputs, flip=True), bias, transB=1)


def finish(g: G, *names: str) -> onnx.ModelProto:
    for name in names:
        g.output(name)
    return g.model()


def found(before: onnx.ModelProto, ops: Sequence[str], feeds: Sequence[Sequence[int]] = ((B, T, N),)) -> ir.Model:
    """One pair where there was none, with these nodes, and the same numbers."""
    assert pairs(ir.from_proto(before)) == 0
    after, records = hoisted(before)
    assert applications(records) == 1, reasons(records)
    assert pairs(after) == 1
    assert op_types(after) == list(ops)
    dtype = before.graph.input[0].type.tensor_type.elem_type
    assert_rounding(before, after, *({"x": random(shape, dtype)} for shape in feeds))
    return after


def refused(before: onnx.ModelProto, says: str) -> None:
    after, records = hoisted(before)
    assert not applications(records)
    assert op_types(after) == [node.op_type for node in before.graph.node if node.op_type != "Constant"]
    assert says in reasons(records), reasons(records)
    infer_shapes(after)
    for node in after.graph:
        for value in node.outputs:
            assert all(use.node.graph is not None for use in value.uses()), "a node that was not used reads it"


# ---- Reshape ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, DOUBLE])
@pytest.mark.parametrize("opset", [7, 13, 14, 17, 24])
def test_flattened_for_gemm(opset: int, dtype: int) -> None:
    g = G(opset, dtype)
    t = g.op("Reshape", down(g, g.input("x", B, T, N)), g.ints(-1, R))
    found(finish(g, gemm(g, t, R, M)), ["Reshape", "MatMul", "Gemm"])


@pytest.mark.parametrize("target", [(-1, R), (B * T, R), (B, T, 1, R), (0, 0, R), (0, -1, R), (1, B, 1, T, R)])
def test_any_target_that_keeps_the_channels(target: tuple[int, ...]) -> None:
    g = G(17)
    found(
        finish(g, up(g, g.op("Reshape", down(g, g.input("x", B, T, N)), g.ints(*target)))), ["Reshape"] + ["MatMul"] * 2
    )


def test_unknown_axes() -> None:
    g = G(17)
    t = g.op("Reshape", down(g, g.input("x", "batch", "length", N)), g.ints(-1, R))
    found(finish(g, gemm(g, t, R, M)), ["Reshape", "MatMul", "Gemm"], [(B, T, N), (1, 1, N), (3, 2, N)])


def test_a_shape_that_is_computed() -> None:
    g = G(17)
    x = g.input("x", "batch", "length", N)
    sizes = [g.op("Gather", g.op("Shape", x), g.ints(axis)) for axis in (1, 0)]
    shape = g.op("Concat", *sizes, g.ints(R), axis=0)
    before = finish(g, up(g, g.op("Reshape", down(g, x), shape)))
    after = found(before, ["Shape", "Gather", "Shape", "Gather", "Concat", "Reshape", "MatMul", "MatMul"])
    assert_rounding(before, after, {"x": random((4, 1, N))})


def test_behind_where_gemm_comes_first() -> None:
    """Gemm cannot read what has three axes; MatMul can read what has two."""
    g = G(17)
    t = g.op("Reshape", gemm(g, g.input("x", B * T, N), N, R), g.ints(B, T, R))
    y = g.op("Add", up(g, t), g.const(random((M,))))
    found(finish(g, y), ["Gemm", "MatMul", "Reshape", "Add"], [(B * T, N)])


def test_neither_before_nor_behind() -> None:
    g = G(17)
    t = g.op("Reshape", gemm(g, g.input("x", B * T, N), N, R), g.ints(B, T, R))
    t = g.op("Reshape", g.op("Mul", t, g.const(2.0)), g.ints(B * T, R))
    before = finish(g, gemm(g, t, R, M))
    after, _ = hoisted(before)  # two Reshapes: another pass makes one of them
    assert_rounding(before, after, {"x": random((B * T, N))})


def test_steps_on_either_side() -> None:
    g = G(17)
    t = g.op("Add", down(g, g.input("x", B, T, N)), g.const(random((R,))))
    t = g.op("Sub", g.op("Reshape", g.op("Mul", t, g.const(random((R,), seed=1))), g.ints(-1, R)), g.const(0.5))
    y = gemm(g, g.op("Div", t, g.const(random((1,), seed=2))), R, M)
    found(finish(g, y), ["Reshape", "MatMul", "Add", "Mul", "Sub", "Div", "Gemm"])


def test_in_a_body() -> None:
    g = G(17)
    before = in_body(finish(g, up(g, g.op("Reshape", down(g, g.input("x", B, T, N)), g.ints(-1, R)))))
    after, records = hoisted(before)
    assert applications(records) == 1
    feed = {"x": random((B, T, N)), "condition": np.array(True)}
    np.testing.assert_allclose(run_ort(after, feed)[0], run_ort(before, feed)[0], rtol=0, atol=1e-5)


def test_what_merge_makes_of_it() -> None:
    g = G(17)
    before = finish(g, gemm(g, g.op("Reshape", down(g, g.input("x", B, T, N)), g.ints(-1, R)), R, M))
    after, _ = run_pass(before, HoistReshape, MergeFactors)
    assert op_types(after) == ["Reshape", "Gemm"]
    assert_rounding(before, after, {"x": random((B, T, N))})


def test_three_products_do_not_go_round() -> None:
    g = G(17)
    t = g.op("Reshape", gemm(g, g.input("x", B * T, N), N, R), g.ints(B, T, R))
    y = g.op("MatMul", up(g, t, R), weight(g, R, M, seed=3))
    before = finish(g, y)
    after, records = hoisted(before)
    assert 1 <= applications(records) <= 3
    assert_rounding(before, after, {"x": random((B * T, N))})


# ---- Transpose -------------------------------------------------------------------------------------------------------


def test_transpose_before_where_the_input_is_narrow() -> None:
    g = G(17)
    found(finish(g, up(g, g.op("Transpose", down(g, g.input("x", B, T, 4), 4), perm=[1, 0, 2]))),
          ["Transpose", "MatMul", "MatMul"], [(B, T, 4)])  # fmt: skip


def test_transpose_behind_where_the_output_is_narrow() -> None:
    g = G(17)
    t = g.op("Transpose", down(g, g.input("x", B, T, N)), perm=[1, 0, 2])
    found(
        finish(g, g.op("Relu", up(g, g.op("Mul", t, g.const(random((R,)))), 4))),
        ["MatMul", "Mul", "MatMul", "Transpose", "Relu"],
    )


def test_a_transpose_that_would_cost_more_than_a_pair_saves() -> None:
    """Of rank 2 there is nothing to be gained: the product of the weights is larger, and so is what is transposed."""
    g = G(17)
    x = g.input("x", 64, 64, 512)
    t = g.op("MatMul", x, g.const(random((512, 2))))
    y = g.op("MatMul", g.op("Transpose", t, perm=[1, 0, 2]), g.const(random((2, 512))))
    refused(finish(g, y), "to transpose 512 channels instead of 2")


@pytest.mark.parametrize("perm", [[0, 2, 1], [2, 1, 0], None])
def test_a_transpose_that_moves_the_channels(perm: list[int] | None) -> None:
    g = G(17)
    attributes = {} if perm is None else {"perm": perm}
    t = g.op("Transpose", down(g, g.input("x", R, R, N)), **attributes)
    refused(finish(g, up(g, t)), "moves the channels")


# ---- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(-1, 1, R), (R, B * T), (-1, R * T)])
def test_a_reshape_of_other_channels(target: tuple[int, ...]) -> None:
    g = G(17)
    inputs = math.prod((B, T, R)) // math.prod(d for d in target[:-1] if d > 0) if target[-1] == -1 else target[-1]
    x = g.input("x", B, T, N)
    y = g.op("MatMul", g.op("Reshape", down(g, x), g.ints(*target)), weight(g, inputs, M))
    before = finish(g, y)
    after, records = hoisted(before)
    kept = target[-1] == R
    assert applications(records) == (1 if kept else 0)
    assert_rounding(before, after, {"x": random((B, T, N))})


def test_a_reshape_to_the_rest() -> None:
    """-1 at the end may be the channels, and they are known to be; but no constant says so."""
    g = G(17)
    refused(finish(g, up(g, g.op("Reshape", down(g, g.input("x", B, T, N)), g.ints(B * T, -1)))), "may not keep")


def test_a_zero_that_copies_the_channels_to_another_axis() -> None:
    g = G(17)
    x = g.input("x", R, 1, N)
    t = g.op("Reshape", down(g, x), g.ints(1, 1, 0, R))
    refused(finish(g, up(g, t)), "may copy the channels")


def test_a_shape_that_an_input_gives() -> None:
    g = G(17)
    t = g.op("Reshape", down(g, g.input("x", B, T, N)), g.input("shape", 2, dtype=7))
    y = up(g, t)
    g.output(y, None, M)
    refused(g.model(), "the shape of the Reshape, or of what it reads, is not known")


@pytest.mark.parametrize("which", ["narrow", "reshaped"])
@pytest.mark.parametrize("how", ["read", "returned"])
def test_a_value_between_that_something_else_has(which: str, how: str) -> None:
    g = G(17)
    t = down(g, g.input("x", B, T, N))
    flat = g.op("Reshape", t, g.ints(-1, R))
    value = t if which == "narrow" else flat
    y = up(g, flat)
    refused(finish(g, y, value if how == "returned" else g.op("Relu", value)), "is read elsewhere")


@pytest.mark.parametrize("op", ["Relu", "Softmax", "LayerNormalization"])
def test_something_else_between(op: str) -> None:
    g = G(17)
    more = [g.const(np.ones(R))] if op == "LayerNormalization" else []
    t = g.op(op, down(g, g.input("x", B, T, N)), *more)
    before = finish(g, up(g, g.op("Reshape", t, g.ints(-1, R))))
    assert not applications(hoisted(before)[1])


@pytest.mark.parametrize("shape", [(B, T, R), (T, R), (T, 1)])
def test_a_step_that_differs_by_position(shape: tuple[int, ...]) -> None:
    g = G(17)
    t = g.op("Add", down(g, g.input("x", B, T, N)), g.const(random(shape)))
    before = finish(g, up(g, g.op("Reshape", t, g.ints(-1, R))))
    assert not applications(hoisted(before)[1])


def test_a_weight_that_a_caller_may_replace() -> None:
    g = G(17)
    t = g.op("MatMul", g.input("x", B, T, N), g.overridable(random((N, R))))
    before = finish(g, up(g, g.op("Reshape", t, g.ints(-1, R))))
    assert not applications(hoisted(before)[1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_the_same_numbers(data: st.DataObject) -> None:
    draw = data.draw
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4), "sizes")
    n, r, m = (draw(st.integers(1, 6)) for _ in range(3))
    g = G(draw(st.sampled_from([13, 17, 21])))
    t = g.op("MatMul", g.input("x", *sizes, n), weight(g, n, r))
    if draw(st.booleans(), "transpose"):
        perm = draw(st.permutations(range(len(sizes))))
        t = g.op("Transpose", t, perm=[*perm, len(sizes)])
    else:
        total = math.prod(sizes)
        ways = [(total,), (1, total), (total, 1, 1), (*sizes[::-1],)] + ([(-1,), (1, -1)] if total else [])
        t = g.op("Reshape", t, g.ints(*draw(st.sampled_from(ways)), r), **({"allowzero": 1} if g.opset >= 14 else {}))
    if g.opset < 14 and 0 in sizes:
        return  # a zero would copy an axis that is not there
    before = finish(g, g.op("MatMul", t, weight(g, r, m)))
    after, _ = hoisted(before)
    assert_rounding(before, after, {"x": random((*sizes, n))})
