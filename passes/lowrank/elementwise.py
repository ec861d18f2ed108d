"""What commutes with joining and taking apart: elementwise operators, and the parts of constants they then read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import weights
from graphopt.rewrite import Context
from graphopt.shapes import trusted_shape

MOST_NODES = 64
"""How many elementwise nodes a region has at most."""
BROADCASTING = 8
"""From this opset on all operators below broadcast like numpy."""

_OF_ONE = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip"),
    *("Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf"),
    *("IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink"),
    *("Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh"),
    "ThresholdedRelu",
)
_OF_SEVERAL = (
    *("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where"),
    "Xor",
)
ELEMENTWISE = {
    "": frozenset((*_OF_ONE, *_OF_SEVERAL)),
    "com.microsoft": frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"}),
}


def size_along(value: ir.Value, axis: int) -> int | None:
    """The size of an axis, counted from the end; None where it is not known."""
    shape = trusted_shape(value)
    if shape is None or len(shape) < -axis:
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def slice_of(value: ir.Value, tensor: ir.TensorProtocol, axis: int, places: slice, ctx: Context) -> ir.Value:
    """Some places of a constant along an axis, as a constant."""
    shape = list(tensor.shape.numpy())
    shape[axis] = places.stop - places.start

    def compute() -> ir.TensorProtocol:
        array = np.moveaxis(weights.read(tensor), axis, 0)[places]
        return ir.tensor(np.ascontiguousarray(np.moveaxis(array, 0, axis)))

    return ctx.constant(weights.computed(compute, tensor.dtype, shape), f"{value.name or 'constant'}_part")
