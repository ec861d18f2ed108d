"""Scatters that together fill an axis, as PIFA's modules are exported, as Concat and Gather; GatherND as Gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import evaluate, graphs
from graphopt.matching import INVENTED, int_attribute, made_by, permutation
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.shape_values import Element, ShapeValues, axes_of
from graphopt.shapes import trusted_shape

Positions = npt.NDArray[np.int64]

_MOST_INDICES = 1 << 22
_DEEPEST = 8
_SCATTERS = ("ScatterElements", "Scatter", "ScatterND")
_INDICES = frozenset({ir.DataType.INT64, ir.DataType.INT32})
_LAYOUT = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape", "Cast", "Transpose", "Flatten"})


@dataclass(frozen=True)
class _Part:
    """One scatter: what it writes, and where along the axis."""

    node: ir.Node
    source: ir.Value
    positions: Positions


class ImportPivot(Pass):
    """Turns scatters that together fill an axis into Concat and Gather: a pivot form as torch exports it.

    PIFA's layer writes the pivot channels and those computed from them into an empty tensor, with index_copy. As
    exported that is two scatters and up to thirty nodes that compute their indices.
    """

    name = "import-pivot"
    kind = Kind.BITWISE
    stage = Stage.IMPORT
    explanation = Explanation(
        matches="ScatterElements, Scatter or ScatterND into the result of another one, whose indices are constant along"
        " one axis, name all of the others in full, and name each place of it once between them; GatherND of constant"
        " places of the first axis, between Transposes or not, as Gather",
        refuses="places named twice or not at all; scatters that add or multiply; indices that are computed from the"
        " input, or differ along another axis; a tensor that is, or may be, larger along another axis than what is"
        " written: what it held before would show",
        costs="linear in the scatters; two nodes instead of 11 (torch.export) or 35 (torchscript)",
        source="PIFA (PMLR 267:77926), whose official layer is index_copy, twice",
    )

    def apply(self, ctx: Context) -> None:
        self._values = ShapeValues(ctx.opset)
        for node in reversed(ctx.nodes(*_SCATTERS)):  # the last of a chain goes first, and the others with it
            if node.graph is not None:
                self._rewrite(node, ctx)
        for node in ctx.nodes("GatherND"):
            _gather(node, ctx)

    def _rewrite(self, node: ir.Node, ctx: Context) -> None:
        axis, parts = self._chain(node)
        if isinstance(parts, str):
            ctx.refuse(node, parts)
        elif len(parts) > 1 and node.op_type == "ScatterND" and axis == 0:
            _write_first_axis(node, parts, ctx)
        elif len(parts) > 1:
            nodes = _assemble(ctx, [part.source for part in parts], _order(parts), axis, node.outputs[0])
            # Certain: each scatter copies the tensor, and so do Concat and Gather.
            ctx.replace({node.outputs[0]: nodes[-1].outputs[0]}, nodes, rule="scatters", certain=True)

    def _chain(self, last: ir.Node) -> tuple[int, list[_Part] | str]:
        """The axis, and the scatters up to the one that completes it, the first one first; or why there are none."""
        shape = self._axes(last.outputs[0])
        if shape is None or not shape:
            return 0, "the number of axes is not known"
        named = _named(last, len(shape)) if last.op_type == "ScatterND" else None
        axis = int_attribute(last, "axis", 0) if named is None else named[0]
        if axis is None:
            return 0, "the axis depends on the function's caller"
        axis %= len(shape)
        size = shape[axis]
        if not isinstance(size, int):
            return axis, "the size of the axis is not known"
        covered = np.zeros(size, bool)
        parts: list[_Part] = []
        node: ir.Node | None = last
        while node is not None and not covered.all():
            if node.op_type != last.op_type or (
                node.op_type != "ScatterND" and (int_attribute(node, "axis", 0) or 0) % len(shape) != axis
            ):
                break
            part = self._part(node, axis, shape)
            if isinstance(part, str):
                return axis, part
            if covered[part.positions].any():
                return axis, "two scatters write to one place"
            covered[part.positions] = True
            parts.append(part)
            node = _scatter_before(node)
            if node is not None and not covered.all() and _read_elsewhere(node.outputs[0]):
                return axis, "the result of an earlier scatter is read elsewhere"
        if not covered.all():
            # A lone scatter is no near miss: most of them update a cache or a mask.
            return axis, [] if len(parts) < 2 else f"{size - int(covered.sum())} places of {size} are not written"
        return axis, parts[::-1]

    def _part(self, node: ir.Node, axis: int, shape: Sequence[Element | None]) -> _Part | str:
        indices, updates = node.inputs[1:3]
        if indices is None or updates is None:
            return "an operand is missing"
        reduction = node.attributes.get("reduction")
        if reduction is not None and (reduction.is_ref() or reduction.as_string() != "none"):
            return f"the scatter combines ({reduction.value})"
        rest = [size for place, size in enumerate(shape) if place != axis]
        named = _named(node, len(shape)) if node.op_type == "ScatterND" else None
        positions: Positions | str
        if named is not None and named[0] == axis:
            positions = named[1]
        elif node.op_type == "ScatterND":
            positions = _first_axis_positions(indices) if axis == 0 else "a scatter along another axis"
        else:
            # ONNX asks for indices and updates of one shape: to what the indices are expanded, the updates have.
            positions = _positions(indices, axis, len(shape))
        if isinstance(positions, str):
            return positions
        size = shape[axis]
        assert isinstance(size, int)
        positions = np.where(positions < 0, positions + size, positions)
        if positions.size and (positions.min() < 0 or positions.max() >= size):
            return "an index lies outside of the axis"
        if len(np.unique(positions)) != len(positions):
            return "a scatter names a place twice"
        source = updates
        if named is not None:
            # As many numbers as places: a Reshape to the shape of the places leaves them in order, or adds axes of 1.
            reshape = made_by(_same(updates), "Reshape")
            if reshape is not None and reshape.inputs[0] is not None:
                source = reshape.inputs[0]
        elif node.op_type == "ScatterND":
            expanded = made_by(_same(updates), "Expand")
            if expanded is None or expanded.inputs[0] is None:
                return _Part(node, updates, positions)  # ONNX asks for updates that cover all other axes
            source = expanded.inputs[0]
        axes = self._axes(source)
        if axes is None or len(axes) != len(shape) or axes[axis] != len(positions):
            return "what is written has another shape than its indices, or one that is not known"
        others = [found for place, found in enumerate(axes) if place != axis]
        if any(found is None or found != wanted for found, wanted in zip(others, rest, strict=True)):
            return "the tensor may be larger than what is written: what it held before would show"
        return _Part(node, source, positions)

    def _axes(self, value: ir.Value | None) -> list[Element | None] | None:
        """The axes of a value: from its inferred shape, and from what computes the shape that it is made in."""
        if value is None:
            return None
        shape = trusted_shape(value)
        # Names that shape inference made up say nothing: what computes the shape may say more.
        known = (
            None if shape is None else [None if _made_up(d) else e for d, e in zip(shape, axes_of(shape), strict=True)]
        )
        told: list[Element | None] | None = None
        node = value.producer()
        if node is None or node.domain != "" or (known is not None and None not in known):
            return known
        if node.op_type == "ConstantOfShape" or (node.op_type == "Expand" and _is_one_number(node.inputs[0])):
            target = self._values.of(node.inputs[-1])
            told = None if target is None else list(target)
        elif node.op_type in _SCATTERS or node.op_type == "Identity":
            told = self._axes(node.inputs[0])
        elif node.op_type == "Transpose" and (inner := self._axes(node.inputs[0])) is not None:
            perm = permutation(node)
            told = [inner[place] for place in (perm if perm is not None else reversed(range(len(inner))))]
        if known is None or told is None or len(known) != len(told):
            return told if known is None else known
        return [one if one is not None else other for one, other in zip(known, told, strict=True)]


def _made_up(size: int | ir.SymbolicDim) -> bool:
    return not isinstance(size, int) and size.value is not None and size.value.startswith(INVENTED)


def _is_one_number(value: ir.Value | None) -> bool:
    tensor = graphs.constant_tensor(value)
    return tensor is not None and tensor.size == 1


# -- chains ------------------------------------------------------------------------------------------------------------


def _same(value: ir.Value | None) -> ir.Value | None:
    """The value that one is, behind Identity."""
    while (node := made_by(value, "Identity")) is not None:
        value = node.inputs[0]
    return value


def _scatter_before(node: ir.Node) -> ir.Node | None:
    """The scatter into whose result a scatter writes, directly or behind Transposes that cancel out; else None."""
    value = _same(node.inputs[0])
    order: list[int] | None = None
    while (transpose := made_by(value, "Transpose")) is not None:
        perm = permutation(transpose)
        if perm is None or (order is not None and len(order) != len(perm)):
            return None
        order = list(perm) if order is None else [perm[place] for place in order]
        value = _same(transpose.inputs[0])
    if order is not None and order != sorted(order):
        return None
    return made_by(value, *_SCATTERS)


def _sole_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, Identity not counted."""
    node = graphs.sole_consumer(value)
    while node is not None and node.op_type == "Identity" and node.domain == "":
        node = graphs.sole_consumer(node.outputs[0])
    return node


