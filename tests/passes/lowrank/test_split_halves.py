"""split-halves: what is joined and taken apart again is not joined, whatever elementwise operators are between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.passes.lowrank.elementwise import ELEMENTWISE
from graphopt.passes.lowrank.pivot import Pivot
from graphopt.passes.lowrank.split_halves import SplitHalves, split_sizes
from graphopt.rewrite.manager import PassRecord
from tests.models.blocks import llama_block, mlp_block
from tests.passes.common import applications, assert_same_bits, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, NUMPY, G, assert_rounding, in_body, random, reasons

R, N, B = 6, 10, 3
"""Size of the first part, of all, and rows."""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target on which a node costs nothing but what it moves: small models gain there too."""
    path = tmp_path_factory.mktemp("target") / "memory.yaml"
    costs = "costs: {node: 0.0, gigaflops: 1.0e+9, gigabytes: 0.001}"
    extensions = "extensions: {com.microsoft: [Gelu, FastGelu, BiasGelu, QuickGelu]}"
    header = "name: memory\nbackend: onnxruntime\nversion: '1'\nopset: 24\nir_version: 12\n"
    path.write_text(f"{header}{extensions}\n{costs}\n")
    return str(path)


def halved(before: onnx.ModelProto, target: str = "onnxruntime") -> tuple[ir.Model, list[PassRecord]]:
    return run_pass(before, SplitHalves, target=target)


def split(g: G, x: str, sizes: Sequence[int], *, axis: int = 1, equal: bool = False, count: bool = False) -> list[str]:
    """A Split as its opset writes it; ``equal``: without sizes."""
    names = [g._fresh("part") for _ in sizes]
    inputs, attributes = [x], {}
    if equal:
        if g.opset >= 18 or count:
            attributes = {"num_outputs": len(sizes)}
    elif g.opset >= 13:
        inputs.append(g.ints(*sizes))
    else:
        attributes = {"split": list(sizes)}
    g.nodes.append(helper.make_node("Split", inputs, names, axis=axis, name=g._fresh("split"), **attributes))
    return names


def joined(g: G, names: Sequence[str], *, axis: int = 1) -> str:
    return g.op("Concat", *names, axis=axis)


def parts(g: G, prefix: str, *, sizes: Sequence[int] = (R, N - R), axis: int = 1, shape: Sequence[int] = (B, N)) -> str:
    """Inputs of the sizes, joined."""
    names = []
    for i, size in enumerate(sizes):
        dims = list(shape)
        dims[axis] = size
        names.append(g.input(f"{prefix}{i}", *dims))
    return joined(g, names, axis=axis)


def finish(g: G, names: Sequence[str]) -> onnx.ModelProto:
    for name in names:
        g.output(name)
    return g.model()


def feeds(model: onnx.ModelProto, *, seed: int = 0, rows: int = B) -> dict[str, np.ndarray]:
    made = {}
    for i, value in enumerate(model.graph.input):
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else rows for d in tensor.shape.dim]
        made[value.name] = np.asarray(random(shape, tensor.elem_type, seed=seed + i))
    return made


def apart(model: ir.Model) -> bool:
    """Whether nothing is joined or split any more."""
    return not {"Concat", "Split"} & set(op_types(model))


