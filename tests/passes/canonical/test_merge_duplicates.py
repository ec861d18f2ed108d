from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.passes.canonical.merge_duplicates import MergeDuplicates
from tests.passes.common import applications, assert_same_bits, op_types, run_pass

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
HEAD = '<ir_version: 8, opset_import: ["": 18]> g '


def text(body: str, outputs: str = "float[2,3] y", inputs: str = "float[2,3] x", weights: str = "") -> str:
    return f"{HEAD} ({inputs}) => ({outputs}) {weights} {{ {body} }}"


def test_equal_nodes_merge_through_chains() -> None:
    model = text("a = Exp(x) b = Exp(x) c = Neg(a) d = Neg(b) y = Add(c, d)")
    result, _ = run_pass(model, MergeDuplicates)
    assert op_types(result) == ["Exp", "Neg", "Add"]
    assert_same_bits(model, result, X)


@pytest.mark.parametrize(
    "body",
    [
        "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x) y = Add(a, b)",
        "a = Softmax<axis = 0>(x) b = Softmax<axis = 1>(x) y = Add(a, b)",
        "a = Sub(x, w) b = Sub(w, x) y = Add(a, b)",
        "a = Exp(x) b = Log(x) y = Add(a, b)",
        "a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x) y = Add(a, b)",
    ],
)
def test_different_nodes_stay(body: str) -> None:
    _, records = run_pass(text(body, weights="<float[3] w = {1,2,3}>"), MergeDuplicates)
    assert applications(records) == 0


@pytest.mark.parametrize(
    "op", ["RandomNormalLike(x)", "RandomUniformLike(x)", "Bernoulli(x)", "RandomNormal<shape = [2,3]>()"]
)
def test_random_operators_stay(op: str) -> None:
    _, records = run_pass(text(f"a = {op} b = {op} y = Sub(a, b)"), MergeDuplicates)
    assert applications(records) == 0


def test_other_domains_and_bodies_stay() -> None:
    branch = "then_branch = t () => (float[2,3] p) { p = Exp(x) }, else_branch = e () => (float[2,3] q) { q = Neg(x) }"
    model = text(f"a = If(c) <{branch}> b = If(c) <{branch}> y = Add(a, b)", inputs="float[2,3] x, bool c")
    _, records = run_pass(model, MergeDuplicates)
    assert applications(records) == 0
    custom = text("a = my.Op(x) b = my.Op(x) y = Add(a, b)").replace('["": 18]', '["": 18, "my": 1]')
    _, records = run_pass(custom, MergeDuplicates)
    assert applications(records) == 0


def test_body_reads_what_stands_before_it_and_siblings_share_nothing() -> None:
    model = text(
        "a = Exp(x) y = If(c) <then_branch = t () => (float[2,3] p) { r = Exp(x) p = Neg(r) }, "
        "else_branch = e () => (float[2,3] q) { s = Abs(x) u = Neg(s) v = Exp(x) q = Add(u, v) }> "
        "z = If(d) <then_branch = t () => (float[2,3] p) { r = Abs(x) p = Neg(r) }, "
        "else_branch = e () => (float[2,3] q) { q = Abs(x) }> b = Abs(x) w = Add(a, b)",
        inputs="float[2,3] x, bool c, bool d",
        outputs="float[2,3] y, float[2,3] z, float[2,3] w",
    )
    result, records = run_pass(model, MergeDuplicates)
    assert applications(records) == 2
    assert op_types(result).count("Exp") == 1
    assert op_types(result).count("Abs") == 4
    feeds = [X | {"c": np.array(c), "d": np.array(d)} for c in (True, False) for d in (True, False)]
    assert_same_bits(model, result, *feeds)


def test_both_returned_keep_their_names() -> None:
    model = text("y = Exp(x) z = Exp(x) a = Exp(x) w = Neg(a)", "float[2,3] y, float[2,3] z, float[2,3] w")
    result, _ = run_pass(model, MergeDuplicates)
    assert [o.name for o in result.graph.outputs] == ["y", "z", "w"]
    assert op_types(result).count("Exp") == 1
    assert_same_bits(model, result, X)


def test_loop_body_uses_a_value_computed_outside() -> None:
    model = text(
        "n = Constant<value_int = 3>() t = Constant<value = bool {1}>() e = Exp(x) y = Loop(n, t, e) <body = b "
        "(int64 i, bool c, float[2,3] s) => (bool d, float[2,3] u) { d = Identity(c) f = Exp(x) u = Add(s, f) }>"
    )
    result, _ = run_pass(model, MergeDuplicates)
    assert op_types(result).count("Exp") == 1
    assert_same_bits(model, result, X)


def test_equal_constants_merge_by_bytes() -> None:
    model = text(
        "a = Add(x, w) b = Add(a, v) c = Add(b, z) y = Add(c, u)",
        weights="<float[3] w = {1,2,0}, float[3] v = {1,2,0}, float[3] z = {1,2,-0.0}, float[1,3] u = {1,2,0}>",
    )
    result, _ = run_pass(model, MergeDuplicates)
    assert sorted(result.graph.initializers) == ["u", "w", "z"]
    assert_same_bits(model, result, X)


def test_types_are_told_apart() -> None:
    model = text(
        "a = Cast<to = 1>(i) b = Cast<to = 1>(j) y = Add(a, b)",
        inputs="float x",
        weights="<int32[2] i = {1,0}, int64[1] j = {1}>",
        outputs="float[2] y",
    )
    _, records = run_pass(model, MergeDuplicates)
    assert applications(records) == 0


def test_overridable_constants_stay() -> None:
    proto = onnx.parser.parse_model(text("a = Add(x, w) y = Add(a, v)", inputs="float[2,3] x, float[3] w"))
    for name in ("w", "v"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), name))
    _, records = run_pass(proto, MergeDuplicates)
    assert applications(records) == 0


def test_large_external_weights_merge_by_place_and_are_not_read(tmp_path: Path) -> None:
    weight = np.ones(300_000, np.float32)
    (tmp_path / "w.bin").write_bytes(weight.tobytes() * 2)

    def external(name: str, offset: int) -> ir.Value:
        tensor = ir.ExternalTensor(
            "w.bin", offset, weight.nbytes, ir.DataType.FLOAT, shape=ir.Shape([300_000]), name=name, base_dir=tmp_path
        )
        return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([300_000]), const_value=tensor)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    weights = [external("a", 0), external("b", 0), external("c", weight.nbytes)]
    nodes = [ir.node("Add", [x, weights[0]])]
    nodes.extend(ir.node("Add", [nodes[-1].outputs[0], w]) for w in weights[1:2])
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], weights[2]]))
    output = nodes[-1].outputs[0]
    output.name, output.type = "y", x.type
    graph = ir.Graph([x], [output], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="g")
    result, _ = run_pass(ir.Model(graph, ir_version=8), MergeDuplicates)
    assert sorted(result.graph.initializers) == ["a", "c"]
    assert all(w.const_value.raw is None for w in result.graph.initializers.values())  # not mapped into memory


def test_functions_are_cleaned_too() -> None:
    model = """<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[2,3] x) => (float[2,3] y)
    { y = my.f<k = 0.5>(x) }
    <opset_import: ["": 18], domain: "my"> f<k> (a) => (b) { c = LeakyRelu<alpha: float = @k>(a)
    d = LeakyRelu<alpha: float = @k>(a) b = Add(c, d) }"""
    result, _ = run_pass(model, MergeDuplicates)
    assert [n.op_type for n in result.functions["my", "f", ""]] == ["LeakyRelu", "Add"]
    assert_same_bits(model, result, X)
