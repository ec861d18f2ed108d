"""A model in memory as a session takes it: the graph in bytes, its large weights as arrays beside them.

Only what the runtime needs is written: no metadata and no inferred shapes, which take longer to write and to read than
all the rest, and constants as initializers, which the runtime would make of them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graphs

# Where a weight that is handed over as an array claims to lie. ONNX Runtime wants the file to exist; it is
# empty, so that reading it instead of the array is an error and never zeros.
HANDED_OVER = "handed-over"
_SMALL_BYTES = 1024


def split_weights(
    model: ir.Model, *, outputs: Sequence[ir.Value] = (), threshold: int = _SMALL_BYTES
) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """Serialise a model without its large weights, for ``create_session(…, initializers=…)``.

    The model is left as it is. Constants of the main graph larger than ``threshold`` bytes come back as arrays
    (memory-mapped ones stay so); small ones, strings, types of less than a byte, and those of bodies are in the bytes.

    Args:
        model: Named throughout.
        outputs: Values of the main graph to return besides its outputs.
        threshold: In bytes.

    Returns:
        The serialised model, and the arrays by initializer name.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.functions.values():
        ir.serde.serialize_function_into(proto.functions.add(), function)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    _write_graph(proto.graph, model.graph, weights, threshold)
    for value in dict.fromkeys(outputs):
        if not value.is_graph_output():
            proto.graph.output.add(name=value.name)
    return proto.SerializeToString(), weights


def _write_graph(
    proto: onnx.GraphProto, graph: ir.Graph, weights: dict[str, np.ndarray[Any, Any]] | None, threshold: int
) -> None:
    """Write a graph; ``weights`` is None in a body, whose weights cannot be handed over."""
    proto.name = graph.name or "graph"
    for value in graph.inputs:
        ir.serde.serialize_value_into(proto.input.add(), value)
    for value in graph.outputs:
        ir.serde.serialize_value_into(proto.output.add(), value)
    constants: set[ir.Value] = set()
    for value in graph.initializers.values():
        if value.const_value is not None:
            _write_tensor(proto.initializer.add(), value, value.const_value, weights, threshold)
            constants.add(value)
    nodes = []
    for node in graph:
        tensor = graphs.constant_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None and not node.outputs[0].is_graph_output():
            _write_tensor(proto.initializer.add(), node.outputs[0], tensor, weights, threshold)
            constants.add(node.outputs[0])
        else:
            nodes.append(node)
    for node in _constants_first(nodes, constants.difference(graph.inputs)):
        _write_node(proto.node.add(), node, threshold)
        if node.domain:
            # The runtime infers the types that standard operators give; of others it may know nothing.
            for value in node.outputs:
                if value.name and value.type is not None and not value.is_graph_output():
                    ir.serde.serialize_value_into(proto.value_info.add(), value)


def _constants_first(nodes: Sequence[ir.Node], constants: set[ir.Value]) -> list[ir.Node]:
    """The nodes that read constants alone come first; otherwise the order stays.

    ONNX Runtime sorts nodes with a list of those that are ready, which it walks once for every node: nodes that are
    ready from the start and come late make that quadratic.
    """
    known: set[ir.Value | None] = {None, *constants}
    first: list[ir.Node] = []
    rest: list[ir.Node] = []
    for node in nodes:
        if known.issuperset(node.inputs) and not graphs.has_subgraphs(node):
            known.update(node.outputs)
            first.append(node)
        else:
            rest.append(node)
    return first + rest


def _write_node(proto: onnx.NodeProto, node: ir.Node, threshold: int) -> None:
    proto.op_type = node.op_type
    proto.name = node.name or ""
    if node.domain:
        proto.domain = node.domain
        if node.overload:
            proto.overload = node.overload
    proto.input.extend(["" if value is None else value.name or "" for value in node.inputs])
    proto.output.extend([value.name or "" for value in node.outputs])
    for attribute in node.attributes.values() if node.attributes else ():
        written = proto.attribute.add()
        if attribute.is_ref() or attribute.type not in graphs.GRAPH_ATTRIBUTES:
            ir.serde.serialize_attribute_into(written, attribute)
            continue
        written.name = attribute.name
        written.type = int(attribute.type)
        if attribute.type is ir.AttributeType.GRAPH:
            _write_graph(written.g, attribute.as_graph(), None, threshold)
        else:
            for body in attribute.as_graphs():
                _write_graph(written.graphs.add(), body, None, threshold)


def _write_tensor(
    proto: onnx.TensorProto,
    value: ir.Value,
    tensor: ir.TensorProtocol,
    weights: dict[str, np.ndarray[Any, Any]] | None,
    threshold: int,
) -> None:
    name = value.name or ""
    if weights is not None and tensor.nbytes > threshold and _can_be_handed_over(tensor):
        weights[name] = tensor.numpy()
        tensor = ir.ExternalTensor(
            HANDED_OVER, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    elif isinstance(tensor, ir.ExternalTensor):
        # The bytes have no folder that its file could be found in.
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    ir.serde.serialize_tensor_into(proto, tensor)
    proto.name = name


def _can_be_handed_over(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8
