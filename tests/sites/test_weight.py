"""What a product's constant operand is, behind whatever stands before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import graphs
from graphopt.shapes import infer_shapes
from graphopt.sites import weight_of
from graphopt.sites.weight import Weight
from graphopt.store import digest
from tests.passes.common import run_ort
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, random


def _of_output(model: onnx.ModelProto) -> Weight | None:
    """The weight that a model's output is."""
    read = ir.from_proto(model)
    infer_shapes(read)
    return weight_of(read.graph.outputs[0])


def _check(g: G, *, opset: int) -> Weight:
    """The weight reads as what ONNX Runtime computes."""
    model = g.model()
    weight = _of_output(model)
    assert weight is not None
    (expected,) = run_ort(model, {})
    found = weight.read(opset)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (weight.dtype.numpy(), weight.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found, expected)
    return weight


def _raw(g: G, array: np.ndarray, kind: int | None = None) -> str:
    name = g.const(np.zeros(1, np.int64))
    made = numpy_helper.from_array(array, name)
    if kind is not None:
        made = helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())
    g.initializers[-1].CopyFrom(made)
    return name


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.sampled_from(["Transpose", "perm", "Cast", "Identity", "Reshape", "Flatten", "Unsqueeze", "Squeeze"]),
        max_size=6,
    ),
    opset=st.sampled_from([11, 13, 17, 21]),
    dtype=st.sampled_from([FLOAT, FLOAT16, DOUBLE]),
)
def test_property_chains_read_as_the_runtime_computes_them(steps: list[str], opset: int, dtype: int) -> None:
    g = G(opset, dtype)
    value, shape = g.const(random((4, 6), dtype)), (4, 6)
    for step in steps:
        if step == "Transpose":
            value, shape = g.op("Transpose", value), shape[::-1]
        elif step == "perm":
            value, shape = g.op("Transpose", value, perm=list(range(len(shape)))), shape
        elif step == "Cast":
            value, g.dtype = g.op("Cast", value, to=DOUBLE), DOUBLE
        elif step == "Identity":
            value = g.op("Identity", value)
        elif step == "Reshape":
            value, shape = g.op("Reshape", value, g.ints(-1, 2, 3)), (4, 2, 3)
        elif step == "Flatten":
            value, shape = g.op("Flatten", value, axis=1), (shape[0], 24 // shape[0])
        elif step == "Unsqueeze":
            axes = [g.ints(0)] if opset >= 13 else []
            value = g.op("Unsqueeze", value, *axes, **({} if axes else {"axes": [0]}))
            shape = (1, *shape)
        elif step == "Squeeze" and shape[0] == 1:
            axes = [g.ints(0)] if opset >= 13 else []
            value = g.op("Squeeze", value, *axes, **({} if axes else {"axes": [0]}))
            shape = shape[1:]
    g.output(g.op("Identity", value), *shape)
    _check(g, opset=opset)


@pytest.mark.parametrize("opset", [10, 13, 19, 21, 23])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("scales", ["tensor", "one element", "axis 0", "axis 1", "axis -1"])
def test_dequantised(opset: int, zero: bool, scales: str) -> None:
    if scales.startswith("axis") and opset < 13:
        pytest.skip("one scale for all before opset 13")
    axis = int(scales.rpartition(" ")[2]) if scales.startswith("axis") else 1
    size = {"tensor": (), "one element": () if opset < 13 else (1,)}.get(scales, ((4, 6)[axis],))
    g = G(opset)
    codes = np.random.default_rng(0).integers(-128, 128, (4, 6)).astype(np.int8)
    inputs = [_raw(g, codes), g.const(np.abs(random(size, seed=1)) + 0.01)]
    if zero:
        inputs.append(_raw(g, np.random.default_rng(1).integers(-9, 9, size).astype(np.int8)))
    g.output(g.op("DequantizeLinear", *inputs, **({"axis": axis} if opset >= 13 else {})))
    assert _check(g, opset=opset).quantised


@pytest.mark.parametrize(("axis", "block", "shape"), [(0, 2, (2, 6)), (1, 3, (4, 2)), (1, 4, (4, 2)), (-1, 5, (4, 2))])
@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT4, TensorProto.INT4])
def test_dequantised_in_blocks(axis: int, block: int, shape: tuple[int, int], kind: int) -> None:
    g = G(21)
    codes = np.random.default_rng(0).integers(0, 8, (4, 6))
    zeros = np.random.default_rng(1).integers(0, 8, shape)
    inputs = [_raw(g, codes, kind), g.const(np.abs(random(shape, seed=1)) + 0.01), _raw(g, zeros, kind)]
    g.output(g.op("DequantizeLinear", *inputs, axis=axis, block_size=block))
    model = g.model()
    weight = _of_output(model)
    assert weight is not None
    # By the definition: this runtime takes block sizes that are powers of two from 16 on only.
    place = [np.arange(4), np.arange(6)]
    place[axis] = place[axis] // block
    scale = numpy_helper.to_array(model.graph.initializer[1])
    np.testing.assert_array_equal(
        weight.read(21), (codes - zeros[np.ix_(*place)]).astype(np.float32) * scale[np.ix_(*place)]
    )


