"""Operators that compute: integers, comparisons, IEEE arithmetic in single and double precision, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.evaluate.operation import NARROW_FLOATS, Array, Function, Inexact, Inputs, Operation, operand


def _operands(op: Operation, xs: Inputs, count: int, kinds: str) -> list[Array]:
    """Operands of one dtype of the given numpy kinds; floats must be IEEE single or double."""
    arrays = [operand(xs, i) for i in range(count)]
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


def cast_operator(op: Operation, xs: Inputs) -> list[Array]:
    """The operator Cast; see `cast`."""
    x = operand(xs)
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


ELEMENTWISE: dict[str, Function] = {
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
