"""Parts that are joined and taken apart again, with nothing but elementwise operators between, kept apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import int_attribute, made_by
from graphopt.passes.lowrank.elementwise import BROADCASTING, ELEMENTWISE, MOST_NODES, size_along, slice_of
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shapes import trusted_shape


@dataclass
class _Region:
    """What lies between the Concats and a Split.

    Attributes:
        split: The Split.
        axis: Along which it splits, counted from the end.
        sizes: Of the parts.
        nodes: The elementwise nodes, sources first.
        joined: Values that are Concats of such parts -> the parts.
        sliced: Constants of one number (or slice) for each index of the axis.
        vectors: The same of BatchNormalization: whatever the axis, they have no other.
    """

    split: ir.Node
    axis: int
    sizes: tuple[int, ...]
    nodes: list[ir.Node] = field(default_factory=list)
    joined: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    sliced: dict[ir.Value, ir.TensorProtocol] = field(default_factory=dict)
    vectors: dict[ir.Value, ir.TensorProtocol] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The size of the axis."""
        return sum(self.sizes)


class _Refused(Exception):
    """A region that cannot be computed in parts."""


class SplitHalves(RulePass):
    """Computes elementwise operators on the parts of a Concat where a Split takes them apart again.

    Pivot forms that share their channels leave that: the row form joins the pivots and the others, the column form
    behind the activation takes them apart.
    """

    name = "split-halves"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="Concat - elementwise operators - Split into parts of the same sizes along the same axis, in opset 8"
        " and newer: also several Concats, constants along the axis (which are sliced), values that broadcast along it,"
        " BatchNormalization in inference over that axis; Split of a Concat; Concat of all outputs of a Split in order",
        refuses="parts of other sizes; sizes that are not known; values on the way that something else reads or a"
        " caller gets; operators that mix positions; more than 64 nodes",
        costs="linear in the nodes. Saves a pass over memory for each Concat and Split, and costs a launch of each"
        " operator for each part. Where a runtime's vectorised operator treats the last few numbers of a row in another"
        " way (Log, Elu, Softplus, Sin), they move: that is why it is not bitwise",
        source="elementwise operators commute with concatenation",
    )
    roots = ("Split", "Concat")

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        return _rejoin(node, ctx) if node.op_type == "Concat" else _split(node, ctx)


def _rejoin(node: ir.Node, ctx: Context) -> bool:
    """Concat of all outputs of one Split: what was split."""
    first = node.inputs[0] if node.inputs else None
    split = made_by(first, "Split")
    if split is None or list(node.inputs) != list(split.outputs) or split.inputs[0] is None:
        return False
    source = split.inputs[0]
    joined, taken = int_attribute(node, "axis", 0), int_attribute(split, "axis", 0)
    if joined is None or taken is None:
        return False
    shape = trusted_shape(source)
    if joined != taken and (shape is None or joined % len(shape) != taken % len(shape)):
        return False
    return ctx.replace({node.outputs[0]: source}, rule="rejoin")


