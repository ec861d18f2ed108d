"""Nodes that hand their input on as it is, and pairs of nodes that undo each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.evaluate import slice_bounds
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shapes import is_known, trusted_shape

# Constants that say what a node does (axes, pads, repeats) are short; longer ones are not looked into.
_SMALL = 64


class RemoveIdentities(RulePass):
    """Removes nodes that do nothing.

    Alone: Identity; Dropout in inference; Cast to its own type; Transpose that keeps the order; Reshape, Flatten,
    Expand, Squeeze or Unsqueeze that keep a known shape; Slice of everything; Pad by nothing; Tile once; Concat, Sum,
    Mean, Max and Min of one; Split into one; Mul and Div by one; Gather of every index in order.

    In pairs: Transpose after Transpose becomes one or none; Reshape (or Flatten, Squeeze, Unsqueeze) before Reshape
    goes; Squeeze and Unsqueeze of the same axes go; Cast back from a type that holds every value goes, and a Cast
    between two floats that widens first becomes one; Not after Not and Neg after Neg go.
    """

    name = "remove-identities"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="Identity, Dropout in inference, Cast to the same type and back from a wider one, Transpose pairs, "
        "Reshape chains, Reshape/Flatten/Expand/Squeeze/Unsqueeze to the known shape, Squeeze with Unsqueeze, Slice of "
        "everything, Pad by 0, Tile by 1, Concat/Sum/Mean/Max/Min of one, Split into one, Mul and Div by 1, Gather of "
        "all indices in order, Not of Not, Neg of Neg",
        refuses="x + 0, which turns -0.0 into 0.0; Cast back from a narrower type; shapes that only the file declares; "
        "Mul by 1 that broadcasts; a copy that a body or the model returns and that needs a name of its own",
        costs="one look at each node; a node less to launch, often a copy of the tensor less",
        source="ONNX operator specification",
    )
    roots = (
        *("Identity", "Dropout", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad"),
        *("Concat", "Sum", "Mean", "Max", "Min", "Split", "Expand", "Tile", "Mul", "Div", "Not", "Neg", "Gather"),
    )

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        if not node.inputs or any(a.is_ref() for a in node.attributes.values()):
            return False
        if _does_nothing(node, ctx.opset):
            return self._drop(node, ctx)
        rule = _PAIRS.get(node.op_type)
        return rule is not None and rule(node, ctx)

    def _drop(self, node: ir.Node, ctx: Context) -> bool:
        source = node.inputs[_passed_on(node)]
        assert source is not None
        return _forward(ctx, node, source, node.op_type.lower())


def _forward(ctx: Context, node: ir.Node, source: ir.Value, rule: str) -> bool:
    """Let readers of a node's first output read ``source``."""
    output = node.outputs[0]
    if output.is_graph_output() and not _may_be_output(source, node):
        if node.op_type == "Identity":
            return False  # it gives an input, a constant or an outer value the name of an output: needed
        copy = ctx.node("Identity", [source], like=output)
        return ctx.replace({output: copy.outputs[0]}, [copy], rule=rule)
    return ctx.replace({output: source}, rule=rule)


def _may_be_output(source: ir.Value, node: ir.Node) -> bool:
    producer = source.producer()
    return producer is not None and producer.graph is node.graph and not source.is_graph_output()


def _passed_on(node: ir.Node) -> int:
    """Which input a node that does nothing hands on: the one that is not the neutral constant."""
    return 1 if node.op_type == "Mul" and _is_one(node.inputs[0], node.inputs[1]) else 0


# -- alone -------------------------------------------------------------------------------------------------------------


def _does_nothing(node: ir.Node, opset: int) -> bool:
    if node.inputs[0] is None or not node.outputs:
        return False
    test = _ALONE.get(node.op_type)
    return test is not None and test(node, opset)


def _always(node: ir.Node, opset: int) -> bool:
    return True


def _dropout(node: ir.Node, opset: int) -> bool:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return False
    if opset < 7:
        return node.attributes.get_int("is_test", 0) == 1
    if opset < 12 or len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    training = graphs.constant_array(node.inputs[2], limit=1)
    return training is not None and not training.any()


def _cast(node: ir.Node, opset: int) -> bool:
    source = node.inputs[0]
    return source is not None and source.dtype is not None and source.dtype == _cast_type(node)


