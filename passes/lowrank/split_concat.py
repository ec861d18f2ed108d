"""``split-concat``: parts that are joined only to be multiplied are multiplied apart, and the products added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import FLOATS, int_attribute, made_by
from graphopt.passes.lowrank.elementwise import BROADCASTING, ELEMENTWISE, MOST_NODES, size_along, slice_of
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shapes import trusted_shape
from graphopt.sites import ROOTS, Linear, Spelling, linear_at

Array = npt.NDArray[Any]

_PRODUCTS = frozenset({*ROOTS, "FusedMatMul"})
LEAST_GAIN = 0.05
"""The least fraction of the time to be saved: what is split is no pivot form, and runs on no kernel of those."""


@dataclass
class _Region:
    """What lies between some Concats and the products that read them.

    Attributes:
        graph: All of it is in this one.
        axis: Along which the parts are joined, counted from the end.
        sizes: Of the parts.
        joined: Results of Concats of such parts -> the parts.
        nodes: The elementwise nodes between.
        sites: The products.
        sliced: Constants of one number (or slice) for each index of the axis.
        beside: Values that are computed, and broadcast along the axis.
    """

    graph: ir.Graph | ir.Function | None
    axis: int
    sizes: tuple[int, ...]
    joined: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    sites: list[Linear] = field(default_factory=list)
    sliced: dict[ir.Value, ir.TensorProtocol] = field(default_factory=dict)
    beside: set[ir.Value] = field(default_factory=set)

    @property
    def total(self) -> int:
        """The size of the axis."""
        return sum(self.sizes)

    def places(self) -> Iterator[slice]:
        """Where each part is along the axis."""
        start = 0
        for size in self.sizes:
            yield slice(start, start + size)
            start += size


class _Refused(Exception):
    """A region that cannot be computed in parts."""


class SplitConcat(RulePass):
    """Multiplies the parts of a Concat apart where only products read it, and adds what comes out.

    The row form of a pivot layer joins the pivots and the others. Behind it W f([a, b]) is W_a f(a) + W_b f(b), for any
    f that works element by element: a pass over the wide activations is saved, and one over the result is added.
    """

    name = "split-concat"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="Concat of parts of known sizes, in opset 8 and newer, of which all readers are products along its axis"
        " (MatMul from either side, Gemm, FusedMatMul, Conv of one group), behind any number of elementwise operators:"
        " of one value, with constants along the axis (which are sliced), with what broadcasts along it, or with"
        " another such Concat of the same sizes. The weight is sliced, too; a bias goes to the first part",
        refuses="anything else that reads the joined parts or what is made of them, a caller, a body; parts of other"
        " sizes, or empty ones; operators that mix positions (Softmax, normalisations, layout operators); weights that"
        " are quantised, or that something else reads: they would be kept beside their slices; several products behind"
        " several Concats; more than 64 nodes",
        costs="linear in the nodes. Saves writing and reading the joined values; costs an Add of the result for each"
        " further part (with Gemm only reading it), and a launch of each operator for each part. It is done where the"
        " target's cost profile sees 5 % less time: many rows, wide values that become narrow, fast arithmetic. An axis"
        " of unknown size counts as the profile's dimension, 64. A runtime may join without copying, where what makes"
        " the parts can write with strides; no profile knows that. Pivot forms are not recognised as such behind this,"
        " so that it comes last",
        source="block matrix product: [A B] [x; y] = A x + B y",
    )
    roots = ("Concat",)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        if ctx.opset < BROADCASTING or not _leads_to_product(node):
            return False
        try:
            region = _explore(node)
        except _Refused as refusal:
            ctx.refuse(node, str(refusal))
            return False
        mapping, made = _write(region, ctx)
        # Whatever the products read is there before the one Concat; of several Concats one product is behind all.
        before = node if len(region.joined) == 1 and not region.beside else None
        return ctx.replace(mapping, made, rule="products", before=before, by=LEAST_GAIN)


# -- reading -----------------------------------------------------------------------------------------------------------


def _leads_to_product(concat: ir.Node) -> bool:
    """Whether it is worth looking: some product is behind elementwise operators."""
    if concat.outputs[0].dtype not in FLOATS:
        return False
    waiting, seen = [concat.outputs[0]], {concat.outputs[0]}
    while waiting and len(seen) <= MOST_NODES:
        for use in waiting.pop().uses():
            if use.node.op_type in _PRODUCTS:
                return True
            if _is_elementwise(use.node):
                fresh = [value for value in use.node.outputs if value not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
    return False


def _is_elementwise(node: ir.Node) -> bool:
    return node.op_type in ELEMENTWISE.get(node.domain, ())


def _explore(concat: ir.Node) -> _Region:
    """Follow what is joined to all that reads it, and what that reads beside it to other Concats and constants.

    Raises:
        _Refused: Something on the way cannot be computed in parts, or needs the whole.
    """
    region = _start(concat)
    waiting = [concat.outputs[0]]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        for found in _around(region, value):
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    if len(region.sites) > 1 and (len(region.joined) > 1 or region.beside):
        raise _Refused("several products read what is combined with something that may be computed behind one of them")
    return region


def _start(concat: ir.Node) -> _Region:
    result = concat.outputs[0]
    shape, axis = trusted_shape(result), int_attribute(concat, "axis", 1)
    if shape is None or axis is None:
        raise _Refused("the number of axes is not known")
    axis = axis if axis < 0 else axis - len(shape)
    sizes = [None if part is None else size_along(part, axis) for part in concat.inputs]
    known = tuple(size for size in sizes if size is not None)
    if len(known) < len(sizes):
        raise _Refused("the sizes of the parts are not known")
    if len(known) < 2 or 0 in known:
        raise _Refused("a part is empty" if 0 in known else "there is one part")
    return _Region(concat.graph, axis, known)


def _around(region: _Region, value: ir.Value) -> list[ir.Value]:
    """Take a value into the region: it is computed in parts. Returns the values that then have to be, too."""
    if size_along(value, region.axis) != region.total:
        raise _Refused(f"{value.name!r} is not of the size of the joined parts")
    if value.is_graph_output():
        raise _Refused(f"{value.name!r} is returned")
    following: list[ir.Value] = []
    maker = value.producer()
    if maker is not None and maker.graph is not region.graph:
        raise _Refused(f"{value.name!r} is computed outside the body")
    if maker is not None and made_by(value, "Concat") is maker:
        region.joined[value] = _parts(region, maker)
    elif maker is not None and _is_elementwise(maker) and maker.outputs[0] is value:
        following += _elementwise(region, maker)
    else:
        raise _Refused(f"{'an input' if maker is None else maker.op_type} is no Concat of such parts")
    for use in value.uses():
        if use.node.graph is not region.graph:
            raise _Refused(f"{use.node.op_type} reads it in a body")
        if _is_elementwise(use.node):
            following += _elementwise(region, use.node)
        else:
            _product(region, use.node, value)
    return following


def _parts(region: _Region, concat: ir.Node) -> list[ir.Value]:
    shape, axis = trusted_shape(concat.outputs[0]), int_attribute(concat, "axis", 1)
    assert shape is not None  # its size is known
    if axis is None or (axis if axis < 0 else axis - len(shape)) != region.axis:
        raise _Refused("another Concat joins another axis")
    parts = [part for part in concat.inputs if part is not None]
    sizes = [size_along(part, region.axis) for part in parts]
    if sizes != list(region.sizes):
        told = ", ".join("?" if size is None else str(size) for size in sizes)
        raise _Refused(f"one Concat joins {', '.join(map(str, region.sizes))}, another {told}")
    return parts


def _elementwise(region: _Region, node: ir.Node) -> list[ir.Value]:
    """Take an elementwise node into the region. Returns what of its operands and results is computed in parts."""
    if node in region.nodes:
        return []
    region.nodes[node] = None
    if len(region.nodes) > MOST_NODES:
        raise _Refused(f"more than {MOST_NODES} nodes between")
    return [*node.outputs, *(v for v in node.inputs if v is not None and not _is_leaf(region, v))]


def _is_leaf(region: _Region, value: ir.Value) -> bool:
    """Whether an operand needs no computing in parts: a constant, or something that broadcasts along the axis."""
    shape = trusted_shape(value)
    if shape is not None and (len(shape) < -region.axis or shape[region.axis] == 1):
        if not graphs.is_constant(value):
            region.beside.add(value)
        return True
    tensor = graphs.constant_tensor(value)
    if tensor is None:
        return False
    if shape is None or shape[region.axis] != region.total or tensor.dtype.bitwidth < 8:
        raise _Refused(f"a constant of shape {tensor.shape} does not follow the axis")
    region.sliced[value] = tensor
    return True


def _product(region: _Region, node: ir.Node, value: ir.Value) -> None:
    """Take a product into the region."""
    linear = linear_at(node) if node.op_type in _PRODUCTS else ""
    if isinstance(linear, str):
        raise _Refused(f"{node.op_type} reads it" + (f": {linear}" if linear else ""))
    # Of a table the operand is the indices, which are nothing that can be split.
    if linear.x is not value or linear.spelling is Spelling.GATHER:
        raise _Refused(f"{node.op_type} reads it as something other than its operand")
    shape = trusted_shape(value)
    assert shape is not None  # its size is known
    axis = linear.x_axis if linear.x_axis < 0 else linear.x_axis - len(shape)
    if axis != region.axis:
        raise _Refused(f"{node.op_type} sums over another axis")
    if linear.weight.quantised:
        raise _Refused(f"{linear.weight.root.name}: quantised")
    if linear.weight.shared:
        raise _Refused(f"{linear.weight.root.name}: something else reads it too: it would be kept beside its slices")
    region.sites.append(linear)


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(region: _Region, ctx: Context) -> tuple[dict[ir.Value, ir.Value], list[ir.Node]]:
    """The result of each product -> its replacement, and the nodes that make them."""
    order = _in_order(region)
    made: list[ir.Node] = []
    parts: list[dict[ir.Value, ir.Value]] = []
    for number, places in enumerate(region.places()):
        found = {value: joined[number] for value, joined in region.joined.items()}
        for value, tensor in region.sliced.items():
            found[value] = slice_of(value, tensor, region.axis, places, ctx)
        for node in order:
            inputs = [None if value is None else found.get(value, value) for value in node.inputs]
            like = _resized(node.outputs[0], region.axis, region.sizes[number])
            made.append(ctx.node(node.op_type, inputs, node.attributes, like=like, domain=node.domain))
            found[node.outputs[0]] = made[-1].outputs[0]
        parts.append(found)
    mapping: dict[ir.Value, ir.Value] = {}
    for linear in region.sites:
        nodes = _products(region, ctx, linear, [found[linear.x] for found in parts])
        made += nodes
        mapping[linear.y] = nodes[-1].outputs[0]
    return mapping, made


def _in_order(region: _Region) -> list[ir.Node]:
    """The elementwise nodes, sources first."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value) -> None:
        maker = value.producer()
        if maker is None or maker not in region.nodes or maker in found:
            return
        for operand in maker.inputs:
            if operand is not None:
                visit(operand)
        found[maker] = None

    for linear in region.sites:
        visit(linear.x)
    return list(found)


