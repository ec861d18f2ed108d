from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from graphopt import graphs
from graphopt.shapes import infer_shapes, is_known, trusted_shape

HEAD = '<ir_version: 8, opset_import: ["": 18]> g '


def inferred(text: str | onnx.ModelProto) -> dict[str, ir.Value]:
    proto = onnx.parser.parse_model(text) if isinstance(text, str) else text
    model = ir.from_proto(proto)
    infer_shapes(model)
    found = {}
    for graph in graphs.nested_graphs(model.graph):
        found.update({o.name or "": o for node in graph for o in node.outputs})
        found.update({v.name or "": v for v in graph.inputs})
    return found


def test_types_and_shapes_in_bodies_too() -> None:
    values = inferred(
        HEAD + "(float[n,3] x, bool c) => (float[n,3] y) { a = Shape(x) b = Transpose(x) y = If(c) <then_branch = t () "
        "=> (float[n,3] p) { d = Cast<to = 11>(x) p = Cast<to = 1>(d) }, else_branch = e () => (float[n,3] q) "
        "{ q = Neg(x) }> }"
    )
    assert values["a"].dtype == ir.DataType.INT64
    assert values["b"].shape == ir.Shape([3, "n"])
    assert (values["d"].dtype, values["d"].shape) == (ir.DataType.DOUBLE, ir.Shape(["n", 3]))


def test_declared_shapes_yield_to_inferred_ones() -> None:
    proto = onnx.parser.parse_model(HEAD + "(float[2,3] x) => (float[7] y) { a = Transpose(x) y = Neg(a) }")
    proto.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [9, 9]))
    values = inferred(proto)
    assert values["a"].shape == ir.Shape([3, 2])
    assert values["y"].shape == ir.Shape([7])  # the interface stays as it is
    assert trusted_shape(values["y"]) == ir.Shape([3, 2])


def test_declarations_that_nothing_confirms_are_kept_but_not_trusted() -> None:
    proto = onnx.parser.parse_model(
        HEAD + "(float[n,3] x, int64[2] s) => (float[a,b] y) { a = Reshape(x, s) b = Exp(x) y = Neg(a) }"
    )
    for name, shape in (("a", [4, 5]), ("b", [8, 3])):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    values = inferred(proto)
    assert values["a"].shape == ir.Shape([4, 5])
    assert trusted_shape(values["a"]) != ir.Shape([4, 5])
    assert values["b"].shape == ir.Shape([8, 3])
    assert trusted_shape(values["b"]) == ir.Shape(["n", 3])


def test_placeholder_names_are_no_names() -> None:
    values = inferred(HEAD + "(float[dynamic,3] x, float[dynamic,3] w) => (float[a,b] y) { y = Add(x, w) }")
    assert not is_known(trusted_shape(values["x"]))


def test_names_made_up_by_two_inferences_differ() -> None:
    proto = onnx.parser.parse_model(HEAD + "(float[n] x) => (int64[a,b] y) { a = NonZero(x) y = Neg(a) }")
    model = ir.from_proto(proto)
    infer_shapes(model)
    first = model.graph[0].outputs[0].shape
    infer_shapes(model)
    assert first is not None
    assert first != model.graph[0].outputs[0].shape


def test_overridable_constants_are_not_looked_into() -> None:
    proto = onnx.parser.parse_model(
        HEAD + "(float[2,3] x, int64[2] s) => (float[a,b] y) { a = Reshape(x, s) y = Neg(a) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([3, 2]), "s"))
    assert trusted_shape(inferred(proto)["a"]) != ir.Shape([3, 2])


def test_no_weight_is_read() -> None:
    class Unreadable(ir.Tensor):
        def tobytes(self) -> bytes:
            raise AssertionError("read")

        def numpy(self) -> np.ndarray:
            raise AssertionError("read")

    weight = Unreadable(np.zeros((300, 400), np.float32))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 300]))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    node = ir.node("MatMul", [x, w])
    last = ir.node("Neg", node.outputs)
    node.outputs[0].name, last.outputs[0].name = "a", "y"
    last.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], last.outputs, nodes=[node, last], initializers=[w], opset_imports={"": 18}, name="g")
    infer_shapes(ir.Model(graph, ir_version=8))
    assert node.outputs[0].shape == ir.Shape(["n", 400])


def test_model_that_cannot_be_inferred_is_left_usable() -> None:
    text = HEAD.replace("18]", '18, "my": 1]') + "(float[2] x) => (float[2] y) { a = my.Op(x) y = Neg(a) }"
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    assert model.graph[0].outputs[0].shape is None


def test_a_reshape_to_computed_sizes_in_opset_13() -> None:
    """onnx's inference of that opset knows nothing behind it; that of the next one does."""
    model = ir.from_onnx_text("""
    <ir_version: 8, opset_import: ["" : 13]>
    g (float[batch, seq, 8] x) => (float[a, b, c, d] y)
    <int64[1] first = {0}, int64[1] second = {1}, int64[2] heads = {2, 4}> {
      shape = Shape(x)
      n = Gather(shape, first)
      m = Gather(shape, second)
      wanted = Concat<axis = 0>(n, m, heads)
      y = Reshape(x, wanted)
    }
    """)
    infer_shapes(model)
    shape = trusted_shape(model.graph.outputs[0])
    assert shape is not None
    assert [str(axis) for axis in shape] == ["batch", "seq", "2", "4"]
