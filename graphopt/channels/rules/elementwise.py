"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.rules.shared import align, present, same, tie_all
from graphopt.channels.rules.table import rule
from graphopt.channels.tying import Group, Tying
from graphopt.matching import int_attribute


@rule(
    *("Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Reciprocal", "Erf", "Gelu", "Elu", "Selu", "Celu", "Softplus", "Swish"),
    *("Softsign", "HardSigmoid", "HardSwish", "Mish", "ThresholdedRelu", "Shrink", "Sin", "Cos", "Tan", "Sinh", "Cosh"),
    *("Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Floor", "Ceil", "Round", "Sign", "Not", "IsNaN", "IsInf"),
    *("BitwiseNot", "Softmax", "LogSoftmax"),
)
def _equivariant(t: Tying, node: ir.Node) -> None:
    """One input, one output, the same thing done at each place: only permutations pass."""
    source = node.inputs[0]
    assert source is not None
    if t.permutes:
        same(t, source, node.outputs[0])


@rule("LpNormalization")
def _lp_normalization(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    axis, power = int_attribute(node, "axis", -1), int_attribute(node, "p", 2)
    if t.permutes:
        same(t, source, node.outputs[0])
    elif t.group is Group.ORTHOGONAL and axis is not None and power == 2:
        axis %= t.rank(source)
        t.tie((source, axis), (node.outputs[0], axis))


@rule("Relu", "LeakyRelu", "Abs")
def _homogeneous(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    if t.permutes or t.scales:
        same(t, source, node.outputs[0])


@rule("Identity", "Neg", "Cast", "CastLike", "Dropout")
def _linear_unary(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if node.op_type == "Dropout" and not _is_inference(node, t.opset):
        return
    if not t.permutes and node.op_type in ("Cast", "CastLike") and not _are_floats(source, output):
        return
    same(t, source, output)
    t.free_all(*node.inputs[1:])
    if node.op_type == "Dropout":
        t.free_all(*(v for v in node.outputs[1:] if not v.uses() and not v.is_graph_output()))


def _is_inference(node: ir.Node, opset: int) -> bool:
    if opset < 12:
        return opset >= 7 or int_attribute(node, "is_test", 0) == 1
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    return mode is None or graphs.scalar_of(mode) == 0.0


def _are_floats(*values: ir.Value) -> bool:
    return all(value.dtype is not None and value.dtype.is_floating_point() for value in values)


@rule(
    *("Pow", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
    *("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
)
def _pairwise(t: Tying, node: ir.Node) -> None:
    if t.permutes:
        for axis, running, _ in align(t, present(node), node.outputs[0]):
            tie_all(t, axis, running)


@rule("Add", "Sub", "Sum", "Mean", "Max", "Min")
def _sum(t: Tying, node: ir.Node) -> None:
    if node.op_type in ("Max", "Min") and not (t.permutes or t.scales):
        return
    inputs = present(node)
    if not t.permutes:  # a number that is zero stays zero
        inputs = [value for value in inputs if graphs.scalar_of(value) != 0.0]
    for axis, running, repeated in align(t, inputs, node.outputs[0]):
        if t.permutes or not repeated:
            tie_all(t, axis, running)
        else:
            t.pin(f"{t.called()} adds the same to all", axis, *running)


@rule("Mul")
def _product(t: Tying, node: ir.Node) -> None:
    left, right = present(node)
    if t.can_absorb(left, 0) and not graphs.is_constant(right):
        left, right = right, left
    for axis, running, _ in align(t, [left, right], node.outputs[0]):
        if t.permutes or len(running) < 2:
            tie_all(t, axis, running)
        elif t.scales:
            index = 1 if right is node.inputs[1] else 0
            if left is not right and t.can_absorb(right, index):
                t.tie(axis, running[1])
                t.absorb(right, running[1][1], running[0], inverse=True)
            else:
                t.multiply(axis, *running)


@rule("Div")
def _quotient(t: Tying, node: ir.Node) -> None:
    left, right = present(node)
    for axis, running, _ in align(t, [left, right], node.outputs[0]):
        if t.permutes:
            tie_all(t, axis, running)
        elif running == [(left, axis[1] - t.rank(axis[0]) + t.rank(left))]:
            t.tie(axis, running[0])
        elif t.scales and len(running) == 1:
            t.tie(axis, running[0], inverse=True)
        elif t.scales and len(running) == 2 and left is not right:
            if t.can_absorb(right, 1):
                t.tie(axis, running[1], inverse=True)
                t.absorb(right, running[1][1], running[0], inverse=False)
            elif t.can_absorb(left, 0):
                t.tie(axis, running[0])
                t.absorb(left, running[0][1], running[1], inverse=False)
            else:
                t.multiply(running[0], axis, running[1])


@rule("PRelu")
def _prelu(t: Tying, node: ir.Node) -> None:
    source, slope = present(node)
    for axis, running, _ in align(t, [source, slope], node.outputs[0]):
        if t.permutes:
            tie_all(t, axis, running)
        elif t.scales:
            t.tie(axis, (source, axis[1]))
            t.pin(f"slope of {t.called()}", *running[1:])


@rule("Clip")
def _clip(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    if t.permutes or (t.scales and _is_relu(node, t.opset)):
        same(t, source, node.outputs[0])


def _is_relu(node: ir.Node, opset: int) -> bool:
    bounds = [*node.inputs[1:], None, None][:2]
    return opset >= 11 and bounds[1] is None and bounds[0] is not None and graphs.scalar_of(bounds[0]) == 0.0


@rule("Where")
def _where(t: Tying, node: ir.Node) -> None:
    condition, one, other = present(node)
    for axis, running, _ in align(t, [condition, one, other], node.outputs[0]):
        chosen = [a for a in running if a[0] is not condition]
        if t.permutes:
            tie_all(t, axis, running)
        elif len(chosen) == 2 and (t.scales or len(running) == 2):
            tie_all(t, axis, chosen)
            t.pin(f"condition of {t.called()}", *(a for a in running if a[0] is condition))
        else:
            t.pin(t.called(), axis, *running)
