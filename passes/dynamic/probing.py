"""What is known of shapes under an assumption: in one branch of an If with what follows, in every turn of a Loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import read_instead
from graphopt.rewrite import Context
from graphopt.shapes import infer_shapes, trusted_shape

_AXIS = "axis:"
# A shape gets vaguer with each try, an axis at a time.
_TRIES = 8

Shapes = dict[ir.Value, ir.Shape | None]


def infer(
    nodes: Sequence[ir.Node],
    ctx: Context,
    *,
    given: Mapping[ir.Value, ir.Shape | None] | None = None,
    instead: Mapping[ir.Value, ir.Value] | None = None,
) -> Shapes:
    """The shapes of what nodes make, where they are a network of their own.

    Args:
        nodes: In topological order; they stay as they are.
        ctx: Of the model that they are in.
        given: What is assumed of the shapes of values that they read. Of others it is what the model tells.
        instead: What they read in the place of other values.

    Returns:
        Output of a node -> its shape, None where its rank is not known. Axes keep the names that values read have.
    """
    given, instead = given or {}, instead or {}
    mirrored: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []

    def name() -> str:
        return f"probe:{len(mirrored)}"

    def mirror(value: ir.Value) -> ir.Value:
        value = instead.get(value, value)
        if value not in mirrored:
            tensor = graphs.constant_tensor(value) if value not in given else None
            shape = given[value] if value in given else trusted_shape(value)
            made = ir.Value(name=name(), type=value.type, shape=_renamed(shape), const_value=tensor)
            if tensor is not None:
                made.type = ir.TensorType(tensor.dtype)
            (inputs if tensor is None else constants).append(made)
            mirrored[value] = made
        return mirrored[value]

    copies: list[ir.Node] = []
    for node in nodes:
        reads = [None if value is None else mirror(value) for value in node.inputs]
        attributes: list[ir.Attr] = []
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
                body = attribute.as_graph().clone(allow_outer_scope_values=True)
                read_instead(body, {value: mirror(value) for value in graphs.captured_values(body)})
                attributes.append(ir.AttrGraph(attribute.name, body))
            else:
                attributes.append(attribute)
        outputs: list[ir.Value] = []
        for value in node.outputs:
            mirrored[value] = ir.Value(name=name(), type=value.type)
            outputs.append(mirrored[value])
        copies.append(
            ir.Node(
                node.domain, node.op_type, reads, attributes, overload=node.overload, outputs=outputs, name=node.name
            )
        )
    graph = ir.Graph(
        inputs, [], nodes=copies, initializers=constants, opset_imports=ctx.model.opset_imports, name="probe"
    )
    _infer(ir.Model(graph, ir_version=ctx.model.ir_version))
    return {value: _named_back(trusted_shape(mirrored[value])) for node in nodes for value in node.outputs}


def _infer(model: ir.Model) -> None:
    """Infer the shapes of a network, also of Slices with computed ends, whose other axes onnx forgets."""
    proven: dict[ir.Value, ir.Shape] = {}
    while True:
        infer_shapes(model, proven)
        slices = [node for node in graphs.all_nodes(model) if (node.domain, node.op_type) == ("", "Slice")]
        found = {node.outputs[0]: shape for node in slices if (shape := _of_slice(node)) is not None}
        if found.keys() <= proven.keys():
            return
        proven = {**found, **proven}


def _of_slice(node: ir.Node) -> ir.Shape | None:
    """What a Slice leaves as it is, where onnx does not know that; None where it does."""
    source, result = node.inputs[0], trusted_shape(node.outputs[0])
    shape = None if source is None else trusted_shape(source)
    axes = graphs.constant_array(node.inputs[3] if len(node.inputs) > 3 else None, limit=64)
    if shape is None or result is None or axes is None or any(isinstance(size, int) for size in result):
        return None
    cut = {int(axis) % len(shape) for axis in axes}
    kept = ir.Shape([None if axis in cut else size for axis, size in enumerate(shape)])
    return kept if any(_is_named(size) for size in kept) else None


def shapes_in_turns(loop: ir.Node, ctx: Context) -> Shapes:
    """What is true of shapes in every turn of a Loop, found by induction over the turns.

    Returns:
        Value of the body, inputs included -> its shape, or None; and so of the body of a Loop around it.
    """
    outer = _loop_around(loop, ctx)
    around = {} if outer is None else shapes_in_turns(outer, ctx)
    around = {value: shape for value, shape in around.items() if graphs.constant_tensor(value) is None}
    body = loop.attributes["body"].as_graph()
    counter, goes, *carried = body.inputs
    starts = loop.inputs[2:]
    assumed: Shapes = {
        **{value: value.shape for value in (counter, goes)},
        **{
            inner: None if start is None else around[start] if start in around else trusted_shape(start)
            for inner, start in zip(carried, starts, strict=True)
        },
    }
    for _ in range(_TRIES):
        found = infer(list(body), ctx, given={**around, **assumed})
        changed = False
        for inner, after in zip(carried, body.outputs[1:], strict=False):
            shape = assumed[after] if after in assumed else found[after] if after in found else trusted_shape(after)
            common = _common(assumed[inner], shape)
            changed = changed or common != assumed[inner]
            assumed[inner] = common
        if not changed:
            return {**around, **found, **assumed}
    return {}


def _loop_around(node: ir.Node, ctx: Context) -> ir.Node | None:
    """The Loop whose body holds a node, with branches of Ifs between; None where there is none."""
    graph = node.graph
    while graph is not None and graph is not ctx.model.graph:
        owner = next((other for other in graphs.all_nodes(ctx.model) if graph in graphs.subgraphs(other)), None)
        if owner is None or (owner.domain, owner.op_type) == ("", "Loop"):
            return owner
        graph = owner.graph
    return None


def _common(one: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """What two shapes have in common."""
    if one is None or other is None or len(one) != len(other):
        return None
    return ir.Shape([a if a == b and _is_named(a) else None for a, b in zip(one, other, strict=True)])


def _is_named(axis: int | ir.SymbolicDim) -> bool:
    return isinstance(axis, int) or axis.value is not None


def _renamed(shape: ir.Shape | None) -> ir.Shape | None:
    """A shape whose names are not those that inference makes up."""
    if shape is None:
        return None
    return ir.Shape([d if isinstance(d, int) else None if d.value is None else _AXIS + str(d.value) for d in shape])


def _named_back(shape: ir.Shape | None) -> ir.Shape | None:
    if shape is None:
        return None
    return ir.Shape(
        [
            d if isinstance(d, int) else d.value[len(_AXIS) :] if d.value and d.value.startswith(_AXIS) else None
            for d in shape
        ]
    )
