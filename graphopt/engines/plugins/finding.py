"""Finds plugins: by walking the package of ours, and through entry points of third parties."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from functools import cache

from graphopt.engines.plugins.plugin import Plugin
from graphopt.errors import BadInput, GraphoptError

PACKAGE = "graphopt.plugins"
ENTRY_POINTS = "graphopt.plugins"


def find_plugins() -> dict[str, Plugin]:
    """Every plugin by its name, sorted.

    Raises:
        BadInput: A third party's module cannot be imported or has no PLUGIN, or two plugins have one name.
    """
    return {name: plugin for name, (_, plugin) in _found().items()}


def module_of(name: str) -> str:
    """The module that declares a plugin: what a process imports that registers it.

    Raises:
        BadInput: There is no such plugin.
    """
    if name not in _found():
        raise BadInput(f"no plugin {name!r}", hint=f"there are {', '.join(_found()) or 'none'}")
    return _found()[name][0]


@cache
def _found() -> dict[str, tuple[str, Plugin]]:
    found: dict[str, tuple[str, Plugin]] = {}
    package = importlib.import_module(PACKAGE)
    modules = [
        (f"{PACKAGE}.{info.name}.tensorrt", f"folder {info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if info.ispkg and importlib.util.find_spec(f"{PACKAGE}.{info.name}.tensorrt") is not None
    ]
    modules += [
        (entry.value, f"entry point {entry.name}") for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)
    ]
    for module, where in modules:
        plugin = load_plugin(module, where=where)
        if plugin.name in found and found[plugin.name][1] is not plugin:
            raise BadInput(f"a plugin called {plugin.name!r} exists already", where=where)
        found[plugin.name] = (module, plugin)
    return dict(sorted(found.items()))


def load_plugin(module: str, *, where: str | None = None) -> Plugin:
    """The plugin that a module declares.

    Raises:
        BadInput: The module cannot be imported, or has no PLUGIN.
    """
    place = where or module
    try:
        plugin = getattr(importlib.import_module(module), "PLUGIN", None)
    except GraphoptError:
        raise
    except Exception as error:
        raise BadInput(f"the plugin cannot be imported: {error}", where=place) from error
    if not isinstance(plugin, Plugin):
        raise BadInput(f"{module} has no PLUGIN", where=place)
    return plugin
