"""How many turns a Loop takes at the most: what its count says, and what its condition says of numbers that grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.passes.dynamic.probing import Shapes
from graphopt.shape_values import ShapeValues
from graphopt.shapes import trusted_shape

_MOST = 2**63 - 1
# Nodes between a comparison and what it counts; conditions have a few.
_DEEPEST = 64
_COMPARISONS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
# These give the one element that they are given.
_SAME = frozenset({"Identity", "Squeeze", "Unsqueeze", "Reshape"})


def most_turns(loop: ir.Node, shapes: Shapes, opset: int) -> int | None:
    """The most turns that a Loop takes, on any input.

    A condition limits them where it is false unless an integer that grows by a constant in every turn (a state, the
    number of the turn, the size of an axis of a state) is less than a constant; so it is for one that falls. The first
    turn does not ask it. Numbers that could leave the range of their type before that count for nothing.

    Args:
        loop: A Loop whose body is no reference to an attribute of a function.
        shapes: What is true of the shapes in its body in every turn.
        opset: Of the model.

    Returns:
        None where nothing limits them, and where what counts them is computed.
    """
    found = []
    values = ShapeValues(opset)
    if loop.inputs[0] is not None:
        count = _number(loop.inputs[0], values)
        if count is None:
            return None
        found.append(max(count, 0))
    for comparison, truth in _needed(loop.attributes["body"].as_graph(), values):
        most = _Counting(loop, shapes, values).turns(comparison, truth)
        if most is not None:
            found.append(most)
    return min(found, default=None)


def grows_by(body: ir.Graph, place: int, shapes: Shapes) -> tuple[int, int] | None:
    """Along which axis a Concat makes a state longer at its end in every turn, and by how much."""
    inner, concat = body.inputs[2 + place], body.outputs[1 + place].producer()
    if concat is None or concat.graph is not body or (concat.domain, concat.op_type) != ("", "Concat"):
        return None
    if concat.inputs[0] is not inner or concat.attributes["axis"].is_ref():
        return None
    axis, step = concat.attributes.get_int("axis", 0), 0
    rank = None
    for part in concat.inputs[1:]:
        shape = None if part is None else shapes[part] if part in shapes else trusted_shape(part)
        if part is inner or shape is None or not -len(shape) <= axis < len(shape):
            return None
        rank = len(shape)
        size = shape[axis]
        if not isinstance(size, int):
            return None
        step += size
    return None if rank is None else (axis % rank, step)


def _number(value: ir.Value | None, values: ShapeValues) -> int | None:
    """The integer in a constant of one element."""
    array = values.constant(value)
    return None if array is None or array.size != 1 or array.dtype.kind not in "iu" else int(array.reshape(()))


# -- what a condition asks for -----------------------------------------------------------------------------------------


def _needed(body: ir.Graph, values: ShapeValues) -> Iterator[tuple[ir.Node, bool]]:
    """The comparisons without which the condition of a body is not true, each with what it must be."""
    waiting: list[tuple[ir.Value | None, bool]] = [(body.outputs[0], True)]
    seen: set[tuple[ir.Value, bool]] = set()
    while waiting:
        value, truth = waiting.pop()
        node = None if value is None else value.producer()
        if value is None or (value, truth) in seen or node is None or node.domain != "":
            continue
        seen.add((value, truth))
        if node.op_type in _COMPARISONS:
            yield node, truth
        elif node.op_type == ("And" if truth else "Or"):
            waiting += [(other, truth) for other in node.inputs]
        elif node.op_type == "Not":
            waiting.append((node.inputs[0], not truth))
        elif node.op_type in _SAME:
            waiting.append((node.inputs[0], truth))
        elif node.op_type == "If" and not any(attribute.is_ref() for attribute in node.attributes.values()):
            place = node.outputs.index(value)
            then, other = (node.attributes[f"{side}_branch"].as_graph().outputs[place] for side in ("then", "else"))
            # The side that cannot give what is wanted is not the one that is chosen.
            for never, gives, chosen in ((then, other, False), (other, then, True)):
                given = values.constant(never)
                if given is not None and given.size == 1 and bool(given.reshape(())) != truth:
                    waiting += [(node.inputs[0], chosen), (gives, truth)]


# -- numbers that grow -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A number that is ``start`` in the first turn and grows by ``step`` in each."""

    start: int
    step: int

    def at(self, turn: int) -> int:
        return self.start + turn * self.step

    def plus(self, other: _Line, times: int = 1) -> _Line:
        return _Line(self.start + times * other.start, self.step + times * other.step)


