"""pivot: every way of writing two factors in both forms, where the permutation goes, and what is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.lowrank.pivot import JOINT, Pivot, PivotLossy
from graphopt.passes.lowrank.pivot_sites import PivotSite
from graphopt.rewrite import Context, Kind, Pass
from graphopt.rewrite.manager import PassRecord
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT, FLOAT16, G, assert_rounding, in_body, only, random, reasons

N, M, R, B = 10, 14, 4, 3
"""Inputs, outputs, rank, and rows."""


def pivoted(
    before: onnx.ModelProto, target: str, pass_class: type[Pass] = Pivot, **parameters: object
) -> tuple[ir.Model, list[PassRecord]]:
    return run_pass(before, pass_class, target=target, **parameters)


def matrices(model: ir.Model | onnx.ModelProto) -> int:
    """Elements of the constants of two and more axes."""
    made = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    return sum(
        int(np.prod(value.shape.numpy()))
        for value in made.graph.initializers.values()
        if value.shape is not None and len(value.shape) > 1
    )


def weight(g: G, inputs: int, outputs: int, seed: int, *, flip: bool = False) -> str:
    array = random((inputs, outputs), g.dtype, seed=seed, scale=inputs**-0.5)
    return g.const(np.ascontiguousarray(array.T) if flip else array)


# ---- two factors, however they are written ---------------------------------------------------------------------------

Product = Callable[[G, str, int, int, int], str]


def matmul(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("MatMul", x, weight(g, inputs, outputs, seed))


def gemm(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    bias = g.const(random((outputs,), g.dtype, seed=seed + 50))
    return g.op("Gemm", x, weight(g, inputs, outputs, seed, flip=True), bias, transB=1)


def left(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
    return g.op("MatMul", weight(g, inputs, outputs, seed, flip=True), x)


def conv(kernel: int, *, bias: bool = True, **options: object) -> Product:
    def make(g: G, x: str, inputs: int, outputs: int, seed: int) -> str:
        shape = (outputs, inputs, kernel, kernel)
        array = random(shape, g.dtype, seed=seed, scale=(inputs * kernel**2) ** -0.5)
        biases = [g.const(random((outputs,), g.dtype, seed=seed + 50))] if bias else []
        attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, **options}
        return g.op("Conv", x, g.const(array), *biases, **attributes)

    return make


@dataclass(frozen=True)
class Written:
    """How two factors are written, and on what.

    Attributes:
        first: V.
        second: U.
        shape: Of x, with the channels where they belong.
        plain: What comes before and behind in the same spelling.
        forms: Those that it has.
        kernels: Of V and U, elements.
    """

    first: Product
    second: Product
    shape: tuple[int | str, ...]
    plain: Product
    forms: tuple[str, ...] = ("rows", "columns")
    kernels: tuple[int, int] = (1, 1)


WRITTEN = {
    "matmul": Written(matmul, matmul, (2, "length", N), matmul),
    "matmul of a matrix": Written(matmul, matmul, ("batch", N), matmul),
    "gemm": Written(gemm, gemm, ("batch", N), gemm),
    "matmul and gemm": Written(matmul, gemm, ("batch", N), gemm),
    "gemm and matmul": Written(gemm, matmul, ("batch", N), gemm),
    "left": Written(left, left, (N, 5), left),
    "left of a batch": Written(left, left, (2, N, 5), left),
    "1x1 and 1x1": Written(conv(1), conv(1), (2, N, 5, 4), conv(1)),
    "3x3 and 1x1": Written(conv(3), conv(1), ("batch", N, 5, 4), conv(1), ("rows",), (9, 1)),
    "3x3 by 2 and 1x1": Written(conv(3, strides=[2, 2]), conv(1), (2, N, 6, 5), conv(1), ("rows",), (9, 1)),
    "1x1 and 3x3": Written(conv(1, bias=False), conv(3), (2, N, 5, 4), conv(1), ("columns",), (1, 9)),
    "1x1 and 3x3, no padding": Written(conv(1), conv(3, pads=[0] * 4), (2, N, 5, 4), conv(1), ("columns",), (1, 9)),
}
CASES = [(name, form) for name, how in WRITTEN.items() for form in how.forms]


def network(how: Written, form: str, *, dtype: int = FLOAT, opset: int = 17, rank: int = R) -> onnx.ModelProto:
    """A pair with something behind it (rows) or before it (columns) that takes the permutation."""
    g = G(opset, dtype)
    x = g.input("x", *how.shape)
    if form == "columns":
        x = g.op("Relu", how.plain(g, x, N, N, 1))
    y = how.second(g, how.first(g, x, N, rank, 2), rank, M, 3)
    if form == "rows":
        y = how.plain(g, g.op("Relu", y), M, 5, 4)
    g.output(y)
    return g.model()


def feed(model: onnx.ModelProto, *, size: int = B, seed: int = 9) -> dict[str, np.ndarray]:
    return {
        value.name: random(
            [d.dim_value or size for d in value.type.tensor_type.shape.dim], value.type.tensor_type.elem_type, seed=seed
        )
        for value in model.graph.input
    }


def saved(how: Written, form: str, rank: int = R) -> int:
    """What the pivot form of a pair is smaller by than the pair: r^2 of the pointwise factor."""
    return rank * rank


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("opset", [11, 17, 24])
def test_every_spelling(name: str, form: str, opset: int, arithmetic: str) -> None:
    before = network(WRITTEN[name], form, opset=opset)
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1, reasons(records)
    assert "Gather" not in op_types(after)
    assert ("Concat" if form == "rows" else "Split") in op_types(after)
    assert matrices(before) - matrices(after) == saved(WRITTEN[name], form)
    assert_rounding(before, after, feed(before), feed(before, size=1, seed=3))


@pytest.mark.parametrize(("name", "form"), [("matmul", "rows"), ("gemm", "columns"), ("left", "columns")])
def test_float64(name: str, form: str, arithmetic: str) -> None:
    before = network(WRITTEN[name], form, dtype=DOUBLE)
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1
    old, new = (run_ort(model, feed(before))[0] for model in (before, after))
    assert new.dtype == np.float64
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-14 * np.abs(old).max())


@pytest.mark.parametrize(("name", "form"), [("matmul", "rows"), ("gemm", "columns"), ("left", "rows")])
def test_float16_is_lossy(name: str, form: str, arithmetic: str) -> None:
    """Within a few roundings of the factors, and both passes take it: one judged by the rounding rule, one not."""
    assert (Pivot.kind, PivotLossy.kind) == (Kind.ROUNDING, Kind.LOSSY)
    before = network(WRITTEN[name], form, dtype=FLOAT16)
    for pass_class in (Pivot, PivotLossy):
        after, records = pivoted(before, arithmetic, pass_class)
        assert applications(records) == 1
        inputs = feed(before)
        for old, new in zip(run_ort(before, inputs), run_ort(after, inputs), strict=True):
            assert new.dtype == np.float16
            np.testing.assert_allclose(new, old, rtol=0, atol=1e-2 * np.abs(old).max())


def test_pivot_lossy_leaves_float32_to_pivot(arithmetic: str) -> None:
    before = network(WRITTEN["matmul"], "rows")
    assert applications(pivoted(before, arithmetic, PivotLossy)[1]) == 0


def test_bfloat16() -> None:
    """No runtime at hand multiplies it: the constants are looked at."""
    g = G(22)
    dtype = TensorProto.BFLOAT16
    v, u, w = random((N, R), seed=1), random((R, M), seed=2), random((M, 5), seed=3)
    names = [g.op("Cast", g.const(array), to=dtype) for array in (v, u, w)]
    y = g.op("MatMul", g.op("MatMul", g.input("x", 3, N, dtype=dtype), names[0]), names[1])
    g.output(g.op("MatMul", g.op("Relu", y), names[2]), dtype=dtype)
    after, records = run_pass(g.model(), Pivot, target="onnx", gather="always")
    assert applications(records) == 1
    joined = only(after, "Concat")
    kept, made = (part.producer() for part in joined.inputs if part is not None)
    assert kept is not None and made is not None
    rows, coefficients = (_array(node.inputs[1]) for node in (kept, made))
    assert rows.dtype == coefficients.dtype == ml_dtypes.bfloat16
    assert (rows.shape, coefficients.shape) == ((N, R), (R, M - R))
    found = np.concatenate([rows.astype(np.float64), rows.astype(np.float64) @ coefficients.astype(np.float64)], axis=1)
    exact = (v.astype(ml_dtypes.bfloat16).astype(np.float64)) @ u.astype(ml_dtypes.bfloat16).astype(np.float64)
    order = [int(np.argmin(np.abs(exact - column[:, None]).sum(axis=0))) for column in found.T]
    assert sorted(order) == list(range(M))
    np.testing.assert_allclose(found, exact[:, order], rtol=0, atol=3 * 2**-8 * np.abs(exact).max())


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


@pytest.mark.parametrize("second", ["MatMul", "Gemm"])
@pytest.mark.parametrize("axis", [0, -2])
def test_a_table_and_a_product(axis: int, second: str, arithmetic: str) -> None:
    """Rows of the table are columns of V: row form only, and every index, negative ones too, means what it did."""
    g = G(17)
    ids = g.input("x", 7, dtype=TensorProto.INT64)
    rows = g.op("Gather", g.const(random((11, R), seed=1)), ids, axis=axis)
    y = matmul(g, rows, R, M, 2) if second == "MatMul" else gemm(g, rows, R, M, 2)
    g.output(matmul(g, g.op("Relu", y), M, 5, 3))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and matrices(before) - matrices(after) == R * R
    assert_rounding(before, after, {"x": np.array([0, 3, 10, -1, -11, 5, 5])})


# ---- biases, scales and shifts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("between", ["scale", "shift", "shift then scale", "scale then shift", "nothing"])
@pytest.mark.parametrize("product", ["matmul", "gemm", "left", "1x1"])
def test_what_stands_between_and_behind(product: str, between: str, form: str, arithmetic: str) -> None:
    how = {"matmul": WRITTEN["matmul"], "gemm": WRITTEN["gemm"], "left": WRITTEN["left"]}.get(
        product, WRITTEN["1x1 and 1x1"]
    )
    behind = {"left": (1,), "1x1": (1, 1)}.get(product, ())
    g = G(17)
    x = g.input("x", *how.shape)
    if form == "columns":
        x = g.op("Relu", how.plain(g, x, N, N, 1))
    inner = how.first(g, x, N, R, 2)
    for number, word in enumerate(w for w in between.split(" then ") if w != "nothing"):
        vector = g.const(random((R, *behind), seed=20 + number) + (1 if word == "scale" else 0))
        inner = g.op("Mul", inner, vector) if word == "scale" else g.op("Add", vector, inner)
    y = g.op("Add", how.second(g, inner, R, M, 3), g.const(random((M, *behind), seed=30)))
    if form == "rows":
        y = how.plain(g, g.op("Relu", y), M, 5, 4)
    g.output(y)
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1, reasons(records)
    assert "Mul" not in op_types(after) and "Gather" not in op_types(after)
    assert_rounding(before, after, feed(before))


def test_the_shift_is_not_seen_by_padding(arithmetic: str) -> None:
    """Behind a padded convolution a shift between is no bias: there is no such pair."""
    how = Written(conv(1), conv(3), (2, N, 5, 4), conv(1))
    _after, records = pivoted(network(how, "columns"), arithmetic)
    assert applications(records) == 0 and "padding" in reasons(records)


# ---- where the permutation goes --------------------------------------------------------------------------------------


def mlp(g: G, x: str, *, width: int = N, hidden: int = M, rank: int = R, bias: bool = False) -> str:
    middle = matmul(g, matmul(g, x, width, rank, 1), rank, hidden, 2)
    if bias:
        middle = g.op("Add", g.const(random((hidden,), seed=5)), middle)
    return matmul(g, matmul(g, g.op("Relu", middle), hidden, rank, 3), rank, width, 4)


def test_the_two_of_an_mlp_share_their_pivots(arithmetic: str) -> None:
    g = G(17)
    x = g.input("x", 2, 3, N)
    g.output(g.op("Add", x, mlp(g, x, bias=True)))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1
    assert sorted(op_types(after)) == ["Add"] * 3 + ["Concat"] + ["MatMul"] * 4 + ["Relu", "Split"]
    assert matrices(after) == 2 * R * (N + M - R)
    assert_rounding(before, after, feed(before))


def test_gate_up_and_down_share_their_pivots(arithmetic: str) -> None:
    g = G(17)
    x = g.input("x", 2, 3, N)
    gate, up = (matmul(g, matmul(g, x, N, R, seed), R, M, seed + 1) for seed in (1, 3))
    silu = g.op("Mul", gate, g.op("Sigmoid", gate))
    g.output(matmul(g, matmul(g, g.op("Mul", silu, up), M, R, 5), R, N, 6))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert matrices(after) == 3 * R * (N + M - R)
    assert_rounding(before, after, feed(before))


def test_ranks_are_padded_with_further_pivots(arithmetic: str) -> None:
    """3 and 6 become 4 and 8; where nothing would be left to make of the pivots, the rank stays."""
    g = G(17)
    x = g.input("x", 2, 3, N)
    gate, up = (matmul(g, matmul(g, x, N, rank, rank), rank, M, rank + 10) for rank in (3, 6))
    g.output(matmul(g, g.op("Mul", gate, up), M, N, 5))
    before = g.model()
    after, _ = pivoted(before, arithmetic, multiple=4)
    assert matrices(after) == 4 * (N + M - 4) + 8 * (N + M - 8) + M * N
    assert_rounding(before, after, feed(before))
    assert matrices(pivoted(before, arithmetic, multiple=16)[0]) == 3 * (N + M - 3) + 6 * (N + M - 6) + M * N


def test_ranks_that_differ_share_their_pivots(arithmetic: str) -> None:
    g = G(17)
    x = g.input("x", 2, 3, N)
    gate, up = (matmul(g, matmul(g, x, N, rank, rank), rank, M, rank + 10) for rank in (3, 6))
    g.output(matmul(g, g.op("Mul", g.op("Tanh", gate), up), M, 5, 7))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert matrices(before) - matrices(after) == 3 * 3 + 6 * 6
    assert_rounding(before, after, feed(before))


def test_a_chain_of_convolutions(arithmetic: str) -> None:
    g = G(17)
    y = g.input("x", 1, N, 6, 5)
    for step, channels in enumerate((M, 12, 5)):
        inputs = (N, M, 12)[step]
        y = conv(1)(g, conv(3, bias=False)(g, y, inputs, R, 2 * step), R, channels, 2 * step + 1)
        y = g.op("Relu", y)
    g.output(conv(1)(g, y, 5, 5, 9))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 3, reasons(records)
    assert "Gather" not in op_types(after)
    assert matrices(before) - matrices(after) == 3 * R * R
    assert_rounding(before, after, feed(before))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_products_in_a_row(count: int, arithmetic: str) -> None:
    """Pairs that overlap: what becomes of one is right whatever becomes of the others."""
    sizes = [N, R, M, 3, N, 5][: count + 1]
    g = G(17)
    y = g.input("x", 2, 3, N)
    for seed, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        y = matmul(g, y, inputs, outputs, seed)
    g.output(y)
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) >= 1 and matrices(after) < matrices(before)
    assert_rounding(before, after, feed(before))


def test_norms_take_the_order_too(arithmetic: str) -> None:
    g = G(17)
    middle = matmul(g, matmul(g, g.input("x", 2, 3, N), N, R, 1), R, M, 2)
    scale, shift = (g.const(random((M,), seed=seed) + 1) for seed in (3, 4))
    g.output(matmul(g, g.op("LayerNormalization", middle, scale, shift, axis=-1), M, 5, 5))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert_rounding(before, after, feed(before))


def test_more_sites_than_share_pivots_well(arithmetic: str) -> None:
    """More than JOINT meet in one class: as many are folded there, the rest have a Gather or keep their factors."""
    g = G(17)
    x = g.input("x", 2, 3, N)
    total = ""
    for number in range(JOINT + 1):
        part = matmul(g, matmul(g, x, N, R, 2 * number), R, M, 2 * number + 1)
        total = g.op("Add", total, part) if total else part
    g.output(matmul(g, g.op("Relu", total), M, 5, 40))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert op_types(after).count("Gather") == 1
    assert matrices(before) - matrices(after) == (JOINT + 1) * R * R
    assert_rounding(before, after, feed(before))
    some, records = pivoted(before, arithmetic, gather="never")
    assert applications(records) == 1 and "permutation cannot be folded" in reasons(records)
    assert op_types(some).count("Concat") == JOINT and "Gather" not in op_types(some)
    assert_rounding(before, some, feed(before))


def residual(form: str = "rows") -> onnx.ModelProto:
    g = G(17)
    x = g.input("x", 2, 3, N)
    g.output(g.op("Add", x, matmul(g, matmul(g, x, N, R, 1), R, N, 2)))
    return g.model()


def test_a_gather_stays_where_it_is_cheaper(arithmetic: str) -> None:
    before = residual()
    after, _records = pivoted(before, arithmetic)
    assert op_types(after) == ["MatMul", "MatMul", "Concat", "Gather", "Add"]
    assert matrices(after) == R * (2 * N - R)
    assert_rounding(before, after, feed(before))
    assert only(after, "Gather").attributes["axis"].as_int() == -1


def test_a_gather_is_not_worth_it_on_a_real_machine() -> None:
    _after, records = pivoted(residual(), "onnxruntime")
    assert applications(records) == 0
    assert "not cheaper with a Gather" in reasons(records) and "graph input 'x'" in reasons(records)


def test_gather_always_and_never(arithmetic: str) -> None:
    before = residual()
    always, _ = pivoted(before, "onnxruntime", gather="always")
    assert op_types(always).count("Gather") == 1
    assert_rounding(before, always, feed(before))
    never, records = pivoted(before, arithmetic, gather="never")
    assert applications(records) == 0 and "graph input 'x'" in reasons(records)
    assert op_types(never) == op_types(ir.from_proto(before))


@pytest.mark.parametrize("name", ["gemm", "left of a batch", "3x3 and 1x1"])
def test_a_gather_on_the_axis_of_the_channels(name: str, arithmetic: str) -> None:
    g = G(17)
    how = WRITTEN[name]
    x = g.input("x", *how.shape)
    g.output(how.second(g, how.first(g, x, N, R, 2), R, M, 3))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert op_types(after).count("Gather") == 1, reasons(records)
    assert_rounding(before, after, feed(before))


@pytest.mark.parametrize("gather", ["always", "never"])
def test_x_and_y_of_one_class(gather: str, arithmetic: str) -> None:
    """Inside a residual stream, free at its ends: a permutation of y would be one of x."""
    g = G(17)
    x = matmul(g, g.input("x", 2, 3, N), N, N, 1)
    y = g.op("Add", x, matmul(g, matmul(g, x, N, R, 2), R, N, 3))
    g.output(matmul(g, g.op("Relu", y), N, 5, 4))
    before = g.model()
    after, _ = pivoted(before, arithmetic, gather=gather)
    assert op_types(after).count("Gather") == (gather == "always")
    assert_rounding(before, after, feed(before))


def test_the_output_is_y_and_is_read_on(arithmetic: str) -> None:
    """A graph output has its channels in their order, whoever else reads it."""
    g = G(17)
    y = matmul(g, matmul(g, g.input("x", 2, 3, N), N, R, 1), R, M, 2)
    g.output(y)
    g.output(matmul(g, g.op("Relu", y), M, 5, 3))
    before = g.model()
    after, _ = pivoted(before, arithmetic)
    assert "Gather" in op_types(after)
    assert_rounding(before, after, feed(before))


def test_a_second_reader_of_y_takes_the_permutation_too(arithmetic: str) -> None:
    g = G(17)
    y = matmul(g, matmul(g, g.input("x", 2, 3, N), N, R, 1), R, M, 2)
    g.output(matmul(g, g.op("Relu", y), M, 5, 3))
    g.output(g.op("ReduceMax", g.op("Tanh", y), axes=[-1], keepdims=0))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert_rounding(before, after, feed(before))


def test_where_both_are_refused_each_is_tried_alone(arithmetic: str) -> None:
    """Sites whose rounding is too much together get pivots to spare; then fewer are folded, the rest have a Gather."""
    g = G(17)
    x = g.input("x", 2, 3, N)
    g.output(mlp(g, x))
    before = g.model()
    both, _ = pivoted(before, arithmetic)
    assert {"Concat", "Split"} <= set(op_types(both))
    (key,) = _keys(before, arithmetic)
    spared, _ = run_pass(before, Pivot, target=arithmetic, skip=[key])
    assert sorted(op_types(spared)) == sorted(op_types(both))
    assert matrices(spared) == 2 * (R + 1) * (N + M - R - 1)
    assert_rounding(before, spared, feed(before))
    name, _, value = key.partition("@")
    one, _ = run_pass(before, Pivot, target=arithmetic, skip=[key, f"{name}-spare@{value}"])
    assert op_types(one).count("Concat") == 2 and op_types(one).count("Gather") == 1
    assert matrices(one) == matrices(both)
    assert_rounding(before, one, feed(before))


def test_fewer_sites_are_tried_with_pivots_to_spare_too(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []

    def too_coarse(ctx: Context, members: list[tuple[PivotSite, bool]], order: object) -> str | None:
        tried.append((len(members), members[0][0].spare))
        return None if tried[-1] == (1, 1) else "rounding errors would be large"

    monkeypatch.setattr("graphopt.passes.lowrank.pivot._too_coarse", too_coarse)
    g = G(17)
    g.output(mlp(g, g.input("x", 2, 3, N)))
    before = g.model()
    after, records = pivoted(before, arithmetic, gather="never")
    assert tried[:5] == [(2, 0), (2, 1), (1, 0), (1, 0), (1, 1)]
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert_rounding(before, after, feed(before))


@pytest.mark.parametrize(
    ("gather", "said"),
    [("never", "folded, its rounding errors would be"), ("always", "rounding errors would be")],
)
def test_rounding_that_is_too_much_is_the_reason(
    gather: str, said: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.passes.lowrank.pivot.MOST_AMPLIFIED", 1e-3)
    g = G(17)
    g.output(mlp(g, g.input("x", 2, 3, N)))
    before = g.model()
    after, records = pivoted(before, arithmetic, gather=gather)
    assert op_types(after) == op_types(ir.from_proto(before))
    told = [reason for reason in records[0].near_misses.values() if reason.startswith(said)]
    assert len(told) == 2 and all(reason.endswith("times those of the factors") for reason in told)


def _keys(before: onnx.ModelProto, target: str) -> list[str]:
    from graphopt.rewrite.manager import run_passes
    from graphopt.shapes import infer_shapes
    from graphopt.targets import load_target

    model = ir.from_proto(before)
    infer_shapes(model)
    ctx = Context(model, load_target(target))
    run_passes(ctx, [Pivot({})])
    return [application.key for application in ctx.applications]


# ---- left alone, and why ---------------------------------------------------------------------------------------------


def refused(build: Callable[[G], None], target: str, *why: str) -> None:
    g = G(17)
    build(g)
    before = g.model()
    after, records = pivoted(before, target)
    assert applications(records) == 0 and op_types(after) == op_types(ir.from_proto(before))
    told = reasons(records)
    assert all(part in told for part in why), told


def _full(g: G) -> None:
    y = matmul(g, matmul(g, g.input("x", 3, N), N, N, 1), N, M, 2)
    g.output(matmul(g, g.op("Relu", y), M, 5, 3))


def _shared_factor(g: G) -> None:
    x, u = g.input("x", 3, N), weight(g, R, M, 2)
    for seed in (1, 3):
        g.output(matmul(g, g.op("Relu", g.op("MatMul", matmul(g, x, N, R, seed), u)), M, 5, 4 + seed))


def _read_elsewhere(g: G) -> None:
    inner = matmul(g, g.input("x", 3, N), N, R, 1)
    g.output(matmul(g, g.op("Relu", matmul(g, inner, R, M, 2)), M, 5, 3))
    g.output(g.op("Tanh", inner))


def _inner_output(g: G) -> None:
    inner = matmul(g, g.input("x", 3, N), N, R, 1)
    g.output(inner)
    g.output(matmul(g, g.op("Relu", matmul(g, inner, R, M, 2)), M, 5, 3))


def _quantised(g: G) -> None:
    codes = np.random.default_rng(0).integers(-100, 100, (N, R)).astype(np.int8)
    g.initializers.append(numpy_helper.from_array(codes, "codes"))
    right = g.op("DequantizeLinear", "codes", g.const(0.01))
    inner = g.op("MatMul", g.input("x", 3, N), right)
    g.output(matmul(g, g.op("Relu", matmul(g, inner, R, M, 2)), M, 5, 3))


def _both_spatial(g: G) -> None:
    inner = conv(3, bias=False)(g, g.input("x", 1, N, 6, 6), N, R, 1)
    g.output(conv(1)(g, g.op("Relu", conv(3)(g, inner, R, M, 2)), M, 5, 3))


def _columns_only_and_pinned(g: G) -> None:
    inner = conv(1, bias=False)(g, g.input("x", 1, N, 6, 6), N, R, 1)
    g.output(conv(3)(g, inner, R, M, 2))


def _overridable(g: G) -> None:
    inner = g.op("MatMul", g.input("x", 3, N), g.overridable(random((N, R), seed=1)))
    g.output(matmul(g, g.op("Relu", matmul(g, inner, R, M, 2)), M, 5, 3))


def _nonlinear(g: G) -> None:
    inner = g.op("Relu", matmul(g, g.input("x", 3, N), N, R, 1))
    g.output(matmul(g, g.op("Relu", matmul(g, inner, R, M, 2)), M, 5, 3))


REFUSED: dict[str, tuple[Callable[[G], None], str]] = {
    "full rank": (_full, f"rank {N} is full"),
    "a shared factor": (_shared_factor, "something else reads a factor too"),
    "the value between is read": (_read_elsewhere, "read elsewhere"),
    "the value between is an output": (_inner_output, "read elsewhere"),
    "a quantised factor": (_quantised, "quantised"),
    "both convolutions look beside": (_both_spatial, "both convolutions look beside"),
    "a 3x3 behind, the input pinned": (_columns_only_and_pinned, "graph input 'x'"),
    "a caller may override a factor": (_overridable, ""),
    "a nonlinearity between": (_nonlinear, "Relu stands between"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, arithmetic: str) -> None:
    build, why = REFUSED[name]
    refused(build, arithmetic, why)


def test_a_pinned_neighbour_pins_the_class(arithmetic: str) -> None:
    """An operator that nobody knows reads the channels: they keep their order, by a Gather."""
    g = G(17)
    y = matmul(g, matmul(g, g.input("x", 2, 3, N), N, R, 1), R, M, 2)
    g.output(matmul(g, g.op("CumSum", y, g.const(np.array(-1, np.int64))), M, 5, 3))
    before = g.model()
    after, _ = pivoted(before, arithmetic)
    assert op_types(after).count("Gather") == 1
    assert_rounding(before, after, feed(before))


# ---- odd graphs ------------------------------------------------------------------------------------------------------


def test_inside_a_body(arithmetic: str) -> None:
    """What bodies read or make keeps its order: the row form with a Gather, in the body."""
    inner = network(WRITTEN["matmul"], "rows")
    before = in_body(inner)
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and op_types(after).count("Gather") == 1
    inputs = feed(inner)
    for condition in (True, False):
        chosen = {**inputs, "condition": np.array(condition)}
        for old, new in zip(run_ort(before, chosen), run_ort(after, chosen), strict=True):
            np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)


def test_inside_a_loop(arithmetic: str) -> None:
    """h <- tanh(h V U), three times."""
    v, u = (numpy_helper.from_array(random(shape, seed=i), f"w{i}") for i, shape in enumerate([(N, R), (R, N)]))
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "w0"], ["t"], name="first"),
            helper.make_node("MatMul", ["t", "w1"], ["s"], name="second"),
            helper.make_node("Tanh", ["s"], ["h2"]),
            helper.make_node("Identity", ["go"], ["go2"]),
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("h", FLOAT, [2, N])],
        [info("go2", TensorProto.BOOL, []), info("h2", FLOAT, [2, N])],
        [v, u],
    )
    count, yes = numpy_helper.from_array(np.array(3), "count"), numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("Loop", ["count", "yes", "x"], ["y"], body=body)
    graph = helper.make_graph([node], "g", [info("x", FLOAT, [2, N])], [info("y", FLOAT, [2, N])], [count, yes])
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    after, records = pivoted(before, "onnxruntime", gather="always")
    assert applications(records) == 1 and op_types(after).count("Gather") == 1
    assert "in a body" in reasons(pivoted(before, "onnxruntime", gather="never")[1])
    inputs = {"x": random((2, N))}
    np.testing.assert_allclose(run_ort(after, inputs)[0], run_ort(before, inputs)[0], rtol=0, atol=1e-5)


def test_no_rows_at_all(arithmetic: str) -> None:
    for name, form in [("gemm", "rows"), ("gemm", "columns"), ("matmul", "columns")]:
        before = network(WRITTEN[name], form)
        after, _ = pivoted(before, arithmetic)
        assert_rounding(before, after, feed(before, size=0), feed(before, size=1))


def test_a_vector(arithmetic: str) -> None:
    """MatMul multiplies a vector, too: its only axis is the channels."""
    g = G(17)
    y = matmul(g, matmul(g, g.input("x", N), N, R, 1), R, M, 2)
    g.output(matmul(g, g.op("Relu", y), M, 5, 3))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert_rounding(before, after, feed(before))


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("what", ["equal columns", "zeros", "a zero factor"])
def test_factors_of_a_lower_rank_than_their_size(what: str, form: str, arithmetic: str) -> None:
    g = G(17)
    x = g.input("x", 3, N)
    if form == "columns":
        x = g.op("Relu", matmul(g, x, N, N, 1))
    v, u = random((N, R), seed=2), random((R, M), seed=3)
    if what == "a zero factor":
        u[:] = 0
    elif what == "zeros":
        u[1], v[:, 2] = 0, 0
    else:
        v[:, 1], u[3] = v[:, 0], u[2]
    y = g.op("MatMul", g.op("MatMul", x, g.const(v)), g.const(u))
    g.output(matmul(g, g.op("Relu", y), M, 5, 4) if form == "rows" else g.op("Add", y, g.const(1.0)))
    before = g.model()
    after, _ = pivoted(before, arithmetic)
    assert_rounding(before, after, feed(before))


def test_numbers_that_are_not_finite_are_left_alone(arithmetic: str) -> None:
    for bad in (np.nan, np.inf):
        g = G(17)
        v = random((N, R), seed=2)
        v[2, 1] = bad
        y = matmul(g, g.op("MatMul", g.input("x", 3, N), g.const(v)), R, M, 3)
        g.output(matmul(g, g.op("Relu", y), M, 5, 4))
        before = g.model()
        after, records = pivoted(before, arithmetic)
        assert applications(records) == 0 and "range" in reasons(records), op_types(after)


def test_a_product_that_float16_cannot_hold_is_left_alone(arithmetic: str) -> None:
    g = G(17, FLOAT16)
    v, u = random((N, R), FLOAT16, scale=1e3, seed=1), random((R, M), FLOAT16, scale=1e3, seed=2)
    y = g.op("MatMul", g.op("MatMul", g.input("x", 3, N), g.const(v)), g.const(u))
    g.output(matmul(g, g.op("Relu", y), M, 5, 4))
    _after, records = pivoted(g.model(), arithmetic, PivotLossy)
    assert applications(records) == 0 and "leave the range of FLOAT16" in reasons(records)


# ---- dense weights of hidden rank ------------------------------------------------------------------------------------

WIDE = 64


def hidden(rank: int, *, dtype: int = FLOAT, seed: int = 1) -> np.ndarray:
    """U V of 64 x 64, rounded to its type."""
    u, v = random((WIDE, rank), DOUBLE, seed=seed), random((rank, WIDE), DOUBLE, seed=seed + 1)
    product: np.ndarray = u @ v / np.sqrt(rank * WIDE)
    return product.astype({FLOAT: np.float32, DOUBLE: np.float64, FLOAT16: np.float16}[dtype])


def test_a_quarter_fewer_elements_at_half_the_rank(arithmetic: str) -> None:
    g = G(17)
    x = g.input("x", 4, WIDE)
    y = g.op("MatMul", x, g.const(hidden(WIDE // 2)))
    g.output(matmul(g, g.op("Relu", y), WIDE, 5, 9))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1 and "Gather" not in op_types(after)
    assert matrices(after) - WIDE * 5 == 0.75 * WIDE * WIDE
    assert_rounding(before, after, feed(before))


def test_a_convolution_of_hidden_rank(arithmetic: str) -> None:
    g = G(17)
    n, m, rank = 8, 64, 20
    product = random((m, rank), DOUBLE, seed=1) @ random((rank, n * 9), DOUBLE, seed=2) / 30
    x = g.input("x", 1, n, 6, 6)
    bias = g.const(random((m,), seed=3))
    y = g.op("Conv", x, g.const(product.reshape(m, n, 3, 3).astype(np.float32)), bias, pads=[1] * 4, strides=[2, 2])
    g.output(conv(1)(g, g.op("Relu", y), m, 5, 4))
    before = g.model()
    after, records = pivoted(before, arithmetic)
    assert applications(records) == 1, reasons(records)
    assert matrices(after) - m * 5 == rank * (m + n * 9 - rank)
    assert_rounding(before, after, feed(before))


def test_full_rank_is_left_alone(arithmetic: str) -> None:
    g = G(17)
    y = matmul(g, g.input("x", 4, WIDE), WIDE, WIDE, 1)
    g.output(matmul(g, g.op("Relu", y), WIDE, 5, 9))
    assert applications(pivoted(g.model(), arithmetic)[1]) == 0


# ---- again, and again ------------------------------------------------------------------------------------------------

NETWORKS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    **{f"{name}, {form}": lambda n=name, f=form: network(WRITTEN[n], f) for name, form in CASES},  # type: ignore[misc]
    "residual": residual,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_result_is_left_as_it_is_and_always_the_same(name: str, arithmetic: str) -> None:
    before = NETWORKS[name]()
    first, second = (ir.to_proto(pivoted(before, arithmetic)[0]).SerializeToString() for _ in range(2))
    assert first == second
    proto = onnx.ModelProto()
    proto.ParseFromString(first)
    for node in proto.graph.node:  # another tool may drop what is noted on nodes
        del node.metadata_props[:]
    again, records = pivoted(proto, arithmetic)
    assert applications(records) == 0
    assert op_types(again) == op_types(ir.from_proto(proto))