def _read_elsewhere(value: ir.Value) -> bool:
    """Whether anything but the next scatter, and what computes its shapes, reads the result of a scatter."""
    around = (*_SCATTERS, "Transpose", "Identity", "Shape")
    return value.is_graph_output() or any(use.node.op_type not in around for use in value.uses())


# -- indices -----------------------------------------------------------------------------------------------------------


def _positions(indices: ir.Value, axis: int, rank: int) -> Positions | str:
    """Where a ScatterElements writes along its axis, if that is constant and the same along all others."""
    expanded = made_by(indices, "Expand")
    array = _constant(indices if expanded is None else expanded.inputs[0])
    if array is None:
        return "the indices are not constant"
    if array.ndim > rank:
        return "the indices have more axes than the tensor"
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    first = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    if first.shape[1] == 0 or (first != first[:, :1]).any():
        return "the indices differ along another axis"
    return np.asarray(first[:, 0], np.int64)


def _first_axis_positions(indices: ir.Value) -> Positions | str:
    """Where a ScatterND writes along the first axis."""
    array = _constant(indices)
    if array is None:
        return "the indices are not constant"
    if array.ndim != 2 or array.shape[1] != 1:
        return f"indices of shape {list(array.shape)} do not name places of the first axis"
    return np.asarray(array[:, 0], np.int64)


