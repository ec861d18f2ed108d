"""Nodes of plugins in ONNX models, as TensorRT's parser reads them.

The parser finds a plugin by the node's type and its attributes ``plugin_namespace`` and ``plugin_version``, and hands
on the attributes that the plugin declares, by the types that *they* have:

======================  =======================================================================================
INT, INTS               int32; the upper half of larger numbers is dropped without a word
FLOAT, FLOATS           float32
TENSOR                  int8, int32, float32 arrive; float64 as float32; int64, uint8, bool and float16 do not
absent                  left out, and every attribute behind it is then taken for the one before it
======================  =======================================================================================

(tests/engines/test_plugin_nodes.py looks at what the parser of TensorRT-RTX, which is the same, hands on.) So integers
are written as INT or INTS that fit, numbers as FLOAT or FLOATS, and none is left out. Initializers of uint8 become
int32 in the parser, four times as large: packed weights are written as int8 of the same bytes.

onnx-graphsurgeon writes the node; it sees names, types and shapes of the node's tensors and no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import add_constant
from graphopt.engines.plugins import Array, Plugin
from graphopt.errors import BadInput, GraphoptError, MissingDependency, install_hint
from graphopt.matching import import_domain
from graphopt.targets.target import type_name
from graphopt.weights import computed

if TYPE_CHECKING:
    import onnx

VERSION = "1"
"""TensorRT gives every quickly deployable plugin this version."""


def write_node(
    model: ir.Model,
    graph: ir.Graph,
    plugin: Plugin,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Any],
    outputs: Sequence[ir.Value],
    *,
    name: str,
    names: set[str],
) -> ir.Node:
    """A node of a plugin, in no graph yet; the model imports its domain from now on.

    Args:
        model: That the node is for.
        graph: Where it will be; gets initializers of packed weights.
        plugin: Of the node.
        inputs: As the plugin names them; initializers of uint8 are replaced by int8 of the same bytes.
        attributes: A number or a sequence of numbers for each attribute that the plugin declares.
        outputs: In no graph; they become the node's.
        name: The node's.
        names: Of the model's values; grows.

    Raises:
        MissingDependency: onnx-graphsurgeon is not installed.
        BadInput: An attribute is missing, unknown or cannot be written; a tensor has a type that the plugin or
            TensorRT's parser does not take.
    """
    if len(inputs) != len(plugin.inputs) or len(outputs) != len(plugin.outputs):
        told = f"{len(plugin.inputs)} inputs and {len(plugin.outputs)} outputs"
        raise BadInput(f"{plugin.name} has {told}, not {len(inputs)} and {len(outputs)}", where=name)
    written = attributes_to_write(plugin, attributes, where=name)
    tensors = [_as_bytes(value, graph, names) if _is_packed(value) else value for value in inputs]
    node = _by_graphsurgeon(plugin, tensors, written, outputs, name)
    made = ir.Node(plugin.namespace, plugin.name, tensors, node.attributes.values(), outputs=outputs, name=name)
    import_domain(model, graph, plugin.namespace)
    return made


def is_node_of(node: ir.Node, plugin: Plugin) -> bool:
    """Whether a node is one of a plugin, as `write_node` writes it."""
    return node.op_type == plugin.name and node.domain == plugin.namespace


def attributes_of(node: ir.Node, plugin: Plugin) -> dict[str, Array]:
    """What a plugin node says, by name: one-dimensional arrays of the declared types.

    Raises:
        BadInput: An attribute is missing, or holds something else.
    """
    found: dict[str, Array] = {}
    for name, dtype in plugin.attributes:
        attribute = node.attributes.get(name)
        if attribute is None or attribute.type not in _KINDS[np.dtype(dtype).kind]:
            raise BadInput(f"the attribute {name!r} of {plugin.name} is missing or of another type", where=node.name)
        found[name] = np.atleast_1d(np.array(attribute.value, np.dtype(dtype)))
    return found


_KINDS = {
    "i": (ir.AttributeType.INT, ir.AttributeType.INTS),
    "f": (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS),
}


def attributes_to_write(plugin: Plugin, given: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Attributes as numbers and lists, such that TensorRT's parser hands on what is given (rounded to float32).

    Raises:
        BadInput: One is missing, unknown, empty, or does not fit into its type or into what the parser hands on.
    """
    place = where or plugin.name
    if given.keys() != dict(plugin.attributes).keys():
        told = ", ".join(name for name, _ in plugin.attributes) or "none"
        raise BadInput(f"{plugin.name} has the attributes {told}, not {', '.join(given) or 'none'}", where=place)
    written: dict[str, Any] = {}
    for name, dtype in plugin.attributes:
        array = np.asarray(given[name])
        with np.errstate(all="ignore"):  # what does not fit is refused below
            exact = np.atleast_1d(array).astype(np.dtype(dtype))
        if array.ndim > 1 or array.size == 0:
            raise BadInput(f"the attribute {name!r} is no number and no list of numbers", where=place)
        if exact.dtype.kind == "i" and not np.array_equal(exact, np.atleast_1d(array)):
            raise BadInput(f"the attribute {name!r} does not fit into {dtype}", where=place)
        if exact.dtype.kind == "i" and (exact.min() < -(2**31) or exact.max() >= 2**31):
            raise BadInput(
                f"the attribute {name!r} needs more than 32 bits, which TensorRT's parser drops", where=place
            )
        if not np.isfinite(exact).all():
            raise BadInput(f"the attribute {name!r} is no finite number of {dtype}", where=place)
        written[name] = exact[0].item() if exact.size == 1 else exact.tolist()
    return written


