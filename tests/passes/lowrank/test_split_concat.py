"""split-concat: what is joined only to be multiplied is multiplied in parts, and the products are added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import graphopt
from graphopt.passes.lowrank.pivot import Pivot
from graphopt.passes.lowrank.split_concat import SplitConcat
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, random, reasons

R, N, M, B = 6, 10, 4, 3
"""Size of the first part and of both, outputs of the products, and rows."""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target on which a node costs what it reads and writes, and an Add nothing: small models gain there too."""
    path = tmp_path_factory.mktemp("target") / "memory.yaml"
    header = "name: memory\nbackend: onnxruntime\nversion: '1'\nopset: 24\nir_version: 12\n"
    path.write_text(f"{header}costs: {{node: 0.0, gigaflops: 1.0e+9, gigabytes: 0.001, free: [Add]}}\n")
    return str(path)


def weight(g: G, *shape: int, seed: int = 1) -> str:
    return g.const(random(shape, g.dtype, seed=seed))


def joined(g: G, prefix: str = "x", *, sizes: Sequence[int] = (R, N - R), axis: int = 1, shape: Any = (B, N)) -> str:
    """Inputs of the sizes, joined."""
    names = []
    for i, size in enumerate(sizes):
        dims = list(shape)
        dims[axis] = size
        names.append(g.input(f"{prefix}{i}", *dims))
    return g.op("Concat", *names, axis=axis)


def finish(g: G, *names: str) -> onnx.ModelProto:
    for name in names:
        g.output(name)
    return g.model()


def feeds(model: onnx.ModelProto, *, seed: int = 0) -> dict[str, np.ndarray]:
    made = {}
    for i, value in enumerate(model.graph.input):
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else B for d in tensor.shape.dim]
        made[value.name] = np.asarray(random(shape, tensor.elem_type, seed=seed + i))
    return made


def taken(before: onnx.ModelProto, target: str, count: int = 1) -> ir.Model:
    """The result, which has no Concat any more and computes the same."""
    after, records = run_pass(before, SplitConcat, target=target)
    assert applications(records) == count, reasons(records)
    assert "Concat" not in op_types(after)
    onnx.checker.check_model(ir.to_proto(after))  # ONNX Runtime does not mind the order of nodes
    assert_rounding(before, after, feeds(before), feeds(before, seed=9))
    return after


def refused(before: onnx.ModelProto, target: str, reason: str | None) -> None:
    after, records = run_pass(before, SplitConcat, target=target)
    assert applications(records) == 0
    assert op_types(after) == op_types(run_pass(before, SplitConcat, limit=0)[0])
    if reason is None:
        assert reasons(records) == ""
    else:
        assert reason in reasons(records)


# ---- what is taken apart ---------------------------------------------------------------------------------------------


def test_a_product(memory: str) -> None:
    g = G(17)
    after = taken(finish(g, g.op("MatMul", joined(g), weight(g, N, M))), memory)
    assert op_types(after) == ["MatMul", "MatMul", "Add"]
    assert sorted(v.shape.numpy() for v in after.graph.initializers.values() if v.shape) == [(N - R, M), (R, M)]


@pytest.mark.parametrize("opset", [8, 11, 13, 18, 21, 24])
def test_gate_and_up(opset: int, memory: str) -> None:
    """Both have the pivots of one order: silu(gate) * up, and the product behind."""
    g = G(opset)
    gate, up = joined(g, "g"), joined(g, "u")
    inner = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    after = taken(finish(g, g.op("MatMul", inner, weight(g, N, M))), memory)
    assert op_types(after) == ["Sigmoid", "Mul", "Mul"] * 2 + ["MatMul", "MatMul", "Add"]


def test_the_bias_of_a_pivot_layer(memory: str) -> None:
    g = G(17)
    inner = g.op("Relu", g.op("Add", joined(g), weight(g, N, seed=4)))
    before = finish(g, g.op("Add", g.op("MatMul", inner, weight(g, N, M)), weight(g, M, seed=5)))
    after = taken(before, memory)
    assert op_types(after) == ["Add", "Relu"] * 2 + ["MatMul", "MatMul", "Add", "Add"]


