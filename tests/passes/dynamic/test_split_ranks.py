"""What follows an If of unequal ranks is computed in each branch, with ranks that are known."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.passes.canonical.merge_duplicates import MergeDuplicates
from graphopt.passes.canonical.remove_branches import RemoveBranches
from graphopt.passes.canonical.remove_dead import RemoveDead
from graphopt.passes.dynamic.merge_conditions import MergeConditions
from graphopt.passes.dynamic.split_ranks import SplitRanks
from graphopt.shapes import infer_shapes, trusted_shape
from tests.passes.common import AnyModel, applications, assert_same_bits, op_types, run_pass

RTX = "tensorrt-rtx"
FEEDS = [
    {"x": np.arange(n * 3, dtype=np.float32).reshape(n, 3) - 2, "c": np.array(c), "d": np.array(d)}
    for n in (0, 1, 2)
    for c in (True, False)
    for d in (True, False)
]
WEIGHTS = "<float[3,3] w = {1,2,3,4,5,6,7,8,9}, int64[1] ax = {0}, int64[1] last = {-1}>"


def text(body: str, outputs: str = "float[k] y", opset: int = 18) -> str:
    return (
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[n,3] x, bool c, bool d) => ({outputs}) '
        f"{WEIGHTS} {{ {body} }}"
    )


def unequal(condition: str = "c", source: str = "x", number: int = 0) -> str:
    t, e = f"t{number}", f"e{number}"
    return (
        f"If({condition}) <then_branch = a{number} () => (float[1,q{number},3] {t}) "
        f"{{ {t} = Unsqueeze({source}, ax) }}, "
        f"else_branch = b{number} () => (float[r{number},3] {e}) {{ {e} = Neg({source}) }}>"
    )


def split(model: AnyModel, *more: type, target: str = RTX) -> ir.Model:
    result, _ = run_pass(model, SplitRanks, *more, target=target)
    infer_shapes(result)
    return result


def unknown_ranks(model: ir.Model) -> list[str]:
    """Values that a node reads and whose rank is not known."""
    return sorted(
        {v.name or "" for n in graphs.all_nodes(model) for v in n.inputs
         if v is not None and trusted_shape(v) is None and not graphs.is_constant(v)}
    )  # fmt: skip


def test_up_to_where_the_ranks_agree() -> None:
    model = text(
        f"p = {unequal()} m = MatMul(p, w) s = ReduceSum<keepdims = 0>(m, last) r = Reshape(s, last) y = Abs(r)"
    )
    result = split(model)
    assert unknown_ranks(result) == []
    assert [node.op_type for node in result.graph] == ["If", "Abs"]
    # The weight is read from around, not copied.
    assert [
        v.name for v in result.graph.initializers.values() if v.const_value is not None and v.const_value.size == 9
    ] == ["w"]
    assert_same_bits(model, result, *FEEDS)


def test_up_to_the_end_of_the_graph() -> None:
    model = text(f"p = {unequal()} m = MatMul(p, w) y = Abs(m)")
    proto = onnx.parser.parse_model(model)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    result = split(proto)
    assert unknown_ranks(result) == []
    assert [node.op_type for node in result.graph] == ["If"]
    assert_same_bits(proto, result, *FEEDS)


def test_second_reader_output_and_capture() -> None:
    nested = (
        "v = If(d) <then_branch = k () => (float[u1] i) { i = Reshape(p, last) }, "
        "else_branch = l () => (float[u2] j) { j = Reshape(x, last) }>"
    )
    model = text(f"p = {unequal()} m = Exp(p) z = Reshape(m, last) {nested} y = Add(z, v)", "float[k] y, float[k] z")
    proto = onnx.parser.parse_model(model)
    for index, node in enumerate(proto.graph.node):
        node.name = f"node_{index}"
    result = split(proto)
    assert unknown_ranks(result) == []
    assert_same_bits(model, result, *FEEDS)
    names = [node.name for node in graphs.all_nodes(result) if node.op_type == "If"]
    assert len(names) == len(set(names))


def test_what_lies_between_moves_too() -> None:
    """A node of one rank whose result meets the If's again further on."""
    model = text(f"p = {unequal()} f = Reshape(p, last) g0 = Exp(f) s = Shape(p) h = Reshape(g0, s) k = Mul(h, p) "
                 "y = Reshape(k, last)")  # fmt: skip
    result = split(model)
    assert_same_bits(model, result, *(feed for feed in FEEDS if len(feed["x"]) > 0))  # Reshape copies zeros
    assert "Mul" not in [node.op_type for node in result.graph]


