"""A network with a straight line for a path that inputs often take, and as it was for all others.

Along a path each If is replaced by the side that is taken, so that nothing stands between operators that a runtime
computes better together. One If is left: whether all conditions are what they are on the path. What no decision stands
before is computed once; the rest is there twice, with the same weights.

What the conditions themselves need is computed before it is known that it is wanted. That may be nothing, where a
network says beforehand where it will go, or most of it, where each decision waits for the last one; on another path it
was done for nothing. So it is only for operators that cannot fail on values that they were not meant for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.extracting import copy_node
from graphopt.bundles.total import cannot_fail
from graphopt.editing import fresh
from graphopt.shapes import infer_shapes, trusted_shape

Path = Mapping[str, bool]
"""Name of an If -> whether it goes to ``then``; of each If those around it, too, and none in a Loop or Scan."""

_PURE = frozenset({"", "com.microsoft"})
_OLDEST = 7
"""The first opset in which conditions of different ranks can be put together."""


class Unfit(Exception):
    """A network that cannot have a straight line for a path; says why."""


def specialise(model: ir.Model, paths: Sequence[Path]) -> None:
    """Give a network straight lines for paths, asked for in this order.

    Args:
        model: Without functions, its control flow named (`graphs.name_control_flow`); is changed, and of no further use
            where it is unfit.
        paths: At least one. Ifs of which a path says nothing stay in its line.

    Raises:
        Unfit: Something of it must not be there twice, or must not run where it may not be wanted.
    """
    graph = model.graph
    if graphs.opset(model) < _OLDEST:
        raise Unfit(f"opset {graphs.opset(model)} has no operators to put conditions together")
    graphs.make_names_unique(model)
    infer_shapes(model)
    shared = _before(graph, {name for path in paths for name in path})
    rest = [node for node in graph if node not in shared]
    _refuse_effects(rest)
    outputs = [v for v in dict.fromkeys(graph.outputs) if v.producer() is not None and v.producer() not in shared]
    if not outputs:
        raise Unfit("no output depends on a decision")
    names = {node.name or "" for node in graphs.all_nodes(model)}
    lines = [_Line(path, fresh(f"path {number}", names), names, graph) for number, path in enumerate(paths, 1)]
    for line in lines:
        line.follow(rest)
        if not line.asked:
            raise Unfit("no decision of the path is there")
    graph.remove(rest)
    rest = _recomputed([node for node in graph if node in shared], rest, names) + rest
    given = [*graph.outputs]
    graph.outputs.clear()  # a value is an output of one graph only
    results, nodes = outputs, rest
    for line in reversed(lines):
        nodes, results = line.before(nodes, results, outputs, model.opset_imports)
    graph.extend(nodes)
    become = dict(zip(outputs, results, strict=True))
    graph.outputs.extend(become.get(value, value) for value in given)
    graphs.make_names_unique(model)
    infer_shapes(model)
    for line in lines:
        line.refuse_failures()


def early_decisions(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Of some Ifs those whose conditions are known before any of them has run, in their order in the network."""
    wanted = {*names}
    late = _after(model.graph, wanted)
    found = []
    for node in model.graph:
        condition = node.inputs[0] if node.op_type == "If" and node.name in wanted else None
        if condition is not None and condition.producer() not in late:
            found.append(node.name or "")
    return found


def copy_name(name: str, line: str) -> str:
    """What a node of the network is called in a line; there it is forced as the node itself."""
    return f"{name} on {line}"


def _after(graph: ir.Graph, names: set[str]) -> dict[ir.Node, None]:
    """The nodes of a graph that are, or depend on, the Ifs of these names."""
    found: dict[ir.Node, None] = {}
    for node in graph:
        if (node.op_type == "If" and node.name in names) or any(v.producer() in found for v in graphs.read_by(node)):
            found[node] = None
    return found


