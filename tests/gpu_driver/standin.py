"""The stand-in for NVIDIA's driver: compiled once, loaded through GRAPHOPT_LIBCUDA."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from graphopt.gpu import library
from graphopt.kernels.kernel import Kernel

SOURCE = Path(__file__).with_name("fake_libcuda.cpp")


@cache
def library_file() -> Path:
    """The compiled stand-in; kept by the content of its source."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    out = Path(tempfile.gettempdir()) / f"graphopt-fake-libcuda-{name}.so"
    if not out.exists():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / out.name
            command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl"]
            subprocess.run(command, check=True, capture_output=True)
            shutil.copy(made, out.with_suffix(".partial"))
            out.with_suffix(".partial").replace(out)
    return out


class StandIn:
    """One test's driver: what it plays, what it complained about, what is still open in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        # A copy: each test has a driver of its own, that no other has broken or left something open in.
        self.path = folder / "libcuda.so"
        shutil.copy(library_file(), self.path)
        self.log = folder / "complaints.txt"
        self.kernels = folder / "kernels"
        self.kernels.mkdir()
        monkeypatch.setenv("GRAPHOPT_LIBCUDA", str(self.path))
        monkeypatch.setenv("FAKE_CUDA_LOG", str(self.log))
        monkeypatch.setenv("FAKE_CUDA_KERNELS", str(self.kernels))

    def play(self, **settings: int) -> None:
        """What it says of itself: capability=80, version=12040, isa=804, devices=0, pools=0, init=803, memory=..."""
        for name, value in settings.items():
            self._monkeypatch.setenv(f"FAKE_CUDA_{name.upper()}", str(value))

    @property
    def complaints(self) -> list[str]:
        """Each breach of the interface's rules."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def live(self, what: str) -> int:
        """How many of something are open: memory, pinned, streams, events, graphs, modules, contexts."""
        function = ctypes.CDLL(str(self.path)).fake_live
        function.restype = ctypes.c_ulonglong
        function.argtypes = (ctypes.c_char_p,)
        return int(function(what.encode()))

    def add_kernel(self, kernel: Kernel, ptx: str) -> None:
        """Let a launch of this PTX run the same source in the emulator."""
        from graphopt.kernels.emulate import EmulatedModule, numpy_dtype

        kinds = {"input": 0, "scalar": 1, "output": 2}
        notes = [
            f"{parameter.name} {kinds[parameter.kind]} {numpy_dtype(parameter.dtype).itemsize}"
            for parameter in kernel.parameters
        ]
        self.note(ptx, Path(EmulatedModule(kernel)._library._name), notes)

    def note(self, ptx: str, library: Path, parameters: Sequence[str]) -> None:
        """Let a launch of this PTX run a library with the emulator's interface."""
        text = "\n".join([str(library), *parameters, ""])
        (self.kernels / f"{_fnv(ptx):016x}.txt").write_text(text)

    def compile_kernels(self) -> None:
        """Let every kernel that is compiled to PTX from now on be run by the emulator when it is launched."""
        from graphopt.kernels import compile as compiling
        from graphopt.kernels import launch

        def compile_ptx(kernel: Kernel, *arguments: Any, **options: Any) -> compiling.Ptx:
            made = compiling.compile_ptx(kernel, *arguments, **options)
            self.add_kernel(kernel, made.text)
            return made

        self._monkeypatch.setattr(launch, "compile_ptx", compile_ptx)


@contextmanager
def standing_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in in place of the driver; in the end everything must have been closed."""
    library_file()
    made = StandIn(folder, monkeypatch)
    library.open_library.cache_clear()
    try:
        yield made
    finally:
        library.open_library.cache_clear()


def _fnv(text: str) -> int:
    value = 14695981039346656037
    for byte in text.encode():
        value = (value ^ byte) * 1099511628211 % 2**64
    return value