@pytest.mark.parametrize("flips", [{}, {"transB": 1}, {"transA": 1}, {"alpha": 0.5}, {"transA": 1, "transB": 1}])
@pytest.mark.parametrize("bias", [(), (M,), (1, M), (1,)])
def test_gemm(flips: dict[str, Any], bias: tuple[int, ...], memory: str) -> None:
    """The second part adds the first: no Add, and the bias once."""
    g = G(17)
    turned = "transA" in flips
    x = joined(g, axis=0 if turned else 1, shape=(N, B) if turned else (B, N))
    w = weight(g, *((M, N) if "transB" in flips else (N, M)))
    extra = [weight(g, *bias, seed=5)] if bias else []
    after = taken(finish(g, g.op("Gemm", g.op("Relu", x), w, *extra, **flips)), memory)
    assert op_types(after) == ["Relu", "Relu", "Gemm", "Gemm"]
    first, second = (node for node in after.graph if node.op_type == "Gemm")
    assert len(first.inputs) == 2 + bool(bias) and second.inputs[2] is first.outputs[0]


@pytest.mark.parametrize(("kernel", "pads"), [((1, 1), (0, 0, 0, 0)), ((3, 3), (1, 1, 1, 1))])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", [1, -3])
def test_conv(kernel: tuple[int, ...], pads: tuple[int, ...], bias: bool, axis: int, memory: str) -> None:
    g = G(17)
    extra = [weight(g, M, seed=5)] if bias else []
    x = g.op("Relu", joined(g, axis=axis, shape=(2, N, 5, 5)))
    y = g.op("Conv", x, weight(g, M, N, *kernel), *extra, pads=list(pads), kernel_shape=list(kernel))
    after = taken(finish(g, y), memory)
    assert op_types(after) == ["Relu", "Relu", "Conv", "Conv", "Add"]
    assert [len(node.inputs) for node in after.graph if node.op_type == "Conv"] == [2 + bias, 2]


def test_from_the_left(memory: str) -> None:
    g = G(17)
    x = joined(g, axis=1, shape=(2, N, B))
    after = taken(finish(g, g.op("MatMul", weight(g, M, N), x)), memory)
    assert op_types(after) == ["MatMul", "MatMul", "Add"]