def _named(node: ir.Node, rank: int) -> tuple[int, Positions] | None:
    """The axis, and the places of it, that a ScatterND writes to which names all of the others in full.

    TorchScript writes an index for every axis: what a range of its size gives, expanded, and the places, likewise. To
    what shape they are expanded does not matter: the updates have it too, and they have as many numbers as the tensor
    has at those places, so that nothing is left to expand to.
    """
    concat = made_by(_same(node.inputs[1]), "Concat")
    if concat is None or len(concat.inputs) != rank or int_attribute(concat, "axis", 0) != -1:
        return None
    found: tuple[int, Positions] | None = None
    for axis, column in enumerate(concat.inputs):
        unsqueeze = made_by(_same(column), "Unsqueeze")
        if unsqueeze is None or _axes_of(unsqueeze) != [-1]:
            return None
        value = _same(unsqueeze.inputs[0])
        expand = made_by(value, "Expand")
        base = value if expand is None else _same(expand.inputs[0])
        array = _constant(base)
        if array is not None:
            if found is not None or array.shape != (array.size, *[1] * (rank - 1 - axis)):
                return None
            found = axis, np.asarray(array.reshape(-1), np.int64)
        elif not _is_whole(base, node.inputs[0], axis, rank):
            return None
    return found


def _axes_of(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else list(attribute.as_ints())
    array = graphs.constant_array(node.inputs[1], limit=8) if len(node.inputs) > 1 else None
    return None if array is None else [int(axis) for axis in array.reshape(-1)]


def _is_whole(value: ir.Value | None, data: ir.Value | None, axis: int, rank: int) -> bool:
    """Whether a value is all places of an axis of a tensor, in order, with the axes behind it of size 1."""
    behind = rank - 1 - axis
    reshape = made_by(value, "Reshape")
    if reshape is not None:
        target = graphs.constant_array(reshape.inputs[1], limit=8)
        if target is None or target.tolist() != [-1, *[1] * behind]:
            return False
        value = _same(reshape.inputs[0])
    elif behind:
        return False
    places = made_by(value, "Range")
    if places is None or graphs.scalar_of(places.inputs[0]) != 0 or graphs.scalar_of(places.inputs[2]) != 1:
        return False
    limit = _same(places.inputs[1])
    while (cast := made_by(limit, "Cast")) is not None:
        limit = _same(cast.inputs[0])
    gather = made_by(limit, "Gather")
    if gather is None or graphs.scalar_of(gather.inputs[1]) != axis or int_attribute(gather, "axis", 0) != 0:
        return False
    shape = made_by(gather.inputs[0], "Shape")
    return shape is not None and not shape.attributes and _same(shape.inputs[0]) is _same(data)


def _constant(value: ir.Value | None, depth: int = 0) -> npt.NDArray[Any] | None:
    """A constant of integers, also behind nodes that only give it another shape or width."""
    if value is None or depth > _DEEPEST or (value.dtype is not None and value.dtype not in _INDICES):
        return None
    array = graphs.constant_array(value, limit=_MOST_INDICES)
    if array is not None:
        return array
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in _LAYOUT or node.outputs[0] is not value:
        return None
    inputs = [None if v is None else _constant(v, depth + 1) for v in node.inputs]
    graph = node.graph
    if any(v is not None and found is None for v, found in zip(node.inputs, inputs, strict=True)) or graph is None:
        return None
    version = graph.opset_imports.get("", 18)
    made = evaluate.evaluate(evaluate.Operation.of(node, version), inputs, limit=_MOST_INDICES * 8)
    return None if made is None else made[0]


# -- writing -----------------------------------------------------------------------------------------------------------


def _order(parts: Sequence[_Part]) -> Positions:
    return np.argsort(np.concatenate([part.positions for part in parts])).astype(np.int64)


def _assemble(
    ctx: Context, sources: Sequence[ir.Value], order: Positions, axis: int, like: ir.Value | None
) -> list[ir.Node]:
    nodes = [ctx.node("Concat", sources, {"axis": axis}, like=like)]
    if not np.array_equal(order, np.arange(len(order))):
        indices = ctx.constant(order, "order")
        nodes.append(ctx.node("Gather", [nodes[0].outputs[0], indices], {"axis": axis}, like=like))
    return nodes


def _write_first_axis(node: ir.Node, parts: Sequence[_Part], ctx: Context) -> None:
    """ScatterND writes to the first axis: torch moves the one it means there and back, which is then superfluous."""
    result = node.outputs[0]
    moved = [made_by(_same(part.source), "Transpose") for part in parts]
    perms = {None if transpose is None else permutation(transpose) for transpose in moved}
    perm = perms.pop() if len(perms) == 1 else None
    if perm is None:
        nodes = _assemble(ctx, [part.source for part in parts], _order(parts), 0, result)
        ctx.replace({result: nodes[-1].outputs[0]}, nodes, rule="scatters", certain=True)
        return
    sources = [source for transpose in moved if transpose is not None and (source := transpose.inputs[0]) is not None]
    back = _sole_reader(result)
    inverse = tuple(int(place) for place in np.argsort(perm))
    if back is not None and back.op_type == "Transpose" and back.domain == "" and permutation(back) == inverse:
        nodes = _assemble(ctx, sources, _order(parts), perm[0], back.outputs[0])
        ctx.replace({back.outputs[0]: nodes[-1].outputs[0]}, nodes, rule="scatters", certain=True)
        return
    nodes = _assemble(ctx, sources, _order(parts), perm[0], None)
    nodes.append(ctx.node("Transpose", [nodes[-1].outputs[0]], {"perm": list(perm)}, like=result))
    ctx.replace({result: nodes[-1].outputs[0]}, nodes, rule="scatters", certain=True)


def _gather(node: ir.Node, ctx: Context) -> None:
    """GatherND of places of the first axis: Gather. torch moves the axis that it means there and back."""
    data, indices = node.inputs[:2]
    if data is None or indices is None or int_attribute(node, "batch_dims", 0) != 0:
        return
    positions = _first_axis_positions(indices)
    if isinstance(positions, str):
        return  # most of them are no near miss
    places, result = ctx.constant(positions, "order"), node.outputs[0]
    moved = made_by(_same(data), "Transpose")
    perm = None if moved is None else permutation(moved)
    back = _sole_reader(result)
    source, axis = data, 0
    if moved is not None and perm is not None and back is not None and moved.inputs[0] is not None:
        inverse = tuple(int(place) for place in np.argsort(perm))
        if back.op_type == "Transpose" and back.domain == "" and permutation(back) == inverse:
            source, axis, result = moved.inputs[0], perm[0], back.outputs[0]
    gather = ctx.node("Gather", [source, places], {"axis": axis}, like=result)
    # Certain: it copies as much as GatherND does.
    ctx.replace({result: gather.outputs[0]}, [gather], rule="gather-nd", certain=True)
