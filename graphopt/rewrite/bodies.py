"""Bodies of control flow on their way into another graph: copies whose values have names that nothing else has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import read_instead
from graphopt.rewrite.context import Context


def unpack(
    body: ir.Graph, ctx: Context, *, given: Sequence[ir.Value] = (), instead: Mapping[ir.Value, ir.Value] | None = None
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that do what a body does, in no graph yet, with names that nothing else has.

    The body itself stays as it is: what watches replacements may still want to run it.

    Args:
        body: A branch of an If, or the body of a Loop.
        ctx: Knows the names.
        given: What the nodes read where the body reads its inputs.
        instead: Other values that they read in the place of some of the graphs around.

    Returns:
        The nodes in order, and the values that the body returns.
    """
    copy = body.clone(allow_outer_scope_values=True)
    others = {**dict(instead or {}), **dict(zip(copy.inputs, given, strict=False))}
    results = [others.get(value, value) for value in copy.outputs]
    copy.outputs.clear()
    if others:
        read_instead(copy, others)
    nodes = list(copy)
    for value in list(copy.initializers.values()):
        name = value.name or "constant"
        copy.initializers.pop(name)
        # Constants that only a nested body reads would be overlooked: a node of the branch hands them on.
        inner = [use for use in value.uses() if use.node.graph is not copy]
        if inner:
            carrier = ctx.node("Identity", [value], like=value)
            carrier.outputs[0].name = name
            for use in inner:
                use.node.replace_input_with(use.idx, carrier.outputs[0])
            nodes.insert(0, carrier)
    copy.remove([node for node in nodes if node.graph is copy])
    for node in nodes:
        _rename(node, ctx)
    return nodes, results


def copy_node(node: ir.Node, values: dict[ir.Value, ir.Value], ctx: Context) -> ir.Node:
    """A copy of a node, in no graph yet, with names that nothing else has.

    Args:
        node: Stays as it is.
        values: What the copy reads in the place of what the node reads; the copy's outputs are added.
        ctx: Knows the names.
    """
    attributes = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
            body = attribute.as_graph().clone(allow_outer_scope_values=True)
            read_instead(body, values)
            attribute = ir.AttrGraph(attribute.name, body)
        attributes.append(attribute)
    made = [ir.Value(name=value.name, type=value.type) for value in node.outputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values.get(value, value) for value in node.inputs],
        attributes,
        overload=node.overload,
        outputs=made,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    _rename(copy, ctx)
    values.update(zip(node.outputs, made, strict=True))
    return copy


def graph_of(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], like: ir.Graph) -> ir.Graph:
    """A branch of nodes that are in no graph, named after another one."""
    return ir.Graph([], outputs, nodes=nodes, opset_imports=dict(like.opset_imports), name=like.name)


def returnable(nodes: list[ir.Node], results: list[ir.Value], ctx: Context) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes and results of a branch in which each result is made by a node, and none is returned twice."""
    made = {value for node in nodes for value in node.outputs}
    returned: list[ir.Value] = []
    for value in results:
        if value not in made or value in returned:
            copy = ctx.node("Identity", [value], like=value)
            copy.outputs[0].name = ctx.fresh_name(value.name or "result")
            nodes.append(copy)
            value = copy.outputs[0]
        returned.append(value)
    return nodes, returned


def returns_outer(body: ir.Graph) -> bool:
    """Whether a body returns a value of the graphs around as it is, which ONNX does not allow and some files do."""
    return any(_is_outer(output, body) for output in body.outputs)


def _is_outer(value: ir.Value, body: ir.Graph) -> bool:
    if value.is_initializer() or value.is_graph_input():
        return value.graph is not body
    producer = value.producer()
    return producer is None or producer.graph is not body


def _rename(node: ir.Node, ctx: Context) -> None:
    for output in node.outputs:
        if output.name:
            output.name = ctx.fresh_name(output.name)
    for body in graphs.subgraphs(node):
        for inner in graphs.nested_graphs(body):
            _rename_inside(inner, ctx)


def _rename_inside(graph: ir.Graph, ctx: Context) -> None:
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.name:
            value.name = ctx.fresh_name(value.name)
    for value in list(graph.initializers.values()):
        if not value.is_graph_input():
            value.name = ctx.fresh_name(value.name or "constant")
