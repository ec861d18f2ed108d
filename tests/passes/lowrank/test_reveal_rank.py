"""reveal-rank: weights that were multiplied out, and those that only look as if they had been."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.passes.lowrank.pivot import Pivot
from graphopt.passes.lowrank.reveal_rank import RevealRank
from graphopt.rewrite import Context
from graphopt.rewrite.manager import run_passes
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, NUMPY, G, assert_rounding, in_body, random, reasons

N, M = 72, 96


def product(rank: int, *, rows: int = N, columns: int = M, seed: int = 1) -> np.ndarray:
    """V U, float64 (rows, columns)."""
    v, u = random((rows, rank), DOUBLE, seed=seed), random((rank, columns), DOUBLE, seed=seed + 1)
    made: np.ndarray = v @ u / np.sqrt(rank * rows)
    return made


def one(weight: np.ndarray, *, dtype: int = FLOAT, op: str = "MatMul", bias: bool = False) -> onnx.ModelProto:
    g = G(17, dtype)
    x = g.input("x", "batch", weight.shape[0])
    biases = [g.const(random((weight.shape[1],), dtype, seed=7))] if bias else []
    if op == "Gemm":
        g.output(g.op("Gemm", x, g.const(np.ascontiguousarray(weight.T)), *biases, transB=1))
    else:
        g.output(g.op("MatMul", x, g.const(weight)))
    return g.model()


def shapes(model: ir.Model) -> list[tuple[int, ...]]:
    values = model.graph.initializers.values()
    return sorted(tuple(v.shape.numpy()) for v in values if v.shape is not None and len(v.shape) > 1)


def revealed(before: onnx.ModelProto, target: str = "onnxruntime") -> ir.Model:
    after, records = run_pass(before, RevealRank, target=target)
    assert applications(records) == 1, reasons(records)
    return after


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize(("op", "bias"), [("MatMul", False), ("Gemm", False), ("Gemm", True)])
def test_the_rank_is_found_exactly(op: str, bias: bool, rank: int) -> None:
    before = one(product(rank), op=op, bias=bias)
    after = revealed(before)
    assert op_types(after) == [op, op]
    wanted = [(N, rank), (rank, M)] if op == "MatMul" else [(rank, N), (M, rank)]
    assert shapes(after) == sorted(wanted)
    for rows in (0, 1, 40):
        assert_rounding(before, after, {"x": random((rows, N))})


def test_float64_and_float16() -> None:
    for dtype in (DOUBLE, FLOAT16):
        weight = product(6).astype(NUMPY[dtype])
        after = revealed(one(weight, dtype=dtype))
        assert shapes(after) == [(6, M), (N, 6)]
        inputs = {"x": random((3, N), dtype)}
        (old,), (new,) = run_ort(one(weight, dtype=dtype), inputs), run_ort(after, inputs)
        assert old.dtype == new.dtype
        np.testing.assert_allclose(new, old, rtol=0, atol=8 * np.finfo(old.dtype).eps * np.abs(old).max())


def test_a_convolution(arithmetic: str) -> None:
    n, m, rank = 8, 64, 10
    kernel = product(rank, rows=m, columns=n * 9).reshape(m, n, 3, 3)
    g = G(17)
    y = g.op("Conv", g.input("x", 1, n, 7, 6), g.const(kernel), g.const(random((m,))), pads=[1] * 4, strides=[2, 1])
    g.output(y)
    before = g.model()
    after = revealed(before, arithmetic)
    assert op_types(after) == ["Conv", "Conv"] and shapes(after) == [(10, 8, 3, 3), (64, 10, 1, 1)]
    assert_rounding(before, after, {"x": random((1, n, 7, 6))})


def test_one_behind_the_other(arithmetic: str) -> None:
    """The second reads what takes the place of the first's result."""
    g = G(17)
    x = g.input("x", 3, N)
    for number in range(3):
        x = g.op("MatMul", x, g.const(product(5, columns=N, seed=2 * number)))
    g.output(x)
    before = g.model()
    after, records = run_pass(before, RevealRank, target=arithmetic)
    assert applications(records) == 3 and op_types(after) == ["MatMul"] * 6
    inputs = {"x": random((3, N))}
    (old,), (new,) = run_ort(before, inputs), run_ort(after, inputs)
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * np.abs(old).max())


def test_in_a_body(arithmetic: str) -> None:
    g = G(17)
    g.output(g.op("Relu", g.op("MatMul", g.input("x", 3, N), g.const(product(5)))))
    before = in_body(g.model())
    after = revealed(before, arithmetic)
    assert op_types(after).count("MatMul") == 2
    inputs = {"x": random((3, N)), "condition": np.array(True)}
    np.testing.assert_allclose(run_ort(after, inputs)[0], run_ort(before, inputs)[0], rtol=0, atol=1e-5)


def test_again_it_finds_nothing() -> None:
    after = revealed(one(product(5)))
    proto = ir.to_proto(after)
    for node in proto.graph.node:
        del node.metadata_props[:]
    assert applications(run_pass(proto, RevealRank)[1]) == 0


def _noisy() -> np.ndarray:
    return product(5) + 1e-5 * random((N, M), DOUBLE, seed=8)


def _falling() -> np.ndarray:
    u, _ = np.linalg.qr(random((N, N), DOUBLE, seed=3))
    v, _ = np.linalg.qr(random((M, N), DOUBLE, seed=4))
    made: np.ndarray = u * 0.9 ** np.arange(N) @ v.T
    return made


LEFT = {
    "full": lambda: random((N, M)) / 8,
    "noisy": _noisy,
    "falling singular values": _falling,
    "small": lambda: product(2, rows=40, columns=90),
    "not finite": lambda: np.where(np.arange(N * M).reshape(N, M) == 77, np.nan, product(5)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    before = one(LEFT[name]())
    after, records = run_pass(before, RevealRank)
    assert applications(records) == 0 and op_types(after) == ["MatMul"]


def test_a_rank_at_which_factors_are_larger_is_for_pivot() -> None:
    before = one(product(50))
    after, records = run_pass(before, RevealRank)
    assert applications(records) == 0
    assert "of rank 50 the factors hold 8,400 elements, the weight 6,912" in reasons(records)
    after, records = run_pass(before, Pivot, gather="always")
    assert applications(records) == 1
    assert shapes(after) == [(50, M - 50), (N, 50)]


def test_a_weight_that_something_else_reads() -> None:
    g = G(17)
    weight = g.const(product(5))
    g.output(g.op("MatMul", g.input("x", 3, N), weight))
    g.output(g.op("ReduceSum", weight))
    assert applications(run_pass(g.model(), RevealRank)[1]) == 0


def test_it_tells_how_far_it_is() -> None:
    model = ir.from_proto(one(product(20)))
    infer_shapes(model)
    said: list[str] = []
    run_passes(Context(model, load_target("onnxruntime"), say=said.append), [RevealRank()])
    assert said[0] == "looking for hidden rank: 1 of 1 weights"
