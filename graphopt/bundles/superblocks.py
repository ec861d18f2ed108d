"""Which control flow stays inside a block, since cutting there would cost more than a small share of the work.

A call of a block costs microseconds: 3 where it runs again and again, 30 where the work before it has gone through the
caches. Where a branch does little, the calls that a cut adds are a part of the run that one notices, and a runtime that
branches by itself does better.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.split import SPLIT, can_split, samples_part
from graphopt.targets import Target

SHARE = 0.005
"""Of the work around a cut, what it may cost: a path through many cuts stays within a few of these."""
_TURNS = 16
"""Of a loop that tells no limit."""


def super_blocks(model: ir.Model, target: Target) -> dict[str, str]:
    """The If, Loop and Scan that stay inside a block, and why.

    Args:
        model: Whose control flow has names (`graphs.name_control_flow`), typed as far as inference gets.
        target: Says whether its blocks may branch, and what calls and operators cost.

    Returns:
        Name of the node -> reason.
    """
    kept: dict[str, str] = {}
    # A size that is not known counts as 1: a cut is not to be lost on the smallest input either.
    costs = target.costs.model_copy(update={"dimension": 1})
    _choose(model.graph, model, target.model_copy(update={"costs": costs}), kept)
    return kept


def _choose(graph: ir.Graph, model: ir.Model, target: Target, kept: dict[str, str]) -> None:
    """Inner before outer: what holds a cut is cut itself."""
    found = [node for node in graph if node.domain == "" and node.op_type in SPLIT]
    for node in found:
        for body in graphs.subgraphs(node):
            _choose(body, model, target, kept)
    # What is beside them in the same graph is shared out among them: all cuts of a graph together keep to the share.
    straight = [node for node in graph if not graphs.has_subgraphs(node)]
    beside = target.cost(straight) / len(found) if found else 0.0
    for node in found:
        reason = _reason(node, beside, model, target)
        inner = [n for body in graphs.subgraphs(node) for n in graphs.nested_nodes(body)]
        if reason and all(n.name in kept for n in inner if n.domain == "" and n.op_type in SPLIT):
            kept[node.name or ""] = reason


def _reason(node: ir.Node, beside: float, model: ir.Model, target: Target) -> str:
    """Why a node stays inside a block; nothing where it is cut."""
    if not can_split(node, model):
        return f"{node.op_type} of opset {graphs.opset(model)} has a batch axis of its own"
    if not target.control_flow.in_blocks or samples_part(node) or graphs.path_of(node):
        return ""  # a side with a path and one with all others, in one block, would be loaded at once
    work = [target.cost(body) for body in graphs.subgraphs(node)]
    turns = 1 if node.op_type == "If" else _turns(node)
    around = beside + turns * sum(work) / len(work)
    added = turns * _added(node, target)
    if added <= SHARE * around:
        return ""
    return f"a cut adds about {added:.0f} us to {around:.0f} us of work"


def _turns(node: ir.Node) -> int:
    limit = graphs.constant_tensor(node.inputs[0]) if node.op_type == "Loop" and node.inputs[0] is not None else None
    return _TURNS if limit is None else max(1, min(int(limit.numpy().item()), _TURNS))


def _added(node: ir.Node, target: Target) -> float:
    """What a cut costs in a run, for a loop in a turn: calls, and what is handed over is written and read once more."""
    costs = target.costs
    if node.op_type == "If":
        # It cuts what is around it in two, and its branch is a call.
        calls = max(2 * costs.block - costs.control_flow, 0.0)
        taken = [value for value in graphs.read_by(node)[1:] if not graphs.is_constant(value)]
        handed = [*dict.fromkeys(taken), *node.outputs]
    else:
        calls = costs.block
        handed = [value for body in graphs.subgraphs(node) for value in (*body.inputs, *body.outputs)]
    return calls + sum(target.bytes_of(value) for value in handed) * 2 / (costs.gigabytes * 1e3)
