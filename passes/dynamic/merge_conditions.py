"""Two decisions that are one: Ifs side by side on the same condition, and an If inside a branch that decides it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import onnx_ir as ir

from graphopt import graphs
from graphopt.graphs import DECIDES
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.rewrite.bodies import graph_of, returnable, returns_outer, unpack

# Operators that hand the one element of a condition on as it is.
_SAME = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
# How far conjunctions of conjunctions are followed.
_DEEPEST = 16

_Facts = dict[ir.Value, bool]


class MergeConditions(Pass):
    """Merges Ifs on one condition into one, and puts in place the branch of an If that an If around it decides.

    Inside a branch the condition is known, and what follows from it: its negation, the operands of a conjunction that
    holds or a disjunction that does not. Conditions that compute the same are one value after merge-duplicates.
    """

    name = "merge-conditions"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="two Ifs of one graph on the same condition or one and its negation: the second one's branches follow "
        "the first one's; an If at any depth inside a branch or Loop whose condition is known there",
        refuses="Ifs of which the second waits for a node that reads what the first gives; branches that return an "
        "outer value as it is; conditions that only compare alike; what a Loop without a condition hands to its body",
        costs="linear in the nodes for each If; one decision fewer, and the merged If says in its metadata "
        f"({DECIDES}) which others went its way",
        source="conditional branch elimination; jump threading",
    )

    def apply(self, ctx: Context) -> None:
        for graph in (ctx.model.graph, *(function.graph for function in ctx.model.functions.values())):
            self._walk(graph, {}, {}, ctx)

    def _walk(self, graph: ir.Graph, facts: _Facts, deciders: Mapping[ir.Value, ir.Node], ctx: Context) -> None:
        """Rewrite a graph and its bodies.

        Args:
            graph: Where it is.
            facts: Conditions that are known there.
            deciders: Condition -> the If around whose branch it is known in.
            ctx: Makes the change.
        """
        if facts:
            pending = _branches(graph)
            while pending:
                node = pending.pop()
                known = _truth(node.inputs[0], facts)
                if known is not None and self._take(node, known, ctx):
                    _note_decided(node, facts, deciders)
                    pending = _branches(graph)
        self._merge(graph, ctx)
        for node in list(graph):
            if not graphs.has_subgraphs(node):
                continue
            if node.domain == "" and node.op_type == "If":
                condition = _root(node.inputs[0])[0]
                inner = {**deciders, condition: node} if condition is not None else deciders
                for name, side in (("then_branch", True), ("else_branch", False)):
                    if not node.attributes[name].is_ref():
                        learned = dict(facts)
                        _learn(node.inputs[0], side, learned)
                        self._walk(node.attributes[name].as_graph(), learned, inner, ctx)
                continue
            for body in graphs.subgraphs(node):
                learned = dict(facts)
                if node.op_type == "Loop" and node.domain == "" and len(node.inputs) > 1 and node.inputs[1] is not None:
                    learned[body.inputs[1]] = True  # a turn runs only where the condition held
                self._walk(body, learned, deciders, ctx)

    # -- decided by an If around -----------------------------------------------------------------------------------

    def _take(self, node: ir.Node, known: bool, ctx: Context) -> bool:
        branch = _branch(node, known)
        if branch is None:
            return False
        if returns_outer(branch):
            ctx.refuse(node, "its branch returns an outer value as it is, which ONNX does not allow")
            return False
        nodes, results = unpack(branch, ctx)
        outputs = {old: new for old, new in zip(node.outputs, results, strict=True) if _is_asked(old)}
        return bool(outputs) and ctx.replace(outputs, nodes, rule="decided-around", certain=True)

    # -- side by side ----------------------------------------------------------------------------------------------

    def _merge(self, graph: ir.Graph, ctx: Context) -> None:
        heads: dict[ir.Value, list[ir.Node]] = {}
        for node in _branches(graph):
            condition, _ = _root(node.inputs[0])
            if condition is None or not any(map(_is_asked, node.outputs)):
                continue
            known = heads.setdefault(condition, [])
            for place, head in enumerate(known):
                merged = self._join(head, node, ctx)
                if merged is not None:
                    known[place] = merged
                    break
            else:
                known.append(node)

    def _join(self, first: ir.Node, second: ir.Node, ctx: Context) -> ir.Node | None:
        """One If in the place of two on one condition; None where there is something between them."""
        same = _root(first.inputs[0])[1] == _root(second.inputs[0])[1]
        pairs = [(_branch(first, side), _branch(second, side == same)) for side in (True, False)]
        branches = [branch for pair in pairs for branch in pair if branch is not None]
        if len(branches) < 4:
            return None
        if any(map(returns_outer, branches)):
            ctx.refuse(second, "a branch returns an outer value as it is, which ONNX does not allow")
            return None
        if _waits(second, first):
            ctx.refuse(second, f"a node between waits for what {first.name or 'the first'} gives")
            return None
        left = [index for index, value in enumerate(first.outputs) if _read_elsewhere(value, second)]
        right = [index for index, value in enumerate(second.outputs) if _is_asked(value)]
        bodies = []
        for one, other in pairs:
            assert one is not None and other is not None
            nodes, results = unpack(one, ctx)
            more, last = unpack(other, ctx, instead=dict(zip(first.outputs, results, strict=True)))
            returned = [*(results[index] for index in left), *(last[index] for index in right)]
            bodies.append(graph_of(*returnable([*nodes, *more], returned, ctx), like=one))
        old = [*(first.outputs[index] for index in left), *(second.outputs[index] for index in right)]
        if not old:
            return None
        attributes = {"then_branch": bodies[0], "else_branch": bodies[1]}
        merged = ctx.node("If", [first.inputs[0]], attributes, like=old)
        name, gone = first.name, second.name
        noted = [*_noted(first), [gone, same], *([inner, kept == same] for inner, kept in _noted(second))]
        if not ctx.replace(dict(zip(old, merged.outputs, strict=True)), [merged], rule="same-condition",
                           before=second, certain=True):  # fmt: skip
            return None
        merged.name = name
        merged.metadata_props[DECIDES] = json.dumps(noted)
        return merged


def _branches(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "If" and node.domain == ""]


def _branch(node: ir.Node, side: bool) -> ir.Graph | None:
    attribute = node.attributes["then_branch" if side else "else_branch"]
    return None if attribute.is_ref() else attribute.as_graph()


def _is_asked(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _read_elsewhere(value: ir.Value, reader: ir.Node) -> bool:
    """Whether anything but a node and its bodies reads a value."""
    inside = sum(used is value for body in graphs.subgraphs(reader) for inner in graphs.nested_graphs(body)
                 for node in inner for used in node.inputs)  # fmt: skip
    direct = sum(used is value for used in reader.inputs)
    return value.is_graph_output() or len(value.uses()) > inside + direct


def _waits(node: ir.Node, first: ir.Node) -> bool:
    """Whether a node waits for another of its graph other than by reading what that one gives itself."""
    graph = node.graph
    given = set(first.outputs)
    if any(value in given for value in node.inputs):
        return True  # its condition
    seen: set[ir.Node] = set()
    pending = [value.producer() for value in graphs.read_by(node) if value not in given]
    while pending:
        current = pending.pop()
        if current is None or current in seen or current.graph is not graph or current is first:
            continue
        seen.add(current)
        for value in graphs.read_by(current):
            if value in given:
                return True
            pending.append(value.producer())
    return False


# -- what is known of conditions ---------------------------------------------------------------------------------------


def _root(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The condition behind negations and copies, and whether the value says the same as that."""
    same = True
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in (*_SAME, "Not") or node.inputs[0] is None:
            break
        same = same != (node.op_type == "Not")
        value = node.inputs[0]
    return value, same


