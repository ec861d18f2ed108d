"""Small questions about an ``onnx_ir`` graph that every pass asks: what is in it, what is constant, who uses what."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

RANDOM = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",
    }
)
"""Operators that may give something else in every run (Dropout while training)."""

DECIDES = "graphopt.decides"
"""Metadata of an If: a JSON list of [name of an If that went the same way, or the other way, and is gone, same]."""

PATH = "graphopt.path"
"""Metadata of an If that asks whether an input goes a path (`graphopt.bundles.specialised`): a JSON list of [name of an
If, whether it goes to then]."""

GRAPH_ATTRIBUTES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# The standard operators that carry bodies. Asked for every node in every walk, so the answer must be quick.
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies that a node carries as attributes (If, Loop, Scan, ...), not those nested deeper."""
    if not has_subgraphs(node):
        return
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def has_subgraphs(node: ir.Node) -> bool:
    """Whether the node carries a body."""
    if node.domain == "":
        return node.op_type in CONTROL_FLOW
    return any(a.type in GRAPH_ATTRIBUTES for a in node.attributes.values())


def nested_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and every body below it, outer before inner."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(body for node in current if has_subgraphs(node) for body in subgraphs(node))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Every graph of a model: the main graph, function bodies, and all bodies nested in them."""
    yield from nested_graphs(model.graph)
    for function in model.functions.values():
        yield from nested_graphs(function.graph)


def nested_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every node of the graph and of the bodies below it, outer before inner. Each is looked at once."""
    pending = [graph]
    while pending:
        bodies: list[ir.Graph] = []
        for node in pending.pop():
            yield node
            if has_subgraphs(node):
                bodies.extend(subgraphs(node))
        pending.extend(bodies)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of a model, bodies and functions included."""
    yield from nested_nodes(model.graph)
    for function in model.functions.values():
        yield from nested_nodes(function.graph)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is the same in every run: an initializer no caller can override, or a Constant's output."""
    if value is None:
        return False
    if value.is_initializer():
        return not value.is_graph_input() and value.const_value is not None
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant" and constant_tensor(value) is not None


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a constant value, untouched (nothing is read from disk), or None.

    ``Constant`` nodes with ``value``, ``value_int(s)`` and ``value_float(s)`` are understood; others give None.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain != "":
        return None
    for name, attribute in producer.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            # Not as_tensor(): it checks a protocol at run time, which takes a hundred times as long.
            return attribute.value  # type: ignore[no-any-return]
        if name == "value_int":
            return ir.tensor(np.array(attribute.as_int(), np.int64))
        if name == "value_ints":
            return ir.tensor(np.array(attribute.as_ints(), np.int64))
        if name == "value_float":
            return ir.tensor(np.array(attribute.as_float(), np.float32))
        if name == "value_floats":
            return ir.tensor(np.array(attribute.as_floats(), np.float32))
    return None


def constant_array(value: ir.Value | None, *, limit: int | None = None) -> np.ndarray | None:
    """The numpy array behind a constant value, or None where it is no constant or has more than ``limit`` elements."""
    tensor = constant_tensor(value)
    if tensor is None or (limit is not None and tensor.size > limit):
        return None
    return tensor.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, whatever its rank; None for anything else."""
    array = constant_array(value, limit=1)
    if array is None or array.size != 1 or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"):
        return None
    return float(array.reshape(()))


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value where every axis is a known number, else None."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


def rank(value: ir.Value | None) -> int | None:
    """The number of axes of a value, or None where it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that uses a value, exactly once and not as a graph output; None otherwise."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def is_used(node: ir.Node) -> bool:
    """Whether any output of a node is read by a node or returned by a graph."""
    return any(output.uses() or output.is_graph_output() for output in node.outputs)


