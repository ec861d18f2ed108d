"""Both branches and a Where, only where nothing can fail and the target finds it cheaper."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.passes.dynamic.select_branches import SelectBranches
from tests.passes.common import applications, assert_same_bits, op_types, run_ort, run_pass

RTX = "tensorrt-rtx"
INPUTS = "float[n,3] x, float[n,3] z, int64[2] k, bool c"


def text(
    then: str, other: str, kind: str = "float[n,3]", inputs: str = INPUTS, weights: str = "", opset: int = 18
) -> str:
    return (
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({kind} y) '
        "<float[3,3] w = {1,2,3,4,5,6,7,8,9}, "
        f"int64[1] ax = {{0}}{weights}> {{ y = If(c) <then_branch = a () => ({kind} t) {{ {then} }}, "
        f"else_branch = b () => ({kind} e) {{ {other} }}> }}"
    )


def feeds(dtype: type[np.generic] = np.float32) -> list[dict[str, np.ndarray]]:
    numbers = np.random.default_rng(0)
    made = []
    for size in (0, 1, 4):
        x, z = numbers.standard_normal((2, size, 3)).astype(dtype)
        if size:
            x[0, 0], z[0, 1] = np.nan, np.inf
        made += [{"x": x, "z": z, "k": np.array([1, 0]), "c": np.array(c)} for c in (True, False)]
    return made


@pytest.mark.parametrize(
    ("then", "other"),
    [
        ("t = Add(x, z)", "e = Sub(x, z)"),
        ("a1 = Log(x) t = Div(a1, z)", "e = Relu(x)"),
        ("t = MatMul(x, w)", "e = Softmax(x)"),
        ("t = Gemm(x, w)", "b1 = Greater(x, z) e = Where(b1, x, z)"),
    ],
)
def test_small_branches_are_selected(then: str, other: str) -> None:
    model = text(then, other)
    result, records = run_pass(model, SelectBranches, target=RTX)
    assert applications(records) == 1
    assert "If" not in op_types(result)
    for given in feeds():
        np.testing.assert_array_equal(run_ort(model, given)[0], run_ort(result, given)[0], strict=True)


def test_float16_and_integers() -> None:
    half = text("t = Add(x, z)", "e = Sub(x, z)", "float16[n,3]", INPUTS.replace("float[", "float16["))
    result, records = run_pass(half, SelectBranches, target=RTX)
    assert applications(records) == 1
    assert_same_bits(half, result, *feeds(np.float16))
    whole = text("t = Add(k, k)", "e = Neg(k)", "int64[2]")
    result, records = run_pass(whole, SelectBranches, target=RTX)
    assert applications(records) == 1
    assert_same_bits(whole, result, *feeds())


def test_a_condition_with_an_axis_does_not_spread() -> None:
    model = text("t = ReduceNothing(s)", "e = Neg(s)", "float", "float s, bool[1] c").replace("ReduceNothing", "Abs")
    result, records = run_pass(model, SelectBranches, target=RTX)
    assert applications(records) == 1
    for c in (True, False):
        given = {"s": np.array(-2, np.float32), "c": np.array([c])}
        assert run_ort(result, given)[0].shape == ()
        assert_same_bits(model, result, given)


def test_a_negative_zero_of_the_then_side_is_why_it_is_not_bitwise() -> None:
    model = text("t = Neg(x)", "e = Neg(z)")
    result, _ = run_pass(model, SelectBranches, target=RTX)
    zeros = {**feeds()[2], "x": np.zeros((1, 3), np.float32)}
    np.testing.assert_array_equal(run_ort(model, zeros)[0], run_ort(result, zeros)[0])
    assert np.signbit(run_ort(model, zeros)[0]).all()
    assert not np.signbit(run_ort(result, zeros)[0]).any()  # where this fails, the pass can promise the same bits
    assert SelectBranches.kind == "rounding"


MANY = " ".join(f"a{i + 1} = Tanh(a{i})" for i in range(30))


@pytest.mark.parametrize(
    ("then", "other", "kind", "why"),
    [
        ("t = Gather(x, k)", "e = Gather(z, k)", "float[2,3]", "Gather"),
        ("t = Div(k, k)", "e = Neg(k)", "int64[2]", "Div"),
        ("t = Mod(k, k)", "e = Neg(k)", "int64[2]", "Mod"),
        ("t = Reshape(x, k)", "e = Reshape(z, k)", "float[a,b]", "Reshape"),
        ("t = RandomNormalLike(x)", "e = Neg(x)", "float[n,3]", "RandomNormalLike"),
        ("t = Add(x, v)", "e = Neg(x)", "float[n,3]", "Add"),
        ("t = MatMul(x, w2)", "e = Neg(x)", "float[n,3]", "MatMul"),
        ("t = Unsqueeze(x, ax)", "e = Neg(x)", "float[n,3]", "one type and shape"),
        ("t = Abs(v)", "e = Neg(x)", "float[n,3]", "one type and shape"),
        ("t = Not(f)", "e = And(f, f)", "bool[2]", "no Where for bool"),
        ("t = Identity(o)", "e = Abs(o)", "int8[2]", "no Where for int8"),
        (f"a0 = Neg(x) {MANY} t = Neg(a30)", "e = Neg(x)", "float[n,3]", "cheaper"),
    ],
)
def test_what_may_fail_or_costs_more_stays(then: str, other: str, kind: str, why: str) -> None:
    inputs = INPUTS + ", float[m,3] v, float[q,3] w2, bool[2] f, int8[2] o"
    _, records = run_pass(text(then, other, kind, inputs), SelectBranches, target=RTX)
    assert applications(records) == 0
    assert why in records[0].reason + " ".join(records[0].near_misses.values())


def test_control_flow_in_a_branch() -> None:
    inner = (
        "If(c) <then_branch = i () => (float[n,3] p) { p = Cos(x) }, "
        "else_branch = j () => (float[n,3] q) { q = Sin(x) }>"
    )
    _, records = run_pass(
        text(f"t = {inner}", "e = CumSum(x, zero0)", weights=", int64 zero0 = {0}"), SelectBranches, target=RTX
    )
    assert applications(records) == 1  # the inner one, and not what is around it
    loop = (
        "k1 = Constant<value_int = 2>() t = Loop(k1, , x) <body = l (int64 i, bool g, float[n,3] h) => "
        "(bool o, float[n,3] r) { o = Identity(g) r = Tanh(h) }>"
    )
    _, records = run_pass(text(loop, "e = Neg(x)"), SelectBranches, target=RTX)
    assert applications(records) == 0
