from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.canonical.remove_identities import RemoveIdentities
from tests.passes.common import applications, assert_same_bits, op_types, run_pass

RNG = np.random.default_rng(0)


def model(body: str, *, inputs: str = "float[2,3] x", outputs: str = "float[a,b] y", opset: int = 18) -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'


def feed(*shape: int) -> dict[str, np.ndarray]:
    return {"x": RNG.standard_normal(shape).astype(np.float32)}


GONE = {
    "Identity": "a = Neg(x) b = Identity(a) y = Exp(b)",
    "Dropout": "a = Neg(x) b = Dropout(a) y = Exp(b)",
    "Cast": "a = Neg(x) b = Cast<to = 1>(a) y = Exp(b)",
    "Transpose": "a = Neg(x) b = Transpose<perm = [0, 1]>(a) y = Exp(b)",
    "Reshape": "s = Constant<value_ints = [2, 3]>() a = Neg(x) b = Reshape(a, s) y = Exp(b)",
    "Reshape0": "s = Constant<value_ints = [0, -1]>() a = Neg(x) b = Reshape(a, s) y = Exp(b)",
    "Flatten": "a = Neg(x) b = Flatten<axis = 1>(a) y = Exp(b)",
    "Squeeze": "s = Constant<value_ints = [0]>() a = Neg(x) b = Unsqueeze(a, s) c = Squeeze(b, s) y = Exp(c)",
    "Unsqueeze": "s = Constant<value_ints = [-1]>() a = Neg(x) b = Unsqueeze(a, s) c = Squeeze(b, s) y = Exp(c)",
    "Slice": "s = Constant<value_ints = [0]>() e = Constant<value_ints = [9223372036854775807]>() a = Neg(x) "
    "b = Slice(a, s, e, s) y = Exp(b)",
    "SliceNegative": "s = Constant<value_ints = [-3]>() e = Constant<value_ints = [3]>() "
    "i = Constant<value_ints = [1]>() a = Neg(x) b = Slice(a, s, e, i) y = Exp(b)",
    "Pad": "s = Constant<value_ints = [0, 0, 0, 0]>() a = Neg(x) b = Pad(a, s) y = Exp(b)",
    "Concat": "a = Neg(x) b = Concat<axis = 0>(a) y = Exp(b)",
    "Sum": "a = Neg(x) b = Sum(a) c = Max(b) d = Min(c) e = Mean(d) y = Exp(e)",
    "Split": "a = Neg(x) b = Split<axis = 0, num_outputs = 1>(a) y = Exp(b)",
    "Expand": "s = Constant<value_ints = [2, 1]>() a = Neg(x) b = Expand(a, s) y = Exp(b)",
    "Tile": "s = Constant<value_ints = [1, 1]>() a = Neg(x) b = Tile(a, s) y = Exp(b)",
    "Mul": "s = Constant<value_float = 1.0>() a = Neg(x) b = Mul(s, a) c = Div(b, s) y = Exp(c)",
    "Gather": "s = Constant<value_ints = [0, 1]>() a = Neg(x) b = Gather<axis = 0>(a, s) y = Exp(b)",
    "Neg": "b = Neg(x) c = Neg(b) d = Neg(c) y = Exp(d)",
    "CastBack": "a = Neg(x) b = Cast<to = 11>(a) c = Cast<to = 1>(b) y = Exp(c)",
}


@pytest.mark.parametrize("name", GONE)
def test_node_that_does_nothing_goes(name: str) -> None:
    text = model(GONE[name])
    result, _ = run_pass(text, RemoveIdentities)
    assert op_types(result) == ["Neg", "Exp"]
    assert_same_bits(text, result, feed(2, 3))


