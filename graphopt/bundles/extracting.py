"""Some nodes of a network as a network of their own, and which of these compute the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import read_instead
from graphopt.shapes import trusted_shape


def named(value: ir.Value) -> str:
    """What the host calls a value: by its name, or where it is a constant by that of what hands it on."""
    return f"{value.name}:value" if graphs.is_constant(value) else value.name or ""


def hand_on(value: ir.Value) -> ir.Node:
    """A constant as a value that the host has."""
    name = named(value)
    made = ir.Value(name=name, type=value.type, shape=value.shape)
    tensor = graphs.constant_tensor(value)
    if made.type is None and tensor is not None:
        made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    return ir.Node("", "Identity", [value], outputs=[made], name=f"{name}/identity")


def extract(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], model: ir.Model) -> tuple[ir.Model, list[ir.Value]]:
    """A network of copies of some nodes, and the values of the original that it reads, in the order of its inputs."""
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []

    def mirrored(value: ir.Value) -> ir.Value:
        if value not in copies:
            tensor = graphs.constant_tensor(value) if graphs.is_constant(value) else None
            made = ir.Value(name=value.name, type=value.type, shape=trusted_shape(value), const_value=tensor)
            if tensor is None:
                inputs.append(value)
            else:
                made.type = made.type or ir.TensorType(tensor.dtype)
                constants.append(made)
            copies[value] = made
        return copies[value]

    made = [copy_node(node, mirrored, copies) for node in nodes]
    graph = ir.Graph(
        [copies[value] for value in inputs],
        [copies[value] for value in outputs],
        nodes=made,
        initializers=constants,
        opset_imports=dict(model.opset_imports),
        name="block",
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name="graphopt"), inputs


def copy_node(node: ir.Node, mirrored: Callable[[ir.Value], ir.Value], copies: dict[ir.Value, ir.Value]) -> ir.Node:
    """A copy of a node that reads what ``mirrored`` says; its outputs are added to ``copies``."""
    reads = [None if value is None else mirrored(value) for value in node.inputs]
    attributes = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            attributes.append(ir.AttrGraph(attribute.name, _copy_body(attribute.as_graph(), mirrored)))
        else:
            attributes.append(attribute)
    made = [ir.Value(name=value.name, type=value.type, shape=trusted_shape(value)) for value in node.outputs]
    copies.update(zip(node.outputs, made, strict=True))
    return ir.Node(node.domain, node.op_type, reads, attributes, overload=node.overload, outputs=made, name=node.name)


def _copy_body(body: ir.Graph, mirrored: Callable[[ir.Value], ir.Value]) -> ir.Graph:
    copy = body.clone(allow_outer_scope_values=True)
    read_instead(copy, {value: mirrored(value) for value in graphs.captured_values(copy)})
    return copy


def can_be_shared(block: ir.Model) -> bool:
    """Whether one session may run for two places: not where it draws random numbers, one after the other for each
    place, and not where it has decisions, which have names.
    """
    return not any(node.op_type in graphs.RANDOM or graphs.has_subgraphs(node) for node in graphs.all_nodes(block))


def content_of(block: ir.Model) -> str:
    """What a block computes, whatever its values are called: the same for blocks that may stand for each other."""
    digest = hashlib.sha256()
    numbers: dict[ir.Value, int] = {}

    def number(value: ir.Value | None) -> int:
        return -1 if value is None else numbers.setdefault(value, len(numbers))

    def tell(*what: object) -> None:
        digest.update(repr(what).encode())

    def graph(inner: ir.Graph) -> None:
        for value in inner.inputs:
            tell("in", number(value), str(value.type), str(value.shape))
        for value in inner.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            tell("constant", number(value), str(tensor.dtype), tensor.shape.numpy())
            digest.update(_bytes_of(tensor))
        for node in inner:
            tell(node.domain, node.op_type, node.overload, [number(value) for value in node.inputs])
            for name in sorted(node.attributes):
                attribute = node.attributes[name]
                if attribute.type is ir.AttributeType.GRAPH:
                    tell(name)
                    graph(attribute.as_graph())
                else:
                    digest.update(ir.serde.serialize_attribute(attribute).SerializeToString(deterministic=True))
            tell([number(value) for value in node.outputs])
        tell("out", [number(value) for value in inner.outputs])

    graph(block.graph)
    return digest.hexdigest()


def _bytes_of(tensor: ir.TensorProtocol) -> bytes:
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    return tensor.tobytes()
