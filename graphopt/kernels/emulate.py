"""Runs kernels on the CPU: the same source, compiled as C++, with every access and every schedule checked.

A C++ compiler is needed. Each thread of a block is a fiber, a few blocks run at a time, and which runs next is drawn
from a seed. What `include/emulator.h` and the headers behind it check is an `EmulationError` here: accesses outside
of a tensor or a shared array, misaligned ones, races within a block and between blocks, values that nothing wrote,
barriers that not all threads reach, blocks that wait for each other for ever, integer overflow, outputs left unwritten.

What it cannot tell: how fast a kernel is, and whether our reading of the hardware's fragment layouts is right.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput, GraphoptError, MissingDependency
from graphopt.kernels.compile import INCLUDE, cache_folder
from graphopt.kernels.kernel import Kernel, Launch

Array = npt.NDArray[Any]
Output = tuple[Sequence[int], str]
"""Shape and dtype of an output, the dtype by its name in `Parameter`."""

STEPS = 50_000_000
"""Switches between threads after which a launch counts as endless."""

_TYPES = {"float16": "half", "bfloat16": "bfloat16", "float32": "float", "int8": "int8", "uint8": "u8", "int32": "int"}
_COMPILERS = ("g++", "c++")
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DGRAPHOPT_EMULATED")
_CORE_FLAGS = ("-O2",)
# The compiler's own checks call what emulator_core.h defines, so no library of theirs is needed.
_KERNEL_FLAGS = (
    "-O1",  # as fast as -O2, since most of the time goes into accesses, and compiled in two thirds of the time
    "-fsanitize=bounds,signed-integer-overflow,integer-divide-by-zero,shift,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fsanitize-coverage=trace-pc",  # endless loops: a call in each basic block that is not empty
    "-fno-finite-loops",  # they are not taken to end
    "-Werror=uninitialized",
    "-Werror=frame-larger-than=65536",  # a thread's stack has room for that
)
_HEADERS = (
    "kit.h",
    "emulator.h",
    "emulator_world.h",
    "emulator_memory.h",
    "emulator_warps.h",
    "emulator_core.h",
)
_INCLUDES = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_KINDS = {"input": 0, "scalar": 1, "output": 2}
_MOST_KEPT = 2000  # libraries in the cache folder, of some 100 KB
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
        self._library = _load(_build(kernel))
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


def find_compiler() -> str | None:
    """The C++ compiler that kernels are emulated with, or None where there is none."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


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


def _build(kernel: Kernel) -> Path:
    """The kernel's library, compiled unless the cache folder has it."""
    compiler = find_compiler()
    if compiler is None:
        raise MissingDependency(
            "emulating kernels needs a C++ compiler", hint=f"install one of {', '.join(_COMPILERS)}"
        )
    text = _translation_unit(kernel)
    headers = "".join((INCLUDE / name).read_text(encoding="utf-8") for name in _HEADERS)
    common = (compiler, _version(compiler), *_FLAGS, *_CORE_FLAGS, headers)
    library = _cache_folder() / f"{_digest(*common, *_KERNEL_FLAGS, text, *_included(kernel.source))}.so"
    if library.exists():
        os.utime(library)  # the oldest go when there are too many
        return library
    core = _cache_folder() / f"{_digest(*common)}.o"
    if not core.exists():
        _compile(
            compiler, (*_CORE_FLAGS, "-I", str(INCLUDE)), '#include "emulator_core.h"\n', core, where="the emulator"
        )
    flags = (*_KERNEL_FLAGS, "-I", str(kernel.source.parent), "-I", str(INCLUDE))
    _compile(compiler, flags, text, library, where=kernel.source.name, core=core)
    _prune(library.parent)
    return library


def _included(source: Path) -> list[str]:
    """The texts of the headers that a source includes, beside the kit's own: what it is compiled from."""
    found: dict[Path, str] = {}
    todo = [source]
    while todo:
        text = todo.pop().read_text(encoding="utf-8")
        for name in _INCLUDES.findall(text):
            near, kit = source.parent / name, INCLUDE / name
            header = near if near.is_file() else kit
            if header.is_file() and name not in _HEADERS and header not in found:
                found[header] = header.read_text(encoding="utf-8")
                todo.append(header)
    return list(found.values())


def _compile(
    compiler: str, flags: Sequence[str], text: str, target: Path, *, where: str, core: Path | None = None
) -> None:
    """Compile C++ text; the target appears whole or not at all, whoever else builds it at the same time.

    With a core it is linked to a library, else it stays an object file.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built, library = Path(folder) / "built.o", Path(folder) / "built.so"
        commands = [[compiler, *_FLAGS, *flags, "-x", "c++", "-c", "-", "-o", str(built)]]
        if core is not None:  # linked without the flags of the checks, which would ask for a library of theirs
            commands.append([compiler, "-shared", "-o", str(library), str(built), str(core)])
        for command in commands:
            done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            if done.returncode:
                raise GraphoptError(f"does not compile for the emulator: {_first_error(done.stderr)}", where=where)
        (built if core is None else library).replace(target)


def _first_error(log: str) -> str:
    found = re.search(r"^(.*?:\d+):\d+: (?:fatal )?error: (.*)$", log, re.MULTILINE)
    return f"{found[1]}: {found[2]}" if found else log.strip()[:300]


def _translation_unit(kernel: Kernel) -> str:
    """The kernel's source with the function that calls it; the kit comes before its macros, which may be named T."""
    calls = []
    for index, parameter in enumerate(kernel.parameters):
        if parameter.kind == "scalar":
            calls.append(f"arguments[{index}].scalar")
            continue
        if parameter.dtype not in _TYPES:
            raise BadInput(f"{parameter.name}: no kernel takes {parameter.dtype}", where=f"kernel {kernel.name}")
        const = "const " if parameter.kind == "input" else ""
        calls.append(f"emulated::global<{const}{_TYPES[parameter.dtype]}>(arguments, {index})")
    return "\n".join(
        [
            '#include "kit.h"',
            *(f"#define {name} {value}" for name, value in kernel.defines),
            f'#line 1 "{kernel.source.name}"',
            kernel.source.read_text(encoding="utf-8"),
            *(f"#undef {name}" for name, _ in kernel.defines),
            f'#line 1 "the parameters of {kernel.name}"',
            "void emulated::run_thread(const emulated::Argument* arguments) {",
            f"    {kernel.name}({', '.join(calls)});",
            "}",
            "",
        ]
    )


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cache_folder() -> Path:
    """Where emulated kernels are kept: in the user's cache folder, or for this process alone if that is read-only."""
    folder = cache_folder() / "emulated"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(_private_folder().name)
    return folder if os.access(folder, os.W_OK) else Path(_private_folder().name)


@cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="graphopt-emulated-")


def _prune(folder: Path) -> None:
    """Remove the libraries that were used least recently, where there are too many."""
    kept = list(folder.glob("*.so"))
    if len(kept) <= _MOST_KEPT:
        return

    def used(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:  # another process removed it
            return 0.0

    for path in sorted(kept, key=used)[: len(kept) - _MOST_KEPT // 2]:
        path.unlink(missing_ok=True)
