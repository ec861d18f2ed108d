"""The same computation twice, the same constant twice: one is enough."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage

# A constant up to this size is compared by its bytes; a larger one only by where it lies, so that no weight is read.
_READ_BYTES = 1 << 20
_PURE_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}
)

_Table = dict[Hashable, ir.Node]


class MergeDuplicates(Pass):
    """Lets one node stand for all that compute the same, and one constant for all that are equal.

    A node in a body is compared with the nodes before it there and with those before its owner in the graphs around.
    Two bodies side by side share nothing: only one of them may run.
    """

    name = "merge-duplicates"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="nodes with the same operator, attributes and inputs; constants with the same type, shape and bytes",
        refuses="random operators and Dropout; operators of other domains, which may have a state; nodes with bodies; "
        "constants over 1 MB unless they are one tensor or one place in a file; constants that are inputs too",
        costs="one look at each node, one hash of each small constant; less to compute and to store",
        source="global value numbering (Alpern, Wegman, Zadeck 1988)",
    )

    def apply(self, ctx: Context) -> None:
        self._merge_constants(ctx.model.graph, {}, ctx)
        self._merge_nodes(ctx.model.graph, [], ctx)
        for function in ctx.model.functions.values():
            self._merge_nodes(function.graph, [], ctx)

    # -- constants -----------------------------------------------------------------------------------------------------

    def _merge_constants(self, graph: ir.Graph, outer: dict[Hashable, ir.Value], ctx: Context) -> None:
        seen = dict(outer) if outer else {}
        duplicates: dict[ir.Value, dict[ir.Value, ir.Value]] = {}
        for value in list(graph.initializers.values()):
            if value.is_graph_input() or value.is_graph_output() or value.const_value is None:
                continue
            key = _constant_key(value.const_value)
            if key is None:
                continue
            kept = seen.setdefault(key, value)
            if kept is not value and value.uses():
                duplicates.setdefault(kept, {})[value] = kept
        for mapping in duplicates.values():
            first = next(iter(mapping))
            if ctx.replace(mapping, rule="constant", before=next(iter(first.uses())).node):
                for value in mapping:
                    graph.initializers.pop(value.name or "")
        for node in graph:
            if graphs.has_subgraphs(node):
                for body in graphs.subgraphs(node):
                    self._merge_constants(body, seen, ctx)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _merge_nodes(self, graph: ir.Graph, outer: list[_Table], ctx: Context) -> None:
        table: _Table = {}
        scopes = [*outer, table]
        for node in list(graph):
            if graphs.has_subgraphs(node):
                for body in graphs.subgraphs(node):
                    self._merge_nodes(body, scopes, ctx)
                continue
            key = _node_key(node)
            if key is None:
                continue
            twin = next((scope[key] for scope in scopes if key in scope), None)
            if twin is None:
                table[key] = node
                continue
            mapping = {
                old: new
                for old, new in zip(node.outputs, twin.outputs, strict=True)
                if old.uses() or old.is_graph_output()
            }
            if mapping and not ctx.replace(mapping, rule="node"):
                table.setdefault(key, node)


def _node_key(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for a node that must stay."""
    if node.domain not in _PURE_DOMAINS or (node.op_type in _RANDOM and node.domain != "ai.onnx.ml"):
        return None
    attributes: list[Hashable] = []
    if node.attributes:
        for name in sorted(node.attributes):
            key = _attribute_key(node.attributes[name])
            if key is None:
                return None
            attributes.append((name, key))
    return (
        node.domain,
        node.op_type,
        node.overload,
        node.inputs,
        tuple(output.name == "" for output in node.outputs),
        tuple(attributes),
    )


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    kind = attribute.type
    if attribute.is_ref():
        return ("ref", attribute.ref_attr_name, kind)
    value = attribute.value
    if kind is ir.AttributeType.TENSOR:
        return _constant_key(value)
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return (kind, value)
    if kind is ir.AttributeType.FLOAT:
        return (kind, float(value).hex())  # tells -0.0 from 0.0, and NaN equals itself
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return (kind, tuple(value))
    if kind is ir.AttributeType.FLOATS:
        return (kind, tuple(float(v).hex() for v in value))
    return None


def _constant_key(tensor: ir.TensorProtocol) -> Hashable | None:
    """Equal for tensors with the same type, shape and bytes."""
    dims = tensor.shape.numpy()
    if tensor.dtype == ir.DataType.STRING:
        return None
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > _READ_BYTES:
        place = str(Path(tensor.path))
        return ("file", place, tensor.offset, tensor.length, tensor.dtype, dims)
    if tensor.nbytes > _READ_BYTES or isinstance(tensor, ir.LazyTensor):
        return ("tensor", id(tensor))
    return ("bytes", tensor.dtype, dims, tensor.tobytes())
