"""Runs kernels on the CPU: the same source, compiled as C++, with every access and every schedule checked.

A C++ compiler is needed. Each thread of a block is a fiber, a few blocks run at a time, and which runs next is drawn
from a seed. What `include/emulator.h` and the headers behind it check is an `EmulationError` here: accesses outside
of a tensor or a shared array, misaligned ones, races within a block and between blocks, values that nothing wrote,
barriers that not all threads reach, blocks that wait for each other for ever, integer overflow, outputs left unwritten.

What it cannot tell: how fast a kernel is, and whether our reading of the hardware's fragment layouts is right.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput, GraphoptError
from graphopt.kernels.host_compiler import build, find_compiler
from graphopt.kernels.kernel import Kernel, Launch

__all__ = ["STEPS", "EmulatedModule", "EmulationError", "Work", "emulate", "find_compiler", "numpy_dtype"]

Array = npt.NDArray[Any]
Output = tuple[Sequence[int], str]
"""Shape and dtype of an output, the dtype by its name in `Parameter`."""

STEPS = 50_000_000
"""Switches between threads after which a launch counts as endless."""

_KINDS = {"input": 0, "scalar": 1, "output": 2}
_LOCK = threading.Lock()  # a library runs one launch at a time


class EmulationError(GraphoptError):
    """A kernel did something that is wrong on a GPU, or leads there to results that depend on luck.

    Attributes:
        line: The line of the source; None where the fault is of no line.
        block: x, y, z of the block; None where the fault is of no thread.
        thread: The thread of the block; None where the fault is of no thread.
    """

    def __init__(
        self, what: str, source: str, *, line: int | None, block: tuple[int, int, int] | None, thread: int | None
    ) -> None:
        self.line = line
        self.block = block
        self.thread = thread
        where = source if line is None else f"{source}:{line}"
        super().__init__(what, where=where if block is None else f"{where}, block {block}, thread {thread}")


@dataclass(frozen=True)
class Work:
    """One launch of several that run at the same time.

    Attributes:
        inputs: One array an input parameter.
        outputs: Shape and dtype of each output parameter.
        instance: Launches with the same instance have their tensors at the same addresses, as far as the kernel can
            tell; others at others.
    """

    inputs: Sequence[Array]
    outputs: Sequence[Output]
    instance: int = 0


def emulate(
    kernel: Kernel,
    inputs: Sequence[Array],
    outputs: Sequence[Output],
    *,
    seed: int = 0,
    resident: int | None = None,
) -> list[Array]:
    """Launch a kernel once, in a module loaded for it alone, on the CPU.

    Args:
        kernel: What to launch. Its source may be any file, so that a changed copy can be tried.
        inputs: One array an input parameter, of the parameter's dtype.
        outputs: Shape and dtype of each output parameter.
        seed: Draws the schedule: which block, warp and thread runs when. 0 starts blocks in their order.
        resident: How many blocks run at a time; drawn from the seed if None.

    Returns:
        One array an output parameter.

    Raises:
        EmulationError: The kernel did something wrong.
        BadInput: The arrays do not fit the kernel's parameters.
        GraphoptError: The source does not compile.
        MissingDependency: There is no C++ compiler.
    """
    return EmulatedModule(kernel).launch(inputs, outputs, seed=seed, resident=resident)


class EmulatedModule:
    """A kernel as loaded into a GPU's context: its DEVICE_STATE starts as zeros and is kept between launches."""

    def __init__(self, kernel: Kernel) -> None:
        """Compile the kernel, or find it compiled in the user's cache folder.

        Raises:
            GraphoptError: The source does not compile.
            MissingDependency: There is no C++ compiler.
        """
        self.kernel = kernel
        self._library = _load(build(kernel))
        self.state: dict[str, Array] = {}
        """The bytes of each DEVICE_STATE by its name (uint8); tests may read them and set them."""
        self.reset()

    def reset(self) -> None:
        """Zero the module's memory, as loading it anew does."""
        self.state = {name: np.zeros(size, np.uint8) for name, _, size in _states(self._library)}

    def launch(
        self,
        inputs: Sequence[Array],
        outputs: Sequence[Output],
        *,
        seed: int = 0,
        resident: int | None = None,
        instance: int = 0,
    ) -> list[Array]:
        """Launch the kernel once; see `emulate` and `Work`."""
        return self.launch_together([Work(inputs, outputs, instance)], seed=seed, resident=resident)[0]

    def launch_together(
        self, works: Sequence[Work], *, seed: int = 0, resident: int | None = None, steps: int = STEPS
    ) -> list[list[Array]]:
        """Launch the kernel several times at once, as from several streams; their blocks are interleaved.

        Args:
            works: The launches. Those that run at the same time should differ in `instance`.
            seed: Draws the schedule.
            resident: How many blocks, of all launches together, run at a time; drawn from the seed if None.
            steps: Switches between threads after which a launch counts as endless.

        Returns:
            For each launch one array an output parameter.

        Raises:
            EmulationError: The kernel did something wrong. The module's memory is then as the kernel left it.
            BadInput: The arrays do not fit the kernel's parameters.
        """
        prepared = [_Prepared(self.kernel, work) for work in works]
        descriptions = (_Description * len(prepared))(*(one.description for one in prepared))
        failure = _Failure()
        with _LOCK:
            pieces = _states(self._library)
            for name, address, size in pieces:
                ctypes.memmove(address, np.ascontiguousarray(self.state[name]).ctypes.data, size)
            failed = self._library.emulated_launches(
                len(prepared), descriptions, seed & 0xFFFFFFFF, resident or 0, steps, ctypes.byref(failure)
            )
            for name, address, size in pieces:
                self.state[name] = np.frombuffer(ctypes.string_at(address, size), np.uint8).copy()
        if failed:
            raise _error(self.kernel, failure)
        return [one.outputs for one in prepared]


