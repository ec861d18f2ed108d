"""A build's options and profiles as calls of the library at hand. Runs in the child.

Every member that some version lacks is looked for before it is used, and its absence told by the option's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphopt.engines.child.requests import BuildFailed, Request
from graphopt.engines.options import BuildOptions


def check_version(trt: Any, request: Request) -> str:
    """The version of the library. Raises BuildFailed where it is too old."""
    version = str(trt.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < tuple(request.oldest):
        oldest = ".".join(map(str, request.oldest))
        raise BuildFailed(f"{request.title} {version} is too old", f"{oldest} or newer is needed")
    return version


def add_options(trt: Any, config: Any, options: BuildOptions, request: Request, gpu: str | None) -> None:
    """Set everything of the options but the timing cache.

    Raises:
        BuildFailed: The library at hand has no such option, or cannot honour it here.
    """

    def find(holder: Any, name: str, option: str) -> Any:
        found = getattr(holder, name, None)
        if found is None:
            raise BuildFailed(f"{option}: {request.title} {trt.__version__} has no such option", bad_input=True)
        return found

    flags = [
        ("SPARSE_WEIGHTS", options.sparsity, "--sparsity"),
        ("STRIP_PLAN", options.strip_weights, "--strip-weights"),
        # Stripped weights come back as they were, unless others are wanted.
        ("REFIT_IDENTICAL", options.strip_weights and not options.refit, "--strip-weights"),
        ("REFIT", options.refit, "--refit"),
        ("WEIGHT_STREAMING", options.weight_streaming, "--weight-streaming"),
        ("VERSION_COMPATIBLE", options.version_compatible, "--version-compatible"),
    ]
    for name, wanted, option in flags:
        if wanted:
            config.set_flag(find(trt.BuilderFlag, name, option))
    if request.backend == "tensorrt-rtx" and (options.strip_weights or options.refit) and gpu is None:
        option = "--strip-weights" if options.strip_weights else "--refit"
        raise BuildFailed(
            f"{option}: {request.title} needs a GPU to build such an engine, and there is none here",
            "leave it out, or build where the GPU is",
            bad_input=True,
        )
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility != "none":
        name = options.hardware_compatibility.upper().replace("-", "_")
        config.hardware_compatibility_level = find(trt.HardwareCompatibilityLevel, name, "--hardware-compatibility")
    if options.compute_capabilities:
        _add_capabilities(trt, config, options.compute_capabilities, find, request.title, gpu)
    # Without it the inspector tells names and nothing else.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _add_capabilities(
    trt: Any, config: Any, wanted: tuple[str, ...], find: Callable[[Any, str, str], Any], title: str, gpu: str | None
) -> None:
    option = "--compute-capability"
    kinds = find(trt, "ComputeCapability", option)
    if "current" in wanted and gpu is None:
        raise BuildFailed(f"{option}: there is no GPU here to be the current one", "name one: sm89", bad_input=True)
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        kind = getattr(kinds, name.upper(), None)
        if kind is None or not config.set_compute_capability(kind, index):
            there = ", ".join(known.lower() for known in kinds.__members__ if known != "NONE")
            raise BuildFailed(
                f"{option}: {title} {trt.__version__} does not build for {name}",
                f"it builds for {there}",
                bad_input=True,
            )


def add_profiles(builder: Any, network: Any, config: Any, request: Request) -> None:
    """Add one optimization profile for each that the request has.

    Raises:
        BuildFailed: The library refuses the shapes, or an input decides a shape and its values are not known.
    """
    parsed = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    deciding = [name for name, tensor in parsed.items() if tensor.is_shape_tensor]
    for name in deciding:
        if name not in request.values:
            raise BuildFailed(
                f"the input {name!r} decides a shape; {request.title} needs its range of values",
                "give --calibration with inputs of yours, or make it a constant of the model",
                bad_input=True,
            )
    # The parser drops inputs that nothing consumes.
    profiles = [{name: shapes for name, shapes in given.items() if name in parsed} for given in request.profiles]
    if deciding and not profiles:
        profiles = [{}]
    for given in profiles:
        if not given and not deciding:
            continue
        profile = builder.create_optimization_profile()
        try:
            for name, sizes in given.items():
                profile.set_shape(name, tuple(sizes["min"]), tuple(sizes["opt"]), tuple(sizes["max"]))
            for name in deciding:
                values = request.values[name]
                profile.set_shape_input(name, values["min"], values["opt"], values["max"])
            accepted = config.add_optimization_profile(profile) >= 0
        except ValueError:
            accepted = False
        if not accepted:
            raise BuildFailed(f"{request.title} refuses the shapes", "--verbose shows its log", bad_input=True)


class TimingCache:
    """Timings that builds share, in a file.

    Attributes:
        note: What became of the file, where it was not just read.
    """

    def __init__(self, config: Any, logger: Any, path: Path) -> None:
        """Read the file, if it is there, and hand it to the config. Raises BuildFailed where that is impossible."""
        self._config = config
        self._logger = logger
        self._path = path
        self.note = ""
        content = self._read()
        # Kept: the library uses it until the engine is built.
        self._attached = self._attach(content)
        if self._attached is None and content:
            self.note = f"{path.name} is of another GPU or another version: started anew"
            self._attached = self._attach(b"")
        if self._attached is None:
            raise BuildFailed(f"--timing-cache: refused by the library: {logger.last_error or 'no reason given'}")

    def save(self) -> None:
        """Put the timings of this build, and what others wrote meanwhile, in place of the file. Raises OSError."""
        cache = self._config.get_timing_cache()
        content = b"" if self.note else self._read()
        others = self._create(content) if content else None
        if others is not None:
            cache.combine(others, ignore_mismatch=False)
        # Builds that share the file may end at the same time: each writes its own.
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(memoryview(cache.serialize()))
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            what = f"--timing-cache: cannot read {self._path}: {error.strerror}"
            raise BuildFailed(what, bad_input=True) from error

    def _create(self, content: bytes) -> Any:
        """A cache with that content, or None: the library makes an empty one of what it cannot read, and warns."""
        told = self._logger.warnings
        cache = self._config.create_timing_cache(content)
        return None if content and self._logger.warnings > told else cache

    def _attach(self, content: bytes) -> Any:
        """A cache with that content that the library took for this GPU, or None."""
        cache = self._create(content)
        return cache if cache is not None and self._config.set_timing_cache(cache, ignore_mismatch=False) else None
