"""Shape inference: what onnx can tell of the values in a model, without touching a weight.

Files declare shapes of inner values and outputs that no runtime checks, and that are wrong in some files. So
inference starts from the model's inputs and weights alone. Where it disagrees with a declaration it wins; where it
knows less the declaration stays, for estimates, and ``trusted_shape`` gives only what was inferred.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir

from graphopt import graphs

logger = logging.getLogger(__name__)

ShapeInference = Callable[[ir.Model], None]

# Tensors up to this size go into the inference: they may be shapes, axes or sizes.
_SMALL_BYTES = 1024
_TRUSTED = "graphopt.trusted_shape"
_GENERATION = "graphopt.shape_inferences"
_MADE_UP = "unk__"
# Names that exporters write where they know none: two such axes need not be equal.
_PLACEHOLDERS = frozenset({"", "?", "-1", "None", "none", "null", "unk", "unknown", "dynamic", "Dynamic", "*"})


def infer_shapes(model: ir.Model, proven: Mapping[ir.Value, ir.Shape] | None = None) -> None:
    """Fill in types and shapes that onnx can infer. What it cannot stays as it is: partial knowledge is success.

    Args:
        model: Is changed.
        proven: What the caller knows of results of nodes and of inputs of bodies, where onnx gives up.
    """
    try:
        proto = _skeleton(model, proven or {})
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except Exception as error:  # a model that onnx's inference cannot digest is still a model
        logger.info("shape inference stopped: %s", error)
        for graph in graphs.nested_graphs(model.graph):
            for node in graph:
                for value in node.outputs:
                    _write_back(value, None)
        return
    # Names that inference makes up start anew each time; those of an earlier time must not look the same.
    generation = model.meta[_GENERATION] = model.meta.get(_GENERATION, 0) + 1
    _Reader(f"unk__{generation}_").graph(model.graph, inferred.graph, main=True)


def is_known(shape: ir.Shape | None) -> bool:
    """Whether every axis has a number or a name."""
    return shape is not None and all(isinstance(d, int) or d.value is not None for d in shape)


def trusted_shape(value: ir.Value) -> ir.Shape | None:
    """The shape of a value as far as it follows from the model's inputs and weights; None where it does not.

    ``value.shape`` may say more: what the file declares and nothing confirms.
    """
    if value.is_initializer() and value.const_value is not None and not value.is_graph_input():
        return ir.Shape(value.const_value.shape.numpy())
    if _TRUSTED in value.meta:
        shape = value.meta[_TRUSTED]
        return shape if isinstance(shape, ir.Shape) else None
    if value.is_graph_input():
        return None if value.shape is None else _without_placeholders(value.shape)
    return None if value.is_graph_output() else value.shape


def inherit_trust(value: ir.Value, source: ir.Value) -> None:
    """What is known of the shape of ``source`` holds for ``value``, whatever ``value.shape`` will say."""
    if _TRUSTED in source.meta:
        value.meta[_TRUSTED] = source.meta[_TRUSTED]
    elif value is source or value.is_graph_output() or source.is_graph_output():
        value.meta[_TRUSTED] = trusted_shape(source)


# -- the model without its weights -------------------------------------------------------------------------------------


def _skeleton(model: ir.Model, proven: Mapping[ir.Value, ir.Shape]) -> onnx.ModelProto:
    """The model as a proto with the content of small constants only, and without declared inner shapes."""
    proto = onnx.ModelProto(ir_version=10)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=_inferred_as(model, domain, version))
    _write_graph(proto.graph, model.graph, proven, main=True)
    for function in model.functions.values():
        proto.functions.append(ir.to_proto(function))
    return proto


def _inferred_as(model: ir.Model, domain: str, version: int) -> int:
    """The opset whose inference is used: of 13 that of 14, which can tell what a Reshape to computed sizes gives.

    In between only BatchNormalization changed what its outputs are, where it has more than one.
    """
    if (domain, version) != ("", 13):
        return version
    trains = any(node.op_type == "BatchNormalization" and len(node.outputs) > 1 for node in graphs.all_nodes(model))
    return 13 if trains else 14


def _write_graph(proto: onnx.GraphProto, graph: ir.Graph, proven: Mapping[ir.Value, ir.Shape], *, main: bool) -> None:
    proto.name = graph.name or "graph"
    for value in graph.inputs:
        # A caller's array must match a static axis of a model input; nothing checks what a body declares.
        _declare(proto.input.add(), value, shape=value.shape if main else proven.get(value))
    for value in graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            _write_tensor(proto.initializer.add(), value.const_value, value.name or "")
    if not main:
        _write_outer_constants(proto, graph)
    for node in graph:
        made = proto.node.add()
        made.op_type, made.domain, made.overload = node.op_type, node.domain, node.overload
        made.input.extend([v.name or "" if v is not None else "" for v in node.inputs])
        made.output.extend([v.name or "" for v in node.outputs])
        for attribute in node.attributes.values():
            _write_attribute(made, attribute, proven)
        for value in node.outputs:
            if value in proven and value.type is not None and not value.is_graph_output():
                _declare(proto.value_info.add(), value, shape=proven[value])
        if node.domain not in ("", "ai.onnx", "ai.onnx.ml"):
            # What onnx does not know keeps what the file says of it.
            for value in node.outputs:
                if value.name and value.type is not None and not value.is_graph_output():
                    _declare(proto.value_info.add(), value, shape=value.shape)
    for value in graph.outputs:
        _declare(proto.output.add(), value, shape=proven.get(value))


def _write_outer_constants(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Small constants of the graphs around, which inference does not look for: axes and sizes."""
    values = dict.fromkeys(value for node in graph for value in node.inputs if value is not None)
    for value in values:
        tensor = graphs.constant_tensor(value) if value.graph is not graph else None
        if tensor is not None and tensor.nbytes <= _SMALL_BYTES and value.name:
            _write_tensor(proto.initializer.add(), tensor, value.name)


