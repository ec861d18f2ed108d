"""The axes of an input that convolutions and pools slide their windows over, and how wide those are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.graphs import constant_array

# Operators that a signal crosses unchanged in layout on its way to a convolution.
_ELEMENTWISE = frozenset(
    [
        "Identity",
        "Cast",
        "Pad",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Clip",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Sigmoid",
        "Tanh",
        "Neg",
        "Abs",
        "Sqrt",
        "Pow",
        "Exp",
        "Log",
        "BatchNormalization",
        "InstanceNormalization",
        "QuantizeLinear",
        "DequantizeLinear",
        "Dropout",
        "Where",
        "Max",
        "Min",
    ]
)
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})


def spatial_axes(value: ir.Value, reached: Callable[[ir.Node], bool]) -> dict[int, int]:
    """The axes of an input that convolutions and pools slide over, each with the widest window.

    Args:
        value: An input of the model.
        reached: Whether a node runs; what does not is not looked into.
    """
    if value.shape is None:
        return {}
    found: dict[int, int] = {}
    start: tuple[int | None, ...] = tuple(range(len(value.shape)))
    seen: set[ir.Value] = set()
    pending: list[tuple[ir.Value, tuple[int | None, ...]]] = [(value, start)]
    while pending:
        current, axes = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            if not reached(node):
                continue
            for offset, width in enumerate(reversed(_window(node, index))):
                axis = axes[-1 - offset] if offset < len(axes) else None
                if axis is not None:
                    found[axis] = max(found.get(axis, 1), width)
            moved = _moved(node, index, axes)
            if moved is not None:
                pending.extend((output, moved) for output in node.outputs[:1])
    return found


def _window(node: ir.Node, index: int) -> list[int]:
    """The extents of the window that a node slides over the last axes of its input ``index``; [] if none."""
    if index != 0:
        return []
    kernel = list(node.attributes.get_ints("kernel_shape", ()) or ())
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv", "FusedConv"):
        weight = node.inputs[3 if node.op_type == "QLinearConv" else 1]
        if not kernel and weight is not None and weight.shape is not None and weight.shape.is_static():
            kernel = list(weight.shape.numpy()[2:])
        if not kernel and weight is not None and weight.const_value is not None:
            kernel = list(weight.const_value.shape.numpy()[2:])
    elif node.op_type not in _POOLS:
        return []
    dilations = list(node.attributes.get_ints("dilations", ()) or ()) or [1] * len(kernel)
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=False)]


def _moved(node: ir.Node, index: int, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    """Where a signal's axes are after a node, or None where it ends."""
    if node.op_type in _ELEMENTWISE:
        return axes
    if index != 0:
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(axes))))
        return tuple(axes[axis] for axis in perm) if len(perm) == len(axes) else None
    if node.op_type in ("Unsqueeze", "Squeeze"):
        where = constant_array(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
        if where is None:
            return None
        positions = [int(axis) for axis in np.asarray(where).reshape(-1)]
        rank = len(axes) + len(positions) if node.op_type == "Unsqueeze" else len(axes)
        marked = {position % rank for position in positions}
        if node.op_type == "Squeeze":
            return tuple(axis for position, axis in enumerate(axes) if position not in marked)
        kept = iter(axes)
        return tuple(None if position in marked else next(kept) for position in range(rank))
    return None
