"""What is known of sizes that are only known when the model runs: equal or not, by name or by where they come from.

A term stands for the size of one axis: an int; a name that the model's author or shape inference gave it; or a pair
(value, axis) where there is no name. Equal terms are equal sizes in every run. Unequal terms may still be.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.passes.fuse._match import int_attribute, made_by, permutation

Term = int | str | tuple[ir.Value, int]
Terms = tuple[Term, ...]

_DEPTH = 24
_LENGTH = 16
# Operators whose output has the shape of their first input.
_SAME_SHAPE = ("Cast", "Identity", "LayerNormalization", "Softmax", "Relu", "Sqrt", "Erf", "Tanh", "Gelu", "IsNaN", "Not")


def size_of(value: ir.Value, axis: int, depth: int = _DEPTH) -> Term:
    """The term for the size of an axis (counted from the front) of a value."""
    if value.shape is not None and axis < len(value.shape):
        size = value.shape[axis]
        if isinstance(size, int):
            return size
        if size.value is not None:
            return size.value
    node = value.producer()
    if node is None or depth == 0 or node.domain != "":
        return value, axis
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return value, axis
    if node.op_type in _SAME_SHAPE and node.outputs[0] is value:
        return size_of(source, axis, depth - 1)
    if node.op_type == "Transpose" and (perm := permutation(node)) is not None:
        return size_of(source, perm[axis], depth - 1)
    if node.op_type == "MatMul" and graphs.rank(node.inputs[1]) == 2:
        known = graphs.rank(value) or graphs.rank(source)
        if known is not None and axis < known - 1:
            return size_of(source, axis, depth - 1)
    if node.op_type in ("Add", "Mul", "Div", "Sub"):
        for one, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            shape = graphs.static_shape(other)
            known = graphs.rank(value) or graphs.rank(one)
            # The other operand is of size one on this axis, or does not reach it.
            if one is not None and shape is not None and known is not None and len(shape) <= known:
                reached = axis - (known - len(shape))
                if reached < 0 or shape[reached] == 1:
                    return size_of(one, axis, depth - 1)
    return value, axis


def sizes_of(value: ir.Value | None) -> Terms | None:
    """The terms of all axes of a value; None where its rank is not known."""
    if value is None:
        return None
    known = graphs.rank(value)
    return None if known is None else tuple(size_of(value, axis) for axis in range(known))


def numbers_in(value: ir.Value | None, depth: int = _DEPTH) -> Terms | None:
    """The numbers in a small integer vector (or scalar) that a model computes from shapes; None where that fails."""
    if value is None or depth == 0:
        return None
    array = graphs.constant_array(value, limit=_LENGTH)
    if array is not None:
        return tuple(int(n) for n in array.reshape(-1)) if array.dtype.kind in "iu" and array.ndim <= 1 else None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    return _numbers_of(node, depth)


def _numbers_of(node: ir.Node, depth: int) -> Terms | None:
    op = node.op_type
    if op == "Shape":
        sizes = sizes_of(node.inputs[0])
        start, end = int_attribute(node, "start", 0), int_attribute(node, "end", 1 << 30)
        return None if sizes is None or start is None or end is None else sizes[start:end]
    if op == "Concat":
        parts = [numbers_in(v, depth - 1) for v in node.inputs]
        return None if any(p is None for p in parts) else tuple(t for p in parts if p is not None for t in p)
    source = numbers_in(node.inputs[0], depth - 1) if node.inputs else None
    if source is None:
        return None
    if op in ("Identity", "Squeeze", "Unsqueeze"):
        # Of a scalar or a vector: the rank changes between the two, the numbers do not.
        return source if op == "Identity" or len(source) == 1 else None
    if op == "Cast":
        return source if int_attribute(node, "to", 0) == ir.DataType.INT64 else None
    if op == "Gather":
        index = numbers_in(node.inputs[1], depth - 1)
        if index is None or int_attribute(node, "axis", 0) != 0:
            return None
        if any(not isinstance(i, int) or not -len(source) <= i < len(source) for i in index):
            return None
        return tuple(source[i] for i in index if isinstance(i, int))
    if op == "Slice" and len(node.inputs) >= 3:
        return _sliced(node, source, depth)
    return None


def _sliced(node: ir.Node, source: Terms, depth: int) -> Terms | None:
    start, end = numbers_in(node.inputs[1], depth - 1), numbers_in(node.inputs[2], depth - 1)
    for extra, wanted in ((3, (0,)), (4, (1,))):
        if len(node.inputs) > extra and node.inputs[extra] is not None:
            found = numbers_in(node.inputs[extra], depth - 1)
            if found not in (wanted, (-1,) if extra == 3 else wanted):
                return None
    if start is None or end is None or len(start) != 1 or len(end) != 1:
        return None
    first, last = start[0], end[0]
    return source[first:last] if isinstance(first, int) and isinstance(last, int) else None


def reshaped(node: ir.Node) -> Terms | None:
    """The terms of the output of a Reshape, from those of its input and of the wanted shape; None where that fails."""
    assert node.op_type == "Reshape"
    wanted, source = numbers_in(node.inputs[1]), sizes_of(node.inputs[0])
    copies = int_attribute(node, "allowzero", 0) == 0
    if wanted is None or source is None:
        return None
    result: list[Term] = []
    for place, term in enumerate(wanted):
        if term == 0:
            if not copies or place >= len(source):
                return None
            term = source[place]
        result.append(term)
    if -1 in result:
        open_place = result.index(-1)
        left = list(source)
        number = 1
        for place, term in enumerate(result):
            if place == open_place:
                continue
            if isinstance(term, int):
                number *= term
            elif term in left:
                left.remove(term)
            else:
                return None
        rest = [t for t in left if not isinstance(t, int)]
        available = 1
        for t in left:
            available *= t if isinstance(t, int) else 1
        if number == 0 or available % number or (rest and available != number) or len(rest) > 1:
            return None
        result[open_place] = rest[0] if rest else available // number
    return tuple(result)


def reshape_of(value: ir.Value | None) -> tuple[ir.Value, Terms] | None:
    """Of a value that a Reshape makes: what is reshaped, and the terms of the result."""
    node = made_by(value, "Reshape")
    if node is None or node.inputs[0] is None:
        return None
    terms = reshaped(node)
    if terms is None:
        terms = sizes_of(value)
    return None if terms is None else (node.inputs[0], terms)