class _Parameter(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("granule", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
    )


class _Description(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("parameters", ctypes.POINTER(_Parameter)),
    )


class _Failure(ctypes.Structure):
    _fields_ = (
        ("what", ctypes.c_char * 512),
        ("launch", ctypes.c_int),
        ("block", ctypes.c_int * 3),
        ("thread", ctypes.c_int),
        ("line", ctypes.c_uint32),
        ("file", ctypes.c_char * 128),
    )


class _Prepared:
    """A launch as the library wants it; keeps alive what the description points at."""

    def __init__(self, kernel: Kernel, work: Work) -> None:
        inputs = [parameter for parameter in kernel.parameters if parameter.kind == "input"]
        scalars = [parameter for parameter in kernel.parameters if parameter.kind == "scalar"]
        outputs = [parameter for parameter in kernel.parameters if parameter.kind == "output"]
        _check_count(kernel, "inputs", len(work.inputs), len(inputs))
        _check_count(kernel, "outputs", len(work.outputs), len(outputs))
        for array, parameter in zip(work.inputs, inputs, strict=True):
            _check_dtype(kernel, parameter.name, array.dtype, parameter.dtype)
        for (_, dtype), parameter in zip(work.outputs, outputs, strict=True):
            _check_dtype(kernel, parameter.name, numpy_dtype(dtype), parameter.dtype)
        launch: Launch = kernel.launch([array.shape for array in work.inputs])
        _check_count(kernel, "scalars of its launch", len(launch.scalars), len(scalars))
        self.outputs: list[Array] = [np.empty(tuple(shape), numpy_dtype(dtype)) for shape, dtype in work.outputs]
        given = {
            "input": iter([np.ascontiguousarray(array) for array in work.inputs]),
            "scalar": iter([np.array(int(value), np.int32) for value in launch.scalars]),
            "output": iter(self.outputs),
        }
        self._arrays = [next(given[parameter.kind]) for parameter in kernel.parameters]
        self._parameters = (_Parameter * len(kernel.parameters))()
        for index, (parameter, array) in enumerate(zip(kernel.parameters, self._arrays, strict=True)):
            self._parameters[index] = _Parameter(
                array.ctypes.data,
                0 if parameter.kind == "scalar" else array.nbytes,
                # Made up, so that runs do not differ; aligned as CUDA aligns memory.
                (work.instance + 1 << 36) + (index << 32),
                parameter.name.encode(),
                array.itemsize,
                _KINDS[parameter.kind],
            )
        self.description = _Description(
            (ctypes.c_uint32 * 3)(*(int(size) for size in launch.grid)),
            kernel.threads,
            kernel.shared,
            len(kernel.parameters),
            self._parameters,
        )


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a parameter's dtype name; ml_dtypes' for ``bfloat16``."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _check_count(kernel: Kernel, what: str, given: int, wanted: int) -> None:
    if given != wanted:
        raise BadInput(f"{given} {what} for the {wanted} that it has", where=f"kernel {kernel.name}")


def _check_dtype(kernel: Kernel, name: str, given: np.dtype[Any], wanted: str) -> None:
    if given != numpy_dtype(wanted):
        raise BadInput(f"{name} is {given}, but has to be {wanted}", where=f"kernel {kernel.name}")


def _error(kernel: Kernel, failure: _Failure) -> EmulationError:
    of_thread = failure.launch >= 0
    return EmulationError(
        failure.what.decode(errors="replace"),
        Path(failure.file.decode(errors="replace")).name or kernel.source.name,
        line=failure.line or None,
        block=(failure.block[0], failure.block[1], failure.block[2]) if of_thread else None,
        thread=failure.thread if of_thread else None,
    )


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.emulated_launches.argtypes = (
        ctypes.c_uint32,
        ctypes.POINTER(_Description),
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_uint64,
        ctypes.POINTER(_Failure),
    )
    library.emulated_launches.restype = ctypes.c_int
    library.emulated_states.restype = ctypes.c_uint32
    library.emulated_state.restype = ctypes.c_void_p
    library.emulated_state.argtypes = (
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_uint64),
    )
    return library


def _states(library: ctypes.CDLL) -> list[tuple[str, int, int]]:
    """Name, address and bytes of each DEVICE_STATE."""
    found = []
    for index in range(library.emulated_states()):
        name, size = ctypes.c_char_p(), ctypes.c_uint64()
        address = library.emulated_state(index, ctypes.byref(name), ctypes.byref(size))
        found.append(((name.value or b"").decode(), int(address), int(size.value)))
    return found
