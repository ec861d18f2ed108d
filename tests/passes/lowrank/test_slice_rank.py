"""slice-rank: pairs of factors cut to their first ranks, against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from graphopt.errors import BadInput
from graphopt.passes.lowrank.slice_rank import SliceRank
from graphopt.recipes.recipe import passes_of
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, NUMPY, G, random, reasons

N, R, M = 9, 8, 7

V, U = random((N, R), DOUBLE, seed=1), random((R, M), DOUBLE, seed=2)
SCALE, SHIFT = random((R,), DOUBLE, seed=3) + 1, random((R,), DOUBLE, seed=4)
FIRST, LAST = random((R,), DOUBLE, seed=5), random((M,), DOUBLE, seed=6)


def cut(x: np.ndarray, rank: int, *, scale: bool, shift: bool, first: bool = False, last: bool = False) -> np.ndarray:
    """((x V + first) * scale + shift) U + last, of the first ranks."""
    t = x @ V[:, :rank] + (FIRST[:rank] if first else 0)
    t = t * (SCALE[:rank] if scale else 1) + (SHIFT[:rank] if shift else 0)
    made: np.ndarray = t @ U[:rank] + (LAST if last else 0)
    return made


def model(
    *, spelling: str = "MatMul", scale: bool = False, shift: bool = False, biases: bool = False, dtype: int = FLOAT
) -> onnx.ModelProto:
    g = G(17, dtype)
    x = g.input("x", *(("batch", N) if spelling == "Gemm" else ("batch", 3, N)))
    if spelling == "Gemm":
        t = g.op("Gemm", x, g.const(V), *([g.const(FIRST)] if biases else []))
    else:
        t = g.op("MatMul", x, g.const(V))
    if scale:
        t = g.op("Mul", t, g.const(SCALE))
    if shift:
        t = g.op("Add", g.const(SHIFT), t)
    if spelling == "Gemm":
        y = g.op("Gemm", t, g.const(np.ascontiguousarray(U.T)), *([g.const(LAST)] if biases else []), transB=1)
    else:
        y = g.op("MatMul", t, g.const(U))
    g.output(y)
    return g.model()


def sizes(before: onnx.ModelProto, **parameters: object) -> int:
    """The rank that is left."""
    after, _ = run_pass(before, SliceRank, **parameters)
    product = next(node for node in after.graph if node.op_type in ("MatMul", "Gemm"))
    shape = product.outputs[0].shape
    assert shape is not None and isinstance(shape[-1], int)
    return shape[-1]


@settings(max_examples=30, deadline=None)
@given(
    spelling=st.sampled_from(["MatMul", "Gemm"]),
    scale=st.booleans(),
    shift=st.booleans(),
    biases=st.booleans(),
    rank=st.integers(1, R - 1),
)
def test_it_is_what_numpy_makes_of_the_first_ranks(
    spelling: str, scale: bool, shift: bool, biases: bool, rank: int
) -> None:
    biases = biases and spelling == "Gemm"
    before = model(spelling=spelling, scale=scale, shift=shift, biases=biases)
    after, records = run_pass(before, SliceRank, rank=rank)
    assert applications(records) == 1
    assert "Mul" not in op_types(after)
    x = random((4, N) if spelling == "Gemm" else (2, 3, N), seed=9)
    wanted = cut(x.astype(np.float64), rank, scale=scale, shift=shift, first=biases, last=biases)
    np.testing.assert_allclose(run_ort(after, {"x": x})[0], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("fraction", "rank"), [(1.0, 8), (0.99, 8), (0.5, 4), (0.51, 5), (0.3, 3), (0.01, 1)])
def test_fraction_is_rounded_up(fraction: float, rank: int) -> None:
    assert sizes(model(), fraction=fraction) == rank


def test_rank_does_not_grow() -> None:
    assert [sizes(model(), rank=rank) for rank in (1, 7, 8, 100)] == [1, 7, 8, 8]


def test_ranks_by_name_come_first() -> None:
    before = model()
    name = before.graph.initializer[1].name
    assert sizes(before, ranks={name: 2}) == 2
    assert sizes(before, ranks={"c_*": 3}) == 3
    assert sizes(before, ranks={"other*": 3}) == R
    assert sizes(before, ranks={"other*": 3}, fraction=0.5) == 4
    assert sizes(before, ranks={name: 2}, fraction=0.5) == 2


@pytest.mark.parametrize("dtype", [FLOAT16, DOUBLE])
def test_dtypes(dtype: int) -> None:
    after, records = run_pass(model(scale=True, shift=True, dtype=dtype), SliceRank, rank=3)
    assert applications(records) == 1
    x = random((2, 3, N), dtype)
    found = run_ort(after, {"x": x})[0]
    wanted = cut(x.astype(np.float64), 3, scale=True, shift=True)
    assert found.dtype == NUMPY[dtype]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=10 * np.finfo(found.dtype).eps * np.abs(wanted).max())


def test_convolutions() -> None:
    v, u = random((R, N, 3, 3), seed=1), random((M, R, 1, 1), seed=2)
    first, last = random((R,), seed=3), random((M,), seed=4)

    def network(rank: int) -> onnx.ModelProto:
        g = G(17)
        x = g.input("x", 1, N, 6, 5)
        t = g.op("Conv", x, g.const(v[:rank]), g.const(first[:rank]), pads=[1] * 4, strides=[2, 1])
        g.output(g.op("Conv", t, g.const(u[:, :rank]), g.const(last)))
        return g.model()

    after, records = run_pass(network(R), SliceRank, rank=3)
    assert applications(records) == 1
    x = {"x": random((1, N, 6, 5))}
    np.testing.assert_allclose(run_ort(after, x)[0], run_ort(network(3), x)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("axes", [2, 3])
def test_constants_on_the_left(axes: int) -> None:
    g = G(17)
    x = g.input("x", *(2,) * (axes - 2), N, 5)
    t = g.op("MatMul", g.const(np.ascontiguousarray(V.T)), x)
    t = g.op("Add", g.op("Mul", t, g.const(SCALE[:, None])), g.const(SHIFT[:, None]))
    g.output(g.op("MatMul", g.const(np.ascontiguousarray(U.T)), t))
    after, records = run_pass(g.model(), SliceRank, rank=3)
    assert applications(records) == 1
    array = random((2,) * (axes - 2) + (N, 5))
    wanted = np.swapaxes(cut(np.swapaxes(array, -1, -2).astype(np.float64), 3, scale=True, shift=True), -1, -2)
    np.testing.assert_allclose(run_ort(after, {"x": array})[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [3, 4])
def test_products_in_a_row(count: int) -> None:
    """Each axis between two of them is cut, whichever of them is the first of a pair."""
    sizes = [9, 8, 7, 6, 5][: count + 1]
    weights = [random(shape, seed=i) for i, shape in enumerate(itertools.pairwise(sizes))]
    g = G(17)
    y = g.input("x", 3, sizes[0])
    for weight in weights:
        y = g.op("MatMul", y, g.const(weight))
    g.output(y)
    after, _ = run_pass(g.model(), SliceRank, rank=3)
    x = random((3, sizes[0]))
    wanted = x.astype(np.float64) @ weights[0][:, :3]
    for weight in weights[1:-1]:
        wanted = wanted @ weight[:3, :3]
    wanted = wanted @ weights[-1][:3]
    np.testing.assert_allclose(run_ort(after, {"x": x})[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_family_from_one_checkpoint() -> None:
    """The lower the rank the smaller, and each is the one above it, cut again."""
    before = model()
    members = [run_pass(before, SliceRank, rank=rank)[0] for rank in (6, 4, 2)]
    for rank, member in zip((6, 4, 2), members, strict=True):
        x = random((1, 3, N))
        wanted = cut(x.astype(np.float64), rank, scale=False, shift=False)
        np.testing.assert_allclose(run_ort(member, {"x": x})[0], wanted, rtol=0, atol=1e-4)


def test_without_parameters_it_is_not_run() -> None:
    assert not SliceRank({}).asked
    assert all(p.name != "slice-rank" for p in passes_of([], ["slice-rank.enabled=true"]))
    assert SliceRank({"fraction": 0.5}).asked and SliceRank({"ranks": {"a": 1}}).asked


def test_one_of_fraction_and_rank() -> None:
    with pytest.raises(BadInput, match="one of fraction and rank"):
        run_pass(model(), SliceRank, fraction=0.5, rank=3)


def test_left_alone() -> None:
    shared = G(17)
    x, u = shared.input("x", 3, N), shared.const(U)
    for _ in range(2):
        shared.output(shared.op("MatMul", shared.op("MatMul", x, shared.const(V)), u))
    quantised = G(17)
    quantised.initializers.append(numpy_helper.from_array(np.ones((N, R), np.int8), "codes"))
    right = quantised.op("DequantizeLinear", "codes", quantised.const(0.5))
    t = quantised.op("MatMul", quantised.input("x", 3, N), right)
    quantised.output(quantised.op("MatMul", t, quantised.const(U)))
    between = G(17)
    t = between.op("MatMul", between.input("x", 3, N), between.const(V))
    between.output(between.op("MatMul", between.op("Relu", t), between.const(U)))
    for g, why in ((shared, "something else reads"), (quantised, "quantised"), (between, "Relu stands between")):
        _after, records = run_pass(g.model(), SliceRank, fraction=0.5)
        assert applications(records) == 0 and why in reasons(records)
