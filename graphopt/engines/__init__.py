"""TensorRT and TensorRT-RTX engines, built in a child process.

The names are imported when they are first used: the child imports modules of this package, and needs little of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.engines.build import build_engine
    from graphopt.engines.bundles.building import BundleResult, build_bundle
    from graphopt.engines.options import BuildOptions
    from graphopt.engines.profiles import Profile, make_profiles, parse_shapes
    from graphopt.engines.report import BuildResult, read_report

__all__ = [
    "BuildOptions",
    "BuildResult",
    "BundleResult",
    "Profile",
    "build_bundle",
    "build_engine",
    "make_profiles",
    "parse_shapes",
    "read_report",
]

_HOMES = {
    "BuildOptions": "options",
    "BuildResult": "report",
    "BundleResult": "bundles.building",
    "Profile": "profiles",
    "build_bundle": "bundles.building",
    "build_engine": "build",
    "make_profiles": "profiles",
    "parse_shapes": "profiles",
    "read_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt.engines' has no attribute '{name}'")
    return getattr(importlib.import_module(f"graphopt.engines.{_HOMES[name]}"), name)
