"""One product with a constant matrix, in any of its spellings: y = W x along one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import float_attribute, int_attribute, rank_of
from graphopt.rewrite.context import Context
from graphopt.sites.weight import Weight, weight_of
from graphopt.weights import computed

Array = npt.NDArray[Any]


class Spelling(StrEnum):
    """How a product is written."""

    MATMUL = "matmul"
    """MatMul(x, B): the last axis."""
    LEFT = "left matmul"
    """MatMul(A, x): the last axis but one."""
    GEMM = "gemm"
    """Gemm(x, B, C): the last axis (of x the first with transA)."""
    CONV = "conv"
    """Conv of one group: axis 1."""
    GATHER = "gather"
    """Gather of rows of a table: a product with one-hot vectors, whose channels are the last axis of the result."""


@dataclass(frozen=True)
class Linear:
    """y = W x + b.

    Attributes:
        node: The product.
        spelling: How it is written.
        x: What is multiplied; for a table the indices.
        y: The result of the node.
        weight: The constant operand.
        inputs: Channels of x; for a table its rows.
        outputs: Channels of y.
        kernel: Sizes of a convolution's kernel; () for all others.
        bias: What the node itself adds, a constant of ``outputs`` elements (or one that broadcasts to them), or None.
        plain: New nodes are written without the attributes of ``node``: of a convolution, at one position.
    """

    node: ir.Node
    spelling: Spelling
    x: ir.Value
    y: ir.Value
    weight: Weight
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    bias: ir.Value | None = None
    plain: bool = False

    @property
    def x_axis(self) -> int:
        """The channel axis of ``x``, negative unless it is a convolution's. Of a table's indices there is none: 0."""
        if self.spelling is Spelling.GEMM and not self.plain and int_attribute(self.node, "transA", 0):
            return -2
        return {Spelling.CONV: 1, Spelling.LEFT: -2, Spelling.GATHER: 0}.get(self.spelling, -1)

    @property
    def y_axis(self) -> int:
        """The channel axis of ``y``, negative unless it is a convolution's."""
        return {Spelling.CONV: 1, Spelling.LEFT: -2}.get(self.spelling, -1)

    @property
    def elements(self) -> int:
        """The number of weights."""
        return self.inputs * self.outputs * int(np.prod(self.kernel))

    @property
    def spatial(self) -> tuple[bool, ...]:
        """For each spatial axis of a convolution whether it looks beside a position there, pads it or steps over it."""
        axes = len(self.kernel)
        if self.plain:
            return (False,) * axes
        pads = _ints(self.node, "pads") or (0,) * (2 * axes)
        strides = _ints(self.node, "strides") or (1,) * axes
        return tuple(self.kernel[i] != 1 or strides[i] != 1 or pads[i] != 0 or pads[axes + i] != 0 for i in range(axes))

    @property
    def pointwise(self) -> bool:
        """Whether each position of y depends on the same position of x alone, and on no padding."""
        return not any(self.spatial)

    @property
    def padded(self) -> bool:
        """Whether a convolution sees zeros beyond the edge of x."""
        attribute = self.node.attributes.get("auto_pad")
        automatic = attribute is not None and attribute.as_string().startswith("SAME")
        return any(_ints(self.node, "pads")) or (automatic and not self.pointwise)

    @property
    def reading(self) -> tuple[object, ...]:
        """How the matrix follows from the stored constant: equal for two products of one constant by one matrix."""
        flipped = self.spelling in (Spelling.CONV, Spelling.LEFT) or _flipped(self.node)
        return self.weight.way, self.weight.shape, flipped, float_attribute(self.node, "alpha", 1.0)

    def parts(self) -> list[object]:
        """What ``matrix`` follows from, for a digest; two products of one constant need not have the same matrix."""
        return [*self.weight.parts(), *self.reading[1:]]

    def matrix(self, opset: int) -> Array:
        """W as (outputs, inputs), or (outputs, inputs, *kernel) of a convolution; ``alpha`` of Gemm is in it.

        Raises:
            GraphoptError: The data file cannot be read.
        """
        array = self.weight.read(opset)
        if self.spelling in (Spelling.CONV, Spelling.LEFT):
            return array
        if self.spelling is Spelling.GATHER:
            return array.T
        if self.node.op_type == "MatMul":
            return array.T
        matrix = array if _flipped(self.node) else array.T
        alpha = float_attribute(self.node, "alpha", 1.0)
        if alpha is None or alpha == 1.0:
            return matrix
        return (matrix.astype(np.float64) * alpha).astype(matrix.dtype)

    def constant(self, ctx: Context, name: str, shape: Sequence[int], matrix: Callable[[], Array]) -> ir.Value:
        """A new constant that holds a matrix the way this spelling wants it; computed when it is read, if it is large.

        Args:
            ctx: Makes it.
            name: What to call it.
            shape: Of the matrix: (outputs, inputs[, *kernel]).
            matrix: Computes it, in the dtype of the weight.
        """
        turned = self.spelling in (Spelling.GATHER, Spelling.MATMUL)
        stored = tuple(reversed(shape)) if turned else tuple(shape)

        def compute() -> ir.TensorProtocol:
            array = matrix()
            return ir.tensor(np.ascontiguousarray(array.T if turned else array))

        return ctx.constant(computed(compute, self.weight.dtype, stored), name)

    def apply(
        self, ctx: Context, x: ir.Value, constant: ir.Value, bias: ir.Value | None = None, *, outputs: int | None = None
    ) -> ir.Node:
        """A new node of this spelling. A bias that the spelling cannot add is not taken: only Gemm and Conv have one.

        Args:
            ctx: Makes it.
            x: What it multiplies.
            constant: From ``constant`` of the same spelling.
            bias: Of ``outputs`` elements, or None.
            outputs: Channels of the result, where they are others than those of y.
        """
        like = resized(self.y, self.y_axis, self.outputs if outputs is None else outputs)
        if self.spelling is Spelling.GATHER:
            return ctx.node("Gather", [constant, x], self.node.attributes, like=like)
        if self.spelling is Spelling.LEFT:
            return ctx.node("MatMul", [constant, x], like=like)
        if self.spelling is Spelling.MATMUL:
            return ctx.node("MatMul", [x, constant], like=like)
        biases = [] if bias is None else [bias]
        if self.spelling is Spelling.CONV:
            attributes = {} if self.plain else self.node.attributes
            return ctx.node("Conv", [x, constant, *biases], attributes, like=like)
        flips: dict[str, object] = {"transB": 1}
        if int_attribute(self.node, "transA", 0) and not self.plain:
            flips["transA"] = 1
        return ctx.node("Gemm", [x, constant, *biases], flips, like=like)

    def follower(self) -> Linear:
        """How a product is spelled that comes behind this one and reads each of its positions alone."""
        spelling = Spelling.MATMUL if self.spelling is Spelling.GATHER else self.spelling
        return replace(self, spelling=spelling, kernel=(1,) * len(self.kernel), bias=None, plain=True)


