"""x (A B) to (x A) B: every spelling of the product, and what has to stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from graphopt.passes.lowrank.reassociate import Reassociate
from graphopt.rewrite.manager import PassRecord
from tests.passes.common import run_pass
from tests.passes.fuse.common import FLOAT, FLOAT16, G, assert_rounding, in_body, random, reasons

M, N, R = 40, 24, 4
U, V, S = random((M, R)), random((R, N), seed=1), np.abs(random((R,), seed=2)) + 0.5

Product = Callable[[G], str]


def network(product: Product, *, dtype: int = FLOAT, extra: Callable[[G, str], None] | None = None) -> onnx.ModelProto:
    """x W^T with W (M, N) written by ``product``."""
    g = G(20, dtype)
    x = g.input("x", "batch", 3, N)
    w = product(g)
    y = g.op("MatMul", x, g.op("Transpose", w, perm=[1, 0]))
    g.output(y, "batch", 3, M)
    if extra is not None:
        extra(g, w)
    return g.model()


def feed(dtype: int = FLOAT, batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": random((batch, 3, N), dtype, seed=5)}


def rewritten(model: onnx.ModelProto, *feeds: dict[str, np.ndarray]) -> tuple[list[str], int, list[PassRecord]]:
    """The operators afterwards, the elements of the weights, and the records; the result is compared."""
    after, records = run_pass(model, Reassociate)
    assert_rounding(model, after, *(feeds or (feed(),)))
    elements = sum(v.const_value.size for v in after.graph.initializers.values() if v.const_value is not None)
    return [node.op_type for node in after.graph], elements, records


def diagonal(g: G) -> str:
    """As torch.diag is exported."""
    mask = g.const(np.eye(R))
    g.initializers[-1].CopyFrom(onnx.numpy_helper.from_array(np.eye(R, dtype=bool), mask))
    return g.op("Where", mask, g.op("Unsqueeze", g.const(S), g.ints(0)), g.const(0.0))


SPELLINGS: dict[str, Product] = {
    "plain": lambda g: g.op("MatMul", g.const(U), g.const(V)),
    "stored transposed": lambda g: g.op("Transpose", g.op("MatMul", g.const(V.T), g.const(U.T)), perm=[1, 0]),
    "transposed before": lambda g: g.op("MatMul", g.op("Transpose", g.const(U.T), perm=[1, 0]), g.const(V)),
    "gemm": lambda g: g.op("Gemm", g.const(U), g.const(V.T), transB=1),
    "gemm with alpha": lambda g: g.op("Gemm", g.const(U.T), g.const(V), transA=1, alpha=0.5),
    "diag": lambda g: g.op("MatMul", g.op("MatMul", g.const(U), diagonal(g)), g.const(V)),
    "eye": lambda g: g.op(
        "MatMul", g.op("MatMul", g.const(U), g.op("Mul", g.const(np.eye(R)), g.const(S))), g.const(V)
    ),
    "columns": lambda g: g.op("MatMul", g.op("Mul", g.const(U), g.const(S)), g.const(V)),
    "columns divided": lambda g: g.op("MatMul", g.op("Div", g.const(U), g.const(S)), g.const(V)),
    "rows": lambda g: g.op("MatMul", g.const(U), g.op("Mul", g.const(S[:, None]), g.const(V))),
    "rows of the result": lambda g: g.op(
        "Mul", g.op("MatMul", g.const(U), g.const(V)), g.const(random((M, 1), seed=7))
    ),
    "a number": lambda g: g.op("Mul", g.const(3.0), g.op("MatMul", g.const(U), g.const(V))),
    "einsum": lambda g: g.op("Einsum", g.const(U), g.const(S), g.const(V), equation="mk,k,kn->mn"),
    "einsum in another order": lambda g: g.op("Einsum", g.const(V), g.const(U.T), equation="kn,km->mn"),
    "identity": lambda g: g.op("Identity", g.op("MatMul", g.const(U), g.const(V))),
    "three": lambda g: g.op("MatMul", g.op("MatMul", g.const(U), g.const(random((R, R), seed=6))), g.const(V)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str) -> None:
    nodes, elements, _ = rewritten(network(SPELLINGS[spelling]), feed(), feed(batch=1))
    assert nodes == ["MatMul", "MatMul"]
    assert elements == R * (M + N)


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_keeps_what_it_adds(transposed: bool) -> None:
    g = G(20)
    x = g.input("x", *((N, "batch") if transposed else ("batch", N)))
    w = g.op("MatMul", g.const(U), g.const(V))
    bias = g.const(random((M,), seed=3))
    g.output(g.op("Gemm", x, w, bias, transA=int(transposed), transB=1, alpha=0.5, beta=2.0), "batch", M)
    x_feed = random((N, 5) if transposed else (5, N))
    nodes, elements, _ = rewritten(g.model(), {"x": x_feed})
    assert nodes == ["Gemm", "Gemm"]
    assert elements == R * (M + N) + M


def test_from_the_left() -> None:
    g = G(20)
    x = g.input("x", "batch", N, 3)
    g.output(g.op("MatMul", g.op("MatMul", g.const(U), g.const(V)), x), "batch", M, 3)
    nodes, elements, _ = rewritten(g.model(), {"x": random((2, N, 3))})
    assert nodes == ["MatMul", "MatMul"]
    assert elements == R * (M + N)


@pytest.mark.parametrize("spelled", ["bln,rn,mr->blm", "bln,mr,rn->blm"])
def test_an_einsum_with_the_activation(spelled: str) -> None:
    g = G(20)
    x = g.input("x", "batch", 3, N)
    weights = [V, U] if spelled.startswith("bln,rn") else [U, V]
    g.output(g.op("Einsum", x, *map(g.const, weights), equation=spelled), "batch", 3, M)
    assert rewritten(g.model())[0] == ["MatMul", "MatMul"]


def test_an_einsum_of_one_weight() -> None:
    g = G(20)
    x = g.input("x", "batch", 3, N)
    g.output(g.op("Einsum", x, g.const(random((M, N))), equation="bln,mn->blm"), "batch", 3, M)
    assert rewritten(g.model())[0] == ["MatMul"]


@pytest.mark.parametrize(
    "spelled", ["bln,bn->bl", "bln,ln->bn", "bln,mn->lbm", "bln,bm->blm", "bln,mn->bm", "bln,nm->bln"]
)
def test_other_einsums_stay(spelled: str) -> None:
    sizes = {"b": 2, "l": 3, "n": N, "m": M}
    g = G(20)
    x = g.input("x", 2, 3, N)
    terms, _, result = spelled.partition("->")
    g.output(g.op("Einsum", x, g.const(random([sizes[c] for c in terms.split(",")[1]])), equation=spelled),
             *(sizes[c] for c in result))  # fmt: skip
    assert rewritten(g.model())[0] == ["Einsum"]


def test_factors_of_a_high_rank_become_one_weight() -> None:
    model = network(lambda g: g.op("MatMul", g.const(random((M, N))), g.const(random((N, N), seed=1))))
    nodes, elements, _ = rewritten(model)
    assert nodes == ["MatMul"]
    assert elements == M * N


def test_of_three_factors_two_are_multiplied() -> None:
    wide = random((R, 100), seed=3), random((100, N), seed=4)
    model = network(lambda g: g.op("MatMul", g.op("MatMul", g.const(U), g.const(wide[0])), g.const(wide[1])))
    nodes, elements, _ = rewritten(model)
    assert nodes == ["MatMul", "MatMul"]
    assert elements == R * (M + N)


def test_half_precision() -> None:
    model = network(lambda g: g.op("MatMul", g.op("Mul", g.const(U), g.const(S)), g.const(V)), dtype=FLOAT16)
    assert rewritten(model, feed(FLOAT16))[0] == ["MatMul", "MatMul"]


def test_in_a_body() -> None:
    model = in_body(network(SPELLINGS["plain"]))
    after, records = run_pass(model, Reassociate)
    assert records[0].kept == 1
    assert_rounding(model, after, {"condition": np.array(True), **feed()})


def test_a_shared_factor_stays_shared() -> None:
    def product(g: G) -> str:
        u = g.const(U)
        g.output(g.op("ReduceSum", u), rank=2)
        return g.op("MatMul", u, g.const(V))

    nodes, elements, _ = rewritten(network(product))
    assert nodes == ["ReduceSum", "Transpose", "MatMul", "MatMul"]
    assert elements == R * (M + N)


# -- what has to stay --------------------------------------------------------------------------------------------------


def test_a_product_that_something_else_reads() -> None:
    model = network(SPELLINGS["plain"], extra=lambda g, w: g.output(g.op("ReduceSum", w), rank=2) and None)
    nodes, _, records = rewritten(model)
    assert nodes == ["MatMul", "Transpose", "MatMul", "ReduceSum"]
    assert "read elsewhere" in reasons(records)


def test_a_product_that_is_returned() -> None:
    model = network(SPELLINGS["plain"], extra=lambda g, w: g.output(w, M, N) and None)
    nodes, _, records = rewritten(model)
    assert nodes.count("MatMul") == 2
    assert "returned" in reasons(records)


@pytest.mark.parametrize(
    "product",
    [
        lambda g: g.op("Add", g.const(random((M, N))), g.op("MatMul", g.const(U), g.const(V))),
        lambda g: g.op("Mul", g.const(random((M, N))), g.op("MatMul", g.const(U), g.const(V))),
        lambda g: g.op("Relu", g.op("MatMul", g.const(U), g.const(V))),
        lambda g: g.op("Softmax", g.op("MatMul", g.const(U), g.const(V))),
        lambda g: g.op("MatMul", g.op("Relu", g.const(U)), g.const(V)),
        lambda g: g.op("MatMul", g.overridable(U), g.const(V)),
        lambda g: g.op("Gemm", g.const(U), g.const(V), g.const(random((N,)))),
        lambda g: (
            g.op("Transpose", g.op("MatMul", g.const(V.T), g.const(U.T)), perm=[1, 0])
            and g.op("Einsum", g.const(random((M, M))), g.const(random((M, N))), equation="mm,mn->mn")
        ),
        lambda g: g.op("MatMul", g.const(U), g.op("Div", g.const(1.0), g.const(V))),
        lambda g: g.op("Identity", g.const(random((M, N)))),
    ],
)
def test_look_alikes(product: Product) -> None:
    assert rewritten(network(product))[2][0].kept == 0


def test_a_mask_that_is_not_the_identity() -> None:
    def product(g: G) -> str:
        mask = g.const(np.eye(R))
        g.initializers[-1].CopyFrom(onnx.numpy_helper.from_array(np.tri(R).astype(bool), mask))
        vector = g.op("Unsqueeze", g.const(S), g.ints(0))
        return g.op("MatMul", g.op("MatMul", g.const(U), g.op("Where", mask, vector, g.const(0.0))), g.const(V))

    assert rewritten(network(product))[2][0].kept == 0


def test_a_scale_that_is_not_finite() -> None:
    model = network(lambda g: g.op("MatMul", g.op("Div", g.const(U), g.const(np.array([1, 0, 1, 1.0]))), g.const(V)))
    _, records = run_pass(model, Reassociate)
    assert records[0].kept == 0
    assert "a scale is not finite" in reasons(records)


def test_two_activations() -> None:
    g = G(20)
    x, a = g.input("x", "batch", 3, N), g.input("a", N, R)
    g.output(g.op("MatMul", x, g.op("MatMul", a, g.const(U.T))), "batch", 3, M)
    assert rewritten(g.model(), {**feed(), "a": random((N, R))})[2][0].kept == 0


def test_weights_alone_are_left_to_folding() -> None:
    g = G(20)
    x = g.input("x", "batch", 3, N)
    w = g.op("MatMul", g.const(V.T), g.op("MatMul", g.const(random((R, R))), g.const(U.T)))
    g.output(g.op("Add", g.op("ReduceSum", x, keepdims=0), w), N, M)
    assert rewritten(g.model())[2][0].kept == 0