class _Counting:
    """Finds what numbers of a body are in each turn, as long as none has left the range of its type.

    Args:
        loop: The Loop.
        shapes: Of values of its body.
        values: Knows constants.
    """

    def __init__(self, loop: ir.Node, shapes: Shapes, values: ShapeValues) -> None:
        self._loop, self._body = loop, loop.attributes["body"].as_graph()
        self._shapes, self._values = shapes, values
        self._place = {value: place for place, value in enumerate(self._body.inputs[2:])}
        self._inside = set(graphs.nested_graphs(self._body))
        self._met: list[tuple[_Line, ir.DataType]] = []

    def turns(self, comparison: ir.Node, truth: bool) -> int | None:
        """The most turns, where a Loop goes on only if a comparison says so."""
        less, more = (self._line(value) for value in comparison.inputs)
        if less is None or more is None:
            return None
        if comparison.op_type.startswith("Greater") == truth:
            less, more = more, less
        # Not less is greater or equal.
        may_be_equal = comparison.op_type.endswith("OrEqual") == truth
        left = more.plus(less, -1).plus(_Line(int(may_be_equal), 0))  # it goes on while this is more than nothing
        if left.start <= 0:
            last = 0
        elif left.step < 0:
            last = -(left.start // left.step)
        else:
            return None
        return last + 1 if last < _MOST and self._in_range(last) else None

    def _in_range(self, last: int) -> bool:
        """Whether all that was met is in the range of its type in every turn up to one, the last one there is."""
        for line, dtype in self._met:
            bounds = np.iinfo(dtype.numpy())
            if not all(bounds.min <= line.at(turn) <= bounds.max for turn in (0, last)):
                return False
        return True

    def _meet(self, line: _Line | None, value: ir.Value) -> _Line | None:
        if line is None or value.dtype is None or value.dtype.numpy().kind not in "iu":
            return None
        self._met.append((line, value.dtype))
        return line

    def _line(self, value: ir.Value | None, depth: int = 0) -> _Line | None:
        """What an integer of one element is."""
        if value is None or depth > _DEEPEST:
            return None
        number = _number(value, self._values)
        if number is not None:
            return _Line(number, 0)
        if value is self._body.inputs[0]:
            return self._meet(_Line(0, 1), value)
        if value in self._place:
            return self._state(value, self._place[value])
        node = value.producer()
        if node is None or node.graph not in self._inside or node.domain != "":
            return None
        line = None
        if node.op_type in ("Shape", "Gather"):
            line = self._size(node)
        elif node.op_type in ("Cast", *_SAME):
            line = self._line(node.inputs[0], depth + 1)
        elif node.op_type in ("Add", "Sub"):
            one, other = (self._line(each, depth + 1) for each in node.inputs)
            if one is not None and other is not None:
                line = one.plus(other, 1 if node.op_type == "Add" else -1)
        elif node.op_type == "Neg":
            one = self._line(node.inputs[0], depth + 1)
            line = None if one is None else _Line(0, 0).plus(one, -1)
        return self._meet(line, value)

    def _state(self, inner: ir.Value, place: int) -> _Line | None:
        """What a state is that a turn adds a constant to."""
        start = _number(self._loop.inputs[2 + place], self._values)
        after: ir.Value | None = self._body.outputs[1 + place]
        added = [0]
        while after is not inner:
            node = None if after is None else after.producer()
            if node is None or node.graph is not self._body or node.domain != "" or len(added) > _DEEPEST:
                return None
            sign, source, number = 1, node.inputs[0], 0
            if node.op_type in ("Add", "Sub"):
                found = _number(node.inputs[1], self._values)
                if found is None and node.op_type == "Add":
                    source, found = node.inputs[1], _number(node.inputs[0], self._values)
                if found is None:
                    return None
                sign, number = 1 if node.op_type == "Add" else -1, found
            elif node.op_type not in _SAME:
                return None
            added.append(sign * number)
            after = source
        if start is None:
            return None
        # On the way from a state to the next every number counts, and the last one is added first.
        for reached in np.cumsum(np.array(added[::-1], object)):
            if self._meet(_Line(start + reached, sum(added)), inner) is None:
                return None
        return _Line(start, sum(added))

    def _size(self, node: ir.Node) -> _Line | None:
        """The size of one axis."""
        if node.op_type == "Gather":
            shape = None if node.inputs[0] is None else node.inputs[0].producer()
            index = _number(node.inputs[1], self._values)
            if index is None or shape is None or (shape.domain, shape.op_type) != ("", "Shape"):
                return None
        else:
            shape, index = node, 0
        value = shape.inputs[0]
        known = self._shape_of(value)
        if known is None or value is None:
            return None
        axes = range(len(known))[slice(shape.attributes.get_int("start", 0), shape.attributes.get_int("end", None))]
        if not -len(axes) <= index < len(axes) or (node is shape and len(axes) != 1):
            return None
        axis = axes[index]
        size = known[axis]
        return _Line(size, 0) if isinstance(size, int) else self._length(value, axis)

    def _length(self, value: ir.Value, axis: int) -> _Line | None:
        """The size of an axis along which a state grows, of the state or of what a turn makes of it."""
        for inner, place in self._place.items():
            after = self._body.outputs[1 + place]
            if value not in (inner, after):
                continue
            grows, start = grows_by(self._body, place, self._shapes), self._shape_of(self._loop.inputs[2 + place])
            if grows is not None and start is not None and grows[0] == axis < len(start):
                size = start[axis]
                return _Line(size + (grows[1] if value is after else 0), grows[1]) if isinstance(size, int) else None
        return None

    def _shape_of(self, value: ir.Value | None) -> ir.Shape | None:
        if value is None:
            return None
        return self._shapes[value] if value in self._shapes else trusted_shape(value)
