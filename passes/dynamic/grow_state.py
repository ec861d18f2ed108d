"""What a Loop carries and makes longer in every turn: collected outside, or kept in a buffer of one size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import take_place
from graphopt.passes.dynamic.probing import Shapes, shapes_in_turns
from graphopt.passes.dynamic.turns import most_turns
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shape_values import ShapeValues
from graphopt.shapes import trusted_shape

# Reshape with allowzero, which takes sizes of zero for what they are.
_OPSET = 14
# Bytes of a buffer: what is reserved for a loop that could go on for very long is not worth it.
_LARGEST = 1 << 30
# What exporters write for the end of an axis is this or more.
_TO_THE_END = 2**31 - 1


@dataclass(frozen=True)
class _Growth:
    """A state that a turn appends to.

    Attributes:
        place: Which of the states.
        concat: Appends, in the body.
        start: What it holds before the first turn.
        axis: Along which it grows, from the front.
        shape: Of the start; the size of ``axis`` may be any.
        part: The shape of what one turn appends, or of its first part.
        step: How much longer it gets in a turn, where that is a number.
    """

    place: int
    concat: ir.Node
    start: ir.Value
    axis: int
    shape: ir.Shape
    part: ir.Shape
    step: int | None


class GrowState(RulePass):
    """Takes the copying out of a Loop that appends to what it carries.

    Where a turn does nothing else with it, the parts are stacked by the Loop and joined after it. Where a turn also
    reads it, a target whose Loop carries nothing that grows gets a buffer of the greatest length, and reads a slice.
    """

    name = "grow-state"
    kind = Kind.BITWISE
    stage = Stage.SPLIT
    explanation = Explanation(
        matches="Concat(state, parts) of a Loop's body whose result is the state of the next turn, with parts of one "
        "size in all turns. Read by nothing else: a scan output, joined to the start after the Loop. Read in the body, "
        "on a target whose Loop carries nothing that grows: a buffer as long as the start and the greatest number of "
        "turns need, written with ScatterND; what reads fixed places, counted from either end, reads them there, its "
        "sizes are read from a count, anything else reads a Slice. States of one length share the count. Turns are "
        "limited by a constant count, or by a condition that is false unless an integer that grows by a constant (a "
        "state, the turn, the size of a state) is less than a constant: the Loop is given that count",
        refuses="parts before the state; parts whose size is not proved to be the same in every turn; a start of "
        "unknown rank; opsets below 14; for the buffer: a number of turns that no constant limits (a count that is "
        "computed, conditions on floats, numbers that may leave the range of their type before), a start whose "
        f"length is not known, types other than numbers, buffers over {_LARGEST >> 30} GiB; targets whose Loop can "
        "grow what it carries, since writing into a buffer costs a copy of it there, as Concat does",
        costs="one or two shape inferences of the body. Stacking is linear in the turns, where Concat copies all that "
        "was there in each of them: on ONNX Runtime's CPU, rows of 64 floats, 1.0 times as fast for 1 or 2 turns, 1.4 "
        "times for 100, 2.4 times for 1,000; rows of 1,024 floats 3 and 19 times. The buffer took 1.2 to 1.4 times as "
        "long there as the Concat, at any number of turns: it is for those who cannot run the Loop otherwise",
        source="preallocated buffers of key-value caches; ONNX Loop, scan outputs",
    )
    roots = ("Loop",)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        attribute = node.attributes["body"]
        if attribute.is_ref() or any(start is None for start in node.inputs[2:]):
            return False
        body = attribute.as_graph()
        appending = [
            (place, concat)
            for place in range(len(node.inputs) - 2)
            if (concat := _appends(body, place)) is not None and _is_asked(node, place, body)
        ]
        if not appending:
            return False
        if ctx.opset < _OPSET:
            ctx.refuse(node, f"Reshape takes no sizes of zero below opset {_OPSET}")
            return False
        shapes = shapes_in_turns(node, ctx)
        for place, concat in appending:
            growth = _growth(node, place, concat, shapes, ctx)
            if growth is None:
                continue
            if _only_appends(body, growth):
                if self._stack(node, growth, ctx):
                    return True
            elif not ctx.target.control_flow.growing_state and self._buffer(node, growth, shapes, ctx):
                return True
        return False

    def apply(self, ctx: Context) -> None:
        # A Loop may carry several of them: the new Loop is looked at again.
        while True:
            before = len(ctx.applications)
            super().apply(ctx)
            if len(ctx.applications) == before:
                return

    # -- stacked -------------------------------------------------------------------------------------------------------

    def _stack(self, node: ir.Node, growth: _Growth, ctx: Context) -> bool:
        body, concat = _copy_of_body(node, growth)
        inner, grown = body.inputs[2 + growth.place], concat.outputs[0]
        parts = [value for value in concat.inputs[1:] if value is not None]
        part = parts[0]
        maker = part.producer()
        if len(parts) > 1 or part.is_graph_output() or maker is None or maker.graph is not body:
            # A body returns what a node of it makes, and nothing twice.
            how: dict[str, object] = {"axis": growth.axis} if len(parts) > 1 else {}
            joined = ctx.node("Concat" if len(parts) > 1 else "Identity", parts, how)
            part = joined.outputs[0]
            part.name = ctx.fresh_name(f"{grown.name}/part")
            body.insert_before(concat, joined)
        # What a Loop of no turn returns has the shape that is declared.
        part.type, part.shape = growth.start.type, _part_shape(growth)
        del body.outputs[1 + growth.place]
        graphs.detach(concat)
        body.remove(concat)
        body.inputs.remove(inner)
        body.outputs.append(part)

        inputs = [value for index, value in enumerate(node.inputs) if index != 2 + growth.place]
        others = [value for index, value in enumerate(node.outputs) if index != growth.place]
        stacked_like = ir.Value(type=growth.start.type, shape=ir.Shape([None, *_part_shape(growth)]))
        loop = ctx.node("Loop", inputs, {"body": body}, like=[*others, stacked_like])
        made = [loop]

        def add(op_type: str, reads: list[ir.Value], **attributes: object) -> ir.Value:
            made.append(ctx.node(op_type, reads, attributes))
            return made[-1].outputs[0]

        def ints(*values: int) -> ir.Value:
            return ctx.constant(np.array(values, np.int64), "sizes")

        rank, axis = len(growth.shape), growth.axis
        rows = loop.outputs[-1]
        if axis > 0:
            rows = add("Transpose", [rows], perm=[*range(1, axis + 1), 0, *range(axis + 1, rank + 1)])
        sizes = [size for index, size in enumerate(growth.shape) if index != axis]
        if all(isinstance(size, int) and size > 0 for size in sizes):
            target = ints(*(-1 if i == axis else int(s) for i, s in enumerate(growth.shape)))  # type: ignore[arg-type]
        else:
            counted = add("Shape", [loop.outputs[-1]])
            length = add("Mul", [add("Slice", [counted, ints(0), ints(1)]),
                                 add("Slice", [counted, ints(axis + 1), ints(axis + 2)])])  # fmt: skip
            whole = add("Shape", [growth.start])
            before, after = (add("Slice", [whole, ints(a), ints(b)]) for a, b in ((0, axis), (axis + 1, rank)))
            target = add("Concat", [before, length, after], axis=0)
        flat = add("Reshape", [rows, target], allowzero=int(target.const_value is None))
        old = node.outputs[growth.place]
        result = flat if growth.shape[axis] == 0 else add("Concat", [growth.start, flat], axis=axis)
        result.type, result.shape = old.type, old.shape
        return _replace(node, loop, {old: result, **_kept(node, growth, loop)}, made, "stacked", ctx)

    # -- in a buffer ---------------------------------------------------------------------------------------------------

    def _buffer(self, node: ir.Node, growth: _Growth, shapes: Shapes, ctx: Context) -> bool:
        turns = most_turns(node, shapes, ctx.opset)
        dtype = growth.start.dtype
        first = growth.shape[growth.axis]
        reason = None
        if turns is None:
            reason = "no constant limits the number of turns"
        elif not growth.step or not isinstance(first, int):
            reason = "the length of its start, or of what a turn appends, is not a number"
        elif dtype not in _NUMBERS:
            reason = "it holds no numbers, or such as ONNX Runtime cannot pad"
        if reason is not None or turns is None or not growth.step or not isinstance(first, int) or dtype is None:
            ctx.refuse(node, f"{reason}, so that there is no buffer for what it carries")
            return False
        most = first + turns * growth.step
        others = [size for index, size in enumerate(growth.shape) if index != growth.axis and isinstance(size, int)]
        if math.prod([most, *others]) * dtype.itemsize > _LARGEST:
            ctx.refuse(node, f"the buffer would have a length of {most}")
            return False
        return self._with_buffer(node, growth, first, turns, ctx)

    def _with_buffer(self, node: ir.Node, growth: _Growth, first: int, turns: int, ctx: Context) -> bool:
        rank, axis = len(growth.shape), growth.axis
        body, concat = _copy_of_body(node, growth)
        inner, grown = body.inputs[2 + growth.place], concat.outputs[0]
        front = [axis, *(i for i in range(rank) if i != axis)]
        kind, number = growth.start.type, ir.TensorType(ir.DataType.INT64)
        step = growth.step or 0
        most = first + turns * step

        def add(nodes: list[ir.Node], op_type: str, reads: list[ir.Value], **attributes: object) -> ir.Value:
            made = ctx.node(op_type, reads, attributes)
            made.outputs[0].name = ctx.fresh_name(f"{grown.name}/{op_type}")
            made.outputs[0].type = reads[0].type
            nodes.append(made)
            return made.outputs[0]

        def ints(array: object) -> ir.Value:
            return ctx.constant(np.array(array, np.int64), "sizes")

        def view(nodes: list[ir.Node], buffer: ir.Value, length: ir.Value) -> ir.Value:
            end = add(nodes, "Reshape", [length, ints([1])])
            return add(nodes, "Slice", [buffer, ints([0]), end, ints([axis])])

        # In the body: what was the state is a part of the buffer, what was appended is written behind it.
        head: list[ir.Node] = []
        tail: list[ir.Node] = []
        states = len(node.inputs) - 2
        counting = _counting(node, concat, body, first, step)
        if counting is None:
            length = ir.Value(name=ctx.fresh_name(f"{grown.name}/length"), type=number, shape=ir.Shape([]))
            after = add(head, "Add", [length, ints(step)])
            after.shape = length.shape
            body.inputs.append(length)
            body.outputs.insert(1 + states, after)
        else:
            length, after = body.inputs[2 + counting], body.outputs[1 + counting]
        size = list(growth.shape)
        held = ir.Value(name=ctx.fresh_name(f"{grown.name}/buffer"), type=kind,
                        shape=ir.Shape([*size[:axis], most, *size[axis + 1 :]]))  # fmt: skip
        parts = [value for value in concat.inputs[1:] if value is not None]
        part = add(tail, "Concat", parts, axis=axis) if len(parts) > 1 else parts[0]
        places = add(tail, "Add", [ints(np.arange(step)[:, None]), length])
        if axis == 0:
            written = add(tail, "ScatterND", [held, places, part])
        else:
            turned = [add(tail, "Transpose", [value], perm=front) for value in (held, part)]
            back = add(tail, "ScatterND", [turned[0], places, turned[1]])
            written = add(tail, "Transpose", [back], perm=[front.index(i) for i in range(rank)])
        written.shape = held.shape
        graphs.detach(concat)
        for value, buffer, count, least, nodes in (
            (inner, held, length, first, head),
            (grown, written, after, first + step, tail),
        ):
            for reader in {use.node for use in value.uses()}:
                _look_up(reader, value, buffer, count, growth, least, ctx)
            if value.uses():
                seen = view(nodes, buffer, count)
                for use in tuple(value.uses()):
                    use.node.replace_input_with(use.idx, seen)
        body.insert_before(concat, tail)
        body.outputs[1 + growth.place] = written
        body.remove(concat)
        body.insert_before(next(iter(body)), head)
        body.inputs[2 + growth.place] = held

        # Around it: the start in a buffer, and as much of what came out as was filled.
        made: list[ir.Node] = []
        room = growth.start
        if most > first:
            pads = ints([0] * rank + [most - first if i == axis else 0 for i in range(rank)])
            room = add(made, "Pad", [room, pads])
            room.shape = held.shape
        inputs = list(node.inputs)
        inputs[2 + growth.place] = room
        like = list(node.outputs)
        like[growth.place] = ir.Value(type=kind, shape=held.shape)
        if counting is None:
            inputs.append(ints(first))
            like.insert(states, ir.Value(type=number, shape=length.shape))
        if graphs.scalar_of(node.inputs[0]) != turns:
            inputs[0] = ints(turns)
        loop = ctx.node("Loop", inputs, {"body": body}, like=like)
        made.append(loop)
        outputs = {
            old: loop.outputs[index + (counting is None and index >= states)]
            for index, old in enumerate(node.outputs)
            if old.uses() or old.is_graph_output()
        }
        filled = node.outputs[growth.place]
        if filled in outputs and not _runs_to_the_end(node, ctx):
            end = loop.outputs[states if counting is None else counting]
            outputs[filled] = view(made, loop.outputs[growth.place], end)
        return _replace(node, loop, outputs, made, "buffer", ctx)


def _look_up(
    reader: ir.Node, value: ir.Value, buffer: ir.Value, length: ir.Value, growth: _Growth, least: int, ctx: Context
) -> None:
    """Let a node that reads a state at fixed places, counted from either end, read them in its buffer.

    A Slice of computed length is no more than a state that grows to a backend that wants every shape to be the same in
    all turns. A Gather at a computed place is.

    Args:
        reader: Is left alone where it is something else.
        value: The state.
        buffer: Holds it.
        length: How much of the buffer it takes, int64 scalar.
        growth: Along which axis it grows.
        least: The least that ``length`` is.
        ctx: Makes nodes.
    """
    graph = reader.graph
    if not isinstance(graph, ir.Graph):
        return
    if (reader.domain, reader.op_type) == ("", "Shape"):
        _tell_size(reader, graph, length, growth, ctx)
        return
    places = _places(reader, value, growth, least)
    if places is None:
        return
    index = ctx.constant(places, "places")
    gather = ctx.node("Gather", [buffer, index], {"axis": growth.axis}, like=reader.outputs[0])
    if (places < 0).any():
        counted = ctx.node("Add", [index, length])
        counted.outputs[0].name = ctx.fresh_name(f"{buffer.name}/place")
        counted.outputs[0].type = length.type
        graph.insert_before(reader, counted)
        gather.replace_input_with(1, counted.outputs[0])
    result = reader.outputs[0]
    graph.insert_before(reader, gather)
    take_place(result, gather.outputs[0], graph)
    graphs.detach(reader)
    graph.remove(reader)


def _tell_size(reader: ir.Node, graph: ir.Graph, length: ir.Value, growth: _Growth, ctx: Context) -> None:
    """Let a Shape of a state be its length and the sizes of the other axes, where they are numbers."""
    start, end = reader.attributes.get_int("start", 0), reader.attributes.get_int("end", None)
    if any(attribute.is_ref() for attribute in reader.attributes.values()):
        return
    sizes = list(growth.shape)
    sizes[growth.axis] = -1  # any number
    told = sizes[start:end]
    if not all(isinstance(size, int) for size in told):
        return
    at = list(range(len(sizes)))[start:end]
    flat = ctx.node("Reshape", [length, ctx.constant(np.array([1], np.int64), "sizes")])
    made = [flat]
    if growth.axis not in at:
        return
    if len(at) > 1:
        flat.outputs[0].name = ctx.fresh_name(f"{length.name}/flat")
        flat.outputs[0].type = length.type
        where = at.index(growth.axis)
        around = [ctx.constant(np.array(part, np.int64), "sizes") for part in (told[:where], told[where + 1 :])]
        made.append(ctx.node("Concat", [around[0], flat.outputs[0], around[1]], {"axis": 0}))
    graph.insert_before(reader, made)
    result = made[-1].outputs[0]
    result.type, result.shape = length.type, reader.outputs[0].shape
    take_place(reader.outputs[0], result, graph)
    graphs.detach(reader)
    graph.remove(reader)


def _places(reader: ir.Node, value: ir.Value, growth: _Growth, least: int) -> np.ndarray | None:
    """The places along an axis that a node reads of a state, all from the front or all from the end (negative)."""
    if reader.domain != "" or reader.inputs[0] is not value or value in reader.inputs[1:]:
        return None
    if reader.op_type == "Gather":
        along = reader.attributes.get_int("axis", 0)
        places = graphs.constant_array(reader.inputs[1], limit=64)
    elif reader.op_type == "Slice" and len(reader.inputs) > 3:
        start, end, along_, step = (graphs.scalar_of(other) for other in [*reader.inputs[1:], None][:4])
        if start is None or end is None or along_ is None or start >= 0 or end < _TO_THE_END or -start > least:
            return None
        if len(reader.inputs) > 4 and step != 1:
            return None
        along, places = int(along_), np.arange(int(start), 0)
    else:
        return None
    if along < 0:
        along += len(growth.shape)
    if along != growth.axis or places is None or places.size == 0:
        return None
    same_end = bool((places < 0).all()) or bool((places >= 0).all())
    inside = bool((places >= -least).all() and (places < least).all())
    return places.astype(np.int64) if same_end and inside else None


def _runs_to_the_end(node: ir.Node, ctx: Context) -> bool:
    """Whether nothing but its count ends a Loop."""
    body = node.attributes["body"].as_graph()
    start = node.inputs[1]
    values = ShapeValues(ctx.opset)
    begins = None if start is None else values.constant(start)
    if start is not None and (begins is None or begins.size != 1 or not begins.reshape(())):
        return False
    values.learn(body.inputs[1], np.array(True))
    again = values.constant(body.outputs[0])
    return again is not None and again.size == 1 and bool(again.reshape(()))


# What ONNX Runtime's CPU has a Pad for (float16 by way of float32), without which nothing could be compared.
_NUMBERS = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64,
        ir.DataType.INT8, ir.DataType.UINT8,
    }
)  # fmt: skip


# -- what grows --------------------------------------------------------------------------------------------------------


def _appends(body: ir.Graph, place: int) -> ir.Node | None:
    """The Concat that makes a state longer at its end for the next turn; None where there is none."""
    inner, after = body.inputs[2 + place], body.outputs[1 + place]
    concat = after.producer()
    if concat is None or concat.graph is not body or (concat.domain, concat.op_type) != ("", "Concat"):
        return None
    if concat.inputs[0] is not inner or len(concat.inputs) < 2 or concat.attributes["axis"].is_ref():
        return None
    if inner.is_graph_output() or any(value is inner or value is None for value in concat.inputs[1:]):
        return None
    return concat if sum(output is after for output in body.outputs) == 1 else None


def _is_asked(node: ir.Node, place: int, body: ir.Graph) -> bool:
    """Whether the state is wanted, after the Loop or in it."""
    given = node.outputs[place]
    read = len(body.inputs[2 + place].uses()) > 1 or bool(body.outputs[1 + place].uses())
    return bool(given.uses()) or given.is_graph_output() or read


def _growth(node: ir.Node, place: int, concat: ir.Node, shapes: Shapes, ctx: Context) -> _Growth | None:
    """What is to be known of a state that grows; None, with a word why, where it is not."""
    start = node.inputs[2 + place]
    assert start is not None
    shape = shapes[start] if start in shapes else trusted_shape(start)
    if shape is None or len(shape) == 0 or start.dtype is None:
        ctx.refuse(node, "the rank of what it starts to append to is not known")
        return None
    axis = concat.attributes.get_int("axis", 0)
    axis += len(shape) if axis < 0 else 0
    parts = [shapes[value] if value in shapes else trusted_shape(value) for value in concat.inputs[1:] if value]
    known = [part for part in parts if part is not None and len(part) == len(shape)]
    if len(known) < len(parts) or not 0 <= axis < len(shape):
        ctx.refuse(node, "the rank of what a turn appends is not known")
        return None
    sizes = [part[axis] for part in known]
    if any(not isinstance(size, int) and size.value is None for size in sizes):
        ctx.refuse(node, "the size of what a turn appends is not known to be the same in every turn")
        return None
    numbers = [size for size in sizes if isinstance(size, int)]
    step = sum(numbers) if len(numbers) == len(sizes) else None
    return _Growth(place, concat, start, axis, shape, known[0], step)


def _part_shape(growth: _Growth) -> ir.Shape:
    """The shape of what is appended in a turn. Other axes have the size that the start has, as Concat wants it."""
    sizes: list[int | ir.SymbolicDim | None] = [
        a if isinstance(a, int) else b for a, b in zip(growth.part, growth.shape, strict=True)
    ]
    sizes[growth.axis] = growth.step
    return ir.Shape(sizes)


def _only_appends(body: ir.Graph, growth: _Growth) -> bool:
    """Whether the body does nothing with a state but to append to it."""
    return len(body.inputs[2 + growth.place].uses()) == 1 and not growth.concat.outputs[0].uses()


def _counting(node: ir.Node, concat: ir.Node, body: ir.Graph, first: int, step: int) -> int | None:
    """Which state of a Loop is the length of another one already; None for none.

    Args:
        node: The Loop.
        concat: Makes the other longer; the number for the next turn is to be there before.
        body: Of the Loop, or a copy.
        first: The length before the first turn.
        step: How much longer it gets in a turn.
    """

    def is_number(value: ir.Value | None, wanted: int) -> bool:
        array = graphs.constant_array(value, limit=1)
        return array is not None and array.shape == () and array.dtype == np.int64 and int(array) == wanted

    before = set(itertools.takewhile(lambda other: other is not concat, body))
    for place, start in enumerate(node.inputs[2:]):
        inner, maker = body.inputs[2 + place], body.outputs[1 + place].producer()
        if maker not in before or (maker.domain, maker.op_type) != ("", "Add") or not is_number(start, first):
            continue
        if any(one is inner and is_number(other, step) for one, other in (maker.inputs, maker.inputs[::-1])):
            return place
    return None


# -- the new Loop ------------------------------------------------------------------------------------------------------


def _copy_of_body(node: ir.Node, growth: _Growth) -> tuple[ir.Graph, ir.Node]:
    """A copy of a Loop's body, and the copy in it of what appends."""
    body = node.attributes["body"].as_graph()
    copy = body.clone(allow_outer_scope_values=True)
    concat = copy.outputs[1 + growth.place].producer()
    assert concat is not None
    return copy, concat


def _kept(node: ir.Node, growth: _Growth, loop: ir.Node) -> dict[ir.Value, ir.Value]:
    """What the other results of a Loop are in one without a state."""
    others = [value for index, value in enumerate(node.outputs) if index != growth.place]
    return {old: new for old, new in zip(others, loop.outputs, strict=False) if old.uses() or old.is_graph_output()}


def _replace(
    node: ir.Node, loop: ir.Node, outputs: dict[ir.Value, ir.Value], made: list[ir.Node], rule: str, ctx: Context
) -> bool:
    name = node.name
    if not outputs or not ctx.replace(outputs, made, rule=rule, certain=True):
        return False
    loop.name = name
    return True
