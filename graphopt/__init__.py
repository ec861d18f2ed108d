"""graphopt: rewrite ONNX models, prove that they still compute the same, build engines from them.

The functions here are the commands of the same names. They are imported when they are first used, so that
``import graphopt`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.benchmarking import bench
    from graphopt.bisecting import bisect
    from graphopt.engines import build_engine as build
    from graphopt.exporting import export
    from graphopt.importing import import_factors
    from graphopt.inspection import inspect
    from graphopt.optimizing import optimize
    from graphopt.packaging import package_triton as package
    from graphopt.runtime import load
    from graphopt.selftesting import selftest
    from graphopt.verifying import verify

__all__ = [
    "bench",
    "bisect",
    "build",
    "export",
    "import_factors",
    "inspect",
    "load",
    "optimize",
    "package",
    "selftest",
    "verify",
]

_HOMES = {
    "bench": ("graphopt.benchmarking", "bench"),
    "bisect": ("graphopt.bisecting", "bisect"),
    "build": ("graphopt.engines", "build_engine"),
    "export": ("graphopt.exporting", "export"),
    "import_factors": ("graphopt.importing", "import_factors"),
    "inspect": ("graphopt.inspection", "inspect"),
    "load": ("graphopt.runtime", "load"),
    "optimize": ("graphopt.optimizing", "optimize"),
    "package": ("graphopt.packaging", "package_triton"),
    "selftest": ("graphopt.selftesting", "selftest"),
    "verify": ("graphopt.verifying", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute '{name}'")
    module, function = _HOMES[name]
    return getattr(importlib.import_module(module), function)
