"""Calls of model-local functions become the nodes of the functions."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, Stage
from graphopt.rewrite.contract import ForeignPass

KEPT_DOMAIN = "graphopt"
"""Functions of this domain are the meaning of custom operators, and stay."""


class InlineFunctions(ForeignPass):
    """Replaces every call of a model-local function by the function's nodes, in bodies and other functions too."""

    name = "inline-functions"
    kind = Kind.BITWISE
    stage = Stage.IMPORT
    explanation = Explanation(
        matches="nodes that call a function which the model carries",
        refuses="functions of the domain graphopt, which say what custom operators mean; functions that call each "
        "other in a circle, take a body as an attribute, or import an operator set in which one of their operators "
        "means something else than in the model's",
        costs="a copy of the function's nodes for each call; later passes see into it",
        source="ONNX IR specification, model-local functions",
    )

    def rewrite_model(self, ctx: Context) -> bool:
        from onnx_ir.passes.common import InlinePass

        model = ctx.model
        chosen = {key for key, function in model.functions.items() if _may_inline(function, ctx)}
        circles = _in_circles(model)
        chosen -= circles
        calls = [node for node in graphs.all_nodes(model) if node.op_identifier() in chosen]
        for node in calls:
            function = model.functions[node.op_identifier()]
            if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
                ctx.refuse(node, f"the call does not fit function {function.name}")
                chosen.discard(node.op_identifier())
            elif any(a.type in graphs.GRAPH_ATTRIBUTES for a in node.attributes.values()):
                ctx.refuse(node, f"function {function.name} takes a body as an attribute")
                chosen.discard(node.op_identifier())
        if not any(node.op_identifier() in chosen for node in calls):
            return False
        for node in calls:
            # The inliner wants as many outputs as the function has.
            if node.op_identifier() in chosen:
                node.resize_outputs(len(model.functions[node.op_identifier()].outputs))
        for key in chosen:
            function = model.functions[key]
            for domain in function.opset_imports:
                if domain in model.opset_imports:
                    function.opset_imports[domain] = model.opset_imports[domain]
            _separate_outputs(function)
        # It gives up on a model with a circle anywhere.
        away = {key: model.functions.pop(key) for key in circles}
        InlinePass(criteria=lambda function: function.identifier() in chosen)(model)
        model.functions.update(away)
        _make_names_unique(ctx)
        return True


def _may_inline(function: ir.Function, ctx: Context) -> bool:
    if function.domain == KEPT_DOMAIN:
        return False
    for domain, version in function.opset_imports.items():
        imported = ctx.model.opset_imports.get(domain, version)
        if imported == version:
            continue
        for graph in graphs.nested_graphs(function.graph):
            for node in graph:
                if node.domain == domain and not _same_version(node, version, imported):
                    ctx.refuse(node, f"{node.op_type} of opset {version} means something else in opset {imported}")
                    return False
    return True


def _same_version(node: ir.Node, one: int, other: int) -> bool:
    """Whether an operator is the same in two versions of its operator set."""
    try:
        first = onnx.defs.get_schema(node.op_type, one, node.domain)
        second = onnx.defs.get_schema(node.op_type, other, node.domain)
    except onnx.defs.SchemaError:
        return False
    return bool(first.since_version == second.since_version)


def _in_circles(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """The functions that reach themselves, and those that reach one of these."""
    calls = {
        key: {node.op_identifier() for graph in graphs.nested_graphs(function.graph) for node in graph}
        & model.functions.keys()
        for key, function in model.functions.items()
    }
    # Take away functions whose callees are all away; what stays is a circle or above one.
    waiting = dict(calls)
    while ready := [key for key, callees in waiting.items() if not callees & waiting.keys()]:
        for key in ready:
            del waiting[key]
    return set(waiting)


def _separate_outputs(function: ir.Function) -> None:
    """Let every output of a function have a node of its own.

    The inliner gives the caller's names to what a function returns: an input of the function that it returns as it is,
    or a value that it returns twice, would lose its own.
    """
    seen: set[ir.Value] = set()
    for index, value in enumerate(list(function.outputs)):
        producer = value.producer()
        if producer is None or value in seen:
            copy = ir.Node("", "Identity", [value], outputs=[ir.Value(name=f"{value.name}_{index}")])
            function.append(copy)
            function.outputs[index] = copy.outputs[0]
        seen.add(value)


def _make_names_unique(ctx: Context) -> None:
    """Give a value that shares its name with another one a new name; inputs and outputs of the model keep theirs."""
    pinned = {*ctx.model.graph.inputs, *ctx.model.graph.outputs}
    taken = {value.name for value in pinned}
    later: list[ir.Value] = []
    for value in _values(ctx.model.graph):
        if value in pinned:
            continue
        if value.name in taken:
            later.append(value)
        taken.add(value.name)
    suffixes: dict[str, int] = {}
    for value in later:
        base = value.name or "value"
        count = suffixes.get(base, 0) + 1
        while f"{base}_{count}" in taken:
            count += 1
        suffixes[base] = count
        value.name = f"{base}_{count}"
        taken.add(value.name)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that a graph and its bodies define and that has a name."""
    for inner in graphs.nested_graphs(graph):
        values = [*inner.inputs, *inner.initializers.values(), *(o for node in inner for o in node.outputs)]
        yield from dict.fromkeys(value for value in values if value.name)
