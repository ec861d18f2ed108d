"""LayerNormalization and RMSNormalization, written out by exporters, as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import (
    FLOATS,
    holds,
    made_by,
    rank_of,
    scalar_beside,
    sizes_of,
    split_scalar,
    suffix_axes,
)
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shapes import trusted_shape

_PARAMETERS = 1 << 20


@dataclass(frozen=True)
class _Normalised:
    """x, less its mean or not, over its standard deviation.

    Attributes:
        x: What is normalised.
        axes: How many last axes.
        epsilon: Added to the variance.
        centred: Whether the mean is taken off: LayerNormalization, else RMSNormalization.
        output: The value that holds the result.
        gamma: What multiplies the result, where it stands inside the pattern.
        beta: What is added to it, where it stands inside the pattern.
    """

    x: ir.Value
    axes: int
    epsilon: float
    centred: bool
    output: ir.Value
    gamma: ir.Value | None = None
    beta: ir.Value | None = None


class FuseLayerNorm(RulePass):
    """Turns (x - mean) / sqrt(variance + eps) * gamma + beta over the last axes into LayerNormalization."""

    name = "fuse-layer-norm"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="ReduceMean, Sub, Pow or Mul, ReduceMean, Add, Sqrt, Div (or Reciprocal and Mul, or Pow -0.5), then "
        "gamma and beta if they are there; axes as attribute or input; the mean taken off once or twice; "
        "computed in float32 between two Casts. Without the mean: RMSNormalization",
        refuses="an opset below 17 (RMSNormalization: 23); axes that are not the last ones, or an unknown size of "
        "them; an epsilon that is not constant; gamma that broadcasts over other axes; float64, which the "
        "operator computes in float32; an exponent other than two",
        costs="linear in the nodes; saves six to nine passes over the data",
        source="Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467",
    )
    roots = ("Div", "Mul", "Add")

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        found = _folded(node) if node.op_type == "Add" else _normalised(node)
        if found is None:
            return False
        if isinstance(found, str):
            ctx.refuse(node, found)
            return False
        op_type, first = ("LayerNormalization", 17) if found.centred else ("RMSNormalization", 23)
        if ctx.opset < first:
            ctx.refuse(node, f"{op_type} needs opset {first}, the model has {ctx.opset}")
            return False
        if found.x.dtype not in FLOATS or found.x.dtype is ir.DataType.DOUBLE:
            ctx.refuse(node, f"{op_type} computes in float32: not for {found.x.dtype or 'a type not known'}")
            return False
        shape = trusted_shape(found.x)
        last = [] if shape is None else list(shape)[-found.axes :]
        sizes = tuple(axis for axis in last if isinstance(axis, int))
        if shape is None or len(sizes) != found.axes:
            ctx.refuse(node, f"the size of the normalised axes is not known: {shape}")
            return False
        if 0 in sizes:
            ctx.refuse(node, "a normalised axis is empty")
            return False
        return self._write(node, found, op_type, sizes, ctx)

    def _write(self, node: ir.Node, found: _Normalised, op_type: str, sizes: tuple[int, ...], ctx: Context) -> bool:
        x, output = found.x, found.output
        gamma, beta = found.gamma, found.beta
        if gamma is None and beta is None:
            gamma, output = _parameter(output, "Mul", sizes, node)
            if found.centred:
                beta, output = _parameter(output, "Add", sizes, node)
        elif any(p is not None and not _covers(p, sizes, rank_of(x)) for p in (gamma, beta)):
            ctx.refuse(node, "gamma or beta does not have the shape of the normalised axes")
            return False
        narrow = _between_casts(x, output, [p for p in (gamma, beta) if p is not None])
        if narrow is not None:
            # float16 in, float16 out, computed in float32: that is what the operator does by itself.
            x, output = narrow
            if gamma is None and beta is None:
                gamma, output = _parameter(output, "Mul", sizes, node)
                if found.centred:
                    beta, output = _parameter(output, "Add", sizes, node)
        assert x.dtype is not None
        if gamma is None:
            scale = ctx.constant(np.ones(sizes, x.dtype.numpy()), "ones")
        else:
            scale = _fitted(gamma, sizes, x.dtype, ctx)
        inputs = [x, scale]
        if beta is not None:
            inputs.append(_fitted(beta, sizes, x.dtype, ctx))
        new = ctx.node(op_type, inputs, {"axis": -found.axes, "epsilon": found.epsilon}, like=output)
        rule = "layer-norm" if found.centred else "rms-norm"
        return ctx.replace({output: new.outputs[0]}, [new], rule=rule)


def _normalised(node: ir.Node) -> _Normalised | str | None:
    """What a Div or Mul normalises; None where it does nothing of the kind, a reason where it nearly does."""
    for deviation, scale, inverted in _quotients(node):
        root = _root_of(scale, inverted)
        if root is None:
            continue
        sum_ = made_by(root, "Add")
        if sum_ is None:
            continue
        split = split_scalar(sum_)
        if split is None:
            return "epsilon is not a constant" if any(made_by(v, "ReduceMean") for v in sum_.inputs) else None
        variance, epsilon = split
        mean_square = made_by(variance, "ReduceMean")
        if mean_square is None:
            continue
        if not epsilon >= 0:
            return f"epsilon is {epsilon}"
        squared = _square_root_of(mean_square.inputs[0])
        if squared is None:
            return "the exponent is not two"
        axes = suffix_axes(mean_square, rank_of(mean_square.inputs[0]))
        if axes is None:
            return "the reduced axes are not the last ones, kept as axes of size one"
        output = node.outputs[0]
        if (centre := _centred(deviation)) is not None:
            x, mean_axes = centre
            other = _centred(squared)
            if other is not None and other[0] is x:
                if mean_axes != axes or other[1] != axes:
                    return "mean and variance are taken over different axes"
                return _Normalised(x, axes, epsilon, True, output)
        if squared is deviation:
            return _Normalised(deviation, axes, epsilon, False, output)
        return "what is squared is not what is divided"
    return None


def _folded(node: ir.Node) -> _Normalised | None:
    """The form that TensorFlow writes: x * m + (beta - mean * m), with m = gamma / sqrt(variance + eps)."""
    for product, rest in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        difference, scaled = made_by(rest, "Sub"), made_by(product, "Mul")
        if difference is None or scaled is None:
            continue
        taken = made_by(difference.inputs[1], "Mul")
        if taken is None:
            continue
        for x, m in (scaled.inputs, scaled.inputs[::-1]):
            if m not in taken.inputs or m is None or x is None:
                continue
            mean = made_by(taken.inputs[1] if taken.inputs[0] is m else taken.inputs[0], "ReduceMean")
            if mean is None or mean.inputs[0] is not x:
                continue
            axes = suffix_axes(mean, rank_of(x))
            inverse = made_by(m, "Mul")
            choices = (
                [(m, None)] if inverse is None else [(m, None), tuple(inverse.inputs), tuple(inverse.inputs[::-1])]
            )
            for factor, gamma in choices:
                root = None if factor is None else _root_of(factor, True)
                sum_ = made_by(root, "Add")
                split = None if sum_ is None else split_scalar(sum_)
                mean_square = None if split is None else made_by(split[0], "ReduceMean")
                if split is None or mean_square is None or axes is None or not split[1] >= 0:
                    continue
                squared = _square_root_of(mean_square.inputs[0])
                centre = None if squared is None else _centred(squared)
                if centre == (x, axes) and suffix_axes(mean_square, rank_of(squared)) == axes:
                    return _Normalised(x, axes, split[1], True, node.outputs[0], gamma, difference.inputs[0])
    return None


def _quotients(node: ir.Node) -> list[tuple[ir.Value, ir.Value, bool]]:
    """The ways to read a node as a / b (a, b, False) or a * b with b = 1 / c (a, b, True)."""
    left, right = node.inputs
    if left is None or right is None:
        return []
    if node.op_type == "Div":
        return [(left, right, False)]
    return [(left, right, True), (right, left, True)]


def _root_of(value: ir.Value, inverted: bool) -> ir.Value | None:
    """The v of sqrt(v), or of 1 / sqrt(v) where inverted."""
    if inverted:
        power = made_by(value, "Pow")
        if power is not None:
            return power.inputs[0] if scalar_beside(power.inputs[1], power.inputs[0]) == -0.5 else None
        reciprocal = made_by(value, "Reciprocal")
        if reciprocal is not None:
            inner = reciprocal.inputs[0]
        else:
            quotient = made_by(value, "Div")
            if quotient is None or scalar_beside(quotient.inputs[0], quotient.inputs[1]) != 1.0:
                return None
            inner = quotient.inputs[1]
        assert inner is not None
        value = inner
    power = made_by(value, "Pow")
    if power is not None:
        return power.inputs[0] if scalar_beside(power.inputs[1], power.inputs[0]) == 0.5 else None
    sqrt = made_by(value, "Sqrt")
    return None if sqrt is None else sqrt.inputs[0]


def _square_root_of(value: ir.Value | None) -> ir.Value | None:
    """The v of v^2, as Pow or as v * v."""
    product = made_by(value, "Mul", "Pow")
    if product is None:
        return None
    if product.op_type == "Mul":
        return product.inputs[0] if product.inputs[0] is product.inputs[1] else None
    return product.inputs[0] if scalar_beside(product.inputs[1], product.inputs[0]) == 2.0 else None


def _centred(value: ir.Value) -> tuple[ir.Value, int] | None:
    """Of x - mean(x): the x, and over how many last axes the mean is taken."""
    difference = made_by(value, "Sub")
    if difference is None:
        return None
    x, subtrahend = difference.inputs
    mean = made_by(subtrahend, "ReduceMean")
    if x is None or mean is None or mean.inputs[0] is not x:
        return None
    axes = suffix_axes(mean, rank_of(x))
    return None if axes is None else (x, axes)


def _parameter(
    value: ir.Value, op_type: str, sizes: tuple[int, ...], root: ir.Node
) -> tuple[ir.Value | None, ir.Value]:
    """The gamma or beta that the only reader of a value applies, and the result; None and the value where none does."""
    node = graphs.sole_consumer(value)
    if node is None or node.op_type != op_type or node.domain != "" or node.graph is not root.graph:
        return None, value
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if other is None or other is value or not _covers(other, sizes, rank_of(value)):
        return None, value
    return other, node.outputs[0]


def _covers(parameter: ir.Value, sizes: tuple[int, ...], rank: int | None) -> bool:
    """Whether gamma or beta has one number for each position of the normalised axes and adds no axes.

    A constant may be smaller, [1] or a scalar, since it can be spread; leading axes of size one are dropped.
    """
    shape = sizes_of(parameter)
    if shape is None or rank is None:
        return False
    if shape == sizes:
        return True
    if not graphs.is_constant(parameter) or len(shape) > rank:
        return False
    if any(axis != 1 for axis in shape[: max(0, len(shape) - len(sizes))]):
        return False
    tail = shape[-len(sizes) :] if shape else ()
    return all(axis in (1, size) for axis, size in zip(reversed(tail), reversed(sizes), strict=False))


def _fitted(parameter: ir.Value, sizes: tuple[int, ...], dtype: ir.DataType, ctx: Context) -> ir.Value:
    """Gamma or beta in the shape of the normalised axes and in the dtype of what is normalised."""
    if sizes_of(parameter) == sizes and parameter.dtype is dtype:
        return parameter
    array = graphs.constant_array(parameter, limit=_PARAMETERS)
    assert array is not None
    tail = array.reshape(array.shape[array.ndim - len(sizes) :]) if array.ndim > len(sizes) else array
    return ctx.constant(np.broadcast_to(tail, sizes).astype(dtype.numpy()), parameter.name or "parameter")


def _between_casts(x: ir.Value, output: ir.Value, parameters: list[ir.Value]) -> tuple[ir.Value, ir.Value] | None:
    """The narrow value before the Cast to float32 and the one after the Cast back, where both Casts can go.

    They can where gamma and beta are constants that the narrow type holds exactly: the result is then rounded to it at
    the end only, as before.
    """
    widen = made_by(x, "Cast")
    narrow = graphs.sole_consumer(output)
    source = widen.inputs[0] if widen is not None else None
    if source is None or x.dtype is not ir.DataType.FLOAT or narrow is None or narrow.op_type != "Cast":
        return None
    result = narrow.outputs[0]
    if source.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) or result.dtype is not source.dtype:
        return None
    if widen is None or widen.graph is not narrow.graph or narrow.domain != "":
        return None
    for parameter in parameters:
        array = graphs.constant_array(parameter, limit=_PARAMETERS)
        if array is None or not holds(array, source.dtype):
            return None
    return source, result
