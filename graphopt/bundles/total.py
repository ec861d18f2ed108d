"""Operators that cannot fail on values which they were not meant for: they may run before it is known who wants them.

An operator may fail since shapes do not fit, or since of a value (an index that is not there, a whole number divided by
0). Here shapes are known as they were where the operator ran well, apart from the number of rows, and the operators are
those that take any values.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.shapes import trusted_shape

# fmt: off
_TAKES_ALL = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip",
    "Concat", "Constant", "Conv", "ConvTranspose", "Cos", "DepthToSpace", "Div", "Einsum", "Elu", "Equal", "Erf",
    "Exp", "Flatten", "Floor", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "MatMul",
    "Max", "MaxPool", "Mean", "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "RMSNormalization",
    "Reciprocal", "Relu", "Round", "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Softmax", "Softplus",
    "Softsign", "SpaceToDepth", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Transpose", "Where",
    "Xor",
})
_WITH_CONSTANTS = frozenset({
    "Expand", "Gather", "GatherElements", "Pad", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape", "Resize",
    "Slice", "Split", "Squeeze", "Tile", "TopK", "Unsqueeze",
})
"""Take any first input; the others say where and how large."""
# fmt: on
_ANY_ROWS = frozenset(name for name in _WITH_CONSTANTS if name.startswith("Reduce")) - {"ReduceMax", "ReduceMin"}
"""May take rows together; what is the largest of none is not known."""
_CONTRIB = frozenset({"BiasGelu", "FastGelu", "FusedMatMul", "Gelu", "QuickGelu", "SkipLayerNormalization"})
_NOT_WHOLE = frozenset({"Div", "Pow"})
"""Fail on some whole numbers."""
_PLAIN = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_STRINGS = frozenset({ir.DataType.STRING})

_Shape = tuple[int | str, ...]


def cannot_fail(node: ir.Node) -> bool:
    """Whether a node that ran well on some values does on all others that can reach it.

    Args:
        node: Of a model whose shapes were inferred.
    """
    known = {"": _TAKES_ALL | _WITH_CONSTANTS, "com.microsoft": _CONTRIB}.get(node.domain, frozenset())
    read = [value for value in node.inputs if value is not None]
    values = [*read, *(value for value in node.outputs if value.name)]
    if node.op_type not in known or any(value.dtype is None or value.dtype in _STRINGS for value in values):
        return False
    if node.op_type in _NOT_WHOLE and any(value.dtype not in _PLAIN for value in values):
        return False
    if node.op_type in _WITH_CONSTANTS and not all(graphs.is_constant(value) for value in read[1:]):
        return False
    if node.op_type in _ANY_ROWS:
        values = read
    shapes = [_shape(value) for value in values if not graphs.is_constant(value)]
    return all(shape is not None for shape in shapes) and _fit(shapes)


def _fit(shapes: list[_Shape | None]) -> bool:
    """Whether shapes are numbers throughout, or all have the same unknown number of rows, which nothing depends on."""
    rows = {shape[0] for shape in shapes if shape and isinstance(shape[0], str)}
    if any(isinstance(size, str) for shape in shapes if shape for size in shape[1:]):
        return False
    return not rows or (len(rows) == 1 and all(shape and shape[0] in rows for shape in shapes))


def _shape(value: ir.Value) -> _Shape | None:
    shape = trusted_shape(value)
    if shape is None or any(not isinstance(size, int) and size.value is None for size in shape):
        return None
    return tuple(size if isinstance(size, int) else str(size.value) for size in shape)