def _cast_type(node: ir.Node) -> ir.DataType | None:
    to = node.attributes.get("to")
    return ir.DataType(to.as_int()) if to is not None and to.type is ir.AttributeType.INT else None


def _transpose(node: ir.Node, opset: int) -> bool:
    perm = _perm(node)
    return perm is not None and perm == list(range(len(perm)))


def _perm(node: ir.Node) -> list[int] | None:
    perm = node.attributes.get("perm")
    if perm is not None:
        return list(perm.as_ints())
    shape = trusted_shape(node.inputs[0]) if node.inputs[0] is not None else None
    return None if shape is None else list(range(len(shape)))[::-1]


def _keeps_shape(node: ir.Node, opset: int) -> bool:
    """The output has the input's shape, each axis known by number or by the same name."""
    before = trusted_shape(node.inputs[0]) if node.inputs[0] is not None else None
    if before is None:
        return False
    if node.op_type == "Reshape" and _copies_every_axis(node, before):
        return True
    after = trusted_shape(node.outputs[0])
    return after is not None and is_known(before) and is_known(after) and before == after


def _copies_every_axis(node: ir.Node, shape: ir.Shape) -> bool:
    """Reshape to [0, 0, -1]: every axis but one copied, so what is left for that one is its own size."""
    target = _reshape_target(node)
    return (
        target is not None
        and len(target) == len(shape)
        and all(d in (0, -1) or d == axis for d, axis in zip(target, shape, strict=True))
        and target.count(-1) <= 1
        and node.attributes.get_int("allowzero", 0) == 0
    )


def _reshape_target(node: ir.Node) -> list[int] | None:
    if "shape" in node.attributes:  # before opset 5
        return list(node.attributes["shape"].as_ints())
    return _ints(node, 1)


def _ints(node: ir.Node, index: int) -> list[int] | None:
    """The integers of a constant operand, None where it is absent, not constant or long."""
    array = graphs.constant_array(node.inputs[index], limit=_SMALL) if index < len(node.inputs) else None
    return None if array is None or array.dtype.kind not in "iu" else [int(v) for v in array.reshape(-1)]


def _absent(node: ir.Node, index: int) -> bool:
    return index >= len(node.inputs) or node.inputs[index] is None


def _slice(node: ir.Node, opset: int) -> bool:
    shape = trusted_shape(node.inputs[0]) if node.inputs[0] is not None else None
    steps: list[int] | None
    starts: list[int]
    axes: list[int]
    if opset < 10:
        starts, stops = list(node.attributes["starts"].as_ints()), list(node.attributes["ends"].as_ints())
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else list(range(len(starts)))
        steps = [1] * len(starts)
    else:
        first, last = _ints(node, 1), _ints(node, 2)
        if first is None or last is None:
            return False
        starts, stops = first, last
        read = list(range(len(starts))) if _absent(node, 3) else _ints(node, 3)
        steps = [1] * len(starts) if _absent(node, 4) else _ints(node, 4)
        if read is None or steps is None:
            return False
        axes = read
    if not len(starts) == len(stops) == len(axes) == len(steps):
        return False
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        if step != 1 or start > 0:
            return False
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if isinstance(size, int):
            if slice_bounds(start, stop, step, size) != slice(0, size, 1):
                return False
        elif start != 0 or stop < np.iinfo(np.int32).max:
            return False
    return True


def _pad(node: ir.Node, opset: int) -> bool:
    if opset < 11:
        pads = node.attributes.get("pads") or node.attributes.get("paddings")
        return pads is not None and not any(pads.as_ints())
    amounts = _ints(node, 1)
    return amounts is not None and not any(amounts)


def _tile(node: ir.Node, opset: int) -> bool:
    repeats = _ints(node, 1) if opset >= 6 else None
    return repeats is not None and all(r == 1 for r in repeats)


def _of_one(node: ir.Node, opset: int) -> bool:
    return len(node.inputs) == 1


def _split(node: ir.Node, opset: int) -> bool:
    return len(node.outputs) == 1


def _is_one(value: ir.Value | None, other: ir.Value | None) -> bool:
    """A constant one that does not make ``other`` larger when both are multiplied."""
    if value is None or other is None or value.shape is None or graphs.constant_tensor(value) is None:
        return False
    tensor = graphs.constant_tensor(value)
    if tensor is None or tensor.size != 1 or graphs.scalar_of(value) != 1.0:
        return False
    shape = trusted_shape(other)
    return len(tensor.shape) == 0 or (shape is not None and len(shape) >= len(tensor.shape))


