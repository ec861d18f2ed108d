"""Runs nodes of a graph in float64: operators, bodies, and values that live as long as they are read.

Common operators are in `operators`; the rest go to `graphopt.evaluate` where that is exact, else, one node at a time,
to onnx's reference evaluator. Weights are read when they are needed and not kept, values are dropped after their last
use.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.evaluate import Operation
from graphopt.evaluate import evaluate as evaluate_operation
from graphopt.interrupts import is_ended
from graphopt.verification.exact.operators import OPERATORS, Array, NotExact
from graphopt.verification.tolerance import is_float

Environment = dict[ir.Value, Any]


# Elements of a constant that is kept in double precision after it was read once.
_SMALL = 1024


def evaluate(model: ir.Model, feeds: Mapping[str, Array], wanted: Sequence[ir.Value] | None = None) -> list[Any]:
    """Run a model in float64.

    Args:
        model: Its main graph in topological order.
        feeds: Input name -> array; floats of any width.
        wanted: Values of the main graph; default: its outputs.

    Raises:
        NotExact: See there.
    """
    inputs = [(value, value.name or "") for value in model.graph.inputs]
    environment: Environment = {value: widen(feeds[name]) for value, name in inputs if name in feeds}
    values = list(model.graph.outputs) if wanted is None else list(wanted)
    run_nodes(_needed(model.graph, values), environment, model, keep=values)
    return [_read(value, environment) for value in values]


def _needed(graph: ir.Graph, wanted: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes of a graph that some values depend on, in the graph's order."""
    needed: set[ir.Node] = set()
    pending = [node for value in wanted if (node := value.producer()) is not None]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(p for value in graphs.read_by(node) if (p := value.producer()) is not None)
    return [node for node in graph if node in needed]


def evaluate_between(model: ir.Model, known: Mapping[ir.Value, Array], wanted: ir.Value, *, limit: int = 200) -> Array:
    """The float64 value of ``wanted`` from the values of some others.

    Args:
        model: The model that both are in.
        known: Where to start: value -> what it holds.
        wanted: Where to end.
        limit: How many nodes may lie between.

    Raises:
        NotExact: ``known`` does not determine ``wanted`` within ``limit`` nodes, or see there.
    """
    region: list[ir.Node] = []
    seen: set[ir.Node] = set()
    pending = [wanted]
    while pending:
        value = pending.pop()
        if value in known or graphs.is_constant(value):
            continue
        node = value.producer()
        if node is None or len(region) >= limit:
            raise NotExact(f"{wanted.name} depends on more than the region's inputs")
        if node not in seen:
            seen.add(node)
            region.append(node)
            pending.extend(graphs.read_by(node))
    environment: Environment = {value: widen(array) for value, array in known.items()}
    run_nodes(_in_order(region), environment, model, keep=[wanted])
    return np.asarray(_read(wanted, environment))


def _in_order(region: Sequence[ir.Node]) -> list[ir.Node]:
    """Nodes in an order in which each comes after those it reads from, in its bodies too."""
    members = set(region)
    order: dict[ir.Node, None] = {}
    for start in region:
        stack = [start]
        while stack:
            node = stack[-1]
            producers = [value.producer() for value in graphs.read_by(node)]
            waiting = [p for p in producers if p is not None and p in members and p not in order]
            if waiting and node not in order:
                stack.extend(waiting)
            else:
                order[node] = None
                stack.pop()
    return list(order)


def widen(value: Any) -> Any:
    """Floats to float64; everything else as it is; sequences element by element."""
    if isinstance(value, list):
        return [widen(item) for item in value]
    if isinstance(value, np.ndarray) and is_float(value) and value.dtype.kind != "c":
        return value.astype(np.float64)
    return value


def run_nodes(nodes: Sequence[ir.Node], environment: Environment, model: ir.Model, *, keep: Sequence[ir.Value]) -> None:
    """Run nodes in order, reading from and writing to ``environment``; forget values after their last use."""
    reads = [graphs.read_by(node) for node in nodes]
    remaining: Counter[ir.Value] = Counter(itertools.chain.from_iterable(reads))
    kept = set(keep)
    with np.errstate(all="ignore"):
        for node, read in zip(nodes, reads, strict=True):
            if node.op_type == "Constant" and graphs.is_constant(node.outputs[0]):
                continue  # read where it is used
            if is_ended():
                raise NotExact("the process ends")
            for value, array in zip(node.outputs, run_node(node, environment, model), strict=False):
                environment[value] = array
            for value in read:
                remaining[value] -= 1
                if remaining[value] <= 0 and value not in kept and value.producer() is not None:
                    environment.pop(value, None)


