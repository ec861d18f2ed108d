"""Operators that a TensorRT engine runs on kernels of ours: what each says of itself, and where models can use them.

An operator's folder, ``graphopt/plugins/<op>``, holds a module ``tensorrt`` with one `PLUGIN`. Nothing else names it:
plugins are found by walking the package, third parties' through the entry point group ``graphopt.plugins``, whose
entries name such modules. What is declared here is all that the TensorRT side knows of an operator: `qdp` registers
it, `nodes` writes its nodes, and `twin` writes what they mean in standard operators.
"""

from __future__ import annotations

from graphopt.engines.plugins.finding import find_plugins, load_plugin, module_of
from graphopt.engines.plugins.lowering import Choice, Lowered, Refused, Written, lower, twin
from graphopt.engines.plugins.plugin import NAMESPACE, Array, Attributes, Meaning, Mode, Plugin, Types

__all__ = [
    "NAMESPACE",
    "Array",
    "Attributes",
    "Choice",
    "Lowered",
    "Meaning",
    "Mode",
    "Plugin",
    "Refused",
    "Types",
    "Written",
    "find_plugins",
    "load_plugin",
    "lower",
    "module_of",
    "twin",
]
