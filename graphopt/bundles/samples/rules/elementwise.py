"""Operators that look at one element at a time."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import Lifted
from graphopt.bundles.samples.rules.shared import broadcast, integer, one_axis, operand, others
from graphopt.bundles.samples.rules.table import rule


@rule(
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos"),
    *("Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Log"),
    *("Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
@rule("Gelu", "FastGelu", "QuickGelu", "BiasGelu", domain="com.microsoft")
def _unary(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    return t.same_results(node, [given.value, *others(t, node)], given.place)


@rule("Identity")
def _identity(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return [operand(t, node, 0)]


@rule("Dropout")
def _dropout(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    """Out of training (the driver refuses it otherwise)."""
    given = operand(t, node, 0)
    return t.same_results(node, [given.value, *others(t, node)], given.place)


@rule(
    *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)
def _broadcast(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    values, place = broadcast(t, [operand(t, node, index) for index in range(len(node.inputs))])
    return t.same_results(node, values, place)


@rule("CastLike")
def _cast_like(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, like = operand(t, node, 0), operand(t, node, 1)
    return t.same_results(node, [given.value, like.value], given.place)


@rule("QuantizeLinear", "DequantizeLinear")
def _quantized(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given, scale = operand(t, node, 0), operand(t, node, 1)
    if scale.sizes in ((), (1,)):
        return t.same_results(node, [given.value, *others(t, node)], given.place)
    if integer(t, node, "block_size", 0):
        t.refuse("it is quantized in blocks")
    return one_axis(t, node, integer(t, node, "axis", 1))
