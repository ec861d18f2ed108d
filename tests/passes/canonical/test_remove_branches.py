from __future__ import annotations

import numpy as np
import onnx
import pytest

from graphopt.passes.canonical.fold_constants import FoldConstants
from graphopt.passes.canonical.remove_branches import RemoveBranches
from tests.passes.common import applications, assert_same_bits, op_types, run_ort, run_pass

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
HEAD = '<ir_version: 8, opset_import: ["": 18]> g '
IF = "If({0}) <then_branch = t () => (float[2,3] p) {{ {1} }}, else_branch = e () => (float[2,3] q) {{ {2} }}>"


def text(body: str, inputs: str = "float[2,3] x", outputs: str = "float[2,3] y", weights: str = "") -> str:
    return f"{HEAD} ({inputs}) => ({outputs}) {weights} {{ {body} }}"


@pytest.mark.parametrize("condition", [0, 1])
def test_constant_condition_leaves_one_branch(condition: int) -> None:
    model = text(
        "a = Exp(x) b = " + IF.format("c", "r = Neg(a) p = Abs(r)", "q = Sin(a)") + " y = Cos(b)",
        weights=f"<bool c = {{{condition}}}>",
    )
    result, _ = run_pass(model, RemoveBranches)
    assert op_types(result) == (["Exp", "Neg", "Abs", "Cos"] if condition else ["Exp", "Sin", "Cos"])
    assert_same_bits(model, result, X)


def test_names_that_clash_are_made_unique() -> None:
    branch = "r = Neg(x) p = Abs(r)"
    model = text(
        f"r = Exp(x) a = {IF.format('c', branch, 'q = Sin(x)')} b = {IF.format('c', branch, 'q = Sin(x)')} "
        "p = Add(a, b) y = Add(p, r)",
        weights="<bool c = {1}>",
    ).replace("r = Neg(x) p = Abs(r)", "r1 = Neg(x) p1 = Abs(r1)")
    model = model.replace("(float[2,3] p) {", "(float[2,3] p1) {")
    result, _ = run_pass(model, RemoveBranches)
    assert "If" not in op_types(result)
    assert_same_bits(model, result, X)


def test_branch_with_constants_of_its_own_and_nested_bodies() -> None:
    inner = (
        "If(d) <then_branch = t2 () => (float[2,3] m) { m = Add(x, w) }, else_branch = e2 () => (float[2,3] n) "
        "{ n = Sub(x, w) }>"
    )
    proto = onnx.parser.parse_model(
        text(
            "y = " + IF.format("c", f"p = {inner}", "q = Sin(x)"),
            inputs="float[2,3] x, bool d",
            weights="<bool c = {1}>",
        )
    )
    branch = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    branch.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w"))
    result, _ = run_pass(proto, RemoveBranches)
    assert op_types(result).count("If") == 1
    # ONNX Runtime does not load the original: it looks for a body's constants one level up only.
    (added,), (taken,) = (run_ort(result, X | {"d": np.array(d)}) for d in (True, False))
    np.testing.assert_array_equal(added, X["x"] + [1, 2, 3])
    np.testing.assert_array_equal(taken, X["x"] - [1, 2, 3])


def test_branch_that_returns_its_own_constant() -> None:
    proto = onnx.parser.parse_model(
        text("b = " + IF.format("c", "p = Exp(x)", "q = Sin(x)") + " y = Add(b, x)", weights="<bool c = {1}>")
    )
    branch = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    del branch.node[:]
    branch.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "p"))
    result, _ = run_pass(proto, RemoveBranches)
    assert op_types(result) == ["Add"]
    # ONNX Runtime does not load the original: a branch must compute what it returns.
    np.testing.assert_array_equal(run_ort(result, X)[0], X["x"] + 1)


def test_branch_of_the_models_output_keeps_its_name() -> None:
    model = text("y = " + IF.format("c", "p = Exp(x)", "q = Sin(x)"), weights="<bool c = {0}>")
    result, _ = run_pass(model, RemoveBranches)
    assert op_types(result) == ["Sin"]
    assert [o.name for o in result.graph.outputs] == ["y"]
    assert_same_bits(model, result, X)


def test_one_value_returned_twice() -> None:
    model = text(
        "y, z = If(c) <then_branch = t () => (float[2,3] p, float[2,3] r) { p = Exp(x) r = Identity(p) }, "
        "else_branch = e () => (float[2,3] q, float[2,3] s) { q = Sin(x) s = Cos(x) }>",
        outputs="float[2,3] y, float[2,3] z",
        weights="<bool c = {1}>",
    )
    result, _ = run_pass(model, RemoveBranches)
    assert "If" not in op_types(result)
    assert_same_bits(model, result, X)


