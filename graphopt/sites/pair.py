"""Two products in a row with nothing but constants between: y = U (s * (V x) + c) + b, a matrix of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import int_attribute, rank_of
from graphopt.sites.linear import ROOTS, Linear, Spelling, is_channel_vector, linear_at
from graphopt.sites.weight import weight_of

Array = npt.NDArray[Any]

_DEEPEST = 8


@dataclass(frozen=True)
class Step:
    """A node between two products that scales or shifts each channel by a constant.

    Attributes:
        node: Mul, Div, Add, Sub, or Identity and Dropout, which do nothing.
        constant: The operand that is no activation; None of a node that does nothing.
    """

    node: ir.Node
    constant: ir.Value | None


@dataclass(frozen=True)
class Pair:
    """A product of two factors.

    Attributes:
        first: V, of ``rank`` outputs.
        second: U, of ``rank`` inputs.
        steps: What stands between, in the order of the data.
        scale: s of s * (V x) + c, float64 (rank,); None: 1.
        shift: c, likewise; None: 0.
    """

    first: Linear
    second: Linear
    steps: tuple[Step, ...]
    scale: Array | None
    shift: Array | None

    @property
    def x(self) -> ir.Value:
        """What the pair multiplies."""
        return self.first.x

    @property
    def y(self) -> ir.Value:
        """Its result."""
        return self.second.y

    @property
    def rank(self) -> int:
        """The size of the axis between the factors."""
        return self.first.outputs

    @property
    def elements(self) -> int:
        """Weights of both factors."""
        return self.first.elements + self.second.elements

    @property
    def dtype(self) -> ir.DataType:
        """Of the weights."""
        return self.second.weight.dtype

    @property
    def quantised(self) -> bool:
        """Whether a factor is stored as integer codes."""
        return self.first.weight.quantised or self.second.weight.quantised

    def factors(self, opset: int) -> tuple[Array, Array]:
        """U with the scale in it, (outputs, rank[, *kernel]), and V, (rank, inputs[, *kernel]); float64 where scaled.

        Raises:
            GraphoptError: A data file cannot be read.
        """
        left, right = self.second.matrix(opset), self.first.matrix(opset)
        if self.scale is not None:
            left = left.astype(np.float64) * self.scale.reshape(1, -1, *[1] * (left.ndim - 2))
        return left, right

    def nodes(self) -> tuple[ir.Node, ...]:
        """Both products and what stands between, in the order of the data."""
        return (self.first.node, *(step.node for step in self.steps), self.second.node)


def pairs(model: ir.Model) -> Iterator[Pair | tuple[ir.Node, str]]:
    """Every pair of factors in a model, in the order of the second product; look-alikes with why they are none."""
    for node in graphs.all_nodes(model):
        if node.op_type in ROOTS or node.op_type == "FusedMatMul":
            found = pair_at(node)
            if isinstance(found, Pair):
                yield found
            elif found:
                yield node, found


def pair_at(node: ir.Node) -> Pair | str:
    """The pair whose second product a node is, or why there is none ("" where it does not look like one)."""
    second = linear_at(node)
    if isinstance(second, str) or second.spelling is Spelling.GATHER:
        return ""
    found = _first_product(second)
    if isinstance(found, str):
        return found
    first, steps = found
    if first.node.graph is not node.graph:
        return "the first product is computed outside the body: a loop must not repeat it"
    if second.inputs != first.outputs or second.x_axis != first.y_axis or second.x_axis == -2 != second.y_axis:
        return "the products are taken along different axes"
    if (first.spelling is Spelling.CONV) != (second.spelling is Spelling.CONV):
        return "one product is a convolution and the other is none"
    if any(one and other for one, other in zip(first.spatial, _beside(second), strict=True)):
        return "both convolutions look beside a position of one axis: together they see more of it"
    shifts = first.bias is not None or any(step.node.op_type in ("Add", "Sub") for step in steps)
    if second.padded and shifts:
        return "a bias between, which the padding of the second convolution does not see"
    if first.weight.dtype != second.weight.dtype:
        return f"the factors are {first.weight.dtype.name} and {second.weight.dtype.name}"
    return Pair(first, second, steps, *_between(first, steps))


def _first_product(second: Linear) -> tuple[Linear, tuple[Step, ...]] | str:
    steps: list[Step] = []
    value: ir.Value | None = second.x
    shared = False
    for _ in range(_DEEPEST):
        node = None if value is None else value.producer()
        if value is None or node is None or node.outputs[0] is not value:
            return ""
        shared |= value.is_graph_output() or len(value.uses()) > 1
        first = linear_at(node)
        if isinstance(first, Linear):
            return "the value between the products is read elsewhere" if shared else (first, tuple(reversed(steps)))
        step = _step(node, second.inputs, -second_rank(second))
        if step is None:
            return _what_stands_between(node)
        steps.append(step)
        value = _operand(step)
    return ""


def _beside(second: Linear) -> list[bool]:
    """For each spatial axis whether a convolution sees another position than its own, or a padded one.

    One that only steps over positions does not: behind any convolution it makes the step of that one larger.
    """
    pads = _pads(second.node) or (0,) * (2 * len(second.kernel))
    axes = len(second.kernel)
    return [size != 1 or pads[axis] != 0 or pads[axes + axis] != 0 for axis, size in enumerate(second.kernel)]


def _pads(node: ir.Node) -> tuple[int, ...]:
    attribute = node.attributes.get("pads")
    return () if attribute is None else tuple(attribute.as_ints())


def second_rank(second: Linear) -> int:
    """How far from the end the channel axis of what a product reads is: 1 is the last."""
    return len(second.kernel) + 1 if second.spelling is Spelling.CONV else -second.x_axis


def _step(node: ir.Node, channels: int, axis: int) -> Step | None:
    if node.domain != "":
        return None
    if node.op_type == "Identity" or (
        node.op_type == "Dropout" and len(node.inputs) < 3 and _opset_has_inference(node)
    ):
        return Step(node, None)
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    left, right = node.inputs
    if _is_step(right, left, channels, axis):
        return Step(node, right)
    if node.op_type in ("Mul", "Add") and _is_step(left, right, channels, axis):
        return Step(node, left)
    return None


def _is_step(constant: ir.Value | None, other: ir.Value | None, channels: int, axis: int) -> bool:
    """Whether a constant is one number for each channel of ``other``, and adds no axes to it."""
    if not is_channel_vector(constant, channels, axis):
        return False
    weight = weight_of(constant)
    assert weight is not None  # is_channel_vector said so
    axes = len(weight.shape)
    return axes <= max(-axis, rank_of(other) or 0)


def _opset_has_inference(node: ir.Node) -> bool:
    """Whether Dropout without a training flag does nothing: from opset 12 on the flag is an input."""
    return len(node.outputs) == 1 and int_attribute(node, "is_test", 1) == 1


def _operand(step: Step) -> ir.Value | None:
    return next((v for v in step.node.inputs if v is not step.constant), None)


_NONLINEAR = frozenset(
    {
        *("Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "LogSoftmax", "Mish", "PRelu"),
        *("Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu"),
        *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
        *("LpNormalization", "RMSNormalization"),
    }
)
_OTHER = {
    "Add": "what is added between the products is no constant of the channels",
    "Sub": "what is subtracted between the products is no constant of the channels",
    "Mul": "what is multiplied between the products is no constant of the channels",
    "Div": "what is divided between the products is no constant of the channels",
    "Dropout": "Dropout between the products may train",
}


def _what_stands_between(node: ir.Node) -> str:
    """Why a product that reads a node is no second factor; "" where what it reads comes from no product either."""
    if not any(_comes_from_product(value) for value in node.inputs):
        return ""
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Dropout"):
        return _OTHER[node.op_type]
    return f"{node.op_type} stands between the products" if node.op_type in _NONLINEAR else ""


def _comes_from_product(value: ir.Value | None) -> bool:
    """Whether a value is a product with a constant, perhaps with another constant added or multiplied."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("Add", "Mul") and producer.domain == "":
        producer = next((p for v in producer.inputs if v is not None and (p := v.producer()) is not None), None)
    return producer is not None and isinstance(linear_at(producer), Linear)


def _between(first: Linear, steps: tuple[Step, ...]) -> tuple[Array | None, Array | None]:
    """The scale and the shift of the axis between the products; None: there is none."""
    scale: Array | None = None
    shift: Array | None = None
    if first.bias is not None:
        shift = channel_vector(first.bias, first.outputs)
    for step in steps:
        if step.constant is None:
            continue
        vector = channel_vector(step.constant, first.outputs)
        if step.node.op_type in ("Mul", "Div"):
            with np.errstate(all="ignore"):  # what is not finite is refused by those who use it
                factor = vector if step.node.op_type == "Mul" else 1.0 / vector
                scale = factor if scale is None else scale * factor
                shift = None if shift is None else shift * factor
        else:
            term = vector if step.node.op_type == "Add" else -vector
            shift = term if shift is None else shift + term
    return scale, shift


def channel_vector(value: ir.Value, size: int) -> Array:
    """A constant that ``is_channel_vector`` has found, as float64 (size,)."""
    weight = weight_of(value)
    assert weight is not None  # is_channel_vector said so
    array = weight.read(opset=18).astype(np.float64).reshape(-1)
    return np.broadcast_to(array, (size,)) if array.size == 1 else array