def test_rank_questions_are_answered_in_the_copies() -> None:
    follow = (
        "r = Size(sh) two = Constant<value_int = 2>() b = Equal(r, two) z = If(b) <then_branch = k () => "
        "(float[u1,3] i) { i = Cos(p) }, else_branch = l () => (float[u2,3] j) { j = Squeeze(p, ax) }>"
    )
    model = text(f"p = {unequal()} sh = Shape(p) {follow} y = Reshape(z, last)")
    result = split(model, RemoveBranches, MergeDuplicates, MergeConditions)
    assert op_types(result).count("If") == 1
    assert_same_bits(model, result, *(feed for feed in FEEDS if len(feed["x"]) == 1))


def test_many_questions_of_the_rank_cost_one_copy() -> None:
    body, previous = f"h0 = {unequal()} two = Constant<value_int = 2>() ", "h0"
    for n in range(8):
        body += (
            f"s{n} = Shape({previous}) r{n} = Size(s{n}) b{n} = Equal(r{n}, two) g{n} = If(b{n}) "
            f"<then_branch = k{n} () => (float[i{n},3] u{n}) {{ u{n} = Cos({previous}) }}, "
            f"else_branch = l{n} () => (float[1,j{n},3] v{n}) {{ v{n} = Sin({previous}) }}> "
        )
        previous = f"g{n}"
    model = text(body + f"y = Reshape({previous}, last)")
    result = split(model, RemoveBranches, RemoveDead)
    assert op_types(result).count("If") == 1
    assert op_types(result).count("Cos") == op_types(result).count("Sin") == 8
    assert_same_bits(model, result, *FEEDS)


def test_only_where_it_is_asked_for() -> None:
    model = text(f"p = {unequal()} m = MatMul(p, w) y = Reshape(m, last)")
    _, records = run_pass(model, SplitRanks)
    assert applications(records) == 0
    result, records = run_pass(model, SplitRanks, always=True)
    assert applications(records) == 1
    assert_same_bits(model, result, *FEEDS)


def test_equal_and_unknown_ranks_stay() -> None:
    same = text(f"p = {unequal()} y = Reshape(p, last)").replace("Unsqueeze(x, ax)", "Abs(x)").replace("1,q0,3", "q0,3")
    _, records = run_pass(same, SplitRanks, target=RTX)
    assert applications(records) == 0


def test_many_in_a_row_are_refused_before_they_double() -> None:
    """Each would double all that follow: the model stays within twice its size."""
    body, previous = "", "x"
    for number in range(12):
        body += f"h{number} = {unequal('c' if number % 2 else 'd', previous, number)} "
        previous = f"h{number}"
    proto = onnx.parser.parse_model(text(body + f"y = Reshape({previous}, last)"))
    result, records = run_pass(proto, SplitRanks, target=RTX)
    assert graphs.count_nodes(result) <= 2 * sum(1 for _ in graphs.all_nodes(ir.from_proto(proto)))
    assert "too many" in " ".join(records[0].near_misses.values())
    given = [feed for feed in FEEDS if len(feed["x"]) == 2]
    assert_same_bits(proto, result, *given)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_the_if_keeps_its_name(opset: int) -> None:
    proto = onnx.parser.parse_model(text(f"p = {unequal()} m = MatMul(p, w) y = Reshape(m, last)", opset=opset))
    proto.graph.node[0].name = "exit"
    result = split(proto)
    assert [node.name for node in result.graph if node.op_type == "If"] == ["exit"]
    assert_same_bits(proto, result, *FEEDS)
