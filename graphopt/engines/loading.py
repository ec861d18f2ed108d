"""Opens an engine file with the library that it is for, and says in plain words why one does not open."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.engines.backends import BACKENDS, Backend, NotImported, find_backend, import_first
from graphopt.engines.report import BuildResult, check_fits, read_report, report_path
from graphopt.errors import BadInput, GraphoptError, MissingDependency, install_hint
from graphopt.gpu.driver import Device

# The first four bytes of an engine.
_RTX_MAGIC = b"vtrt"
_MAGIC_END = b"trt"
_BLOCK = 1 << 20

_AGAIN = "build it again here with graphopt build"
_DRIVER = (
    re.compile(r"cudaError 35|driver version is insufficient", re.IGNORECASE),
    "NVIDIA's driver is too old for the library",
)
_MEMORY = (re.compile(r"[Oo]ut ?[Oo]f ?[Mm]emory|cudaError 2\b"), "the GPU's memory is too small for it")
# What to do where building again does not help.
_ADVICE = {
    _DRIVER: "install a newer driver; graphopt selftest says which",
    _MEMORY: "close what else uses the GPU, or build with --weight-streaming",
}
# What the libraries write where they refuse an engine -> what that means.
_REASONS = (
    (
        re.compile(r"expecting compute (\d+)\.(\d+) got compute (\d+)\.(\d+)"),
        "the engine was built for another GPU: compute capability {2}.{3}, and this GPU has {0}.{1}",
    ),
    (
        re.compile(r"incompatible device|different device|compute capabilit", re.IGNORECASE),
        "the engine was built for another kind of GPU",
    ),
    (
        re.compile(r"expecting library version ([\d.]+) got ([\d.]+)"),
        "the engine was built by version {1} of the library, and here is {0}",
    ),
    (
        re.compile(r"Version tag does not match|not compatible with this version|stdVersionRead", re.IGNORECASE),
        "the engine was built by another version of the library",
    ),
    _DRIVER,
    (
        re.compile(r"host code|engine_host_code_allowed|lean runtime", re.IGNORECASE),
        "the engine holds a runtime of its own, which was not allowed to run",
    ),
    (re.compile(r"[Mm]agic ?[Tt]ag|not a valid engine"), "the file is no engine of this library"),
    _MEMORY,
)


class OpenEngine:
    """An engine in its library.

    Attributes:
        path: The file.
        backend: Whose it is.
        trt: The library's module.
        version: The library's version.
        logger: Keeps the library's last error.
        engine: The library's object.
        report: What is known of how it was built; None where that did not lie beside it.
    """

    def __init__(self, path: Path, device: Device, *, backend: str | None = None, trt: Any = None) -> None:
        """Open an engine; the context of ``device`` must be current.

        Args:
            path: The engine.
            device: What it will run on.
            backend: ``tensorrt`` or ``tensorrt-rtx``; read from the file if None.
            trt: The library's module; imported if None.

        Raises:
            BadInput: The file is no engine, or is of another library than ``backend``.
            MissingDependency: The library is not installed.
            GraphoptError: The library refuses it.
        """
        self.path = path
        name = _backend_of(path, backend)
        self.backend: Backend = find_backend(name) if trt is None else BACKENDS[name]
        self.trt: Any = import_library(self.backend) if trt is None else trt
        self.version = str(self.trt.__version__)
        self.report: BuildResult | None = read_report(path) if report_path(path).exists() else None
        if self.report is not None:
            check_fits(self.report, self.version, device.name, ".".join(map(str, device.capability)))
        self.logger: Any = _make_logger(self.trt)
        if hasattr(self.trt, "init_libnvinfer_plugins"):
            self.trt.init_libnvinfer_plugins(self.logger, "")
        self._runtime = self.trt.Runtime(self.logger)
        if self.report is not None and self.report.options.version_compatible:
            # It carries the runtime of the version that built it. Whoever loads an engine runs what is in it anyway.
            self._runtime.engine_host_code_allowed = True
        self.engine: Any = self._deserialise(device)
        if self.report is not None and self.report.options.strip_weights:
            self._put_weights_in(self.report.model)
        if self.report is not None and self.report.options.weight_streaming and self.engine.streamable_weights_size:
            # Left alone it would hold all weights on the GPU, which is what streaming is meant to avoid.
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()

    def failure(self, doing: str) -> GraphoptError:
        """An error for what the library just refused, with its own words."""
        said = self.logger.last_error
        return GraphoptError(f"{self.backend.title} {doing}: {said or 'no reason given'}", where=str(self.path))

    def _deserialise(self, device: Device) -> Any:
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._refusal(device)
        return engine

    def _put_weights_in(self, model: Mapping[str, Any]) -> None:
        """The weights of an engine without any, from the ONNX file that it was built from, which lies beside it."""
        source = self.path.with_name(str(model["name"]))
        if not source.is_file():
            what = f"the engine holds no weights; they are in {source.name}, which is not beside it"
            raise BadInput(what, where=str(self.path), hint="put it there, or build without --strip-weights")
        if _content_of(source, model["data_files"]) != model["sha256"]:
            raise BadInput("is not the model that the engine was built from", where=str(source))
        refitter = self.trt.Refitter(self.engine, self.logger)
        if not self.trt.OnnxParserRefitter(refitter, self.logger).refit_from_file(str(source)):
            raise self.failure(f"does not take the weights of {source.name}")
        if not refitter.refit_cuda_engine():
            raise self.failure(f"could not put the weights of {source.name} in")

    def _refusal(self, device: Device) -> GraphoptError:
        said = " ".join(self.logger.errors)
        here = f"{self.backend.title} {self.version}, {device.name}"
        for reason in _REASONS:
            pattern, meaning = reason
            found = pattern.search(said)
            if found is not None:
                hint = f"here: {here}; {_ADVICE.get(reason, _AGAIN)}"
                return GraphoptError(meaning.format(*found.groups()), where=str(self.path), hint=hint)
        what = f"{self.backend.title} does not load it: {self.logger.last_error or 'no reason given'}"
        return GraphoptError(what, where=str(self.path), hint=f"here: {here}")


def _content_of(source: Path, data_files: Sequence[str]) -> str:
    """As the report of a build says it: the sha256 of a model and of its data files, in the order of their names."""
    digest = hashlib.sha256()
    for file in (source, *(source.parent / name for name in sorted(data_files))):
        if not file.is_file():
            raise BadInput("no such file", where=str(file), hint=f"it holds weights of {source.name}")
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _backend_of(path: Path, wanted: str | None) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    if len(magic) < 4 or magic[1:] != _MAGIC_END:
        raise BadInput("is no engine of TensorRT", where=str(path), hint="build one with graphopt build")
    found = "tensorrt-rtx" if magic == _RTX_MAGIC else "tensorrt"
    if wanted is not None and wanted != found:
        title, other = BACKENDS[found].title, BACKENDS[wanted].title
        raise BadInput(f"is an engine of {title}, not of {other}", where=str(path), hint=f"load it with {found}")
    return found


def import_library(backend: Backend) -> Any:
    """A library's module, the first of its names that imports. Raises MissingDependency with the reason."""
    try:
        return import_first(backend.modules)
    except NotImported as error:
        what = f"cannot load {backend.title}: {error}"
        raise MissingDependency(what, hint=install_hint(backend.extra)) from None


def _make_logger(trt: Any) -> Any:
    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        @property
        def last_error(self) -> str:
            return self.errors[-1] if self.errors else ""

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(message.split())[:400]
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                self.errors = [*self.errors[-9:], line]
            elif severity == severities.WARNING:
                self.warnings = [*self.warnings[-9:], line]

    return Logger()
