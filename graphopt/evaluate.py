"""Computes single operators on known values, with the bits that ONNX Runtime gives with its optimizations off.

Two ways: numpy for operators whose result is exactly defined (data movement, integers, comparisons, IEEE
arithmetic), and ONNX Runtime itself for every other deterministic one. What has neither stays uncomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

NARROW_FLOATS = frozenset({"float16", "bfloat16"})
"""ONNX Runtime's CPU computes these in float32 and rounds at the end of a chain, not after every operator."""


class Inexact(Exception):
    """The numpy path does not define the result to the bit, or will not make one this large."""


@dataclass(frozen=True)
class Operation:
    """An operator without its operands: what remains of a node when it has left its graph.

    Attributes:
        op_type: Of the standard domain.
        attributes: By name; no references to a function's attributes, no bodies.
        opset: The version of the standard operator set.
        outputs: How many outputs are wanted.
    """

    op_type: str
    attributes: Mapping[str, ir.Attr] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1

    @classmethod
    def of(cls, node: ir.Node, opset: int) -> Operation:
        """The operation of a node."""
        return cls(node.op_type, dict(node.attributes), opset, len(node.outputs))

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def integers(self, name: str) -> list[int] | None:
        """An attribute of integers, None where it is absent."""
        attribute = self.attributes.get(name)
        return None if attribute is None else list(attribute.as_ints())


Inputs = Sequence[Array | None]
Function = Callable[[Operation, Inputs], list[Array]]


def evaluate(operation: Operation, inputs: Inputs, *, limit: int | None = None) -> list[Array] | None:
    """The outputs of a standard operator by numpy, or None where numpy does not define them to the bit.

    Args:
        operation: What to compute.
        inputs: One array an input, None for an input left out.
        limit: The most elements that an output may have.

    Returns:
        One array an output. An array may be a view of an input.
    """
    function = _FUNCTIONS.get(operation.op_type)
    if function is None:
        return None
    try:
        if limit is not None and _expanded_size(operation, inputs) > limit:
            return None
        with np.errstate(all="ignore"):
            return function(operation, inputs)
    except (Inexact, ValueError, IndexError, TypeError, OverflowError, MemoryError, np.exceptions.AxisError):
        # A malformed node (an index out of range, shapes that do not fit): the runtime shall say so, not we.
        return None


def is_movement(op_type: str) -> bool:
    """Whether an operator only moves elements: it is exact for every element type, objects included."""
    return op_type in _MOVEMENT


def is_value_independent(op_type: str, dtype: ir.DataType, result: ir.DataType) -> bool:
    """Whether numpy computes an operator exactly whatever the values are, so that it may be computed later.

    Args:
        op_type: The operator.
        dtype: Of its first operand.
        result: Of its result.
    """
    if op_type in _LATER_MOVEMENT:
        return True
    wide = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    if op_type == "Cast":
        return (dtype in wide and result in wide) or (_is_integer(dtype) and (_is_integer(result) or result in wide))
    return op_type in _LATER_ARITHMETIC and dtype in wide and result == dtype


def result_shapes(operation: Operation, tensors: Sequence[ir.TensorProtocol | None]) -> list[tuple[int, ...]] | None:
    """The shapes of the outputs of an operator whose result does not depend on the values of its first operand.

    Large operands are not read: arrays of the same shape without content stand for them.
    """
    shapes: list[tuple[int, ...]] = [() if t is None else tuple(t.shape.numpy()) for t in tensors]
    try:
        if operation.op_type in _LATER_ARITHMETIC:
            return [np.broadcast_shapes(*shapes)]
        if operation.op_type in ("Cast", "Identity"):
            return [shapes[0]]
        stand_ins: list[Array | None] = [np.broadcast_to(np.zeros((), np.int8), shape) for shape in shapes]
        if operation.op_type != "Concat":
            # Axes, indices and sizes are short and count; what is moved does not.
            stand_ins[1:] = [None if t is None else t.numpy() for t in tensors[1:]]
    except ValueError:
        return None
    results = evaluate(operation, stand_ins)
    return None if results is None else [result.shape for result in results]


# -- shapes of operands ------------------------------------------------------------------------------------------------


