"""What rewrites ask about a graph: who made a value, is it a certain number, may it be folded away."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.shapes import trusted_shape

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})

# The distance from 1 to the next number. A constant that an exporter rounded to the dtype is off by half of it at most.
EPS = {
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
    ir.DataType.DOUBLE: 2.0**-52,
}

# onnx's shape inference invents names that begin like this.
INVENTED = "unk__"

# Above this a folded weight is computed when it is saved, not while rewriting: one tensor in memory at a time.
LAZY_BYTES = 1 << 20


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard node of one of the given types whose first output a value is, or None."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in op_types or node.domain != "" or node.outputs[0] is not value:
        return None
    return node


def rank_of(value: ir.Value | None) -> int | None:
    """The number of axes of a value, where it follows from the model's inputs and weights."""
    shape = None if value is None else trusted_shape(value)
    return None if shape is None else len(shape)


def sizes_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The sizes of all axes of a value, where they follow from the model's inputs and weights and are numbers."""
    shape = None if value is None else trusted_shape(value)
    return shape.numpy() if shape is not None and shape.is_static() else None


def int_attribute(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute; None where it refers to an attribute of the function around the node."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float | None:
    """A float attribute; None where it refers to an attribute of the function around the node."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_float()


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """The ``perm`` of a Transpose; None where it is left to the default or refers to a function's attribute."""
    attribute = node.attributes.get("perm")
    if attribute is None or attribute.is_ref():
        return None
    return tuple(attribute.as_ints())


def used_once(value: ir.Value) -> bool:
    """Whether a value has one reader and is no graph output: whoever absorbs the reader absorbs the value."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def scalar_beside(value: ir.Value | None, other: ir.Value | None) -> float | None:
    """The number in a constant of one element that, combined with ``other``, leaves the shape of ``other`` as it is.

    A constant of shape [1, 1, 1, 1] combined with a matrix would add axes to it.
    """
    number = graphs.scalar_of(value)
    if number is None:
        return None
    assert value is not None
    tensor = graphs.constant_tensor(value)
    assert tensor is not None
    axes = len(tensor.shape)
    if axes == 0:
        return number
    known = rank_of(other)
    return number if known is not None and axes <= known else None


def split_scalar(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Of a commutative node with one operand that is a scalar constant: the other operand, and the number."""
    left, right = node.inputs
    if left is None or right is None:
        return None
    if (number := scalar_beside(right, left)) is not None:
        return left, number
    if (number := scalar_beside(left, right)) is not None:
        return right, number
    return None


def close(found: float, wanted: float, dtype: ir.DataType | None) -> bool:
    """Whether a constant is the wanted number as the dtype, or float32, can hold it.

    Exporters write constants in float64 models that went through float32; in all other dtypes one rounding is allowed.
    """
    eps = EPS.get(dtype, EPS[ir.DataType.FLOAT]) if dtype is not None else EPS[ir.DataType.FLOAT]
    return abs(found - wanted) <= 4 * eps * abs(wanted)


def suffix_axes(node: ir.Node, rank: int | None) -> int | None:
    """How many last axes a Reduce node reduces, kept as axes of size one; None where it reduces others.

    Axes are an attribute before opset 18 and an input from then on, and may be negative.
    """
    if int_attribute(node, "keepdims", 1) != 1:
        return None
    attribute = node.attributes.get("axes")
    if attribute is not None:
        if attribute.is_ref():
            return None
        axes = [int(a) for a in attribute.as_ints()]
    else:
        array = graphs.constant_array(node.inputs[1], limit=16) if len(node.inputs) > 1 else None
        if array is None:
            return None
        axes = [int(a) for a in array.reshape(-1)]
    if not axes:
        return None
    if any(a >= 0 for a in axes):
        if rank is None:
            return None
        axes = [a - rank if a >= 0 else a for a in axes]
    return len(axes) if sorted(axes) == list(range(-len(axes), 0)) else None


def import_domain(model: ir.Model, graph: ir.Graph | ir.Function | None, domain: str) -> None:
    """Make the model, or the function that holds a graph, import version 1 of an operator domain."""
    for function in model.functions.values():
        if any(graph is inner for inner in graphs.nested_graphs(function.graph)):
            function.opset_imports.setdefault(domain, 1)
    model.graph.opset_imports.setdefault(domain, 1)


def holds(array: np.ndarray, dtype: ir.DataType) -> bool:
    """Whether every number of an array is one that the dtype can hold exactly."""
    wide = array.astype(np.float64)
    with np.errstate(all="ignore"):
        return bool((wide.astype(dtype.numpy()).astype(np.float64) == wide).all())
