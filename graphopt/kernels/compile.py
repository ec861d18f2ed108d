"""Compiles kernels to PTX, with NVRTC from a PyPI wheel alone (or nvcc): no GPU, no driver, no CUDA headers.

PTX carries the version of its instruction set (ISA), and a driver refuses one newer than itself. So the compiler is
pinned: NVRTC 12.8 writes ISA 8.7. PTX for ``compute_80`` runs on every later architecture too.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from graphopt.errors import BadInput, GraphoptError, MissingDependency, install_hint
from graphopt.kernels.kernel import ARCHITECTURES, Kernel

CompilerName = Literal["nvrtc", "nvrtc-13", "nvcc"]
INCLUDE = Path(__file__).parent / "include"
PINNED_ISA = (8, 7)
"""The newest PTX instruction set that deployed kernels may need: that of NVRTC 12.8."""

_HOST_ONLY = "emulator.h"  # the kit on the CPU: the device never sees it
PACKAGES = {"nvrtc": "nvidia-cuda-nvrtc-cu12", "nvrtc-13": "nvidia-cuda-nvrtc"}
_LIBRARY = re.compile(r"libnvrtc\.so\.(\d+)|nvrtc64_(\d+)\d_\d\.dll")
_INCLUDES = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
# NVRTC and nvcc write alike: half_gemm.cu(12): error: identifier "x" is undefined
_ERROR = re.compile(
    r"^(?P<file>.+?)\((?P<line>\d+)\): (?:catastrophic )?error(?: #[\w-]+)?: (?P<what>.+)$", re.MULTILINE
)


@dataclass(frozen=True)
class Ptx:
    """A compiled kernel.

    Attributes:
        text: The PTX.
        entry: The name of its entry point.
        isa: The PTX instruction set it needs, e.g. (8, 7); a driver that knows only older ones refuses it.
        architecture: What it was compiled for, e.g. ``compute_80``.
        compiler: The compiler with its version, e.g. ``NVRTC 12.8``.
        seconds: How long compiling took, where it was first done.
    """

    text: str
    entry: str
    isa: tuple[int, int]
    architecture: str
    compiler: str
    seconds: float


def compile_ptx(
    kernel: Kernel, architecture: str = "compute_80", *, compiler: CompilerName = "nvrtc", fresh: bool = False
) -> Ptx:
    """Compile a kernel to PTX. Results are kept, in this process and in the user's cache folder, by content.

    Args:
        kernel: What to compile: its source, with its defines.
        architecture: The oldest GPU it has to run on, one of `ARCHITECTURES`.
        compiler: ``nvrtc`` is NVRTC 12, the pinned one; ``nvrtc-13`` and ``nvcc`` are used only when asked for.
        fresh: Compile again, whatever is kept.

    Raises:
        BadInput: The architecture is not one of `ARCHITECTURES`.
        MissingDependency: The compiler is not installed.
        GraphoptError: The source cannot be read, or does not compile; the message has the first error, its file and
            its line.
    """
    if architecture not in ARCHITECTURES:
        raise BadInput(f"no architecture {architecture!r}", hint=f"there are {', '.join(ARCHITECTURES)}")
    sources = read_sources(kernel)
    used: _Nvrtc | _Nvcc = _nvcc() if compiler == "nvcc" else _nvrtc(compiler)
    options = ["--std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines)]
    key = _key(sources, architecture, options, used.name)
    if not fresh and (kept := _recall(key)) is not None:
        return kept
    start = time.perf_counter()
    code, said = used.compile(sources, architecture, options)
    seconds = time.perf_counter() - start
    if code is None:
        raise _error(kernel, used.name, said)
    version = re.search(r"^\.version (\d+)\.(\d+)", code, re.MULTILINE)
    if version is None:
        raise GraphoptError(f"{used.name} wrote PTX without a .version", where=kernel.source.name)
    isa = int(version[1]), int(version[2])
    ptx = Ptx(code, kernel.name, isa, architecture, used.name, seconds)
    _keep(key, ptx)
    return ptx


def read_sources(kernel: Kernel) -> dict[str, str]:
    """The kernel's source by its file name, then the headers that a device build of it includes, directly or not.

    Raises:
        GraphoptError: A file cannot be read, or a header is not the kit's.
    """
    texts = {kernel.source.name: _read(kernel.source)}
    todo = [kernel.source.name]
    while todo:
        name = todo.pop()
        for header in _INCLUDES.findall(texts[name]):
            if header in texts or header == _HOST_ONLY:
                continue
            if not (INCLUDE / header).is_file():
                raise GraphoptError(f"includes {header!r}, which the kernel kit does not have", where=name)
            texts[header] = _read(INCLUDE / header)
            todo.append(header)
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphoptError(f"cannot be read: {error}", where=str(path)) from error


def _error(kernel: Kernel, compiler: str, said: str) -> GraphoptError:
    found = _ERROR.search(said)
    if found is None:  # about the options: it names no line
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        what = next((line for line in lines if "error" in line), lines[0] if lines else "it does not say why")
        return GraphoptError(f"{compiler} does not compile it: {what}", where=kernel.source.name)
    where = f"{Path(found['file']).name}:{found['line']}"
    return GraphoptError(f"{compiler} does not compile {kernel.name}: {found['what'].strip()}", where=where)


# -- the compilers -----------------------------------------------------------------------------------------------------


class _Nvrtc:
    """NVRTC's C API. Nothing of it needs a driver."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise GraphoptError(f"NVRTC cannot be loaded: {error}", where=str(path)) from error
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.name = f"NVRTC {major.value}.{minor.value}"

    def compile(self, sources: dict[str, str], architecture: str, options: Sequence[str]) -> tuple[str | None, str]:
        """The PTX (None where it does not compile) and the log."""
        (main, text), *headers = sources.items()
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            text.encode(),
            main.encode(),
            len(headers),
            _strings([content for _, content in headers]),
            _strings([name for name, _ in headers]),
        )
        try:
            words = [f"--gpu-architecture={architecture}", *options]
            failed = self._library.nvrtcCompileProgram(program, len(words), _strings(words))
            log = self._text(program, "ProgramLog")
            return (None if failed else self._text(program, "PTX")), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            describe = self._library.nvrtcGetErrorString
            describe.restype = ctypes.c_char_p
            raise GraphoptError(f"{name} failed: {describe(code).decode()}")


