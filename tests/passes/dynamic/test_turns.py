"""How many turns a Loop can take: what its condition says of it, against what it does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.passes.dynamic.probing import shapes_in_turns
from graphopt.passes.dynamic.turns import most_turns
from graphopt.rewrite import Context
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from tests.passes.common import run_ort, to_ir

TRIED = 12


def counting(
    again: str = "again = Less(after, limit)",
    *,
    dtype: str = "int64",
    start: str = "0",
    step: str = "1",
    limit: str = "5",
    trips: str = "",
    then: str = "after = Add(c, step)",
    constants: str = "",
    begin: str = "",
) -> str:
    """A Loop that carries a count c, and a vector v that gets longer by two numbers in a turn."""
    return f"""
        <ir_version: 10, opset_import: ["": 18]>
        g (bool on, int64 most, {dtype} given) => ({dtype} last, float[n] grown, int64[t] turns)
        <{dtype} start = {{{start}}}, {dtype} step = {{{step}}}, {dtype} limit = {{{limit}}}, float[1] w = {{1, 2, 3}},
         bool yes = {{1}}, bool no = {{0}}, int64 zero = {{0}}, int64[1] first = {{0}} {constants}> {{
            last, grown, turns = Loop({trips}, {begin}, start, w) <
                body = step (int64 i, bool going, {dtype} c, float[k] v)
                       => (bool again, {dtype} after, float[k1] more, int64 turn) {{
                    pair = Constant<value = float[2] {{4, 5}}>()
                    more = Concat<axis = 0>(v, pair)
                    {then}
                    {again}
                    turn = Identity(i)
                }}
            >
        }}""".replace("float[1] w", "float[3] w")


def most_of(model: str) -> int | None:
    copy = to_ir(model)
    infer_shapes(copy)
    ctx = Context(copy, load_target("onnxruntime"))
    (loop,) = (node for node in copy.graph if node.op_type == "Loop")
    return most_turns(loop, shapes_in_turns(loop, ctx), ctx.opset)


def taken(model: str, *, on: bool = True, dtype: type[np.generic] = np.int64, given: int = 0) -> int:
    """How many turns it takes, up to some."""
    feeds = {"on": np.array(on), "most": np.array(TRIED), "given": np.array(given, dtype)}
    return len(run_ort(model.replace("Loop(,", "Loop(most,"), feeds)[2])


@pytest.mark.parametrize(
    ("again", "turns"),
    [
        ("again = Less(after, limit)", 5),
        ("again = Less(c, limit)", 6),
        ("again = LessOrEqual(after, limit)", 6),
        ("again = Greater(limit, after)", 5),
        ("again = GreaterOrEqual(limit, c)", 7),
        ("reached = GreaterOrEqual(after, limit) again = Not(reached)", 5),
        ("reached = Less(limit, after) again = Not(reached)", 6),
        ("a = Less(after, limit) b = And(on, a) d = Identity(b) again = And(d, on)", 5),
        ("a = Less(after, limit) b = Not(on) d = Not(a) e = Or(b, d) again = Not(e)", 5),
        ("a = Less(after, limit) again = If(a) <then_branch = x () => (bool p) { p = Identity(on) }, "
         "else_branch = y () => (bool q) { q = Identity(no) }>", 5),
        ("again = If(on) <then_branch = x () => (bool p) { p = Less(after, limit) }, "
         "else_branch = y () => (bool q) { q = Constant<value = bool {0}>() }>", 5),
        ("a = Unsqueeze(after, first) b = Less(a, limit) again = Squeeze(b)", 5),
        ("again = Less(i, limit)", 6),
        ("j = Add(i, step) n = Add(j, step) again = Less(n, limit)", 4),
        ("rest = Sub(limit, after) again = Greater(rest, zero)", 5),
        ("n = Neg(after) m = Neg(limit) again = Greater(n, m)", 5),
        ("a = Less(after, limit) two = Add(i, step) b = Less(two, three) again = And(a, b)", 3),
        ("s = Shape(v) n = Squeeze(s) again = Less(n, nine)", 4),
        ("s = Shape(more) n = Gather(s, zero) again = Less(n, nine)", 3),
        ("s = Shape<start = -1>(more) n = Squeeze(s) m = Add(n, step) again = Less(m, nine)", 3),
    ],
)  # fmt: skip
def test_what_a_condition_says(again: str, turns: int) -> None:
    model = counting(again, constants=", int64 nine = {9}, int64 three = {3}")
    assert most_of(model) == turns
    assert taken(model) == turns
    assert taken(model, on=False) <= turns


@pytest.mark.parametrize(
    "model",
    [
        counting("again = Identity(on)"),
        counting("a = Less(after, limit) again = Or(on, a)"),
        counting("a = Less(after, limit) b = And(on, a) again = Not(b)"),
        counting("a = Less(after, limit) again = Xor(a, on)"),
        counting("again = Less(after, given)"),
        counting("again = Less(after, limit)", step="0"),
        counting("again = Less(after, limit)", step="-1"),
        counting("again = Greater(after, limit)", start="9"),
        counting("again = Less(after, limit)", dtype="float"),
        counting("n = Cast<to = 1>(after) m = Cast<to = 7>(n) again = Less(m, limit)"),
        counting("n = Cast<to = 1>(after) m = Cast<to = 1>(limit) again = Less(n, m)"),
        counting(then="after = Mul(c, step)", start="1", step="2"),
        counting(then="after = Add(c, i)"),
        counting(then="after = Add(c, c)"),
        counting(then="after = Add(c, given)"),
        counting(then="after = Where(on, c, step)"),
        counting(then="after = If(on) <then_branch = x () => (int64 p) { p = Add(c, step) }, "
                 "else_branch = y () => (int64 q) { q = Identity(c) }>"),
        counting("again = LessOrEqual(after, limit)", limit=str(2**63 - 1)),
        counting("again = Less(after, limit)", limit=str(2**63 - 1), step="2"),
        counting("again = LessOrEqual(after, limit)", limit=str(2**31 - 1), dtype="int32"),
        counting("n = Cast<to = 6>(after) m = Cast<to = 7>(n) again = Less(m, limit)", limit=str(2**40)),
        counting("n = Sub(after, far) m = Sub(n, step) again = Less(m, limit)",
                 constants=", int64 far = {-9223372036854775808}"),
        counting(trips="most"),
        counting("s = Shape(w) n = Squeeze(s) again = Less(n, limit)"),
    ],
)  # fmt: skip
def test_what_says_nothing(model: str) -> None:
    assert most_of(model) is None


def test_the_first_turn_is_not_asked_for() -> None:
    for limit in ("0", "-7", str(-(2**63))):
        model = counting(limit=limit)
        assert most_of(model) == 1
        assert taken(model) == 1


def test_the_count_of_the_loop_and_its_condition() -> None:
    for trips, expected in (("3", 3), ("5", 5), ("7", 5), ("0", 0), ("-2", 0), (str(2**63 - 1), 5)):
        model = counting(trips="count", constants=f", int64 count = {{{trips}}}")
        assert most_of(model) == expected
        assert taken(model) == expected


def test_what_another_loop_inside_says_is_its_own() -> None:
    inner = """l = Loop(, yes, zero) <body = turns (int64 j, bool go, int64 d) => (bool on1, int64 d1)
        { d1 = Add(d, step) on1 = Less(d1, limit) }>"""
    assert most_of(counting(f"{inner} again = Identity(on)")) is None
    assert most_of(counting(f"{inner} again = Less(l, limit)")) is None
    assert most_of(counting(f"{inner} a = Less(after, limit) again = And(a, on)")) == 5


_BOUNDS = {"int64": (-(2**63), 2**63 - 1), "int32": (-(2**31), 2**31 - 1)}


@st.composite
def _numbers(draw: st.DrawFn) -> tuple[str, int, int, int]:
    dtype = draw(st.sampled_from(sorted(_BOUNDS)))
    low, high = _BOUNDS[dtype]
    near = st.one_of(st.integers(-9, 9), st.integers(low, low + 9), st.integers(high - 9, high))
    return dtype, draw(near), draw(st.one_of(st.integers(-4, 4), near)), draw(near)


@settings(max_examples=60, deadline=None)
@given(
    numbers=_numbers(),
    comparison=st.sampled_from(["Less", "LessOrEqual", "Greater", "GreaterOrEqual"]),
    operands=st.sampled_from(["after, limit", "limit, after", "c, limit", "limit, c"]),
    opposite=st.booleans(),
    minus=st.booleans(),
)
@example(numbers=("int32", 2**31 - 3, 2, 2**31 - 2), comparison="Less", operands="after, limit", opposite=False,
         minus=False)  # fmt: skip
@example(numbers=("int64", -(2**63), -(2**63), 0), comparison="Less", operands="c, limit", opposite=False, minus=True)
def test_it_never_takes_more(
    numbers: tuple[str, int, int, int], comparison: str, operands: str, opposite: bool, minus: bool
) -> None:
    dtype, start, step, limit = numbers
    again = f"a = {comparison}({operands}) again = {'Not' if opposite else 'Identity'}(a)"
    then = f"after = {'Sub' if minus else 'Add'}(c, step)"
    model = counting(again, dtype=dtype, start=str(start), step=str(step), limit=str(limit), then=then)
    most = most_of(model)
    turns = taken(model, dtype=np.dtype(dtype).type)
    if most is not None:
        assert turns == min(most, TRIED)
    elif turns < TRIED and abs(start) < 10 and abs(step) < 10 and abs(limit) < 10:
        raise AssertionError("a limit that nothing hides was not found")
