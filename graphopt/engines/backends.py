"""The libraries that build engines: what they are called, and how to get them."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import BadInput, MissingDependency, install_hint


@dataclass(frozen=True)
class Backend:
    """A library with TensorRT's API.

    Attributes:
        name: What ``--backend`` takes.
        title: What messages call it.
        modules: Import names, first choice first (wheels hold the bindings under a second name).
        extra: The extra of graphopt that installs it.
        oldest: The oldest version that is supported.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    extra: str
    oldest: tuple[int, int]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("tensorrt", "TensorRT", ("tensorrt", "tensorrt_bindings"), "tensorrt", (10, 9)),
        Backend("tensorrt-rtx", "TensorRT-RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "rtx", (1, 0)),
    )
}


def find_backend(name: str) -> Backend:
    """The backend called ``name``; its library is not imported.

    Raises:
        BadInput: There is no such backend.
        MissingDependency: Its library is not installed.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        raise BadInput(
            f"no backend {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BACKENDS)}",
        )
    backend = BACKENDS[name]
    if not any(importlib.util.find_spec(module) for module in backend.modules):
        raise MissingDependency(f"{backend.title} is not installed", hint=install_hint(backend.extra))
    return backend


class NotImported(Exception):
    """The library does not load; the text is the reason."""


def import_first(modules: Sequence[str]) -> Any:
    """The first of ``modules`` that imports. Raises NotImported with the last reason."""
    reason = "not installed"
    for name in modules:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                reason = str(error)
        except Exception as error:  # a library that does not load raises OSError, RuntimeError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise NotImported(reason)