def run_node(node: ir.Node, environment: Environment, model: ir.Model) -> list[Any]:
    """The outputs of one node in float64."""
    if node.domain == "" and node.op_type == "Gather" and graphs.is_constant(node.inputs[0]):
        return [_gather_constant(node, environment)]
    inputs = [None if value is None else _read(value, environment) for value in node.inputs]
    if node.domain == "" and node.op_type == "If":
        body = node.attributes["then_branch" if bool(np.asarray(inputs[0]).reshape(())) else "else_branch"].as_graph()
        return _run_body(body, [], environment, model)
    if node.domain == "" and node.op_type == "Loop":
        return _run_loop(node, inputs, environment, model)
    if graphs.has_subgraphs(node):
        raise NotExact(f"{node.op_type} is not run in float64")
    if node.domain == "":
        operator = OPERATORS.get(node.op_type)
        try:
            result = None if operator is None else operator(node, inputs, graphs.opset(model))
        except (IndexError, ValueError, TypeError, KeyError, MemoryError) as error:
            raise NotExact(f"{node.op_type} {node.name}: {error}") from error
        if result is not None:
            return result if isinstance(result, list) else [result]
        if node.op_type != "Cast" and not any(isinstance(array, list) for array in inputs):
            exactly = evaluate_operation(Operation.of(node, graphs.opset(model)), inputs)
            if exactly is not None:
                return [widen(array) for array in exactly]
    return _by_onnx(node, inputs, model)


def _gather_constant(node: ir.Node, environment: Environment) -> Any:
    """Gather from a constant: only the rows that are taken are widened (an embedding table is large)."""
    data, indices = graphs.constant_array(node.inputs[0]), node.inputs[1]
    assert data is not None and indices is not None
    try:
        return widen(np.take(data, _read(indices, environment), node.attributes.get_int("axis", 0)))
    except (IndexError, ValueError) as error:
        raise NotExact(f"Gather {node.name}: {error}") from error


def _read(value: ir.Value, environment: Environment) -> Any:
    if value in environment:
        return environment[value]
    tensor = graphs.constant_tensor(value) or (value.const_value if value.is_initializer() else None)
    if tensor is None:
        raise NotExact(f"{value.name} has no value")
    widened = widen(tensor.numpy())
    if tensor.size <= _SMALL:
        environment[value] = widened
    return widened


def _run_body(body: ir.Graph, arguments: Sequence[Any], environment: Environment, model: ir.Model) -> list[Any]:
    inner = dict(environment)
    inner.update(zip(body.inputs, arguments, strict=True))
    run_nodes(list(body), inner, model, keep=list(body.outputs))
    return [_read(value, inner) for value in body.outputs]


def _run_loop(node: ir.Node, inputs: Sequence[Any], environment: Environment, model: ir.Model) -> list[Any]:
    body = node.attributes["body"].as_graph()
    trips = int(np.asarray(inputs[0]).reshape(())) if inputs and inputs[0] is not None else None
    go = bool(np.asarray(inputs[1]).reshape(())) if len(inputs) > 1 and inputs[1] is not None else True
    state = list(inputs[2:])
    collected: list[list[Any]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
    for step in itertools.count():
        if not go or (trips is not None and step >= trips):
            break
        if step > 10_000:
            raise NotExact("a Loop runs for more than 10,000 turns")
        results = _run_body(body, [np.array(step, np.int64), np.array(go), *state], environment, model)
        go = bool(np.asarray(results[0]).reshape(()))
        for scan, result in zip(collected, results[1 + len(state) :], strict=True):
            scan.append(result)
        state = results[1 : 1 + len(state)]
    if any(not scan for scan in collected):
        raise NotExact("a Loop with scan outputs takes no turn")
    return [*state, *(np.stack(scan) for scan in collected)]


def _by_onnx(node: ir.Node, inputs: Sequence[Any], model: ir.Model) -> list[Any]:
    """Run one node with onnx's reference evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
        outputs = [f"o{index}" if value.name or value.uses() else "" for index, value in enumerate(node.outputs)]
        proto = ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.extend(outputs)
        graph = onnx.helper.make_graph(
            [proto],
            "one",
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in names if n],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in outputs if n],
        )
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        functions = [ir.to_proto(function) for function in model.functions.values()]
        wrapped = onnx.helper.make_model(graph, opset_imports=imports, functions=functions)
        given = {n: a for n, a in zip(names, inputs, strict=True) if n}
        with np.errstate(all="ignore"):  # overflows to infinity, as the operators above; not the user's concern
            results = iter(ReferenceEvaluator(wrapped).run(None, given))
        return [widen(next(results)) if name else None for name in outputs]
    except Exception as error:  # the reference evaluator raises whatever its operators do
        raise NotExact(f"{node.op_type} {node.name}: {error}") from error
