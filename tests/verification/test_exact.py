"""The float64 interpreter against onnx's reference evaluator, operator by operator, and against ONNX Runtime."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from graphopt.verification import exact
from graphopt.verification.exact import operators
from graphopt.verification.tolerance import eps_of, is_float
from tests import models
from tests.models import draw_feeds
from tests.rewrite.toys import model, ort, value

Array = np.ndarray[Any, Any]


def draw(shape: tuple[int, ...], seed: int = 0, dtype: type = np.float64) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def body_of(inputs: dict[str, Array], nodes: str, outputs: dict[str, str]) -> str:
    """A graph of typed inputs, given types of outputs (``double[?]``: rank unknown) and nodes."""
    names = {"float64": "double", "float32": "float"}
    of = {n: f"{names.get(a.dtype.name, a.dtype.name)}[{','.join(map(str, a.shape))}]" for n, a in inputs.items()}
    takes = ", ".join(f"{kind} {name}" for name, kind in of.items())
    gives = ", ".join(f"{kind} {name}" for name, kind in outputs.items())
    return f"g ({takes}) => ({gives}) {{ {nodes} }}"


def check(
    nodes: str, inputs: dict[str, Array], *, opset: int = 17, outputs: dict[str, str] | None = None
) -> list[Array]:
    """The interpreter and onnx's reference agree in dtype, shape and (to rounding) values."""
    inputs = {name: np.asarray(array) for name, array in inputs.items()}
    text = body_of(inputs, nodes, outputs or {"y": "double"})
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    expected = ReferenceEvaluator(proto).run(None, inputs)
    found = exact.evaluate(ir.from_proto(proto), inputs)
    for e, f in zip(expected, found, strict=True):
        f = np.asarray(f)
        assert f.shape == np.asarray(e).shape, nodes
        if is_float(f):
            np.testing.assert_allclose(f, e, rtol=1e-9, atol=1e-12, err_msg=nodes)
        else:
            assert f.dtype == np.asarray(e).dtype, nodes
            np.testing.assert_array_equal(f, e, err_msg=nodes)
    return [np.asarray(f) for f in found]


# -- elementwise -------------------------------------------------------------------------------------------------------

UNARY = "Neg Abs Exp Sin Cos Tanh Floor Ceil Sigmoid Relu Identity Reciprocal".split()  # noqa: SIM905
BINARY = "Add Sub Mul Div".split()  # noqa: SIM905
COMPARISONS = "Equal Greater GreaterOrEqual Less LessOrEqual".split()  # noqa: SIM905


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)])
def test_unary(op: str, shape: tuple[int, ...]) -> None:
    check(f"y = {op}(x)", {"x": draw(shape)})


@pytest.mark.parametrize("op", ["Sqrt", "Log"])
def test_unary_of_positive_numbers(op: str) -> None:
    check(f"y = {op}(x)", {"x": np.abs(draw((2, 3)))})


@st.composite
def broadcast(draw_from: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    whole = draw_from(st.lists(st.integers(0, 3), max_size=4))
    sides = []
    for _ in range(2):
        kept = [n if draw_from(st.booleans()) else 1 for n in whole]
        sides.append(tuple(kept[draw_from(st.integers(0, len(kept))) :]))
    return sides[0], sides[1]


@settings(max_examples=25, deadline=None)
@given(op=st.sampled_from([*BINARY, *COMPARISONS]), shapes=broadcast())
def test_binary_with_broadcasting(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    kind = "bool" if op in COMPARISONS else "double"
    check(f"y = {op}(a, b)", {"a": draw(shapes[0]), "b": draw(shapes[1], 1)}, outputs={"y": kind})


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int8])
def test_integers_stay_integers(op: str, dtype: type) -> None:
    a, b = np.array([7, 9, 100, 3], dtype), np.array([2, 4, 7, 3], dtype)
    if np.dtype(dtype).kind == "i" and op == "Div":
        a, b = a * np.array([1, -1, 1, -1], dtype), b * np.array([1, 1, -1, -1], dtype)  # towards zero
    (y,) = check(f"y = {op}(a, b)", {"a": a, "b": b}, outputs={"y": np.dtype(dtype).name})
    assert y.dtype == dtype


