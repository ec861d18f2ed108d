"""PivotLinear in standard operators, run by ONNX Runtime, against what it computes by definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from graphopt.plugins.pivot_linear import Side, column_form, column_nodes, row_form, row_nodes
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.shapes import infer_shapes
from graphopt.sites import Pair, Spelling, pair_at
from graphopt.targets import load_target
from graphopt.verification.structure import check_structure, interface_of
from tests.passes.common import op_types, run_ort
from tests.passes.fuse.common import G, random

OPSETS = [11, 12, 13, 17, 18, 21, 24]
TOLERANCE = 2e-5


# ---- the definition ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 6)] * 3),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_property_both_forms_are_the_matrix(
    sizes: tuple[int, int, int], batch: tuple[int, ...], bias: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    r, more, n = sizes
    m = r + more
    kept, coefficients, b = (rng.standard_normal(shape) for shape in ((r, n), (more, r), (m,)))
    order = rng.permutation(m)
    matrix = np.empty((m, n))
    matrix[order] = np.concatenate([kept, coefficients @ kept])
    x, z = rng.standard_normal((*batch, n)), rng.standard_normal((*batch, m))
    added = b if bias else None
    np.testing.assert_allclose(
        row_form(x, kept, coefficients, order, added), x @ matrix.T + (b if bias else 0), atol=1e-12
    )
    # The columns of W are the rows of its transpose.
    c = rng.standard_normal(n)
    np.testing.assert_allclose(
        column_form(z, kept.T, coefficients.T, order, c if bias else None), z @ matrix + (c if bias else 0), atol=1e-12
    )


# ---- the nodes --------------------------------------------------------------------------------------------------


class _Nothing(Pass):
    """Stands for the pass that writes the nodes."""

    name = "nothing"
    kind = Kind.LOSSY
    stage = Stage.FACTORIZE
    explanation: ClassVar[Explanation] = Explanation(matches="-", refuses="-", costs="-", source="-")

    def apply(self, ctx: Context) -> None:
        raise AssertionError("never run")


N, R, M = 7, 3, 5


class _Case:
    """A pair of products in a model, and the constants of a form that takes its place."""

    def __init__(self, g: G, *, rows: bool, bias: bool, seed: int = 0) -> None:
        self.proto = g.model()
        self.model = ir.from_proto(self.proto)
        infer_shapes(self.model)
        found = [p for node in self.model.graph if isinstance(p := pair_at(node), Pair)]
        (self.pair,) = found
        self.rows = rows
        first, second = self.pair.first, self.pair.second
        self.m, self.n, self.r = second.outputs, first.inputs, self.pair.rank
        rng = np.random.default_rng(seed)
        if rows:
            self.kept = rng.standard_normal((self.r, self.n, *first.kernel)).astype(np.float32)
            shape = (self.m - self.r, self.r, *[1] * len(second.kernel))
        else:
            self.kept = rng.standard_normal((self.m, self.r, *second.kernel)).astype(np.float32)
            shape = (self.r, self.n - self.r, *[1] * len(first.kernel))
        self.coefficients = rng.standard_normal(shape).astype(np.float32)
        self.order = rng.permutation(self.m if rows else self.n)
        self.bias = rng.standard_normal(self.m).astype(np.float32) if bias else None

    def write(self, *, biases: str = "offset") -> ir.Model:
        """The model with the form in it, the permutation as a Gather."""
        model, pair = self.model, self.pair
        ctx = Context(model, load_target("onnxruntime"))
        ctx.running(_Nothing())
        first, second = pair.first, pair.second
        holds, inner = (first, second) if self.rows else (second, first)
        side = Side(
            first,
            second,
            holds.constant(ctx, "kept", self.kept.shape, lambda: self.kept),
            inner.constant(ctx, "coefficients", self.coefficients.shape, lambda: self.coefficients),
            self.r,
            self.m if self.rows else self.n,
            **self._biases(ctx, biases),
        )
        if self.rows:
            nodes, y = row_nodes(ctx, side, pair.x, like=pair.y)
            inverse = ctx.constant(np.argsort(self.order), "places")
            gather = ctx.node("Gather", [y, inverse], {"axis": second.y_axis}, like=pair.y)
            nodes, result = [*nodes, gather], gather.outputs[0]
        else:
            gather = ctx.node(
                "Gather", [pair.x, ctx.constant(self.order, "order")], {"axis": first.x_axis}, like=pair.x
            )
            nodes, result = column_nodes(ctx, side, gather.outputs[0], like=pair.y)
            nodes = [gather, *nodes]
        assert ctx.replace({pair.y: result}, nodes, rule="form", certain=True)
        assert check_structure(model, interface_of(ir.from_proto(self.proto))) == []
        return model

    def _biases(self, ctx: Context, where: str) -> dict[str, ir.Value]:
        """The bias in the order in which the form makes the channels."""
        if self.bias is None:
            return {}
        ordered = self.bias[self.order] if self.rows else self.bias
        if where == "offset":
            behind = {Spelling.LEFT: 1, Spelling.CONV: len(self.pair.second.kernel)}.get(self.pair.second.spelling, 0)
            return {"offset": ctx.constant(ordered.reshape(-1, *[1] * behind), "offset")}
        if not self.rows:
            return {"second_bias": ctx.constant(ordered, "second_bias")}
        # What the first product adds goes through the coefficients, too.
        others = ordered[self.r :] - self.coefficients.reshape(-1, self.r) @ ordered[: self.r]
        return {
            "first_bias": ctx.constant(ordered[: self.r], "first_bias"),
            "second_bias": ctx.constant(others, "second_bias"),
        }

    def expected(self, x: np.ndarray) -> np.ndarray:
        """By definition, of channels that are the last axis."""
        form = row_form if self.rows else column_form
        kept = self.kept.reshape(self.kept.shape[:2])
        coefficients = self.coefficients.reshape(self.coefficients.shape[:2])
        return form(x, kept, coefficients, self.order, self.bias)


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    if expected.size:
        assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, float(np.abs(expected).max()))


def _pair(g: G, x: str, kinds: tuple[str, str], sizes: tuple[int, int, int]) -> str:
    n, r, m = sizes
    for seed, (kind, (inputs, outputs)) in enumerate(zip(kinds, ((n, r), (r, m)), strict=True)):
        if kind == "MatMul":
            x = g.op("MatMul", x, g.const(random((inputs, outputs), seed=seed)))
        elif kind == "left":
            x = g.op("MatMul", g.const(random((outputs, inputs), seed=seed)), x)
        else:
            flip = {"transB": 1} if kind == "Gemm transB" else {"alpha": 0.5}
            shape = (outputs, inputs) if kind == "Gemm transB" else (inputs, outputs)
            x = g.op("Gemm", x, g.const(random(shape, seed=seed)), g.const(random((outputs,), seed=seed)), **flip)
    return x


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("kinds", [("MatMul", "MatMul"), ("Gemm transB", "Gemm transB"), ("left", "left")])
def test_opsets(kinds: tuple[str, str], rows: bool, opset: int) -> None:
    g = G(opset)
    shape = (N, 4) if "left" in kinds else (4, N)
    g.output(_pair(g, g.input("x", *shape), kinds, (N, R, M)))
    case = _Case(g, rows=rows, bias=True)
    x = random(shape)
    turned = x.T if "left" in kinds else x
    expected = case.expected(turned)
    _close(run_ort(case.write(), {"x": x})[0], expected.T if "left" in kinds else expected)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(*[st.sampled_from(["MatMul", "Gemm", "Gemm transB"])] * 2),
    rows=st.booleans(),
    r=st.integers(1, 4),
    more=st.integers(0, 4),
    other=st.integers(1, 6),
    bias=st.sampled_from(["none", "offset", "inside"]),
    opset=st.sampled_from(OPSETS),
    count=st.integers(0, 3),
)
def test_property_rows(
    kinds: tuple[str, str], rows: bool, r: int, more: int, other: int, bias: str, opset: int, count: int
) -> None:
    # A product that is a MatMul adds nothing, so that its bias stands behind.
    takes = "MatMul" not in kinds if rows else kinds[1] != "MatMul"
    g = G(opset)
    n, m = (other, r + more) if rows else (r + more, other)
    g.output(_pair(g, g.input("x", count, n), kinds, (n, r, m)))
    case = _Case(g, rows=rows, bias=bias != "none")
    expected = case.expected(random((count, n)))
    after = case.write(biases="inside" if bias == "inside" and takes else "offset")
    _close(run_ort(after, {"x": random((count, n))})[0], expected)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shape", [(N,), (2, 4, N), (2, 1, 4, N), (0, N)])
def test_axes_before_the_channels(shape: tuple[int, ...], rows: bool) -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", *shape), ("MatMul", "MatMul"), (N, R, M)))
    case = _Case(g, rows=rows, bias=True)
    expected = case.expected(random(shape))
    _close(run_ort(case.write(), {"x": random(shape)})[0], expected)


@pytest.mark.parametrize("rows", [True, False])
def test_a_batch_with_the_constant_on_the_left(rows: bool) -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", 2, N, 4), ("left", "left"), (N, R, M)))
    case = _Case(g, rows=rows, bias=True)
    expected = case.expected(np.swapaxes(random((2, N, 4)), 1, 2))
    _close(run_ort(case.write(), {"x": random((2, N, 4))})[0], np.swapaxes(expected, 1, 2))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_a_table(shape: tuple[int, ...], opset: int) -> None:
    g = G(opset)
    ids = g.input("x", *shape, dtype=TensorProto.INT64)
    rows = g.op("Gather", g.const(random((9, R), seed=1)), ids)
    g.output(g.op("MatMul", rows, g.const(random((R, M), seed=2))))
    case = _Case(g, rows=True, bias=True)
    feed = np.asarray(np.random.default_rng(0).integers(0, 9, shape))
    expected = case.expected(np.eye(9)[feed])
    _close(run_ort(case.write(), {"x": feed})[0], expected)


def _window(x: np.ndarray, kernel: Sequence[int], pads: int) -> np.ndarray:
    """What each position of a convolution sees: (batch, *positions, channels, *kernel)."""
    axes = tuple(range(2, x.ndim))
    padded = np.pad(x, [(0, 0), (0, 0), *[(pads, pads)] * len(axes)])
    seen = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), axes)
    return np.moveaxis(seen, 1, len(axes) + 1)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("biases", ["none", "inside", "offset"])
def test_a_kernel_then_a_position(axes: int, biases: str, opset: int) -> None:
    """Row form: the pivots are kernels."""
    g = G(opset)
    kernel, size = (3,) * axes, (2, N, *(5,) * axes)
    first = g.op(
        "Conv", g.input("x", *size), g.const(random((R, N, *kernel))), pads=[1] * 2 * axes, kernel_shape=kernel
    )
    g.output(g.op("Conv", first, g.const(random((M, R, *(1,) * axes))), kernel_shape=(1,) * axes))
    case = _Case(g, rows=True, bias=biases != "none")
    x = random(size)
    seen = _window(x, kernel, 1)
    flat = seen.reshape(*seen.shape[: axes + 1], -1)
    expected = row_form(flat, case.kept.reshape(R, -1), case.coefficients.reshape(M - R, R), case.order, case.bias)
    after = case.write(biases=biases)
    assert ("Add" in op_types(after)) == (biases == "offset")
    _close(run_ort(after, {"x": x})[0], np.moveaxis(expected, -1, 1))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("biases", ["none", "inside", "offset"])
def test_a_position_then_a_kernel(axes: int, biases: str, opset: int) -> None:
    """Column form: the pivots are input channels, and nothing is added before the padding."""
    g = G(opset)
    kernel, size = (3,) * axes, (2, N, *(5,) * axes)
    first = g.op("Conv", g.input("x", *size), g.const(random((R, N, *(1,) * axes))))
    g.output(g.op("Conv", first, g.const(random((M, R, *kernel))), pads=[1] * 2 * axes))
    case = _Case(g, rows=False, bias=biases != "none")
    x = random(size)
    seen = _window(x, kernel, 1)
    coefficients = case.coefficients.reshape(R, N - R)
    expected = np.zeros((*seen.shape[: axes + 1], M))
    for place in itertools.product(*map(range, kernel)):
        expected += column_form(seen[(..., *place)], case.kept[(..., *place)], coefficients, case.order)
    expected += 0 if case.bias is None else case.bias
    _close(run_ort(case.write(biases=biases), {"x": x})[0], np.moveaxis(expected, -1, 1))


@pytest.mark.parametrize("rows", [True, False])
def test_strides_stay_where_they_are(rows: bool) -> None:
    g = G(17)
    kernel, options = (3, 3), {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 1, 2]}
    wide, one = (
        random((R if rows else M, N if rows else R, *kernel)),
        random((M if rows else R, R if rows else N, 1, 1)),
    )
    x = g.input("x", 2, N, 9, 9)
    if rows:
        g.output(g.op("Conv", g.op("Conv", x, g.const(wide), **options), g.const(one)))
    else:
        g.output(g.op("Conv", g.op("Conv", x, g.const(one)), g.const(wide), **options))
    case = _Case(g, rows=rows, bias=False)
    # The matrix of each kernel element, as one dense convolution.
    dense = np.empty((M, N, *kernel), np.float64)
    for place in itertools.product(*map(range, kernel)):
        at = (..., *place)
        kept = case.kept[at]
        coefficients = case.coefficients[..., 0, 0]
        form = row_form if rows else column_form
        dense[at] = form(np.eye(N), kept, coefficients, case.order).T
    h = G(17)
    h.output(h.op("Conv", h.input("x", 2, N, 9, 9), h.const(dense), **options))
    feed = {"x": random((2, N, 9, 9))}
    _close(run_ort(case.write(), feed)[0], run_ort(h.model(), feed)[0])


@pytest.mark.parametrize("rows", [True, False])
def test_an_unknown_number_of_rows(rows: bool) -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", "batch", "length", N), ("MatMul", "MatMul"), (N, R, M)))
    case = _Case(g, rows=rows, bias=True)
    feeds = [random((b, t, N)) for b, t in ((1, 1), (3, 2))]
    expected = [case.expected(x) for x in feeds]
    after = case.write()
    for x, wanted in zip(feeds, expected, strict=True):
        _close(run_ort(after, {"x": x})[0], wanted)


@pytest.mark.parametrize(
    ("rows", "types"), [(True, ["MatMul", "MatMul", "Concat"]), (False, ["Split", "MatMul", "Add", "MatMul"])]
)
def test_no_more_nodes_than_that(rows: bool, types: list[str]) -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", 4, N), ("MatMul", "MatMul"), (N, R, M)))
    found = [kind for kind in op_types(_Case(g, rows=rows, bias=False).write()) if kind != "Gather"]
    assert found == types


def test_gemm_adds_the_pivots_itself() -> None:
    g = G(17)
    g.output(_pair(g, g.input("x", 4, N), ("Gemm", "Gemm"), (N, R, M)))
    after = _Case(g, rows=False, bias=True).write(biases="inside")
    assert op_types(after) == ["Gather", "Split", "Gemm", "Gemm"]
