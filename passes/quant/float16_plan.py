"""Which nodes may compute in float16: those whose numbers stay where float16 holds them well.

float16 ends at 65504 and loses bits below 6e-5. A node stays in float32 where

* its operator accumulates, has a steep range, or is sensitive to its input (``KEPT``);
* it reads a constant that float16 cannot hold, or a scalar so small that it would lose its meaning (the 1e-12 in
  ``x / sqrt(variance + 1e-12)``);
* it reads a value that may lie outside that range: the results of the above spread through elementwise operators,
  until one brings them back (a division by them, Softmax, Tanh, ...). So a decomposed LayerNormalization computes its
  variance in float32, x^3 in a Gelu goes no further than its Tanh, and a mask of -3.4e38 stays exact up to Softmax;
* it computes an index or an angle: what flows into a Cast to integers, into Sin and Cos or into NonMaxSuppression;
* its operator takes no float16 in this opset, belongs to another domain, or calls a function.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.numerics import half
from graphopt.weights import read

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ACCUMULATING = _names(
    """ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceProd ReduceLogSum ReduceLogSumExp CumSum CumProd
    GlobalAveragePool GlobalLpPool LpPool LpNormalization InstanceNormalization BatchNormalization
    MeanVarianceNormalization LRN LSTM GRU RNN DFT STFT"""
)
STEEP = _names("Exp Log Pow Reciprocal Softplus Tan Sinh Cosh Asinh Acosh Atanh Celu Det")
SENSITIVE = _names("Sin Cos Range GridSample AffineGrid RoiAlign NonMaxSuppression Mod CastLike Bernoulli Multinomial")
KEPT = ACCUMULATING | STEEP | SENSITIVE
"""Operators that compute in float32 whatever they read."""
EITHER = _names("Cast Shape Size")
"""Operators that read float16 and float32 alike and give neither, or say themselves what they give."""

# Attributes that name a data type: the node says itself what it gives.
_TYPED = _names("dtype output_dtype output_datatype")
_MOVES = _names(
    """Reshape Transpose Unsqueeze Squeeze Flatten Slice Identity Expand Tile Gather GatherND GatherElements Split
    Concat DepthToSpace SpaceToDepth"""
)
# Results as large or as small as what they read.
_PASSING = _MOVES | _names(
    """Add Sub Neg Abs Max Min Sum Mean Where Relu LeakyRelu PRelu Elu Selu Pad Cast Sqrt MaxPool AveragePool Ceil
    Floor Round Trilu ScatterND ScatterElements Resize Dropout ReduceMax ReduceMin ReduceMean"""
)
_GROWING = _names("Exp Pow ReduceSum ReduceSumSquare ReduceProd ReduceL1 ReduceL2 CumSum CumProd")
# Read backwards from an index or an angle, through what computes one number from another.
_ARITHMETIC = _MOVES | _names("Add Sub Mul Div Neg Abs Floor Ceil Round Cast Clip Min Max Log Where")
_INDEXING = _names("Sin Cos NonMaxSuppression")


class Range(enum.IntEnum):
    """Where the numbers of a value lie."""

    SAFE = 0
    WIDE = 1
    """Perhaps beyond float16, or so small that they matter."""
    INVERSE = 2
    """One over something that may be small: a product with it is safe again."""


class Plan:
    """The nodes of a model that compute in float16.

    Args:
        model: With types filled in as far as they can be inferred.
        opset: Its opset.
        keep: Operators that stay in float32 besides ``KEPT``.
        refuse: Told of a node that stays in float32 because of its constants, and why.
    """

    def __init__(
        self, model: ir.Model, opset: int, keep: Collection[str], refuse: Callable[[ir.Node, str], None]
    ) -> None:
        self._opset = opset
        self._keep = KEPT | frozenset(keep)
        self._refuse = refuse
        self._ranges: dict[ir.Value, Range] = {}
        self._beyond: dict[ir.Value, float | None] = {}
        """Constants -> a number in them that float16 cannot hold."""
        self.halves: set[ir.Node] = set()
        self._walk(model.graph)
        self.halves -= _exact_ancestors(model)
        self._follow_consumers(model)

    def _walk(self, graph: ir.Graph) -> None:
        for node in graph:
            if graphs.has_subgraphs(node):
                bodies = list(graphs.subgraphs(node))
                for body in bodies:
                    self._walk(body)
                worst = max((self._range(v) for body in bodies for v in body.outputs), default=Range.SAFE)
                self._set(node, min(worst, Range.WIDE))
            elif node.op_type != "Constant":
                self._judge(node)

    def _judge(self, node: ir.Node) -> None:
        out_of_range = self._odd_constants(node)
        ranges = [self._range(v) for v in node.inputs if v is not None]
        self._set(node, _result(node, ranges, out_of_range))
        if (
            self._is_convertible(node)
            and node.op_type not in self._keep
            and not out_of_range
            and max(ranges, default=Range.SAFE) is Range.SAFE
        ):
            self.halves.add(node)

    def _is_convertible(self, node: ir.Node) -> bool:
        """Whether the operator can take and give float16 where it has float32 now."""
        if node.domain != "" or node.op_type in EITHER or any(name in _TYPED for name in node.attributes):
            return False
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and (v.producer() is not node or v.name)]
        if not all(isinstance(v.type, ir.TensorType) for v in values):
            return False
        stash = node.attributes.get("stash_type")
        if stash is not None and (stash.is_ref() or stash.as_int() != FLOAT):
            return False
        signature = signature_of(node, self._opset)
        if signature is None:
            return False
        inputs, outputs = signature
        read = [port for value, port in zip(node.inputs, inputs, strict=True) if _is_float(value)]
        given = [port for value, port in zip(node.outputs, outputs, strict=True) if _is_float(value)]
        # An output that no float32 input gives its type to is float32 for another reason (ConstantOfShape).
        followed = {port.type_name for port in read if port.takes_half}
        if node.op_type == "DequantizeLinear":
            followed.update(port.type_name for port in outputs)  # the type of the scale
        return (
            any(port.takes_half for port in read)
            and all(port.takes_half or port.only_float for port in read)
            and all(port.takes_half and port.type_name in followed for port in given)
        )

    def _odd_constants(self, node: ir.Node) -> bool:
        """Whether a node reads a constant that float16 cannot hold, or a small scalar that matters."""
        if node.domain != "" or node.op_type in EITHER:
            return False
        for index, value in enumerate(node.inputs):
            if value is None or not _is_float(value) or not graphs.is_constant(value):
                continue
            if value not in self._beyond:
                self._beyond[value] = half.beyond_half(_array(value))
            beyond = self._beyond[value]
            if beyond is not None:
                self._refuse(node, f"stays float32: {value.name} holds {beyond:g}, float16 ends at {half.HALF_MAX:g}")
                return True
            is_scale = node.op_type in ("QuantizeLinear", "DequantizeLinear") and index == 1
            tensor = graphs.constant_tensor(value)
            if is_scale or (tensor is not None and tensor.size == 1):
                below = half.below_half(_array(value))
                if below is not None:
                    self._refuse(node, f"stays float32: {value.name} holds {below:g}, too small for float16")
                    return True
        return False

    def _range(self, value: ir.Value) -> Range:
        return self._ranges.get(value, Range.SAFE)

    def _set(self, node: ir.Node, found: Range) -> None:
        if found is not Range.SAFE:
            self._ranges.update((value, found) for value in node.outputs)

    def _follow_consumers(self, model: ir.Model) -> None:
        """Let what only moves numbers stay in float32 where everybody who reads it does: that saves Casts."""
        for graph in graphs.all_graphs(model):
            for node in reversed(graph):
                if node not in self.halves or node.op_type not in _MOVES or graphs.is_constant(node.inputs[0]):
                    continue
                readers = [use.node for value in node.outputs for use in value.uses()]
                if not any(reader in self.halves or reader.op_type == "Cast" for reader in readers):
                    self.halves.discard(node)


def _result(node: ir.Node, ranges: list[Range], odd_constant: bool) -> Range:
    """Where the results of a node lie, from where its operands do."""
    op = node.op_type
    worst = max(ranges, default=Range.SAFE)
    if node.domain != "":
        return Range.SAFE
    if op == "Cast":
        source = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
        narrow = source in (FLOAT, HALF, ir.DataType.BFLOAT16, ir.DataType.BOOL)
        return worst if narrow else Range.WIDE
    if op == "Reciprocal":
        return Range.INVERSE
    if op == "Div":
        return Range.INVERSE if graphs.is_constant(node.inputs[0]) else Range.SAFE
    if op == "Mul":
        if Range.INVERSE in ranges:
            return Range.SAFE
        return Range.WIDE if worst or odd_constant else Range.SAFE
    if op == "Pow":
        exponent = graphs.scalar_of(node.inputs[1])
        if exponent is not None and exponent < 0:
            return Range.INVERSE
    if op in _GROWING:
        return Range.WIDE
    if op == "Clip":
        return Range.WIDE if odd_constant else Range.SAFE
    if op in _PASSING:
        return max(worst, Range.WIDE) if odd_constant else worst
    return Range.SAFE


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is FLOAT and isinstance(value.type, ir.TensorType)


def _array(value: ir.Value) -> npt.NDArray[Any]:
    tensor = graphs.constant_tensor(value)
    assert tensor is not None
    return read(tensor)


@dataclass(frozen=True)
class Port:
    """An input or output of an operator.

    Attributes:
        type_name: The type variable that its schema gives it, or its type.
        takes_half: Whether it can be float16.
        only_float: Whether it is float32 and nothing else.
    """

    type_name: str
    takes_half: bool
    only_float: bool


def signature_of(node: ir.Node, opset: int) -> tuple[list[Port], list[Port]] | None:
    """The inputs and outputs of a standard node, as many as it has; None where the opset has no such operator."""
    formal = _formal(node.op_type, opset)
    if formal is None:
        return None
    return _fit(formal[0], len(node.inputs)), _fit(formal[1], len(node.outputs))


@cache
def _formal(op_type: str, opset: int) -> tuple[list[Port], list[Port]] | None:
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    constraints = {c.type_param_str: list(c.allowed_type_strs) for c in schema.type_constraints}

    def port(formal: onnx.defs.OpSchema.FormalParameter) -> Port:
        allowed = constraints.get(formal.type_str, [formal.type_str])
        return Port(formal.type_str, "tensor(float16)" in allowed, allowed == ["tensor(float)"])

    return [port(formal) for formal in schema.inputs], [port(formal) for formal in schema.outputs]


def _fit(formal: list[Port], count: int) -> list[Port]:
    """As many as there are: the last one (variadic) again and again."""
    return [formal[min(index, len(formal) - 1)] for index in range(count)]


def _exact_ancestors(model: ir.Model) -> set[ir.Node]:
    """The nodes that compute an index or an angle."""
    found: set[ir.Node] = set()
    pending: list[ir.Value] = []
    for node in graphs.all_nodes(model):
        if node.domain == "" and (node.op_type in _INDEXING or _casts_to_integers(node)):
            pending.extend(value for value in node.inputs if value is not None)
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in found or producer.domain != "":
            continue
        if producer.op_type in _ARITHMETIC or _is_outer_product(producer):
            found.add(producer)
            pending.extend(value for value in producer.inputs if value is not None)
    return found


def _casts_to_integers(node: ir.Node) -> bool:
    to = node.attributes.get("to")
    if node.op_type != "Cast" or to is None or to.is_ref():
        return False
    target = ir.DataType(to.as_int())
    return target.is_integer() and target is not ir.DataType.BOOL


def _is_outer_product(node: ir.Node) -> bool:
    """A matrix product that sums over one number only: frequencies times positions."""
    if node.op_type != "MatMul":
        return False
    left, right = (graphs.static_shape(value) for value in node.inputs)
    return bool((left and left[-1] == 1) or (right and len(right) > 1 and right[-2] == 1))
