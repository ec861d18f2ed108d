"""The course of a run: what sees which way it goes, and may send it another way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from graphopt.bundles.backend import Rows, Truths
from graphopt.bundles.plan import Loop, Run
from graphopt.runtime import ending


class Course(Protocol):
    """Sees which way a run goes, and may send it another way. Steps are called by their names in the plan."""

    def branch(self, name: str, truth: bool) -> bool:
        """Whether a branch goes to ``then``; ``truth`` is what its condition says."""

    def turn(self, name: str, number: int, truth: bool) -> bool:
        """Whether a loop takes its turn of that number; ``truth`` is what its limits and conditions say.

        False ends the loop. The last number asked for is the number of turns that were taken. A loop that has a limit
        of slices cannot be sent beyond it.
        """

    def run(self, block: str, makes: Sequence[str]) -> None:
        """A block has run, for these values of the plan."""


@runtime_checkable
class SampleCourse(Protocol):
    """A course that sees which sample decides; another is asked without that, sample by sample."""

    def branch_of(self, name: str, sample: int, truth: bool) -> bool:
        """As `Course.branch`, for one sample."""

    def turn_of(self, name: str, sample: int, number: int, truth: bool) -> bool:
        """As `Course.turn`, for one sample."""


def decide_branch(course: Course | None, name: str) -> Callable[[Rows, Truths], Truths]:
    """How a course decides a branch for samples."""
    if course is None:
        return lambda samples, truths: truths
    if isinstance(course, SampleCourse):
        ask = course.branch_of
        return lambda samples, truths: _array(
            ask(name, int(sample), bool(truth)) for sample, truth in zip(samples, truths, strict=True)
        )
    return lambda samples, truths: _array(course.branch(name, bool(truth)) for truth in truths)


def decide_turn(course: Course | None, step: Loop) -> Callable[[Rows, int, Truths], Truths]:
    """How a course decides a turn for samples."""
    name = step.loop
    if course is None:
        return _decide_bare_turns if runs_nothing(step) else lambda samples, turn, truths: truths
    if isinstance(course, SampleCourse):
        ask = course.turn_of
        return lambda samples, turn, truths: _array(
            ask(name, int(sample), turn, bool(truth)) for sample, truth in zip(samples, truths, strict=True)
        )
    return lambda samples, turn, truths: _array(course.turn(name, turn, bool(truth)) for truth in truths)


def runs_nothing(step: Loop) -> bool:
    """Whether a loop may take turns without running a block."""
    return not any(isinstance(inner, Run) for inner in step.body)


def decide_bare_turn(turn: int, truth: bool) -> bool:
    """How a loop that may run nothing goes on without a course: others notice at a block that their run was ended."""
    ending.go_on()
    return truth


def _decide_bare_turns(samples: Rows, turn: int, truths: Truths) -> Truths:
    ending.go_on()
    return truths


def _array(truths: Iterable[bool]) -> Truths:
    return np.fromiter(truths, np.bool_)
