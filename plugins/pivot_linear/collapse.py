"""Pivot forms as one PivotLinear node each, and back to standard operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import add_constant, insert_named, sweep, take_place
from graphopt.matching import float_attribute, import_domain, int_attribute
from graphopt.plugins.pivot_linear.function import (
    DOMAIN,
    OLDEST_OPSET,
    OP,
    Signature,
    attach,
    convolution_of,
    is_pivot_linear,
    pivot_linear,
    standard_nodes,
)
from graphopt.plugins.pivot_linear.match import PivotSite, pivot_at
from graphopt.shapes import inherit_trust
from graphopt.sites import Linear, Spelling
from graphopt.weights import computed


def collapse(model: ir.Model, *, wanted: Callable[[PivotSite], bool] | None = None) -> int:
    """Write every pivot form of a model as one PivotLinear node, and attach the bodies.

    Those in functions stay, as do tables, quantised weights, and products whose constants stand on either side: the
    operator has no name for them. Models older than opset 13 stay as they are.

    Args:
        model: Changed in place.
        wanted: Whether a form is to become a node; all of them where it is not given.

    Returns:
        How many there are.
    """
    opset = graphs.opset(model)
    if opset < OLDEST_OPSET:
        return 0
    names = graphs.value_names(model)
    taken: set[ir.Node] = set()
    count = 0
    for graph in list(graphs.nested_graphs(model.graph)):
        constants: dict[object, ir.Value] = {}
        for node in reversed(list(graph)):
            if node in taken or node.graph is not graph:
                continue
            site = pivot_at(node)
            if isinstance(site, str) or not _has_a_name(site) or (wanted is not None and not wanted(site)):
                continue
            taken.update(site.nodes)
            _write(site, graph, opset, constants, names)
            import_domain(model, graph, DOMAIN)
            count += 1
    attach(model)
    return count


def expand(model: ir.Model) -> int:
    """Write every PivotLinear node as the standard operators that it stands for; their bodies go.

    Returns:
        How many there were.

    Raises:
        BadInput: A node's signature does not follow from it.
    """
    names = graphs.value_names(model)
    count = 0
    for graph in list(graphs.all_graphs(model)):
        for node in [node for node in graph if is_pivot_linear(node)]:
            lengths = graphs.static_shape(node.inputs[2])
            sizes = None if lengths is None else lengths[:2]
            nodes = standard_nodes(Signature.of(node, graphs.opset(model)), node.inputs, sizes=sizes)
            _put(node.outputs[0], nodes, graph, node, names)
            graphs.detach(node)
            graph.remove(node)
            count += 1
    attach(model)
    if not any(node.domain == DOMAIN for node in graphs.all_nodes(model)):
        model.graph.opset_imports.pop(DOMAIN, None)
    return count


def _has_a_name(site: PivotSite) -> bool:
    if Spelling.GATHER in (site.first.spelling, site.second.spelling):
        return False
    return not (site.first.weight.quantised or site.second.weight.quantised)


def _write(site: PivotSite, graph: ir.Graph, opset: int, constants: dict[object, ir.Value], names: set[str]) -> None:
    kept, coefficients = (_operand(linear, graph, opset, constants, names) for linear in (site.kept, site.coefficients))
    bias = order = None
    if site.biased:
        total = site.bias(opset)
        assert total is not None
        bias = add_constant(graph, ir.tensor(total.astype(site.kept.weight.dtype.numpy())), "bias", names)
    if site.order is not None:
        order = add_constant(graph, ir.tensor(site.order), "order", names)
    signature = Signature(
        opset,
        site.form,
        site.axis,
        len(site.kept.kernel),
        bias is not None,
        order is not None,
        convolution_of(site.kept.node.attributes) if site.kept.kernel and not site.kept.plain else (),
    )
    node = pivot_linear(signature, site.x, kept, coefficients, bias, order, like=site.y)
    _put(site.y, [node], graph, site.nodes[-1], names)
    sweep(site.nodes)


def _put(old: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph, before: ir.Node, names: set[str]) -> None:
    """New nodes, whose last one makes what a value was."""
    new = nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    inherit_trust(new, old)
    insert_named(graph, before, nodes, old.name or OP, names)
    take_place(old, new, graph)


def _operand(
    linear: Linear, graph: ir.Graph, opset: int, constants: dict[object, ir.Value], names: set[str]
) -> ir.Value:
    """The matrix of a product as (outputs, inputs[, *kernel]): a constant that is there, or one of its own."""
    weight = linear.weight
    flipped = linear.spelling in (Spelling.CONV, Spelling.LEFT) or bool(int_attribute(linear.node, "transB", 0))
    if float_attribute(linear.node, "alpha", 1.0) == 1.0:
        if flipped:
            return weight.value
        last = weight.through[-1] if weight.through else None
        if last is not None and last.op_type == "Transpose" and last.inputs[0] is not None:
            return last.inputs[0]
    key = (weight.root, linear.reading)
    if key not in constants:
        shape = (linear.outputs, linear.inputs, *linear.kernel)

        def compute() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(linear.matrix(opset)))

        base = weight.root.name or "weight"
        constants[key] = add_constant(graph, computed(compute, weight.dtype, shape), base, names)
    return constants[key]