def test_dequantised_to_another_type_than_the_scales() -> None:
    g = G(23)
    codes = _raw(g, np.arange(-6, 6, dtype=np.int8).reshape(3, 4))
    g.output(g.op("DequantizeLinear", codes, g.const(0.1), output_dtype=FLOAT16), dtype=FLOAT16)
    weight = _of_output(g.model())
    assert weight is not None and weight.dtype is ir.DataType.FLOAT16 and weight.read(23).dtype == np.float16


@pytest.mark.parametrize(("source", "to"), [(FLOAT, FLOAT16), (DOUBLE, FLOAT), (FLOAT16, FLOAT), (FLOAT, DOUBLE)])
def test_casts_round_as_the_runtime_does(source: int, to: int) -> None:
    g = G(17, source)
    g.output(g.op("Cast", g.const(random((40, 7), source)), to=to), dtype=to)
    _check(g, opset=17)


def test_bfloat16() -> None:
    g = G(17)
    g.output(g.op("Cast", g.const(random((3, 5))), to=TensorProto.BFLOAT16), dtype=TensorProto.BFLOAT16)
    weight = _of_output(g.model())
    assert weight is not None and weight.dtype is ir.DataType.BFLOAT16
    assert weight.read(17).dtype.name == "bfloat16"


def test_a_constant_node() -> None:
    g = G(17)
    array = random((3, 4))
    g.output(g.op("Transpose", g.op("Constant", value=numpy_helper.from_array(array))))
    assert _check(g, opset=17).shape == (4, 3)


def test_zero_size() -> None:
    g = G(17)
    g.output(g.op("Transpose", g.const(np.zeros((0, 4)))))
    assert _check(g, opset=17).shape == (4, 0)


# ---- what is none --------------------------------------------------------------------------------------------------


def _none(g: G, value: str, **options: object) -> None:
    g.output(value, **options)  # type: ignore[arg-type]
    assert _of_output(g.model()) is None


def test_an_activation() -> None:
    g = G(17)
    _none(g, g.op("Transpose", g.input("x", 3, 4)))


def test_what_a_caller_may_override() -> None:
    g = G(17)
    _none(g, g.op("Transpose", g.overridable(random((3, 4)))))


def test_integers() -> None:
    g = G(17)
    _none(g, g.op("Identity", g.ints(1, 2)), dtype=TensorProto.INT64)


def test_a_detour_over_integers() -> None:
    g = G(17)
    whole = g.op("Cast", g.const(random((3, 4), scale=9.0)), to=TensorProto.INT32)
    _none(g, g.op("Cast", whole, to=FLOAT))


def test_a_shape_that_is_computed() -> None:
    g = G(17)
    _none(g, g.op("Reshape", g.const(random((3, 4))), g.input("shape", 2, dtype=TensorProto.INT64)), rank=2)


def test_another_operator() -> None:
    g = G(17)
    _none(g, g.op("Relu", g.const(random((3, 4)))))


def test_a_scale_that_is_computed() -> None:
    g = G(17)
    codes = _raw(g, np.zeros((3, 4), np.int8))
    _none(g, g.op("DequantizeLinear", codes, g.input("scale")))


def test_an_attribute_of_the_function_around() -> None:
    reference = onnx.AttributeProto(name="perm", ref_attr_name="order", type=onnx.AttributeProto.INTS)
    turn = helper.make_node("Transpose", ["w"], ["y"])
    turn.attribute.append(reference)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(random((3, 4))))
    function = helper.make_function(
        "local", "f", ["x"], ["y"], [constant, turn], [helper.make_opsetid("", 17)], attributes=["order"]
    )
    g = G(17)
    g.nodes.append(helper.make_node("f", [g.input("x", 1)], ["out"], domain="local", order=[1, 0]))
    g.output("out", rank=2)
    model = ir.from_proto(g.model([function]))
    (inner,) = model.functions.values()
    assert weight_of(inner.outputs[0]) is None


