"""What is known of small integer tensors that are computed from shapes, before anything runs.

Exporters spell a shape as Shape -> Gather -> Unsqueeze -> Concat and ask questions of it (is the rank two? are these
axes equal?). Here such a tensor is an array whose elements are numbers, or expressions in the names of axes, or
unknown; an element that comes out as a number is the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import evaluate, graphs
from graphopt.shapes import trusted_shape

# Shapes, axes, sizes: a tensor with more elements is data.
_MOST = 64
_LEAST, _GREATEST = -(2**63), 2**63 - 1


class Expression:
    """A polynomial in sizes of axes, each of which is zero or more; immutable, equal where the polynomials are."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[tuple[str, ...], int]) -> None:
        self.terms = {key: value for key, value in terms.items() if value}
        self._hash = hash(frozenset(self.terms.items()))

    @classmethod
    def axis(cls, name: str) -> Expression:
        """The size of an axis."""
        return cls({(name,): 1})

    @classmethod
    def of(cls, element: Element) -> Expression:
        """A number as a polynomial."""
        return element if isinstance(element, Expression) else cls({(): int(element)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return " + ".join("*".join([str(value), *key]) for key, value in sorted(self.terms.items())) or "0"

    def plus(self, other: Expression, sign: int = 1) -> Expression:
        """The sum, or with ``sign`` -1 the difference."""
        terms = dict(self.terms)
        for key, value in other.terms.items():
            terms[key] = terms.get(key, 0) + sign * value
        return Expression(terms)

    def times(self, other: Expression) -> Expression:
        """The product."""
        terms: dict[tuple[str, ...], int] = {}
        for a, x in self.terms.items():
            for b, y in other.terms.items():
                key = tuple(sorted(a + b))
                terms[key] = terms.get(key, 0) + x * y
        return Expression(terms)

    def divided(self, by: int) -> Expression | None:
        """The quotient by a number, where it goes into every term."""
        if by == 0 or any(value % by for value in self.terms.values()):
            return None
        return Expression({key: value // by for key, value in self.terms.items()})

    def bounds(self) -> tuple[int | None, int | None]:
        """The least and the greatest that it can be, None for no bound; sizes are zero or more."""
        constant = self.terms.get((), 0)
        rest = [value for key, value in self.terms.items() if key]
        return (
            constant if all(value > 0 for value in rest) else None,
            constant if all(value < 0 for value in rest) else None,
        )

    def simplified(self) -> Element:
        """A number where it is one."""
        if not self.terms:
            return 0
        if set(self.terms) == {()}:
            return self.terms[()]
        return self


Element = int | bool | Expression
"""What is known of one element; None stands for nothing."""
Elements = np.ndarray[Any, Any]
"""An array of objects: ``Element | None``."""


class ShapeValues:
    """Answers what is known of a value; remembers its answers, which hold as long as values keep their meaning.

    Args:
        opset: The version of the standard operator set.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._known: dict[ir.Value, Elements | None] = {}

    def of(self, value: ir.Value | None) -> Elements | None:
        """What is known of each element of an integer or bool tensor; None where nothing is, or it is large."""
        if value is None:
            return None
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            waiting = [v for v in _sources(current) if v not in self._known]
            if waiting:
                pending.extend(waiting)
            else:
                self._compute(current)
                pending.pop()
        return self._known[value]

    def constant(self, value: ir.Value | None) -> np.ndarray[Any, Any] | None:
        """The value as an array of its own type, where every element is a number."""
        elements = self.of(value)
        if elements is None or value is None or value.dtype is None:
            return None
        if any(not isinstance(element, int) for element in elements.reshape(-1)):
            return None
        try:
            return elements.astype(value.dtype.numpy())
        except OverflowError:
            return None

    def learn(self, value: ir.Value, array: np.ndarray[Any, Any]) -> None:
        """Take note of a value that was computed elsewhere."""
        self._known[value] = array.astype(object)

    def _compute(self, value: ir.Value) -> None:
        self._known[value] = None
        tensor = graphs.constant_tensor(value)
        if tensor is not None:
            if tensor.dtype in _DTYPES and tensor.size <= _MOST:
                self._known[value] = tensor.numpy().astype(object)
            return
        node = value.producer()
        if node is None or node.domain != "" or any(a.is_ref() for a in node.attributes.values()):
            return
        if node.op_type in ("Shape", "Size"):
            self._known[value] = self._of_shape(node)
            return
        if node.op_type not in _RULES or (value.dtype is not None and value.dtype not in _DTYPES):
            return
        inputs = [None if v is None else self._known.get(v) for v in node.inputs]
        if any(v is not None and known is None for v, known in zip(node.inputs, inputs, strict=True)):
            return
        results = _RULES[node.op_type](evaluate.Operation.of(node, self.opset), inputs)
        for output, result in zip(node.outputs, results or [], strict=False):
            self._known[output] = result if result.size <= _MOST else None

    def _of_shape(self, node: ir.Node) -> Elements | None:
        source = node.inputs[0]
        shape = None if source is None else trusted_shape(source)
        if shape is None:
            return None
        dims = axes_of(shape)
        if node.op_type == "Size":
            return _array([_product(dims)], ())
        chosen = dims[evaluate.shape_slice(evaluate.Operation.of(node, self.opset), len(dims))]
        return _array(chosen, (len(chosen),))


def axes_of(shape: ir.Shape) -> list[Element | None]:
    """The axes of a shape as elements: a number, a name, or None."""
    return [d if isinstance(d, int) else None if d.value is None else Expression.axis(d.value) for d in shape]


_DTYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def _sources(value: ir.Value) -> Sequence[ir.Value]:
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in _RULES:
        return ()
    return [v for v in node.inputs if v is not None]


def _array(elements: Sequence[Element | None], shape: tuple[int, ...]) -> Elements:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


# -- rules -------------------------------------------------------------------------------------------------------------


_Inputs = list[Elements | None]
_Rule = Callable[[evaluate.Operation, _Inputs], list[Elements] | None]


def _moved(op: evaluate.Operation, inputs: _Inputs) -> list[Elements] | None:
    """Moving elements needs no knowledge of them; what says where to (axes, indices) must be numbers."""
    arrays: _Inputs = []
    for index, array in enumerate(inputs):
        if array is not None and index not in _DATA.get(op.op_type, {0}) and op.op_type != "Concat":
            if any(not isinstance(element, int) for element in array.reshape(-1)):
                return None
            array = array.astype(np.bool_ if op.op_type == "Where" else np.int64)
        arrays.append(array)
    return evaluate.evaluate(op, arrays, limit=_MOST)


_DATA = {"Where": {1, 2}, "Gather": {0}, "Expand": {0}, "ScatterND": {0, 2}}


def _cast(op: evaluate.Operation, inputs: _Inputs) -> list[Elements] | None:
    to = ir.DataType(op.attributes["to"].as_int())
    array = inputs[0]
    if array is None or to not in _DTYPES:
        return None
    if to == ir.DataType.BOOL:
        return [_elementwise(lambda x: _negate(_compare("Equal", x, 0)), array)]
    limit = 2**31 if to == ir.DataType.INT32 else 2**63

    def convert(x: Element) -> Element | None:
        # Sizes of axes are taken to fit: what would hold them could not be fed.
        return x if isinstance(x, Expression) else int(x) if -limit <= x < limit else None

    return [_elementwise(convert, array)]


def _binary(op: evaluate.Operation, inputs: _Inputs) -> list[Elements] | None:
    if any(array is None for array in inputs):
        return None
    compute = _BINARY[op.op_type]
    try:
        result = inputs[0]
        for array in inputs[1:]:
            result = _elementwise(compute, result, array)
    except ValueError:  # shapes that do not broadcast: the runtime shall say so
        return None
    return None if result is None else [result]


def _comparing(op: evaluate.Operation, inputs: _Inputs) -> list[Elements] | None:
    a, b = inputs
    if a is None or b is None:
        return None
    try:
        return [_elementwise(lambda x, y: _compare(op.op_type, x, y), a, b)]
    except ValueError:
        return None


def _unary(op: evaluate.Operation, inputs: _Inputs) -> list[Elements] | None:
    return None if inputs[0] is None else [_elementwise(_UNARY[op.op_type], inputs[0])]


def _reduced(op: evaluate.Operation, inputs: _Inputs) -> list[Elements] | None:
    """A reduction of all elements of a vector."""
    array = inputs[0]
    keep = op.integer("keepdims", 1)
    axes = op.integers("axes") if "axes" in op.attributes else None
    if len(inputs) > 1 and inputs[1] is not None:
        axes = [int(a) if isinstance(a, int) else 9 for a in inputs[1]]
    if array is None or array.ndim != 1 or axes not in (None, [0], [-1]) or op.integer("noop_with_empty_axes", 0):
        return None
    elements = list(array)
    if op.op_type == "ReduceProd":
        result = _product(elements)
    else:
        result = 0
        for element in elements:
            result = None if result is None or element is None else _add(result, element)
    return [_array([result], (1,) if keep else ())]


def _elementwise(compute: Callable[..., Element | None], *arrays: Elements | None) -> Elements:
    spread = np.broadcast_arrays(*(np.asarray(array, object) for array in arrays))
    flat = [array.reshape(-1) for array in spread]
    return _array(
        [None if any(x is None for x in xs) else compute(*xs) for xs in zip(*flat, strict=True)], spread[0].shape
    )


# -- elements ----------------------------------------------------------------------------------------------------------


def _fitting(element: Element) -> Element | None:
    return None if not isinstance(element, Expression) and not _LEAST <= element <= _GREATEST else element


def _add(a: Element, b: Element) -> Element | None:
    return _fitting(Expression.of(a).plus(Expression.of(b)).simplified())


def _subtract(a: Element, b: Element) -> Element | None:
    return _fitting(Expression.of(a).plus(Expression.of(b), -1).simplified())


def _multiply(a: Element, b: Element) -> Element | None:
    return _fitting(Expression.of(a).times(Expression.of(b)).simplified())


def _product(elements: Sequence[Element | None]) -> Element | None:
    if any(element == 0 for element in elements if not isinstance(element, Expression)):
        return 0
    result: Element | None = 1
    for element in elements:
        result = None if result is None or element is None else _multiply(result, element)
    return result


def _divide(a: Element, b: Element) -> Element | None:
    if isinstance(b, Expression) or b == 0:
        return None
    if isinstance(a, Expression):
        quotient = a.divided(int(b))
        return None if quotient is None else quotient.simplified()
    return _fitting(abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1))


def _modulo(a: Element, b: Element) -> Element | None:
    if isinstance(b, Expression) or b == 0:
        return None
    if isinstance(a, Expression):
        return 0 if a.divided(int(b)) is not None else None
    return a % b if a >= 0 and b > 0 else None  # signs are where ``fmod`` matters


def _compare(how: str, a: Element, b: Element) -> bool | None:
    """Whether a relation holds between two elements, None where it depends on the sizes."""
    difference = Expression.of(a).plus(Expression.of(b), -1)
    low, high = difference.bounds()
    if how == "Equal":
        if low is not None and low == high:
            return low == 0
        return False if (low is not None and low > 0) or (high is not None and high < 0) else None
    if how in ("Less", "LessOrEqual"):
        return _compare("Greater" if how == "Less" else "GreaterOrEqual", b, a)
    bound = 0 if how == "Greater" else -1
    if low is not None and low > bound:
        return True
    return False if high is not None and high <= bound else None


def _negate(x: Element | None) -> bool | None:
    return None if x is None or isinstance(x, Expression) else not x


def _extreme(greater: bool) -> Callable[[Element, Element], Element | None]:
    def compute(a: Element, b: Element) -> Element | None:
        holds = _compare("GreaterOrEqual", a, b)
        return None if holds is None else a if holds == greater else b

    return compute


_BINARY: dict[str, Callable[[Element, Element], Element | None]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Mod": _modulo,
    "Max": _extreme(True),
    "Min": _extreme(False),
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
    "Xor": lambda a, b: bool(a) != bool(b),
}
_UNARY: dict[str, Callable[[Element], Element | None]] = {
    "Neg": lambda x: _subtract(0, x),
    "Not": _negate,
    "Abs": lambda x: x if _compare("GreaterOrEqual", x, 0) else None if isinstance(x, Expression) else abs(x),
}
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("Identity", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Split", "Expand", "Where"), _moved
    ),
    "Cast": _cast,
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), _comparing),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(("ReduceProd", "ReduceSum"), _reduced),
    "Shape": lambda op, inputs: None,
    "Size": lambda op, inputs: None,
}


# -- Reshape -----------------------------------------------------------------------------------------------------------


def reshape_target(node: ir.Node, values: ShapeValues) -> list[int] | None:
    """A constant second operand that makes a Reshape give the same as its computed one, or None.

    A computed size that is the size of the data's axis at the same place becomes 0 (copy), and one size that is not
    known becomes -1 where all others are positive numbers: then it can only be what is left.
    """
    if len(node.inputs) < 2 or node.inputs[0] is None or node.attributes.get_int("allowzero", 0) == 1:
        return None
    wanted = values.of(node.inputs[1])
    if wanted is None or wanted.ndim != 1:
        return None
    shape = trusted_shape(node.inputs[0])
    axes = [] if shape is None else axes_of(shape)
    target: list[int | None] = []
    for index, element in enumerate(wanted):
        if isinstance(element, int):
            target.append(element)
        elif element is not None and index < len(axes) and axes[index] == element:
            target.append(0)
        else:
            target.append(None)
    open_ = target.count(None)
    if open_ > 1 or (open_ == 1 and any(d is not None and d <= 0 for d in target)):
        return None
    return [-1 if d is None else d for d in target]
