"""T0: after a pass the graph is still a graph, the interface still the same. Linear in nodes, reads no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import graphs


@dataclass(frozen=True)
class Port:
    """One input or output of a model: name, type and shape as text, so that two models can be compared."""

    name: str
    type: str
    shape: str


@dataclass(frozen=True)
class Interface:
    """What a caller sees of a model."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def interface_of(model: ir.Model) -> Interface:
    """The interface of a model: names, types and shapes, in order."""
    return Interface(
        tuple(_port(value) for value in model.graph.inputs),
        tuple(_port(value) for value in model.graph.outputs),
    )


def differences(expected: Interface, found: Interface) -> list[str]:
    """What differs between two interfaces, one line each; empty where they are the same."""
    lines: list[str] = []
    for side, before, after in (
        ("input", expected.inputs, found.inputs),
        ("output", expected.outputs, found.outputs),
    ):
        if [p.name for p in before] != [p.name for p in after]:
            lines.append(f"{side}s were {[p.name for p in before]}, are {[p.name for p in after]}")
            continue
        lines.extend(
            f"{side} {a.name} was {a.type}{a.shape}, is {b.type}{b.shape}"
            for a, b in zip(before, after, strict=True)
            if a != b
        )
    return lines


def check_structure(model: ir.Model, expected: Interface | None = None) -> list[str]:
    """Everything that is wrong with a model's structure, one line each.

    Checked: every input of a node is visible, has a name and is produced before it, names are unique in their scope
    and those around it, domains are imported, outputs exist, constants have a tensor, and (where ``expected`` is given)
    the interface is unchanged.
    """
    problems: list[str] = []
    _check_graph(model.graph, model.opset_imports, (), problems)
    for function in model.functions.values():
        _check_graph(function.graph, function.opset_imports, (), problems)
    if expected is not None:
        problems.extend(differences(expected, interface_of(model)))
    return problems


def sort_if_needed(model: ir.Model) -> None:
    """Put nodes in topological order where a pass left them out of order; leave an ordered graph untouched."""
    if any(not _ordered(graph) for graph in graphs.all_graphs(model)):
        model.graph.sort()
        for function in model.functions.values():
            function.graph.sort()


def _ordered(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        for value in graphs.read_by(node):
            producer = value.producer()
            if producer is not None and producer not in seen and producer.graph is graph:
                return False
        seen.add(node)
    return True


def _check_graph(
    graph: ir.Graph,
    imports: Mapping[str, int],
    outer: Sequence[tuple[set[ir.Value], set[str]]],
    problems: list[str],
) -> None:
    visible: set[ir.Value] = set(graph.inputs)
    visible.update(graph.initializers.values())
    names: set[str] = set()
    for value in visible:
        _take_name(value, f"graph {graph.name}", names, outer, problems)
    problems.extend(
        f"initializer {name} has no tensor" for name, value in graph.initializers.items() if value.const_value is None
    )
    scopes = [*outer, (visible, names)]
    for node in graph:
        for read in node.inputs:
            if read is None:
                continue
            if read not in visible and not any(read in seen for seen, _ in outer):
                problems.append(f"{_label(node)} reads {read.name}, which nothing before it produces")
            elif not read.name:
                problems.append(f"{_label(node)} reads a value that has no name")
        if node.domain and node.domain not in imports:
            problems.append(f"{_label(node)} is of domain {node.domain}, which is not imported")
        for body in graphs.subgraphs(node):
            _check_graph(body, imports, scopes, problems)
        for value in node.outputs:
            _take_name(value, _label(node), names, outer, problems)
            visible.add(value)
    problems.extend(
        f"output {value.name} of graph {graph.name} is not produced"
        for value in graph.outputs
        if value not in visible and not any(value in seen for seen, _ in outer)
    )


def _take_name(
    value: ir.Value,
    who: str,
    names: set[str],
    outer: Sequence[tuple[set[ir.Value], set[str]]],
    problems: list[str],
) -> None:
    if value.name:
        if value.name in names or any(value.name in taken for _, taken in outer):
            problems.append(f"{who} produces {value.name}, which exists already")
        names.add(value.name)


def _label(node: ir.Node) -> str:
    return f"{node.op_type} {node.name}" if node.name else node.op_type


def _port(value: ir.Value) -> Port:
    return Port(value.name or "", str(value.type), "" if value.shape is None else str(value.shape))
