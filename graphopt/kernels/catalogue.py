"""All the kernels there are: the kit's own and those of the plugins."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence

from graphopt.kernels import gemm
from graphopt.kernels.kernel import Kernel

PLUGINS = "graphopt.plugins"


def all_kernels() -> Sequence[Kernel]:
    """Every kernel, dtype and tactic: the matrix products, then what ``kernels()`` of each plugin's ``kernels`` gives.

    Plugins lie above this package: they are found by walking theirs, at run time.
    """
    found = list(gemm.kernels())
    for plugin in pkgutil.iter_modules(importlib.import_module(PLUGINS).__path__, f"{PLUGINS}."):
        spec = importlib.util.find_spec(f"{plugin.name}.kernels") if plugin.ispkg else None
        if spec is not None and spec.origin is not None:  # a folder of that name alone is none
            found += importlib.import_module(spec.name).kernels()
    return found


def describe(kernel: Kernel) -> str:
    """A kernel in a few words: its name, and what its dtype and its tactic define."""
    return " ".join([kernel.name, *(value for _, value in kernel.defines if value != kernel.name)])
