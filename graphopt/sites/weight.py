"""A constant as a product reads it: the initializer, and what stands between the two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs, weights
from graphopt.evaluate import Operation
from graphopt.evaluate.by_numpy import evaluate
from graphopt.matching import FLOATS, sizes_of

Array = npt.NDArray[Any]

_RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_BETWEEN = frozenset({"Identity", "Cast", "Transpose", "DequantizeLinear"}) | _RESHAPING
_DEEPEST = 16
_ANY = ir.DataType.INT8  # DequantizeLinear's result does not depend on the type of its codes


@dataclass(frozen=True)
class Weight:
    """A constant behind any number of Identity, Cast, Transpose, Reshape, Squeeze, Unsqueeze and DequantizeLinear.

    Attributes:
        value: As the product reads it.
        root: The initializer, or the output of a Constant node, that it comes from.
        through: The nodes between, from the root on.
        shape: Of ``value``.
        dtype: Of ``value``.
        tensor: What is stored. It can still be read when the graph has let go of it.
    """

    value: ir.Value
    root: ir.Value
    through: tuple[ir.Node, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    tensor: ir.TensorProtocol

    @property
    def quantised(self) -> bool:
        """Whether the numbers are stored as integer codes."""
        return any(node.op_type == "DequantizeLinear" for node in self.through)

    @property
    def shared(self) -> bool:
        """Whether anything else reads the constant too, or a caller gets it."""
        chain = [self.root, *(node.outputs[0] for node in self.through)]
        return any(len(value.uses()) > 1 or value.is_graph_output() for value in chain)

    def parts(self) -> list[object]:
        """What the numbers follow from, for a digest: the stored tensor, and what is done to it on the way."""
        found: list[object] = [self.tensor]
        for node in self.through:
            found.append((node.op_type, sorted((name, str(a.value)) for name, a in node.attributes.items())))
            found.extend(graphs.constant_tensor(value) for value in node.inputs[1:])
        return found

    @property
    def way(self) -> tuple[object, ...]:
        """What is done to the constant before it is read; equal for two that read the same numbers of one constant."""
        return tuple(
            (node.op_type, *sorted((name, str(a.value)) for name, a in node.attributes.items()), *node.inputs[1:])
            for node in self.through
        )

    def readers(self) -> int:
        """How many nodes read the constant, as it is or through what stands between."""
        chain = [self.root, *(node.outputs[0] for node in self.through)]
        return sum(use.node not in self.through for value in chain for use in value.uses())

    def read(self, opset: int) -> Array:
        """The numbers as the product reads them, in the dtype of ``value``. An array of the caller's own.

        Args:
            opset: Of the model.

        Raises:
            GraphoptError: The data file cannot be read.
        """
        array = weights.read(self.tensor)
        for node in self.through:
            array = _dequantised(node, array) if node.op_type == "DequantizeLinear" else _passed(node, array, opset)
        return array


def weight_of(value: ir.Value | None) -> Weight | None:
    """The weight that a value is, or None where it is not the same floating-point constant in every run."""
    through: list[ir.Node] = []
    root = value
    while root is not None and not graphs.is_constant(root):
        node = root.producer()
        if node is None or node.domain != "" or node.op_type not in _BETWEEN or len(through) == _DEEPEST:
            return None
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return None
        if any(v is not None and not graphs.is_constant(v) for v in node.inputs[1:]):
            return None
        through.append(node)
        root = node.inputs[0]
    if value is None or root is None:
        return None
    tensor = graphs.constant_tensor(root)
    if tensor is None:
        return None
    shape = tuple(tensor.shape.numpy())
    dtype = tensor.dtype
    for node in reversed(through):
        following = _shape_behind(node, shape)
        if following is None:
            return None
        shape, dtype = following, _dtype_behind(node, dtype)
        if dtype not in FLOATS and node.op_type in ("Cast", "DequantizeLinear"):
            return None
    if dtype not in FLOATS:
        return None
    return Weight(value, root, tuple(reversed(through)), shape, dtype, tensor)


def _shape_behind(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        order = tuple(reversed(range(len(shape)))) if perm is None else tuple(perm.as_ints())
        return tuple(shape[axis] for axis in order) if sorted(order) == list(range(len(shape))) else None
    if node.op_type in _RESHAPING:
        known = sizes_of(node.outputs[0])
        return known if known is not None and math.prod(known) == math.prod(shape) else None
    if node.op_type == "DequantizeLinear":
        return shape if _is_understood(node, shape) else None
    return shape


def _is_understood(node: ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether a scale is one number, one for each index of an axis, or one for each ``block_size`` of them."""
    scale = graphs.constant_tensor(node.inputs[1])
    zero = graphs.constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (zero is not None and tuple(zero.shape.numpy()) != tuple(scale.shape.numpy())):
        return False
    told, block = tuple(scale.shape.numpy()), node.attributes.get_int("block_size", 0)
    if math.prod(told) == 1 and not block:
        return True
    axis = node.attributes.get_int("axis", 1)
    if not -len(shape) <= axis < len(shape):
        return False
    axis %= len(shape)
    if not block:
        return told == (shape[axis],)
    return told == tuple(-(-size // block) if i == axis else size for i, size in enumerate(shape))


def _dtype_behind(node: ir.Node, dtype: ir.DataType) -> ir.DataType:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "DequantizeLinear":
        wanted = node.attributes.get_int("output_dtype", 0)  # 0: that of the scale
        scale = graphs.constant_tensor(node.inputs[1])
        assert scale is not None  # _is_understood
        return ir.DataType(wanted) if wanted else scale.dtype
    return dtype


def _passed(node: ir.Node, array: Array, opset: int) -> Array:
    if node.op_type in _RESHAPING:
        shape = sizes_of(node.outputs[0])
        assert shape is not None  # weight_of saw it
        return array.reshape(shape)
    if node.op_type == "Cast":
        return array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    made = evaluate(Operation.of(node, opset), [array, *[None] * (len(node.inputs) - 1)])
    assert made is not None  # Identity and Transpose are defined to the bit
    return made[0]


def _dequantised(node: ir.Node, codes: Array) -> Array:
    """(codes - zero point) * scale: one scale, one for each index of an axis, or one for each block along it."""
    scale = graphs.constant_array(node.inputs[1])
    zero = graphs.constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    assert scale is not None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)

    def spread(parameter: Array) -> Array:
        if block:
            return np.repeat(parameter, block, axis).take(range(codes.shape[axis]), axis)
        if parameter.size == 1:
            return parameter.reshape(())
        return parameter.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])

    centred = codes.astype(np.float32) - (0 if zero is None else spread(zero.astype(np.float32)))
    return np.asarray((centred * spread(scale.astype(np.float32))).astype(_dtype_behind(node, _ANY).numpy()))