def test_fused(memory: str) -> None:
    g = G(17)
    y = g.op("FusedMatMul", joined(g), weight(g, M, N), domain="com.microsoft", transB=1, alpha=2.0)
    g.outputs.append(helper.make_tensor_value_info(y, FLOAT, [B, M]))
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    before = helper.make_model(graph, opset_imports=imports, ir_version=10)
    after, records = run_pass(before, SplitConcat, target=memory)
    assert applications(records) == 1 and op_types(after) == ["MatMul", "MatMul", "Add"]
    np.testing.assert_allclose(
        run_ort(before, feeds(before))[0], run_ort(after, feeds(before))[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("axis", [2, -1])
def test_either_way_to_count_the_axis(axis: int, memory: str) -> None:
    g = G(17)
    taken(finish(g, g.op("MatMul", joined(g, axis=axis, shape=(2, B, N)), weight(g, N, M))), memory)


def test_three_parts(memory: str) -> None:
    g = G(17)
    after = taken(finish(g, g.op("MatMul", joined(g, sizes=(5, 1, 4)), weight(g, N, M))), memory)
    assert op_types(after) == ["MatMul", "MatMul", "Add", "MatMul", "Add"]


def test_several_products(memory: str) -> None:
    """They are made before the Concat that all read, so before whatever reads the first of them."""
    g = G(17)
    x = g.op("Relu", joined(g))
    first = g.op("MatMul", x, weight(g, N, M))
    scaled = g.op("Tanh", first)
    second = g.op("MatMul", x, weight(g, N, M, seed=2))
    after = taken(finish(g, g.op("Mul", scaled, second), first), memory)
    assert op_types(after).count("MatMul") == 4


def test_the_product_found_first_is_not_the_first(memory: str) -> None:
    g = G(17)
    x = joined(g)
    first = g.op("Tanh", g.op("MatMul", g.op("Relu", x), weight(g, N, M)))
    taken(finish(g, g.op("Mul", g.op("MatMul", x, weight(g, N, M, seed=2)), first)), memory)


def test_parts_that_are_made_behind_the_first_concat(memory: str) -> None:
    g = G(17)
    first = joined(g, "a")
    second = g.op("Concat", g.op("Neg", g.input("b0", B, R)), g.op("Neg", g.input("b1", B, N - R)), axis=-1)
    taken(finish(g, g.op("MatMul", g.op("Mul", first, second), weight(g, N, M))), memory)


@pytest.mark.parametrize("shape", [(N,), (1, N), (B, N), (1,), (), (B, 1)])
def test_constants_along_the_axis_and_others(shape: tuple[int, ...], memory: str) -> None:
    g = G(17)
    taken(finish(g, g.op("MatMul", g.op("Mul", joined(g), weight(g, *shape)), weight(g, N, M))), memory)


def test_what_is_computed_and_broadcasts(memory: str) -> None:
    """Behind the Concat, as here, or before it."""
    g = G(17)
    x = joined(g)
    scaled = g.op("Mul", x, g.op("Sqrt", g.op("Abs", g.input("scale", B, 1))))
    taken(finish(g, g.op("MatMul", scaled, weight(g, N, M))), memory)
    product = g.op("MatMul", x, weight(g, N, M, seed=2))
    refused(finish(g, product), memory, "several products read")


def test_more_axes_beside(memory: str) -> None:
    g = G(17)
    taken(finish(g, g.op("MatMul", g.op("Add", joined(g), weight(g, 2, 1, N)), weight(g, N, M))), memory)


@pytest.mark.parametrize("dtype", [FLOAT16, DOUBLE])
def test_other_types(dtype: int, memory: str) -> None:
    g = G(17, dtype)
    after = taken(finish(g, g.op("MatMul", g.op("Relu", joined(g)), weight(g, N, M))), memory)
    assert {v.dtype for v in after.graph.initializers.values()} == {ir.DataType(dtype)}


def test_a_cast_between(memory: str) -> None:
    g = G(17, FLOAT16)
    x = g.op("Cast", joined(g), to=FLOAT)
    y = g.op("MatMul", x, g.const(random((N, M)), FLOAT))
    g.output(y, B, M, dtype=FLOAT)
    taken(g.model(), memory)


def test_a_weight_behind_a_transpose(memory: str) -> None:
    g = G(17)
    w = g.op("Transpose", weight(g, M, N), perm=[1, 0])
    after = taken(finish(g, g.op("MatMul", joined(g), w)), memory)
    assert op_types(after) == ["MatMul", "MatMul", "Add"]


def test_in_a_body(memory: str) -> None:
    g = G(17)
    before = in_body(finish(g, g.op("Neg", g.op("MatMul", g.op("Relu", joined(g)), weight(g, N, M)))))
    after, records = run_pass(before, SplitConcat, target=memory)
    assert applications(records) == 1 and "Concat" not in op_types(after)
    parts = {"x0": random((B, R)), "x1": random((B, N - R), seed=1)}
    feed = parts | {"condition": np.array(True)}
    np.testing.assert_allclose(run_ort(before, feed)[0], run_ort(after, feed)[0], rtol=1e-5, atol=1e-5)


# ---- what is left alone ----------------------------------------------------------------------------------------------


def test_a_second_reader(memory: str) -> None:
    g = G(17)
    x = joined(g)
    refused(finish(g, g.op("MatMul", x, weight(g, N, M)), g.op("ReduceSum", x)), memory, "ReduceSum reads it")


def test_a_second_reader_of_what_is_between(memory: str) -> None:
    g = G(17)
    x = g.op("Relu", joined(g))
    refused(finish(g, g.op("MatMul", x, weight(g, N, M)), g.op("Transpose", x)), memory, "Transpose reads it")


@pytest.mark.parametrize("between", [False, True])
def test_a_graph_output(between: bool, memory: str) -> None:
    g = G(17)
    x = joined(g)
    y = g.op("Relu", x)
    refused(finish(g, g.op("MatMul", y, weight(g, N, M)), y if between else x), memory, "is returned")


def test_a_reader_in_a_body(memory: str) -> None:
    g = G(17)
    x = joined(g)
    y = g.op("MatMul", x, weight(g, N, M))
    inner = helper.make_node("Neg", [x], ["inner"])
    body = [
        helper.make_graph([inner], name, [], [helper.make_tensor_value_info("inner", FLOAT, [B, N])])
        for name in ("then", "else")
    ]
    g.input("condition", dtype=TensorProto.BOOL)
    g.nodes.append(helper.make_node("If", ["condition"], ["z"], then_branch=body[0], else_branch=body[1]))
    before = finish(g, y, "z")
    _, records = run_pass(before, SplitConcat, target=memory)
    assert applications(records) == 0 and "in a body" in reasons(records)


def test_parts_of_other_sizes(memory: str) -> None:
    g = G(17)
    x = g.op("Mul", joined(g, "a"), joined(g, "b", sizes=(N - R, R)))
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, "one Concat joins")


def test_another_axis_joined(memory: str) -> None:
    g = G(17)
    x = g.op("Mul", joined(g, "a", shape=(N, N)), joined(g, "b", axis=0, shape=(N, N)))
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, "joins another axis")