def _learn(value: ir.Value | None, holds: bool, facts: _Facts) -> None:
    """Note that a condition holds or not, and what follows for those that it is made of."""
    pending = [(value, holds)]
    while pending:
        current, truth = pending.pop()
        root, same = _root(current)
        if root is None:
            continue
        truth = truth == same
        facts[root] = truth
        node = root.producer()
        # One element came of it: both operands have one.
        if node is not None and node.domain == "" and (node.op_type, truth) in (("And", True), ("Or", False)):
            pending.extend((operand, truth) for operand in node.inputs)


def _truth(value: ir.Value | None, facts: _Facts, depth: int = _DEEPEST) -> bool | None:
    """Whether a condition holds, where facts tell."""
    root, same = _root(value)
    if root is None:
        return None
    if root in facts:
        return facts[root] == same
    node = root.producer()
    if node is None or node.domain != "" or node.op_type not in ("And", "Or") or depth == 0:
        return None
    known = [_truth(operand, facts, depth - 1) for operand in node.inputs]
    decisive = node.op_type == "Or"
    if decisive in known:
        return decisive == same
    return None if None in known else (not decisive) == same


# -- what is told of it ------------------------------------------------------------------------------------------------


def _noted(node: ir.Node) -> list[list[object]]:
    found = json.loads(node.metadata_props.get(DECIDES, "[]"))
    return [list(entry) for entry in found]


def _note_decided(node: ir.Node, facts: _Facts, deciders: Mapping[ir.Value, ir.Node]) -> None:
    """Tell the If that decided another one that it did, where it is on the same condition."""
    condition, same = _root(node.inputs[0])
    around = deciders.get(condition) if condition is not None else None
    if around is not None and condition in facts:
        alike = _root(around.inputs[0])[1] == same
        around.metadata_props[DECIDES] = json.dumps([*_noted(around), [node.name or "", alike]])
