"""Faults of fixed kinds: each kind gives the places of a model where it can be, as functions that put it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt import graphs

Mutate = Callable[[], str]
"""Changes the model, and says what it did."""

_ORDERED = {"Sub": 0, "Div": 0, "Pow": 0, "Mod": 0, "MatMul": 0, "Gemm": 0, "PRelu": 0, "Concat": 0, "Where": 1} | {
    "Less": 0,
    "Greater": 0,
    "LessOrEqual": 0,
    "GreaterOrEqual": 0,
}
_AXES_INPUT = {"Squeeze": (1,), "Unsqueeze": (1,), "Slice": (3,)} | {
    f"Reduce{name}": (1,)
    for name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
}
_SHAPE_INPUT = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Tile": (1,), "Resize": (3,)}
# Constant inputs and attributes.
_SLICES = {"Slice": ((1, 2), ("starts", "ends")), "Split": ((1,), ("split",)), "Gather": ((1,), ())}


def drop_node(model: ir.Model) -> Iterator[Mutate]:
    """A node replaced by its first input that has the dtype, and as far as known the shape, of its output."""
    for node in graphs.all_nodes(model):
        if len(node.outputs) != 1 or node.op_type in ("Identity", "Constant"):
            continue
        for value in node.inputs:
            if value is not None and not graphs.is_constant(value) and _alike(value, node.outputs[0]):
                yield partial(_drop, node, value)
                break


def _alike(value: ir.Value, output: ir.Value) -> bool:
    if value.type is None or value.type != output.type:
        return False
    return value.shape is None or output.shape is None or value.shape == output.shape


def _drop(node: ir.Node, value: ir.Value) -> str:
    told = f"{_name(node)} dropped"
    node.op_type, node.domain = "Identity", ""
    node.attributes.clear()
    for i in range(len(node.inputs)):
        node.replace_input_with(i, value if i == 0 else None)
    node.resize_inputs(1)
    return told


def swap_inputs(model: ir.Model) -> Iterator[Mutate]:
    """Two neighbouring inputs of an op whose order matters."""
    for node in graphs.all_nodes(model):
        first = _ORDERED.get(node.op_type)
        if first is not None and len(node.inputs) > first + 1 and node.inputs[first] is not node.inputs[first + 1]:
            yield partial(_swap, node, first)


def _swap(node: ir.Node, first: int) -> str:
    a, b = node.inputs[first], node.inputs[first + 1]
    node.replace_input_with(first, b)
    node.replace_input_with(first + 1, a)
    return f"{_name(node)}: inputs {first} and {first + 1} swapped"


def move_axis(model: ir.Model) -> Iterator[Mutate]:
    """An axis, as an attribute or a constant input, one further or one nearer."""
    for node in graphs.all_nodes(model):
        yield from _off_by_one(node, _AXES_INPUT.get(node.op_type, ()), ("axis", "axes"))


def stale_shape(model: ir.Model) -> Iterator[Mutate]:
    """A shape that no longer fits: a size of a constant target off by one, two swapped, a Shape frozen."""
    for node in graphs.all_nodes(model):
        positions = _SHAPE_INPUT.get(node.op_type, ())
        yield from _off_by_one(node, positions, ())
        for position in positions:
            sizes = _integers(node, position)
            if sizes is not None:
                for i in np.flatnonzero(np.diff(sizes)):
                    swapped = sizes.copy()
                    swapped[[i, i + 1]] = sizes[[i + 1, i]]
                    yield partial(_put, node, position, swapped)
        if node.op_type == "Shape" and node.inputs[0] is not None:
            shape = node.inputs[0].shape
            if shape is not None and not shape.is_static() and not {"start", "end"} & set(node.attributes):
                yield partial(_freeze, node, [dim if isinstance(dim, int) else 2 for dim in shape])


def _freeze(node: ir.Node, sizes: Sequence[int]) -> str:
    told = f"{_name(node)} frozen to {list(sizes)}"
    frozen = ir.tensor(np.array(sizes, np.int64))
    node.op_type, node.domain = "Constant", ""
    node.replace_input_with(0, None)
    node.resize_inputs(0)
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", frozen)
    return told


def wrong_scale(model: ir.Model) -> Iterator[Mutate]:
    """A constant or weight, as one node reads it, times 1.01, 0.5 or 2."""
    for node in graphs.all_nodes(model):
        for position, value in enumerate(node.inputs):
            tensor = graphs.constant_tensor(value)
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.size:
                yield from (partial(_scale, node, position, factor) for factor in (1.01, 0.5, 2.0))


def _scale(node: ir.Node, position: int, factor: float) -> str:
    array = graphs.constant_array(node.inputs[position])
    assert array is not None
    _put(node, position, (array.astype(np.float64) * factor).astype(array.dtype))
    return f"{_name(node)}: constant input {position} {list(array.shape)} times {factor:g}"


def shift_slice(model: ir.Model) -> Iterator[Mutate]:
    """A start or end of Slice, a size of Split, a constant index of Gather off by one."""
    for node in graphs.all_nodes(model):
        yield from _off_by_one(node, *_SLICES.get(node.op_type, ((), ())))


def _off_by_one(node: ir.Node, positions: Sequence[int], attributes: Sequence[str]) -> Iterator[Mutate]:
    """Each integer in these constant inputs and attributes one less and one more."""
    for position in positions:
        values = _integers(node, position)
        if values is not None:
            yield from (partial(_put, node, position, moved) for moved in _moves(node, values))
    for name in attributes:
        if name in node.attributes:
            values = np.asarray(node.attributes[name].value)
            yield from (partial(_set, node, name, moved) for moved in _moves(node, values))


def _integers(node: ir.Node, position: int) -> np.ndarray | None:
    if position >= len(node.inputs):
        return None
    array = graphs.constant_array(node.inputs[position], limit=64)
    return array if array is not None and array.size and array.dtype.kind == "i" else None


def _moves(node: ir.Node, values: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(values.size):
        for step in (-1, 1):
            moved = values.astype(np.int64).reshape(-1)
            if abs(moved[i]) > 2**31:  # "to the end"
                continue
            moved[i] += step
            if node.op_type == "Split" and values.ndim == 1 and values.size > 1:  # the sizes must still add up
                moved[(i + 1) % values.size] -= step
            yield moved.reshape(values.shape).astype(values.dtype)


def _set(node: ir.Node, name: str, values: np.ndarray) -> str:
    before, after = node.attributes[name].value, values.tolist()
    node.attributes[name] = ir.AttrInt64s(name, after) if values.ndim else ir.AttrInt64(name, after)
    return f"{_name(node)}: {name} {before} became {after}"


def _put(node: ir.Node, position: int, array: np.ndarray) -> str:
    """Give one input of one node another constant; whoever else reads the old one keeps it."""
    before = graphs.constant_array(node.inputs[position])
    constant = ir.node("Constant", [], {"value": ir.tensor(array)})
    assert node.graph is not None and before is not None
    constant.outputs[0].name = f"mutant_{id(constant)}"
    node.graph.insert_before(node, constant)
    node.replace_input_with(position, constant.outputs[0])
    return f"{_name(node)}: constant input {position} {before.tolist()} became {array.tolist()}"


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name}"


KINDS: dict[str, Callable[[ir.Model], Iterator[Mutate]]] = {
    "drop node": drop_node,
    "swap inputs": swap_inputs,
    "axis ±1": move_axis,
    "stale shape": stale_shape,
    "wrong scale": wrong_scale,
    "off-by-one slice": shift_slice,
}
