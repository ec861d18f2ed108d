"""What is known of values before a build: types as the library sees them, shapes, and what is the same in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.shape_values import ShapeValues
from graphopt.shapes import trusted_shape
from graphopt.targets.target import type_name

Axis = int | None
"""The size of an axis; None where it differs from run to run, or is not known."""

_READ = 4096
_LONGEST = 64
_FOLLOWED = frozenset({"Identity", "Cast", "CastLike"})
# Their results depend on the shapes of what they read, and on no values.
_OF_SHAPES = frozenset({"Shape", "Size"})
_RANDOM = graphs.RANDOM - {"Dropout"}


class Known:
    """Answers about the values of one model; each is looked at once.

    Args:
        model: Its shapes have been inferred.
        converted: Types that the library reads constants of as others: {"uint8": "int32"}.
        sizes: Symbolic axes that have one size.
    """

    def __init__(self, model: ir.Model, converted: Mapping[str, str], sizes: Mapping[str, int] | None = None) -> None:
        self.sizes = sizes or {}
        self.opset = graphs.opset(model)
        self.converted = converted
        self.values = ShapeValues(self.opset)
        # What is given and has a weight of the same name is a weight for these libraries: nobody can give another.
        self.given = {value for value in model.graph.inputs if not value.is_initializer()}
        self.of_runs = {
            value
            for node in graphs.all_nodes(model)
            if node.op_type in ("Loop", "Scan")
            for body in graphs.subgraphs(node)
            for value in body.inputs
        }
        self._fixed: dict[ir.Value, bool] = {}
        self._roots: dict[ir.Value, frozenset[ir.Value]] = {}

    def dtype(self, value: ir.Value | None) -> str | None:
        """The element type as target files spell it: ``float32``, ``int8``; None where it is not known."""
        if value is None:
            return None
        found = value.dtype
        tensor = constant(value)
        if tensor is not None:
            name = type_name(tensor.dtype)
            return self.converted.get(name, name)
        return None if found is None or found == ir.DataType.UNDEFINED else type_name(found)

    def shape(self, value: ir.Value | None) -> list[Axis] | None:
        """The axes of a value; None where not even their number is known."""
        if value is None:
            return None
        tensor = constant(value)
        if tensor is not None:
            return list(tensor.shape.numpy())
        shape = trusted_shape(value)
        return None if shape is None else [self._size(axis) for axis in shape]

    def _size(self, axis: int | ir.SymbolicDim) -> Axis:
        return axis if isinstance(axis, int) else self.sizes.get(axis.value or "")

    def rank(self, value: ir.Value | None) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def fixed(self, value: ir.Value | None) -> bool:
        """Whether a value is the same in every run, as constants and the sizes of static axes alone make it."""
        return value is None or self._walk(value)

    def weight(self, value: ir.Value) -> ir.Value:
        """The constant that a value is, or is an Identity or a Cast of, as far as the parser follows these."""
        for _ in range(_LONGEST):
            node = value.producer()
            if constant(value) is not None or node is None or node.domain != "" or node.op_type not in _FOLLOWED:
                break
            if node.inputs[0] is None:
                break
            value = node.inputs[0]
        return value

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether the parser still holds a value as a constant."""
        return value is None or constant(self.weight(value)) is not None

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """What a small fixed value holds, where it is a constant or integer arithmetic on constants and sizes."""
        if value is None:
            return None
        tensor = constant(value)
        if tensor is not None:
            return tensor.numpy() if tensor.size <= _READ else None
        return self.values.constant(value)

    def roots(self, value: ir.Value | None) -> frozenset[ir.Value]:
        """The inputs of the model, and of bodies that run again and again, whose values a value depends on.

        What depends on the shape of an input alone is not counted.
        """
        if value is None:
            return frozenset()
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self._roots:
                pending.pop()
                continue
            sources = [] if self._by_shape(current) else _sources(current)
            waiting = [source for source in sources if source not in self._roots]
            if waiting:
                pending.extend(waiting)
                continue
            own = frozenset((current,)) if current in self.given or current in self.of_runs else frozenset()
            self._roots[current] = own.union(*(self._roots[source] for source in sources))
            pending.pop()
        return self._roots[value]

    def _by_shape(self, value: ir.Value) -> bool:
        node = value.producer()
        return node is not None and node.domain == "" and node.op_type in _OF_SHAPES

    def _walk(self, value: ir.Value) -> bool:
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self._fixed:
                pending.pop()
                continue
            answer = self._at_once(current)
            if answer is None:
                waiting = [source for source in _sources(current) if source not in self._fixed]
                if waiting:
                    pending.extend(waiting)
                    continue
                answer = all(self._fixed[source] for source in _sources(current))
            self._fixed[current] = answer
            pending.pop()
        return self._fixed[value]

    def _at_once(self, value: ir.Value) -> bool | None:
        """Whether a value is fixed, where that can be said without looking at what it is made from."""
        if value.is_initializer():
            return value.const_value is not None
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type in _RANDOM or graphs.has_subgraphs(node) or node.domain != "":
            return False
        if node.op_type in _OF_SHAPES:
            shape = self.shape(node.inputs[0])
            return shape is not None and None not in shape
        return None


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a weight or of a Constant node."""
    return value.const_value if value.is_initializer() else graphs.constant_tensor(value)


def _sources(value: ir.Value) -> Sequence[ir.Value]:
    node = value.producer()
    return () if node is None else graphs.read_by(node)
