"""Sizes of axes that are known only when the model runs, as expressions that are equal where the sizes surely are.

Shape inference gives up, and invents a new name, at the first operator whose sizes depend on data. Here a size is
followed back through such operators to an axis with a name, as far as needed to tell that two sizes are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import INVENTED, int_attribute, made_by, permutation
from graphopt.shape_values import Element, Elements, Expression, ShapeValues
from graphopt.shapes import trusted_shape

_SAME_SHAPE = frozenset(
    {
        *("Cast", "Identity", "LayerNormalization", "Softmax", "Relu", "Sqrt", "Erf", "Tanh", "Gelu", "IsNaN", "Not"),
        *("Neg", "Sigmoid", "Exp", "Log", "Abs", "Reciprocal", "LeakyRelu", "Elu", "HardSwish", "HardSigmoid", "Swish"),
        *("Clip", "Softplus", "Sin", "Cos", "LogSoftmax", "RMSNormalization", "GroupNormalization", "Dropout"),
        *("InstanceNormalization", "BatchNormalization"),
    }
)
_BROADCAST = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Pow", "Where", "And", "Or", "Equal"),
        *("Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
    }
)
_DEEPEST = 60  # each step takes a few frames of Python's stack


class Sizes(ShapeValues):
    """Answers for the values of one model; what it has found out stays true while the model is rewritten."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset)
        self._sizes: dict[str | tuple[ir.Value, int], Element] = {}
        self._untraced: set[tuple[ir.Value, int]] = set()
        self._smaller: dict[Element, tuple[int, Element]] = {}
        self._ranks: dict[ir.Value, int | None] = {}
        self._depth = 0

    def all(self, value: ir.Value | None) -> tuple[Element, ...] | None:
        """The sizes of all axes; None where their number is not known."""
        rank = self.rank(value)
        return None if value is None or rank is None else tuple(self.size(value, axis) for axis in range(rank))

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes, where inference or the operators before a value tell it."""
        if value is None:
            return None
        shape = trusted_shape(value)
        if shape is not None:
            return len(shape)
        if value not in self._ranks:
            self._ranks[value] = None
            self._depth += 1
            self._ranks[value] = None if self._depth > _DEEPEST else self._axes_of(value)
            self._depth -= 1
        return self._ranks[value]

    def _axes_of(self, value: ir.Value) -> int | None:
        node = value.producer()
        if node is None or node.domain != "" or node.outputs[0] is not value:
            return None
        if node.op_type == "Reshape":
            wanted = self.numbers(node.inputs[1])
            return None if wanted is None else len(wanted)
        if node.op_type in _SAME_SHAPE or node.op_type in ("Transpose", "Conv", "ConvTranspose"):
            return self.rank(node.inputs[0])
        if node.op_type in _BROADCAST or node.op_type == "MatMul":
            ranks = [self.rank(v) for v in node.inputs]
            known = [r for r in ranks if r is not None]
            least = 2 if node.op_type == "MatMul" else 0
            return max(known) if len(known) == len(ranks) and min(known) >= least else None
        return None

    def size(self, value: ir.Value, axis: int) -> Element:
        """The size of an axis, counted from the front: a number, or an expression."""
        shape = trusted_shape(value)
        known = shape[axis] if shape is not None and axis < len(shape) else None
        if isinstance(known, int):
            return known
        name = None if known is None else known.value
        if name is not None and not name.startswith(INVENTED):
            return Expression.axis(name)
        # An invented name stands for one size wherever it is found; in some places it can be traced back.
        key: str | tuple[ir.Value, int] = name or (value, axis)
        if key not in self._sizes:
            self._depth += 1
            traced = (value, axis) not in self._untraced and self._depth <= _DEEPEST
            found = self._follow(value, axis) if traced else None
            self._depth -= 1
            if found is None and name is not None:
                self._untraced.add((value, axis))
                return Expression.axis(name)
            # Where nothing is found the axis stands for itself, under a name that no file can contain.
            self._sizes[key] = Expression.axis(f"\0{len(self._sizes)}") if found is None else found
        return self._sizes[key]

    def numbers(self, value: ir.Value | None) -> tuple[Element | None, ...] | None:
        """The elements of a small integer vector."""
        elements = self.of(value)
        return None if elements is None or elements.ndim != 1 else tuple(elements)

    def reshaped(self, node: ir.Node) -> tuple[Element, ...] | None:
        """The sizes of what a Reshape gives, from its input and its second operand; None where they stay open."""
        wanted, source = self.numbers(node.inputs[1]), self.all(node.inputs[0])
        copies = int_attribute(node, "allowzero", 0) == 0
        if wanted is None or source is None:
            return None
        result: list[Element] = []
        for place, element in enumerate(wanted):
            if element is None or (element == 0 and not (copies and place < len(source))):
                return None
            result.append(source[place] if element == 0 else element)
        if -1 in result:
            place = result.index(-1)
            rest = _quotient(source, [s for i, s in enumerate(result) if i != place])
            if rest is None:
                return None
            result[place] = rest
        return tuple(result)

    def _of_shape(self, node: ir.Node) -> Elements | None:
        sizes = self.all(node.inputs[0])
        start, end = int_attribute(node, "start", 0), int_attribute(node, "end", 1 << 30)
        if node.op_type != "Shape" or sizes is None or start is None or end is None:
            return super()._of_shape(node)
        chosen = sizes[start:end]
        elements = np.empty(len(chosen), object)
        elements[:] = chosen
        return elements

    def _follow(self, value: ir.Value, axis: int) -> Element | None:
        node = value.producer()
        rank = self.rank(value)
        if node is None or rank is None or node.outputs[0] is not value:
            return None
        op, source = node.op_type, node.inputs[0] if node.inputs else None
        if source is None:
            return None
        if node.domain != "":
            # What this group of passes has written already.
            traced = (op in ("Gelu", "FastGelu")) or (op == "MultiHeadAttention" and axis < 2)
            return self.size(source, axis) if node.domain == "com.microsoft" and traced else None
        if op in _SAME_SHAPE:
            return self.size(source, axis)
        if op in _BROADCAST:
            return self._broadcast(node.inputs, axis, rank)
        if op == "MatMul":
            return self._product(node, axis, rank)
        if op in ("Conv", "ConvTranspose") and axis < 2:
            return self.size(source, 0) if axis == 0 else self._channels(node)
        if op == "Transpose" and (perm := permutation(node)) is not None:
            return self.size(source, perm[axis])
        if op == "Reshape":
            sizes, wanted = self.reshaped(node), self.numbers(node.inputs[1])
            if sizes is not None:
                return sizes[axis]
            # What is asked for is given, whatever becomes of the other axes.
            return None if wanted is None or wanted[axis] in (None, 0, -1) else wanted[axis]
        if op == "Unsqueeze":
            return self._unsqueezed(node, source, axis, rank)
        if op == "Concat":
            along = int_attribute(node, "axis", 0)
            return None if along is None or along % rank == axis else self.size(source, axis)
        if op == "Expand":
            return self._expanded(node, source, axis, rank)
        if op == "Gather":
            indices = node.inputs[1]
            known = self.rank(indices)
            if indices is not None and known is not None and int_attribute(node, "axis", 0) == 0 and axis < known:
                return self.size(indices, axis)
            return None
        if op == "GatherND":
            indices = node.inputs[1]
            known = self.rank(indices)
            if indices is not None and known is not None and axis < known - 1:
                return self.size(indices, axis)
            return None
        if op == "Range":
            return self._counted(node)
        if op == "Slice":
            return self._sliced(node, source, axis)
        return None

    def _channels(self, node: ir.Node) -> Element | None:
        """How many channels a convolution makes."""
        weight, groups = node.inputs[1], int_attribute(node, "group", 1)
        known = self.rank(weight)
        if weight is None or groups is None or known is None or known < 2:
            return None
        if node.op_type == "Conv":
            return self.size(weight, 0)
        channels = self.size(weight, 1)
        return channels * groups if isinstance(channels, int) else None

    def _product(self, node: ir.Node, axis: int, rank: int) -> Element | None:
        left, right = node.inputs[:2]
        a, b = self.rank(left), self.rank(right)
        if left is None or right is None or a is None or b is None or a < 2 or b < 2:
            return None
        if axis == rank - 1:
            return self.size(right, b - 1)
        if axis == rank - 2:
            return self.size(left, a - 2)
        batch = [self.size(v, n) for v, n in ((left, axis - rank + a), (right, axis - rank + b)) if n >= 0]
        return batch[0] if len(batch) == 1 else self._together(*batch)

    def _broadcast(self, inputs: Sequence[ir.Value | None], axis: int, rank: int) -> Element | None:
        result: Element = 1
        for operand in inputs:
            known = self.rank(operand)
            if operand is None or known is None:
                return None
            place = axis - (rank - known)
            other = 1 if place < 0 else self.size(operand, place)
            combined = self._together(result, other)
            if combined is None:
                return None
            result = combined
        return result

    def _together(self, one: Element, other: Element) -> Element | None:
        """The size that two sizes broadcast to, in every run that does not fail."""
        if one == 1 or one == other:
            return other
        if other == 1:
            return one
        # min(c, n) broadcast with n: equal, or n is 1 and so is min(c, n), or min(c, n) is 1 and stretched to n.
        if self._smaller.get(one, (0, None))[1] == other:
            return other
        if self._smaller.get(other, (0, None))[1] == one:
            return one
        return one if isinstance(one, int) and one > 1 else other if isinstance(other, int) and other > 1 else None

    def _unsqueezed(self, node: ir.Node, source: ir.Value, axis: int, rank: int) -> Element | None:
        attribute = node.attributes.get("axes")
        if attribute is not None and not attribute.is_ref():
            axes = [int(a) for a in attribute.as_ints()]
        else:
            array = graphs.constant_array(node.inputs[1], limit=16) if len(node.inputs) > 1 else None
            if array is None:
                return None
            axes = [int(a) for a in array.reshape(-1)]
        new = {a % rank for a in axes}
        return 1 if axis in new else self.size(source, axis - sum(1 for a in new if a < axis))

    def _expanded(self, node: ir.Node, source: ir.Value, axis: int, rank: int) -> Element | None:
        wanted, known = self.numbers(node.inputs[1]), self.rank(source)
        if wanted is None or known is None:
            return None
        place, inner = axis - (rank - len(wanted)), axis - (rank - known)
        asked = 1 if place < 0 else wanted[place]
        return None if asked is None else self._together(1 if inner < 0 else self.size(source, inner), asked)

    def _counted(self, node: ir.Node) -> Element | None:
        start, limit, delta = (self.of(value) for value in node.inputs[:3])
        if start is None or limit is None or delta is None or start.size != 1 or delta.size != 1 or limit.size != 1:
            return None
        end = limit.reshape(-1)[0]
        return end if start.reshape(-1)[0] == 0 and delta.reshape(-1)[0] == 1 and isinstance(end, Expression) else None

    def _sliced(self, node: ir.Node, source: ir.Value, axis: int) -> Element | None:
        """Of x[0:n] along one axis of a known size c: min(c, n). Other axes stay."""
        if len(node.inputs) < 4:
            return None
        start, end, axes = (self.numbers(value) for value in node.inputs[1:4])
        steps = self.numbers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
        rank = self.rank(source)
        if axes is None or rank is None or any(not isinstance(a, int) for a in axes):
            return None
        if axis not in {int(a) % rank for a in axes if isinstance(a, int)}:
            return self.size(source, axis)
        size = self.size(source, axis)
        if len(axes) != 1 or start != (0,) or steps != (1,) or end is None or not isinstance(size, int) or size < 1:
            return None
        limit = end[0]
        if not isinstance(limit, Expression) or limit.bounds()[0] is None:
            return None
        smaller = Expression.axis(f"\0min({size},{limit!r})")
        self._smaller[smaller] = (size, limit)
        return smaller


def _quotient(whole: Sequence[Element], parts: Sequence[Element]) -> Element | None:
    """The product of some sizes over the product of others, where that comes out even."""
    left: list[Element] = list(whole)
    number = 1
    for part in parts:
        if part in left:
            left.remove(part)
        elif isinstance(part, int):
            number *= part
        else:
            return None
    product = Expression.of(1)
    for size in left:
        product = product.times(Expression.of(size))
    quotient = product.divided(number)
    return None if quotient is None else quotient.simplified()


def reshape_of(sizes: Sizes, value: ir.Value | None) -> tuple[ir.Value, tuple[Element, ...]] | None:
    """Of a value that a Reshape makes: what is reshaped, and the sizes of the result."""
    node = made_by(value, "Reshape")
    if node is None or node.inputs[0] is None:
        return None
    result = sizes.reshaped(node) or sizes.all(value)
    return None if result is None else (node.inputs[0], result)