def _before(graph: ir.Graph, names: set[str]) -> set[ir.Node]:
    """The nodes of a graph that the conditions of these Ifs need, and that none of them stands before.

    No more than that: a runtime may lay out values as it likes inside a block, and where each addition of a residual
    network has one value from another block it may do so nowhere.
    """
    after = _after(graph, names)
    conditions = (node.inputs[0] for node in graphs.nested_nodes(graph) if node.op_type == "If" and node.name in names)
    waiting = [maker for value in conditions if value is not None and (maker := value.producer()) is not None]
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(maker for value in graphs.read_by(node) if (maker := value.producer()) is not None)
    return {node for node in seen if node.graph is graph and node not in after}


def _recomputed(shared: Sequence[ir.Node], rest: Sequence[ir.Node], names: set[str]) -> list[ir.Node]:
    """Copies of operators that give single numbers, which ``rest`` reads from now on; none where that saves little.

    A decision for each block of a network is one vector, and its conditions are many numbers taken from it. A value
    that is handed from block to block costs about as much as an operator of that kind, on all paths.
    """
    read = {value for node in rest for value in graphs.read_by(node)}
    small = [node for node in shared if cannot_fail(node) and all(_is_single(value) for value in node.outputs)]
    again = _needed(small, read)
    made = {value for node in shared for value in node.outputs}
    before = read & made
    own = {value for node in again for value in node.outputs}
    after = (before | {value for node in again for value in node.inputs if value in made}) - own
    if 2 * len(after) > len(before):
        return []
    copies: dict[ir.Value, ir.Value] = {}
    nodes = [copy_node(node, lambda value: copies.get(value, value), copies) for node in again]
    for node in nodes:
        node.name = fresh(f"{node.name} again", names) if node.name else None
    for node in (inner for outer in rest for inner in _with_inner(outer)):
        for place, value in enumerate(node.inputs):
            if value in own:
                node.replace_input_with(place, copies[value])
    return nodes


def _is_single(value: ir.Value) -> bool:
    shape = trusted_shape(value)
    return shape is not None and all(size == 1 for size in shape)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for body in graphs.subgraphs(node):
        yield from graphs.nested_nodes(body)


def _refuse_effects(nodes: Sequence[ir.Node]) -> None:
    for outer in nodes:
        for node in _with_inner(outer):
            if node.op_type in graphs.RANDOM and node.domain == "":
                raise Unfit(f"{node.op_type} draws random numbers, and would be there twice")
            if node.domain not in _PURE:
                raise Unfit(f"the custom operator {node.op_type} may do more than compute, and would be there twice")