STAYS = {
    "Cast": "a = Cast<to = 10>(x) b = Cast<to = 1>(a) y = Exp(b)",
    "Transpose": "a = Transpose(x) y = Exp(a)",
    "Reshape": "s = Constant<value_ints = [3, 2]>() a = Reshape(x, s) y = Exp(a)",
    "Flatten": "a = Flatten<axis = 0>(x) y = Exp(a)",
    "Slice": "s = Constant<value_ints = [0]>() e = Constant<value_ints = [-1]>() a = Slice(x, s, e) y = Exp(a)",
    "SliceStep": "s = Constant<value_ints = [-1]>() e = Constant<value_ints = [-9]>() i = Constant<value_ints = [1]>() "
    "a = Slice(x, s, e, i, s) y = Exp(a)",
    "Pad": "s = Constant<value_ints = [0, 0, 0, 1]>() a = Pad(x, s) y = Exp(a)",
    "Concat": "a = Concat<axis = 0>(x, x) y = Exp(a)",
    "Expand": "s = Constant<value_ints = [2, 2, 3]>() a = Expand(x, s) b = ReduceSum<keepdims = 0>(a) y = Exp(b)",
    "Tile": "s = Constant<value_ints = [2, 1]>() a = Tile(x, s) y = Exp(a)",
    "Add0": "s = Constant<value_float = 0.0>() a = Add(x, s) y = Exp(a)",
    "Mul": "s = Constant<value = float[1,1,1] {1}>() a = Mul(x, s) b = ReduceSum<keepdims = 0>(a) y = Exp(b)",
    "DivOfOne": "s = Constant<value_float = 1.0>() a = Div(s, x) y = Exp(a)",
    "Gather": "s = Constant<value_ints = [1, 0]>() a = Gather<axis = 0>(x, s) y = Exp(a)",
    "GatherFirst": "s = Constant<value_ints = [0]>() a = Gather<axis = 0>(x, s) y = Exp(a)",
    "Squeeze": "s = Constant<value_ints = [0]>() t = Constant<value_ints = [1]>() "
    "u = Constant<value_ints = [1, 2, 3]>() "
    "r = Reshape(x, u) b = Squeeze(r, s) c = Unsqueeze(b, t) d = ReduceSum<keepdims = 0>(c, s) y = Exp(d)",
    "Dropout": "r = Constant<value_float = 0.5>() t = Constant<value = bool {1}>() s = Constant<value_float = 0.0>() "
    "a = Dropout(x, s, t) y = Exp(a)",
    "Mask": "a, m = Dropout(x) c = Cast<to = 1>(m) y = Add(a, c)",
}


@pytest.mark.parametrize("name", STAYS)
def test_node_that_does_something_stays(name: str) -> None:
    text = model(STAYS[name], outputs="float y" if "keepdims = 0" in STAYS[name] else "float[a,b] y")
    text = text.replace("float y", "float[] y") if name in ("Expand", "Mul") else text
    text = text.replace("float y", "float[a,b] y")
    result, records = run_pass(text, RemoveIdentities)
    assert applications(records) == 0
    assert_same_bits(text, result, feed(2, 3))


def test_one_that_makes_a_scalar_larger_stays() -> None:
    text = model("s = Constant<value = float[1] {1}>() y = Mul(x, s)", inputs="float x", outputs="float[1] y")
    _, records = run_pass(text, RemoveIdentities)
    assert applications(records) == 0


def test_unknown_size_keeps_slice_and_reshape() -> None:
    text = model(
        "s = Constant<value_ints = [0]>() e = Constant<value_ints = [8]>() t = Constant<value_ints = [-1, 3]>() "
        "a = Slice(x, s, e, s) b = Reshape(a, t) y = Exp(b)",
        inputs="float[n,3] x",
    )
    result, _ = run_pass(text, RemoveIdentities)
    assert "Slice" in op_types(result)
    assert_same_bits(text, result, feed(2, 3), feed(9, 3), feed(0, 3))


def test_declared_shape_that_is_wrong_is_not_believed() -> None:
    proto = onnx.parser.parse_model(
        model(
            "c = Identity(s) a = Reshape(x, c) y = Exp(a)",
            inputs="float[2,3] x, int64[2] s",
        )
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 3]))
    result, _ = run_pass(proto, RemoveIdentities)
    assert "Reshape" in op_types(result)
    assert_same_bits(proto, result, feed(2, 3) | {"s": np.array([3, 2])})


def test_outputs_keep_their_names_and_places() -> None:
    text = model(
        "a = Exp(x) y = Identity(a) z = Identity(a) w = Identity(x) v = Identity(y)",
        outputs="float[2,3] y, float[2,3] z, float[2,3] w, float[2,3] v",
    )
    result, _ = run_pass(text, RemoveIdentities)
    assert [o.name for o in result.graph.outputs] == ["y", "z", "w", "v"]
    assert op_types(result) == ["Exp", "Identity", "Identity", "Identity"]
    assert_same_bits(text, result, feed(2, 3))


def test_body_keeps_the_identity_that_names_an_outer_value() -> None:
    text = model(
        "a = Exp(x) y = If(c) <then_branch = t () => (float[2,3] p) { p = Identity(a) }, "
        "else_branch = e () => (float[2,3] q) { r = Neg(a) s = Identity(r) q = Exp(s) }>",
        inputs="float[2,3] x, bool c",
    )
    result, _ = run_pass(text, RemoveIdentities)
    assert sorted(op_types(result)) == ["Exp", "Exp", "Identity", "If", "Neg"]
    assert_same_bits(text, result, feed(2, 3) | {"c": np.array(True)}, feed(2, 3) | {"c": np.array(False)})