def test_condition_of_data_or_an_overridable_constant_stays() -> None:
    _, records = run_pass(
        text("y = " + IF.format("c", "p = Exp(x)", "q = Sin(x)"), "float[2,3] x, bool c"), RemoveBranches
    )
    assert applications(records) == 0
    proto = onnx.parser.parse_model(text("y = " + IF.format("c", "p = Exp(x)", "q = Sin(x)"), "float[2,3] x, bool c"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "c"))
    _, records = run_pass(proto, RemoveBranches)
    assert applications(records) == 0


RANK = "s = Shape(x) r = Size(s) k = Constant<value_int = 2>() c = Equal(r, k) "
SAME = "s = Shape(x) t = Shape(w) i = Constant<value_int = 0>() a = Gather(s, i) b = Gather(t, i) c = Equal(a, b) "


def test_rank_and_equal_axes_decide() -> None:
    model = text(RANK + "y = " + IF.format("c", "p = Exp(x)", "q = Sin(x)"), "float[n,3] x", "float[n,3] y")
    result, _ = run_pass(model, RemoveBranches)
    assert "Exp" in op_types(result) and "If" not in op_types(result)
    assert_same_bits(model, result, X)
    both = text(
        SAME + "y = " + IF.format("c", "p = Exp(x)", "q = Sin(w)"), "float[n,3] x, float[n,3] w", "float[n,3] y"
    )
    result, _ = run_pass(both, RemoveBranches)
    assert "If" not in op_types(result)


@pytest.mark.parametrize(
    "inputs", ["float[n,3] x, float[m,3] w", "float[?,3] x, float[?,3] w", "float[n,3] x, float w"]
)
def test_axes_that_may_differ_do_not_decide(inputs: str) -> None:
    inputs = inputs.replace("?", "dynamic")
    model = text(SAME + "y = " + IF.format("c", "p = Exp(x)", "q = Neg(x)"), inputs, "float[k,3] y")
    result, _ = run_pass(model, RemoveBranches)
    assert "If" in op_types(result)


def test_wrongly_declared_rank_does_not_decide() -> None:
    proto = onnx.parser.parse_model(
        text(
            "z = Reshape(x, s) u = Shape(z) r = Size(u) k = Constant<value_int = 2>() c = Equal(r, k) y = If(c) "
            "<then_branch = t () => (float p) { p = Exp(z) }, else_branch = e () => (float q) { q = Sin(z) }>",
            "float[2,3] x, int64[n] s",
            "float[a,b,c] y",
        )
    )
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [2, 3]))
    result, _ = run_pass(proto, RemoveBranches)
    assert "If" in op_types(result)


LOOP = (
    "{0} = Loop(n, t, x) <body = b (int64 i, bool c, float[2,3] s) => (bool d, float[2,3] u, float[2,3] v) "
    "{{ d = Identity(c) u = Exp(s) v = Neg(s) }}>"
)


@pytest.mark.parametrize(("count", "goes_on"), [(0, 1), (5, 0), (-1, 1)])
def test_loop_that_never_runs_gives_its_start(count: int, goes_on: int) -> None:
    body = f"n = Constant<value_int = {count}>() t = Constant<value = bool {{{goes_on}}}>() "
    model = text(body + LOOP.format("z, k") + " y = Abs(z)")
    result, _ = run_pass(model, RemoveBranches)
    assert "Loop" not in op_types(result)
    assert_same_bits(model, result, X)
    stacked = text(body + LOOP.format("z, k") + " y = Abs(z)", outputs="float[2,3] y, float[m,2,3] k")
    result, _ = run_pass(stacked, RemoveBranches)
    assert "Loop" in op_types(result)


def test_loop_that_runs_stays() -> None:
    body = "n = Constant<value_int = 2>() t = Constant<value = bool {1}>() " + LOOP.format("y, k")
    _, records = run_pass(text(body), RemoveBranches)
    assert applications(records) == 0


def test_branches_in_branches_and_computed_conditions() -> None:
    inner = (
        "If(f) <then_branch = t2 () => (float[2,3] m) { m = Cos(x) }, "
        "else_branch = e2 () => (float[2,3] n) { n = Tan(x) }>"
    )
    model = text(
        "c = Not(o) y = If(c) <then_branch = t () => (float[2,3] p) { f = Not(c) p = "
        + inner
        + " }, else_branch = e () => (float[2,3] q) { q = Sin(x) }>",
        weights="<bool o = {0}>",
    )
    result, _ = run_pass(model, RemoveBranches, FoldConstants)
    assert op_types(result) == ["Tan"]
    assert_same_bits(model, result, X)