def _mul(node: ir.Node, opset: int) -> bool:
    a, b = node.inputs
    return opset >= 7 and (_is_one(b, a) or _is_one(a, b))


def _div(node: ir.Node, opset: int) -> bool:
    return opset >= 7 and _is_one(node.inputs[1], node.inputs[0])


def _gather(node: ir.Node, opset: int) -> bool:
    indices = graphs.constant_array(node.inputs[1], limit=4096)
    shape = trusted_shape(node.inputs[0]) if node.inputs[0] is not None else None
    axis = node.attributes.get_int("axis", 0)
    if indices is None or indices.ndim != 1 or shape is None or not -len(shape) <= axis < len(shape):
        return False
    return shape[axis] == len(indices) and np.array_equal(indices, np.arange(len(indices)))


_ALONE: dict[str, Callable[[ir.Node, int], bool]] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _keeps_shape,
    "Flatten": _keeps_shape,
    "Squeeze": _keeps_shape,
    "Unsqueeze": _keeps_shape,
    "Expand": _keeps_shape,
    "Slice": _slice,
    "Pad": _pad,
    "Tile": _tile,
    "Concat": _of_one,
    "Sum": _of_one,
    "Mean": _of_one,
    "Max": _of_one,
    "Min": _of_one,
    "Split": _split,
    "Mul": _mul,
    "Div": _div,
    "Gather": _gather,
}


# -- in pairs ----------------------------------------------------------------------------------------------------------


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard node that makes a value, where it is one of the given types and its input can be read."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type not in op_types or producer.domain != "" or producer.inputs[0] is None:
        return None
    return None if any(a.is_ref() for a in producer.attributes.values()) else producer


def _same_twice(node: ir.Node, ctx: Context) -> bool:
    """Not after Not, Neg after Neg."""
    first = _producer(node.inputs[0], node.op_type)
    return (
        first is not None
        and first.inputs[0] is not None
        and _forward(ctx, node, first.inputs[0], f"{node.op_type.lower()}-twice")
    )


def _transpose_twice(node: ir.Node, ctx: Context) -> bool:
    first = _producer(node.inputs[0], "Transpose")
    if first is None or first.inputs[0] is None:
        return False
    inner, outer = _perm(first), _perm(node)
    if inner is None and outer is None:  # both turn the order of all axes round, however many there are
        return _forward(ctx, node, first.inputs[0], "transpose-twice")
    if inner is None or outer is None:
        length = len(inner or outer or [])
        inner, outer = inner or list(range(length))[::-1], outer or list(range(length))[::-1]
    if len(inner) != len(outer):
        return False
    perm = [inner[i] for i in outer]
    if perm == list(range(len(perm))):
        return _forward(ctx, node, first.inputs[0], "transpose-twice")
    if graphs.sole_consumer(first.outputs[0]) is None:
        ctx.refuse(node, f"the Transpose before it ({first.name}) has other readers")
        return False
    merged = ctx.node("Transpose", [first.inputs[0]], {"perm": perm}, like=node.outputs[0])
    return ctx.replace({node.outputs[0]: merged.outputs[0]}, [merged], rule="transpose-twice")


