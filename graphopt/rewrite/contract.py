"""The contract of a pass: its name, what it may do to the numbers, when it runs, and how it explains itself."""

from __future__ import annotations

import enum
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import BaseModel

    from graphopt.rewrite.context import Context


class Kind(enum.StrEnum):
    """What a pass promises about the numbers; verification holds it to that."""

    BITWISE = "bitwise"
    """The same bits in every output."""
    ROUNDING = "rounding"
    """No further from the float64 result than four times the original is, plus one eps of the dtype."""
    LOSSY = "lossy"
    """Within the budget that the user named. There is no default budget."""


class Saves(enum.StrEnum):
    """What a pass makes less of; ``ctx.replace`` makes no replacement that does not."""

    TIME = "time"
    """The target's cost profile calls the new nodes cheaper than the old ones."""
    BYTES = "bytes"
    """The constants that the new nodes read take fewer bytes than those that the old nodes read.

    Each reader of a constant is judged for itself: the pass sees to it that all of them share the new one.
    """


class Stage(enum.IntEnum):
    """When a pass runs. Order matters: merging after pruning destroys masks, quantising before rotating is wrong."""

    IMPORT = 0
    MERGE = 1
    SLICE = 2
    ELIMINATE = 3
    FACTORIZE = 4
    ROTATE = 5
    SPARSIFY = 6
    QUANTISE = 7
    FUSE = 8
    SPLIT = 9
    FINALISE = 10


@dataclass(frozen=True)
class Parameter:
    """A parameter of a pass, for people.

    Attributes:
        name: Its key.
        required: Whether it must be given.
        default: What it is where it is not given; None where it must be.
        description: What it is.
    """

    name: str
    required: bool
    default: object
    description: str


@dataclass(frozen=True)
class Explanation:
    """What ``graphopt passes NAME`` prints.

    Attributes:
        matches: What the pass looks for.
        refuses: What looks alike and is left alone, and why.
        costs: What it costs to run, and what it gains.
        source: The paper or specification it follows.
    """

    matches: str
    refuses: str
    costs: str
    source: str


class Pass(ABC):
    """One rewrite of a model.

    A pass changes the model only through ``ctx.replace`` and ``ctx.replace_with_constant``. It contains no timing,
    no verification and no logging: the manager attaches those.

    Attributes:
        name: Unique, lower case, words joined by ``-``.
        kind: The promise about the numbers.
        stage: When it runs.
        explanation: What it does, for people.
        saves: By what its replacements are judged: time, or the bytes of constants where it makes a model smaller and
            not faster.
        patient: Whether it runs only where the passes of its stage before it found nothing to do.
        repeatable: Whether a recipe may name it more than once, as ``name@label``: it does something else each time.
        Parameters: A pydantic model of the pass's parameters, or None where it has none. ``--set name.key=value``
            sets them; the ``Attributes:`` of its docstring say what they are.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    stage: ClassVar[Stage]
    explanation: ClassVar[Explanation]
    saves: ClassVar[Saves] = Saves.TIME
    patient: ClassVar[bool] = False
    repeatable: ClassVar[bool] = False
    Parameters: ClassVar[type[BaseModel] | None] = None

    @classmethod
    def summary(cls) -> str:
        """What the pass does, on one line: the first paragraph of its docstring."""
        return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())

    @classmethod
    def explain_parameters(cls) -> list[Parameter]:
        """The parameters of the pass, each described by its field or by the ``Attributes:`` of the docstring."""
        model = cls.Parameters
        if model is None:
            return []
        return [
            Parameter(
                name,
                field.is_required(),
                None if field.is_required() else field.get_default(call_default_factory=True),
                field.description or _attribute(model, name),
            )
            for name, field in model.model_fields.items()
        ]

    def __init__(self, parameters: Mapping[str, object] | None = None) -> None:
        self.parameters = None if self.Parameters is None else self.Parameters.model_validate(parameters or {})

    @property
    def asked(self) -> bool:
        """Whether the parameters ask for anything. A recipe can name a pass that waits for the user's budget."""
        return True

    @abstractmethod
    def apply(self, ctx: Context) -> None:
        """Rewrite ``ctx.model`` in place, through ``ctx``."""

    def remark(self, ctx: Context) -> str:
        """What is to be said when all passes have run, of what became of this one's work; empty where nothing is."""
        return ""


def as_setting(value: object) -> str:
    """A parameter's value as one would write it after ``--set``."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, (tuple, list)) else str(value)


def _attribute(cls: type[object], name: str) -> str:
    """What the ``Attributes:`` section of a class's docstring says of one of them, on one line."""
    told = inspect.getdoc(cls) or ""
    found = re.search(rf"^ {{4}}{name}: (.*?)(?=^ {{0,4}}\S|\Z)", told, re.MULTILINE | re.DOTALL)
    return "" if found is None else " ".join(found[1].split())


class ForeignPass(Pass):
    """A pass of another library, which changes the model its own way. It counts as one application.

    Nothing inside it can be undone by itself: where verification fails, the whole pass is left out.
    """

    def apply(self, ctx: Context) -> None:
        if not ctx.allows_foreign(self.name):
            return
        if self.rewrite_model(ctx):
            ctx.record_foreign(self.name)

    @abstractmethod
    def rewrite_model(self, ctx: Context) -> bool:
        """Rewrite ``ctx.model`` in place by any means. Returns whether it changed."""
