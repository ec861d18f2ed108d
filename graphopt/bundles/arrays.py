"""What backends do to numpy arrays where the host cuts, stacks and puts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.bundles.backend import Rows
from graphopt.bundles.plan import Port
from graphopt.errors import GraphoptError
from graphopt.runtime.session import numpy_dtype

Array = np.ndarray[Any, Any]


def stack_of_none(axis: int, like: Port) -> Array:
    """What a loop without turns stacks: unknown sizes are 0."""
    shape = [size if isinstance(size, int) else 0 for size in like.shape or ()]
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 0)
    return np.empty(shape, numpy_dtype(like.type))


def number_as(value: int | bool, port: Port) -> Array:
    """A number as an array of one element, of as many axes as a value is declared with."""
    return np.full((1,) * len(port.shape or ()), value, np.bool_ if port.type == "tensor(bool)" else np.int64)


def merged_shape(shapes: Sequence[Sequence[int]], axis: int, count: int) -> list[int]:
    """The shape of a value that is put together; raises GraphoptError where its parts do not fit."""
    rests = {tuple(size for place, size in enumerate(shape) if place != axis) for shape in shapes}
    if len(rests) > 1:
        raise GraphoptError(
            f"samples give values of other sizes, {' and '.join(str(list(rest)) for rest in sorted(rests))}",
            hint="run them one at a time",
        )
    made = list(shapes[0])
    made[axis] = count
    return made


def merge_into(out: Array, parts: Sequence[tuple[Any, Rows | None, Rows]], axis: int) -> None:
    """Put rows together in an array."""
    target = np.moveaxis(out, axis, 0)
    for array, rows, to in parts:
        source = np.moveaxis(array, axis, 0)
        target[to] = source[: len(to)] if rows is None else source[rows]
    filled = sum(len(to) for _, _, to in parts)
    target[filled:] = target[filled - 1 : filled]