def _products(region: _Region, ctx: Context, linear: Linear, parts: list[ir.Value]) -> list[ir.Node]:
    """W_0 x_0 + b + W_1 x_1 + ...; the last node gives the sum."""
    nodes: list[ir.Node] = []
    total: ir.Value | None = None
    for x, places in zip(parts, region.places(), strict=True):
        shape = (linear.outputs, places.stop - places.start, *linear.kernel)
        weight = linear.constant(
            ctx, f"{linear.weight.root.name or 'weight'}_part", shape, _columns(ctx, linear, places)
        )
        if total is None or linear.spelling is Spelling.GEMM:
            # Gemm adds what came before by itself.
            nodes.append(linear.apply(ctx, x, weight, linear.bias if total is None else total))
        else:
            nodes.append(linear.apply(ctx, x, weight))
            nodes.append(ctx.node("Add", [total, nodes[-1].outputs[0]], like=linear.y))
        total = nodes[-1].outputs[0]
    return nodes


def _columns(ctx: Context, linear: Linear, places: slice) -> Callable[[], Array]:
    opset = ctx.opset
    return lambda: np.ascontiguousarray(linear.matrix(opset)[:, places])


def _resized(value: ir.Value, axis: int, size: int) -> ir.Value:
    """A model for a part of a value: ``trusted_shape`` and not what the file declares."""
    shape = trusted_shape(value)
    if shape is None:
        return ir.Value(type=value.type)
    dims = list(shape)
    dims[axis] = size
    return ir.Value(type=value.type, shape=ir.Shape(dims))
