"""Channel classes: the axes of a model that must be relabelled together."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.labels import Atom, size_of
from graphopt.channels.rules import RULES
from graphopt.channels.tying import Absorbed, Group, RankUnknownError, Tying


@dataclass(frozen=True)
class Slot:
    """A place of a class on an axis: elements [offset, offset + outer * size * inner), the class in the middle.

    Attributes:
        value: A value of the main graph.
        axis: Its axis. None: the value is a constant of integers that are indices into an axis with this place, and
            they are renumbered.
        offset: Where the place begins.
        outer: How often the class is repeated.
        inner: How many neighbours each of its elements has.
        inverse: Whether this place is relabelled by the inverse (transposed) of the class's element.
        into: Of indices, the size of the axis that they are into.
    """

    value: ir.Value
    axis: int | None
    offset: int
    outer: int
    inner: int
    inverse: bool
    into: int | None = None


@dataclass(frozen=True, eq=False)
class ChannelClass:
    """Places that are relabelled together.

    Attributes:
        size: The number of channels.
        slots: Its places.
        pinned: Why nothing but the identity is allowed, some of the reasons; empty where the class is free.
    """

    size: int
    slots: tuple[Slot, ...]
    pinned: tuple[str, ...]

    @property
    def free(self) -> bool:
        """Whether every element of the group may be applied."""
        return not self.pinned

    def constants(self) -> list[ir.Value]:
        """The constants that have a place of this class, each once."""
        return list(dict.fromkeys(slot.value for slot in self.slots if graphs.is_constant(slot.value)))

    def activations(self) -> list[ir.Value]:
        """The computed values that have a place of this class, each once."""
        return list(dict.fromkeys(slot.value for slot in self.slots if not graphs.is_constant(slot.value)))


@dataclass(frozen=True)
class Segment:
    """A place of a class on one axis, as ``Slot`` has it."""

    cls: ChannelClass
    offset: int
    outer: int
    inner: int
    inverse: bool


class Channels:
    """The channel classes of a model for one group.

    Attributes:
        group: The group.
        classes: Every class, free ones first, then in the order of the graph.
    """

    def __init__(self, group: Group, classes: list[ChannelClass], segments: dict[tuple[ir.Value, int], list[Segment]]):
        self.group = group
        self.classes = tuple(classes)
        self._segments = segments

    def of(self, value: ir.Value, axis: int) -> tuple[Segment, ...]:
        """The places on an axis; none where it has one element, its size is not known, or it is not analysed."""
        return tuple(self._segments.get((value, axis), ()))

    def whole(self, value: ir.Value, axis: int) -> ChannelClass | None:
        """The class that is all of an axis, where one is."""
        found = self.of(value, axis)
        return found[0].cls if len(found) == 1 and (found[0].outer, found[0].inner) == (1, 1) else None


def channel_classes(model: ir.Model, group: Group = Group.PERMUTATION) -> Channels:
    """Find which axes of the main graph's values must be relabelled together, and which must stay as they are.

    Shapes must have been inferred (``graphopt.shapes.infer_shapes``). What bodies read or make is pinned. No large
    constant is read. The work is linear in the nodes.

    Args:
        model: Left as it is.
        group: What axes are relabelled by. For scales the numbers are positive.
    """
    t = Tying(model.graph, group, graphs.opset(model))
    _pin_ends(t)
    for node in model.graph:
        if graphs.is_constant(node.outputs[0] if node.outputs else None):
            continue
        t.begin(node)
        t.finish(_apply(t, node))
    t.settle_products()
    return _collect(t)


def _pin_ends(t: Tying) -> None:
    for value in t.graph.inputs:
        what = "a caller may override" if value.const_value is not None else "graph input"
        t.pin_all(f"{what} {value.name!r}", value)
    for value in t.graph.outputs:
        t.pin_all(f"graph output {value.name!r}", value)


def _apply(t: Tying, node: ir.Node) -> str:
    """Apply the rule of a node. Returns why what it leaves open is pinned."""
    if graphs.has_subgraphs(node):
        reason = f"read or made by {t.called()}"
        for body in graphs.subgraphs(node):
            t.pin_all(reason, *graphs.captured_values(body))
        return reason
    known = RULES.get(node.op_type) if node.domain == "" else None
    if known is None:
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        return f"op {name} is not known"
    try:
        known(t, node)
    except RankUnknownError as error:
        for value in (*node.inputs, *node.outputs):
            t.pin_all(str(error), value)
        return str(error)
    return ""


def _collect(t: Tying) -> Channels:
    slots: dict[Atom, list[Slot]] = {}
    places: dict[tuple[ir.Value, int], list[tuple[Atom, int, int, int, bool]]] = {}
    for value, labels in t.axes.items():
        for axis, label in enumerate(labels or ()):
            for piece in t.labels.layout(label) if label is not None else ():
                if piece.atom.size > 1:
                    place = (piece.offset, piece.outer, piece.inner, piece.inverse)
                    slots.setdefault(piece.atom, []).append(Slot(value, axis, *place))
                    places.setdefault((value, axis), []).append((piece.atom, *place))
    for taken in t.absorbed.values():
        _absorb(t, taken, slots)
    classes = {atom: _class(atom, found) for atom, found in slots.items()}
    flipped = {atom for atom, cls in classes.items() if _first(slots[atom]).inverse}
    segments = {
        key: [
            Segment(classes[atom], offset, outer, inner, inverse ^ (atom in flipped))
            for atom, offset, outer, inner, inverse in found
        ]
        for key, found in places.items()
    }
    return Channels(t.group, sorted(classes.values(), key=lambda cls: not cls.free), segments)


def _absorb(t: Tying, taken: Absorbed, slots: dict[Atom, list[Slot]]) -> None:
    into = size_of(taken.label) if taken.axis is None else None
    for piece in t.labels.layout(taken.label):
        if piece.atom.size > 1:
            place = (piece.offset, piece.outer, piece.inner, piece.inverse)
            slots.setdefault(piece.atom, []).append(Slot(taken.constant, taken.axis, *place, into))


def _class(atom: Atom, slots: list[Slot]) -> ChannelClass:
    flip = _first(slots).inverse
    if flip:
        slots = [Slot(s.value, s.axis, s.offset, s.outer, s.inner, not s.inverse, s.into) for s in slots]
    return ChannelClass(atom.size, tuple(slots), tuple(atom.pins))


def _first(slots: list[Slot]) -> Slot:
    """The place that tells which way round the class is: of the first computed value."""
    return next((s for s in slots if not graphs.is_constant(s.value)), slots[0])
