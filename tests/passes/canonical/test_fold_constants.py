from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.canonical.fold_constants import FoldConstants
from tests.passes.common import applications, assert_same_bits, op_types, run_ort, run_pass

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


def text(
    body: str,
    inputs: str = "float[2,3] x",
    outputs: str = "float[2,3] y",
    weights: str = "",
    opset: int = 18,
) -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {weights} {{ {body} }}'


def test_constant_nodes_become_initializers_in_bodies_too() -> None:
    model = text(
        "k = Constant<value_float = 2.0>() a = Mul(x, k) y = If(c) <then_branch = t () => (float[2,3] p) "
        "{ l = Constant<value = float[3] {1,2,3}>() p = Add(a, l) }, else_branch = e () => (float[2,3] q) "
        "{ m = Constant<value_floats = [1.0]>() q = Sub(a, m) }>",
        "float[2,3] x, bool c",
    )
    result, _ = run_pass(model, FoldConstants)
    assert "Constant" not in op_types(result, constants=True)
    assert_same_bits(model, result, X | {"c": np.array(True)}, X | {"c": np.array(False)})


def test_functions_keep_constant_nodes() -> None:
    model = """<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[2,3] x) => (float[2,3] y) { y = my.f(x) }
    <opset_import: ["": 18], domain: "my"> f (a) => (b)
    { c = Constant<value_float = 2.0>() d = Sqrt(c) b = Mul(a, d) }"""
    result, _ = run_pass(model, FoldConstants)
    function = result.functions["my", "f", ""]
    assert [n.op_type for n in function] == ["Constant", "Mul"]
    assert_same_bits(model, result, X)


def test_chain_is_one_application_and_runtime_bits_are_kept() -> None:
    weights = "<float[3] w = {0.1, 2.5, 30}, float[1] h = {0.3}>"
    model = text("a = Exp(w) b = Mul(a, h) c = Tanh(b) d = ReduceSum(c) e = Pow(d, h) y = Add(x, e)", weights=weights)
    result, records = run_pass(model, FoldConstants)
    assert op_types(result) == ["Add"]
    assert applications(records) == 1
    assert_same_bits(model, result, X)


def test_without_a_runtime_only_exact_operators_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    model = text("a = Exp(w) b = Mul(w, w) c = Add(x, a) y = Add(c, b)", weights="<float[3] w = {0.1, 2.5, 3}>")
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["Exp", "Add", "Add"]
    assert_same_bits(model, result, X)


def test_node_that_the_runtime_refuses_does_not_keep_others_from_folding() -> None:
    proto = onnx.parser.parse_model(
        text(
            "a = Exp(w) b = Gelu(w) c = Tanh(b) d = Log(v) e = Add(x, a) f = Add(e, c) y = Add(f, d)",
            weights="<float[3] w = {0.1, 2.5, 3}, float[3] v = {1, 2, 3}>",
        )
    )  # Gelu came with opset 20
    result, records = run_pass(proto, FoldConstants)
    assert op_types(result) == ["Gelu", "Tanh", "Add", "Add", "Add"]
    assert records[0].error == ""


@pytest.mark.parametrize(
    "node",
    ["RandomNormalLike(w)", "Bernoulli(w)", "QuantizeLinear(w, s)", "DequantizeLinear(i, s)"],
)
def test_random_and_quantised_stay(node: str) -> None:
    model = text(
        f"a = {node} b = Cast<to = 1>(a) y = Add(x, b)",
        weights="<float[3] w = {0.1, 0.5, 0.3}, float s = {0.5}, int8[3] i = {1,2,3}>",
    )
    result, records = run_pass(model, FoldConstants)
    assert applications(records) == 0
    assert len(op_types(result)) == 3


