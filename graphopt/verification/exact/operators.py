"""Common operators in float64, by numpy: each from a node, its inputs and the opset to its output or outputs.

An operator gives None where it leaves a node (an element type, an attribute) to the other ways of the interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
# Beyond this many multiply-adds in one node the interpreter is too slow to be worth waiting for.
MULTIPLY_ADD_LIMIT = 4e9


class NotExact(Exception):
    """The float64 result cannot be had: an operator that numpy and onnx's reference cannot run, or too much work."""


Operator = Callable[[ir.Node, list[Any], int], Any]


def _limit_work(multiply_adds: float) -> None:
    if multiply_adds > MULTIPLY_ADD_LIMIT:
        raise NotExact("too much work for the float64 interpreter")


def _axes(node: ir.Node, inputs: list[Any], default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        axes = tuple(int(axis) for axis in np.asarray(inputs[1]).ravel())
        return axes or default
    attribute = node.attributes.get("axes")
    return (tuple(attribute.as_ints()) or default) if attribute is not None else default


def _reduce(function: Callable[..., Array]) -> Operator:
    def run(node: ir.Node, inputs: list[Any], opset: int) -> Any:
        if inputs[0].dtype.kind != "f" and function in (np.mean, np.sum):
            return None  # numpy's results have other types
        axes = _axes(node, inputs)
        if axes is None and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return inputs[0]
        keep = bool(node.attributes.get_int("keepdims", 1))
        return np.asarray(function(inputs[0], axis=axes, keepdims=keep))

    return run


def _unary(function: Callable[[Array], Array]) -> Operator:
    return lambda node, inputs, opset: function(inputs[0])


def _binary(function: Callable[[Array, Array], Array]) -> Operator:
    return lambda node, inputs, opset: np.asarray(function(inputs[0], inputs[1]))


def _erf(x: Array) -> Array:
    from scipy.special import erf

    return np.asarray(erf(x))


def _gelu(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    x = inputs[0]
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / np.sqrt(2.0)))


def _softmax(node: ir.Node, inputs: list[Any], opset: int, *, log: bool = False) -> Any:
    x = inputs[0]
    if x.size == 0:
        return x
    axis = node.attributes.get_int("axis", -1 if opset >= 13 else 1)
    shape = x.shape
    if opset < 13:
        axis = axis % max(x.ndim, 1)
        x = x.reshape(int(np.prod(shape[:axis])), -1)
        axis = 1
    shifted = x - np.max(x, axis=axis, keepdims=True)
    total = np.sum(np.exp(shifted), axis=axis, keepdims=True)
    return (shifted - np.log(total) if log else np.exp(shifted) / total).reshape(shape)


def _layer_norm(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    x, scale = inputs[0], inputs[1]
    axis = node.attributes.get_int("axis", -1) % x.ndim
    axes = tuple(range(axis, x.ndim))
    mean = x.mean(axis=axes, keepdims=True)
    inverse = 1 / np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + node.attributes.get_float("epsilon", 1e-5))
    y = (x - mean) * inverse * scale
    if len(inputs) > 2 and inputs[2] is not None:
        y = y + inputs[2]
    return [y, mean, inverse]


