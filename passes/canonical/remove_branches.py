"""If and Loop whose course is known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.rewrite.bodies import returns_outer, unpack
from graphopt.shape_values import ShapeValues
from graphopt.shapes import infer_shapes, trusted_shape

# So many Ifs are put to the question what would follow from the other branch: each takes inferences of the model.
_MOST_ASSUMED = 8
_ROUNDS = 4
# The ranks that operators insist on.
_RANKS = {"LSTM": 3, "GRU": 3, "RNN": 3, "Gemm": 2}


class RemoveBranches(RulePass):
    """Puts the branch of an If that is always taken in its place, and takes out Loops of no turn or of one.

    A condition is known where it is a constant, or where it follows from the model's input shapes: whether a tensor
    has a certain rank, whether two axes with one name are equal. PyTorch's squeeze (is the axis one? then Squeeze, else
    nothing) is a Squeeze where the values that follow would otherwise have a rank that an operator does not take.
    """

    name = "remove-branches"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="If with a constant condition or one that follows from the shapes of the model's inputs; If that "
        "squeezes an axis where it is one, before LSTM, GRU, RNN, Gemm or Conv that fail where it is not; Loop with no "
        "iterations or a condition that is false at the start; Loop of one turn: by its count, or since its condition "
        "is false after the first",
        refuses="conditions that depend on data or on axes that differ from call to call; a Loop that never runs but "
        "returns what it stacked over iterations; a Loop of at most one turn whose condition is not known; an "
        "overridable condition",
        costs="one look at each If and Loop; the nodes of the branch move, the other branch goes. Where an axis is "
        f"squeezed, shape inference of a copy of the model, at most {_MOST_ASSUMED} times",
        source="ONNX operator specification",
    )
    roots = ("If", "Loop")

    def __init__(self, parameters: Mapping[str, object] | None = None) -> None:
        super().__init__(parameters)
        self._left = _MOST_ASSUMED

    def apply(self, ctx: Context) -> None:
        self._values = ShapeValues(ctx.opset)
        before = len(ctx.applications)
        super().apply(ctx)
        if len(ctx.applications) == before:
            self._squeezes(ctx)
        if len(ctx.applications) > before:
            infer_shapes(ctx.model)  # what a node had for either branch is known better for the one that stays

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        return self._if(node, ctx) if node.op_type == "If" else self._loop(node, ctx)

    def _truth(self, value: ir.Value | None) -> bool | None:
        known = self._values.constant(value)
        return None if known is None or known.size != 1 else bool(known.reshape(()))

    # -- If ------------------------------------------------------------------------------------------------------------

    def _if(self, node: ir.Node, ctx: Context) -> bool:
        condition = self._truth(node.inputs[0])
        if condition is None:
            ctx.refuse(node, "its condition depends on data, or on axes whose sizes are not known")
            return False
        rule = "constant-condition" if graphs.is_constant(node.inputs[0]) else "shape-condition"
        return _take(node, condition, ctx, rule)

    def _squeezes(self, ctx: Context) -> None:
        """Decide one If that squeezes an axis where it is one; what follows from it is for the next round."""
        for node in ctx.nodes("If"):
            if self._left > 0 and _is_squeeze(node, self._values):
                self._left -= 1
                if _fails_otherwise(node, self, ctx) and _take(node, True, ctx, "squeeze"):
                    return

    # -- Loop ----------------------------------------------------------------------------------------------------------

    def _loop(self, node: ir.Node, ctx: Context) -> bool:
        count, condition = [*node.inputs, None, None][:2]
        known = self._values.constant(count)
        turns = None if known is None or known.size != 1 else int(known.reshape(()))
        starts = True if condition is None else self._truth(condition)
        if (turns is not None and turns <= 0) or starts is False:
            return self._never(node, ctx)
        if starts and (turns == 1 or (condition is not None and (turns or count is None) and self._ends(node, ctx))):
            return self._once(node, ctx)
        return False

    def _ends(self, node: ir.Node, ctx: Context) -> bool:
        """Whether the condition is false after the first turn, whatever the data."""
        body = node.attributes["body"]
        if body.is_ref():
            return False
        values = ShapeValues(ctx.opset)
        counter, goes = body.as_graph().inputs[:2]
        values.learn(counter, np.array(0, np.int64))
        values.learn(goes, np.array(True))
        again = values.constant(body.as_graph().outputs[0])
        return again is not None and again.size == 1 and not again.reshape(())

    def _never(self, node: ir.Node, ctx: Context) -> bool:
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

    def _once(self, node: ir.Node, ctx: Context) -> bool:
        attribute = node.attributes["body"]
        if attribute.is_ref():
            return False
        body = attribute.as_graph()
        starts = list(node.inputs[2:])
        if any(start is None for start in starts) or returns_outer(body):
            ctx.refuse(node, "its body returns an outer value as it is, which ONNX does not allow")
            return False
        stacked = [index for index in range(len(starts), len(node.outputs)) if _is_asked(node.outputs[index])]
        if stacked and ctx.opset < 13:
            ctx.refuse(node, "it returns what it stacks, and axes are no inputs before opset 13")
            return False
        given = [
            ctx.constant(np.full((1,) * (graphs.rank(value) or 0), start), value.name or "turn")
            for value, start in zip(body.inputs[:2], (np.int64(0), np.bool_(True)), strict=True)
        ]
        nodes, results = unpack(body, ctx, given=[*given, *(start for start in starts if start is not None)])
        outputs: dict[ir.Value, ir.Value] = {}
        for index, (old, new) in enumerate(zip(node.outputs, results[1:], strict=True)):
            if index in stacked:
                axis = ctx.constant(np.array([0], np.int64), "axis")
                nodes.append(ctx.node("Unsqueeze", [new, axis], like=old))
                new = nodes[-1].outputs[0]
            if _is_asked(old):
                outputs[old] = new
        return bool(outputs) and ctx.replace(outputs, nodes, rule="loop-of-one-turn", certain=True)


def _is_asked(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _take(node: ir.Node, side: bool, ctx: Context, rule: str) -> bool:
    """Put a branch in the place of an If."""
    attribute = node.attributes["then_branch" if side else "else_branch"]
    if attribute.is_ref():
        return False
    branch = attribute.as_graph()
    if returns_outer(branch):
        ctx.refuse(node, "its branch returns an outer value as it is, which ONNX does not allow")
        return False
    nodes, results = unpack(branch, ctx)
    outputs = {old: new for old, new in zip(node.outputs, results, strict=True) if _is_asked(old)}
    if not outputs:
        return False  # nobody reads it: remove-dead has a name for that
    return ctx.replace(outputs, nodes, rule=rule, certain=True)


# -- axes that must be one ---------------------------------------------------------------------------------------------


def _is_squeeze(node: ir.Node, values: ShapeValues) -> bool:
    """Whether an If is what PyTorch's squeeze of one axis becomes: If(size == 1) Squeeze(x, axis) else Identity(x).

    Squeeze fails where the size is not one. So it may stand for the whole where the other branch leads to a failure.
    """
    branches = [node.attributes[name] for name in ("then_branch", "else_branch")]
    if len(node.outputs) != 1 or any(branch.is_ref() for branch in branches):
        return False
    squeeze, identity = (branch.as_graph().outputs[0].producer() for branch in branches)
    if squeeze is None or identity is None or (squeeze.op_type, identity.op_type) != ("Squeeze", "Identity"):
        return False
    if squeeze.inputs[0] is not identity.inputs[0] or squeeze.domain or identity.domain:
        return False
    axis = _squeezed_axis(squeeze, values)
    compared = node.inputs[0].producer() if node.inputs[0] is not None else None
    if axis is None or compared is None or (compared.domain, compared.op_type) != ("", "Equal"):
        return False
    for size, one in (compared.inputs, compared.inputs[::-1]):
        known = values.constant(one)
        gather = None if size is None else size.producer()
        if known is None or known.size != 1 or int(known.reshape(())) != 1 or gather is None:
            continue
        shape = gather.inputs[0].producer() if gather.op_type == "Gather" and gather.inputs[0] is not None else None
        index = values.constant(gather.inputs[1]) if shape is not None else None
        if shape is None or shape.op_type != "Shape" or shape.attributes or index is None or index.size != 1:
            continue
        if shape.inputs[0] is squeeze.inputs[0] and int(index.reshape(())) == axis:
            return True
    return False


def _squeezed_axis(squeeze: ir.Node, values: ShapeValues) -> int | None:
    if len(squeeze.inputs) > 1:
        axes = values.constant(squeeze.inputs[1])
        return int(axes.reshape(())) if axes is not None and axes.size == 1 else None
    attribute = squeeze.attributes.get("axes")
    if attribute is None or attribute.is_ref():
        return None
    listed = attribute.as_ints()
    return listed[0] if len(listed) == 1 else None


def _fails_otherwise(node: ir.Node, current: RulePass, ctx: Context) -> bool:
    """Whether the run fails for certain where the else branch is taken: an operator gets a rank it does not take."""
    around = _graphs_around(node, ctx.model)
    if around is None:
        return False
    place = next(index for index, other in enumerate(ctx.model.graph.all_nodes()) if other is node)
    model = ctx.model.clone()
    assumed = next(other for index, other in enumerate(model.graph.all_nodes()) if index == place)
    homes = _graphs_around(assumed, model)
    infer_shapes(model)
    trial = Context(model, ctx.target)
    trial.running(current)
    if homes is None or _wrong_ranks(homes) or not _take(assumed, False, trial, "assumed"):
        return False
    for _ in range(_ROUNDS):
        infer_shapes(model)
        if _wrong_ranks(homes):
            return True
        values = ShapeValues(trial.opset)
        decided = [(n, values.constant(n.inputs[0])) for n in trial.nodes("If")]
        taken = [_take(n, bool(known.reshape(())), trial, "follows") for n, known in decided
                 if known is not None and known.size == 1 and n.graph is not None]  # fmt: skip
        if not any(taken):
            return False
    return False


def _graphs_around(node: ir.Node, model: ir.Model) -> list[ir.Graph] | None:
    """The graphs that run whenever a node of the main graph or its bodies does: its own and those around it."""
    owners = {body: owner for owner in graphs.nested_nodes(model.graph) for body in graphs.subgraphs(owner)}
    found: list[ir.Graph] = []
    graph = node.graph
    while isinstance(graph, ir.Graph):
        found.append(graph)
        owner = owners.get(graph)
        graph = None if owner is None else owner.graph
    return found if found and found[-1] is model.graph else None


def _wrong_ranks(homes: list[ir.Graph]) -> bool:
    """Whether an operator that runs in any case reads a value of a rank that it does not take."""
    for node in (node for graph in homes for node in graph):
        if node.domain != "" or not node.inputs or node.inputs[0] is None:
            continue
        wanted = _RANKS.get(node.op_type)
        if node.op_type == "Conv" and node.inputs[1] is not None:
            weight = trusted_shape(node.inputs[1])
            wanted = None if weight is None else len(weight)
        shape = None if wanted is None else trusted_shape(node.inputs[0])
        if shape is not None and len(shape) != wanted:
            return True
    return False
