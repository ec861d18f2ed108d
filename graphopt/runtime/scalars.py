"""Scalars that follow from constants and from chosen values of a model's inputs, without running it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt.graphs import constant_array
from graphopt.runtime.role_tables import COMPARISONS

Scalar = int | float | bool | str


def scalar(value: ir.Value | None) -> Scalar | None:
    """The value of a constant of one element, as a Python scalar."""
    array = constant_array(value, limit=1)
    if array is None or array.size != 1:
        return None
    item = array.reshape(-1)[0]
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    found = item.item() if hasattr(item, "item") else item
    return found if isinstance(found, (bool, int, float, str)) else float(found)


def evaluate(value: ir.Value, switches: Mapping[str, Scalar], depth: int = 20) -> Scalar | None:
    """The value of a scalar that follows from ``switches`` and constants alone, or None."""
    if value.is_graph_input() and value.name is not None and value.name in switches:
        return switches[value.name]
    constant = scalar(value)
    if constant is not None:
        return constant
    node = value.producer()
    if node is None or depth == 0 or not node.inputs or any(item is None for item in node.inputs):
        return None
    if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Not"):
        first = node.inputs[0]
        inner = None if first is None else evaluate(first, switches, depth - 1)
        if inner is None:
            return None
        if node.op_type == "Not":
            return not inner
        return bool(inner) if value.dtype == ir.DataType.BOOL and not isinstance(inner, str) else inner
    if node.op_type in COMPARISONS or node.op_type in ("And", "Or"):
        operands = [evaluate(item, switches, depth - 1) for item in node.inputs if item is not None]
        if len(operands) != 2 or operands[0] is None or operands[1] is None:
            return None
        if node.op_type == "And":
            return bool(operands[0]) and bool(operands[1])
        if node.op_type == "Or":
            return bool(operands[0]) or bool(operands[1])
        return bool(COMPARISONS[node.op_type](operands[0], operands[1]))
    return None
