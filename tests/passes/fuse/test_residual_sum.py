"""fuse-residual-sum."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.fuse.residual_sum import FuseResidualSum
from tests.passes.common import assert_same_bits, op_types, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, random, reasons

SHAPE = (2, 3, 8)


def _norm(g: G, x: str) -> str:
    return g.op("LayerNormalization", x, g.const(random((8,), seed=7)), g.const(random((8,), seed=8)))


def _chain(order: str, *, shape: tuple[int, ...] = SHAPE, dtype: int = FLOAT, opset: int = 17) -> G:
    g = G(opset, dtype)
    x, y, z = g.input("x", *shape), g.input("y", *shape), g.input("z", *shape)
    bias = g.const(random((8,), seed=3))
    product = {
        "bias first": lambda: g.op("Add", g.op("Add", x, bias), y),
        "bias second": lambda: g.op("Add", y, g.op("Add", bias, x)),
        "four": lambda: g.op("Add", g.op("Add", g.op("Add", x, bias), y), z),
        "both sides": lambda: g.op("Add", g.op("Add", x, bias), g.op("Add", y, z)),
        "alternating": lambda: g.op("Add", z, g.op("Add", g.op("Add", x, y), bias)),
    }[order]()
    g.output(_norm(g, product))
    return g


ORDERS = ["bias first", "bias second", "four", "both sides"]


@settings(max_examples=30, deadline=None)
@given(
    order=st.sampled_from(ORDERS),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 4), st.just(8)),
    dtype=st.sampled_from([FLOAT, DOUBLE]),
    scale=st.sampled_from([1.0, 1e4, 1e-30]),
)
def test_bitwise(order: str, shape: tuple[int, ...], dtype: int, scale: float) -> None:
    before = _chain(order, shape=shape, dtype=dtype).model()
    after, records = run_pass(before, FuseResidualSum)
    assert "Sum" in op_types(after), reasons(records)
    feeds = {n: random(shape, dtype, seed=i, scale=scale ** (i % 2)) for i, n in enumerate("xyz")}
    assert_same_bits(before, after, {n: a for n, a in feeds.items() if n in {i.name for i in before.graph.input}})


def test_one_sum_for_a_chain_of_four() -> None:
    after, _ = run_pass(_chain("four").model(), FuseResidualSum)
    assert op_types(after) == ["Sum", "LayerNormalization"]


def test_order_is_kept_where_both_sides_are_sums() -> None:
    after, _ = run_pass(_chain("both sides").model(), FuseResidualSum)
    assert sorted(op_types(after)) == ["Add", "LayerNormalization", "Sum"]


def test_last_operands_of_unlike_shape_are_left() -> None:
    after, records = run_pass(_chain("alternating", shape=(2, 1, 8)).model(), FuseResidualSum)
    assert "Sum" in op_types(after)
    g = G(17)
    x = g.op("Add", g.op("Add", g.input("x", *SHAPE), g.const(random((8,)))), g.input("y", 1, 3, 8))
    g.output(_norm(g, x))
    after, records = run_pass(g.model(), FuseResidualSum)
    assert "Sum" not in op_types(after) and "not known to be equal" in reasons(records)


def test_unknown_shapes_are_left() -> None:
    g = G(17)
    x = g.op("Add", g.op("Add", g.input("x", "a", None, 8), g.const(random((8,)))), g.input("y", "a", None, 8))
    g.output(_norm(g, x))
    assert "Sum" not in op_types(run_pass(g.model(), FuseResidualSum)[0])


@pytest.mark.parametrize("how", ["reader", "output"])
def test_a_partial_sum_that_is_read_elsewhere(how: str) -> None:
    g = G(17)
    part = g.op("Add", g.input("x", *SHAPE), g.const(random((8,))))
    g.output(_norm(g, g.op("Add", part, g.input("y", *SHAPE))))
    g.output(part if how == "output" else g.op("Neg", part))
    assert "Sum" not in op_types(run_pass(g.model(), FuseResidualSum)[0])


def test_the_sum_may_be_read_elsewhere_and_be_an_output() -> None:
    """A residual stream: the sum goes on beside the normalisation."""
    g = G(17)
    total = g.op("Add", g.op("Add", g.input("x", *SHAPE), g.const(random((8,)))), g.input("y", *SHAPE))
    g.output(_norm(g, total))
    g.output(g.op("Neg", total))
    g.output(total)
    before = g.model()
    after, _ = run_pass(before, FuseResidualSum)
    assert "Sum" in op_types(after) and "Add" not in op_types(after)
    assert_same_bits(before, after, {"x": random(SHAPE), "y": random(SHAPE, seed=1)})


def test_one_addition_is_left() -> None:
    g = G(17)
    g.output(_norm(g, g.op("Add", g.input("x", *SHAPE), g.input("y", *SHAPE))))
    assert op_types(run_pass(g.model(), FuseResidualSum)[0]) == ["Add", "LayerNormalization"]


def test_float16_is_left() -> None:
    after, records = run_pass(_chain("bias first", dtype=FLOAT16).model(), FuseResidualSum)
    assert "Sum" not in op_types(after) and "float16" in reasons(records)


def test_only_before_a_normalisation() -> None:
    g = G(17)
    g.output(g.op("Add", g.op("Add", g.input("x", *SHAPE), g.const(random((8,)))), g.input("y", *SHAPE)))
    assert op_types(run_pass(g.model(), FuseResidualSum)[0]) == ["Add", "Add"]


def test_a_matrix_product_is_left_to_gemm() -> None:
    g = G(17)
    product = g.op("MatMul", g.input("x", 4, 8), g.const(random((8, 8))))
    g.output(_norm(g, g.op("Add", g.op("Add", product, g.const(random((8,)))), g.input("y", 4, 8))))
    after, records = run_pass(g.model(), FuseResidualSum)
    assert "Sum" not in op_types(after) and "Gemm" in reasons(records)
