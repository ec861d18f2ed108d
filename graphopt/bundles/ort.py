"""Blocks on ONNX Runtime's CPU, with the runtime's own values between them: nothing is copied, whatever its type."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.bundles.arrays import merge_into, merged_shape, number_as, stack_of_none
from graphopt.bundles.backend import Action, Call, Part, Rows, RunBlock, Truths
from graphopt.bundles.plan import Port
from graphopt.errors import GraphoptError
from graphopt.runtime.ending import run_options
from graphopt.runtime.flavour import import_onnxruntime
from graphopt.runtime.session import from_ort_value, numpy_dtype, reason, to_ort_value

_NATIVE = "biuf"
"""The kinds of numpy's own numbers, which the runtime takes and gives as they are."""


class OrtBackend:
    """Runs blocks in sessions that are made when a block is run for the first time.

    Values are those of onnxruntime's binding, without the wrapper in Python around them, which takes ten times as long
    as the call.

    Args:
        session: How a block's session is made.

    Attributes:
        options: Of the runs of all blocks.
        runs: How often each block has run.
    """

    def __init__(self, session: Callable[[str], Any]) -> None:
        self._make = session
        self._calls: dict[str, Callable[..., Any]] = {}
        ort = import_onnxruntime()
        self._wrap = ort.OrtValue
        some = to_ort_value(np.zeros(1, np.float32))._ortvalue
        self._native = type(some).ortvalue_from_numpy
        self.options = run_options()  # without them the runtime makes some for every call, a fifth of what it costs
        self._cpu = ort.OrtDevice.make("cpu", 0)._get_c_device()
        self.runs: dict[str, int] = {}

    def value(self, array: Any) -> Any:
        """A value for an array, which has to live as long."""
        array = np.asarray(array)
        if not array.flags.c_contiguous:
            return self._own(array)  # a copy in one piece would be nobody's
        return self._native(array, self._cpu) if array.dtype.kind in _NATIVE else to_ort_value(array)._ortvalue

    def array(self, value: Any) -> Any:
        """What a value holds: an array, or a list of arrays."""
        return from_ort_value(self._wrap(value))

    def reader(self, kind: str) -> Callable[[Any], Any]:
        """As `array`, for values of one type, such as ``tensor(float)``."""
        dtype = numpy_dtype(kind)
        return methodcaller("numpy") if dtype is not None and dtype.kind in _NATIVE else self.array

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        places = [*range(len(inputs) + len(outputs))]
        reads = dict(zip(inputs, places, strict=False))
        makes = dict(zip(outputs, places[len(inputs) :], strict=True))
        action = self.action([Call(name, reads, makes, ())])
        empty = [None] * len(outputs)

        def run(values: Sequence[Any]) -> Sequence[Any]:
            held = [*values, *empty]
            action(held)
            return held[len(inputs) :]

        return run

    def action(self, calls: Sequence[Call]) -> Action:
        """Runs that follow each other as one function.

        It is written as Python once: what a loop over steps, inputs and outputs costs would be half of a call.
        """
        known: dict[str, Any] = {"runs": self.runs, "told": _told, "options": self.options}
        lines = ["def action(places):"]
        for index, call in enumerate(calls):
            self.runs.setdefault(call.block, 0)
            known[f"outputs_{index}"] = list(call.makes)
            known[f"call_{index}"] = self._first_call(call.block, known, f"call_{index}")
            lines += _source(call, index)
        exec("\n".join(lines), known)
        action: Action = known["action"]
        return action

    def _first_call(self, block: str, known: dict[str, Any], name: str) -> Callable[..., Any]:
        """Loads a block and puts its own call in this one's place."""

        def call(*arguments: Any) -> Any:
            if block not in self._calls:
                self._calls[block] = self._make(block)._sess.run_with_ort_values
            known[name] = self._calls[block]
            return known[name](*arguments)

        return call

    def truth(self, value: Any) -> bool:
        return bool(value.numpy().item())

    def number(self, value: Any) -> int:
        return int(value.numpy().item())

    def scalar(self, value: int | bool, port: Port) -> Any:
        return self._own(number_as(value, port))

    def length(self, value: Any, axis: int) -> int:
        return int(value.shape()[axis])

    def part(self, value: Any, axis: int, index: int) -> Any:
        return self._own(np.take(self.array(value), index, axis))

    def stack(self, parts: Sequence[Any], axis: int, like: Port) -> Any:
        arrays = [self.array(part) for part in parts]
        return self._own(np.stack(arrays, axis) if arrays else stack_of_none(axis, like))

    def rows(self, count: int) -> int:
        return count

    def truths(self, value: Any) -> Truths:
        truths: Truths = self.array(value).reshape(-1)
        return truths

    def integers(self, value: Any) -> Rows:
        integers: Rows = self.array(value).reshape(-1)
        return integers

    def take(self, value: Any, axis: int, rows: Rows) -> Any:
        array = self.array(value)
        made, place = self._new([*array.shape[:axis], len(rows), *array.shape[axis + 1 :]], array.dtype)
        np.take(array, rows, axis, out=place, mode="clip")  # without "clip" it is taken twice
        return made

    def merge(self, parts: Sequence[Part], axis: int, count: int) -> Any:
        arrays = [(self.array(part.value), part.rows, part.to) for part in parts]
        shape = merged_shape([array.shape for array, _, _ in arrays], axis, count)
        made, place = self._new(shape, arrays[0][0].dtype)
        merge_into(place, arrays, axis)
        return made

    def repeat(self, value: Any, count: int) -> Any:
        return self._own(np.stack([self.array(value)] * count))

    def _new(self, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[Any, np.ndarray[Any, Any]]:
        """A value without content, and the array in it."""
        kind = int(ir.DataType.from_numpy(dtype))
        made = self._wrap.ortvalue_from_shape_and_type(list(shape), kind)._ortvalue
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return made, np.empty(shape, dtype)
        # Not as an array of the runtime's: it has none for types that numpy cannot name.
        memory = (ctypes.c_char * size).from_address(made.data_ptr())
        return made, np.frombuffer(memoryview(memory), dtype).reshape(shape)

    def _own(self, array: Any) -> Any:
        """A value with a copy of an array's content, in memory of its own."""
        held = np.ascontiguousarray(array)
        kind = int(ir.DataType.from_numpy(held.dtype))
        value = self._wrap.ortvalue_from_shape_and_type(array.shape, kind)._ortvalue
        ctypes.memmove(value.data_ptr(), held.ctypes.data, held.nbytes)
        return value


def _source(call: Call, index: int) -> list[str]:
    """A run of a block as lines of Python.

    What the runtime returns is asked by index: coming to its end as an iterator costs ten times the call.
    """
    feeds = ", ".join(f"{name!r}: places[{at}]" for name, at in call.reads.items())
    return [
        "    try:",
        f"        made = call_{index}({{{feeds}}}, outputs_{index}, options)",
        "    except Exception as error:",  # onnxruntime's exceptions share no base class
        f"        raise told(error, {call.block!r}) from error",
        f"    runs[{call.block!r}] += 1",
        *(f"    places[{at}] = made[{number}]" for number, at in enumerate(call.makes.values())),
        *(f"    places[{at}] = None" for at in call.over),
    ]


def _told(error: Exception, block: str) -> GraphoptError:
    """What went wrong in a block, in one line."""
    if isinstance(error, GraphoptError):
        return error
    return GraphoptError(f"onnxruntime failed: {reason(error)}", where=block)
