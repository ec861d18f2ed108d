"""Finds passes: ours by walking ``graphopt.passes``, third parties' through the entry point group of the same name."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from functools import cache

from graphopt.errors import BadInput
from graphopt.rewrite.contract import ForeignPass, Pass
from graphopt.rewrite.rules import RulePass

ENTRY_POINTS = "graphopt.passes"


@cache
def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name, sorted by stage and name.

    Raises:
        BadInput: A third party's entry point cannot be imported, names no pass, or takes a name that is taken.
    """
    found: dict[str, type[Pass]] = {}
    package = importlib.import_module("graphopt.passes")
    for info in pkgutil.walk_packages(package.__path__, "graphopt.passes."):
        for cls in _passes_in(importlib.import_module(info.name)):
            assert cls.name not in found, f"two passes are called {cls.name}"
            found[cls.name] = cls
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            cls = entry.load()
        except Exception as error:
            raise BadInput(
                f"the pass cannot be imported: {error}",
                where=f"entry point {entry.name} of {entry.dist.name if entry.dist else 'an unknown package'}",
                hint="update or uninstall that package",
            ) from error
        if not (inspect.isclass(cls) and issubclass(cls, Pass)):
            raise BadInput("is not a graphopt.rewrite.Pass", where=f"entry point {entry.name} ({entry.value})")
        if cls.name in found and found[cls.name] is not cls:
            raise BadInput(f"a pass called '{cls.name}' exists already", where=f"entry point {entry.name}")
        found[cls.name] = cls
    return dict(sorted(found.items(), key=lambda item: (item[1].stage, item[0])))


def get_pass(name: str) -> type[Pass]:
    """A pass by its name.

    Raises:
        BadInput: There is none; the message names the nearest.
    """
    passes = all_passes()
    if name not in passes:
        near = difflib.get_close_matches(name, passes, 1)
        hint = f"did you mean {near[0]}?" if near else "see: graphopt passes"
        raise BadInput(f"no pass '{name}'", hint=hint)
    return passes[name]


def _passes_in(module: object) -> list[type[Pass]]:
    bases = (Pass, ForeignPass, RulePass)
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Pass)
        and cls not in bases
        and not inspect.isabstract(cls)
        and cls.__module__ == getattr(module, "__name__", "")
    ]