@dataclass
class _Line:
    """What a path comes to, without its Ifs.

    Attributes:
        path: Which.
        name: Of the If that asks for it.
        names: Of all nodes so far.
        graph: Of the network; constants of sides come to stand in it.
        nodes: Copies of those on the path, in their order.
        asked: Conditions, and what they are on the path.
        values: Value of the network -> what it is on the path.
        early: Of the nodes those that the conditions need.
    """

    path: Path
    name: str
    names: set[str]
    graph: ir.Graph
    nodes: list[ir.Node] = field(default_factory=list)
    asked: dict[ir.Value, bool] = field(default_factory=dict)
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    early: list[ir.Node] = field(default_factory=list)

    def follow(self, nodes: Iterable[ir.Node]) -> None:
        """Copy nodes; of an If on the path the side that is taken."""
        for node in nodes:
            side = self.path.get(node.name or "") if node.op_type == "If" else None
            if side is None:
                self.copy(node)
                continue
            assert node.inputs[0] is not None
            condition = self.of(node.inputs[0])
            if self.asked.setdefault(condition, side) != side:
                raise Unfit(f"no input goes this way: '{node.name}' asks what another asks, and goes elsewhere")
            body = node.attributes["then_branch" if side else "else_branch"].as_graph()
            self.follow(body)
            self.values.update((old, self.of(new)) for old, new in zip(node.outputs, body.outputs, strict=True))

    def of(self, value: ir.Value) -> ir.Value:
        """What a value of the network is on the path."""
        if value not in self.values and value.is_initializer() and value.graph is not self.graph:
            name = fresh(copy_name(value.name or "constant", self.name), self.names)
            self.values[value] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self.graph.register_initializer(self.values[value])
        return self.values.get(value, value)

    def copy(self, node: ir.Node) -> None:
        made = copy_node(node, self.of, self.values)
        for other in _with_inner(made):
            if other.name:
                other.name = fresh(copy_name(other.name, self.name), self.names)
        self.nodes.append(made)

    def before(
        self, others: list[ir.Node], results: list[ir.Value], outputs: Sequence[ir.Value], imports: Mapping[str, int]
    ) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes that go this path where an input does, and what stands for the outputs after them.

        Args:
            others, results: What is done on all other paths, and what that gives.
            outputs: Of the network.
            imports: Operator sets.
        """
        self.early = _needed(self.nodes, self.asked)
        own = [self.of(value) for value in outputs]
        early = {*self.early}
        line = [node for node in _needed(self.nodes, own) if node not in early]
        asking, hit = self.hit()
        bodies = [
            ir.AttrGraph(name, _body(nodes, given, name, imports))
            for name, nodes, given in (("then_branch", line, own), ("else_branch", others, results))
        ]
        made = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in outputs]
        told = {graphs.PATH: json.dumps([*self.path.items()])}
        branch = ir.Node("", "If", [hit], bodies, outputs=made, name=self.name, metadata_props=told)
        return [*self.early, *asking, branch], made

    def hit(self) -> tuple[list[ir.Node], ir.Value]:
        """Nodes that say whether all conditions are what they are on the path, and what they say."""
        nodes: list[ir.Node] = []

        def op(kind: str, *inputs: ir.Value) -> ir.Value:
            made = ir.Value(name=f"{self.name}/{kind.lower()}", type=ir.TensorType(ir.DataType.BOOL))
            nodes.append(ir.Node("", kind, inputs, outputs=[made], name=f"{self.name}/{kind}_{len(nodes)}"))
            return made

        # One operator for each condition but one, and one more where some are to be false.
        wanted, unwanted = ([value for value, side in self.asked.items() if side is truth] for truth in (True, False))
        parts = [reduce(partial(op, "And"), wanted)] if wanted else []
        parts += [op("Not", reduce(partial(op, "Or"), unwanted))] if unwanted else []
        hit = reduce(partial(op, "And"), parts)
        if nodes:
            hit.name = f"{self.name}/hit"
        return nodes, hit

    def refuse_failures(self) -> None:
        """Raise `Unfit` where a condition may have several elements, or what it needs may fail on another path."""
        for node in self.early:
            if not cannot_fail(node):
                name = node.name or node.outputs[0].name
                what = f"{node.op_type} '{name}' would run before it is known that it is wanted"
                raise Unfit(f"{what}, and may fail there")
        for condition in self.asked:
            if not _is_single(condition):
                raise Unfit(f"the condition '{condition.name}' is not known to have one element")


def _needed(nodes: Sequence[ir.Node], values: Iterable[ir.Value]) -> list[ir.Node]:
    """Of nodes those that values are computed by, in their order."""
    wanted = {*values}
    found = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            wanted.update(graphs.read_by(node))
            found.append(node)
    return found[::-1]


def _body(nodes: list[ir.Node], results: Sequence[ir.Value], name: str, imports: Mapping[str, int]) -> ir.Graph:
    """A side of an If: it gives values that it makes itself, each once."""
    own = {output for node in nodes for output in node.outputs}
    outputs: list[ir.Value] = []
    for value in results:
        if value not in own or value in outputs:
            made = ir.Value(name=f"{value.name}/same", type=value.type, shape=value.shape)
            nodes = [*nodes, ir.Node("", "Identity", [value], outputs=[made], name=f"{made.name}/identity")]
            value = made
        outputs.append(value)
    return ir.Graph([], outputs, nodes=nodes, opset_imports=dict(imports), name=name)
