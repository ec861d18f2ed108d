"""Blocks on ONNX Runtime's CPU with numpy arrays between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graphopt.bundles.arrays import merge_into, merged_shape, number_as, stack_of_none
from graphopt.bundles.backend import Part, Rows, RunBlock, Truths
from graphopt.bundles.plan import Port
from graphopt.errors import GraphoptError
from graphopt.runtime.session import run


class PlainBackend:
    """ONNX Runtime with numpy arrays, lists of them and None between blocks: runs whatever ONNX Runtime does.

    Args:
        session: How a block's session is made; asked when a block is run for the first time.
    """

    def __init__(self, session: Callable[[str], Any]) -> None:
        self._make = session
        self._sessions: dict[str, Any] = {}
        self.runs: dict[str, int] = {}

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        wanted = list(outputs)
        self.runs[name] = 0

        def call(values: Sequence[Any]) -> Sequence[Any]:
            self.runs[name] += 1
            if name not in self._sessions:
                self._sessions[name] = self._make(name)
            try:
                made = run(self._sessions[name], dict(zip(inputs, values, strict=True)), wanted)
            except GraphoptError as error:
                raise type(error)(error.what, where=name, hint=error.hint) from error
            return [made[output] for output in wanted]

        return call

    def truth(self, value: Any) -> bool:
        return bool(np.asarray(value).reshape(-1)[0])

    def number(self, value: Any) -> int:
        return int(np.asarray(value).reshape(-1)[0])

    def scalar(self, value: int | bool, port: Port) -> Any:
        return number_as(value, port)

    def length(self, value: Any, axis: int) -> int:
        return int(np.asarray(value).shape[axis])

    def part(self, value: Any, axis: int, index: int) -> Any:
        array = np.asarray(value)
        return np.asarray(np.take(array, index, axis), array.dtype)  # one string would be of its own length

    def stack(self, parts: Sequence[Any], axis: int, like: Port) -> Any:
        return np.stack([np.asarray(part) for part in parts], axis) if parts else stack_of_none(axis, like)

    def rows(self, count: int) -> int:
        return count

    def truths(self, value: Any) -> Truths:
        return np.asarray(value, np.bool_).reshape(-1)

    def integers(self, value: Any) -> Rows:
        return np.asarray(value, np.int64).reshape(-1)

    def take(self, value: Any, axis: int, rows: Rows) -> Any:
        return np.take(np.asarray(value), rows, axis)

    def merge(self, parts: Sequence[Part], axis: int, count: int) -> Any:
        arrays = [(np.asarray(part.value), part.rows, part.to) for part in parts]
        made = np.empty(merged_shape([array.shape for array, _, _ in arrays], axis, count), arrays[0][0].dtype)
        merge_into(made, arrays, axis)
        return made

    def repeat(self, value: Any, count: int) -> Any:
        return np.stack([np.asarray(value)] * count)
