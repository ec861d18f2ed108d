"""The decisions of a module, each with a number that the traced graph and a run of the module share.

A run of a piece of code (a *region*) is told by its address: the region it ran in, what had been decided there by
then, and how many regions ran there before. The nth decision of a region has the address of the region and what was
decided before. The same path gives the same addresses, in a trace and in a run on real values alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from graphopt.exporting.branches.places import Place

Address = tuple[Any, ...]
Path = tuple[tuple[int, bool], ...]  # decisions and what they were decided to be


@dataclass
class Decision:
    """One decision of the traced module.

    Attributes:
        number: Its number, from 0; None where it follows from other decisions, or is the same in every run.
        place: The line that decides.
        path: What must have been decided, and how, to get here.
        raises: Truths for which the module raises an exception.
        ends: It is the condition of a ``while``.
    """

    number: int | None
    place: Place
    path: Path
    raises: set[bool] = field(default_factory=set)
    ends: bool = False


@dataclass
class Course:
    """What one trace found: the decisions by address, and how loops were taken.

    Attributes:
        decisions: Address → decision.
        transparent: Addresses of regions whose decisions belong to the region around them.
        staged: Addresses of loops that became one Loop.
        peeled: Those of them whose first turn stands before the Loop.
    """

    decisions: dict[Address, Decision] = field(default_factory=dict)
    transparent: set[Address] = field(default_factory=set)
    joined: set[Address] = field(default_factory=set)
    staged: set[Address] = field(default_factory=set)
    peeled: set[Address] = field(default_factory=set)
    numbered: list[Decision] = field(default_factory=list)

    def new_number(self) -> int:
        return len(self.numbered)


@dataclass
class Choice:
    """One decision in one run of a region.

    Attributes:
        condition: What was asked for its truth.
        truth: The answer.
        decision: What it is an instance of.
        tape: How many operators the run had called by then.
        of_value: One of the questions "is it 0, is it 1, …" about a number used as an index.
        settled: The answer is the same on every path.
    """

    condition: Any
    truth: bool
    decision: Decision
    tape: int = 0
    of_value: bool = False
    settled: bool = False


class Run:
    """One run of a region.

    Args:
        address: Of the region.
        path: What had been decided when it was entered.
    """

    def __init__(self, address: Address, path: Path) -> None:
        self.address = address
        self.entered_by = path
        self.log: list[Choice] = []
        self.children = 0

    def truths(self) -> tuple[bool, ...]:
        return tuple(choice.truth for choice in self.log)

    def next_child(self) -> Address:
        """The address of the region that is entered now."""
        self.children += 1
        return (self.address, self.truths(), self.children)

    def next_decision(self) -> Address:
        """The address of the decision that is taken now."""
        return (self.address, self.truths())

    def path(self) -> Path:
        taken = [(c.decision.number, c.truth) for c in self.log if c.decision.number is not None]
        return (*self.entered_by, *taken)


class Stack:
    """The runs that are under way, the innermost last."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    @property
    def top(self) -> Run:
        return self.runs[-1]

    def path(self) -> Path:
        return self.runs[-1].path() if self.runs else ()

    def next_child(self) -> Address:
        return self.runs[-1].next_child() if self.runs else ("top",)

    @contextmanager
    def entered(self, run: Run) -> Iterator[Run]:
        self.runs.append(run)
        try:
            yield run
        finally:
            self.runs.pop()

    def known_truth(self, condition: Any) -> bool | None:
        """What was decided about this very tensor on the path so far, or None."""
        for run in self.runs:
            for choice in run.log:
                if choice.condition is condition:
                    return choice.truth
        return None
