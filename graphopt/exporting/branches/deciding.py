"""The Decide nodes of a sunk model: taken out, or made to obey an input, so that each side can be run.

A table of int8 says what each decision is forced to: -1 leaves it alone, 0 is false, 1 is true. It has a row for each
decision and a column for each turn of the innermost Loop that takes it; the last column holds for all later turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.exporting.branches.markers import DOMAIN
from graphopt.exporting.branches.trips import free_trips, settle_trips

TABLE = "graphopt_decisions"  # the name of the input
TURNS = 6  # columns
MOST_TURNS = 10_000  # more are taken for endless


def decide_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if _is_decide(node)]


def _is_decide(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == "Decide"


def numbers_in(model: ir.Model) -> set[int]:
    """The decisions that the model takes."""
    return {node.attributes["number"].as_int() for node in decide_nodes(model)}


def strip(model: ir.Model) -> None:
    """Take the Decide nodes out of ``model``, in place."""
    settle_trips(model)
    for node in decide_nodes(model):
        condition, truth, graph = node.inputs[0], node.outputs[0], node.graph
        assert condition is not None and graph is not None
        producer = condition.producer()
        if truth.is_graph_output() and (producer is None or producer.graph is not graph):
            kept = ir.Node("", "Identity", [condition])
            kept.outputs[0].name = f"{truth.name}_kept"
            kept.outputs[0].type, kept.outputs[0].shape = truth.type, truth.shape
            graph.insert_before(node, kept)
            condition = kept.outputs[0]
        truth.replace_all_uses_with(condition, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def force(model: ir.Model, count: int) -> None:
    """Make the Decide nodes of ``model`` obey the input `TABLE`, int8 of shape (count, `TURNS`), in place.

    No Loop turns more than `MOST_TURNS` times: one that decides otherwise than the module does might not end.
    """
    free_trips(model)
    _bound_loops(model)
    table = ir.Value(name=TABLE, type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([count, TURNS]))
    model.graph.inputs.append(table)
    for node in decide_nodes(model):
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        made = list(_obeying(node, table))
        for index, new in enumerate(made):
            new.outputs[0].name = f"{node.outputs[0].name}_made_{index}"
        graph.insert_before(node, made)
        truth = made[-1].outputs[0]
        truth.type, truth.shape = node.outputs[0].type, ir.Shape([])
        node.outputs[0].replace_all_uses_with(truth, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def _bound_loops(model: ir.Model) -> None:
    most = ir.Value(
        name=f"{TABLE}_most_turns",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([]),
        const_value=ir.tensor(MOST_TURNS, dtype=ir.DataType.INT64),
    )
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "Loop" and node.inputs[0] is None:
            node.replace_input_with(0, most)
    if most.uses():
        model.graph.register_initializer(most)


def _obeying(node: ir.Node, table: ir.Value) -> Iterator[ir.Node]:
    """``forced == 1 or (forced < 0 and condition)`` with ``forced`` from the table."""
    number = node.attributes["number"].as_int()
    turn = node.inputs[1] if len(node.inputs) > 1 else None

    def make(op_type: str, *inputs: ir.Value | None) -> ir.Node:
        return ir.Node("", op_type, inputs)

    def constant(value: object) -> ir.Node:
        return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.asarray(value)))])

    row, axis_one = constant(np.int64(number)), constant(np.int8(1))
    rows = make("Gather", table, row.outputs[0])
    yield from (row, axis_one, rows)
    if turn is None:
        column = constant(np.int64(0))
        yield column
        index = column.outputs[0]
    else:
        last = constant(np.int64(TURNS - 1))
        clipped = make("Min", turn, last.outputs[0])
        yield from (last, clipped)
        index = clipped.outputs[0]
    forced, zero = make("Gather", rows.outputs[0], index), constant(np.int8(0))
    true, free = make("Equal", forced.outputs[0], axis_one.outputs[0]), make("Less", forced.outputs[0], zero.outputs[0])
    natural = make("And", free.outputs[0], node.inputs[0])
    yield from (forced, zero, true, free, natural, make("Or", true.outputs[0], natural.outputs[0]))