def _is_integer(dtype: ir.DataType) -> bool:
    return dtype.is_integer() and dtype.bitwidth >= 8


def _first(inputs: Inputs, index: int = 0) -> Array:
    if index >= len(inputs) or (value := inputs[index]) is None:
        raise Inexact
    return value


def _given(inputs: Inputs, index: int) -> Array | None:
    return inputs[index] if index < len(inputs) else None


def _ints(array: Array) -> list[int]:
    return [int(v) for v in array.reshape(-1)]


def _expanded_size(operation: Operation, inputs: Inputs) -> int:
    """How many elements an operator that makes more of them than it reads will make."""
    if operation.op_type == "ConstantOfShape":
        return math.prod(_ints(_first(inputs)))
    if operation.op_type == "Expand":
        return math.prod(np.broadcast_shapes(_first(inputs).shape, tuple(_ints(_first(inputs, 1)))))
    if operation.op_type == "Tile":
        return _first(inputs).size * math.prod(_ints(_first(inputs, 1)))
    if operation.op_type == "Range":
        start, stop, step = (_first(inputs, i).item() for i in range(3))
        return 0 if step == 0 else max(0, math.ceil((stop - start) / step))
    if operation.op_type == "Pad":
        pads = operation.integers("pads") if operation.opset < 11 else _ints(_first(inputs, 1))
        return (math.prod(_first(inputs).shape) + 1) * (1 + sum(abs(p) for p in pads or []))
    return math.prod(np.broadcast_shapes(*(x.shape for x in inputs if x is not None))) if _elementwise(operation) else 0


def _elementwise(operation: Operation) -> bool:
    return operation.op_type in _ELEMENTWISE


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Inexact
    return axis % rank


# -- moving elements ---------------------------------------------------------------------------------------------------


def _identity(op: Operation, xs: Inputs) -> list[Array]:
    return [_first(xs)]


def reshape_dims(shape: Sequence[int], target: Sequence[int], *, allow_zero: bool = False) -> list[int]:
    """The shape that Reshape gives: 0 copies an axis (unless ``allow_zero``), -1 takes what is left.

    Raises:
        Inexact: The number of elements differs, or cannot be told.
    """
    dims = [shape[i] if d == 0 and not allow_zero else d for i, d in enumerate(target)]
    if dims.count(-1) > 1 or any(d < -1 for d in dims):
        raise Inexact
    size = math.prod(shape)
    if -1 in dims:
        known = math.prod(d for d in dims if d != -1)
        if known == 0 or size % known:
            raise Inexact
        dims[dims.index(-1)] = size // known
    if math.prod(dims) != size:
        raise Inexact
    return dims


def _reshape(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    target = op.integers("shape") if op.opset < 5 else _ints(_first(xs, 1))
    if target is None:
        raise Inexact
    return [x.reshape(reshape_dims(x.shape, target, allow_zero=op.integer("allowzero", 0) == 1))]


def _flatten(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    axis = op.integer("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        raise Inexact
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))]


def _axes(op: Operation, xs: Inputs) -> list[int] | None:
    """The axes of Squeeze and Unsqueeze: an attribute before opset 13, an input since."""
    if op.opset < 13:
        return op.integers("axes")
    given = _given(xs, 1)
    return None if given is None else _ints(given)


def _squeeze(op: Operation, xs: Inputs) -> list[Array]:
    x, axes = _first(xs), _axes(op, xs)
    if axes is None:
        return [np.squeeze(x)]
    return [np.squeeze(x, tuple(_axis(a, x.ndim) for a in axes))]


def _unsqueeze(op: Operation, xs: Inputs) -> list[Array]:
    x, axes = _first(xs), _axes(op, xs)
    if axes is None:
        raise Inexact
    rank = x.ndim + len(axes)
    wanted = {_axis(a, rank) for a in axes}
    if len(wanted) != len(axes):
        raise Inexact
    dims = iter(x.shape)
    return [x.reshape([1 if i in wanted else next(dims) for i in range(rank)])]


def _transpose(op: Operation, xs: Inputs) -> list[Array]:
    return [np.transpose(_first(xs), op.integers("perm"))]


