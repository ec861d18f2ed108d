"""`load`: a model in, something that runs out, whatever the backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from graphopt.errors import BadInput
from graphopt.runtime.session import bind, create_session, numpy_dtype, run


@dataclass(frozen=True)
class TensorSpec:
    """What a model takes or gives.

    Attributes:
        name: The input's or output's name.
        dtype: The numpy dtype; None for a sequence or another type that is no plain tensor.
        shape: Sizes; a string where an axis is symbolic, None where nothing is known. None altogether where
            not even the rank is.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None


@runtime_checkable
class Runner(Protocol):
    """A loaded model."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What `run` takes."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What `run` gives."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model once: arrays by input name in, arrays by output name out. BadInput for wrong feeds."""


class OnnxRuntimeRunner:
    """A model on ONNX Runtime, as deployed: its optimizations on, on the CPU."""

    def __init__(self, path: Path, threads: int | None = None, *, config: Mapping[str, str] | None = None) -> None:
        self._session = create_session(path, optimized=True, threads=threads, config=config)
        self.inputs: tuple[TensorSpec, ...] = tuple(_spec(item) for item in self._session.get_inputs())
        self.outputs: tuple[TensorSpec, ...] = tuple(_spec(item) for item in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return run(self._session, feeds)

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """Check feeds once; the function returned runs the model on them, and nothing but that."""
        return bind(self._session, feeds)


Backend = Callable[[Path, int | None], Runner]


def _later(module: str, function: str) -> Backend:
    """A backend of a layer above this one, imported when it is first used."""

    def load_with(path: Path, threads: int | None) -> Runner:
        runner: Runner = getattr(importlib.import_module(module), function)(path, threads)
        return runner

    return load_with


# name -> how to load a file with it. Other parts of graphopt add theirs.
BACKENDS: dict[str, Backend] = {
    "onnxruntime": OnnxRuntimeRunner,
    "tensorrt": _later("graphopt.engines.running", "load_engine"),
    "tensorrt-rtx": _later("graphopt.engines.running", "load_engine"),
    "bundle": _later("graphopt.bundles.running", "load_bundle"),
}
# The backend for files of a kind, where the caller names none. An engine's own file says whose it is.
BACKEND_FOR_SUFFIX: dict[str, str] = {
    ".onnx": "onnxruntime",
    ".ort": "onnxruntime",
    ".engine": "tensorrt",
    ".plan": "tensorrt",
    ".trt": "tensorrt",
}


def load(path: str | Path, backend: str | None = None, threads: int | None = None) -> Runner:
    """Load a model, ready to run.

    Args:
        path: The model's file, or the folder of a bundle.
        backend: Which backend runs it; by the kind of file if None.
        threads: Threads within an operator; None leaves it to the backend.

    Returns:
        A runner: ``load(path).run({"x": array})["y"]``.

    Raises:
        BadInput: There is no such file or backend, or the backend refuses the model.
    """
    file = Path(path)
    if not file.exists():
        raise BadInput("no such file", where=str(file))
    if threads is not None and threads < 1:
        raise BadInput(f"threads must be at least 1, not {threads}")
    by_kind = "bundle" if file.is_dir() else BACKEND_FOR_SUFFIX.get(file.suffix)
    name = backend if backend is not None else by_kind
    if name is None:
        raise BadInput(
            "no backend is known for this kind of file", where=str(file), hint=f"backends: {', '.join(BACKENDS)}"
        )
    if name not in BACKENDS:
        raise BadInput(f"there is no backend '{name}'", where=str(file), hint=f"backends: {', '.join(BACKENDS)}")
    return BACKENDS[name](file, threads)


def _spec(item: Any) -> TensorSpec:
    shape = None if item.shape is None else tuple(item.shape)
    return TensorSpec(item.name, numpy_dtype(item.type), shape)
