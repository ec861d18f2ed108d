from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.passes.canonical.inline_functions import InlineFunctions
from tests.passes.common import applications, assert_same_bits, op_types, run_ort, run_pass

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
HEAD = '<ir_version: 8, opset_import: ["": 18, "my": 1]> g '


def names(model: ir.Model) -> list[str]:
    found = []
    for graph in graphs.nested_graphs(model.graph):
        found.extend(v.name or "" for v in graph.inputs)
        found.extend(graph.initializers)
        found.extend(o.name or "" for node in graph for o in node.outputs)
    return found


def test_nested_calls_and_attributes() -> None:
    text = (
        HEAD
        + """(float[2,3] x) => (float[2,3] y)
    { a = my.outer<k = 0.5>(x) b = my.outer(a) y = my.outer<k = 0.1>(b) }
    <opset_import: ["": 18, "my": 1], domain: "my"> outer<k: float = 0.25> (p) => (q)
    { r = my.inner<m: float = @k>(p) q = Neg(r) }
    <opset_import: ["": 18], domain: "my"> inner<m> (s) => (t) { u = LeakyRelu<alpha: float = @m>(s) t = Exp(u) }"""
    )
    result, records = run_pass(text, InlineFunctions)
    assert op_types(result) == ["LeakyRelu", "Exp", "Neg"] * 3
    assert not result.functions
    assert applications(records) == 1
    assert len(set(names(result))) == len(names(result))
    assert_same_bits(text, result, X)


def test_calls_in_bodies_and_bodies_in_functions() -> None:
    text = (
        HEAD
        + """(float[2,3] x, bool c) => (float[2,3] y) {
      r = my.f(x, c)
      y = If(c) <then_branch = t () => (float[2,3] p) { p = my.f(r, c) }, else_branch = e () => (float[2,3] q)
      { s = my.f(x, c) q = my.f(s, c) }> }
    <opset_import: ["": 18], domain: "my"> f (a, d) => (b) {
      r = Neg(a)
      b = If(d) <then_branch = t () => (float[2,3] p) { p = Exp(r) },
          else_branch = e () => (float[2,3] q) { s = Abs(r) q = Sin(s) }> }"""
    )
    result, _ = run_pass(text, InlineFunctions)
    assert "f" not in op_types(result)
    assert len(set(names(result))) == len(names(result))
    assert_same_bits(text, result, X | {"c": np.array(True)}, X | {"c": np.array(False)})


def test_interface_survives_functions_that_return_what_they_are_given() -> None:
    text = (
        HEAD
        + """(float[2,3] x) => (float[2,3] y, float[2,3] z, float[2,3] v, float[2,3] w) {
      y, z = my.twice(x) v = my.same(x) w = my.same(v) }
    <opset_import: ["": 18], domain: "my"> twice (a) => (b, b2) { b = Neg(a) b2 = Identity(b) }
    <opset_import: ["": 18], domain: "my"> same (a) => (a) { }"""
    )
    proto = onnx.parser.parse_model(text.replace("(a) => (a) { }", "(a) => (a) { unused = Neg(a) }"))
    del proto.functions[0].node[1]
    proto.functions[0].output[1] = "b"
    result, _ = run_pass(proto, InlineFunctions)
    assert [v.name for v in result.graph.inputs] == ["x"]
    assert [v.name for v in result.graph.outputs] == ["y", "z", "v", "w"]
    for found, expected in zip(run_ort(result, X), [-X["x"], -X["x"], X["x"], X["x"]], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_missing_inputs_and_outputs() -> None:
    text = (
        HEAD
        + """(float[2,3] x) => (float[2,3] y) { y = my.f(x) }
    <opset_import: ["": 18], domain: "my"> f (a, low) => (b, c) { b = Clip(a, low) c = Neg(a) }"""
    )
    result, _ = run_pass(text, InlineFunctions)
    assert op_types(result)[0] == "Clip"
    # ONNX Runtime does not load the original: its call leaves the second output out.
    np.testing.assert_array_equal(run_ort(result, X)[0], X["x"])


def test_functions_of_custom_operators_stay() -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "graphopt": 1, "my": 1]> g (float[2,3] x) => (float[2,3] y)
    { a = graphopt.Op(x) y = my.f(a) }
    <opset_import: ["": 18, "my": 1], domain: "graphopt"> Op (a) => (b) { b = my.f(a) }
    <opset_import: ["": 18], domain: "my"> f (a) => (b) { b = Neg(a) }"""
    result, _ = run_pass(text, InlineFunctions)
    assert op_types(result) == ["Op", "Neg"]
    assert list(result.functions) == [("graphopt", "Op", "")]
    assert [n.op_type for n in result.functions["graphopt", "Op", ""]] == ["Neg"]
    assert_same_bits(text, result, X)


@pytest.mark.parametrize(("op", "goes"), [("Neg", True), ("ReduceMax<axes = [1], keepdims = 1>", False)])
def test_another_opset_is_taken_where_it_means_the_same(op: str, goes: bool) -> None:
    text = (
        HEAD
        + f"""(float[2,3] x) => (float[2,m] y) {{ y = my.f(x) }}
    <opset_import: ["": 13], domain: "my"> f (a) => (b) {{ b = {op}(a) }}"""
    )
    result, records = run_pass(text, InlineFunctions)
    assert bool(result.functions) is not goes
    assert bool(records[0].near_misses) is not goes


def test_circles_stay() -> None:
    text = (
        HEAD
        + """(float[2,3] x) => (float[2,3] y) { a = my.f(x) y = my.h(a) }
    <opset_import: ["": 18, "my": 1], domain: "my"> f (a) => (b) { b = my.k(a) }
    <opset_import: ["": 18, "my": 1], domain: "my"> k (a) => (b) { b = my.f(a) }
    <opset_import: ["": 18], domain: "my"> h (a) => (b) { b = Neg(a) }"""
    )
    result, _ = run_pass(text, InlineFunctions)
    assert op_types(result) == ["f", "Neg"]
    assert sorted(key[1] for key in result.functions) == ["f", "k"]


def test_model_without_functions_is_left_alone() -> None:
    _, records = run_pass(HEAD + "(float[2,3] x) => (float[2,3] y) { y = Neg(x) }", InlineFunctions)
    assert applications(records) == 0