def test_other_domains_and_overridable_inputs_stay() -> None:
    model = text("a = my.Op(w) y = Add(x, a)", weights="<float[3] w = {1,2,3}>").replace("18]", '18, "my": 1]')
    _, records = run_pass(model, FoldConstants)
    assert applications(records) == 0
    proto = onnx.parser.parse_model(text("a = Neg(w) y = Add(x, a)", "float[2,3] x, float[3] w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "w"))
    _, records = run_pass(proto, FoldConstants)
    assert applications(records) == 0


def test_result_that_grows_the_file_stays() -> None:
    model = text(
        "s = Constant<value_ints = [300, 300]>() a = ConstantOfShape(s) b = ReduceSum<keepdims = 0>(a) y = Add(x, b)"
    )
    result, _ = run_pass(model, FoldConstants)
    assert "ConstantOfShape" in op_types(result)
    tile = text(
        "s = Constant<value_ints = [9000, 9]>() a = Tile(w, s) b = ReduceSum<keepdims = 0>(a) y = Add(x, b)",
        weights="<float[1,3] w = {1,2,3}>",
    )
    result, _ = run_pass(tile, FoldConstants)
    assert "Tile" in op_types(result)


def test_narrow_floats_that_round_stay() -> None:
    model = text(
        "a = Cast<to = 10>(w) b = Cast<to = 10>(v) c = Cast<to = 1>(a) d = Cast<to = 1>(b) e = Add(x, c) y = Add(e, d)",
        weights="<float[3] w = {0.1, 2.5, 3}, float[3] v = {0.5, 2, 3}>",
    )
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["Cast", "Cast", "Add", "Add"]
    assert_same_bits(model, result, X)


def test_returned_constants_keep_their_names() -> None:
    model = text(
        "y = Neg(w) z = Identity(w) a = Exp(w) b = Log(a) v = Add(x, b)",
        outputs="float[3] y, float[3] z, float[3] a, float[2,3] v",
        weights="<float[3] w = {0.1, 2.5, 3}>",
    )
    result, _ = run_pass(model, FoldConstants)
    assert [o.name for o in result.graph.outputs] == ["y", "z", "a", "v"]
    assert sorted(op_types(result)) == ["Add", "Identity", "Identity", "Identity"]
    assert_same_bits(model, result, X)


def test_second_reader_of_a_folded_value() -> None:
    model = text(
        "a = Sqrt(w) b = Neg(a) c = Add(x, a) y = Mul(c, b)",
        weights="<float[3] w = {0.1, 2.5, 3}>",
    )
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["Add", "Mul"]
    assert_same_bits(model, result, X)


def test_skipped_fold_stays() -> None:
    model = text("a = Sqrt(w) y = Add(x, a)", weights="<float[3] w = {0.1, 2.5, 3}>")
    _, records = run_pass(model, FoldConstants, skip=["fold-constants:constant@a"])
    assert applications(records) == 0


# -- large weights -----------------------------------------------------------------------------------------------------


def _external_model(folder: Path, *, second_reader: bool = False) -> tuple[ir.Model, np.ndarray]:
    weight = np.arange(1200 * 700, dtype=np.float32).reshape(1200, 700) / 1e5
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["t"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["d"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "h"], ["m"]),
        helper.make_node("Split", ["m"], ["p", "q"], axis=1, num_outputs=2),
        helper.make_node("MatMul", ["x", "p"], ["u"]),
        helper.make_node("MatMul", ["x", "q"], ["v"]),
        helper.make_node("Concat", ["u", "v"], ["y"], axis=1),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1200])]
    if second_reader:
        nodes.append(helper.make_node("Gemm", ["x", "w"], ["z"], transB=1))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 1200]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 700])],
        outputs,
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(0.3, np.float32), "h")],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=1024)
    return ir.load(folder / "m.onnx"), weight


def test_large_weights_are_computed_when_saved_and_not_before(tmp_path: Path) -> None:
    model, _ = _external_model(tmp_path)
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["MatMul", "MatMul", "Concat"]
    large = [v.const_value for v in result.graph.initializers.values() if v.const_value.nbytes > 1e5]
    assert [type(t) for t in large] == [ir.LazyTensor, ir.LazyTensor]
    assert model.graph.initializers["w"].const_value.raw is None
    assert_same_bits(onnx.load(tmp_path / "m.onnx"), result, {"x": np.ones((2, 700), np.float32) / 3})


def test_large_weight_is_mapped_by_the_result_only(tmp_path: Path) -> None:
    model, weight = _external_model(tmp_path)
    source = model.graph.initializers["w"].const_value
    result, _ = run_pass(model, FoldConstants)
    for value in result.graph.initializers.values():
        value.const_value.numpy()
    assert isinstance(source, ir.ExternalTensor)
    assert source.raw is None  # a view of its own was read and let go of
    np.testing.assert_array_equal(source.numpy(), weight)


