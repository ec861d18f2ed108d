"""If and Loop whose course is known before anything runs."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shape_values import ShapeValues
from graphopt.shapes import infer_shapes


class RemoveBranches(RulePass):
    """Puts the branch of an If that is always taken in its place, and takes out a Loop that never runs.

    A condition is known where it is a constant, or where it follows from the model's input shapes: whether a tensor
    has a certain rank, whether two axes with one name are equal.
    """

    name = "remove-branches"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="If with a constant condition or one that follows from the shapes of the model's inputs; Loop with no "
        "iterations or a condition that is false at the start",
        refuses="conditions that depend on data or on axes that differ from call to call; a Loop that never runs but "
        "returns what it stacked over iterations; an overridable condition",
        costs="one look at each If and Loop; the nodes of the branch move, the other branch goes",
        source="ONNX operator specification",
    )
    roots = ("If", "Loop")

    def apply(self, ctx: Context) -> None:
        self._values = ShapeValues(ctx.opset)
        before = len(ctx.applications)
        super().apply(ctx)
        if len(ctx.applications) > before:
            infer_shapes(ctx.model)  # what a node had for either branch is known better for the one that stays

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        return self._if(node, ctx) if node.op_type == "If" else self._loop(node, ctx)

    def _truth(self, value: ir.Value | None) -> bool | None:
        known = self._values.constant(value)
        return None if known is None or known.size != 1 else bool(known.reshape(()))

    def _if(self, node: ir.Node, ctx: Context) -> bool:
        condition = self._truth(node.inputs[0])
        if condition is None:
            ctx.refuse(node, "its condition depends on data, or on axes whose sizes are not known")
            return False
        attribute = node.attributes["then_branch" if condition else "else_branch"]
        if attribute.is_ref():
            return False
        branch = attribute.as_graph()
        if any(_is_outer(output, branch) for output in branch.outputs):
            ctx.refuse(node, "its branch returns an outer value as it is, which ONNX does not allow")
            return False
        rule = "constant-condition" if graphs.is_constant(node.inputs[0]) else "shape-condition"
        nodes, results = _copy(branch, ctx)
        outputs = {
            old: new for old, new in zip(node.outputs, results, strict=True) if old.uses() or old.is_graph_output()
        }
        if not outputs:
            return False  # nobody reads it: remove-dead has a name for that
        return ctx.replace(outputs, nodes, rule=rule, certain=True)

    def _loop(self, node: ir.Node, ctx: Context) -> bool:
        count = self._values.constant(node.inputs[0]) if node.inputs[0] is not None else None
        condition = self._truth(node.inputs[1]) if len(node.inputs) > 1 else None
        never = (count is not None and count.size == 1 and int(count.reshape(())) <= 0) or condition is False
        if not never:
            return False
        carried = list(node.inputs[2:])
        outputs: dict[ir.Value, ir.Value] = {}
        for index, output in enumerate(node.outputs):
            if not output.uses() and not output.is_graph_output():
                continue
            start = carried[index] if index < len(carried) else None
            if start is None:
                ctx.refuse(node, "it never runs, but returns what it stacks over its iterations")
                return False
            outputs[output] = start
        return bool(outputs) and ctx.replace(outputs, rule="loop-without-iterations", certain=True)


def _is_outer(value: ir.Value, branch: ir.Graph) -> bool:
    if value.is_initializer() or value.is_graph_input():
        return value.graph is not branch
    producer = value.producer()
    return producer is None or producer.graph is not branch


def _copy(branch: ir.Graph, ctx: Context) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that do what a branch does, in no graph yet, with names that nothing else has.

    The branch itself stays as it is: what watches replacements may still want to run it.
    """
    copy = branch.clone(allow_outer_scope_values=True)
    results = list(copy.outputs)
    copy.outputs.clear()
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
        for output in node.outputs:
            if output.name:
                output.name = ctx.fresh_name(output.name)
        for body in graphs.subgraphs(node):
            for inner_graph in graphs.nested_graphs(body):
                _rename(inner_graph, ctx)
    return nodes, results


def _rename(graph: ir.Graph, ctx: Context) -> None:
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.name:
            value.name = ctx.fresh_name(value.name)
    for value in list(graph.initializers.values()):
        if not value.is_graph_input():
            value.name = ctx.fresh_name(value.name or "constant")