def _strings(words: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(words))(*(word.encode() for word in words))


class _Nvcc:
    """The compiler of the CUDA toolkit; it needs a host compiler beside it."""

    def __init__(self, program: str) -> None:
        self._program = program
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"release (\d+\.\d+)", said)
        if version is None:
            raise GraphoptError("does not say its version", where=program)
        self.name = f"nvcc {version[1]}"

    def compile(self, sources: dict[str, str], architecture: str, options: Sequence[str]) -> tuple[str | None, str]:
        """The PTX (None where it does not compile) and the log."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, text in sources.items():
                (folder / file).write_text(text, encoding="utf-8")
            out = folder / "kernel.ptx"
            words = [self._program, "--ptx", f"-arch={architecture}", *options, "-o", str(out), next(iter(sources))]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
            return (out.read_text() if done.returncode == 0 else None), done.stdout + done.stderr


@cache
def _nvrtc(name: str) -> _Nvrtc:
    package = PACKAGES[name]
    path = find_nvrtc(package)
    if path is None:
        hint = install_hint("plugins") if name == "nvrtc" else f"pip install {package}"
        raise MissingDependency(f"NVIDIA's compiler NVRTC is not installed ({package})", hint=hint)
    return _Nvrtc(path)


@cache
def _nvcc() -> _Nvcc:
    program = shutil.which("nvcc")
    if program is None:
        raise MissingDependency("nvcc is not on the PATH", hint=f"NVRTC does without: {install_hint('plugins')}")
    return _Nvcc(program)


def find_nvrtc(package: str) -> Path | None:
    """The library of an NVRTC wheel, on Linux or Windows; None where that is not installed.

    Args:
        package: ``nvidia-cuda-nvrtc-cu12`` or ``nvidia-cuda-nvrtc`` (13 and later).
    """
    return next((path for path in _candidates(package) if _is_nvrtc(path.name, package) and path.is_file()), None)


def _candidates(package: str) -> Iterator[Path]:
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (Path(str(file.locate())) for file in files)
    # What installed it may have kept no list of files: then by where NVIDIA's wheels put things.
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(root).glob("*/lib/*nvrtc*"))
        yield from sorted(Path(root).glob("*/bin/**/*nvrtc*"))


def _is_nvrtc(file: str, package: str) -> bool:
    found = _LIBRARY.fullmatch(file)
    return found is not None and (int(found[1] or found[2]) == 12) == package.endswith("-cu12")


# -- what is kept ------------------------------------------------------------------------------------------------------

_kept: dict[str, Ptx] = {}


def _key(sources: dict[str, str], architecture: str, options: Sequence[str], compiler: str) -> str:
    content = json.dumps([sources, architecture, list(options), compiler])
    return hashlib.sha256(content.encode()).hexdigest()


def _recall(key: str) -> Ptx | None:
    if key not in _kept:
        try:
            stored = json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
            _kept[key] = Ptx(**{**stored, "isa": tuple(stored["isa"])})
        except (OSError, ValueError, TypeError, KeyError):  # none, or one that another version or a crash left
            return None
    return _kept[key]


def _keep(key: str, ptx: Ptx) -> None:
    _kept[key] = ptx
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(asdict(ptx), file)
        Path(file.name).replace(folder / f"{key}.json")
    except OSError:  # a home that cannot be written to: it is compiled again next time
        return


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's own cache folder, or what ``GRAPHOPT_CACHE`` says."""
    if chosen := os.environ.get("GRAPHOPT_CACHE"):
        return Path(chosen) / "kernels"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "graphopt" / "kernels"