def _split(node: ir.Node, ctx: Context) -> bool:
    source = node.inputs[0]
    if source is None or ctx.opset < BROADCASTING:
        return False
    axis = _from_the_end(node, source)
    if axis is None or not _leads_to_concat(source):
        return False
    sizes = split_sizes(node, size_along(source, axis))
    if sizes is None:
        ctx.refuse(node, "the sizes of the parts are not known")
        return False
    region = _Region(node, axis, sizes)
    try:
        _explore(region)
    except _Refused as refusal:
        ctx.refuse(node, str(refusal))
        return False
    if not region.joined:
        return False
    wanted = [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    mapping: dict[ir.Value, ir.Value] = {}
    made: list[ir.Node] = []
    for part in wanted:
        nodes, result = _part(region, part, ctx)
        made += nodes
        mapping[node.outputs[part]] = result
    return bool(mapping) and ctx.replace(mapping, made, rule="parts" if region.nodes else "concat-split")


def split_sizes(node: ir.Node, size: int | None) -> tuple[int, ...] | None:
    """The sizes of a Split's outputs, where they are constant.

    Args:
        node: A Split.
        size: Of the axis, or None where it is not known.
    """
    attribute = node.attributes.get("split")
    if attribute is not None:
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = graphs.constant_array(node.inputs[1], limit=MOST_NODES)
        return None if array is None else tuple(int(length) for length in array.reshape(-1))
    count = int_attribute(node, "num_outputs", len(node.outputs))
    if size is None or count is None or count != len(node.outputs):
        return None
    # Without num_outputs the parts are equal; with it the last one may be smaller.
    if "num_outputs" not in node.attributes and size % count:
        return None
    chunk = -(-size // count)
    last = size - chunk * (count - 1)
    return None if last < 0 else (*[chunk] * (count - 1), last)


# -- reading -----------------------------------------------------------------------------------------------------------


def _leads_to_concat(value: ir.Value) -> bool:
    """Whether it is worth looking: some Concat is behind elementwise operators."""
    waiting, seen = [value], {value}
    while waiting and len(seen) <= 4 * MOST_NODES:
        node = waiting.pop().producer()
        if node is None:
            continue
        if node.op_type == "Concat" and node.domain == "":
            return True
        if _is_elementwise(node):
            fresh = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
    return False


def _is_elementwise(node: ir.Node) -> bool:
    return node.op_type in ELEMENTWISE.get(node.domain, ()) or _is_norm(node)


def _is_norm(node: ir.Node) -> bool:
    """BatchNormalization that only scales and shifts each channel."""
    if node.op_type != "BatchNormalization" or node.domain != "":
        return False
    return (
        sum(bool(value.uses()) or value.is_graph_output() for value in node.outputs) <= 1
        and int_attribute(node, "training_mode", 0) == 0
        and int_attribute(node, "spatial", 1) == 1
    )


def _explore(region: _Region) -> None:
    """Follow the Split's input to Concats and constants.

    Raises:
        _Refused: It comes from something else, or is read elsewhere.
    """
    source = region.split.inputs[0]
    assert source is not None
    done: set[ir.Node] = set()
    waiting: list[tuple[ir.Value, bool]] = [(source, False)]
    seen: set[ir.Value] = set()
    while waiting:
        value, ready = waiting.pop()
        node = value.producer()
        if ready:
            assert node is not None
            if node not in done:
                done.add(node)
                region.nodes.append(node)
            continue
        if value in seen or _is_leaf(region, value):
            continue
        seen.add(value)
        if node is None or node.outputs[0] is not value or not _is_elementwise(node):
            raise _Refused(f"{'an input' if node is None else node.op_type} is no Concat of such parts")
        if node.graph is not region.split.graph:
            raise _Refused(f"{node.op_type} is computed outside the body")
        if len(seen) > MOST_NODES:
            raise _Refused(f"more than {MOST_NODES} nodes between")
        waiting.append((value, True))
        waiting.extend((v, False) for v in _operands(region, node))
    inside = {*region.nodes, region.split}
    for node in region.nodes:
        result = node.outputs[0]
        if result.is_graph_output():
            raise _Refused(f"the result of {node.op_type} is returned")
        if any(use.node not in inside for use in result.uses()):
            raise _Refused(f"the result of {node.op_type} is read elsewhere")


def _operands(region: _Region, node: ir.Node) -> Iterable[ir.Value]:
    """What of a node's inputs has to be taken apart."""
    if not _is_norm(node):
        return [value for value in node.inputs if value is not None]
    x = node.inputs[0]
    shape = None if x is None else trusted_shape(x)
    if x is None or shape is None or len(shape) + region.axis != 1:
        raise _Refused("BatchNormalization is over another axis")
    for value in node.inputs[1:]:
        tensor = graphs.constant_tensor(value)
        if value is None or tensor is None or tuple(tensor.shape.numpy()) != (region.total,):
            raise _Refused("what BatchNormalization scales by is no constant of its channels")
        region.vectors[value] = tensor
    return [x]


def _is_leaf(region: _Region, value: ir.Value) -> bool:
    """Whether a value needs no computing in parts: it is joined of such, is a constant, or broadcasts."""
    if value in region.joined or value in region.sliced:
        return True
    shape = trusted_shape(value)
    broadcasts = shape is not None and (len(shape) < -region.axis or shape[region.axis] == 1)
    # Of one that is split itself, in parts of 1 and 0, nothing broadcasts.
    if broadcasts and value is not region.split.inputs[0]:
        return True
    tensor = graphs.constant_tensor(value)
    if tensor is not None:
        if shape is None or shape[region.axis] != region.total or tensor.dtype.bitwidth < 8:
            raise _Refused(f"a constant of shape {tensor.shape} does not follow the axis")
        region.sliced[value] = tensor
        return True
    node = made_by(value, "Concat")
    if node is None:
        return False
    axis = int_attribute(node, "axis", 1)
    if axis is None or (axis >= 0 and shape is None):
        raise _Refused("the axis of Concat is not known")
    if (axis if axis < 0 or shape is None else axis - len(shape)) != region.axis:
        raise _Refused("Concat joins another axis")
    parts = [part for part in node.inputs if part is not None]
    sizes = [size_along(part, region.axis) for part in parts]
    if sizes != list(region.sizes):
        told = ["?" if size is None else size for size in sizes]
        raise _Refused(f"Concat joins {', '.join(map(str, told))}, Split takes {', '.join(map(str, region.sizes))}")
    region.joined[value] = parts
    return True


def _from_the_end(node: ir.Node, source: ir.Value) -> int | None:
    axis = int_attribute(node, "axis", 0)
    if axis is None or axis < 0:
        return axis
    shape = trusted_shape(source)
    return None if shape is None else axis - len(shape)


# -- writing -----------------------------------------------------------------------------------------------------------


def _part(region: _Region, part: int, ctx: Context) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that make one output of the Split of the parts alone, and their result."""
    source = region.split.inputs[0]
    assert source is not None
    found: dict[ir.Value, ir.Value] = {value: parts[part] for value, parts in region.joined.items()}
    start = sum(region.sizes[:part])
    places = slice(start, start + region.sizes[part])
    for value, tensor in region.sliced.items():
        found[value] = slice_of(value, tensor, region.axis, places, ctx)
    vectors = {value: slice_of(value, tensor, 0, places, ctx) for value, tensor in region.vectors.items()}
    made = []
    for node in region.nodes:
        model = region.split.outputs[part] if node.outputs[0] is source else _resized(region, node.outputs[0], part)
        inputs = [found.get(value, value) if value is not None else None for value in node.inputs]
        if _is_norm(node):
            inputs[1:] = [vectors[value] for value in node.inputs[1:] if value is not None]
        made.append(ctx.node(node.op_type, inputs, node.attributes, like=model, domain=node.domain))
        found[node.outputs[0]] = made[-1].outputs[0]
    return made, found[source]


def _resized(region: _Region, value: ir.Value, part: int) -> ir.Value:
    shape = trusted_shape(value)
    if shape is None:
        return ir.Value(type=value.type)
    dims = list(shape)
    dims[region.axis] = region.sizes[part]
    return ir.Value(type=value.type, shape=ir.Shape(dims))