def read_by(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its bodies included: its inputs first, and values as often as they are read by it."""
    reads = [value for value in node.inputs if value is not None]
    for body in subgraphs(node):
        reads.extend(captured_values(body))
    return reads


def detach(node: ir.Node) -> list[ir.Value]:
    """Make a node, and every node in its bodies, stop using their inputs.

    Returns:
        The values that it used, so that a caller can see which of them nobody uses any more.
    """
    released: list[ir.Value] = []
    for body in subgraphs(node):
        for inner in body:
            released.extend(detach(inner))
        released.extend(output for output in body.outputs if output.graph is not body or output.producer() is None)
        body.outputs.clear()
    for index, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(index, None)
            released.append(value)
    return released


def captured_values(graph: ir.Graph) -> list[ir.Value]:
    """The values that a body takes from the graphs around it, each once, in a fixed order."""
    own: set[ir.Value] = set()
    captured: dict[ir.Value, None] = {}
    for inner in nested_graphs(graph):
        own.update(inner.inputs)
        own.update(inner.initializers.values())
        for node in inner:
            own.update(node.outputs)
    for inner in nested_graphs(graph):
        for node in inner:
            captured.update((value, None) for value in node.inputs if value is not None and value not in own)
        captured.update((value, None) for value in inner.outputs if value not in own)
    return list(captured)


def value_names(model: ir.Model) -> set[str]:
    """Every value name in use, bodies and functions included."""
    names: set[str] = set()
    for graph in all_graphs(model):
        names.update(value.name for value in graph.inputs if value.name)
        names.update(graph.initializers)
        names.update(output.name for node in graph for output in node.outputs if output.name)
    return names


def make_names_unique(model: ir.Model) -> None:
    """Give a value that shares its name with another one a new name; inputs and outputs of the model keep theirs.

    Values of bodies count; those of functions do not, which have names of their own.
    """
    pinned = {*model.graph.inputs, *model.graph.outputs}
    taken = {value.name for value in pinned}
    later: list[ir.Value] = []
    for value in _named_values(model.graph):
        if value in pinned:
            continue
        if value.name in taken:
            later.append(value)
        taken.add(value.name)
    suffixes: dict[str, int] = {}
    for value in later:
        base = value.name or "value"
        count = suffixes.get(base, 0) + 1
        while f"{base}_{count}" in taken:
            count += 1
        suffixes[base] = count
        value.name = f"{base}_{count}"
        taken.add(value.name)


def name_control_flow(model: ir.Model) -> None:
    """Give every If, Loop and Scan a name of its own: its own if it can, and the same whenever the file is loaded.

    Passes keep the names of nodes, so that what comes out can be compared decision by decision with what went in.
    """
    nodes = list(all_nodes(model))
    found = [node for node in nodes if node.domain == "" and node.op_type in ("If", "Loop", "Scan")]
    others = {node.name for node in nodes}
    taken: set[str] = set()
    later: list[ir.Node] = []
    for node in found:
        if not node.name or node.name in taken:
            later.append(node)
        else:
            taken.add(node.name)
    for node in later:
        base = node.name or f"{node.op_type} of {node.outputs[0].name}"
        name, count = base, 0
        while name in taken or name in others:
            count += 1
            name = f"{base}_{count}"
        node.name = name
        taken.add(name)


def decided_by(node: ir.Node) -> dict[str, bool]:
    """The Ifs that went the same way as an If (True), or the opposite way, and are gone, by their names."""
    return {str(name): bool(same) for name, same in json.loads(node.metadata_props.get(DECIDES, "[]"))}


def path_of(node: ir.Node) -> dict[str, bool]:
    """The path that an If asks for, by the names of the Ifs on it; empty for one that asks for none."""
    return {str(name): bool(side) for name, side in json.loads(node.metadata_props.get(PATH, "[]"))}


def _named_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that a graph and its bodies define and that has a name."""
    for inner in nested_graphs(graph):
        values = [*inner.inputs, *inner.initializers.values(), *(o for node in inner for o in node.outputs)]
        yield from dict.fromkeys(value for value in values if value.name)


def count_nodes(model: ir.Model) -> int:
    """The number of nodes, bodies and functions included, Constant nodes left out (they compute nothing)."""
    return sum(1 for node in all_nodes(model) if node.op_type != "Constant")


def parameters(model: ir.Model) -> tuple[int, int]:
    """The number of weight elements and their bytes, each tensor object counted once."""
    seen: dict[int, ir.TensorProtocol] = {}
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                seen[id(value.const_value)] = value.const_value
        for node in graph:
            if node.op_type == "Constant" and (tensor := constant_tensor(node.outputs[0])) is not None:
                seen[id(tensor)] = tensor
    return sum(t.size for t in seen.values()), sum(t.nbytes for t in seen.values())


def opset(model: ir.Model, domain: str = "") -> int:
    """The version of an operator domain that a model imports; 0 where it imports none."""
    imports = model.opset_imports
    return imports.get(domain, imports.get("ai.onnx", 0) if domain == "" else 0)


def find_cycle(graph: ir.Graph) -> list[ir.Node]:
    """Nodes of ``graph`` that depend on each other in a circle (bodies count as part of their node), or []."""
    before: dict[ir.Node, list[ir.Node]] = {}
    for node in graph:
        producers = (value.producer() for value in read_by(node))
        before[node] = [maker for maker in producers if maker is not None and maker.graph is graph]
    after: dict[ir.Node, list[ir.Node]] = {node: [] for node in before}
    waiting = {node: len(makers) for node, makers in before.items()}
    for node, makers in before.items():
        for maker in makers:
            after[maker].append(node)
    ready = [node for node, count in waiting.items() if count == 0]
    while ready:
        node = ready.pop()
        del waiting[node]
        for reader in after[node]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    if not waiting:
        # The circle is inside a body.
        bodies = (body for node in before for body in subgraphs(node))
        return next((cycle for body in bodies if (cycle := find_cycle(body))), [])
    node = next(iter(waiting))
    trail: dict[ir.Node, None] = {}
    while node not in trail:
        trail[node] = None
        node = next(maker for maker in before[node] if maker in waiting)
    nodes = list(trail)
    return [*reversed(nodes[nodes.index(node) :]), nodes[-1]]