def test_a_declared_shape_that_is_wrong_is_not_believed() -> None:
    g = G(17)
    value = g.op("Reshape", g.const(random((3, 4))), g.ints(4, 3))
    g.output(g.op("MatMul", g.input("x", 2, 4), value), 2, 3)
    model = g.model()
    model.graph.value_info.append(helper.make_tensor_value_info(value, FLOAT, [2, 6]))
    read = ir.from_proto(model)
    infer_shapes(read)
    weight = weight_of(next(n for n in read.graph if n.op_type == "MatMul").inputs[1])
    assert weight is not None and weight.shape == (4, 3) == weight.read(17).shape


# ---- who reads it ---------------------------------------------------------------------------------------------------


def test_readers() -> None:
    g = G(17)
    w, x = g.const(random((4, 4))), g.input("x", 2, 4)
    turned = g.op("Transpose", w)
    g.output(g.op("MatMul", g.op("MatMul", x, turned), w))
    g.output(g.op("MatMul", x, turned))
    model = ir.from_proto(g.model())
    infer_shapes(model)
    weights = [weight_of(n.inputs[1]) for n in model.graph if n.op_type == "MatMul"]
    assert all(w is not None and w.shared for w in weights)
    # Transpose is no reader of the weight behind it, but is one of the same constant as it is.
    assert [w.readers() for w in weights if w is not None] == [3, 2, 3]


def test_a_body_is_a_reader() -> None:
    g = G(17)
    w, x = g.const(random((4, 4))), g.input("x", 2, 4)
    body = helper.make_graph(
        [helper.make_node("MatMul", [x, w], ["t"])], "b", [], [helper.make_tensor_value_info("t", FLOAT, [2, 4])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", [x], ["e"])], "o", [], [helper.make_tensor_value_info("e", FLOAT, [2, 4])]
    )
    g.output(g.op("MatMul", x, w))
    condition = g.input("c", dtype=TensorProto.BOOL)
    g.nodes.append(helper.make_node("If", [condition], ["chosen"], then_branch=body, else_branch=other))
    g.output("chosen", 2, 4)
    model = ir.from_proto(g.model())
    for node in graphs.all_nodes(model):
        if node.op_type == "MatMul":
            weight = weight_of(node.inputs[1])
            assert weight is not None and weight.shared and weight.readers() == 2


def test_a_returned_constant_is_shared() -> None:
    g = G(17)
    w = g.const(random((4, 4)))
    g.output(g.op("MatMul", g.input("x", 2, 4), w))
    g.output(w, 4, 4)
    model = ir.from_proto(g.model())
    weight = weight_of(next(iter(model.graph)).inputs[1])
    assert weight is not None and weight.shared


def test_digests_tell_the_ways_apart() -> None:
    """A square constant read as it is and turned are two matrices."""
    g = G(21)
    w, codes = g.const(random((4, 4))), _raw(g, np.arange(16, dtype=np.int8).reshape(4, 4))
    values = [
        w,
        g.op("Transpose", w),
        g.op("Transpose", w, perm=[0, 1]),
        g.op("DequantizeLinear", codes, g.const(0.5)),
        g.op("DequantizeLinear", codes, g.const(0.25)),
        g.op("DequantizeLinear", codes, g.const(0.5 * np.ones(4)), axis=0),
        g.op("DequantizeLinear", codes, g.const(0.5 * np.ones(4)), axis=1),
    ]
    for value in values:
        g.output(g.op("Identity", value), 4, 4)
    model = ir.from_proto(g.model())
    infer_shapes(model)
    found = [weight_of(output.producer().inputs[0]) for output in model.graph.outputs]  # type: ignore[union-attr]
    assert len({digest(*w.parts()) for w in found if w is not None}) == len(values)


def test_an_external_weight_is_read_from_its_file(tmp_path: Path) -> None:
    g = G(17)
    array = random((30, 40))
    g.output(g.op("Transpose", g.const(array)))
    onnx.save(g.model(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    model = ir.load(tmp_path / "m.onnx")
    weight = weight_of(model.graph.outputs[0])
    assert weight is not None
    np.testing.assert_array_equal(weight.read(17), array.T)
