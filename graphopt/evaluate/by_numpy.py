"""Computes an operator by numpy where that defines the result to the bit, within a limit on its size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.evaluate.arithmetic import ELEMENTWISE, cast_operator
from graphopt.evaluate.making import MAKING
from graphopt.evaluate.movement import MOVEMENT
from graphopt.evaluate.operation import Array, Function, Inexact, Inputs, Operation, operand, to_ints

_FUNCTIONS: dict[str, Function] = {
    **MOVEMENT,
    **ELEMENTWISE,
    **MAKING,
    "Cast": cast_operator,
}

_LATER_MOVEMENT = frozenset(
    {
        "Identity",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Concat",
        "Split",
        "Slice",
        "Gather",
        "Tile",
    }
)
_LATER_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Abs"})


def evaluate(operation: Operation, inputs: Inputs, *, limit: int | None = None) -> list[Array] | None:
    """The outputs of a standard operator by numpy, or None where numpy does not define them to the bit.

    Args:
        operation: What to compute.
        inputs: One array an input, None for an input left out.
        limit: The most elements that an output may have.

    Returns:
        One array an output. An array may be a view of an input.
    """
    function = _FUNCTIONS.get(operation.op_type)
    if function is None:
        return None
    try:
        if limit is not None and _expanded_size(operation, inputs) > limit:
            return None
        with np.errstate(all="ignore"):
            return function(operation, inputs)
    except (Inexact, ValueError, IndexError, TypeError, OverflowError, MemoryError, np.exceptions.AxisError):
        # A malformed node (an index out of range, shapes that do not fit): the runtime shall say so, not we.
        return None


def is_value_independent(op_type: str, dtype: ir.DataType, result: ir.DataType) -> bool:
    """Whether numpy computes an operator exactly whatever the values are, so that it may be computed later.

    Args:
        op_type: The operator.
        dtype: Of its first operand.
        result: Of its result.
    """
    if op_type in _LATER_MOVEMENT:
        return True
    wide = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    if op_type == "Cast":
        return (dtype in wide and result in wide) or (_is_integer(dtype) and (_is_integer(result) or result in wide))
    return op_type in _LATER_ARITHMETIC and dtype in wide and result == dtype


def result_shapes(operation: Operation, tensors: Sequence[ir.TensorProtocol | None]) -> list[tuple[int, ...]] | None:
    """The shapes of the outputs of an operator whose result does not depend on the values of its first operand.

    Large operands are not read: arrays of the same shape without content stand for them.
    """
    shapes: list[tuple[int, ...]] = [() if t is None else tuple(t.shape.numpy()) for t in tensors]
    try:
        if operation.op_type in _LATER_ARITHMETIC:
            return [np.broadcast_shapes(*shapes)]
        if operation.op_type in ("Cast", "Identity"):
            return [shapes[0]]
        stand_ins: list[Array | None] = [np.broadcast_to(np.zeros((), np.int8), shape) for shape in shapes]
        if operation.op_type != "Concat":
            # Axes, indices and sizes are short and count; what is moved does not.
            stand_ins[1:] = [None if t is None else t.numpy() for t in tensors[1:]]
    except ValueError:
        return None
    results = evaluate(operation, stand_ins)
    return None if results is None else [result.shape for result in results]


def _is_integer(dtype: ir.DataType) -> bool:
    return dtype.is_integer() and dtype.bitwidth >= 8


def _expanded_size(operation: Operation, inputs: Inputs) -> int:
    """How many elements an operator that makes more of them than it reads will make."""
    if operation.op_type == "ConstantOfShape":
        return math.prod(to_ints(operand(inputs)))
    if operation.op_type == "Expand":
        return math.prod(np.broadcast_shapes(operand(inputs).shape, tuple(to_ints(operand(inputs, 1)))))
    if operation.op_type == "Tile":
        return operand(inputs).size * math.prod(to_ints(operand(inputs, 1)))
    if operation.op_type == "Range":
        start, stop, step = (operand(inputs, i).item() for i in range(3))
        return 0 if step == 0 else max(0, math.ceil((stop - start) / step))
    if operation.op_type == "Pad":
        pads = operation.integers("pads") if operation.opset < 11 else to_ints(operand(inputs, 1))
        return (math.prod(operand(inputs).shape) + 1) * (1 + sum(abs(p) for p in pads or []))
    return math.prod(np.broadcast_shapes(*(x.shape for x in inputs if x is not None))) if _elementwise(operation) else 0


def _elementwise(operation: Operation) -> bool:
    return operation.op_type in ELEMENTWISE