def linear_at(node: ir.Node) -> Linear | str:
    """The product that a node is, or why it is none ("" where it does not look like one).

    The weight may be shared, overridden by nobody, of any floating-point type, and behind what ``weight_of`` sees
    through.
    """
    fused = node.op_type == "FusedMatMul" and node.domain == "com.microsoft"
    recognise = _gemm_like if fused else _RECOGNISERS.get(node.op_type)
    if recognise is None or (node.domain != "" and not fused) or any(a.is_ref() for a in node.attributes.values()):
        return ""
    return recognise(node)


def _matmul(node: ir.Node) -> Linear | str:
    left, right = node.inputs
    if left is None or right is None:
        return ""
    if (weight := weight_of(right)) is not None:
        if weight_of(left) is not None:
            return "both operands are constants"
        if len(weight.shape) != 2:
            return f"the weight has {len(weight.shape)} axes: a product for each batch"
        return Linear(node, Spelling.MATMUL, left, node.outputs[0], weight, *weight.shape)
    if (weight := weight_of(left)) is not None:
        if len(weight.shape) != 2 or (rank_of(right) or 0) < 2:
            return "the constant on the left is no matrix, or the other operand is none"
        outputs, inputs = weight.shape
        return Linear(node, Spelling.LEFT, right, node.outputs[0], weight, inputs, outputs)
    return "both operands are activations"


