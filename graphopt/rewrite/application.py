"""What was done to a model: the record of one replacement, and who is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import onnx_ir as ir

from graphopt.rewrite.contract import Kind


@dataclass
class Application:
    """One replacement that a pass made.

    Attributes:
        key: Identifies it in every run on the same model: ``pass:rule@value``, ``#n`` appended from the second on.
        pass_name: The pass.
        rule: The rule within the pass.
        kind: What the pass promises about the numbers.
        sources: Names of the nodes that it made superfluous.
        graph: Name of the graph it happened in.
        outputs: Pairs of names: the value replaced, its replacement.
    """

    key: str
    pass_name: str
    rule: str
    kind: Kind
    sources: list[str] = field(default_factory=list)
    graph: str = ""
    outputs: list[tuple[str, str]] = field(default_factory=list)


class Checkpoint(Enum):
    """Where whole models can be compared."""

    ROUND_DONE = "round done"
    BEFORE_LOSSY = "before a lossy pass"
    AFTER_LOSSY = "after a lossy pass"


class Observer(Protocol):
    """Something that watches replacements: verification, bisection, a dump. Called before the model changes."""

    def replacing(
        self, application: Application, outputs: Mapping[ir.Value, ir.Value], nodes: Sequence[ir.Node]
    ) -> None:
        """A replacement is about to happen.

        Args:
            application: Its record.
            outputs: The values to be replaced, each with its replacement.
            nodes: New nodes, in topological order, that no graph holds yet.
        """

    def rewritten(self, model: ir.Model) -> None:
        """A foreign pass has changed the model its own way."""

    def checkpoint(self, model: ir.Model, reached: Checkpoint) -> None:
        """The passes have got so far."""
