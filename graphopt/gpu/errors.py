"""What goes wrong on a GPU, and what to say about it."""

from __future__ import annotations

import re

from graphopt.errors import BadInput, GraphoptError


class NoGpu(BadInput):
    """There is no GPU that could be used, or no driver for it (exit code 2)."""


class CudaError(GraphoptError):
    """A call of the driver failed.

    Attributes:
        name: The error as CUDA names it, such as ``CUDA_ERROR_OUT_OF_MEMORY``.
        code: Its number.
    """

    def __init__(self, name: str, code: int, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.name = name
        self.code = code
        super().__init__(what, where=where, hint=hint)


SUCCESS = 0
OUT_OF_MEMORY = 2
NO_DEVICE = 100
INVALID_PTX = 218
NO_BINARY = 209
NO_JIT_COMPILER = 221
UNSUPPORTED_PTX = 222
NOT_READY = 600

# What to do about an error, by its name.
HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is full: close what else uses it, or take smaller shapes",
    "CUDA_ERROR_NO_DEVICE": "the driver sees no GPU; is CUDA_VISIBLE_DEVICES set?",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's library and its kernel module differ: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this GPU takes no compatibility package: update the driver",
    "CUDA_ERROR_SYSTEM_NOT_READY": "the GPU's services are not up; nvidia-smi tells more",
    "CUDA_ERROR_UNKNOWN": "the driver is in a bad state: nvidia-smi tells more; a restart often helps",
    "CUDA_ERROR_STUB_LIBRARY": "the library found is a stub without a driver; it must not be on LD_LIBRARY_PATH",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU exclusively",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel read or wrote memory that is not its own; compute-sanitizer shows where",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel broke down; compute-sanitizer shows where",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "something ran that a CUDA graph cannot hold",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "something ran that a CUDA graph cannot hold",
}

# The CUDA release whose driver first takes PTX of an ISA, and the branch of Linux drivers that it came with.
_ISA_RELEASES = {
    (7, 0): ((11, 0), 450),
    (7, 1): ((11, 1), 455),
    (7, 2): ((11, 2), 460),
    (7, 3): ((11, 3), 465),
    (7, 4): ((11, 4), 470),
    (7, 5): ((11, 5), 495),
    (7, 6): ((11, 6), 510),
    (7, 7): ((11, 7), 515),
    (7, 8): ((11, 8), 520),
    (8, 0): ((12, 0), 525),
    (8, 1): ((12, 1), 530),
    (8, 2): ((12, 2), 535),
    (8, 3): ((12, 3), 545),
    (8, 4): ((12, 4), 550),
    (8, 5): ((12, 5), 555),
    (8, 6): ((12, 7), 565),
    (8, 7): ((12, 8), 570),
    (8, 8): ((12, 9), 575),
    (9, 0): ((13, 0), 580),
}


def needed_driver(isa: tuple[int, int]) -> str:
    """The driver that PTX of an ISA needs, in words: ``a driver for CUDA 12.8 or newer (570 on Linux)``."""
    release = _ISA_RELEASES.get(isa)
    if release is None:
        # From 9.0 on the ISA counts along with the release of CUDA 13.
        return f"a driver for CUDA 13.{isa[1]} or newer" if isa[0] == 9 else "a newer driver"
    (major, minor), branch = release
    return f"a driver for CUDA {major}.{minor} or newer ({branch} on Linux)"


def isa_of_driver(cuda: tuple[int, int]) -> tuple[int, int]:
    """The newest PTX ISA that a driver for a CUDA release takes; (0, 0) for one older than 11.0."""
    if cuda >= (13, 0):
        return (9, cuda[1]) if cuda[0] == 13 else (10, 0)
    known = [isa for isa, (release, _) in _ISA_RELEASES.items() if release <= cuda]
    return max(known, default=(0, 0))


_VERSION = re.compile(r"Unsupported \.version (\d+)\.(\d+); current version is '?(\d+)\.(\d+)'?")


def explain_refused_ptx(
    name: str, code: int, log: str, ptx: str, driver: tuple[int, int], device: str, capability: tuple[int, int]
) -> tuple[str, str | None]:
    """Why the driver would not have some PTX, and what to do.

    Args:
        name: The error's name.
        code: Its number.
        log: What the driver's compiler wrote.
        ptx: The text; its ``.version`` and ``.target`` are read.
        driver: The CUDA release of the driver.
        device: The GPU's name.
        capability: The GPU's compute capability.
    """
    said = _VERSION.search(log)
    declared = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", ptx, re.MULTILINE)
    target = re.search(r"^\s*\.target\s+sm_(\d+)([af]?)", ptx, re.MULTILINE)
    if said is not None or code == UNSUPPORTED_PTX:
        isa = (int(said[1]), int(said[2])) if said else (int(declared[1]), int(declared[2])) if declared else None
        cuda = f"{driver[0]}.{driver[1]}"
        takes = f"{said[3]}.{said[4]}" if said else ".".join(map(str, isa_of_driver(driver)))
        written = "this PTX is of a newer ISA" if isa is None else f"this PTX is of ISA {isa[0]}.{isa[1]}"
        what = f"the driver is too old: {written}, and the driver (CUDA {cuda}) takes up to {takes}"
        return what, f"install {'a newer driver' if isa is None else needed_driver(isa)}"
    if target is not None:
        wanted = divmod(int(target[1]), 10)
        own = target[2] == "a"
        if wanted > capability or (own and wanted != capability):
            written = f"sm_{target[1]}{target[2]}"
            have = f"{capability[0]}.{capability[1]}"
            return f"this PTX is for {written}, and {device} has compute capability {have}", "compile it for this GPU"
    if code == NO_JIT_COMPILER:
        return "the driver has no PTX compiler (libnvidia-ptxjitcompiler)", "install the whole driver"
    first = next((line.strip() for line in log.splitlines() if "error" in line or "fatal" in line), "")
    return f"the driver refuses the PTX: {first or 'no reason given'} ({name})", None
