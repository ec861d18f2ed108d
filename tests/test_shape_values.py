from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.shape_values import Expression, ShapeValues
from graphopt.shapes import infer_shapes

HEAD = '<ir_version: 8, opset_import: ["": 18]> g (float[n,4,m] x, float[n,k] w, int64[2] s) => (float[a] y) '
SHAPE = "s1 = Shape(x) i0 = Constant<value_int = 0>() i1 = Constant<value_int = 1>() i2 = Constant<value_int = 2>() "
SHAPE += "n = Gather(s1, i0) four = Gather(s1, i1) m = Gather(s1, i2) c2 = Constant<value_int = 2>() "


def known(body: str) -> object:
    """What is known of the value ``r``: a number, a list, or None."""
    model = ir.from_proto(onnx.parser.parse_model(f"{HEAD} {{ {SHAPE} {body} y = Cast<to = 1>(r) }}"))
    infer_shapes(model)
    value = next(o for node in model.graph for o in node.outputs if o.name == "r")
    array = ShapeValues(18).constant(value)
    return None if array is None else array.tolist()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("r = Add(four, c2)", 6),
        ("r = Gather(s1, i1)", 4),
        ("z = Size(s1) r = Identity(z)", 3),
        ("a = Mul(n, c2) b = Add(n, n) r = Equal(a, b)", True),
        ("a = Mul(n, four) b = Div(a, four) r = Sub(b, n)", 0),
        ("a = Add(n, c2) r = Greater(a, i1)", True),
        ("r = Less(n, i0)", False),
        ("a = Add(n, i1) r = Equal(a, n)", False),
        ("r = Equal(n, m)", None),
        ("r = Div(n, c2)", None),
        ("a = Mul(m, four) r = Mod(a, c2)", 0),
        ("e = Equal(n, n) a = Where(e, four, n) r = Identity(a)", 4),
        ("e = Equal(n, m) r = Where(e, four, n)", None),
        ("e = Greater(n, m) a = And(e, e) r = Identity(a)", None),
        ("v = Constant<value_ints = [1]>() e = Constant<value_ints = [2]>() a = Slice(s1, v, e) r = Squeeze(a)", 4),
        (
            "a = Concat<axis = 0>(s1, s1) p = ReduceProd<keepdims = 0>(a) q = ReduceProd<keepdims = 0>(s1) "
            "t = Mul(q, q) r = Equal(p, t)",
            True,
        ),
        ("a = Max(n, i0) r = Equal(a, n)", True),
        ("a, b, d = Split<num_outputs = 3>(s1) r = Squeeze(b)", 4),
        ("a = Cast<to = 6>(four) r = Cast<to = 9>(a)", True),
        ("a = Shape(w) b = Gather(a, i0) r = Equal(b, n)", True),
        ("a = Gather(s, i0) r = Equal(a, a)", None),
        ("a = Shape<start = 1, end = 2>(x) r = Neg(a)", [-4]),
        ("f = Cast<to = 1>(n) g = Cast<to = 7>(f) r = Sub(g, n)", None),
    ],
)
def test_what_follows_from_shapes(body: str, expected: object) -> None:
    assert known(body) == expected


NUMBERS = st.integers(-6, 6)


def _expression(terms: list[tuple[list[str], int]]) -> Expression:
    result = Expression({})
    for names, factor in terms:
        term = Expression.of(factor)
        for name in names:
            term = term.times(Expression.axis(name))
        result = result.plus(term)
    return result


EXPRESSIONS = st.lists(st.tuples(st.lists(st.sampled_from("abc"), max_size=2), NUMBERS), max_size=4).map(_expression)


def _value(expression: Expression, sizes: dict[str, int]) -> int:
    total = 0
    for names, factor in expression.terms.items():
        for name in names:
            factor *= sizes[name]
        total += factor
    return total


@given(EXPRESSIONS, EXPRESSIONS, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(1, 4))
def test_expressions_compute_like_numbers(x: Expression, y: Expression, a: int, b: int, c: int, divisor: int) -> None:
    sizes = {"a": a, "b": b, "c": c}
    assert _value(x.plus(y), sizes) == _value(x, sizes) + _value(y, sizes)
    assert _value(x.plus(y, -1), sizes) == _value(x, sizes) - _value(y, sizes)
    assert _value(x.times(y), sizes) == _value(x, sizes) * _value(y, sizes)
    low, high = x.bounds()
    assert low is None or low <= _value(x, sizes)
    assert high is None or _value(x, sizes) <= high
    quotient = x.divided(divisor)
    assert quotient is None or _value(quotient, sizes) * divisor == _value(x, sizes)
    assert (x == y) == (hash(x) == hash(y) and x.terms == y.terms)
