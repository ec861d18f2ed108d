"""What a turn of a loop adds to a stack: of a loop that takes none, it is all that says which shape the stack has."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.plan import Port
from graphopt.bundles.ports import port, sizes_of
from graphopt.shapes import infer_shapes, trusted_shape

Parts = Mapping[ir.Value, ir.Shape]
"""Result of a body -> its shape, if the inputs of bodies are what they are declared to be."""


def parts_as_told(model: ir.Model) -> Parts:
    """The shapes of what bodies give, as far as they follow from what is declared of the inputs of bodies.

    Nothing checks such a declaration, and what a loop carries may have another shape in the next turn. But where there
    is no turn, ONNX Runtime goes by it.

    Args:
        model: Its types are inferred; what is trusted of shapes is not to be used until that is done anew.
    """
    bodies = [body for node in graphs.all_nodes(model) if _stacks(node) for body in graphs.subgraphs(node)]
    if all(graphs.static_shape(value) is not None for body in bodies for value in body.outputs):
        return {}
    inner = [graph for graph in graphs.nested_graphs(model.graph) if graph is not model.graph]
    infer_shapes(model, {value: value.shape for graph in inner for value in graph.inputs if value.shape is not None})
    found = {value: trusted_shape(value) for body in bodies for value in body.outputs}
    return {value: shape for value, shape in found.items() if shape is not None}


def part_of_stack(value: ir.Value, parts: Parts) -> Port:
    """What a turn adds, as a plan has it: sizes that do not follow from anything are those that are declared."""
    part = port(value)
    known, said = parts.get(value, trusted_shape(value)), value.shape
    if known is not None and said is not None and len(known) == len(said):
        known = ir.Shape(
            [b if isinstance(b, int) and not isinstance(a, int) else a for a, b in zip(known, said, strict=True)]
        )
    part.shape = sizes_of(known if known is not None else said)
    return part


def _stacks(node: ir.Node) -> bool:
    """Whether a node puts together what its turns make."""
    if node.domain != "" or node.op_type not in ("Loop", "Scan"):
        return False
    count = node.attributes["num_scan_inputs"].as_int() if node.op_type == "Scan" else 2
    return len(node.outputs) > len(node.inputs) - count