def _concat(op: Operation, xs: Inputs) -> list[Array]:
    parts = [_first(xs, i) for i in range(len(xs))]
    default = 1 if op.opset < 4 else None
    axis = op.integer("axis", default) if default is not None else op.attributes["axis"].as_int()
    return [np.concatenate(parts, _axis(axis, parts[0].ndim))]


def _split(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    axis = _axis(op.integer("axis", 0), x.ndim)
    given = _given(xs, 1)
    sizes = op.integers("split") if op.opset < 13 else None if given is None else _ints(given)
    if sizes is None:
        count = op.integer("num_outputs", op.outputs)
        step = -(-x.shape[axis] // count)
        sizes = [min(step, max(0, x.shape[axis] - i * step)) for i in range(count)]
    if sum(sizes) != x.shape[axis] or len(sizes) != op.outputs or min(sizes, default=0) < 0:
        raise Inexact
    return np.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


def slice_bounds(start: int, stop: int, step: int, size: int) -> slice:
    """The numpy slice for Slice's start, end and step on an axis of a given size (ends are clamped).

    Raises:
        Inexact: The step is zero.
    """
    if step == 0:
        raise Inexact
    start = start + size if start < 0 else start
    stop = stop + size if stop < 0 else stop
    if step > 0:
        return slice(min(max(start, 0), size), min(max(stop, 0), size), step)
    start, stop = min(max(start, 0), size - 1), min(max(stop, -1), size - 1)
    return slice(start, None if stop < 0 else stop, step)


def _slice(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    if op.opset < 10:
        starts, stops, axes = op.integers("starts"), op.integers("ends"), op.integers("axes")
        steps = None
    else:
        starts, stops = _ints(_first(xs, 1)), _ints(_first(xs, 2))
        axes = None if (given := _given(xs, 3)) is None else _ints(given)
        steps = None if (given := _given(xs, 4)) is None else _ints(given)
    if starts is None or stops is None:
        raise Inexact
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index: list[slice] = [slice(None)] * x.ndim
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        axis = _axis(axis, x.ndim)
        index[axis] = slice(0, 0) if x.shape[axis] == 0 else slice_bounds(start, stop, step, x.shape[axis])
    return [x[tuple(index)]]


def _indices(indices: Array, size: int) -> Array:
    """Indices with negative ones counted from the end; all must be inside."""
    wide: Array = indices.astype(np.int64)
    wide = np.where(wide < 0, wide + size, wide)
    if wide.size and not (wide.min() >= 0 and wide.max() < size):
        raise Inexact
    return wide


def _gather(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    axis = _axis(op.integer("axis", 0), x.ndim)
    taken = np.take(x, _indices(_first(xs, 1), x.shape[axis]), axis)
    return [np.asarray(taken, x.dtype) if x.dtype == object else taken]


def _gather_elements(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    axis = _axis(op.integer("axis", 0), x.ndim)
    indices = _indices(_first(xs, 1), x.shape[axis])
    if indices.ndim != x.ndim:
        raise Inexact
    # Not take_along_axis, which broadcasts: an index array that is shorter along another axis reads its beginning.
    places: list[Array] = list(np.indices(indices.shape))
    places[axis] = indices
    return [x[tuple(places)]]


def _expand(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_ints(_first(xs, 1)))))]


def _tile(op: Operation, xs: Inputs) -> list[Array]:
    if op.opset < 6:
        raise Inexact
    x, repeats = _first(xs), _ints(_first(xs, 1))
    if len(repeats) != x.ndim or min(repeats, default=0) < 0:
        raise Inexact
    return [np.tile(x, repeats)]


def _where(op: Operation, xs: Inputs) -> list[Array]:
    condition, x, y = _first(xs), _first(xs, 1), _first(xs, 2)
    if condition.dtype != np.bool_ or x.dtype != y.dtype:
        raise Inexact
    return [np.where(condition, x, y)]


def _pad(op: Operation, xs: Inputs) -> list[Array]:
    mode = op.attributes.get("mode")
    if op.opset < 11 or (mode is not None and mode.as_string() != "constant"):
        raise Inexact
    x, pads, fill, axes = _first(xs), _ints(_first(xs, 1)), _given(xs, 2), _given(xs, 3)
    chosen = list(range(x.ndim)) if axes is None else [_axis(a, x.ndim) for a in _ints(axes)]
    if len(pads) != 2 * len(chosen) or min(pads, default=0) < 0 or len(set(chosen)) != len(chosen):
        raise Inexact
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(chosen):
        widths[axis] = (pads[i], pads[i + len(chosen)])
    value = x.dtype.type(0) if fill is None else fill.reshape(())
    result = np.empty([n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)], x.dtype)
    result[...] = value
    result[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, widths, strict=True))] = x
    return [result]


