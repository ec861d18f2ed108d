"""Which control flow stays inside a block: where calls would cost more than a small share of the work around."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.bundles.making import make_parts
from graphopt.bundles.plan import Branch, Run
from graphopt.bundles.split import split
from graphopt.bundles.superblocks import super_blocks
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'


def network(size: int, inner: int, loop: bool = False, rows: int = 256) -> ir.Model:
    """Products with ``size`` squared around an If or a Loop, in which there are products with size times ``inner``."""
    value, products = f"float[{rows}, {size}]", 64 if loop else 8
    body = " ".join(
        f"u{i} = MatMul ({'a' if i == 0 else f'v{i}'}, left) v{i + 1} = MatMul (u{i}, right)" for i in range(products)
    )
    body += f" p = Identity (v{products})"
    turn = f"""b = If (c) <
        then_branch = t () => ({value} p) {{ {body} }},
        else_branch = e () => ({value} q) {{ q = Neg (a) }}>"""
    if loop:
        turn = f"""b = Loop (n, , x) <body = l (int64 i, bool go, {value} a)
            => (bool again, {value} p) {{ again = Identity (go) {body} }}>"""
    names = ["x", "s1", "s2", "s3", "s4", "s5", "a"]
    stages = [f"{after} = MatMul ({before}, w)" for before, after in pairwise(names)]
    first = "" if loop else " ".join(stages)
    made = model_from_text(f"""
    {HEAD}
    g ({value} x, bool c, int64 n) => ({value} y)
    <float[{size}, {size}] w, float[{size}, {inner}] left, float[{inner}, {size}] right> {{
        {first} {turn} y = MatMul (b, w)
    }}""")
    graphs.name_control_flow(made)
    infer_shapes(made)
    return made


@pytest.mark.parametrize("loop", [False, True])
def test_small_branches_stay_and_stages_are_cut(loop: bool) -> None:
    runtime = load_target("onnxruntime")
    small, large = network(64, 64, loop), network(2048, 2048, loop)
    assert list(super_blocks(small, runtime)) == [f"{'Loop' if loop else 'If'} of b"]
    assert super_blocks(large, runtime) == {}
    parts, facts = make_parts(small, runtime)
    assert len(parts.blocks) == 1  # what is before it and after it is one block with it
    assert list(facts.kept) == [f"{'Loop' if loop else 'If'} of b"]
    assert "a cut adds about" in facts.kept[f"{'Loop' if loop else 'If'} of b"]
    parts, facts = make_parts(large, runtime)
    assert facts.kept == {} and len(parts.blocks) == facts.blocks >= 2


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "onnx"])
def test_other_targets_have_none(name: str) -> None:
    assert super_blocks(network(8, 8), load_target(name)) == {}


def test_the_work_beside_counts() -> None:
    """The same small branch: a cut is lost in a large network, and is not in a small one."""
    runtime = load_target("onnxruntime")
    assert super_blocks(network(2048, 1), runtime) == {}
    assert list(super_blocks(network(64, 1), runtime)) == ["If of b"]


def test_a_batch_that_is_not_known_is_one_sample() -> None:
    runtime = load_target("onnxruntime")
    text = f"""{HEAD}
    g (float[ROWS, 2048] x, bool c) => (float[ROWS, 2048] y) <float[2048, 2048] w> {{
        o = MatMul (x, w) m = MatMul (o, w) k = MatMul (m, w) a = MatMul (k, w)
        b = If (c) <then_branch = t () => (float[ROWS, 2048] p) {{ p = Neg (a) }},
                    else_branch = e () => (float[ROWS, 2048] q) {{ q = Abs (a) }}>
        y = MatMul (b, w)
    }}"""
    for rows, kept in (("n", True), ("1", True), ("512", False)):
        made = model_from_text(text.replace("ROWS", rows))
        graphs.name_control_flow(made)
        infer_shapes(made)
        assert bool(super_blocks(made, runtime)) is kept


def test_what_is_handed_over_counts() -> None:
    """A large value in and out of a branch that does little with it, beside work that would bear the calls."""
    runtime = load_target("onnxruntime")
    for columns, kept in ((4, False), (1 << 22, True)):
        made = model_from_text(f"""
        {HEAD}
        g (float[128, 2048] x, float[8, {columns}] v, bool c) => (float[128, 2048] y, float[8, {columns}] z)
        <float[2048, 2048] w> {{
            a = MatMul (x, w) b = MatMul (a, w) d = MatMul (b, w) e = MatMul (d, w)
            y = MatMul (e, w)
            z = If (c) <then_branch = t () => (float[8, {columns}] p) {{ p = Neg (v) }},
                        else_branch = e () => (float[8, {columns}] q) {{ q = Abs (v) }}>
        }}""")
        graphs.name_control_flow(made)
        infer_shapes(made)
        assert bool(super_blocks(made, runtime)) is kept


def chain(count: int) -> ir.Model:
    """A large product and then some small branches."""
    gates = "\n".join(
        f"""a{i + 1} = If (c) <then_branch = t{i} () => (float[4096] p{i}) {{ p{i} = Neg (a{i}) }},
        else_branch = e{i} () => (float[4096] q{i}) {{ q{i} = Abs (a{i}) }}>"""
        for i in range(count)
    )
    made = model_from_text(f"""
    {HEAD}
    g (float[256, 4096] x, bool c) => (float[4096] a{count}) <float[4096, 4096] w> {{
        m = MatMul (x, w)
        axis = Constant <value = int64[1] {{0}}> ()
        a0 = ReduceSum <keepdims = 0> (m, axis)
        {gates}
    }}""")
    graphs.name_control_flow(made)
    infer_shapes(made)
    return made


def test_all_cuts_of_a_graph_share_what_is_beside_them() -> None:
    """Many small branches in a network that could bear one cut."""
    runtime = load_target("onnxruntime")
    assert not super_blocks(chain(1), runtime)
    assert len(super_blocks(chain(10), runtime)) == 10


@pytest.mark.parametrize("inner", ["cut", "kept"])
def test_an_outer_decision_is_kept_only_with_all_in_it(inner: str) -> None:
    """A heavy inner loop body inside a light outer If."""
    size = 2048 if inner == "cut" else 4
    made = model_from_text(f"""
    {HEAD}
    g (float[256, {size}] x, bool c, int64 n) => (float[256, {size}] y) <float[{size}, {size}] w> {{
        y = If (c) <
            then_branch = t () => (float[256, {size}] p) {{
                p = Loop (n, , x) <body = l (int64 i, bool go, float[256, {size}] a)
                    => (bool again, float[256, {size}] after) {{ again = Identity (go)
                    b = MatMul (x, w) d = MatMul (b, w) e = MatMul (d, w) f = MatMul (e, w) h = MatMul (f, w)
                    after = Add (h, a) }}>
            }},
            else_branch = e () => (float[256, {size}] q) {{ q = Neg (x) }}>
    }}""")
    graphs.name_control_flow(made)
    infer_shapes(made)
    kept = super_blocks(made, load_target("onnxruntime"))
    assert set(kept) == (set() if inner == "cut" else {"If of y", "Loop of p"})


def test_both_sides_of_what_is_kept_are_one_block() -> None:
    made = model_from_text(f"""
    {HEAD}
    g (float[4] x, bool c, bool d) => (float[4] y) {{
        a = Neg (x)
        b = If (c) <then_branch = t () => (float[4] p) {{ p = Exp (a) }},
                    else_branch = e () => (float[4] q) {{ q = Abs (a) }}>
        e1 = Tanh (b)
        f = If (d) <then_branch = t2 () => (float[4] r) {{ r = Sin (e1) }},
                    else_branch = e2 () => (float[4] s) {{ s = Cos (e1) }}>
        y = Add (f, b)
    }}""")
    graphs.name_control_flow(made)
    steps = split(made, keep=lambda node: node.name == "If of b").plan.steps
    assert [type(step) for step in steps] == [Run, Branch, Run]


def test_a_scan_with_a_batch_axis_stays_whatever_the_target() -> None:
    made = model_from_text("""
    <ir_version: 8, opset_import: ["" : 8]>
    g (float[1, 2] s, float[1, 3, 2] x) => (float[1, 2] f, float[1, 3, 2] rows) {
        f, rows = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] r) => (float[2] c, float[2] d) {
            c = Add (a, r)
            d = Identity (c)
        }> ("", s, x)
    }""")
    graphs.name_control_flow(made)
    infer_shapes(made)
    (reason,) = super_blocks(made, load_target("tensorrt")).values()
    assert reason == "Scan of opset 8 has a batch axis of its own"


def test_a_loop_that_carries_strings_has_a_cost() -> None:
    made = model_from_text(f"""
    {HEAD}
    g (string[2] x, int64 n) => (string[2] y) {{
        y = Loop (n, , x) <body = l (int64 i, bool go, string[2] a) => (bool again, string[2] b) {{
            again = Identity (go) b = Identity (a)
        }}>
    }}""")
    graphs.name_control_flow(made)
    assert list(super_blocks(made, load_target("onnxruntime"))) == ["Loop of y"]
