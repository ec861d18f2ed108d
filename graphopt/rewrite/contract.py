"""The contract of a pass: its name, what it may do to the numbers, when it runs, and how it explains itself."""

from __future__ import annotations

import enum
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
        Parameters: A pydantic model of the pass's parameters, or None where it has none. ``--set name.key=value``
            sets them.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    stage: ClassVar[Stage]
    explanation: ClassVar[Explanation]
    Parameters: ClassVar[type[BaseModel] | None] = None

    def __init__(self, parameters: Mapping[str, object] | None = None) -> None:
        self.parameters = None if self.Parameters is None else self.Parameters.model_validate(parameters or {})

    @abstractmethod
    def apply(self, ctx: Context) -> None:
        """Rewrite ``ctx.model`` in place, through ``ctx``."""


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
