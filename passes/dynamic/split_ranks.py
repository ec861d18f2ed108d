"""What follows an If whose branches give values of different rank, in each branch by itself."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from graphopt import graphs
from graphopt.passes.dynamic.probing import Shapes, infer
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.rewrite.bodies import copy_node, graph_of, returnable, returns_outer, unpack
from graphopt.shapes import trusted_shape

# Nodes that one If may copy; and how many times larger than at the start a model may get.
_MOST_COPIED = 2000
_MOST_GROWN = 2


class SplitRanksParameters(BaseModel):
    """Parameters of split-ranks.

    Attributes:
        always: Also for targets that take values of unknown rank, so that every block of a bundle has fixed ranks.
    """

    model_config = ConfigDict(extra="forbid")

    always: bool = False


class SplitRanks(RulePass):
    """Moves what follows an If with branches of different rank into both branches, until their ranks agree again.

    Then every value has one rank. The weights are read from the graph around and stay what they are.
    """

    name = "split-ranks"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE  # what is decided in a copy goes before the next If is split
    patient = True  # an If that others decide is not split
    explanation = Explanation(
        matches="If with an output whose rank is another in each branch: the nodes that read it, and those that read "
        "theirs, up to values of one rank or the end of the graph",
        refuses="targets that take values of unknown rank, unless `always` is set; branches of which the rank of a "
        f"result is not known; more than {_MOST_COPIED} nodes to copy, or a model that would be more than "
        f"{_MOST_GROWN} times as large as it was: each copied If of this kind doubles what follows it; branches that "
        "return an outer value as it is",
        costs="two shape inferences of what follows the If; the file grows by the nodes, not by their weights",
        source="tail duplication; TensorRT: branches must have equal ranks where the condition is computed",
    )
    roots = ("If",)
    Parameters = SplitRanksParameters

    def __init__(self, parameters: Mapping[str, object] | None = None) -> None:
        super().__init__(parameters)
        self._most: int | None = None

    def apply(self, ctx: Context) -> None:
        if self._most is None:  # before the first round
            self._most = _MOST_GROWN * graphs.count_nodes(ctx.model)
        super().apply(ctx)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        assert isinstance(self.parameters, SplitRanksParameters)
        if ctx.target.control_flow.unequal_ranks and not self.parameters.always:
            return False
        if all(graphs.rank(value) is not None and trusted_shape(value) is not None for value in node.outputs):
            return False
        branches = [node.attributes[name] for name in ("then_branch", "else_branch")]
        if any(branch.is_ref() for branch in branches) or not isinstance(node.graph, ir.Graph):
            return False
        bodies = [branch.as_graph() for branch in branches]
        if not any(isinstance(value.type, ir.TensorType) and _is_asked(value) for value in node.outputs):
            return False
        followers = _followers(node)
        found = [
            infer([*body, *followers], ctx, instead=dict(zip(node.outputs, body.outputs, strict=True)))
            for body in bodies
        ]
        for shapes, body in zip(found, bodies, strict=True):
            shapes.update(
                (value, shapes.get(result) if result in shapes else trusted_shape(result))
                for value, result in zip(node.outputs, body.outputs, strict=True)
            )
        moved = _to_move(node, followers, found)
        if not moved:
            return False
        return self._move(node, bodies, moved, found, ctx)

    def _move(
        self, node: ir.Node, bodies: list[ir.Graph], moved: list[ir.Node], found: list[Shapes], ctx: Context
    ) -> bool:
        if any(map(returns_outer, bodies)):
            ctx.refuse(node, "a branch returns an outer value as it is, which ONNX does not allow")
            return False
        count = sum(1 + sum(len(inner) for body in graphs.subgraphs(n) for inner in graphs.nested_graphs(body))
                    for n in moved)  # fmt: skip
        most = self._most or 0
        if count > _MOST_COPIED or graphs.count_nodes(ctx.model) + count > most:
            ctx.refuse(node, f"{count} nodes would have to be in both branches, which is too many")
            return False
        inside = {*moved, node}
        old = [value for source in (node, *moved) for value in source.outputs if _leaves(value, inside)]
        made: list[ir.Graph] = []
        for body, shapes in zip(bodies, found, strict=True):
            nodes, results = unpack(body, ctx)
            values = dict(zip(node.outputs, results, strict=True))
            for source in moved:
                nodes.append(copy_node(source, values, ctx))
                for output in source.outputs:
                    values[output].shape = shapes.get(output)
                if made:
                    _name_anew(nodes[-1], ctx)
            made.append(graph_of(*returnable(nodes, [values[value] for value in old], ctx), like=body))
        new = ctx.node("If", [node.inputs[0]], {"then_branch": made[0], "else_branch": made[1]}, like=old)
        for value, stood in zip(new.outputs, old, strict=True):
            one, other = (shapes.get(stood) for shapes in found)
            value.shape = one if one is not None and one == other else None
        name = node.name
        if not ctx.replace(dict(zip(old, new.outputs, strict=True)), [new], rule="ranks", certain=True):
            return False
        new.name = name
        return True


def _is_asked(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _followers(node: ir.Node) -> list[ir.Node]:
    """The nodes of its graph that depend on a node, in order."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    reached = set(node.outputs)
    found = []
    for other in graph:
        if other is not node and any(value in reached for value in graphs.read_by(other)):
            found.append(other)
            reached.update(other.outputs)
    return found


def _to_move(node: ir.Node, followers: list[ir.Node], found: list[Shapes]) -> list[ir.Node]:
    """Those followers that read a value whose ranks differ, and what lies between them and the If."""
    differing = {value for value in node.outputs if _differs(value, found)}
    moved: set[ir.Node] = set()
    for other in followers:
        if any(value in differing for value in graphs.read_by(other)):
            moved.add(other)
            differing.update(value for value in other.outputs if not _agrees(value, found))
    # What is moved must not wait for something that waits for the If.
    reached = set(followers)
    for other in reversed(followers):
        if other in moved:
            makers = (value.producer() for value in graphs.read_by(other))
            moved.update(maker for maker in makers if maker in reached)
    return [other for other in followers if other in moved]


def _rank(shape: ir.Shape | None) -> int | None:
    return None if shape is None else len(shape)


def _differs(value: ir.Value, found: list[Shapes]) -> bool:
    one, other = (_rank(shapes.get(value)) for shapes in found)
    return one is not None and other is not None and one != other


def _agrees(value: ir.Value, found: list[Shapes]) -> bool:
    if not isinstance(value.type, ir.TensorType):
        return True
    one, other = (_rank(shapes.get(value)) for shapes in found)
    return one is not None and one == other


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether anything outside some nodes and their bodies reads a value."""
    if value.is_graph_output():
        return True
    own = {n for node in inside for body in graphs.subgraphs(node) for inner in graphs.nested_graphs(body)
           for n in inner}  # fmt: skip
    return any(use.node not in inside and use.node not in own for use in value.uses())


def _name_anew(node: ir.Node, ctx: Context) -> None:
    """Give a second copy of a node, and what is in it, names of their own."""
    nested = [other for body in graphs.subgraphs(node) for inner in graphs.nested_graphs(body) for other in inner]
    for other in (node, *nested):
        if other.name or graphs.has_subgraphs(other):
            other.name = ctx.fresh_node_name(other.name or other.op_type)
