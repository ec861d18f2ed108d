"""What a build may be told beyond the model and the shapes, and which library knows what."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.engines.backends import Backend
from graphopt.errors import BadInput

HARDWARE_COMPATIBILITY = ("none", "ampere-plus", "same-compute-capability")
PLUGINS = ("measured", "always", "never")
OPTIMIZATION_LEVELS = range(6)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMG])(?:iB|B)?|B)?", re.IGNORECASE)
_CAPABILITY = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.IGNORECASE)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built. The defaults leave everything to the library.

    Attributes:
        timing_cache: A file of timings, read before and written after the build (TensorRT only).
        workspace: The most scratch memory that a layer may take, in bytes; None: all there is.
        optimization_level: 0 (built fast) to 5 (searched long); None: the library's own, 3.
        sparsity: Weights with 2:4 zeros may use sparse kernels.
        strip_weights: The engine holds no weights; they are put in from the same model when it is loaded.
        refit: The weights can be replaced by others.
        weight_streaming: Weights may stay on the host and be streamed when the engine runs.
        hardware_compatibility: Which other GPUs the engine runs on: one of `HARDWARE_COMPATIBILITY` (TensorRT only).
        compute_capabilities: The GPUs it is built for, such as ``sm89``, or ``current`` (TensorRT-RTX only); none:
            the library's own choice.
        version_compatible: Newer versions of the library run the engine, too (TensorRT only).
    """

    timing_cache: Path | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    sparsity: bool = False
    strip_weights: bool = False
    refit: bool = False
    weight_streaming: bool = False
    hardware_compatibility: str = "none"
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False

    def to_json(self) -> dict[str, Any]:
        cache = None if self.timing_cache is None else str(self.timing_cache)
        return {**asdict(self), "timing_cache": cache, "compute_capabilities": list(self.compute_capabilities)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> BuildOptions:
        cache = plain["timing_cache"]
        return cls(
            **{
                **plain,
                "timing_cache": None if cache is None else Path(cache),
                "compute_capabilities": tuple(plain["compute_capabilities"]),
            }
        )


def parse_size(text: str) -> int:
    """Bytes from ``512MiB``, ``2G``, ``2GiB`` or a plain number of bytes; K, M and G are powers of 1024.

    Raises:
        BadInput: It is no such size, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if not 1 <= size < 1 << 63:
        raise BadInput(f"{text!r} is not a size", where="--workspace", hint="for example 2GiB or 512MiB")
    return size


def parse_compute_capabilities(text: str) -> tuple[str, ...]:
    """``sm86,8.9,current`` as ``("sm86", "sm89", "current")``, each once.

    Raises:
        BadInput: One of them is no compute capability.
    """
    found: dict[str, None] = {}
    for part in (part.strip() for part in text.split(",")):
        match = _CAPABILITY.fullmatch(part)
        if match is None and part.lower() != "current":
            raise BadInput(
                f"{part!r} is not a compute capability", where="--compute-capability", hint="for example sm86,sm89"
            )
        found["current" if match is None else f"sm{match[1]}{match[2]}"] = None
    return tuple(found)


def check_options(options: BuildOptions, backend: Backend) -> None:
    """Refuse what a library never knows, whatever its version; versions are looked at where the library is loaded.

    Raises:
        BadInput: An option does not fit the library, is out of its range, or contradicts another.
    """
    if options.hardware_compatibility not in HARDWARE_COMPATIBILITY:
        raise BadInput(
            f"{options.hardware_compatibility!r} is not a level",
            where="--hardware-compatibility",
            hint=f"there are {', '.join(HARDWARE_COMPATIBILITY)}",
        )
    if options.optimization_level is not None and options.optimization_level not in OPTIMIZATION_LEVELS:
        raise BadInput(
            f"{options.optimization_level} is not a level", where="--optimization-level", hint="there are 0 to 5"
        )
    if options.workspace is not None and options.workspace < 1:
        raise BadInput(f"{options.workspace} bytes are none", where="--workspace", hint="for example 2GiB")
    for name, (given, why, hint) in _unknown_to(options, backend).items():
        if given:
            raise BadInput(f"{backend.title} {why}", where=name, hint=hint)


def _unknown_to(options: BuildOptions, backend: Backend) -> dict[str, tuple[bool, str, str]]:
    """Option -> (was it given, why the library has no use for it, what to do)."""
    if backend.name == "tensorrt-rtx":
        return {
            # Its functions for it are there, do nothing, and say so when they are called.
            "--timing-cache": (
                options.timing_cache is not None,
                "has no timing cache: it times nothing when it builds",
                "leave it out",
            ),
            "--hardware-compatibility": (
                options.hardware_compatibility != "none",
                "has no levels of it",
                "name the GPUs: --compute-capability sm86,sm89",
            ),
            "--version-compatible": (
                options.version_compatible,
                "does not come with the lean runtime that this takes",
                "build the engine with the version that will run it",
            ),
        }
    return {
        "--compute-capability": (
            bool(options.compute_capabilities),
            "builds for the GPU that it runs on",
            "for others: --hardware-compatibility ampere-plus",
        )
    }
