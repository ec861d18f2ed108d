from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.passes.canonical.fold_constants import FoldConstants
from graphopt.passes.canonical.merge_duplicates import MergeDuplicates
from graphopt.passes.canonical.remove_branches import RemoveBranches
from graphopt.passes.canonical.remove_dead import RemoveDead
from graphopt.passes.canonical.remove_identities import RemoveIdentities
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


ONE_TURN = (
    "{0} = Loop({1}, {2}, x) <body = b (int64 i, bool c, float[2,3] s) => (bool d, float[2,3] u, float[2,3] v) "
    "{{ k = Constant<value_int = 1>() j = Add(i, k) d = {3} f = Cast<to = 1>(j) u = Mul(s, f) v = Neg(u) }}>"
)


@pytest.mark.parametrize(
    ("count", "condition", "again"),
    [
        ("n", "yes", "Identity(c)"),
        ("n", "", "Identity(c)"),
        ("m", "yes", "Not(c)"),
        ("", "yes", "Less(j, k)"),
        ("m", "yes", "Greater(i, k)"),
    ],
)
def test_loop_of_one_turn_is_its_body(count: str, condition: str, again: str) -> None:
    weights = "<int64 n = {1}, int64 m = {4}, bool yes = {1}>"
    for outputs in ("float[2,3] z, float[t,2,3] w", "float[2,3] z", "float[t,2,3] w"):
        model = text(ONE_TURN.format("z, w", count, condition, again), outputs=outputs, weights=weights)
        result, _ = run_pass(model, RemoveBranches)
        assert "Loop" not in op_types(result)
        assert_same_bits(model, result, X)


@pytest.mark.parametrize(
    ("count", "condition", "again"),
    [
        ("m", "yes", "Less(j, m)"),
        ("p", "yes", "Identity(c)"),
        ("n", "go", "Identity(c)"),
        ("p", "yes", "Not(c)"),
        ("m", "", "Not(c)"),  # what a Loop without a condition makes of the one that its body returns is not agreed
    ],
)
def test_loop_of_more_or_unknown_turns_stays(count: str, condition: str, again: str) -> None:
    model = text(
        ONE_TURN.format("y, w", count, condition, again),
        "float[2,3] x, int64 p, bool go",
        weights="<int64 n = {1}, int64 m = {4}, bool yes = {1}>",
    )
    result, _ = run_pass(model, RemoveBranches)
    assert "Loop" in op_types(result)


def test_loop_of_one_turn_whose_body_returns_what_it_gets() -> None:
    model = text(
        "y, z = Loop(n, yes, x, a) <body = b (int64 i, bool c, float[2,3] s, float[2,3] r) => "
        "(bool d, float[2,3] r, float[2,3] u) { d = Identity(c) u = Add(s, r) }>",
        "float[2,3] x, float[2,3] a",
        "float[2,3] y, float[2,3] z",
        weights="<int64 n = {1}, bool yes = {1}>",
    )
    result, _ = run_pass(model, RemoveBranches)
    assert "Loop" not in op_types(result)
    feed = {**X, "a": X["x"] * 2}
    added, doubled = run_ort(result, feed)
    np.testing.assert_array_equal(added, feed["a"])
    np.testing.assert_array_equal(doubled, feed["x"] + feed["a"])


def squeezing(
    axis: int = -1, then: str = "Squeeze(x, ax)", other: str = "Identity(x)", reader: str = "Gemm(z, w)"
) -> str:
    """What PyTorch's squeeze becomes, and what takes a matrix only."""
    return f"""
        <ir_version: 8, opset_import: ["": 18]> g (float[n,3,m] x, bool c) => (float[a,b] y)
        <int64[1] ax = {{-1}}, int64[1] at = {{{axis}}}, int64[1] one = {{1}}, float[3,2] w = {{1,2,3,4,5,6}}> {{
            s = Shape(x) d = Gather(s, at) e = Equal(d, one)
            z = If(e) <then_branch = t () => (float[p,q] u) {{ u = {then} }},
                       else_branch = f () => (float[o,r,v] k) {{ k = {other} }}>
            y = {reader}
        }}"""


def test_a_squeeze_that_must_be_one() -> None:
    model = squeezing()
    result, _ = run_pass(model, RemoveBranches)
    assert "If" not in op_types(result)
    fed = {"x": np.arange(6, dtype=np.float32).reshape(2, 3, 1), "c": np.array(True)}
    assert_same_bits(model, result, fed)
    wrong = {"x": np.zeros((2, 3, 2), np.float32), "c": np.array(True)}
    for either in (model, result):  # what failed still fails
        with pytest.raises(Exception, match=r"Gemm|GEMM|Squeeze|squeeze|rank|Dimension|dimension"):
            run_ort(either, wrong)


@pytest.mark.parametrize(
    "model",
    [
        squeezing(reader="Relu(z)"),
        squeezing(axis=0),
        squeezing(then="Identity(x)", other="Squeeze(x, ax)"),
        squeezing(other="Abs(x)"),
        squeezing(reader="If(c) <then_branch = t2 () => (float[g,h] g1) { g1 = Gemm(z, w) }, "
                         "else_branch = f2 () => (float[i,j] g2) { g2 = Reshape(x, mm) }>").replace(
            "int64[1] one", "int64[2] mm = {-1, 3}, int64[1] one"),
    ],
    ids=["any rank is taken", "another axis", "the other way round", "not the same", "where the reader may not run"],
)  # fmt: skip
def test_a_squeeze_that_need_not_be_one_stays(model: str) -> None:
    result, _ = run_pass(model, RemoveBranches)
    assert "If" in op_types(result)
    ifs = [node for node in result.graph if node.op_type == "If"]
    assert any(value.name == "z" for node in ifs for value in node.outputs)


SILERO = find_spec("silero_vad")


@pytest.mark.skipif(SILERO is None, reason="silero-vad is not installed")
def test_silero_decides_between_its_two_rates_and_nothing_else() -> None:
    """Of 25 Ifs the one on the sample rate is left: the others ask for ranks, or squeeze what must be one."""
    assert SILERO is not None and SILERO.origin is not None
    file = Path(SILERO.origin).parent / "data" / "silero_vad.onnx"
    passes = (RemoveBranches, FoldConstants, RemoveIdentities, MergeDuplicates, RemoveDead)
    result, _ = run_pass(ir.load(file), *passes)
    assert op_types(ir.load(file)).count("If") == 25
    assert op_types(result).count("If") == 1
    numbers = np.random.default_rng(0)
    for rate, length in ((16000, 576), (8000, 288)):
        for batch in (1, 3):
            feed = {
                "input": numbers.standard_normal((batch, length)).astype(np.float32),
                "state": numbers.standard_normal((2, batch, 128)).astype(np.float32),
                "sr": np.array(rate),
            }
            assert_same_bits(ir.load(file), result, feed)
