"""The sizes of a model's inputs: which axes are free, which belong together, how large they should be."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import BadInput
from graphopt.feeds.attempts import Attempt

SIZES = (5, 7, 4, 9, 6, 8, 11, 10, 13, 12, 15, 14)  # none of them a batch size
_WIDE_1D = 8  # a window at least this wide is a signal frame, not a filter
_BATCH_NAME = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)


def axes_of(value: ir.Value, attempt: Attempt, given: tuple[int, ...] | None) -> list[int | str]:
    """The axes of an input: sizes that are known, names for those that are not."""
    name = name_of(value)
    if value.shape is None:
        if given is not None:
            return list(given)
        rank = attempt.unknown_rank
        if rank is None:
            rank = 2 if value.dtype is None or value.dtype.is_floating_point() else 1
        unranked: list[int | str] = ["?batch", *(f"?{axis}" for axis in range(1, rank))]
        return unranked[:rank]
    known = [known_size(size) for size in value.shape]
    unnamed = [axis for axis, size in enumerate(known) if size is None]
    axes: list[int | str] = []
    for axis, size in enumerate(known):
        if size is not None:
            axes.append(size)
        elif attempt.ties == "separate" and axis > 0:
            axes.append(f"?{name}.{axis}")
        elif axis == 0 or (len(unnamed) == 1 and isinstance(known[0], int) and len(known) > 2):
            axes.append("?batch")  # the states of recurrent networks are [layers, batch, size]
        else:
            axes.append(f"?{axis}")
    return axes


def known_size(size: Any) -> int | str | None:
    if isinstance(size, (int, np.integer)):
        return int(size) if size >= 0 else None
    return size.value if isinstance(size.value, str) and size.value else None


def batch_symbols(
    axes: Mapping[str, Sequence[int | str]], symbols: Sequence[str], windows: Mapping[str, object]
) -> set[str]:
    """The symbols that count samples: named so, or else the one that leads inputs."""
    named = {symbol for symbol in symbols if _BATCH_NAME.search(symbol)}
    if named:
        return named
    leading = {found[0] for found in axes.values() if found and found[0] in symbols and found[0] not in windows}
    return {str(symbol) for symbol in leading} if len(leading) == 1 else set()


def spatial_size(widest: int, spatial_axes: int, position: int, case: int) -> int:
    """A size for an axis that windows slide over: at least twice the widest; images in steps of 32.

    A network that halves its resolution five times and adds it up again needs multiples of 32.
    """
    if spatial_axes == 1:
        base = max(-(-2 * widest // 16) * 16, 16) if widest >= _WIDE_1D else 64
        return base + (0, max(base // 8, 16), -max(base // 8, 16) if base > 32 else 32)[case % 3]
    step = 32 if spatial_axes == 2 else 16
    return max(-(-2 * widest // step) * step, step if spatial_axes > 2 else 2 * step) + step * ((case + position) % 3)


def is_expression(symbol: str, symbols: Sequence[str]) -> bool:
    """Whether a size is computed from others, such as ``past_sequence_length + 1``."""
    if symbol == "total_sequence_length":
        return "past_sequence_length" in symbols and "sequence_length" in symbols
    names = _names_in(symbol)
    return bool(names) and symbol not in names and names <= set(symbols)


def _names_in(symbol: str) -> set[str]:
    try:
        tree = ast.parse(symbol, mode="eval")
    except (SyntaxError, ValueError):
        return set()
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}


_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Div: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def evaluate(symbol: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a size that is written as an expression of others, or None."""
    if symbol == "total_sequence_length":
        return sizes["past_sequence_length"] + sizes["sequence_length"]

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            values = [of(argument) for argument in node.args]
            return max(values) if node.func.id.lower() == "max" else min(values)
        raise ValueError

    try:
        return of(ast.parse(symbol, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def check_shapes(inputs: Sequence[ir.Value], given: Mapping[str, tuple[int, ...]]) -> None:
    known = {name_of(value): value for value in inputs}
    for name, shape in given.items():
        where = f"input '{name}'"
        if name not in known:
            raise BadInput("the model has no such input", where=where, hint=f"inputs: {', '.join(known)}")
        declared = known[name].shape
        if declared is None:
            continue
        sizes = [known_size(size) for size in declared]
        text = "x".join("?" if size is None else str(size) for size in sizes) or "a scalar"
        wrong = any(isinstance(size, int) and size != got for size, got in zip(sizes, shape, strict=False))
        if len(sizes) != len(shape) or wrong:
            raise BadInput(f"the shape is {text}, not {'x'.join(map(str, shape)) or 'a scalar'}", where=where)


def name_of(value: ir.Value) -> str:
    """The name of an input."""
    return value.name or ""
