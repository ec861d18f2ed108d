"""Blocks on ONNX Runtime's CPU, with the runtime's own values between them: nothing is copied, whatever its type."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.bundles.host import RunBlock
from graphopt.bundles.plan import Port
from graphopt.errors import GraphoptError
from graphopt.runtime.flavour import import_onnxruntime
from graphopt.runtime.session import from_ort_value, numpy_dtype, reason, to_ort_value

_KNOWN_NUMBERS = 1024


class OrtBackend:
    """Runs blocks in sessions that are made when a block is run for the first time.

    Values are those of onnxruntime's binding, without the wrapper in Python around them, which takes ten times as long
    as the call.

    Args:
        session: How a block's session is made.
    """

    def __init__(self, session: Callable[[str], Any]) -> None:
        self._make = session
        self._wrap = import_onnxruntime().OrtValue
        self._numbers: dict[tuple[int, int], Any] = {}
        self.runs: dict[str, int] = {}

    def value(self, array: Any) -> Any:
        """A value for an array, which has to live as long."""
        return to_ort_value(array)._ortvalue

    def array(self, value: Any) -> Any:
        """What a value holds: an array, or a list of arrays."""
        return from_ort_value(self._wrap(value))

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        names, wanted = tuple(inputs), list(outputs)
        self.runs[name] = 0
        call: Callable[[dict[str, Any], list[str], None], Sequence[Any]] | None = None

        def run(values: Sequence[Any]) -> Sequence[Any]:
            nonlocal call
            if call is None:
                call = self._make(name)._sess.run_with_ort_values
            self.runs[name] += 1
            try:
                return call(dict(zip(names, values, strict=True)), wanted, None)
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise GraphoptError(f"onnxruntime failed: {reason(error)}", where=name) from error

        return run

    def truth(self, value: Any) -> bool:
        return bool(value.numpy().flat[0])

    def number(self, value: Any) -> int:
        return int(value.numpy().flat[0])

    def scalar(self, value: int | bool, port: Port) -> Any:
        truth = port.type == "tensor(bool)"
        key = (len(port.shape or ()), -1 if truth else value)
        if key not in self._numbers:
            array: np.ndarray[Any, Any] = np.full((1,) * key[0], value, np.bool_ if truth else np.int64)
            if value >= _KNOWN_NUMBERS:
                return self._own(array)
            self._numbers[key] = self._own(array)
        return self._numbers[key]

    def length(self, value: Any, axis: int) -> int:
        return int(value.shape()[axis])

    def part(self, value: Any, axis: int, index: int) -> Any:
        return self._own(np.take(self.array(value), index, axis))

    def stack(self, parts: Sequence[Any], axis: int, like: Port) -> Any:
        if parts:
            return self._own(np.stack([self.array(part) for part in parts], axis))
        shape = [size if isinstance(size, int) else 0 for size in like.shape or ()]
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 0)
        return self._own(np.empty(shape, numpy_dtype(like.type)))

    def _own(self, array: Any) -> Any:
        """A value with a copy of an array's content, in memory of its own."""
        held = np.ascontiguousarray(array)
        kind = int(ir.DataType.from_numpy(held.dtype))
        value = self._wrap.ortvalue_from_shape_and_type(array.shape, kind)._ortvalue
        ctypes.memmove(value.data_ptr(), held.ctypes.data, held.nbytes)
        return value
