"""Functions of a model written out at their calls, minding what onnx_ir's inliner does not."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput

Refuse = Callable[[ir.Node, str], None]


def inline_all(model: ir.Model) -> bool:
    """Replace every call of every function by the function's nodes, in place; the functions go.

    Returns:
        Whether there were functions.

    Raises:
        BadInput: A call does not fit its function or gives it a body; a function calls itself, or has an operator
            that means something else in the operator set of the model.
    """
    if not model.functions:
        return False

    def refuse(node: ir.Node, reason: str) -> None:
        raise BadInput(reason, where=f"node {node.name!r}" if node.name else f"a node of type {node.op_type}")

    circles = functions_in_circles(model)
    if circles:
        raise BadInput("calls itself", where=f"function {model.functions[min(circles)].name}")
    inline(model, set(model.functions), refuse)
    model.functions.clear()  # nobody calls those that are left
    graphs.make_names_unique(model)
    return True


def inline(model: ir.Model, functions: Collection[ir.OperatorIdentifier], refuse: Refuse) -> bool:
    """Replace the calls of some functions by the functions' nodes, in place; functions written out everywhere go.

    Args:
        model: In bodies and other functions, too.
        functions: Which. Those that call each other in a circle stay.
        refuse: Is told of nodes for which a function stays: a call that does not fit, or a node of the function that
            would change its meaning.

    Returns:
        Whether there was such a call.
    """
    from onnx_ir.passes.common import InlinePass

    circles = functions_in_circles(model)
    chosen = {key for key in functions if key not in circles and _fits(model.functions[key], model, refuse)}
    calls = [node for node in graphs.all_nodes(model) if node.op_identifier() in chosen]
    for node in calls:
        function = model.functions[node.op_identifier()]
        if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
            refuse(node, f"the call does not fit the function {function.name}")
            chosen.discard(node.op_identifier())
        elif any(attribute.type in graphs.GRAPH_ATTRIBUTES for attribute in node.attributes.values()):
            refuse(node, f"the function {function.name} takes a body as an attribute")
            chosen.discard(node.op_identifier())
    if not any(node.op_identifier() in chosen for node in calls):
        return False
    for node in calls:
        # The inliner wants as many outputs as the function has.
        if node.op_identifier() in chosen:
            node.resize_outputs(len(model.functions[node.op_identifier()].outputs))
    for key in chosen:
        function = model.functions[key]
        for domain, version in function.opset_imports.items():
            function.opset_imports[domain] = model.opset_imports.setdefault(domain, version)
        _separate_outputs(function)
    # It gives up on a model with a circle anywhere.
    away = {key: model.functions.pop(key) for key in circles}
    InlinePass(criteria=lambda function: function.identifier() in chosen)(model)
    model.functions.update(away)
    graphs.make_names_unique(model)
    return True


def functions_in_circles(model: ir.Model) -> set[ir.OperatorIdentifier]:
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


def _fits(function: ir.Function, model: ir.Model, refuse: Refuse) -> bool:
    """Whether a function's operators mean the same in the operator sets of the model."""
    for domain, version in function.opset_imports.items():
        imported = model.opset_imports.get(domain, version)
        if imported == version:
            continue
        for node in graphs.nested_nodes(function.graph):
            if node.domain == domain and not _same_version(node, version, imported):
                refuse(node, f"{node.op_type} of opset {version} means something else in opset {imported}")
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


def _separate_outputs(function: ir.Function) -> None:
    """Let every output of a function have a node of its own.

    The inliner gives the caller's names to what a function returns: an input of the function that it returns as it is,
    or a value that it returns twice, would lose its own.
    """
    seen: set[ir.Value] = set()
    for index, value in enumerate(list(function.outputs)):
        if value.producer() is None or value in seen:
            copy = ir.Node("", "Identity", [value], outputs=[ir.Value(name=f"{value.name}_{index}")])
            function.append(copy)
            function.outputs[index] = copy.outputs[0]
        seen.add(value)
