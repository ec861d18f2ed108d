"""Ifs on one condition become one; an If inside a branch that decides it becomes what is taken."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.graphs import DECIDES
from graphopt.passes.canonical.merge_duplicates import MergeDuplicates
from graphopt.passes.canonical.remove_dead import RemoveDead
from graphopt.passes.dynamic.merge_conditions import MergeConditions
from tests.passes.common import applications, assert_same_bits, op_types, run_pass

FEEDS = [
    {"x": np.array([1, -0.0, np.nan], np.float32), "c": np.array(c), "d": np.array(d)}
    for c in (True, False)
    for d in (True, False)
]


def text(body: str, outputs: str = "float[3] y") -> str:
    return f'<ir_version: 8, opset_import: ["": 18]> g (float[3] x, bool c, bool d) => ({outputs}) {{ {body} }}'


def branch(condition: str, then: str, other: str, number: int = 0) -> str:
    """An If of one result; ``?`` stands for the result."""
    t, e = f"t{number}", f"e{number}"
    return (
        f"If({condition}) <then_branch = a{number} () => (float[3] {t}) {{ {then.replace('?', t)} }}, "
        f"else_branch = b{number} () => (float[3] {e}) {{ {other.replace('?', e)} }}>"
    )


def checked(model: str, ifs: int) -> ir.Model:
    result, _ = run_pass(model, MergeConditions, MergeDuplicates, RemoveDead)
    assert op_types(result).count("If") == ifs
    assert_same_bits(model, result, *FEEDS)
    return result


ONE = branch("c", "? = Exp(x)", "? = Neg(x)", 1)


@pytest.mark.parametrize(
    "second",
    [
        branch("c", "? = Cos(p)", "? = Sin(p)", 2),
        branch("c", "? = Cos(x)", "? = Sin(x)", 2),
        branch("c", "q = Add(p, x) ? = Mul(q, p)", "? = Identity(p)", 2),
        branch("c", branch("d", "? = Cos(p)", "? = Abs(p)", 3).join(("z = ", " ? = Neg(z)")), "? = Sin(p)", 2),
    ],
    ids=["reads the first", "does not", "reads it twice", "reads it deeper"],
)
def test_two_on_one_condition(second: str) -> None:
    for rest, outputs in (
        ("y = Abs(r)", "float[3] y"),
        ("y = Add(r, p)", "float[3] y"),
        ("y = Identity(r)", "float[3] y, float[3] p"),
    ):
        model = text(f"p = {ONE} r = {second} {rest}", outputs)
        checked(model, 1 + ("If(d)" in second))


def test_a_negated_condition_swaps_the_branches() -> None:
    checked(text(f"n = Not(c) p = {ONE} y = " + branch("n", "? = Cos(p)", "? = Sin(p)", 2)), 1)
    checked(text(f"n = Not(c) m = Not(n) p = {ONE} y = " + branch("m", "? = Cos(p)", "? = Sin(p)", 2)), 1)


def test_conditions_that_compute_the_same() -> None:
    sums = "s = ReduceSum<keepdims = 0>(x) z = Constant<value = float {0}>() "
    model = text(
        sums + "k = Greater(s, z) l = Greater(s, z) p = " + ONE.replace("(c)", "(k)")
        + " y = " + branch("l", "? = Cos(p)", "? = Sin(p)", 2)
    )  # fmt: skip
    checked(model, 1)
    # NaN is neither greater nor not: what only looks like the negation is another condition.
    other = model.replace("l = Greater(s, z)", "l = LessOrEqual(s, z)")
    checked(other, 2)


def test_a_node_between_keeps_them_apart() -> None:
    model = text(f"p = {ONE} q = Tanh(p) y = " + branch("c", "? = Cos(q)", "? = Sin(x)", 2))
    checked(model, 2)
    # Not only what the second reads itself: also what a body in it captures.
    nested = branch("d", "? = Cos(q)", "? = Abs(x)", 3)
    checked(text(f"p = {ONE} q = Tanh(p) y = " + branch("c", f"z = {nested} ? = Neg(z)", "? = Sin(x)", 2)), 3)


def test_a_node_between_that_the_second_does_not_wait_for() -> None:
    checked(
        text(f"p = {ONE} q = Tanh(p) w = Abs(x) r = " + branch("c", "? = Cos(w)", "? = Sin(p)", 2) + " y = Add(q, r)"),
        1,
    )


def test_three_in_a_row() -> None:
    model = text(
        f"p = {ONE} q = {branch('c', '? = Cos(p)', '? = Sin(p)', 2)} r = {branch('d', '? = Cos(q)', '? = Sin(q)', 3)} "
        f"s = {branch('c', '? = Abs(q)', '? = Add(p, q)', 4)} y = Add(r, s)"
    )
    checked(model, 2)


def test_names_of_both_and_who_decides() -> None:
    proto = onnx.parser.parse_model(text(f"n = Not(c) p = {ONE} y = {branch('n', '? = Cos(p)', '? = Sin(p)', 2)}"))
    for node, name in zip((n for n in proto.graph.node if n.op_type == "If"), ("first", "second"), strict=True):
        node.name = name
    result, _ = run_pass(proto, MergeConditions)
    (merged,) = (node for node in result.graph if node.op_type == "If")
    assert merged.name == "first"
    assert json.loads(merged.metadata_props[DECIDES]) == [["second", False]]


@pytest.mark.parametrize(
    ("condition", "way"),
    [
        ("n = Identity(c)", (True, False)),
        ("n = Not(c)", (False, True)),
        ("n = And(c, d)", (None, False)),
        ("n = Or(c, d)", (True, None)),
        ("m = Not(c) n = Or(m, d)", (None, True)),
        ("n = Xor(c, d)", (None, None)),
    ],
)
def test_inside_a_branch_the_condition_is_known(condition: str, way: tuple[bool | None, bool | None]) -> None:
    inner = [branch("n", "? = Cos(x)", "? = Sin(x)", number) for number in (1, 2)]
    model = text(f"{condition} p = {branch('c', f'z = {inner[0]} ? = Neg(z)', f'w = {inner[1]} ? = Abs(w)', 3)} "
                 "y = Identity(p)")  # fmt: skip
    result = checked(model, 1 + way.count(None))
    (outer,) = (node for node in result.graph if node.op_type == "If")
    for name, known, first in (("then_branch", way[0], "Neg"), ("else_branch", way[1], "Abs")):
        kinds = {node.op_type for node in outer.attributes[name].as_graph()}
        assert kinds == ({"If", first} if known is None else {"Cos" if known else "Sin", first})


def test_what_an_outer_conjunction_tells() -> None:
    inner = branch("c", "? = Cos(x)", "? = Sin(x)", 1)
    other = branch("d", "? = Cos(x)", "? = Sin(x)", 2)
    model = text(f"n = And(c, d) y = {branch('n', f'z = {inner} ? = Neg(z)', f'w = {other} ? = Abs(w)', 3)}")
    checked(model, 2)


def test_a_condition_made_inside_and_a_loop_between() -> None:
    inner = branch("m", "? = Cos(h)", "? = Sin(h)", 1)
    loop = (
        "k = Constant<value_int = 2>() ? = Loop(k, , x) <body = b (int64 i, bool g, float[3] h) => "
        f"(bool o, float[3] r) {{ o = Identity(g) m = Not(c) r = {inner} }}>"
    )
    checked(text(f"y = {branch('c', loop, '? = Tanh(x)', 2)}"), 1)


def test_in_a_loop_with_a_condition_it_holds() -> None:
    inner = branch("g", "? = Cos(h)", "? = Sin(h)", 1)
    loop = (
        "k = Constant<value_int = 2>() y = Loop(k, CONDITION, x) <body = b (int64 i, bool g, float[3] h) => "
        f"(bool o, float[3] r) {{ o = Identity(g) r = {inner} }}>"
    )
    checked(text(loop.replace("CONDITION", "c")), 0)
    checked(text(loop.replace("CONDITION", "")), 1)


def test_a_condition_of_one_element_with_an_axis() -> None:
    model = text(
        f"k = Constant<value_ints = [1]>() e = Reshape(c, k) p = {ONE} y = {branch('e', '? = Cos(p)', '? = Sin(p)', 2)}"
    )
    checked(model, 1)


def test_branches_with_constants_and_equal_names() -> None:
    second = branch("c", "? = Mul(p, w)", "? = Add(p, w)", 1)  # the same names as in the first: side by side they may
    proto = onnx.parser.parse_model(text(f"p = {ONE} y = {second}"))
    for attribute in proto.graph.node[1].attribute:
        attribute.g.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w"))
    given = proto.SerializeToString()  # tensors are shared, their names too
    result, records = run_pass(proto, MergeConditions)
    assert applications(records) == 1
    assert_same_bits(onnx.load_from_string(given), result, *FEEDS)


def test_a_function_and_its_references_stay() -> None:
    model = """
        <ir_version: 8, opset_import: ["": 18, "l": 1]> g (float[3] x, bool c, bool d) => (float[3] y) { y = l.f(x, c) }
        <domain: "l", opset_import: ["": 18]> f (x, c) => (y) {
            p = If(c) <then_branch = a () => (t) { t = Exp(x) }, else_branch = b () => (e) { e = Neg(x) }>
            y = If(c) <then_branch = k () => (u) { u = Cos(p) }, else_branch = l () => (v) { v = Sin(p) }>
        }"""
    result, records = run_pass(model, MergeConditions)
    assert applications(records) == 1
    assert_same_bits(model, result, *FEEDS)
