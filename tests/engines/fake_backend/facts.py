"""What a version of the library has, read from ``api.json``, and how its calls are checked."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

API = Path(__file__).with_name("api.json")


class Breach(AssertionError):
    """The code under test did what the real library forbids, or used what no version has."""


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    optional: bool


@dataclass(frozen=True)
class ClassFacts:
    """A class of the library: enum members, or methods with their signatures and properties (True: may be set)."""

    members: Mapping[str, int]
    methods: Mapping[str, list[list[Parameter]]]
    properties: Mapping[str, bool]


@lru_cache(maxsize=1)
def _api() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(API.read_text())
    return read


def versions() -> list[str]:
    """What there are facts about: ``tensorrt 10.9`` and so on, oldest first."""
    return list(_api()["versions"])


@lru_cache(maxsize=16)
def facts_of(version: str) -> tuple[str, dict[str, ClassFacts], frozenset[str]]:
    """The full version number, the classes and the functions of one version."""
    api = _api()
    index = list(api["versions"]).index(version)
    classes = {
        name: _class([fact for fact, where in facts.items() if index in where])
        for name, facts in api["classes"].items()
        if name != "functions" and index in facts["class"]
    }
    functions = frozenset(
        fact.partition("(")[0] for fact, where in api["classes"]["functions"].items() if index in where
    )
    return api["versions"][version], classes, functions


def known_anywhere(cls: str) -> frozenset[str]:
    """The names of methods, properties and members that a class has in any version."""
    return frozenset(re.match(r"\w+", fact)[0] for fact in _api()["classes"].get(cls, {}))  # type: ignore[index]


def _class(lines: list[str]) -> ClassFacts:
    members: dict[str, int] = {}
    methods: dict[str, list[list[Parameter]]] = {}
    properties: dict[str, bool] = {}
    for line in lines:
        if match := re.fullmatch(r"(\w+) = (-?\d+)", line):
            members[match[1]] = int(match[2])
        elif match := re.fullmatch(r"(\w+): (read-\w+)", line):
            properties[match[1]] = match[2] == "read-write"
        elif match := re.fullmatch(r"(\w+)\((.*)\)(?: -> .*)?", line):
            methods.setdefault(match[1], [])
            if match[2] != "...":
                methods[match[1]].append([_parameter(part) for part in _split(match[2])][1:])  # without self
    return ClassFacts(dict(sorted(members.items(), key=lambda item: item[1])), methods, properties)


def _split(text: str) -> list[str]:
    """Split at commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parameter(text: str) -> Parameter:
    name, _, rest = text.partition(":")
    kind, default, _ = rest.partition("=")
    return Parameter(name.strip(), kind.strip(), bool(default))


def make_enum(name: str, members: Mapping[str, int]) -> Any:
    """An enum as pybind11 makes them: ``int(member)`` works, arithmetic on the member does not."""
    made = enum.Enum(name, dict(members))  # type: ignore[misc]
    made.__int__ = lambda self: self.value  # type: ignore[attr-defined]
    return made


def fits(value: object, kind: str, classes: Mapping[str, type]) -> bool:
    """Whether pybind11 would take a value for a parameter of that kind."""
    if kind in ("object", "") or (value is None and kind == "str"):
        return True
    if kind in ("int", "float"):
        return hasattr(value, "__int__") and not isinstance(value, (str, *classes.values()))
    if kind in ("str", "bool"):
        return isinstance(value, {"str": str, "bool": bool}[kind])
    if kind == "Buffer":
        return isinstance(value, (bytes, bytearray, memoryview))
    if kind == "Dims" or kind in ("list[int]", "Sequence[int]"):
        return isinstance(value, (tuple, list)) and all(type(item) is int for item in value)
    known = classes.get(kind)
    return known is not None and isinstance(value, known)


def checked(
    cls: str, name: str, signatures: list[list[Parameter]], method: Callable[..., Any], classes: Mapping[str, type]
) -> Callable[..., Any]:
    """A method that takes what one of the signatures takes, by position or by name, and raises TypeError otherwise."""

    def call(self: Any, *given: Any, **named: Any) -> Any:
        for signature in signatures:
            names = [parameter.name for parameter in signature]
            if len(given) > len(names) or not set(named) <= set(names[len(given) :]):
                continue
            values = {**dict(zip(names, given, strict=False)), **named}
            complete = all(parameter.optional or parameter.name in values for parameter in signature)
            kinds = {parameter.name: parameter.kind for parameter in signature}
            if complete and all(fits(value, kinds[key], classes) for key, value in values.items()):
                return method(self, **values)
        what = ", ".join([*map(repr, given), *(f"{key}={value!r}" for key, value in named.items())])
        raise TypeError(f"{cls}.{name}(): incompatible function arguments: ({what})")

    return call
