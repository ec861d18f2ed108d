"""What the file came with and nobody reads: nodes, constants, optional outputs, functions."""

from __future__ import annotations

from functools import cache, partial

import onnx
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage


class RemoveDead(Pass):
    """Removes nodes and constants that nobody reads, and functions that nobody calls.

    Optional outputs that nobody reads go from the end of a node's outputs. Bodies and functions are cleaned too.
    """

    name = "remove-dead"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="nodes none of whose outputs is read or returned; initializers that nobody reads; functions that "
        "nobody calls; trailing optional outputs that nobody reads (the mask of Dropout, the indices of MaxPool)",
        refuses="initializers that are inputs too (a caller may give them); inputs and outputs of the model; values "
        "that a Loop or Scan carries",
        costs="one look at each node; less to compute and to store",
        source="ONNX IR specification",
    )

    def apply(self, ctx: Context) -> None:
        self._remove_functions(ctx)
        for graph in list(ctx.graphs()):
            # From the end: what only dead nodes read is dead when its turn comes.
            for node in reversed(list(graph)):
                if node.graph is None:  # went with another
                    continue
                if not graphs.is_used(node):
                    ctx.remove(
                        _first_name(node), partial(ctx.remove_dead, [node]), rule="node", sources=[node.name or ""]
                    )
                elif len(node.outputs) > 1:
                    self._trim_outputs(node, ctx)
            for value in list(graph.initializers.values()):
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    ctx.remove(value.name or "", partial(graph.initializers.pop, value.name or ""), rule="initializer")

    def _trim_outputs(self, node: ir.Node, ctx: Context) -> None:
        required = required_outputs(node.domain, node.op_type, ctx.opset) if node.domain == "" else None
        if required is None:
            return
        count = len(node.outputs)
        while count > required and not _is_read(node.outputs[count - 1]):
            count -= 1
        if count < len(node.outputs):
            ctx.remove(_first_name(node), partial(node.resize_outputs, count), rule="output")

    def _remove_functions(self, ctx: Context) -> None:
        functions = ctx.model.functions
        if not functions:
            return
        called: set[ir.OperatorIdentifier] = set()
        pending = [node for graph in graphs.nested_graphs(ctx.model.graph) for node in graph]
        while pending:
            identifier = pending.pop().op_identifier()
            if identifier in functions and identifier not in called:
                called.add(identifier)
                pending.extend(n for g in graphs.nested_graphs(functions[identifier].graph) for n in g)
        for identifier in [i for i in functions if i not in called]:
            ctx.remove(
                "::".join(part for part in identifier if part), partial(functions.pop, identifier), rule="function"
            )


def _first_name(node: ir.Node) -> str:
    return next((output.name for output in node.outputs if output.name), node.name or node.op_type)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


@cache
def required_outputs(domain: str, op_type: str, opset: int) -> int | None:
    """How many outputs a standard operator must have, None where that is not known or not fixed."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
    options = [output.option for output in schema.outputs]
    if onnx.defs.OpSchema.FormalParameterOption.Variadic in options:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    # An operator may run without any output that counts as optional, but a node without outputs is no node.
    return max((i + 1 for i, option in enumerate(options) if option == single), default=1)
