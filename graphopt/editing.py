"""Edits of a graph outside the pass manager: names, constants, one node in another's place, and what is left over.

Passes change a graph through their context, which keeps account. Builds, bundles and the writing of custom operators
work on a model of their own, and use these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from graphopt import graphs


def fresh(base: str, names: set[str]) -> str:
    """A name that is in use nowhere yet; it is from now on."""
    name, count = base, 0
    while name in names:
        count += 1
        name = f"{base}_{count}"
    names.add(name)
    return name


def add_constant(graph: ir.Graph, tensor: ir.TensorProtocol, base: str, names: set[str]) -> ir.Value:
    """A tensor as a new initializer of a graph."""
    value = ir.Value(
        name=fresh(base, names),
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def insert_named(graph: ir.Graph, before: ir.Node, nodes: Sequence[ir.Node], base: str, names: set[str]) -> None:
    """Put nodes into a graph, they and their results named after what they stand for."""
    for place, node in enumerate(nodes):
        node.name = f"{base}/{node.op_type}_{place}"
        for output in node.outputs:
            output.name = fresh(f"{base}/{node.op_type}", names)
    graph.insert_before(before, nodes)


def take_place(old: ir.Value, new: ir.Value, graph: ir.Graph) -> None:
    """Let all that reads one value read another, which takes its name, the graph's outputs included."""
    for use in tuple(old.uses()):
        use.node.replace_input_with(use.idx, new)
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = new
    new.name, old.name = old.name, new.name


def remove(node: ir.Node) -> list[ir.Value]:
    """Take a node that nobody reads out of its graph, and the constants that only it read.

    Returns:
        The values that it read.
    """
    released = graphs.detach(node)
    if node.graph is not None:
        node.graph.remove(node)
    for value in released:
        if value.is_initializer() and not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            owner = value.graph
            if owner is not None and value.name is not None:
                owner.initializers.pop(value.name, None)
    return released


def sweep(nodes: Iterable[ir.Node]) -> None:
    """Remove those nodes that nobody reads, and the constants and nodes that only they read."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.graph is None or graphs.is_used(node):
            continue
        makers = (value.producer() for value in remove(node))
        waiting.extend(maker for maker in makers if maker is not None)


def read_instead(body: ir.Graph, others: Mapping[ir.Value, ir.Value]) -> None:
    """Let a body, and those in it, read and return other values in the place of some."""
    for inner in graphs.nested_graphs(body):
        for node in inner:
            for index, value in enumerate(node.inputs):
                if value is not None and value in others:
                    node.replace_input_with(index, others[value])
        for index, value in enumerate(inner.outputs):
            if value in others:
                inner.outputs[index] = others[value]
