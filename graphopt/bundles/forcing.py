"""Every way that a network can go: its decisions, and how they are forced, in an ONNX model and in a bundle.

A decision is an If, or how often a Loop turns. They are called by their names (`graphs.name_control_flow`), which are
those of the bundle's plan. Some go together: where two conditions are the same value, or one is the other's opposite,
no input sends them different ways, and passes may rely on that. They are forced together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.runtime import ending

NATURAL = -1
PREFIX = "force/"
"""Before the name of a decision: the input of a forced model that says which way it goes."""
DECISIONS = frozenset({"If", "Loop"})
OLDEST = 9
"""The first opset that has the operators to force decisions with."""
MOST_TURNS = 256
FREE_TURNS = 64
"""The most turns of a loop that a forced way leaves to the values: one whose end depends on what is forced may have
none."""

Way = dict[str, int]
"""Name of a decision -> where it goes: If: 0 else, 1 then; Loop: so many turns. Others go as the values say."""


@dataclass(frozen=True)
class Decision:
    """An If, or how often a Loop turns.

    Attributes:
        name: Of the node.
        is_loop: Whether it is a Loop.
        condition: A number for what an If asks: the same for Ifs that always agree, or never do.
        opposite: Whether it goes to ``then`` where the others of its number go to ``else``.
        inside: The decisions around it, and where they go to reach it.
        limit: The most turns that a Loop says it takes, where that is a constant.
    """

    name: str
    is_loop: bool
    condition: int = -1
    opposite: bool = False
    inside: tuple[tuple[str, int], ...] = ()
    limit: int | None = None


def decisions(model: ir.Model) -> list[Decision]:
    """The decisions of a model without functions, outer before inner; without those that no output depends on."""
    return list(_decisions(model.graph, (), _Conditions(model)))


def _decisions(graph: ir.Graph, inside: tuple[tuple[str, int], ...], conditions: _Conditions) -> Iterator[Decision]:
    live = _live(graph)
    for node in graph:
        if node not in live or node.domain != "" or node.op_type == "SequenceMap":
            continue
        name = node.name or ""
        if node.op_type == "If":
            number, opposite = conditions.of(node.inputs[0])
            yield Decision(name, False, number, opposite, inside)
        elif node.op_type == "Loop":
            yield Decision(name, True, inside=inside, limit=_limit(node))
        for key, goes in (("then_branch", 1), ("else_branch", 0), ("body", 1)):
            if key in node.attributes:
                around = inside if node.op_type == "Scan" else (*inside, (name, goes))
                yield from _decisions(node.attributes[key].as_graph(), around, conditions)


def _live(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of a graph with bodies that its outputs depend on; the bodies count as part of them."""
    live: set[ir.Node] = set()
    waiting = [maker for value in graph.outputs if (maker := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node in live or node.graph is not graph:
            continue
        live.add(node)
        waiting.extend(maker for value in graphs.read_by(node) if (maker := value.producer()) is not None)
    return {node for node in live if graphs.has_subgraphs(node)}


def _limit(node: ir.Node) -> int | None:
    known = graphs.scalar_of(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    return None if known is None or not 0 <= known <= MOST_TURNS else int(known)


class _Conditions:
    """Gives values that are computed alike one number, over all graphs of a model."""

    def __init__(self, model: ir.Model) -> None:
        self._numbers: dict[object, int] = {}
        self._known: dict[ir.Value, tuple[int, bool]] = {}
        self._visit(model.graph)

    def of(self, value: ir.Value | None) -> tuple[int, bool]:
        """The number of a value, and whether it is the opposite of what the number stands for."""
        if value is None:
            return -1, False
        if value not in self._known:
            tensor = graphs.constant_tensor(value)
            small = tensor is not None and tensor.size <= 64 and tensor.dtype != ir.DataType.STRING
            key = (str(tensor.dtype), tensor.shape.numpy(), tensor.tobytes()) if tensor and small else value
            self._known[value] = self._number(key), False
        return self._known[value]

    def _number(self, key: object) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _visit(self, graph: ir.Graph) -> None:
        for node in graph:
            for body in graphs.subgraphs(node):
                self._visit(body)
            if node.op_type == "Constant":
                continue
            plain = node.domain == "" and node.op_type not in graphs.RANDOM and not graphs.has_subgraphs(node)
            if plain and node.op_type in ("Not", "Identity"):
                number, opposite = self.of(node.inputs[0])
                self._known[node.outputs[0]] = number, opposite != (node.op_type == "Not")
            elif plain:
                reads = [self.of(value) for value in node.inputs]
                told = [ir.serde.serialize_attribute(a).SerializeToString() for _, a in sorted(node.attributes.items())]
                for place, value in enumerate(node.outputs):
                    self._known[value] = self._number((node.op_type, *reads, *told, place)), False


# -- ways --------------------------------------------------------------------------------------------------------------


def ways(
    found: Sequence[Decision],
    there: Collection[str],
    turns: Mapping[str, int] | None = None,
    decided: Mapping[str, Mapping[str, bool]] | None = None,
    paths: Iterable[Mapping[str, bool]] = (),
    limits: Mapping[str, int] | None = None,
) -> list[Way]:
    """The ways to try: every side of every If, each Loop with no, one and the most turns, and all alike.

    What is around a decision is sent so that it is reached. A way that would need one condition to be true and false is
    left out, and so is none twice.

    Args:
        found: The decisions of the network.
        there: The names of those that can be forced in what it is compared with.
        turns: For loops without a constant limit, the most turns to try; default 2.
        decided: Decisions that are there -> those that are gone and went the same way (True) or the opposite one.
        paths: Sides of several Ifs at once, to be tried too.
        limits: Loop -> the most turns of what it is compared with, which may have room for no more.
    """
    together = _Together(found, decided or {})
    targets = [decision for decision in found if decision.name in there]
    made: dict[frozenset[tuple[str, int]], Way] = {}

    def keep(way: Way | None) -> None:
        if way:
            made.setdefault(frozenset(way.items()), way)

    for decision in targets:
        most = decision.limit if decision.limit is not None else (turns or {}).get(decision.name, 2)
        most = min(most, (limits or {}).get(decision.name, most))
        for goes in dict.fromkeys((0, min(1, most), most)) if decision.is_loop else (1, 0):
            keep(_way([*decision.inside, (decision.name, goes)], together, there))
    for path in paths:
        keep(_way([(name, int(side)) for name, side in path.items()], together, there))
    for goes in (1, 0):
        every: Way = {}
        for decision in targets:
            if not decision.is_loop and decision.name not in every:
                every = {**together(decision.name, goes), **every}
        keep(every)
    return list(made.values())


def _way(wanted: Sequence[tuple[str, int]], together: _Together, there: Collection[str]) -> Way | None:
    way: Way = {}
    for name, goes in wanted:
        group = together(name, goes)
        if not any(other in there for other in group):
            continue  # what was taken out is as the values say
        for other, its in group.items():
            if way.setdefault(other, its) != its:
                return None
    return way


class _Together:
    """Where decisions go that go together with one."""

    def __init__(self, found: Sequence[Decision], decided: Mapping[str, Mapping[str, bool]]) -> None:
        self._by_name = {decision.name: decision for decision in found}
        self._decided = decided
        self._alike: dict[int, list[Decision]] = {}
        for decision in found:
            if not decision.is_loop:
                self._alike.setdefault(decision.condition, []).append(decision)

    def __call__(self, name: str, goes: int) -> Way:
        decision = self._by_name.get(name)
        if decision is None or decision.is_loop:
            return {name: goes}
        truth = bool(goes) != decision.opposite
        way = {other.name: int(truth != other.opposite) for other in self._alike[decision.condition]}
        for other, its in list(way.items()):
            for gone, same in self._decided.get(other, {}).items():
                way.setdefault(gone, its if same else 1 - its)
        return way


# -- an ONNX model -----------------------------------------------------------------------------------------------------


def sent(name: str, way: Mapping[str, int], limits: Mapping[str, int] | None = None) -> int:
    """What the input of a decision is on a way; ``limits`` as for `ways`."""
    most = min(FREE_TURNS, (limits or {}).get(name, FREE_TURNS))
    return way.get(name, NATURAL - most if way else NATURAL)


def force(model: ir.Model) -> list[str]:
    """Let further inputs decide which way a model goes: one for each If and Loop, named ``force/NAME``.

    Each is an int64 scalar (`sent` makes it of a way). -1: as the values say. An If: 0 else, 1 then. A Loop: so many
    turns; -1 - n: as the values say, but no more than n turns.

    Args:
        model: Without functions, of opset `OLDEST` or later; changed in place.

    Returns:
        The names of the decisions.
    """
    given: dict[str, ir.Value] = {}
    for graph in list(graphs.nested_graphs(model.graph)):
        for node in list(graph):
            if node.domain == "" and node.op_type in DECISIONS and node.name:
                if node.name not in given:  # passes may have copied a part of a graph, with its decisions
                    kind, scalar = ir.TensorType(ir.DataType.INT64), ir.Shape(())
                    given[node.name] = ir.Value(name=f"{PREFIX}{node.name}", type=kind, shape=scalar)
                (_force_if if node.op_type == "If" else _force_loop)(node, given[node.name])
    model.graph.inputs.extend(given.values())
    graphs.make_names_unique(model)
    return list(given)


class _Writer:
    """Writes nodes before a node, or at the end of a body."""

    def __init__(self, given: ir.Value, graph: ir.Graph, before: ir.Node | None) -> None:
        self._graph, self._before = graph, before
        self._base = given.name

    def op(self, kind: str, *inputs: ir.Value, **attributes: ir.TensorProtocol) -> ir.Value:
        """A new node's output."""
        out = ir.Value(name=f"{self._base}/{kind}")
        given = [ir.AttrTensor(name, tensor) for name, tensor in attributes.items()]
        node = ir.Node("", kind, inputs, given, outputs=[out])
        if self._before is not None:
            self._graph.insert_before(self._before, node)
        else:
            self._graph.append(node)
        return out

    def number(self, value: int) -> ir.Value:
        """A constant."""
        return self.op("Constant", value=ir.tensor(np.array(value, np.int64)))


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _force_if(node: ir.Node, given: ir.Value) -> None:
    write = _Writer(given, _graph_of(node), node)
    condition = node.inputs[0]
    assert condition is not None
    natural = write.op("Less", given, write.number(0))
    sent = write.op("Equal", given, write.number(1))
    node.replace_input_with(0, write.op("Or", write.op("And", natural, condition), sent))


def _force_loop(node: ir.Node, given: ir.Value) -> None:
    write = _Writer(given, _graph_of(node), node)
    trips, condition = [*node.inputs, None, None][:2]
    natural = write.op("Less", given, write.number(0))
    sent = write.op("Not", natural)
    if trips is None:
        trips = write.number(np.iinfo(np.int64).max)
    most = write.op("Sub", write.number(NATURAL), given)
    bounded = write.op("And", write.op("Less", given, write.number(NATURAL)), write.op("Less", most, trips))
    free = write.op("Where", bounded, most, trips)
    inputs = [write.op("Where", sent, given, free), *node.inputs[1:]]
    if condition is not None:
        inputs[1] = write.op("Or", sent, condition)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    body = node.attributes["body"].as_graph()
    inner = _Writer(given, body, None)
    body.outputs[0] = inner.op("Or", sent, body.outputs[0])
    body.outputs[0].type = ir.TensorType(ir.DataType.BOOL)


# -- a bundle ----------------------------------------------------------------------------------------------------------


@dataclass
class Forced:
    """A course that sends decisions where they are told to go, and remembers where they went.

    Attributes:
        way: Where to; others go as the values say.
        sides: Branch -> the sides that it went to.
        turns: Loop -> how often it turned, each number once.
    """

    way: Mapping[str, int] = field(default_factory=dict)
    sides: dict[str, set[bool]] = field(default_factory=dict)
    turns: dict[str, set[int]] = field(default_factory=dict)

    def branch(self, name: str, truth: bool) -> bool:
        goes = bool(self.way[name]) if name in self.way else truth
        self.sides.setdefault(name, set()).add(goes)
        return goes

    def turn(self, name: str, number: int, truth: bool) -> bool:
        free = truth and not (self.way and number >= FREE_TURNS)
        goes = number < self.way[name] if name in self.way else free
        ending.turn(name, goes=goes)
        if not goes:
            self.turns.setdefault(name, set()).add(number)
        return goes

    def run(self, block: str, makes: Sequence[str]) -> None:
        return None
