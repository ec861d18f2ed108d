from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.passes.canonical.remove_dead import RemoveDead, required_outputs
from tests.passes.common import applications, assert_same_bits, op_types, run_pass

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
HEAD = '<ir_version: 8, opset_import: ["": 18]> g '


def test_dead_nodes_and_constants_go() -> None:
    text = HEAD + (
        "(float[2,3] x) => (float[2,3] y) <float[3] w = {1,2,3}, float[3] v = {1,2,3}> "
        "{ y = Add(x, w) a = Neg(x) b = Exp(a) c = Mul(b, a) }"
    )
    result, records = run_pass(text, RemoveDead)
    assert op_types(result) == ["Add"]
    assert list(result.graph.initializers) == ["w"]
    assert applications(records) == 2  # c with what only it reads, and v
    assert_same_bits(text, result, X)


def test_dead_nodes_in_bodies_and_dead_captures_go() -> None:
    text = HEAD + (
        "(float[2,3] x, bool c) => (float[2,3] y) { a = Exp(x) b = Neg(x) "
        "y = If(c) <then_branch = t () => (float[2,3] p) { d = Relu(a) p = Neg(x) }, "
        "else_branch = e () => (float[2,3] q) { q = Exp(b) }> }"
    )
    result, _ = run_pass(text, RemoveDead)
    assert sorted(op_types(result)) == ["Exp", "If", "Neg", "Neg"]
    assert_same_bits(text, result, X | {"c": np.array(True)}, X | {"c": np.array(False)})


def test_capture_in_a_body_is_a_reader() -> None:
    text = HEAD + (
        "(float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1,2,3}> { a = Exp(x) "
        "y = If(c) <then_branch = t () => (float[2,3] p) { p = Add(a, w) }, "
        "else_branch = e () => (float[2,3] q) { q = Neg(x) }> }"
    )
    _, records = run_pass(text, RemoveDead)
    assert applications(records) == 0


def test_overridable_constant_stays() -> None:
    proto = onnx.parser.parse_model(HEAD + "(float[2,3] x, float[3] w) => (float[2,3] y) { y = Neg(x) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "w"))
    result, records = run_pass(proto, RemoveDead)
    assert applications(records) == 0
    assert [v.name for v in result.graph.inputs] == ["x", "w"]


def test_optional_outputs_are_trimmed_from_the_end() -> None:
    text = HEAD + (
        "(float[1,1,4,4] x) => (float[1,1,2,2] y) { y, i = MaxPool<kernel_shape = [2,2], strides = [2,2]>(x) }"
    )
    result, _ = run_pass(text, RemoveDead)
    assert len(result.graph[0].outputs) == 1
    assert_same_bits(text, result, {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)})


def test_required_and_variadic_outputs_stay() -> None:
    assert required_outputs("", "TopK", 18) == 2
    assert required_outputs("", "Split", 18) is None
    assert required_outputs("", "LSTM", 14) == 1
    assert required_outputs("", "NoSuchOperator", 18) is None
    text = HEAD + (
        "(float[2,3] x) => (int64[2,1] y) { k = Constant<value_ints = [1]>() v, y = TopK(x, k) a, b = Split"
        "<num_outputs = 2>(x) }"
    )
    result, _ = run_pass(text, RemoveDead)
    assert op_types(result) == ["TopK"]
    assert_same_bits(text, result, X)


def test_functions_that_nobody_calls_go() -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[2,3] x) => (float[2,3] y) { y = my.used(x) }
    <opset_import: ["": 18, "my": 1], domain: "my"> used (a) => (b) { c = Exp(a) d = my.inner(a) b = Neg(d) }
    <opset_import: ["": 18], domain: "my"> inner (a) => (b) { b = Neg(a) }
    <opset_import: ["": 18], domain: "my"> unused (a) => (b) { b = Neg(a) }"""
    result, _ = run_pass(text, RemoveDead)
    assert sorted(key[1] for key in result.functions) == ["inner", "used"]
    assert [n.op_type for n in result.functions["my", "used", ""]] == ["inner", "Neg"]
    assert_same_bits(text, result, X)


def test_skipped_and_limited_applications_are_not_made() -> None:
    text = HEAD + "(float[2,3] x) => (float[2,3] y) { y = Neg(x) a = Exp(x) b = Abs(x) }"
    result, records = run_pass(text, RemoveDead, skip=["remove-dead:node@a"])
    assert op_types(result) == ["Neg", "Exp"]
    assert applications(records) == 1
    _, records = run_pass(text, RemoveDead, limit=1)
    assert applications(records) == 1


def test_long_dead_chain_does_not_recurse() -> None:
    nodes = [onnx.helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(3000)]
    value = onnx.helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, [2])
    end = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([*nodes, onnx.helper.make_node("Exp", ["v0"], ["y"])], "g", [value], [end])
    result, _ = run_pass(ir.from_proto(onnx.helper.make_model(graph)), RemoveDead)
    assert op_types(result) == ["Exp"]
