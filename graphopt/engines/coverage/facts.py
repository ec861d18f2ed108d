"""What a target's library takes and refuses, read from the YAML file of the target."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from graphopt.errors import BadInput

HERE = Path(__file__).parent
_ALL_BUT = "all but "


class Rule(BaseModel):
    """One form of one or more operators that the library refuses.

    Attributes:
        op: The operators.
        when: Conditions that must all hold, each a name of ``conditions.CONDITIONS`` with its arguments.
        reason: What is wrong, with the conditions' findings in braces.
        hint: What to do about it; the name of a hint of the file, or the text.
        stage: Whether the parser refuses the node, or the builder later, or the library crashes.
        tried: Whether the library was seen to; None: as the file says.
        own: Says nothing of other libraries: it is a matter of kernels, or of a fault.
    """

    model_config = ConfigDict(extra="forbid")

    op: tuple[str, ...]
    when: tuple[dict[str, Any], ...]
    reason: str
    hint: str
    stage: Literal["parse", "build", "crash"] = "parse"
    tried: bool | None = None
    own: bool = False


class Types(BaseModel):
    """The element types that the library has, by where they stand.

    Attributes:
        inputs: Of the network's inputs and outputs.
        weights: Of constants.
        values: Of results between nodes.
        converted: Constants of the first are read as the second.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: frozenset[str]
    weights: frozenset[str]
    values: frozenset[str]
    converted: dict[str, str] = Field(default_factory=dict)


class Facts(BaseModel):
    """All that is known of one library.

    Attributes:
        title: What messages call it.
        version: The version the facts were found with, or read of.
        tried: Whether they were seen with the library itself.
        operators: What its parser knows by name, whatever the domain.
        since: Operator -> the version of the library that came with it, where that is not the oldest supported.
        refused: Standard operators that it refuses in all forms, with the hint for each.
        foreign: Domain -> its operators that the parser reads as they are meant. It takes others for the standard
            operator of the same name.
        groups: Names for lists of operators, to write rules with.
        hints: Names for hints.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    version: str
    tried: bool
    types: Types
    operators: frozenset[str]
    since: dict[str, str] = Field(default_factory=dict)
    refused: dict[str, str] = Field(default_factory=dict)
    foreign: dict[str, frozenset[str]] = Field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    hints: dict[str, str] = Field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def by_operator(self) -> dict[str, list[Rule]]:
        """The rules of each operator, in the order of the file."""
        made: dict[str, list[Rule]] = {}
        for rule in self.rules:
            for name in rule.op:
                for op in self.members(name):
                    made.setdefault(op, []).append(rule)
        return made

    def members(self, name: str) -> tuple[str, ...]:
        """The operators of a group, or the one operator of that name. ``all but a b`` is every other operator."""
        if name.startswith(_ALL_BUT):
            return tuple(sorted(self.operators - frozenset(name.removeprefix(_ALL_BUT).split())))
        return self.groups.get(name, (name,))

    def hint(self, text: str) -> str:
        """A hint by its name, or the text itself."""
        return self.hints.get(text, text)


@cache
def facts(target: str) -> Facts:
    """What is known of a target's library.

    A file that is ``like`` another one starts from what that says, without rules that are its ``own`` and with the
    refused operators that it ``runs``.

    Raises:
        BadInput: Nothing is known of such a target.
    """
    path = HERE / f"{target}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in HERE.glob("*.yaml")))
        raise BadInput(f"no operator coverage is known for {target!r}", hint=f"there are {known}")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    base, runs = data.pop("like", None), data.pop("runs", ())
    if base is not None:
        other = facts(base)
        data = {
            **other.model_dump(exclude={"rules", "refused"}),
            "rules": [rule for rule in other.rules if not rule.own],
            "operators": [*other.operators, *runs],
            "refused": {op: hint for op, hint in other.refused.items() if op not in runs},
            **data,
        }
    return Facts.model_validate(data)