def test_rows_that_are_joined(memory: str) -> None:
    """As long as the channels, and no channels."""
    g = G(17)
    x = joined(g, axis=0, shape=(N, N))
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, "sums over another axis")
    g = G(17)
    x = joined(g, axis=-1, shape=(2, N, N, N))
    refused(finish(g, g.op("Conv", x, weight(g, M, N, 1, 1))), memory, "sums over another axis")


def test_something_else_beside_it(memory: str) -> None:
    g = G(17)
    x = g.op("Add", joined(g), g.input("residual", B, N))
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, "an input is no Concat")


@pytest.mark.parametrize(
    "between",
    [("Softmax", {"axis": -1}), ("LogSoftmax", {"axis": 1}), ("LpNormalization", {}), ("Softmax", {"axis": 0})],
)
def test_operators_that_mix(between: tuple[str, dict[str, int]], memory: str) -> None:
    g = G(17)
    x = g.op("Relu", joined(g))
    mixed = g.op(between[0], x, **between[1])
    refused(finish(g, g.op("MatMul", mixed, weight(g, N, M)), g.op("MatMul", x, weight(g, N, M, seed=2))),
            memory, f"{between[0]} reads it")  # fmt: skip


def test_a_norm(memory: str) -> None:
    g = G(17)
    x = joined(g)
    normed = g.op("LayerNormalization", x, weight(g, N), weight(g, N))
    refused(finish(g, g.op("MatMul", normed, weight(g, N, M)), g.op("MatMul", x, weight(g, N, M))), memory, "Layer")


def test_nothing_is_said_where_no_product_is_near(memory: str) -> None:
    g = G(17)
    refused(finish(g, g.op("Softmax", g.op("Relu", joined(g)))), memory, None)


@pytest.mark.parametrize("sizes", [(0, N), (N, 0), (N,)])
def test_empty_and_single_parts(sizes: tuple[int, ...], memory: str) -> None:
    g = G(17)
    refused(finish(g, g.op("MatMul", joined(g, sizes=sizes), weight(g, N, M))), memory, "part")


def test_integers_are_no_candidates(memory: str) -> None:
    g = G(17)
    g.initializers.append(onnx.numpy_helper.from_array(np.ones((N, M), np.int32), "integers"))
    x = g.op(
        "Concat", g.input("a", B, R, dtype=TensorProto.INT32), g.input("b", B, N - R, dtype=TensorProto.INT32), axis=1
    )
    y = g.op("MatMul", x, "integers")
    g.output(y, B, M, dtype=TensorProto.INT32)
    refused(g.model(), memory, None)


def test_an_operator_whose_shape_onnx_does_not_know(memory: str) -> None:
    g = G(17)
    g.nodes.append(helper.make_node("QuickGelu", [joined(g)], ["gelu"], domain="com.microsoft"))
    y = g.op("MatMul", "gelu", weight(g, N, M))
    g.outputs.append(helper.make_tensor_value_info(y, FLOAT, [B, M]))
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    before = helper.make_model(graph, opset_imports=imports, ir_version=10)
    refused(before, memory, "is not of the size of the joined parts")


def test_unknown_sizes(memory: str) -> None:
    g = G(17)
    x = g.op("Concat", g.input("a", B, "p"), g.input("b", B, "q"), axis=1)
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, "the sizes of the parts are not known")


def test_a_shared_weight(memory: str) -> None:
    g = G(17)
    w = weight(g, N, M)
    y, z = g.op("MatMul", joined(g), w), g.op("MatMul", g.input("other", B, N), w)
    refused(finish(g, y, z), memory, "something else reads it too")