@pytest.mark.parametrize("op", ["And", "Or"])
def test_logic(op: str) -> None:
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    check(f"n = Not(a) y = {op}(n, b)", {"a": a, "b": b}, outputs={"y": "bool"})


@pytest.mark.parametrize("op", ["Sum", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_variadic(op: str, count: int) -> None:
    inputs = {f"x{i}": draw((2, 3) if i else (3,), i) for i in range(count)}
    check(f"y = {op}({', '.join(inputs)})", inputs)


def test_pow_where_expand() -> None:
    check("y = Pow(a, b)", {"a": np.abs(draw((2, 3))), "b": draw((3,))})
    check("y = Pow(a, b)", {"a": draw((2, 3)), "b": np.array(3, np.int64)})
    check("y = Pow(a, b)", {"a": np.array([2, 3], np.int64), "b": np.array(3, np.int64)}, outputs={"y": "int64"})
    check("y = Where(c, a, b)", {"c": np.array([[True], [False]]), "a": draw((2, 3)), "b": draw((3,), 1)})
    for dtype in ("double", "int64", "bool"):
        x = draw((3, 1)).astype({"double": np.float64}.get(dtype, dtype))
        check("y = Expand(x, s)", {"x": x, "s": np.array([2, 1, 4])}, outputs={"y": dtype})


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((5, 1, 2, 3), (6, 3, 4)),
     ((0, 3), (3, 4)), ((2, 0), (0, 4))],
)  # fmt: skip
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check("y = MatMul(a, b)", {"a": draw(a), "b": draw(b, 1)})


@settings(max_examples=20, deadline=None)
@given(
    st.booleans(), st.booleans(), st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 0.0, 0.25]),
    st.sampled_from([None, (), (4,), (2, 1), (2, 4), (1, 4)]),
)  # fmt: skip
def test_gemm(trans_a: bool, trans_b: bool, alpha: float, beta: float, c: tuple[int, ...] | None) -> None:
    inputs = {"a": draw((3, 2) if trans_a else (2, 3)), "b": draw((4, 3) if trans_b else (3, 4), 1)}
    inputs |= {} if c is None else {"c": draw(c, 2)}
    attributes = f"transA={int(trans_a)}, transB={int(trans_b)}, alpha={alpha}, beta={beta}"
    check(f"y = Gemm<{attributes}>({', '.join(inputs)})", inputs)


def test_gemm_of_integers() -> None:
    a, b = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(12, dtype=np.int32).reshape(3, 4)
    with_ort = ort(model("g (int32[2,3] a, int32[3,4] b) => (int32[2,4] y) { y = MatMulInteger(c, d) "
                         "c = Cast<to=2>(a) d = Cast<to=2>(b) }".replace("y = MatMulInteger(c, d) ", "")
                         .replace("d = Cast<to=2>(b)", "d = Cast<to=2>(b) y = MatMulInteger(c, d)")),
                   {"a": a, "b": b})  # fmt: skip
    (y,) = check("y = Gemm(a, b)", {"a": a, "b": b}, outputs={"y": "int32"})
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, with_ort["y"])


