"""Reads recipes and turns them into passes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graphopt.errors import BadInput
from graphopt.rewrite.contract import Pass
from graphopt.rewrite.discovery import get_pass

BUILT_IN = Path(__file__).parent
LABEL = re.compile(r"[A-Za-z0-9_-]+")


class Step(BaseModel):
    """One pass of a recipe: its name alone, or a mapping of ``pass`` and parameters.

    A pass that does something else each time (``Pass.repeatable``) can be named more than once, with a label that
    tells the steps apart: ``graphsurgeon@cleanup``.
    """

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    name: str = Field(alias="pass")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"pass": value} if isinstance(value, str) else value

    @property
    def pass_name(self) -> str:
        """The name without its label."""
        return self.name.partition("@")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters given in the recipe."""
        return dict(self.model_extra or {})


class Recipe(BaseModel):
    """A named list of passes.

    Attributes:
        name: As given to ``--recipe``.
        description: One sentence.
        passes: The steps; each pass decides by its stage when it runs.
        bundle: Whether the result is a bundle, split at its control flow, and no single file.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    passes: list[Step]
    bundle: bool = False


def recipe_names() -> list[str]:
    """The recipes that ship with graphopt."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Raises:
        BadInput: No such recipe or file, or it is not a recipe.
    """
    path = BUILT_IN / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            near = difflib.get_close_matches(name, recipe_names(), 1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise BadInput(
                f"no recipe '{name}'", hint=f"{guess}there are {', '.join(recipe_names())}; or give a .yaml file"
            )
        if not path.is_file():
            raise BadInput("no such file", where=str(path), hint="--recipe takes a name or a .yaml file")
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise BadInput(f"{place}: {problem['msg']}", where=str(path), hint="see docs/recipes.md") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"not YAML: {str(error).splitlines()[0]}", where=str(path)) from error


def load_recipes(names: str | Sequence[str]) -> list[Recipe]:
    """Several recipes, in order; or one, by its name alone."""
    return [load_recipe(name) for name in as_several(names)]


def as_several(given: str | Sequence[str]) -> Sequence[str]:
    """A string alone as a sequence of one: as a sequence of letters nobody means it."""
    return (given,) if isinstance(given, str) else given


def passes_of(recipes: Sequence[Recipe], settings: str | Sequence[str] = ()) -> list[Pass]:
    """The passes of composed recipes, each once; parameters of a later recipe win, those of ``settings`` over all.

    Args:
        recipes: In the order given by the user.
        settings: ``PASS.KEY=VALUE``; the value is read as YAML. ``PASS.enabled=false`` leaves a pass out, and a pass
            that no recipe names is added; one whose parameters ask for nothing is left out. PASS is a name as a
            recipe writes it, with its label if it has one.

    Raises:
        BadInput: An unknown pass or parameter, a value of the wrong type, a pass that one recipe names twice, or a
            label on a pass that takes none.
    """
    steps: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for recipe in recipes:
        where = f"recipe {recipe.name}"
        named: set[str] = set()
        for step in recipe.passes:
            if step.name in named:
                raise BadInput(f"names {step.name} twice", where=where, hint=_how_to_repeat(step.name, where))
            named.add(step.name)
            steps.setdefault(step.name, {}).update(step.parameters)
            origin[step.name] = where
    for setting in as_several(settings):
        name, key, value = _parse(setting)
        steps.setdefault(name, {})[key] = value
        origin[name] = f"--set {setting}"
    made = (_make(name, values, origin[name]) for name, values in steps.items() if values.pop("enabled", True))
    return [step for step in made if step.asked]


def _parse(setting: str) -> tuple[str, str, Any]:
    path, equals, text = setting.partition("=")
    name, dot, key = path.partition(".")
    if not equals or not dot or not key:
        raise BadInput(f"cannot read --set {setting}", hint="write --set PASS.KEY=VALUE")
    try:
        return name.strip(), key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"cannot read the value of --set {setting}") from error


def _class(name: str, origin: str) -> type[Pass]:
    try:
        return get_pass(name)
    except BadInput as error:
        raise BadInput(error.what, where=origin, hint=error.hint) from error


def _how_to_repeat(name: str, origin: str) -> str:
    base = name.partition("@")[0]
    if _class(base, origin).repeatable:
        return f"tell them apart by labels: {base}@first, {base}@second"
    return "a pass runs once; put its parameters into one entry"


def _make(name: str, values: Mapping[str, Any], origin: str) -> Pass:
    base, labelled, label = name.partition("@")
    cls = _class(base, origin)
    if labelled and not cls.repeatable:
        raise BadInput(f"pass {base} runs once and takes no label", where=origin, hint=f"write {base}")
    if labelled and not LABEL.fullmatch(label):
        raise BadInput(f"'{label}' is no label", where=origin, hint="letters, digits, - and _")
    made = _configured(cls, values, origin)
    # Records, keys of applications and what is left out go by this name.
    made.name = name  # type: ignore[misc]
    return made


def _configured(cls: type[Pass], values: Mapping[str, Any], origin: str) -> Pass:
    name = cls.name
    if cls.Parameters is None:
        if values:
            raise BadInput(f"pass {name} takes no parameter '{next(iter(values))}'", where=origin)
        return cls()
    unknown = [key for key in values if key not in cls.Parameters.model_fields]
    if unknown:
        known = ", ".join(cls.Parameters.model_fields)
        raise BadInput(f"pass {name} takes no parameter '{unknown[0]}'", where=origin, hint=f"it takes: {known}")
    try:
        return cls(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"{name}.{key}: {problem['msg']}", where=origin) from error