def test_a_weight_that_both_products_read(memory: str) -> None:
    g = G(17)
    x, w = joined(g), weight(g, N, M)
    refused(finish(g, g.op("MatMul", x, w), g.op("MatMul", g.op("Relu", x), w)), memory, "something else reads it too")


def test_a_weight_that_a_caller_may_replace(memory: str) -> None:
    g = G(17)
    x = joined(g)
    refused(finish(g, g.op("MatMul", x, g.overridable(random((N, M))))), memory, "both operands are activations")


def test_a_quantised_weight(memory: str) -> None:
    g = G(17)
    array = (np.arange(N * M).reshape(N, M) - 20).astype(np.int8)
    g.initializers.append(onnx.numpy_helper.from_array(array, "codes"))
    w = g.op("DequantizeLinear", "codes", g.const(0.1))
    refused(finish(g, g.op("MatMul", joined(g), w)), memory, "quantised")


def test_beta_and_a_computed_bias(memory: str) -> None:
    g = G(17)
    y = g.op("Gemm", joined(g), weight(g, N, M), weight(g, M), beta=2.0)
    refused(finish(g, y), memory, "beta scales the bias")
    g = G(17)
    refused(finish(g, g.op("Gemm", joined(g), weight(g, N, M), g.input("c", B, M))), memory, "no constant vector")


def test_groups(memory: str) -> None:
    g = G(17)
    y = g.op("Conv", joined(g, shape=(2, N, 5, 5)), weight(g, M, N // 2, 1, 1), group=2)
    refused(finish(g, y), memory, "groups")


def test_two_activations(memory: str) -> None:
    g = G(17)
    refused(finish(g, g.op("MatMul", joined(g), g.input("other", N, M))), memory, "both operands are activations")


def test_several_products_behind_several_concats(memory: str) -> None:
    """The parts of one may follow from the product behind the other: that is not looked for."""
    g = G(17)
    a = joined(g, "a")
    first = g.op("MatMul", a, weight(g, N, N))
    later = g.op("Concat", g.op("Slice", first, g.ints(0), g.ints(R), g.ints(1)), g.input("late", B, N - R), axis=1)
    before = finish(g, g.op("MatMul", g.op("Mul", a, later), weight(g, N, M, seed=2)), first)
    refused(before, memory, "several products read")


def test_old_models(memory: str) -> None:
    g = G(7)
    refused(finish(g, g.op("MatMul", joined(g), weight(g, N, M))), memory, None)


def test_too_many_nodes(memory: str) -> None:
    g = G(17)
    x = joined(g)
    for _ in range(70):
        x = g.op("Relu", x)
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, None)


def test_a_wrong_declaration_is_not_believed(memory: str) -> None:
    g = G(17)
    x = g.op("Concat", g.input("a", B, "p"), g.input("b", B, "q"), axis=1)
    g.declare(x, B, N)
    refused(finish(g, g.op("MatMul", x, weight(g, N, M))), memory, "not known")


# ---- many graphs -----------------------------------------------------------------------------------------------------

_SIMPLE = ("Relu", "Tanh", "Sigmoid", "Neg", "Abs")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_chains(data: st.DataObject, memory: str) -> None:
    """Whatever is between: it is split and computes the same, or it is as it was."""
    g = G(17)
    values = [joined(g, "a"), joined(g, "b")]
    for number in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from((*_SIMPLE, "Add", "Mul", "constant", "Softmax")))
        x = data.draw(st.sampled_from(values))
        if kind in ("Add", "Mul"):
            values.append(g.op(kind, x, data.draw(st.sampled_from(values))))
        elif kind == "constant":
            values.append(g.op("Mul", x, weight(g, N, seed=number)))
        else:
            values.append(g.op(kind, x))
    sites = data.draw(st.integers(1, 2))
    results = [g.op("MatMul", data.draw(st.sampled_from(values)), weight(g, N, M, seed=20 + i)) for i in range(sites)]
    before = finish(g, *results)
    after, _ = run_pass(before, SplitConcat, target=memory)
    assert_rounding(before, after, feeds(before))


# ---- where it is worth it --------------------------------------------------------------------------------------------