def test_large_weight_with_another_reader_is_not_stored_twice(tmp_path: Path) -> None:
    model, _ = _external_model(tmp_path, second_reader=True)
    result, records = run_pass(model, FoldConstants)
    assert "Transpose" in op_types(result)
    assert any("beside what others read" in reason for reason in records[0].near_misses.values())
    assert sum(v.const_value.nbytes for v in result.graph.initializers.values()) < 3_400_000


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_reshape_to_axes_of_its_input_gets_a_constant_target() -> None:
    model = text(
        "s = Shape(x) i = Constant<value_int = 0>() j = Constant<value_int = 1>() b = Gather(s, i) t = Gather(s, j) "
        "z = Constant<value_ints = [0]>() h = Constant<value_ints = [4]>() k = Constant<value_ints = [2]>() "
        "bu = Unsqueeze(b, z) tu = Unsqueeze(t, z) to = Concat<axis = 0>(bu, tu, h, k) r = Reshape(x, to) "
        "n = Neg(r) e = Constant<value_ints = [8]>() back = Concat<axis = 0>(bu, tu, e) y = Reshape(n, back)",
        "float[batch,time,8] x",
        "float[batch,time,8] y",
    )
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["Reshape", "Neg", "Reshape"]
    feeds = [
        {"x": np.random.default_rng(0).standard_normal(s).astype(np.float32)} for s in ((2, 3, 8), (1, 1, 8), (0, 3, 8))
    ]
    assert_same_bits(model, result, *feeds)


def test_flattening_leaves_one_axis_open() -> None:
    model = text(
        "s = Shape(x) i = Constant<value_int = 0>() j = Constant<value_int = 1>() b = Gather(s, i) t = Gather(s, j) "
        "p = Mul(b, t) z = Constant<value_ints = [0]>() pu = Unsqueeze(p, z) e = Constant<value_ints = [8]>() "
        "to = Concat<axis = 0>(pu, e) y = Reshape(x, to)",
        "float[batch,time,8] x",
        "float[m,8] y",
    )
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["Reshape"]
    assert_same_bits(model, result, {"x": np.zeros((2, 3, 8), np.float32)}, {"x": np.zeros((0, 3, 8), np.float32)})


def test_target_with_other_readers_or_other_axes_stays() -> None:
    model = text("s = Shape(x) y = Reshape(w, s)", "float[a,b] x, float[c,d] w", "float[e,f] y")
    _, records = run_pass(model, FoldConstants)
    assert applications(records) == 0
    model = text(
        "s = Shape(x) n = Neg(x) y = Reshape(n, s) z = Cast<to = 1>(s)", "float[a,b] x", "float[a,b] y, float[2] z"
    )
    result, records = run_pass(model, FoldConstants)
    assert "Shape" in op_types(result)
    assert any("others read" in reason for reason in records[0].near_misses.values())


def test_known_axes_become_constants_and_tell_further_shapes() -> None:
    model = text(
        "s = Shape(x) i = Constant<value_ints = [2]>() c = Gather(s, i) h = Constant<value_ints = [2]>() d = Div(c, h) "
        "to = Concat<axis = 0>(h, d, h) z = Constant<value_ints = [0]>() m = Mul(to, h) e = Expand(z, m) "
        "u = Shape(e) w = Cast<to = 1>(u) y = ReduceSum<keepdims = 0>(w)",
        "float[n,t,8] x",
        "float y",
    )
    result, _ = run_pass(model, FoldConstants)
    assert op_types(result) == ["Identity"]
    assert_same_bits(model, result, {"x": np.zeros((2, 3, 8), np.float32)})


@pytest.mark.parametrize("opset", [9, 13, 15, 21])
def test_shape_with_start_and_end(opset: int) -> None:
    attributes = {"start": 1, "end": -1} if opset >= 15 else {}
    nodes = [helper.make_node("Shape", ["x"], ["s"], **attributes), helper.make_node("Identity", ["s"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
    )
    proto = helper.make_model(graph, ir_version=7, opset_imports=[helper.make_opsetid("", opset)])
    result, _ = run_pass(proto, FoldConstants)
    assert op_types(result) == ["Identity"]
    (found,) = run_ort(result, {"x": np.zeros((2, 3, 4), np.float32)})
    assert found.tolist() == ([3] if opset >= 15 else [2, 3, 4])


def test_loop_body_folds_what_does_not_change() -> None:
    model = text(
        "n = Constant<value_int = 3>() t = Constant<value = bool {1}>() y = Loop(n, t, x) <body = b "
        "(int64 i, bool c, float[2,3] s) => (bool d, float[2,3] u) { d = Identity(c) f = Exp(w) g = Cast<to = 1>(i) "
        "h = Mul(f, g) u = Add(s, h) }>",
        weights="<float[3] w = {0.1, 2.5, 3}>",
    )
    result, _ = run_pass(model, FoldConstants)
    assert "Exp" not in op_types(result)
    assert "Cast" in op_types(result)
    assert_same_bits(model, result, X)