# ---- what is taken apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [8, 11, 12, 13, 17, 18, 21, 24])
def test_swiglu(opset: int) -> None:
    g = G(opset)
    gate, up = parts(g, "g"), parts(g, "u")
    product = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    before = finish(g, split(g, product, (R, N - R)))
    after, records = halved(before)
    assert applications(records) == 1 and op_types(after) == ["Sigmoid", "Mul", "Mul"] * 2
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("op", ["Relu", "Erf", "Tanh", "HardSwish", "Gelu", "Neg", "LeakyRelu", "Sigmoid"])
def test_one_operator(op: str) -> None:
    g = G(20)
    before = finish(g, split(g, g.op(op, parts(g, "x")), (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == [op, op]
    assert_same_bits(before, after, feeds(before))


def test_attributes_and_domains_are_kept(memory: str) -> None:
    g = G(17)
    x = g.op("LeakyRelu", g.op("QuickGelu", parts(g, "x"), domain="com.microsoft", alpha=1.5), alpha=0.3)
    names = split(g, x, (R, N - R), axis=-1)  # onnx knows no shape of QuickGelu
    model = helper.make_model(
        helper.make_graph(
            g.nodes, "g", g.inputs, [helper.make_tensor_value_info(n, FLOAT, None) for n in names], g.initializers
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    after, _ = halved(model, memory)
    assert op_types(after) == ["QuickGelu", "LeakyRelu"] * 2
    assert_same_bits(model, after, feeds(model))


@pytest.mark.parametrize(("opset", "limits"), [(8, False), (11, True), (17, True)])
def test_clip(opset: int, limits: bool) -> None:
    g = G(opset)
    x = parts(g, "x")
    clipped = g.op("Clip", x, g.const(-0.5), g.const(0.5)) if limits else g.op("Clip", x, min=-0.5, max=0.5)
    before = finish(g, split(g, clipped, (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == ["Clip", "Clip"]
    assert_same_bits(before, after, feeds(before))


def test_an_optional_input_that_is_absent() -> None:
    g = G(17)
    before = finish(g, split(g, g.op("Clip", parts(g, "x"), "", g.const(0.5)), (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == ["Clip", "Clip"]
    assert_same_bits(before, after, feeds(before))


def test_casts_conditions_and_three_operands(memory: str) -> None:
    g = G(17)
    x, y = parts(g, "x"), parts(g, "y")
    condition = g.op("Not", g.op("Greater", x, g.const(random((N,), seed=9))))
    chosen = g.op("Where", condition, g.op("Max", x, y, g.const(0.1)), g.op("Min", y, g.const(random((1, N), seed=8))))
    wide = g.op("Cast", chosen, to=DOUBLE)
    names = split(g, wide, (R, N - R))
    for name in names:
        g.output(name, dtype=DOUBLE)
    before = g.model()
    after, _ = halved(before, memory)
    assert apart(after) and op_types(after).count("Where") == 2
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize(
    "shape", [(), (1,), (N,), (1, 1), (1, N), (B, 1), (B, N)], ids=lambda shape: "x".join(map(str, shape)) or "scalar"
)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "PRelu", "Max"])
def test_constants_that_broadcast(op: str, shape: tuple[int, ...], memory: str) -> None:
    g = G(17)
    before = finish(g, split(g, g.op(op, parts(g, "x"), g.const(random(shape, seed=5))), (R, N - R)))
    after, _ = halved(before, memory)
    assert op_types(after) == [op, op]
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("shape", [(1,), (B, 1), (1, 1), ()])
def test_activations_that_broadcast(shape: tuple[int, ...], memory: str) -> None:
    g = G(17)
    before = finish(g, split(g, g.op("Mul", g.input("scale", *shape), parts(g, "x")), (R, N - R)))
    after, _ = halved(before, memory)
    assert op_types(after) == ["Mul", "Mul"]
    assert_same_bits(before, after, feeds(before))


def test_a_part_of_fewer_axes() -> None:
    g = G(17)
    one = joined(g, [g.input("a", R), g.input("b", N - R)], axis=0)
    before = finish(g, split(g, g.op("Add", parts(g, "x"), one), (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == ["Add", "Add"]
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("axis", [1, -3])
def test_channels_of_a_convolution(axis: int) -> None:
    g = G(17)
    shape = (2, N, 4, 5)
    x, y = (parts(g, name, axis=axis, shape=shape) for name in "xy")
    scaled = g.op("Mul", g.op("Relu", g.op("Add", x, y)), g.const(random((N, 1, 1), seed=3)))
    before = finish(g, split(g, scaled, (R, N - R), axis=axis))
    after, _ = halved(before)
    assert op_types(after) == ["Add", "Relu", "Mul"] * 2
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("opset", [9, 13, 14, 15, 17])
def test_batch_normalization(opset: int) -> None:
    g = G(opset)
    x = parts(g, "x", axis=1, shape=(2, N, N, 5))
    vectors = [g.const(np.abs(random((N,), seed=s)) + 0.5) for s in range(4)]
    norm = g.op("BatchNormalization", x, *vectors, epsilon=1e-3)
    before = finish(g, split(g, g.op("Relu", norm), (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == ["BatchNormalization", "Relu"] * 2
    assert_same_bits(before, after, feeds(before))


def test_a_vector_of_batch_normalization_along_another_axis() -> None:
    g = G(17)
    x = parts(g, "x", axis=1, shape=(2, N, N))
    vectors = [g.const(np.abs(random((N,), seed=s)) + 0.5) for s in range(4)]
    summed = g.op("Add", g.op("BatchNormalization", x, *vectors), vectors[0])  # along the last axis
    before = finish(g, split(g, summed, (R, N - R), axis=1))
    after, _ = halved(before)
    assert op_types(after) == ["BatchNormalization", "Add"] * 2
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("dtype", [FLOAT16, DOUBLE])
def test_other_types(dtype: int, memory: str) -> None:
    g = G(17, dtype)
    x = parts(g, "x")
    before = finish(g, split(g, g.op("Mul", x, g.op("Sigmoid", g.op("Add", x, g.const(random((N,)))))), (R, N - R)))
    after, _ = halved(before, memory)
    assert apart(after)
    assert_rounding(before, after, feeds(before))


def test_numbers_may_move_where_the_runtime_vectorises(memory: str) -> None:
    """Why the pass is not bitwise: the rule for rounding holds, wherever a number stands in its row."""
    g = G(24)
    x = parts(g, "x", sizes=(37, 94), shape=(3, 131))
    y = g.op("Elu", g.op("Softplus", g.op("Sin", g.op("Log", g.op("Abs", x)))))
    before = finish(g, split(g, y, (37, 94)))
    after, _ = halved(before, memory)
    assert apart(after)
    assert_rounding(before, after, feeds(before))


# ---- how it is split -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [8, 13, 18])
def test_equal_parts(opset: int) -> None:
    g = G(opset)
    before = finish(g, split(g, g.op("Relu", parts(g, "x", sizes=(4, 4, 4), shape=(B, 12))), (4, 4, 4), equal=True))
    after, _ = halved(before)
    assert op_types(after) == ["Relu"] * 3
    assert_same_bits(before, after, feeds(before))


def test_num_outputs_leaves_the_rest_to_the_last() -> None:
    g = G(18)
    before = finish(g, split(g, g.op("Relu", parts(g, "x", sizes=(4, 4, 3), shape=(B, 11))), (4, 4, 3), equal=True))
    after, _ = halved(before)
    assert op_types(after) == ["Relu"] * 3
    assert_same_bits(before, after, feeds(before))


def test_sizes_that_are_not_constant() -> None:
    g = G(17)
    sizes = g.input("sizes", 2, dtype=TensorProto.INT64)
    x = g.op("Relu", parts(g, "x"))
    g.nodes.append(helper.make_node("Split", [x, sizes], ["a", "b"], axis=-1, name="the_split"))
    for name in "ab":
        g.output(name, B, None)
    _, records = halved(g.model())
    assert not applications(records)
    assert "the sizes of the parts are not known" in reasons(records)


def test_sizes_of_a_split_that_refers_to_a_function() -> None:
    node = ir.Node("", "Split", [ir.Value()], [ir.RefAttr("split", "sizes", ir.AttributeType.INTS)], num_outputs=2)
    assert split_sizes(node, 8) is None


@pytest.mark.parametrize("axis", [1, -1])
def test_straight_from_concat(axis: int) -> None:
    g = G(17)
    names = split(g, parts(g, "x", axis=axis), (R, N - R), axis=1)
    before = finish(g, [g.op("Relu", name) for name in names])
    after, _ = halved(before)
    assert op_types(after) == ["Relu", "Relu"]
    assert_same_bits(before, after, feeds(before))


def test_a_concat_that_something_else_reads_stays_for_it() -> None:
    g = G(17)
    x = parts(g, "x")
    before = finish(g, [*[g.op("Relu", name) for name in split(g, x, (R, N - R))], x])
    after, _ = halved(before)
    assert sorted(op_types(after)) == ["Concat", "Relu", "Relu"]
    assert_same_bits(before, after, feeds(before))


def test_parts_that_are_returned() -> None:
    g = G(17)
    before = finish(g, split(g, parts(g, "x", shape=(300, N)), (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == ["Identity", "Identity"]
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.output]
    assert_same_bits(before, after, feeds(before))


def test_a_part_that_nobody_reads_is_not_made() -> None:
    g = G(17)
    before = finish(g, split(g, g.op("Relu", parts(g, "x")), (R, N - R))[:1])
    after, _ = halved(before)
    assert op_types(after) == ["Relu"]
    assert_same_bits(before, after, feeds(before))


def test_the_same_part_twice() -> None:
    g = G(17)
    x = g.input("x", B, 4)
    before = finish(g, [g.op("Relu", name) for name in split(g, joined(g, [x, x]), (4, 4))])
    after, _ = halved(before)
    assert op_types(after) == ["Relu", "Relu"]
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (1, 0), (0, 0), (1, 1)])
def test_empty_parts(sizes: tuple[int, int], memory: str) -> None:
    g = G(17)
    x = parts(g, "x", sizes=sizes, shape=(B, sum(sizes)))
    y = g.op("Add", g.op("Mul", x, g.input("s", B, 1)), g.const(random((sum(sizes),))))
    before = finish(g, split(g, y, sizes))
    after, _ = halved(before, memory)
    assert_same_bits(before, after, feeds(before))


def test_an_unknown_number_of_rows() -> None:
    g = G(17)
    x = joined(g, [g.input("a", "rows", R), g.input("b", "rows", N - R)])
    before = finish(g, split(g, g.op("Relu", x), (R, N - R)))
    after, _ = halved(before)
    assert op_types(after) == ["Relu", "Relu"]
    for rows in (0, 1, 7):
        assert_same_bits(before, after, feeds(before, rows=rows))


def test_in_a_body() -> None:
    g = G(17)
    before = in_body(finish(g, split(g, g.op("Relu", parts(g, "x")), (R, N - R))))
    after, records = halved(before)
    assert applications(records) == 1
    feed = {value.name: random((B, d), seed=d) for value, d in zip(before.graph.input[1:], (R, N - R), strict=True)}
    feed["condition"] = np.array(True)
    assert_same_bits(before, after, feed)


def test_a_function_keeps_its_constants_in_nodes() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 17, "f" : 1]>
        g (float[3, 6] a, float[3, 4] b) => (float[3, 6] p, float[3, 4] q) { p, q = f.halves(a, b) }
        <domain: "f", opset_import: ["" : 17]>
        halves (a, b) => (p, q) {
            x = Concat <axis = -1> (a, b)
            c = Constant <value = float[1] {2.0}> ()
            y = Mul (x, c)
            sizes = Constant <value_ints = [6, 4]> ()
            p, q = Split <axis = -1> (y, sizes)
        }
    """
    model = onnx.parser.parse_model(text)
    after, _ = run_pass(model, SplitHalves)
    assert_same_bits(model, after, feeds(model))


# ---- Concat of a Split -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taken", "put"), [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_concat_of_all_outputs_of_a_split(taken: int, put: int) -> None:
    g = G(17)
    names = split(g, g.op("Relu", g.input("x", B, N)), (R, N - R), axis=taken)
    before = finish(g, [g.op("Neg", joined(g, names, axis=put))])
    after, _ = halved(before)
    assert op_types(after) == ["Relu", "Neg"]
    assert_same_bits(before, after, feeds(before))


@pytest.mark.parametrize("what", ["order", "missing", "twice", "axis"])
def test_concat_of_something_else(what: str) -> None:
    g = G(17)
    a, b = split(g, g.input("x", B, N), (5, 5))
    names = {"order": [b, a], "missing": [a], "twice": [a, b, b], "axis": [a, b]}[what]
    before = finish(g, [g.op("Neg", joined(g, names, axis=0 if what == "axis" else 1))])
    _, records = halved(before)
    assert not applications(records)


# ---- what stays ------------------------------------------------------------------------------------------------------


def refused(g: G, names: Sequence[str], target: str, says: str) -> None:
    before = finish(g, names)
    after, records = halved(before, target)
    assert not applications(records)
    assert op_types(after) == [node.op_type for node in before.graph.node]
    assert says in reasons(records)


def test_parts_of_other_sizes(memory: str) -> None:
    g = G(17)
    refused(g, split(g, g.op("Relu", parts(g, "x")), (R - 1, N - R + 1)), memory, "Concat joins 6, 4, Split takes 5, 5")


def test_another_axis(memory: str) -> None:
    g = G(17)
    refused(g, split(g, g.op("Relu", parts(g, "x", axis=0, shape=(N, N))), (R, N - R)), memory, "joins another axis")


def test_a_result_that_is_read_elsewhere(memory: str) -> None:
    g = G(17)
    y = g.op("Relu", parts(g, "x"))
    refused(g, [*split(g, y, (R, N - R)), g.op("Neg", y)], memory, "the result of Relu is read elsewhere")


def test_a_result_that_is_returned(memory: str) -> None:
    g = G(17)
    y = g.op("Relu", parts(g, "x"))
    refused(g, [*split(g, y, (R, N - R)), y], memory, "the result of Relu is returned")


@pytest.mark.parametrize("op", ["Softmax", "CumSum", "MatMul", "Transpose", "LayerNormalization"])
def test_operators_that_mix_positions(op: str, memory: str) -> None:
    g = G(17)
    x = parts(g, "x", shape=(N, N))
    more = {"CumSum": [g.ints(1)], "MatMul": [g.const(np.eye(N))], "LayerNormalization": [g.const(np.ones(N))]}
    mixed = g.op(op, g.op("Relu", x), *more.get(op, []))
    refused(g, split(g, g.op("Add", x, mixed), (R, N - R)), memory, f"{op} is no Concat of such parts")


def test_an_activation_along_the_axis(memory: str) -> None:
    g = G(17)
    refused(
        g, split(g, g.op("Add", parts(g, "x"), g.input("y", B, N)), (R, N - R)), memory, "an input is no Concat of such"
    )


def test_a_constant_that_a_caller_may_replace(memory: str) -> None:
    g = G(17)
    y = g.op("Add", parts(g, "x"), g.overridable(random((N,))))
    refused(g, split(g, y, (R, N - R)), memory, "an input is no Concat of such parts")


def test_batch_normalization_of_another_axis(memory: str) -> None:
    g = G(17)
    x = parts(g, "x", axis=2, shape=(2, N, N))
    y = g.op("BatchNormalization", x, *[g.const(np.ones(N)) for _ in range(4)])
    refused(g, split(g, y, (R, N - R), axis=2), memory, "over another axis")


def test_batch_normalization_whose_statistics_are_inputs(memory: str) -> None:
    g = G(17)
    x = parts(g, "x", axis=1, shape=(2, N, 4))
    y = g.op("BatchNormalization", x, g.input("s", N), *[g.const(np.ones(N)) for _ in range(3)])
    refused(g, split(g, y, (R, N - R), axis=1), memory, "no constant of its channels")


def test_a_part_whose_size_is_not_known(memory: str) -> None:
    g = G(17)
    x = joined(g, [g.input("a", B, "r"), g.input("b", B, N - R)])
    refused(g, split(g, g.op("Relu", x), (R, N - R)), memory, "Concat joins ?, 4, Split takes 6, 4")


def test_before_operators_broadcast() -> None:
    g = G(7)
    before = finish(g, split(g, g.op("Relu", parts(g, "x")), (R, N - R)))
    assert not applications(halved(before)[1])


def test_a_split_outside_is_not_repeated(memory: str) -> None:
    """What an outer graph computes once, a body does not compute in each round."""
    g = G(17)
    y = g.op("Relu", parts(g, "x"))
    names = [g._fresh("inner"), g._fresh("inner")]
    lengths = g.ints(R, N - R)
    body = helper.make_graph(
        [helper.make_node("Split", [y, lengths], names, axis=-1, name="inner_split")],
        "then",
        [],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in names],
    )
    other = helper.make_graph(
        [helper.make_node("Split", [y, lengths], ["o0", "o1"], axis=-1, name="other_split")],
        "else",
        [],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in ("o0", "o1")],
    )
    condition = g.input("condition", dtype=TensorProto.BOOL)
    g.nodes.append(helper.make_node("If", [condition], ["a", "b"], then_branch=body, else_branch=other, name="if"))
    for name, size in (("a", R), ("b", N - R)):
        g.output(name, B, size)
    _, records = halved(g.model(), memory)
    assert not applications(records)
    assert "Relu is computed outside the body" in reasons(records)


def test_a_long_way(memory: str) -> None:
    g = G(17)
    x = parts(g, "x")
    for _ in range(80):
        x = g.op("Neg", x)
    refused(g, split(g, x, (R, N - R)), memory, "more than 64 nodes between")


def test_what_costs_more_in_parts_stays() -> None:
    g = G(17)
    x = parts(g, "x")
    for op in ("Relu", "Neg", "Abs", "Neg", "Sigmoid"):
        x = g.op(op, x)
    refused(g, split(g, x, (R, N - R)), "onnxruntime", "not cheaper")


# ---- drawn regions ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_property_any_region(data: st.DataObject, memory: str) -> None:
    draw = data.draw
    rank = draw(st.integers(1, 4), "rank")
    axis = draw(st.integers(0, rank - 1), "axis")
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4), "sizes")
    shape = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank), "shape")
    shape[axis] = sum(sizes)
    opset = draw(st.sampled_from([8, 12, 13, 17, 18, 22]), "opset")
    g = G(opset, draw(st.sampled_from([FLOAT, DOUBLE]), "type"))
    place = axis - rank if opset >= 11 else axis
    values = [parts(g, f"x{i}", sizes=sizes, axis=place, shape=shape) for i in range(draw(st.integers(1, 3), "joined"))]
    used = set(values)
    for step in range(draw(st.integers(0, 5), "steps")):
        x = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["Relu", "Neg", "Abs", "Add", "Mul", "Sub", "constant", "small", "row"]))
        if kind in ("Relu", "Neg", "Abs"):
            values.append(g.op(kind, x))
        elif kind in ("Add", "Mul", "Sub"):
            values.append(g.op(kind, x, draw(st.sampled_from(values))))
        else:
            dims = [d if draw(st.booleans()) else 1 for d in shape][draw(st.integers(0, rank - 1)) :]
            if kind == "small":
                dims = []
            array = np.asarray(np.abs(random(dims, seed=step)) + 0.5)
            values.append(g.op("Mul", g.const(array.astype(NUMPY[g.dtype])), x))
    while len(values) > 1:  # everything is read
        values = [g.op("Add", values[0], values[1]), *values[2:]]
    assert used
    before = finish(g, split(g, values[0], sizes, axis=draw(st.sampled_from([axis, place]))))
    after, _ = halved(before, memory)
    assert_same_bits(before, after, feeds(before))


# ---- behind pivot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp_block, (2, 5, 48)), (llama_block, (2, 5, 48))],
    ids=["mlp", "llama"],
)
def test_no_concat_meets_a_split_behind_pivot(build: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "arithmetic.yaml"
    costs = "costs: {node: 0.0, gigaflops: 0.001, gigabytes: 100.0}"
    path.write_text(f"name: arithmetic\nbackend: onnxruntime\nversion: '1'\nopset: 24\nir_version: 12\n{costs}\n")
    original = build(opset=20)  # type: ignore[operator]
    pivoted, _ = run_pass(original, Pivot, target=str(path))
    after, records = run_pass(pivoted, SplitHalves, target=str(path))
    splits = op_types(pivoted).count("Split")
    assert splits >= 1 and applications(records) >= 1
    assert op_types(after).count("Split") == splits - applications(records)
    feed = {"x": random(shape)}
    for wanted, found in zip(run_ort(pivoted, feed), run_ort(after, feed), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_every_operator_is_one_of_the_standard() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    assert ELEMENTWISE[""] <= known