def test_loop_that_returns_what_it_carries_keeps_its_identities() -> None:
    text = model(
        "n = Constant<value_int = 3>() t = Constant<value = bool {1}>() y, z = Loop(n, t, x) <body = b "
        "(int64 i, bool c, float[2,3] s) => (bool d, float[2,3] u, float[2,3] v) { d = Identity(c) w = Add(s, s) "
        "u = Identity(w) v = Identity(w) }>",
        outputs="float[2,3] y, float[3,2,3] z",
    )
    result, _ = run_pass(text, RemoveIdentities)
    assert_same_bits(text, result, feed(2, 3))


@settings(max_examples=60, deadline=None)
@given(
    perms=st.integers(1, 4).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=2, max_size=4)),
    second_reader=st.booleans(),
    returned=st.booleans(),
)
def test_transposes_merge(perms: list[list[int]], second_reader: bool, returned: bool) -> None:
    rank = len(perms[0])
    names = ["x", *(f"t{i}" for i in range(len(perms) - 1)), "y"]
    nodes = [helper.make_node("Transpose", [a], [b], perm=p) for a, b, p in zip(names, names[1:], perms, strict=False)]
    outputs = ["y"]
    if second_reader:
        nodes.append(helper.make_node("Neg", ["t0"], ["z"]))
        outputs.append("z")
    if returned:
        outputs.append("t0")
    proto = _model(nodes, [("x", [2, 3, 4, 5][:rank])], outputs)
    result, _ = run_pass(proto, RemoveIdentities)
    if not second_reader and not returned:
        assert op_types(result).count("Transpose") <= 1
    assert_same_bits(proto, result, feed(*[2, 3, 4, 5][:rank]))


@settings(max_examples=80, deadline=None)
@given(
    first=st.sampled_from([[6, 4], [2, 12], [24], [2, 3, 4], [1, 24, 1], [0, -1]]),
    second=st.sampled_from([[4, 6], [0, -1], [-1], [2, 0, 4], [0, 0, 2], [24, 1], [2, 3, 4]]),
    static=st.booleans(),
)
def test_reshape_chains_keep_the_result(first: list[int], second: list[int], static: bool) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    try:
        middle = x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(first)])
        middle.reshape([middle.shape[i] if d == 0 else d for i, d in enumerate(second)])
    except (ValueError, IndexError):
        return
    nodes = [helper.make_node("Reshape", ["x", "a"], ["m"]), helper.make_node("Reshape", ["m", "b"], ["y"])]
    proto = _model(
        nodes, [("x", [2, 3, 4] if static else ["n", "m", "k"])], ["y"], {"a": np.array(first), "b": np.array(second)}
    )
    result, _ = run_pass(proto, RemoveIdentities)
    assert_same_bits(proto, result, {"x": x})


_TYPES = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_]


@settings(max_examples=80, deadline=None)
@given(source=st.sampled_from(_TYPES), middle=st.sampled_from(_TYPES), target=st.sampled_from(_TYPES))
def test_cast_chains_keep_the_result(source: type, middle: type, target: type) -> None:
    values = np.array([0, 1, 2, 3.5, 100, 127], np.float64).astype(source)
    kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(t)) for t in (source, middle, target)]
    nodes = [
        helper.make_node("Cast", ["x"], ["m"], to=kinds[1]),
        helper.make_node("Cast", ["m"], ["y"], to=kinds[2]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kinds[0], [6])],
        [helper.make_tensor_value_info("y", kinds[2], [6])],
    )
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 19)])
    result, _ = run_pass(proto, RemoveIdentities)
    assert_same_bits(proto, result, {"x": values})


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 18, 21])
def test_squeeze_of_unsqueeze_in_every_spelling(opset: int) -> None:
    if opset < 13:
        nodes = [
            helper.make_node("Unsqueeze", ["x"], ["a"], axes=[0, 2]),
            helper.make_node("Squeeze", ["a"], ["b"], axes=[2, 0]),
            helper.make_node("Exp", ["b"], ["y"]),
        ]
        proto = _model(nodes, [("x", [2, 3])], ["y"], opset=opset)
    else:
        nodes = [
            helper.make_node("Unsqueeze", ["x", "p"], ["a"]),
            helper.make_node("Squeeze", ["a", "q"], ["b"]),
            helper.make_node("Exp", ["b"], ["y"]),
        ]
        proto = _model(nodes, [("x", [2, 3])], ["y"], {"p": np.array([0, 2]), "q": np.array([-2, 0])}, opset)
    result, _ = run_pass(proto, RemoveIdentities)
    assert op_types(result) == ["Exp"]
    assert_same_bits(proto, result, feed(2, 3))


def test_overridable_constant_is_not_a_constant() -> None:
    nodes = [helper.make_node("Mul", ["x", "one"], ["y"])]
    proto = _model(nodes, [("x", [2, 3]), ("one", [1])], ["y"], {"one": np.ones(1, np.float32)})
    _, records = run_pass(proto, RemoveIdentities)
    assert applications(records) == 0


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, list[int | str]]],
    outputs: list[str],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