def _by_graphsurgeon(
    plugin: Plugin, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], outputs: Sequence[ir.Value], name: str
) -> ir.Node:
    """The node alone, in a graph of its own, as graphsurgeon exports it."""
    try:
        import onnx_graphsurgeon as gs
    except ImportError as error:
        what = f"writing a node of {plugin.name} needs onnx-graphsurgeon"
        raise MissingDependency(what, hint=install_hint("graphsurgeon")) from error

    def variable(value: ir.Value) -> Any:
        shape = None if value.shape is None else [d if isinstance(d, int) else str(d.value or "") for d in value.shape]
        return gs.Variable(value.name, dtype=None if value.dtype is None else int(value.dtype), shape=shape)

    # An input may be given twice; a tensor is one variable.
    variables = {value: variable(value) for value in inputs}
    made = [variable(value) for value in outputs]
    attributes = {**attributes, "plugin_namespace": plugin.namespace, "plugin_version": VERSION, "aot": 1}
    node = gs.Node(
        op=plugin.name,
        name=name,
        domain=plugin.namespace,
        attrs=attributes,
        inputs=[variables[value] for value in inputs],
        outputs=made,
    )
    graph = gs.Graph(nodes=[node], inputs=list(variables.values()), outputs=made)
    proto: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    return ir.from_proto(proto).graph[0]


def _is_packed(value: ir.Value) -> bool:
    return value.dtype is ir.DataType.UINT8


def _as_bytes(value: ir.Value, graph: ir.Graph, names: set[str]) -> ir.Value:
    """The constant that holds the bytes of a uint8 one as int8; made where there is none yet."""
    tensor = graphs.constant_tensor(value)
    if tensor is None:
        what = f"{value.name} is uint8 and no constant; TensorRT's parser would make it int32"
        raise BadInput(what, hint="cast it to int32, or pack it as int8")
    key = f"{value.name}/int8"
    known = graph.initializers.get(key)
    if known is not None and known.meta.get(_BYTES_OF) is tensor:
        return known
    shape = tuple(tensor.shape.numpy())

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy()).view(np.int8).reshape(shape))

    made = add_constant(graph, computed(compute, ir.DataType.INT8, shape), key, names)
    made.meta[_BYTES_OF] = tensor
    return made


_BYTES_OF = "graphopt.bytes_of"


def check_types(plugin: Plugin, inputs: Sequence[ir.Value]) -> tuple[str, ...]:
    """The combination of types that a plugin has for these inputs.

    Raises:
        GraphoptError: It has none, or the type of an input is not known.
    """
    kinds: list[str] = []
    for value in inputs:
        if value.dtype is None:
            raise GraphoptError(f"the type of {value.name} is not known", where=f"plugin {plugin.name}")
        kinds.append("int8" if _is_packed(value) else type_name(value.dtype))
    return plugin.types_of(kinds)
