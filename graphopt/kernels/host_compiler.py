"""Compiles kernels as C++ for the emulator, and keeps what it compiled."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from graphopt.errors import BadInput, GraphoptError, MissingDependency
from graphopt.kernels.compile import INCLUDE, cache_folder
from graphopt.kernels.kernel import Kernel

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
_MOST_KEPT = 2000  # libraries in the cache folder, of some 100 KB


def find_compiler() -> str | None:
    """The C++ compiler that kernels are emulated with, or None where there is none."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def build(kernel: Kernel) -> Path:
    """The kernel's library, compiled unless the cache folder has it.

    Raises:
        BadInput: No kernel takes a type of its parameters.
        GraphoptError: The source does not compile.
        MissingDependency: There is no C++ compiler.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MissingDependency(
            "emulating kernels needs a C++ compiler", hint=f"install one of {', '.join(_COMPILERS)}"
        )
    text = _translation_unit(kernel)
    headers = "".join((INCLUDE / name).read_text(encoding="utf-8") for name in _HEADERS)
    common = (compiler, _version(compiler), *_FLAGS, *_CORE_FLAGS, headers)
    library = library_folder() / f"{_digest(*common, *_KERNEL_FLAGS, text, *_included(kernel.source))}.so"
    if library.exists():
        os.utime(library)  # the oldest go when there are too many
        return library
    core = library_folder() / f"{_digest(*common)}.o"
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


def library_folder() -> Path:
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