def _gemm(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if inputs[0].dtype.kind != "f":
        return None
    _limit_work(inputs[0].size * inputs[1].size / max(inputs[1].shape[node.attributes.get_int("transB", 0)], 1))
    a = inputs[0].T if node.attributes.get_int("transA", 0) else inputs[0]
    b = inputs[1].T if node.attributes.get_int("transB", 0) else inputs[1]
    y = node.attributes.get_float("alpha", 1.0) * (a @ b)
    if len(inputs) > 2 and inputs[2] is not None:
        y = y + node.attributes.get_float("beta", 1.0) * inputs[2]
    return y


def _matmul(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    _limit_work(inputs[0].size * (inputs[1].shape[-1] if inputs[1].ndim > 1 else 1))
    return np.asarray(inputs[0] @ inputs[1])


def _conv(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    """Convolution of any rank by one product a kernel position: slices of the padded input times that tap's weights."""
    x, w = inputs[0], inputs[1]
    spatial = x.ndim - 2
    attributes = node.attributes
    group = attributes.get_int("group", 1)
    strides = attributes.get_ints("strides", (1,) * spatial)
    dilations = attributes.get_ints("dilations", (1,) * spatial)
    kernel = w.shape[2:]
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, stride, reach in zip(x.shape[2:], strides, span, strict=True):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            before.append(small if mode == "SAME_UPPER" else large)
            after.append(large if mode == "SAME_UPPER" else small)
    elif mode == "VALID":
        before, after = [0] * spatial, [0] * spatial
    else:
        pads = attributes.get_ints("pads", (0,) * (2 * spatial))
        before, after = list(pads[:spatial]), list(pads[spatial:])
    x = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    sizes = [(n - reach) // s + 1 for n, reach, s in zip(x.shape[2:], span, strides, strict=True)]
    batch, channels, filters = x.shape[0], x.shape[1] // group, w.shape[0] // group
    _limit_work(float(np.prod(w.shape)) * float(np.prod(sizes)) * batch)
    y = np.zeros((batch, group, filters, int(np.prod(sizes))))
    taps = w.reshape(group, filters, channels, *kernel)
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, sizes, strides, strict=True)
        )
        piece = x[(slice(None), slice(None), *window)].reshape(batch, group, channels, -1)
        y += np.matmul(taps[(slice(None), slice(None), slice(None), *tap)], piece)
    y = y.reshape(batch, group * filters, *sizes)
    if len(inputs) > 2 and inputs[2] is not None:
        y = y + inputs[2].reshape(1, -1, *(1,) * spatial)
    return y


def _batch_norm(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if node.attributes.get_int("training_mode", 0) or len([v for v in node.outputs if v.uses()]) > 1:
        return None
    x, scale, bias, mean, variance = inputs
    shape = (1, -1, *(1,) * (x.ndim - 2))
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def _cast(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    to = ir.DataType(node.attributes["to"].as_int())
    x = inputs[0]
    if to.is_floating_point():
        # Exact arithmetic has one float type: rounding to a narrower one is what the original does wrong, if anything.
        return x.astype(np.float64) if x.dtype.kind in "fiub" else None
    if to is ir.DataType.STRING or x.dtype.kind not in "fiub":
        return None
    return x.astype(to.numpy())


def _divide(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    a, b = inputs
    if a.dtype.kind == "f":
        return a / b
    quotient = np.floor_divide(np.abs(a), np.abs(b))
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _along(value: Array, x: Array, axis: int) -> Array:
    """A scale or zero point, one for the tensor or one for each index along an axis, ready to broadcast."""
    return (
        value if value.ndim == 0 or value.size == 1 else value.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    )


def _quantise(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if opset >= 19:
        return None  # onnx's reference knows the newer ones alone
    x, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.array(0, np.uint8)
    axis = node.attributes.get_int("axis", 1) % max(x.ndim, 1)
    limits = np.iinfo(zero.dtype)
    shifted = np.rint(x / _along(scale, x, axis)) + _along(zero.astype(np.float64), x, axis)
    return np.clip(shifted, limits.min, limits.max).astype(zero.dtype)


def _dequantise(node: ir.Node, inputs: list[Any], opset: int) -> Any:
    if opset >= 19:
        return None
    x, scale = inputs[0].astype(np.float64), inputs[1]
    axis = node.attributes.get_int("axis", 1) % max(x.ndim, 1)
    if len(inputs) > 2 and inputs[2] is not None:
        x = x - _along(inputs[2].astype(np.float64), x, axis)
    return x * _along(scale, x, axis)


def _variadic(function: Callable[[Array, Array], Array]) -> Operator:
    def run(node: ir.Node, inputs: list[Any], opset: int) -> Any:
        total = inputs[0]
        for other in inputs[1:]:
            total = function(total, other)
        return np.asarray(total)

    return run


OPERATORS: dict[str, Operator] = {
    "Identity": lambda node, inputs, opset: inputs[0],
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _divide,
    "Pow": lambda node, inputs, opset: np.power(inputs[0], inputs[1]) if inputs[0].dtype.kind == "f" else None,
    "Equal": _binary(np.equal),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Not": _unary(np.logical_not),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Sqrt": _unary(np.sqrt),
    "Exp": _unary(np.exp),
    "Log": _unary(np.log),
    "Sin": _unary(np.sin),
    "Cos": _unary(np.cos),
    "Tanh": _unary(np.tanh),
    "Erf": _unary(_erf),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Reciprocal": _unary(lambda x: 1.0 / x),
    "Sigmoid": _unary(lambda x: 1 / (1 + np.exp(-x))),
    "Relu": _unary(lambda x: np.maximum(x, 0)),
    "Sum": _variadic(np.add),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Where": lambda node, inputs, opset: np.where(inputs[0], inputs[1], inputs[2]),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": lambda node, inputs, opset: _softmax(node, inputs, opset, log=True),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Cast": _cast,
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
    "CastLike": lambda node, inputs, opset: (
        inputs[0] if inputs[0].dtype.kind == "f" and inputs[1].dtype.kind == "f" else None
    ),
    "Shape": lambda node, inputs, opset: np.array(
        inputs[0].shape[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", None))],
        np.int64,
    ),
    "Transpose": lambda node, inputs, opset: np.transpose(
        inputs[0], node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    ),
    "Concat": lambda node, inputs, opset: np.concatenate(inputs, node.attributes.get_int("axis", 1)),
    "Gather": lambda node, inputs, opset: np.take(inputs[0], inputs[1], node.attributes.get_int("axis", 0)),
    "Unsqueeze": lambda node, inputs, opset: np.expand_dims(inputs[0], tuple(_axes(node, inputs) or ())),
    "Squeeze": lambda node, inputs, opset: np.squeeze(inputs[0], _axes(node, inputs)),
    "Expand": lambda node, inputs, opset: (
        inputs[0] * np.ones([int(n) for n in inputs[1]], inputs[0].dtype) if inputs[0].dtype.kind in "fiu" else None
    ),
}
