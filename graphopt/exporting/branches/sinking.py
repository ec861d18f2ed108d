"""Marker nodes to If and Loop: each node goes into the innermost branch or body that contains all its uses.

What only one side of a Select uses runs only when that side is taken; what a turn of a Loop computes from nothing
that changes runs once before it. All nodes here are pure, so where they stand does not change what they give.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.exporting.branches.markers import DOMAIN
from graphopt.exporting.branches.places import Place
from graphopt.exporting.branches.trips import COUNTED

Region = tuple["Unit", str] | None  # a unit and its "then", "else" or "body"; None: the graph itself


@dataclass(eq=False)
class Unit:
    """What is placed as one: a node, the Selects of one join, or a loop.

    Attributes:
        kind: The marker's op type ("Select", "LoopState", "LoopBegin", "LoopTurn"), or "" for an ordinary node.
        nodes: The node, or the Selects, or the LoopState and its LoopResults.
        index: Its place in the order of the graph.
        region: Where it goes.
    """

    kind: str
    nodes: list[ir.Node]
    index: int = 0
    region: Region = None
    placed: bool = False
    uses: list[Region] = field(default_factory=list)

    @property
    def number(self) -> int:
        return _number(self.nodes[0])


@dataclass
class LoopParts:
    """The pieces of one loop, those that nothing needs left out."""

    state: ir.Node
    first: ir.Value
    again: ir.Value
    initials: list[ir.Value]
    news: list[ir.Value]
    begins: list[ir.Value]
    each: list[ir.Value]
    results: list[ir.Value | None]  # of the carried ones, then of the stacked ones
    trips: int


def sink(model: ir.Model, places: Mapping[tuple[str, int], Place]) -> None:
    """Make Ifs and Loops of the markers in ``model``, in place. Decide nodes stay, as ordinary nodes.

    Args:
        model: With markers, functions inlined; no node of it but those may hold graphs of another's markers.
        places: ("If", join) or ("Loop", loop) → the line of the user's code that it comes from.
    """
    _Sinking(model.graph, places).run()
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[DOMAIN] = 1  # of the Decide nodes


def _number(node: ir.Node) -> int:
    return node.attributes["number"].as_int()


class _Sinking:
    def __init__(self, graph: ir.Graph, places: Mapping[tuple[str, int], Place]) -> None:
        self.graph, self.places = graph, places
        self.nodes = list(graph)
        self.names: dict[str, int] = defaultdict(int)
        self.results: dict[ir.Node, dict[int, ir.Value]] = defaultdict(dict)
        self.states: dict[int, ir.Node] = {}
        for node in self.nodes:
            if _kind(node) == "LoopState":
                self.states[_number(node)] = node
            if _kind(node) == "LoopResult":
                self.results[_producer(node.inputs[0])][_number(node)] = node.outputs[0]
        self.parts: dict[ir.Node, LoopParts] = {}
        self.replaced: dict[ir.Value, ir.Value] = {}  # what a marker gave → what gives it now

    def run(self) -> None:
        live = self.live_nodes()
        units = self.units(live)
        self.owner = {value: unit for unit in units for node in unit.nodes for value in node.outputs}
        ordered = self.in_order(units)
        self.inside = self.loops_inside(ordered)
        self.place(ordered)
        self.by_region: dict[Region, list[Unit]] = defaultdict(list)
        for unit in ordered:
            if unit.placed:
                self.by_region[unit.region].append(unit)
        outputs, names = list(self.graph.outputs), [value.name for value in self.graph.outputs]
        self.graph.outputs.clear()
        for node in self.nodes:
            self.graph.remove(node)
        nodes, given = self.built(None, outputs)
        self.graph.extend(nodes)
        self.graph.outputs.extend(given)
        for value, name in zip(given, names, strict=True):
            value.name = name
        for node in self.nodes:
            if node.graph is None:  # a marker, or dead: it uses nothing any more
                for position in range(len(node.inputs)):
                    node.replace_input_with(position, None)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    # What is needed.

    def live_nodes(self) -> set[ir.Node]:
        """The nodes that the outputs depend on; of a loop, only the variables that something reads."""
        live: set[ir.Node] = set()
        needed: dict[ir.Node, set[int]] = defaultdict(set)
        todo: list[ir.Value | None] = list(self.graph.outputs)
        while todo:
            value = todo.pop()
            node = value.producer() if value is not None else None
            if node is None or node in live:
                continue
            live.add(node)
            if _kind(node) == "LoopResult":
                state = _producer(node.inputs[0])
                todo.extend(self.need(state, _number(node), needed, live))
            elif _kind(node) == "LoopBegin":
                state = self.states[_number(node)]
                begins = _split(state)[2]
                todo.extend(self.need(state, begins.index(node.outputs[0]), needed, live))
            elif _kind(node) == "LoopTurn":
                todo.append(node.inputs[0])
            else:
                todo.extend(node.inputs)
                for attribute in node.attributes.values():
                    todo.extend(_captured(attribute))
        for state, indices in needed.items():
            self.parts[state] = self.loop_parts(state, sorted(indices))
        return live

    def need(
        self, state: ir.Node, index: int, needed: dict[ir.Node, set[int]], live: set[ir.Node]
    ) -> list[ir.Value | None]:
        """What result ``index`` of the loop needs."""
        first, again = state.inputs[0], state.inputs[1]
        initials, news, begins, each = _split(state)
        needed[state].add(index)
        live.add(state)
        if index >= len(news):
            return [first, again, *_count(state), each[index - len(news)]]
        begin = _producer(begins[index])
        live.add(begin)
        return [first, again, *_count(state), initials[index], news[index]]

    def loop_parts(self, state: ir.Node, indices: list[int]) -> LoopParts:
        initials, news, begins, each = _split(state)
        carried = [index for index in indices if index < len(news)]
        stacked = [index for index in indices if index >= len(news)]
        results = self.results[state]
        first, again = state.inputs[0], state.inputs[1]
        assert first is not None and again is not None
        return LoopParts(
            state=state,
            first=first,
            again=again,
            initials=[initials[index] for index in carried],
            news=[news[index] for index in carried],
            begins=[begins[index] for index in carried],
            each=[each[index - len(news)] for index in stacked],
            results=[results.get(index) for index in [*carried, *stacked]],
            trips=state.attributes["trips"].as_int(),
        )

    # Units, in an order in which each comes after what it reads.

    def units(self, live: set[ir.Node]) -> list[Unit]:
        joins: dict[tuple[int, ir.Value | None], Unit] = {}
        loops: dict[ir.Node, Unit] = {}
        units: list[Unit] = []
        for node in self.nodes:
            kind = _kind(node)
            if node not in live:
                continue
            if kind == "Select":
                key = (_number(node), node.inputs[0])
                if key in joins:
                    joins[key].nodes.append(node)
                    continue
                unit = joins[key] = Unit(kind, [node])
            elif kind == "LoopResult":
                loops[_producer(node.inputs[0])].nodes.append(node)
                continue
            else:
                unit = Unit(kind if kind != "Decide" else "", [node])
                if kind == "LoopState":
                    loops[node] = unit
            unit.index = len(units)
            units.append(unit)
        self.loop_units = {unit.number: unit for unit in loops.values()}
        return units

    def reads(self, unit: Unit) -> list[ir.Value]:
        """All values that ``unit`` depends on, the bodies of a loop's variables included."""
        if unit.kind == "LoopState":
            parts = self.parts[unit.nodes[0]]
            return [parts.first, parts.again, *_count(parts.state), *parts.initials, *parts.news, *parts.each]
        values = [value for node in unit.nodes for value in node.inputs if value is not None]
        for node in unit.nodes:
            for attribute in node.attributes.values():
                values.extend(_captured(attribute))
        return values

    def in_order(self, units: list[Unit]) -> list[Unit]:
        followers: dict[Unit, set[Unit]] = defaultdict(set)
        waits: dict[Unit, int] = {}
        for unit in units:
            before = {self.owner[value] for value in self.reads(unit) if value in self.owner} - {unit}
            waits[unit] = len(before)
            for other in before:
                followers[other].add(unit)
        ready = [(unit.index, unit) for unit in units if not waits[unit]]
        heapq.heapify(ready)
        ordered = []
        while ready:
            _, unit = heapq.heappop(ready)
            ordered.append(unit)
            for follower in followers[unit]:
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(ready, (follower.index, follower))
        assert len(ordered) == len(units), "the markers form a cycle"
        return ordered

    def loops_inside(self, ordered: list[Unit]) -> dict[Unit, set[int]]:
        """The loops whose turn each unit depends on."""
        inside: dict[Unit, set[int]] = {}
        for unit in ordered:
            loops: set[int] = set()
            for value in self.reads(unit):
                if value in self.owner and self.owner[value] is not unit:
                    loops |= inside[self.owner[value]]
            if unit.kind in ("LoopBegin", "LoopTurn"):
                loops |= {unit.number}
            if unit.kind == "LoopState":
                loops -= {unit.number}
            inside[unit] = loops
        return inside

    # Where each unit goes.

    def place(self, ordered: list[Unit]) -> None:
        for value in self.graph.outputs:
            self.use(value, None)
        for unit in reversed(ordered):
            if unit.kind in ("LoopBegin", "LoopTurn"):
                loop = self.loop_units[unit.number]
                unit.region, unit.placed = (loop, "body"), True
                continue
            if not unit.uses:
                continue
            unit.region, unit.placed = self.hoisted(unit, self.innermost(unit.uses)), True
            self.pass_on(unit)

    def use(self, value: ir.Value | None, region: Region) -> None:
        if value is not None and value in self.owner:
            self.owner[value].uses.append(region)

    def pass_on(self, unit: Unit) -> None:
        """Note where what ``unit`` reads is used."""
        if unit.kind == "Select":
            for node in unit.nodes:
                self.use(node.inputs[0], unit.region)
                self.use(node.inputs[1], (unit, "then"))
                self.use(node.inputs[2], (unit, "else"))
        elif unit.kind == "LoopState":
            parts = self.parts[unit.nodes[0]]
            for value in [parts.first, *_count(parts.state), *parts.initials]:
                self.use(value, unit.region)
            for value in [parts.again, *parts.news, *parts.each]:
                self.use(value, (unit, "body"))
        else:
            for value in self.reads(unit):
                self.use(value, unit.region)

    def chain(self, region: Region) -> list[Region]:
        """The regions around ``region``, the graph first, itself last."""
        chain: list[Region] = [region]
        while region is not None:
            region = region[0].region
            chain.append(region)
        return chain[::-1]

    def innermost(self, regions: list[Region]) -> Region:
        """The innermost region that contains all of ``regions``."""
        chains = [self.chain(region) for region in regions]
        common: Region = None
        for level in zip(*chains, strict=False):
            if any(region != level[0] for region in level):
                break
            common = level[0]
        return common

    def hoisted(self, unit: Unit, region: Region) -> Region:
        """``region``, or the one around the loops right around it whose turns ``unit`` does not depend on.

        A loop stays where it is, and so does what stands in a branch: run where Python would not have run it, it might
        not end, or read out of range.
        """
        if unit.kind == "LoopState":
            return region
        while region is not None and region[1] == "body" and region[0].number not in self.inside[unit]:
            region = region[0].region
        return region

    # Graphs.

    def built(self, region: Region, outputs: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """The nodes of ``region``, and ``outputs`` as values that it makes itself, each once."""
        nodes: list[ir.Node] = []
        for unit in self.by_region[region]:
            if unit.kind == "Select":
                nodes.append(self.conditional(unit))
            elif unit.kind == "LoopState":
                nodes.append(self.loop(unit))
            elif not unit.kind:
                nodes.append(unit.nodes[0])
        made = {value for node in nodes for value in node.outputs}
        given: list[ir.Value] = []
        for value in outputs:
            value = self.now(value)
            if value not in made or value in given:
                node = ir.Node("", "Identity", [value])
                node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
                node.outputs[0].name = f"{value.name}_given_{self.next_number()}"
                nodes.append(node)
                value = node.outputs[0]
            given.append(value)
        return nodes, given

    def now(self, value: ir.Value) -> ir.Value:
        """The value that stands for ``value``, which a marker may have given."""
        while value in self.replaced:
            value = self.replaced[value]
        return value

    def next_number(self) -> int:
        self.names[""] += 1
        return self.names[""]

    def named(self, op_type: str, number: int) -> str:
        """The node's name, from the line that it comes from; the second of a name gets ``_2``."""
        place = self.places.get((op_type, number))
        name = place.node_name(op_type) if place is not None else f"{op_type}_{number}"
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"

    def graph_of(self, name: str, region: Region, outputs: list[ir.Value], inputs: list[ir.Value]) -> ir.Graph:
        nodes, given = self.built(region, outputs)
        return ir.Graph(inputs, given, nodes=nodes, name=name)

    def conditional(self, unit: Unit) -> ir.Node:
        name = self.named("If", unit.number)
        sides = {
            "then_branch": self.graph_of(f"{name}_then", (unit, "then"), [_read(n, 1) for n in unit.nodes], []),
            "else_branch": self.graph_of(f"{name}_else", (unit, "else"), [_read(n, 2) for n in unit.nodes], []),
        }
        return self.standing_for("If", name, [unit.nodes[0].inputs[0]], sides, [n.outputs[0] for n in unit.nodes])

    def loop(self, unit: Unit) -> ir.Node:
        parts = self.parts[unit.nodes[0]]
        name = self.named("Loop", unit.number)
        turn = ir.Value(name=f"{name}_turn", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        going = ir.Value(name=f"{name}_going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        inputs = [turn, going]
        for begin in parts.begins:
            value = ir.Value(name=f"{begin.name}_in", type=begin.type, shape=begin.shape)
            inputs.append(value)
            self.replace(begin, value)
        for node in self.nodes:
            if _kind(node) == "LoopTurn" and _number(node) == unit.number:
                self.replace(node.outputs[0], turn)
        outputs = [parts.again, *parts.news, *parts.each]
        body = self.graph_of(f"{name}_body", (unit, "body"), outputs, inputs)
        nodes: list[ir.Value | None] = [self.trips(parts, name), parts.first, *parts.initials]
        node = self.standing_for("Loop", name, nodes, {"body": body}, parts.results)
        if _count(parts.state):
            node.metadata_props[COUNTED] = "by a tensor"
        return node

    def trips(self, parts: LoopParts, name: str) -> ir.Value | None:
        for count in _count(parts.state):
            return count
        if parts.trips < 0:
            return None
        value = ir.Value(
            name=f"{name}_trips",
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([]),
            const_value=ir.tensor(parts.trips, dtype=ir.DataType.INT64, name=f"{name}_trips"),
        )
        self.graph.register_initializer(value)
        return value

    def standing_for(
        self,
        op_type: str,
        name: str,
        inputs: list[ir.Value | None],
        graphs: Mapping[str, ir.Graph],
        results: list[ir.Value] | list[ir.Value | None],
    ) -> ir.Node:
        """A node that gives ``results`` in place of the markers that gave them."""
        attributes = [ir.AttrGraph(key, graph) for key, graph in graphs.items()]
        current = [None if value is None else self.now(value) for value in inputs]
        node = ir.Node("", op_type, current, attributes, num_outputs=len(results), name=name)
        for index, (output, result) in enumerate(zip(node.outputs, results, strict=True)):
            if result is None:
                output.name = f"{name}_unread_{index}"
                continue
            output.name, output.type, output.shape = result.name, result.type, result.shape
            self.replace(result, output)
        return node

    def replace(self, value: ir.Value, by: ir.Value) -> None:
        self.replaced[value] = by
        value.replace_all_uses_with(by)


def _kind(node: ir.Node) -> str:
    return node.op_type if node.domain == DOMAIN else ""


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def _read(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _split(state: ir.Node) -> tuple[list[ir.Value], list[ir.Value], list[ir.Value], list[ir.Value]]:
    """The initial values, the new ones, the markers and what is stacked, of a LoopState."""
    values = [value for value in state.inputs[2:] if value is not None]
    count = state.attributes["carried"].as_int()
    end = len(values) - state.attributes["counted"].as_int()
    return values[:count], values[count : 2 * count], values[2 * count : 3 * count], values[3 * count : end]


def _count(state: ir.Node) -> list[ir.Value]:
    """How often a loop turns, where a tensor tells that: one value or none."""
    last = state.inputs[-1]
    return [last] if state.attributes["counted"].as_int() and last is not None else []


def _captured(attribute: ir.Attr) -> list[ir.Value]:
    """What graphs in ``attribute`` read from outside."""
    graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
    found = []
    for graph in graphs:
        own = {value for node in graph.all_nodes() for value in node.outputs} | set(graph.inputs)
        own |= {
            value
            for node in graph.all_nodes()
            for a in node.attributes.values()
            if a.type == ir.AttributeType.GRAPH
            for value in a.as_graph().inputs
        }
        found += [v for node in graph.all_nodes() for v in node.inputs if v is not None and v not in own]
        found += [value for value in graph.outputs if value not in own]
    return found
