"""Which values of a network may differ from sample to sample, and which Ifs and Loops each sample decides by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import graphs
from graphopt.shape_values import ShapeValues

_TELLS_SIZES = frozenset({"Shape", "Size"})
"""They look at no element; what has other sizes for other samples is refused elsewhere."""


@dataclass
class Dependence:
    """What depends on the sample.

    Attributes:
        values: That may differ.
        decided: The Ifs and Loops of which each sample decides by itself which way it goes, or how often.
    """

    values: set[ir.Value] = field(default_factory=set)
    decided: set[ir.Node] = field(default_factory=set)


def find_dependence(model: ir.Model, inputs: Iterable[ir.Value], known: ShapeValues) -> Dependence:
    """Follow the samples through a network.

    Args:
        model: For one sample.
        inputs: That have samples.
        known: Constants that follow from shapes.
    """
    found = Dependence(set(inputs))
    before = -1
    while before != len(found.values) + len(found.decided):  # again, for the states of loops
        before = len(found.values) + len(found.decided)
        _follow(model.graph, found, known)
    return found


def _follow(graph: ir.Graph, found: Dependence, known: ShapeValues) -> None:
    for node in graph:
        if node.domain == "" and node.op_type == "If":
            _follow_branch(node, found, known)
        elif node.domain == "" and node.op_type in ("Loop", "Scan"):
            _follow_loop(node, found, known)
        elif node.domain == "" and node.op_type in _TELLS_SIZES:
            continue
        elif any(value in found.values for value in graphs.read_by(node)):
            found.values.update(value for value in node.outputs if known.constant(value) is None)


def _follow_branch(node: ir.Node, found: Dependence, known: ShapeValues) -> None:
    sides = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for side in sides:
        _follow(side, found, known)
    if node.inputs[0] in found.values:
        found.decided.add(node)
    for index, output in enumerate(node.outputs):
        if node in found.decided or any(side.outputs[index] in found.values for side in sides):
            found.values.add(output)


def _follow_loop(node: ir.Node, found: Dependence, known: ShapeValues) -> None:
    body = node.attributes["body"].as_graph()
    loops = node.op_type == "Loop"
    skipped = 2 if loops else 0
    for given, inner in zip(node.inputs[skipped:], body.inputs[skipped:], strict=True):
        if given in found.values:
            found.values.add(inner)
    _follow(body, found, known)
    made = body.outputs[1 if loops else 0 :]
    carried = len(body.inputs) - skipped if loops else len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
    for inner, after in zip(body.inputs[skipped : skipped + carried], made, strict=False):
        if after in found.values:
            found.values.add(inner)
    if loops and any(value in found.values for value in (*node.inputs[:2], body.outputs[0])):
        found.decided.add(node)
    for index, (after, output) in enumerate(zip(made, node.outputs, strict=True)):
        state = index < carried and body.inputs[skipped + index] in found.values
        if node in found.decided or after in found.values or state:
            found.values.add(output)