def _gemm_like(node: ir.Node) -> Linear | str:
    left, right = node.inputs[:2]
    weight = weight_of(right)
    if left is None or weight is None:
        return "the second operand is no constant"
    if weight_of(left) is not None:
        return "both operands are constants"
    if len(weight.shape) != 2:
        return f"the weight has {len(weight.shape)} axes"
    if node.op_type == "FusedMatMul" and (
        int_attribute(node, "transA", 0)
        or int_attribute(node, "transBatchA", 0)
        or int_attribute(node, "transBatchB", 0)
    ):
        return "FusedMatMul transposes its first operand or moves batch axes"
    outputs, inputs = weight.shape if _flipped(node) else weight.shape[::-1]
    spelling = Spelling.GEMM if node.op_type == "Gemm" else Spelling.MATMUL
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if float_attribute(node, "beta", 1.0) != 1.0:
            return "beta scales the bias"
        if not is_channel_vector(bias, outputs, -1):
            return "what Gemm adds is no constant vector of its output channels"
    return Linear(node, spelling, left, node.outputs[0], weight, inputs, outputs, bias=bias)


def _conv(node: ir.Node) -> Linear | str:
    x, weight = node.inputs[0], weight_of(node.inputs[1])
    if x is None or weight is None:
        return "the kernel is no constant"
    if int_attribute(node, "group", 1) != 1:
        return "the convolution has groups"
    outputs, inputs, *kernel = weight.shape
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not is_channel_vector(bias, outputs, -1):
        return "the bias is no constant"
    return Linear(node, Spelling.CONV, x, node.outputs[0], weight, inputs, outputs, tuple(kernel), bias)


def _gather(node: ir.Node) -> Linear | str:
    weight, indices = weight_of(node.inputs[0]), node.inputs[1]
    if weight is None or indices is None or weight_of(indices) is not None:
        return ""
    if len(weight.shape) != 2 or int_attribute(node, "axis", 0) not in (0, -2):
        return "not rows of a table"
    if graphs.constant_tensor(indices) is not None:
        return "the indices are constants"
    rows, channels = weight.shape
    return Linear(node, Spelling.GATHER, indices, node.outputs[0], weight, rows, channels)


_RECOGNISERS: dict[str, Callable[[ir.Node], Linear | str]] = {
    "MatMul": _matmul,
    "Gemm": _gemm_like,
    "Conv": _conv,
    "Gather": _gather,
}
ROOTS = tuple(_RECOGNISERS)
"""The operators that a linear site is made of."""


def is_channel_vector(value: ir.Value | None, channels: int, axis: int) -> bool:
    """Whether a constant, combined with a value, is one number for each index of the value's ``axis``, or one for all.

    Args:
        value: The constant.
        channels: The size of the axis.
        axis: Counted from the end.
    """
    weight = weight_of(value)
    if weight is None:
        return False
    shape = weight.shape
    if all(size == 1 for size in shape):
        return True
    place = len(shape) + axis
    return place >= 0 and shape[place] == channels and all(s == 1 for i, s in enumerate(shape) if i != place)


def _flipped(node: ir.Node) -> bool:
    return bool(int_attribute(node, "transB", 0))


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())


def resized(value: ir.Value, axis: int, size: int) -> ir.Value:
    """A value of the same type whose ``axis`` has another size: a model for a new output."""
    if value.shape is None:
        return ir.Value(type=value.type)
    dims: list[Any] = list(value.shape)
    if -len(dims) <= axis < len(dims):
        dims[axis] = size
    return ir.Value(type=value.type, shape=ir.Shape(dims))
