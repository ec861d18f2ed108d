"""Both branches of an If computed, and a Where: where that is cheaper than to decide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.rewrite.bodies import returns_outer, unpack
from graphopt.shapes import trusted_shape

# What ONNX Runtime's CPU has a Where for (float16 by way of float32): it would not load another.
_SELECTED = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64}
)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Elementwise operators of one value that give a result for every number, NaN and infinity too.
_UNARY = frozenset(
    {
        "Abs", "Ceil", "Celu", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
        "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
        "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
_BROADCASTING = frozenset(
    {
        "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or",
        "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
_OF_AN_AXIS = frozenset({"Softmax", "LogSoftmax"})

_Dims = list[int | str]

# Of the time of the If, by the cost profile. On ONNX Runtime's CPU an If around a node or a few took 0.7 to 0.8 of the
# time of both branches and a Where, whatever the size (16 to 65,536 floats); a profile sees such a difference dimly.
_GAIN = 0.5


class SelectBranches(RulePass):
    """Computes both branches of an If and selects one result with Where, where the target says that this is cheaper.

    ONNX Runtime's Where makes 0.0 of a -0.0 that it selects from the then side. That is why this is not bitwise.
    """

    name = "select-branches"
    kind = Kind.ROUNDING
    stage = Stage.SPLIT
    explanation = Explanation(
        matches="If whose branches hold nothing but operators that cannot fail on the data of the other branch: "
        "elementwise operators on shapes that are proved to broadcast, Softmax, Transpose, Unsqueeze and products of "
        "matrices of proved sizes; with results of one type and one known shape in both branches",
        refuses="every other operator: what looks things up (Gather), divides integers, takes sizes from data "
        "(Reshape, Slice, Range), branches or loops itself, draws random numbers, or is not of the standard; shapes "
        "that are not known; results of types other than floats and integers of 32 or 64 bits; "
        f"what by the target's cost profile saves less than {_GAIN:.0%} of the time",
        costs="the work of the branch that would not run; saves entering a branch, which is dear where the condition "
        "has to come back from a device",
        source="if-conversion (Allen, Kennedy, Porterfield and Warren 1983)",
    )
    roots = ("If",)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        branches = [node.attributes[name] for name in ("then_branch", "else_branch")]
        if any(branch.is_ref() for branch in branches) or ctx.opset < 13:
            return False
        bodies = [branch.as_graph() for branch in branches]
        if any(map(returns_outer, bodies)):
            ctx.refuse(node, "a branch returns an outer value as it is, which ONNX does not allow")
            return False
        for inner in (inner for body in bodies for inner in body):
            reason = _may_fail(inner)
            if reason is not None:
                ctx.refuse(node, f"{inner.op_type} in a branch {reason}")
                return False
        for one, other in zip(*(body.outputs for body in bodies), strict=True):
            shape = _dims(one)
            if shape is None or shape != _dims(other) or one.dtype is None or one.dtype != other.dtype:
                ctx.refuse(node, "its branches are not known to give one type and shape")
                return False
            if one.dtype not in _SELECTED:
                ctx.refuse(node, f"ONNX Runtime has no Where for {one.dtype.name.lower()}")
                return False
        return self._select(node, bodies, ctx)

    def _select(self, node: ir.Node, bodies: list[ir.Graph], ctx: Context) -> bool:
        (nodes, left), (more, right) = (unpack(body, ctx) for body in bodies)
        condition = node.inputs[0]
        assert condition is not None
        made = [*nodes, *more]
        if _dims(condition) != []:
            # One element may come with axes, which would spread to the result.
            scalar = ctx.node("Reshape", [condition, ctx.constant(np.zeros(0, np.int64), "scalar")])
            scalar.outputs[0].type, scalar.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
            made.append(scalar)
            condition = scalar.outputs[0]
        outputs = {}
        for old, one, other in zip(node.outputs, left, right, strict=True):
            if old.uses() or old.is_graph_output():
                made.append(ctx.node("Where", [condition, one, other], like=old))
                outputs[old] = made[-1].outputs[0]
        return bool(outputs) and ctx.replace(outputs, made, rule="where", by=_GAIN)


def _dims(value: ir.Value | None) -> _Dims | None:
    """The axes of a value, each a number or a name that stands for one; None where one of them is not known."""
    shape = None if value is None else trusted_shape(value)
    if shape is None or any(not isinstance(axis, int) and axis.value is None for axis in shape):
        return None
    return [axis if isinstance(axis, int) else str(axis.value) for axis in shape]


def _may_fail(node: ir.Node) -> str | None:
    """Why a node may fail on data that it was not meant for; None where it gives a result for all."""
    if node.domain != "" or node.op_type not in _TOTAL:
        return "is not known to take every input"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "has an attribute that its caller sets"
    if node.op_type == "Constant":
        return None
    shapes = [_dims(value) for value in node.inputs if value is not None]
    if any(shape is None for shape in shapes) or any(_dims(value) is None for value in node.outputs):
        return "works on shapes that are not known"
    known = [shape for shape in shapes if shape is not None]
    return None if _TOTAL[node.op_type](node, known) else "is not known to take every input of these shapes"


def _broadcasts(node: ir.Node, shapes: list[_Dims]) -> bool:
    if node.op_type == "Div" and node.inputs[0] is not None and node.inputs[0].dtype not in _FLOATS:
        return False  # by zero
    return _spread(shapes)


def _spread(shapes: list[_Dims]) -> bool:
    """Whether shapes broadcast: counted from the last, axes are one or all the same."""
    for place in range(1, max(map(len, shapes), default=0) + 1):
        if len({shape[-place] for shape in shapes if place <= len(shape) and shape[-place] != 1}) > 1:
            return False
    return True


def _of_an_axis(node: ir.Node, shapes: list[_Dims]) -> bool:
    axis = node.attributes.get_int("axis", -1)
    return -len(shapes[0]) <= axis < len(shapes[0])


def _is_product(node: ir.Node, shapes: list[_Dims]) -> bool:
    a, b = shapes[:2]
    if node.inputs[0] is None or node.inputs[0].dtype not in _FLOATS or min(len(a), len(b)) < 2:
        return False
    if node.op_type == "MatMul":
        return a[-1] == b[-2] and _spread([a[:-2], b[:-2]])
    if node.attributes.get_int("transA", 0):
        a = a[::-1]
    if node.attributes.get_int("transB", 0):
        b = b[::-1]
    if a[1] != b[0]:
        return False
    result: _Dims = [a[0], b[1]]
    added = shapes[2] if len(shapes) > 2 else []
    return len(added) <= 2 and all(axis in (1, size) for axis, size in zip(added[::-1], result[::-1], strict=False))


def _unsqueezes(node: ir.Node, shapes: list[_Dims]) -> bool:
    return len(node.inputs) > 1 and graphs.is_constant(node.inputs[1])


_TOTAL: dict[str, Callable[[ir.Node, list[_Dims]], bool]] = {
    **dict.fromkeys((*_UNARY, "Constant", "Transpose"), lambda node, shapes: True),
    **dict.fromkeys(_BROADCASTING, _broadcasts),
    **dict.fromkeys(_OF_AN_AXIS, _of_an_axis),
    **dict.fromkeys(("MatMul", "Gemm"), _is_product),
    "Unsqueeze": _unsqueezes,
}
