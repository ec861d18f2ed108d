"""What goes where when a model is saved: the places of its tensors, and which tensors go into the data file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from graphopt import graphs
from graphopt.files.external import byte_count
from graphopt.files.load import EXTERNAL

# Protobuf messages end at 2 GiB; this leaves room for the graph itself.
EMBED_LIMIT = 1_800_000_000
# Smaller tensors stay in the .onnx: shapes, axes and scalars are what shape inference wants to read there.
INLINE_BYTES = 1024


@dataclass(frozen=True)
class Slot:
    """A place in a model that holds a tensor: what is there, and how to put another there."""

    name: str
    tensor: ir.TensorProtocol
    is_initializer: bool
    get: Callable[[], ir.TensorProtocol | None]
    put: Callable[[ir.TensorProtocol], None]


def tensor_slots(model: ir.Model) -> Iterator[Slot]:
    """Every place of a model that holds a tensor: initializers, and attributes of nodes, in bodies too."""
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield Slot(
                    value.name or "",
                    value.const_value,
                    True,
                    partial(getattr, value, "const_value"),
                    partial(setattr, value, "const_value"),
                )
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield _attribute_slot(node, attribute, None)
                elif attribute.type is ir.AttributeType.TENSORS and not attribute.is_ref():
                    for index in range(len(attribute.as_tensors())):
                        yield _attribute_slot(node, attribute, index)


def _attribute_slot(node: ir.Node, attribute: ir.Attr, index: int | None) -> Slot:
    name = attribute.name

    def get() -> ir.TensorProtocol | None:
        found = node.attributes.get(name)
        if found is None or found.type is not attribute.type or found.is_ref():
            return None
        return found.as_tensor() if index is None else found.as_tensors()[index]

    def put(tensor: ir.TensorProtocol) -> None:
        if index is None:
            node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=attribute.doc_string)
        else:
            tensors = list(node.attributes[name].as_tensors())
            tensors[index] = tensor
            node.attributes[name] = ir.AttrTensors(name, tensors, doc_string=attribute.doc_string)

    tensor = get()
    assert tensor is not None
    return Slot(tensor.name or name, tensor, False, get, put)


def embeds(model: ir.Model) -> bool:
    """Whether the weights go into the .onnx: as the input had them, as long as they fit."""
    if EXTERNAL in model.graph.meta:
        return False
    total = 0
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            return False
        total += _size(tensor)
    return total <= EMBED_LIMIT


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor in a model, wherever it is."""
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()
                elif attribute.type is ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from attribute.as_tensors()


def _size(tensor: ir.TensorProtocol) -> int:
    """The bytes of a tensor; those of strings do not count, they are never many."""
    if tensor.dtype is ir.DataType.STRING:
        return 0
    if isinstance(tensor, ir.serde.TensorProtoTensor):  # its .nbytes builds a shape object first
        return byte_count(tensor.raw.data_type, math.prod(tensor.raw.dims))
    return tensor.nbytes


def goes_outside(slot: Slot) -> bool:
    """Strings cannot be external; constants in attributes are only where they were (runtimes differ about them)."""
    if _size(slot.tensor) < INLINE_BYTES:
        return False
    return slot.is_initializer or isinstance(slot.tensor, ir.ExternalTensor)


def storage_key(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors that are the same bytes in the same place: such are written once."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    return id(tensor)