def _reshape_twice(node: ir.Node, ctx: Context) -> bool:
    """What reshapes before a Reshape does not matter, unless the Reshape copies axes by 0."""
    first = _producer(node.inputs[0], "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    if first is None or first.inputs[0] is None or ctx.opset < 5 or len(node.inputs) < 2:
        return False
    target = _ints(node, 1)
    if target is None or (0 in target and not _same_leading_axes(first, target)):
        return False
    attributes = {"allowzero": 1} if node.attributes.get_int("allowzero", 0) else None
    merged = ctx.node("Reshape", [first.inputs[0], node.inputs[1]], attributes, like=node.outputs[0])
    return ctx.replace({node.outputs[0]: merged.outputs[0]}, [merged], rule="reshape-twice", certain=True)


def _same_leading_axes(first: ir.Node, target: Sequence[int]) -> bool:
    """Whether every axis that the target copies is the same before and after the first node."""
    source = trusted_shape(first.inputs[0]) if first.inputs[0] is not None else None
    middle = trusted_shape(first.outputs[0])
    if source is None or middle is None:
        return False
    for axis, d in enumerate(target):
        if d != 0:
            continue
        if axis >= len(source) or axis >= len(middle) or source[axis] != middle[axis]:
            return False
        size = source[axis]
        if not isinstance(size, int) and size.value is None:
            return False
    return True


def _squeeze_pair(node: ir.Node, ctx: Context) -> bool:
    """Squeeze after Unsqueeze of the same axes, and the other way round."""
    other = "Unsqueeze" if node.op_type == "Squeeze" else "Squeeze"
    first = _producer(node.inputs[0], other)
    if first is None or first.inputs[0] is None:
        return False
    undone, done = _axes_of(node, ctx.opset), _axes_of(first, ctx.opset)
    if undone is None or done is None or len(undone) != len(done):
        return False
    # Both name axes of the longer shape; negative ones need its rank.
    if any(a < 0 for a in (*undone, *done)) and undone != done:
        source = trusted_shape(first.inputs[0])
        if source is None:
            return False
        rank = len(source) + (len(done) if other == "Unsqueeze" else 0)
        undone, done = [a % rank for a in undone], [a % rank for a in done]
    return sorted(undone) == sorted(done) and _forward(ctx, node, first.inputs[0], "squeeze-unsqueeze")


def _axes_of(node: ir.Node, opset: int) -> list[int] | None:
    if opset < 13:
        return list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None
    return _ints(node, 1)


def _cast_pair(node: ir.Node, ctx: Context) -> bool:
    """A Cast that widens, then another: the first loses nothing, so the second may start from the source."""
    first = _producer(node.inputs[0], "Cast")
    if first is None or first.inputs[0] is None:
        return False
    source, middle, result = first.inputs[0].dtype, _cast_type(first), _cast_type(node)
    if source is None or middle is None or result is None or middle not in _HOLDS.get(source, frozenset()):
        return False
    if result == source:
        return _forward(ctx, node, first.inputs[0], "cast-back")
    if source not in _FLOATS or result not in _FLOATS or result not in _HOLDS[source]:
        return False
    merged = ctx.node("Cast", [first.inputs[0]], {"to": int(result)}, like=node.outputs[0])
    return ctx.replace({node.outputs[0]: merged.outputs[0]}, [merged], rule="cast-twice", certain=True)


_T = ir.DataType
_FLOATS = frozenset({_T.FLOAT16, _T.BFLOAT16, _T.FLOAT, _T.DOUBLE})
_HOLDS: dict[ir.DataType, frozenset[ir.DataType]] = {
    _T.FLOAT16: frozenset({_T.FLOAT, _T.DOUBLE}),
    _T.BFLOAT16: frozenset({_T.FLOAT, _T.DOUBLE}),
    _T.FLOAT: frozenset({_T.DOUBLE}),
    _T.INT8: frozenset({_T.INT16, _T.INT32, _T.INT64, _T.FLOAT, _T.DOUBLE}),
    _T.UINT8: frozenset({_T.INT16, _T.INT32, _T.INT64, _T.UINT16, _T.UINT32, _T.UINT64, _T.FLOAT, _T.DOUBLE}),
    _T.INT16: frozenset({_T.INT32, _T.INT64, _T.FLOAT, _T.DOUBLE}),
    _T.UINT16: frozenset({_T.INT32, _T.INT64, _T.UINT32, _T.UINT64, _T.FLOAT, _T.DOUBLE}),
    _T.INT32: frozenset({_T.INT64, _T.DOUBLE}),
    _T.UINT32: frozenset({_T.INT64, _T.UINT64, _T.DOUBLE}),
    _T.BOOL: frozenset(
        {_T.INT8, _T.INT16, _T.INT32, _T.INT64, _T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64, _T.FLOAT16, _T.FLOAT}
    ),
}
"""Source type -> types that hold each of its values."""

_PAIRS: dict[str, Callable[[ir.Node, Context], bool]] = {
    "Not": _same_twice,
    "Neg": _same_twice,
    "Transpose": _transpose_twice,
    "Reshape": _reshape_twice,
    "Squeeze": _squeeze_pair,
    "Unsqueeze": _squeeze_pair,
    "Cast": _cast_pair,
}