def _scatter_nd(op: Operation, xs: Inputs) -> list[Array]:
    reduction = op.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        raise Inexact
    x, indices, updates = _first(xs), _first(xs, 1).astype(np.int64), _first(xs, 2)
    depth = indices.shape[-1]
    result = x.copy()
    places = [tuple(_indices(indices[..., i], x.shape[i]).reshape(-1).tolist()) for i in range(depth)]
    if depth and len(set(zip(*places, strict=True))) != len(places[0]):
        raise Inexact  # the same place twice: the order of writing is not defined
    if updates.shape != (*indices.shape[:-1], *x.shape[depth:]):
        raise Inexact
    result[tuple(_indices(indices[..., i], x.shape[i]) for i in range(depth))] = updates
    return [result]


def _scatter_elements(op: Operation, xs: Inputs) -> list[Array]:
    reduction = op.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        raise Inexact
    x, updates = _first(xs), _first(xs, 2)
    axis = _axis(op.integer("axis", 0), x.ndim)
    indices = _indices(_first(xs, 1), x.shape[axis])
    if indices.shape != updates.shape:
        raise Inexact
    places: list[Array] = list(np.indices(indices.shape))
    places[axis] = indices
    flat = np.ravel_multi_index(tuple(p.reshape(-1) for p in places), x.shape) if indices.size else indices
    if np.unique(flat).size != indices.size:
        raise Inexact
    result = x.copy()
    result[tuple(places)] = updates
    return [result]


# -- making elements ---------------------------------------------------------------------------------------------------


def shape_slice(op: Operation, rank: int) -> slice:
    """Which axes of a value of a given rank Shape returns (``start`` and ``end`` came with opset 15)."""
    start, stop = op.integer("start", 0), op.integer("end", rank)
    return slice_bounds(start, stop, 1, rank)