def _declare(info: onnx.ValueInfoProto, value: ir.Value, *, shape: ir.Shape | None) -> None:
    info.name = value.name or ""
    if value.type is None:
        return
    ir.serde.serialize_type_into(info.type, value.type)
    if shape is not None:
        ir.serde.serialize_shape_into(info.type, _without_placeholders(shape))


def _without_placeholders(shape: ir.Shape) -> ir.Shape:
    return ir.Shape([d if isinstance(d, int) or (d.value or "") not in _PLACEHOLDERS else None for d in shape])


def _write_attribute(node: onnx.NodeProto, attribute: ir.Attr, proven: Mapping[ir.Value, ir.Shape]) -> None:
    made = node.attribute.add()
    if not attribute.is_ref():
        if attribute.type is ir.AttributeType.GRAPH:
            made.name, made.type = attribute.name, onnx.AttributeProto.GRAPH
            _write_graph(made.g, attribute.as_graph(), proven, main=False)
            return
        if attribute.type is ir.AttributeType.TENSOR:
            made.name, made.type = attribute.name, onnx.AttributeProto.TENSOR
            _write_tensor(made.t, attribute.value, "")  # as_tensor() is slow: it checks a protocol
            return
    ir.serde.serialize_attribute_into(made, attribute)


def _write_tensor(proto: onnx.TensorProto, tensor: ir.TensorProtocol, name: str) -> None:
    proto.name = name
    proto.data_type = int(tensor.dtype)
    proto.dims.extend(tensor.shape.numpy())
    if tensor.dtype != ir.DataType.STRING and tensor.nbytes <= _SMALL_BYTES:
        proto.raw_data = tensor.tobytes()


# -- what came of it ---------------------------------------------------------------------------------------------------


class _Reader:
    """Writes inferred types and shapes into a model.

    Args:
        prefix: Of the names that inference made up for axes.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def graph(self, graph: ir.Graph, proto: onnx.GraphProto, *, main: bool) -> None:
        found: dict[str, onnx.TypeProto] = {info.name: info.type for info in proto.value_info}
        found.update((info.name, info.type) for info in proto.output)
        if not main:
            inputs = {info.name: info.type for info in proto.input}
            for value in graph.inputs:
                _write_back(value, *self.read(inputs.get(value.name or "")))
        for index, node in enumerate(graph):
            for value in node.outputs:
                _write_back(value, *self.read(found.get(value.name or "")))
            if graphs.has_subgraphs(node):
                bodies = {a.name: a.g for a in proto.node[index].attribute if a.type == onnx.AttributeProto.GRAPH}
                for name, attribute in node.attributes.items():
                    if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
                        self.graph(attribute.as_graph(), bodies[name], main=False)

    def read(self, proto: onnx.TypeProto | None) -> tuple[onnx.TypeProto | None, ir.Shape | None]:
        """A type as it was inferred, and its shape where it is a tensor's."""
        if proto is None or not proto.HasField("tensor_type"):
            return proto, None
        tensor = proto.tensor_type
        if not tensor.HasField("shape"):
            return proto, None
        dims: list[int | str | None] = []
        for axis in tensor.shape.dim:
            kind = axis.WhichOneof("value")
            name = axis.dim_param
            if kind == "dim_value":
                dims.append(axis.dim_value)
            elif name.startswith(_MADE_UP):
                dims.append(self.prefix + name[len(_MADE_UP) :])
            else:
                dims.append(name or None)
        return proto, ir.Shape(dims)


def _write_back(value: ir.Value, type_: onnx.TypeProto | None, inferred: ir.Shape | None = None) -> None:
    if value.type is None and type_ is not None:
        value.type = ir.serde.deserialize_type_proto_for_type(type_)
    declared = value.shape
    if value.is_graph_output() or (declared is not None and (inferred is None or _says_more(declared, inferred))):
        value.meta[_TRUSTED] = inferred
        return
    value.meta.pop(_TRUSTED, None)
    if inferred is not None:
        value.shape = inferred


def _is_made_up(name: str | None) -> bool:
    """Whether onnx's inference made an axis name up: the author's own, where there is one, says more."""
    return name is None or name.startswith("unk__")


def _says_more(declared: ir.Shape, inferred: ir.Shape) -> bool:
    """Whether a declared shape agrees with an inferred one and names axes that it does not."""
    if len(declared) != len(inferred):
        return False
    more = False
    for axis, known in zip(declared, inferred, strict=True):
        if isinstance(known, int):
            if isinstance(axis, int) and axis != known:
                return False
        elif isinstance(axis, int) or (not _is_made_up(axis.value) and _is_made_up(known.value)):
            more = True
    return more
