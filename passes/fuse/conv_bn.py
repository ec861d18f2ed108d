"""A convolution and the per-channel affine map after it as one convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import (
    FLOATS,
    LAZY_BYTES,
    float_attribute,
    int_attribute,
    made_by,
    rank_of,
    used_once,
)
from graphopt.numerics.affine import (
    Float64,
    all_finite,
    batch_norm_affine,
    fold_bias,
    scale_axis,
    scale_transposed_conv,
)
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage

# A channel's parameters are small whatever the model; anything bigger is no channel parameter.
_CHANNELS = 1 << 20
# Folded weights of float32 computed when the file is saved cannot be looked at now: scales within these bounds keep
# any weight that training leaves finite and normal.
_SAFE_SCALE = (1e-12, 1e12)


@dataclass(frozen=True)
class _Linear:
    """A linear operator whose output channels can be scaled by scaling its weight.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: Its constant weight.
        channels: Number of output channels.
        axis: The weight's axis that counts output channels (not used by ConvTranspose).
        rank: Number of axes of the output.
        groups: Of a ConvTranspose; else 1.
        bias: The bias as it is added (beta applied), [channels] or None.
    """

    node: ir.Node
    weight: ir.TensorProtocol
    channels: int
    axis: int
    rank: int
    groups: int
    bias: np.ndarray | None


class FuseConvBn(RulePass):
    """Puts BatchNormalization, or a Mul or Add of one number a channel, into the weights of the node before it."""

    name = "fuse-conv-bn"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="Conv, ConvTranspose, and Gemm or MatMul of matrices, with constant weights, followed by "
        "BatchNormalization at inference or by Mul, Add, Sub, Div with one constant a channel",
        refuses="an output that something else reads; training mode; weights or parameters that are computed or that "
        "a caller may override; a constant that adds axes or varies over positions; folded weights that are "
        "not finite",
        costs="linear in the nodes; saves one pass over the data. New weights are computed in float64 and rounded "
        "once, big ones when the file is saved",
        source="Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167, section 3.1",
    )
    roots = ("BatchNormalization", "Mul", "Add", "Sub", "Div")

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        if node.op_type == "BatchNormalization":
            before = node.inputs[0]
            source = made_by(before, "Conv", "ConvTranspose", "Gemm", "MatMul")
        else:
            before, source = _linear_operand(node)
        if before is None or source is None:
            return False
        if not used_once(before):
            ctx.refuse(node, f"the output of {source.op_type} is read elsewhere")
            return False
        if source.graph is not node.graph:
            ctx.refuse(node, f"{source.op_type} stands outside the body: a loop must not repeat it")
            return False
        linear = _linear(source)
        if isinstance(linear, str):
            ctx.refuse(node, linear)
            return False
        if node.op_type == "BatchNormalization":
            affine = _batch_norm(node, linear, ctx.opset)
        else:
            affine = _channel_affine(node, before, linear)
        if isinstance(affine, str):
            ctx.refuse(node, affine)
            return False
        return self._fold(node, linear, *affine, ctx)

    def _fold(self, node: ir.Node, linear: _Linear, scale: Float64, shift: Float64, ctx: Context) -> bool:
        source = linear.node
        dtype = linear.weight.dtype
        bias = fold_bias(linear.bias, scale, shift, dtype.numpy())
        if not all_finite(scale, shift, bias):
            ctx.refuse(node, "the folded bias is not finite")
            return False
        weight = source.inputs[1]
        assert weight is not None
        if bool((scale != 1.0).any()):
            tensor = _scaled_weight(linear, scale)
            if tensor is None:
                ctx.refuse(node, "the folded weight is not finite")
                return False
            weight = ctx.constant(tensor, f"{weight.name or 'weight'}_folded")
        attributes = {a.name: a for a in source.attributes.values() if a.name != "beta"}
        inputs = [source.inputs[0], weight, ctx.constant(bias, f"{source.name or 'bias'}_bias_folded")]
        op_type = "Gemm" if source.op_type == "MatMul" else source.op_type
        new = ctx.node(op_type, inputs, like=node.outputs[0])
        for attribute in attributes.values():
            new.attributes[attribute.name] = ir.Attr(attribute.name, attribute.type, attribute.value)
        # One node for two, of the same sizes: never dearer.
        rule = f"{source.op_type}-{node.op_type}".lower()
        return ctx.replace({node.outputs[0]: new.outputs[0]}, [new], rule=rule, certain=True)


def _linear_operand(node: ir.Node) -> tuple[ir.Value | None, ir.Node | None]:
    """Of a Mul, Add, Sub or Div with a constant: the other operand, and the convolution that makes it.

    Gemm and MatMul with a constant after them are the business of fuse-matmul-add.
    """
    left, right = node.inputs
    if graphs.is_constant(right):
        return left, made_by(left, "Conv", "ConvTranspose")
    if graphs.is_constant(left) and node.op_type in ("Mul", "Add"):
        return right, made_by(right, "Conv", "ConvTranspose")
    return None, None


def _linear(node: ir.Node) -> _Linear | str:
    """What is to be known of a linear operator, or why it cannot be folded into."""
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return f"attributes of {node.op_type} depend on the function's caller"
    weight = graphs.constant_tensor(node.inputs[1])
    if weight is None:
        return f"the weight of {node.op_type} is not constant"
    if weight.dtype not in FLOATS:
        return f"a weight of {weight.dtype.name.lower()}"
    shape = [int(axis) for axis in weight.shape.numpy()]
    groups, axis = 1, 0
    rank = len(shape)
    beta = 1.0
    if node.op_type == "Conv":
        channels = shape[0]
    elif node.op_type == "ConvTranspose":
        groups = int_attribute(node, "group", 1) or 1
        channels = shape[1] * groups
        axis = 1
    else:
        if rank_of(node.inputs[0]) != 2 or rank != 2:
            return f"{node.op_type} of more than two axes: its channels are not on axis 1"
        axis = 0 if node.op_type == "Gemm" and int_attribute(node, "transB", 0) else 1
        channels = shape[axis]
        if shape[1 - axis] == 0:
            return "the inner axis is empty"
        beta = float_attribute(node, "beta", 1.0) or 0.0
    present = node.inputs[2] if len(node.inputs) > 2 else None
    bias = None
    if present is not None:
        bias = graphs.constant_array(present, limit=_CHANNELS)
        if bias is None:
            return f"the bias of {node.op_type} is not constant"
        if bias.size not in (1, channels) or bias.shape[-1:] not in ((), (1,), (channels,)):
            return f"a bias of shape {list(bias.shape)} for {channels} channels"
        bias = np.broadcast_to(bias.reshape(-1).astype(np.float64) * beta, (channels,))
    if channels == 0:
        return "no channels"
    return _Linear(node, weight, channels, axis, rank, groups, bias)


def _batch_norm(node: ir.Node, linear: _Linear, opset: int) -> tuple[Float64, Float64] | str:
    """Scale and shift of a BatchNormalization at inference, or why it has none."""
    if int_attribute(node, "training_mode", 0) != 0:
        return "BatchNormalization in training mode"
    if opset < 7 and int_attribute(node, "is_test", 0) != 1:
        return "BatchNormalization in training mode"
    if int_attribute(node, "spatial", 1) != 1:
        return "BatchNormalization with statistics for each position"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "the running statistics of BatchNormalization are read"
    epsilon = float_attribute(node, "epsilon", 1e-5)
    if epsilon is None:
        return "epsilon depends on the function's caller"
    arrays = [graphs.constant_array(value, limit=_CHANNELS) for value in node.inputs[1:5]]
    parameters = [a for a in arrays if a is not None and a.shape == (linear.channels,)]
    if len(parameters) != 4:
        return "parameters of BatchNormalization are not constants of one number a channel"
    gamma, beta, mean, variance = parameters
    scale, shift = batch_norm_affine(gamma, beta, mean, variance, epsilon)
    if not all_finite(scale, shift):
        return "scale or shift of BatchNormalization is not finite"
    return scale, shift


def _channel_affine(node: ir.Node, before: ir.Value, linear: _Linear) -> tuple[Float64, Float64] | str:
    """Scale and shift of Mul, Add, Sub or Div with a constant, or why it has none."""
    constant = node.inputs[1] if node.inputs[0] is before else node.inputs[0]
    array = graphs.constant_array(constant, limit=_CHANNELS)
    if array is None:
        return "too big for one number a channel"
    # Aligned at the right: axis 1 of the output is the channel's, all others must be of size one.
    shape = (1,) * (linear.rank - array.ndim) + array.shape
    if len(shape) != linear.rank or any(n != 1 for i, n in enumerate(shape) if i != 1):
        return f"a constant of shape {list(array.shape)} is not one number a channel"
    if shape[1] not in (1, linear.channels):
        return f"{shape[1]} numbers for {linear.channels} channels"
    numbers: Float64 = np.broadcast_to(array.reshape(-1).astype(np.float64), (linear.channels,))
    one, zero = np.ones(linear.channels), np.zeros(linear.channels)
    with np.errstate(all="ignore"):
        scale, shift = {
            "Mul": (numbers, zero),
            "Div": (1.0 / numbers, zero),
            "Add": (one, numbers),
            "Sub": (one, -numbers),
        }[node.op_type]
    return (scale, shift) if all_finite(scale, shift) else "the constant is not finite, or divides by zero"


def _scaled_weight(linear: _Linear, scale: Float64) -> ir.TensorProtocol | None:
    """The weight with its channels scaled; computed now where it is small or might overflow. None: not finite."""
    weight = linear.weight

    def compute() -> np.ndarray:
        if linear.node.op_type == "ConvTranspose":
            return scale_transposed_conv(weight.numpy(), scale, linear.groups)
        return scale_axis(weight.numpy(), scale, linear.axis)

    magnitudes = np.abs(scale[scale != 0])
    safe = weight.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and (
        magnitudes.size == 0 or (_SAFE_SCALE[0] <= magnitudes.min() and magnitudes.max() <= _SAFE_SCALE[1])
    )
    if safe and weight.nbytes > LAZY_BYTES:
        return ir.LazyTensor(
            partial(_tensor, compute), dtype=weight.dtype, shape=ir.Shape(weight.shape.numpy()), cache=False
        )
    array = compute()
    return ir.tensor(array, dtype=weight.dtype) if all_finite(array) else None


def _tensor(compute: Callable[[], np.ndarray]) -> ir.TensorProtocol:
    return ir.tensor(compute())