def _shape(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    return [np.array(x.shape[shape_slice(op, x.ndim)], np.int64)]


def _size(op: Operation, xs: Inputs) -> list[Array]:
    return [np.array(_first(xs).size, np.int64)]


def _constant_of_shape(op: Operation, xs: Inputs) -> list[Array]:
    dims = _ints(_first(xs))
    value = op.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
    if fill.size != 1 or min(dims, default=0) < 0:
        raise Inexact
    return [np.full(dims, fill.reshape(()), fill.dtype)]


def _range(op: Operation, xs: Inputs) -> list[Array]:
    start, stop, step = (_first(xs, i) for i in range(3))
    if start.dtype.kind not in "iu" or step.item() == 0:
        raise Inexact
    return [np.arange(start.item(), stop.item(), step.item(), dtype=start.dtype)]


def _non_zero(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    if x.ndim == 0 or x.dtype.kind not in "fiub":
        raise Inexact
    return [np.array(np.nonzero(x), np.int64).reshape(x.ndim, -1)]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _operands(op: Operation, xs: Inputs, count: int, kinds: str) -> list[Array]:
    """Operands of one dtype of the given numpy kinds; floats must be IEEE single or double."""
    arrays = [_first(xs, i) for i in range(count)]
    dtype = arrays[0].dtype
    if any(a.dtype != dtype for a in arrays) or dtype.kind not in kinds or dtype.name in NARROW_FLOATS:
        raise Inexact
    if count == 2 and op.opset < 7 and arrays[0].shape != arrays[1].shape:
        raise Inexact  # broadcasting was spelled with attributes then
    return arrays


def _arithmetic(compute: Callable[..., Any], kinds: str = "fiu") -> Function:
    def function(op: Operation, xs: Inputs) -> list[Array]:
        arrays = _operands(op, xs, len(xs), kinds)
        return [np.asarray(compute(*arrays), arrays[0].dtype)]

    return function


def _comparison(compute: Callable[..., Any], kinds: str = "fiu") -> Function:
    def function(op: Operation, xs: Inputs) -> list[Array]:
        arrays = _operands(op, xs, 2, kinds)
        return [np.asarray(compute(*arrays), np.bool_)]

    return function


def _divide(op: Operation, xs: Inputs) -> list[Array]:
    a, b = _operands(op, xs, 2, "fiu")
    if a.dtype.kind == "f":
        return [np.asarray(np.divide(a, b), a.dtype)]
    lowest = np.iinfo(a.dtype).min
    if (b == 0).any() or (lowest < 0 and (a == lowest).any() and (b == -1).any()):
        raise Inexact
    quotient = np.floor_divide(a, b)
    # numpy rounds down, ONNX towards zero: one more where the signs differ and something is left over.
    inexact = (quotient * b != a) & ((a < 0) != (b < 0))
    return [np.asarray(quotient + inexact.astype(a.dtype), a.dtype)]


def _modulo(op: Operation, xs: Inputs) -> list[Array]:
    a, b = _operands(op, xs, 2, "fiu")
    fmod = op.integer("fmod", 0)
    if (b == 0).any() or (a.dtype.kind == "f" and fmod != 1):
        raise Inexact
    return [np.asarray(np.fmod(a, b) if fmod else np.mod(a, b), a.dtype)]


def _sum(op: Operation, xs: Inputs) -> list[Array]:
    arrays = _operands(op, xs, len(xs), "iu")
    total = arrays[0]
    for array in arrays[1:]:
        total = np.asarray(total + array, total.dtype)
    return [total]


def _extreme(compute: Callable[..., Any]) -> Function:
    def function(op: Operation, xs: Inputs) -> list[Array]:
        arrays = _operands(op, xs, len(xs), "iu")
        result = arrays[0]
        for array in arrays[1:]:
            result = compute(result, array)
        return [np.asarray(result, arrays[0].dtype)]

    return function


def _cast(op: Operation, xs: Inputs) -> list[Array]:
    x = _first(xs)
    return [cast(x, ir.DataType(op.attributes["to"].as_int()))]


def cast(x: Array, to: ir.DataType) -> Array:
    """An array in another element type, where ONNX and every runtime agree on each bit.

    Raises:
        Inexact: They do not: the type is exotic, a float does not fit the integer type, or a float16 would round
            (which the runtime may skip).
    """
    target = to.numpy()
    if x.dtype == target:
        return x
    if x.dtype.kind not in "fiub" and x.dtype != ml_dtypes.bfloat16:
        raise Inexact
    if target.name in NARROW_FLOATS:
        rounded = x.astype(np.float32).astype(target)
        if not np.array_equal(rounded.astype(x.dtype), x):
            raise Inexact
        return rounded
    if target.kind not in "fiub":
        raise Inexact
    if target.kind in "iu" and x.dtype.kind not in "iub":
        limits = np.iinfo(target)
        wide = x.astype(np.float64)
        # The highest integer may not be a double; below its power of two every truncated double fits.
        if not ((wide > limits.min - 1.0) & (wide < float(limits.max) + (0.0 if limits.bits > 52 else 1.0))).all():
            raise Inexact
    return x.astype(target)


_MOVEMENT: dict[str, Function] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Expand": _expand,
    "Tile": _tile,
    "Where": _where,
    "Pad": _pad,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
}

_ELEMENTWISE: dict[str, Function] = {
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
    "Mul": _arithmetic(np.multiply),
    "Div": _divide,
    "Mod": _modulo,
    "Neg": _arithmetic(np.negative, "fi"),
    "Abs": _arithmetic(np.abs, "fi"),
    "Sign": _arithmetic(np.sign, "iu"),
    "Sqrt": _arithmetic(np.sqrt, "f"),
    "Ceil": _arithmetic(np.ceil, "f"),
    "Floor": _arithmetic(np.floor, "f"),
    "Round": _arithmetic(np.rint, "f"),
    "Sum": _sum,
    "Max": _extreme(np.maximum),
    "Min": _extreme(np.minimum),
    "Equal": _comparison(np.equal, "fiub"),
    "Less": _comparison(np.less),
    "LessOrEqual": _comparison(np.less_equal),
    "Greater": _comparison(np.greater),
    "GreaterOrEqual": _comparison(np.greater_equal),
    "And": _comparison(np.logical_and, "b"),
    "Or": _comparison(np.logical_or, "b"),
    "Xor": _comparison(np.logical_xor, "b"),
    "Not": _arithmetic(np.logical_not, "b"),
    "BitwiseAnd": _arithmetic(np.bitwise_and, "iu"),
    "BitwiseOr": _arithmetic(np.bitwise_or, "iu"),
    "BitwiseXor": _arithmetic(np.bitwise_xor, "iu"),
    "BitwiseNot": _arithmetic(np.invert, "iu"),
}

_FUNCTIONS: dict[str, Function] = {
    **_MOVEMENT,
    **_ELEMENTWISE,
    "Cast": _cast,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "NonZero": _non_zero,
}

_LATER_MOVEMENT = frozenset(
    {
        "Identity",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Concat",
        "Split",
        "Slice",
        "Gather",
        "Tile",
    }
)
_LATER_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Abs"})


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A node for ONNX Runtime to compute.

    Attributes:
        node: Standard, without bodies. It stays in its graph.
        inputs: One entry an input: an array, a value that an earlier job makes, or None for an input left out.
    """

    node: ir.Node
    inputs: list[Array | ir.Value | None]


def run_jobs(jobs: Sequence[Job], opset: int) -> dict[ir.Value, Array]:
    """Compute nodes in one ONNX Runtime session with its optimizations off.

    Args:
        jobs: In topological order.
        opset: The version of the standard operator set.

    Returns:
        Output -> array, for every output that was computed. Empty where no onnxruntime is installed; where the
        runtime refuses a node, that node and what reads it are missing.
    """
    from graphopt.errors import MissingDependency

    if not jobs:
        return {}
    try:
        return _run_session(jobs, opset)
    except MissingDependency:
        return {}
    except Exception:
        # One node that the runtime does not take spoils the session: find it by halves.
        if len(jobs) == 1:
            return {}
    middle = len(jobs) // 2
    known = run_jobs(jobs[:middle], opset)
    rest: list[Job] = []
    missing = {v for job in jobs[:middle] for v in job.node.outputs if v not in known}
    for job in jobs[middle:]:
        if any(isinstance(x, ir.Value) and x in missing for x in job.inputs):
            missing.update(job.node.outputs)
            continue
        rest.append(Job(job.node, [known.get(x, x) if isinstance(x, ir.Value) else x for x in job.inputs]))
    return known | run_jobs(rest, opset)


def _run_session(jobs: Sequence[Job], opset: int) -> dict[ir.Value, Array]:
    import onnx

    from graphopt.runtime.session import create_session

    proto = onnx.ModelProto(ir_version=8)
    proto.opset_import.add(domain="", version=opset)
    graph = proto.graph
    graph.name = "fold"
    names: dict[ir.Value, str] = {}
    feeds: dict[str, Array] = {}
    for job in jobs:
        made = graph.node.add(op_type=job.node.op_type)
        for operand in job.inputs:
            if operand is None:
                made.input.append("")
            elif isinstance(operand, ir.Value):
                made.input.append(names[operand])
            else:
                name = f"i{len(feeds)}"
                feeds[name] = operand
                made.input.append(name)
                dtype = ir.DataType.from_numpy(operand.dtype)
                graph.input.append(onnx.helper.make_tensor_value_info(name, int(dtype), operand.shape))
        for output in job.node.outputs:
            if output.name == "":
                made.output.append("")
                continue
            names[output] = f"o{len(names)}"
            made.output.append(names[output])
        for attribute in job.node.attributes.values():
            ir.serde.serialize_attribute_into(made.attribute.add(), attribute)
    wanted = list(names)
    graph.output.extend(onnx.ValueInfoProto(name=names[value]) for value in wanted)
    session = create_session(proto.SerializeToString(), optimized=False)
    return dict(zip(wanted, session.run([names[v] for v in wanted], feeds), strict=True))