def swiglu(rows: int, inner: int, outer: int) -> onnx.ModelProto:
    g = G(17, FLOAT16)
    sizes = (inner // 2, inner // 2)
    gate, up = joined(g, "g", sizes=sizes, shape=(rows, inner)), joined(g, "u", sizes=sizes, shape=(rows, inner))
    x = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return finish(g, g.op("MatMul", x, g.const(np.zeros((inner, outer)))))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("rows", "inner", "outer", "wanted"),
    [
        (4096, 2048, 512, True),  # wide values become narrow
        (4096, 512, 2048, False),  # narrow ones become wide: the Add moves more than the Concats did
        (1, 2048, 512, False),  # one row is moved in no time, and every operator is launched twice
    ],
)
def test_where_engines_gain(rows: int, inner: int, outer: int, wanted: bool, target: str) -> None:
    _, records = run_pass(swiglu(rows, inner, outer), SplitConcat, target=target)
    assert applications(records) == wanted
    assert wanted or f"not cheaper on {target}" in reasons(records)


def test_behind_joint_pivots(memory: str, arithmetic: str) -> None:
    """As the recipe has them: gate and up of low rank have pivots of one order, and down is dense."""
    g = G(17)
    x = g.input("x", "rows", 48)
    gate, up = (
        g.op("MatMul", g.op("MatMul", x, weight(g, 48, 24, seed=i)), weight(g, 24, 96, seed=i + 1)) for i in (1, 3)
    )
    inner = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    before = finish(g, g.op("MatMul", inner, weight(g, 96, 48, seed=5)))
    pivoted, _ = run_pass(before, Pivot, target=arithmetic)
    assert op_types(pivoted).count("Concat") == 2
    after, records = run_pass(pivoted, SplitConcat, target=memory)
    assert applications(records) == 1, reasons(records)
    assert "Concat" not in op_types(after)
    (one,), (other,) = (run_ort(model, {"x": random((7, 48))}) for model in (pivoted, after))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(np.abs(one).max()))


def test_in_the_recipe(tmp_path: Path) -> None:
    """Factors of gate and up become pivots, their order goes into down, and down is split: verified as a whole."""
    g = G(17)
    x = g.input("x", 64, 48)
    gate, up = (
        g.op("MatMul", g.op("MatMul", x, weight(g, 48, 24, seed=i)), weight(g, 24, 96, seed=i + 1)) for i in (1, 3)
    )
    before = finish(g, g.op("MatMul", g.op("Mul", g.op("Relu", gate), up), weight(g, 96, 8, seed=5)))
    onnx.save(before, tmp_path / "in.onnx")
    target = tmp_path / "target.yaml"
    costs = "costs: {node: 0.0, gigaflops: 10.0, gigabytes: 20.0}"
    target.write_text(f"name: t\nbackend: tensorrt\nversion: '1'\nopset: 24\nir_version: 12\n{costs}\n")
    report = graphopt.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", recipe=["lowrank"], target=str(target))
    assert report.verification.verdict == "passed" and report.undone == {}
    kept = {record.name: record.kept for record in report.passes}
    assert kept["pivot"] >= 1 and kept["split-concat"] == 1
    assert sorted(set(op_types(ir.load(tmp_path / "out.onnx")))) == ["Add", "MatMul", "Mul", "Relu"]


def test_verified_and_undone(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement is one application: checked by itself, and taken back where it is wrong."""
    g = G(17)
    before = finish(g, g.op("MatMul", g.op("Relu", joined(g)), weight(g, N, M)))
    onnx.save(before, tmp_path / "in.onnx")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ndescription: one pass\npasses: [split-concat]\n")

    def run(out: str) -> Any:
        return graphopt.optimize(tmp_path / "in.onnx", tmp_path / out, recipe=[str(recipe)], target=memory)

    report = run("out.onnx")
    assert [(r.kept, r.undone) for r in report.passes if r.name == "split-concat"] == [(1, 0)]
    assert report.verification.verdict == "passed"

    from graphopt.passes.lowrank import split_concat

    right = split_concat._columns
    monkeypatch.setattr(
        split_concat, "_columns", lambda ctx, linear, places: lambda: 1.01 * right(ctx, linear, places)()
    )
    report = run("wrong.onnx")
    assert [(r.kept, r.undone) for r in report.passes if r.name == "split-concat"] == [(0, 1)]
    assert "Concat" in op_types(ir.load(tmp_path / "wrong.onnx"))