@st.composite
def convolution(draw_from: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], str, bool]:
    rank = draw_from(st.integers(1, 3))
    group = draw_from(st.sampled_from([1, 2, 3]))
    channels, filters = group * draw_from(st.integers(1, 2)), group * draw_from(st.integers(1, 2))
    kernel = [draw_from(st.integers(1, 3)) for _ in range(rank)]
    strides = [draw_from(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw_from(st.integers(1, 2)) for _ in range(rank)]
    sizes = [draw_from(st.integers((k - 1) * d + 1, 7)) for k, d in zip(kernel, dilations, strict=True)]
    attributes = [f"group={group}", f"strides={strides}", f"kernel_shape={kernel}"]
    mode = draw_from(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", ""]))
    if mode in ("NOTSET", ""):
        attributes.append(f"pads={[draw_from(st.integers(0, 2)) for _ in range(2 * rank)]}")
        attributes.append(f"dilations={dilations}")
    if mode:
        attributes.append(f'auto_pad="{mode}"')
    x = (draw_from(st.integers(1, 2)), channels, *sizes)
    return x, (filters, channels // group, *kernel), ", ".join(attributes), draw_from(st.booleans())


@settings(max_examples=60, deadline=None)
@given(convolution())
def test_conv_as_onnx_runtime_has_it(case: tuple[tuple[int, ...], tuple[int, ...], str, bool]) -> None:
    """onnx's reference is wrong for some paddings, so the runtime is asked."""
    x, w, attributes, biased = case
    inputs = {"x": draw(x, dtype=np.float32), "w": draw(w, 1, np.float32)}
    if biased:
        inputs["b"] = draw((w[0],), 2, np.float32)
    made = model(body_of(inputs, f"y = Conv<{attributes}>({', '.join(inputs)})", {"y": "float"}))
    made.graph.outputs[0].shape = None
    (found,) = exact.evaluate(made, inputs)
    expected = ort(made, inputs)["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# -- reductions, normalisations, softmax -------------------------------------------------------------------------------

REDUCTIONS = ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [None, [0], [-1], [0, 2], [1, -1]])
def test_reductions(op: str, keep: int, axes: list[int] | None) -> None:
    x = draw((2, 3, 4))
    if op != "ReduceSum":
        given = "" if axes is None else f", axes={axes}"
        check(f"y = {op}<keepdims={keep}{given}>(x)", {"x": x}, opset=11)
    inputs = {"x": x} if axes is None else {"x": x, "axes": np.array(axes)}
    check(f"y = {op}<keepdims={keep}>({', '.join(inputs)})", inputs, opset=18)


@pytest.mark.parametrize("noop", [0, 1])
@pytest.mark.parametrize("inputs", [{}, {"axes": np.zeros(0, np.int64)}])
def test_reductions_without_axes(noop: int, inputs: dict[str, Array]) -> None:
    inputs = {"x": draw((2, 3)), **inputs}
    (y,) = check(f"y = ReduceSum<noop_with_empty_axes={noop}>({', '.join(inputs)})", inputs, opset=18)
    assert y.shape == ((2, 3) if noop else (1, 1))


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_reductions_of_integers(op: str, dtype: str) -> None:
    x = np.array([[7, 2, -4], [1, 1, 1]], dtype)
    found = exact.evaluate(
        model(body_of({"x": x}, f"y = {op}<keepdims=0>(x, axes)", {"y": dtype}).replace(
            "g (", "g (int64[1] axes, "), opset=18), {"x": x, "axes": np.array([1])}
    )  # fmt: skip
    made = model(body_of({"x": x}, f"y = {op}<keepdims=0>(x, axes)", {"y": f"{dtype}[2]"}).replace(
        "g (", "g (int64[1] axes, "), opset=18)  # fmt: skip
    expected = ort(made, {"x": x, "axes": np.array([1])})["y"]
    assert found[0].dtype == expected.dtype
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, -2])
def test_softmax(op: str, opset: int, axis: int | None) -> None:
    given = "" if axis is None else f"<axis={axis}>"
    x = draw((2, 3, 4), dtype=np.float32) * 10
    made = model(f"g (float[2,3,4] x) => (float[2,3,4] y) {{ y = {op}{given}(x) }}", opset=opset)
    (found,) = exact.evaluate(made, {"x": x})
    np.testing.assert_allclose(found, ort(made, {"x": x})["y"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("axis", [-1, 1, 0, -2])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(axis: int, biased: bool) -> None:
    x = draw((2, 3, 4))
    shape = x.shape[axis % 3 :]
    inputs = {"x": x, "s": draw(shape, 1)} | ({"b": draw(shape, 2)} if biased else {})
    nodes = f"y, m, i = LayerNormalization<axis={axis}, epsilon=0.01>({', '.join(inputs)})"
    check(nodes, inputs, outputs={"y": "double", "m": "double", "i": "double"})


@pytest.mark.parametrize("opset", [9, 14, 15])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_batch_norm(opset: int, shape: tuple[int, ...]) -> None:
    # onnx's reference takes statistics of the batch for opset 9, so the runtime is asked.
    inputs = {"x": draw(shape, dtype=np.float32), **{n: draw((3,), i, np.float32) for i, n in enumerate("sbm")}}
    inputs["v"] = draw((3,), 4, np.float32) ** 2
    made = model(body_of(inputs, "y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)", {"y": "float"}), opset=opset)
    made.graph.outputs[0].shape = None
    np.testing.assert_allclose(exact.evaluate(made, inputs)[0], ort(made, inputs)["y"], rtol=1e-4, atol=1e-5)


def test_erf_and_gelu() -> None:
    """onnx's reference has them in single precision."""
    x = draw((3, 4))
    (y,) = exact.evaluate(model(body_of({"x": x}, "y = Erf(x)", {"y": "double"})), {"x": x})
    np.testing.assert_allclose(y, np.vectorize(math.erf)(x), rtol=1e-14)
    for approximate in ("none", "tanh"):
        gelu = f'y = Gelu<approximate="{approximate}">(x)'
        made = model(body_of({"x": x.astype(np.float32)}, gelu, {"y": "float"}), opset=20)
        made.graph.outputs[0].shape = None
        expected = ort(made, {"x": x.astype(np.float32)})["y"]
        np.testing.assert_allclose(exact.evaluate(made, {"x": x})[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("opset", "axis"), [(10, None), *itertools.product((13, 17, 21), (None, 0, -1))])
def test_quantise_and_dequantise(opset: int, axis: int | None) -> None:
    x = draw((3, 4), dtype=np.float32)
    given = "" if axis is None else f"<axis={axis}>"
    scale = np.float32(0.03) if axis is None else np.float32(0.01) * np.arange(1, x.shape[axis] + 1, dtype=np.float32)
    inputs = {"x": x, "s": np.asarray(scale, np.float32), "z": np.full(np.shape(scale), 120, np.uint8)}
    nodes = f"q = QuantizeLinear{given}(x, s, z) y = DequantizeLinear{given}(q, s, z)"
    made = model(body_of(inputs, nodes, {"y": "float", "q": "uint8"}), opset=opset)
    for output in made.graph.outputs:
        output.shape = None
    expected = ort(made, inputs)
    found = exact.evaluate(made, inputs)
    np.testing.assert_allclose(found[0], expected["y"], rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected["q"])


# -- shapes, casts, and the rest through onnx --------------------------------------------------------------------------


def test_layout_operators() -> None:
    x = draw((2, 1, 3))
    check("y = Transpose(x)", {"x": x})
    check("y = Transpose<perm=[2, 0, 1]>(x)", {"x": x})
    for axis in (0, 1, -1):
        check(f"y = Concat<axis={axis}>(x, x, x)", {"x": x})
        check(f"y = Gather<axis={axis}>(x, i)", {"x": x, "i": np.array([[0, -1]])})
    check("y = Squeeze<axes=[1]>(x)", {"x": x}, opset=11)
    check("y = Squeeze(x)", {"x": x}, opset=11)
    check("y = Unsqueeze<axes=[0, 4]>(x)", {"x": x}, opset=11)
    check("y = Squeeze(x, a)", {"x": x, "a": np.array([-2])})
    check("y = Squeeze(x)", {"x": x})
    check("y = Unsqueeze(x, a)", {"x": x, "a": np.array([0, -1])})
    for start, end in (("", ""), ("start=1", ""), ("start=-2", "end=-1"), ("start=0", "end=5")):
        attributes = ", ".join(filter(None, (start, end)))
        check(f"y = Shape<{attributes}>(x)" if attributes else "y = Shape(x)", {"x": x}, outputs={"y": "int64"})


def test_casts() -> None:
    x = np.array([-1.7, 0.0, 2.5, 200.0])
    for to, kind in ((7, "int64"), (9, "bool"), (6, "int32")):
        check(f"y = Cast<to={to}>(x)", {"x": x}, outputs={"y": kind})
    for x in (np.array([True, False]), np.array([3, -4])):
        check("y = Cast<to=11>(x)", {"x": x})
    # Rounding to a narrower float is the original's error, and the yardstick does not make it.
    (y,) = exact.evaluate(model("g (float[1] x) => (float[1] y) { h = Cast<to=10>(x) y = Cast<to=1>(h) }"),
                          {"x": np.array([1 + 2**-20], np.float32)})  # fmt: skip
    assert y[0] == 1 + 2**-20


def test_operators_without_an_entry_go_through_onnx() -> None:
    assert "Elu" not in operators.OPERATORS
    assert "Slice" not in operators.OPERATORS
    check("y = Elu<alpha=0.5>(x)", {"x": draw((3, 4))})
    check("a = Abs(x) y = Slice(a, s, e)", {"x": draw((5, 4)), "s": np.array([1]), "e": np.array([3])})
    check("y, z = Split<axis=1>(x)", {"x": draw((3, 4))}, opset=13, outputs={"y": "double", "z": "double"})


def test_constants_are_read_from_weights_and_constant_nodes() -> None:
    text = ("g (float[2] x) => (float[2] y) <float[2] w = {0.1, 0.2}> { c = Constant<value_floats=[3.0, 4.0]>()"
            " a = Mul(x, w) y = Add(a, c) }")  # fmt: skip
    (y,) = exact.evaluate(model(text), {"x": np.ones(2, np.float32)})
    weight = np.array([0.1, 0.2], np.float32).astype(np.float64)
    np.testing.assert_array_equal(y, weight + np.array([3, 4]))


# -- control flow ------------------------------------------------------------------------------------------------------

NESTED = """g (double[4] x, bool c, bool d) => (double[4] y) {
    a = Neg(x)
    y = If(c) <then_branch = t () => (double[4] u) { u = Exp(a) },
               else_branch = e () => (double[4] v) { b = Abs(a) v = If(d) <
                    then_branch = tt () => (double[4] p) { p = Sub(b, x) },
                    else_branch = ee () => (double[4] q) { q = Mul(a, b) }> }>
}"""


@pytest.mark.parametrize("flags", [(True, True), (False, True), (False, False)])
def test_if(flags: tuple[bool, bool]) -> None:
    feeds = {"x": draw((4,)), "c": np.array(flags[0]), "d": np.array([flags[1]]).reshape(())}
    made = model(NESTED)
    expected = ReferenceEvaluator(ir.to_proto(made)).run(None, feeds)
    np.testing.assert_allclose(exact.evaluate(made, feeds)[0], expected[0])


LOOP = """g (double[4] x, int64 n, bool go) => (double[4] last, double[T,4] all) {
    last, all = Loop(n, go, x) <
        body = b (int64 i, bool go, double[4] s) => (bool more, double[4] next, double[4] step) {
        f = Cast<to=11>(i) k = Add(s, f) next = Tanh(k) step = Sub(next, x)
        total = ReduceSum<keepdims=0>(next) limit = Constant<value = double {3.0}>() more = Less(total, limit) }>
}"""


@pytest.mark.parametrize("turns", [1, 3, 40])
def test_loop(turns: int) -> None:
    feeds = {"x": draw((4,)), "n": np.array(turns), "go": np.array(True)}
    made = model(LOOP)
    expected = ReferenceEvaluator(ir.to_proto(made)).run(None, feeds)
    found = exact.evaluate(made, feeds)
    assert found[1].shape == expected[1].shape
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e)


@pytest.mark.parametrize(("turns", "go"), [(0, True), (3, False)])
def test_a_loop_that_never_runs_and_stacks_nothing(turns: int, go: bool) -> None:
    made = model(LOOP.replace(", double[4] step", "").replace(", all = Loop", " = Loop")
                 .replace(", double[T,4] all", ""))  # fmt: skip
    x = draw((4,))
    np.testing.assert_array_equal(exact.evaluate(made, {"x": x, "n": np.array(turns), "go": np.array(go)})[0], x)
    with pytest.raises(exact.NotExact, match="takes no turn"):
        exact.evaluate(model(LOOP), {"x": x, "n": np.array(turns), "go": np.array(go)})


def test_a_loop_without_end_is_given_up() -> None:
    text = """g (double[1] x, bool go) => (double[1] y) { y = Loop(, go, x) <
        body = b (int64 i, bool c, double[1] s) => (bool more, double[1] next)
            { more = Identity(c) next = Identity(s) }> }"""
    with pytest.raises(exact.NotExact, match="10,000 turns"):
        exact.evaluate(model(text), {"x": draw((1,)), "go": np.array(True)})


# -- parts, limits -----------------------------------------------------------------------------------------------------


def test_only_what_is_wanted_is_run() -> None:
    made = model("g (float[2] x) => (float[2] y) { y = Neg(x) z = com.unknown.Op(x) }", imports=', "com.unknown": 1')
    np.testing.assert_array_equal(exact.evaluate(made, {"x": np.ones(2, np.float32)})[0], [-1, -1])


def test_between() -> None:
    made = model("g (float[2] x, bool c) => (float[2] y) <float[2] w = {2, 3}> { a = com.unknown.Op(x) b = Mul(a, w)"
                 " k = Abs(w) y = If(c) <then_branch = t () => (float[2] u) { u = Add(b, k) },"
                 " else_branch = e () => (float[2] v) { v = Neg(b) }> }", imports=', "com.unknown": 1')  # fmt: skip
    known = {value(made, "a"): np.array([1, 10], np.float32), value(made, "c"): np.array(True)}
    np.testing.assert_array_equal(exact.evaluate_between(made, known, value(made, "b")), [2, 30])
    # What a body reads comes before the node that has the body.
    np.testing.assert_array_equal(exact.evaluate_between(made, known, value(made, "y")), [4, 33])
    np.testing.assert_array_equal(exact.evaluate_between(made, known, value(made, "a")), [1, 10])
    with pytest.raises(exact.NotExact, match="more than the region's inputs"):
        exact.evaluate_between(made, {}, value(made, "b"))
    with pytest.raises(exact.NotExact):
        exact.evaluate_between(made, {value(made, "x"): np.ones(2)}, value(made, "b"))


def test_too_much_work_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "MULTIPLY_ADD_LIMIT", 100)
    for nodes, inputs in (
        ("y = MatMul(a, b)", {"a": draw((10, 10)), "b": draw((10, 10))}),
        ("y = Gemm(a, b)", {"a": draw((10, 10)), "b": draw((10, 10))}),
        ("y = Conv(a, b)", {"a": draw((1, 1, 20)), "b": draw((4, 1, 3))}),
    ):
        with pytest.raises(exact.NotExact, match="too much work"):
            check(nodes, inputs)
    check("y = MatMul(a, b)", {"a": draw((2, 2)), "b": draw((2, 2))})


@pytest.mark.parametrize("nodes", ["y = Gather(x, i)", "y = Concat<axis=0>(x, i)", "y = Squeeze(x, i)"])
def test_what_cannot_be_run_says_so(nodes: str) -> None:
    made = model(f"g (float[3,1] x, int64[1] i) => (float[N] y) {{ {nodes} }}")
    with pytest.raises(exact.NotExact):
        exact.evaluate(made, {"x": np.ones((3, 1), np.float32), "i": np.array([7])})


def test_values_that_are_kept_survive_their_last_use() -> None:
    made = model("g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x) z = Abs(y) }")
    found = exact.evaluate(made, {"x": np.ones(2, np.float32)}, [value(made, "y"), value(made, "x"), value(made, "z")])
    assert [list(f) for f in found] == [[-1, -1], [1, 1], [1, 1]]


# Scan and com.microsoft have no float64 meaning here; onnx's reference does not run functions with attributes.
SKIPPED = {"scan", "contrib_ops", "functions"}


@pytest.mark.parametrize("name", [name for name in models.RUNNABLE if name not in SKIPPED])
def test_whole_networks_agree_with_onnx_runtime(name: str) -> None:
    made = models.RUNNABLE[name]()
    feeds = draw_feeds(made)
    expected = ort(made, feeds)
    found = exact.evaluate(made, feeds)
    tolerance = 64 * eps_of(np.dtype(np.float16 if name == "float16" else np.float32))
    for output, array in zip(made.graph.outputs, found, strict=True):
        reference = expected[output.name or ""]
        assert np.shape(array) == reference.shape
        scale = float(np.max(np.abs(reference), initial=0.0))
        np.testing.assert_allclose(array, reference, rtol=0, atol=tolerance * max(scale, 1.0))


def test_an_overflow_in_onnx_is_nobodys_concern(recwarn: pytest.WarningsRecorder) -> None:
    text = "g (float[2,1,1] x) => (float[2,1,1,1] y) { y = LSTM<hidden_size=1>(x, w, r) }"
    weights = {"w": np.full((1, 4, 1), 1e3, np.float32), "r": np.ones((1, 4, 1), np.float32)}
    (y,) = exact.evaluate(model(text, weights=weights), {"x": np.full((2, 1, 1), -1e3, np.float32)})
    assert np.isfinite(y).all()
    assert [str(warning.message) for warning in recwarn] == []
