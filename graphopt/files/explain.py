"""Why ``onnx_ir`` could not read a protobuf: a slow walk over it, run only after it failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from graphopt.errors import BadInput

_DTYPES = {kind.value for kind in ir.DataType}


def explain(proto: onnx.ModelProto, error: BaseException, where: str) -> BadInput:
    """The reason that a model cannot be read, with its place.

    Args:
        proto: The model.
        error: What deserialisation raised; its innermost cause is the answer where the walk finds nothing.
        where: How the message calls the file.
    """
    for at, what in _problems(proto):
        return BadInput(what, where=f"{where}: {at}", hint="export the model again")
    while error.__cause__ is not None:
        error = error.__cause__
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return BadInput(f"cannot be read: {first}", where=where, hint="export the model again")


def _problems(proto: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    yield from _graph_problems(proto.graph, "graph")
    for function in proto.functions:
        at = f"function {function.domain}::{function.name}"
        yield from _node_problems(function.node, set(function.input), at)
        made = set(function.input) | {name for node in function.node for name in node.output}
        for name in function.output:
            if name not in made:
                yield at, f"output {name!r} is not produced by any node"


def _graph_problems(graph: onnx.GraphProto, at: str) -> Iterator[tuple[str, str]]:
    for kind, infos in (("input", graph.input), ("value", graph.value_info), ("output", graph.output)):
        for info in infos:
            for what in _type_problems(info.type):
                yield f"{kind} {info.name!r}", what
    for tensor in graph.initializer:
        yield from _tensor_problems(tensor, f"tensor {tensor.name!r}")
    names = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    yield from _node_problems(graph.node, names, at)


def _node_problems(nodes: Iterable[onnx.NodeProto], names: set[str], at: str) -> Iterator[tuple[str, str]]:
    seen = set(names)
    for node in nodes:
        title = f"node {node.name!r} ({node.op_type})" if node.name else f"{at}: {node.op_type} node"
        for name in node.output:
            if name and name in seen:
                yield title, f"makes {name!r}, which exists already"
            seen.add(name)
        for attribute in node.attribute:
            yield from _attribute_problems(attribute, title)


def _attribute_problems(attribute: onnx.AttributeProto, title: str) -> Iterator[tuple[str, str]]:
    kinds = onnx.AttributeProto
    where = f"{title}: attribute {attribute.name!r}"
    if attribute.type in (kinds.SPARSE_TENSOR, kinds.SPARSE_TENSORS):
        yield where, "sparse tensors are not supported"
    if attribute.type == kinds.STRINGS:
        for text in attribute.strings:
            try:
                text.decode()
            except UnicodeDecodeError:
                yield where, "its strings are not UTF-8 text"
                break
    for tensor in [attribute.t] if attribute.type == kinds.TENSOR else attribute.tensors:
        yield from _tensor_problems(tensor, where)
    for graph in [attribute.g] if attribute.type == kinds.GRAPH else attribute.graphs:
        yield from _graph_problems(graph, where)
    if attribute.type == kinds.TYPE_PROTO:
        for what in _type_problems(attribute.tp):
            yield where, what


def _type_problems(proto: onnx.TypeProto) -> Iterator[str]:
    field = proto.WhichOneof("value")
    if field in ("tensor_type", "sparse_tensor_type"):
        dtype = getattr(proto, field).elem_type
        if dtype not in _DTYPES:
            yield f"has unknown element type {dtype}"
    elif field in ("sequence_type", "optional_type"):
        inner = getattr(proto, field).elem_type
        if inner.WhichOneof("value") is None:
            yield "has a sequence or optional type without an element type"
        yield from _type_problems(inner)
    elif field == "map_type":
        yield "is a map, which is not supported"


def _tensor_problems(tensor: onnx.TensorProto, where: str) -> Iterator[tuple[str, str]]:
    if tensor.data_type not in _DTYPES:
        yield where, f"has unknown data type {tensor.data_type}"
    for entry in tensor.external_data:
        if entry.key in ("offset", "length"):
            if not entry.value.lstrip("-").isdecimal():
                yield where, f"the {entry.key} of its external data is {entry.value!r}, not a number"
            elif entry.value.startswith("-"):
                yield where, f"the {entry.key} of its external data is negative: {entry.value}"
