"""The exported model against the module on every side of every decision.

First the inputs alone decide; then decisions are forced, in the module and in the model alike, until each decision
that the model takes was seen both ways. Loops are forced to stop after none, one and some turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.exporting.branches.deciding import MOST_TURNS, TURNS
from graphopt.exporting.branches.decisions import Decision
from graphopt.exporting.branches.errors import Refusal
from graphopt.exporting.branches.following import Dictated, Endless, Followed, Follower, Misaligned, Table
from graphopt.exporting.branches.patching import patched
from graphopt.exporting.branches.places import somewhere
from graphopt.exporting.branches.state import preserved
from graphopt.exporting.branches.tracing import Traced, forward_through

_SOME = 3  # turns that a loop is forced to take
_ENOUGH = 1_000  # turns of the loops of a forced run, or twice those of a run that is not, where these are more
_TRIES = 24  # at random, for decisions that their own path does not reach
_FREE = -1

Run = Callable[[int], list[Any]]  # of the module on the inputs of case n; its outputs


@dataclass
class Forced:
    """One forced run of the module.

    Attributes:
        case: Which inputs.
        table: What was forced; see `deciding`.
        outputs: What the module returned.
    """

    case: int
    table: Table
    outputs: list[Any]


@dataclass
class Coverage:
    """Which sides of which decisions were compared.

    Attributes:
        decisions: How many the model takes.
        by_inputs: Sides that the inputs alone reached.
        forced: Sides that had to be forced.
        raising: Sides on which the module raises.
        runs: The forced runs.
    """

    decisions: int
    by_inputs: int
    forced: int
    raising: int
    runs: list[Forced]


def force_paths(
    module: Any, traced: Traced, numbers: set[int], cases: int, run: Run, same: Callable[[list[Any], list[Any]], bool]
) -> Coverage:
    """Run ``module`` until both sides of all decisions ``numbers`` were seen.

    Args:
        module: The module.
        traced: What its trace found.
        numbers: The decisions that the model takes.
        cases: How many inputs there are.
        run: Calls the module on the inputs of a case.
        same: Whether two lists of outputs are the same, to the comparison's tolerance.

    Raises:
        Refusal: A side cannot be reached, or the outlined code is not the module.
        Misaligned: The module does not decide on real values what it decided in the trace.
    """
    return _Paths(module, traced, numbers, cases, run, same).covered()


class _Paths:
    def __init__(self, module: Any, traced: Traced, numbers: set[int], cases: int, run: Run, same: Any) -> None:
        self.module, self.run, self.cases, self.same = module, run, cases, same
        self.course = traced.course
        self.decisions = [d for d in self.course.numbered if d.number in numbers]
        # Where the trace raised, the model has no branch: the module has to raise there too.
        self.raising = [d for d in self.course.numbered if d.number not in numbers and d.raises]
        self.count = len(self.course.numbered)
        self.follower = Follower(self.course)
        self.turned = 0  # the most turns of a run that is not forced
        self.seen: set[tuple[int, bool]] = set()
        self.raised: set[tuple[int, bool]] = set()
        self.runs: list[Forced] = []
        self.answers: list[Followed] = []

    def covered(self) -> Coverage:
        with patched(self.module, self.follower), forward_through(self.module, self.follower.follow):
            natural = [self.attempt(self.free(), case) for case in range(self.cases)]
            by_inputs = len(self.seen & self.sides())
            self.force_all()
        for case, followed in enumerate(natural):
            if followed is not None:
                self.refuse_other(case, followed)
        self.prefer_own_code()
        sides = self.sides()
        return Coverage(len(self.decisions), by_inputs, len(self.seen & sides) - by_inputs, len(self.raised), self.runs)

    def sides(self) -> set[tuple[int, bool]]:
        """What has to be seen: both sides of what the model decides, and sides that raise."""
        both = {(d.number, truth) for d in self.decisions for truth in (True, False) if d.number is not None}
        return both | {(d.number, truth) for d in self.raising for truth in d.raises if d.number is not None}

    def free(self) -> Table:
        return np.full((max(self.count, 1), TURNS), _FREE, np.int8)

    # Runs of the outlined code.

    def attempt(self, table: Table, case: int) -> Forced | None:
        """Run the module as ``table`` says, and keep it; None where it raises or does not end."""
        forced = bool((table != _FREE).any())
        self.follower.begin(table, max(_ENOUGH, 2 * self.turned) if forced else MOST_TURNS)
        try:
            with preserved(self.module):
                outputs = self.run(case)
        except Endless:
            return None
        except Exception:
            self.raised |= {side for side in self.follower.followed.taken if self.raises(side)}
            return None
        if not forced:
            self.turned = max(self.turned, self.follower.turned)
        self.seen.update(self.follower.followed.taken)
        made = Forced(case, table, outputs)
        self.runs.append(made)
        self.answers.append(self.follower.followed)
        return made

    def raises(self, side: tuple[int, bool]) -> bool:
        return side[1] in self.course.numbered[side[0]].raises

    def force_all(self) -> None:
        """Force what the inputs did not reach."""
        for truth in (False, True):
            if self.missing():
                self.attempt(self.uniform(truth), 0)
        for decision, truth in list(self.missing_sides()):
            if (decision.number, truth) not in self.seen | self.raised:
                self.force_one(decision, truth)
        generator = np.random.default_rng(0)
        for number in range(_TRIES if self.missing() else min(2, len(self.decisions))):
            if number < 2 or self.missing():
                self.attempt(self.ending(generator.integers(0, 2, (max(self.count, 1), 1))), number % self.cases)
        for decision, truth in self.missing_sides():
            raise Refusal(
                f"the decision could not be made {str(truth).lower()}, so what it leads to cannot be compared",
                decision.place,
            )

    def missing_sides(self) -> Iterator[tuple[Decision, bool]]:
        sides = self.sides()
        for decision in [*self.decisions, *self.raising]:
            for truth in (True, False):
                side = (decision.number, truth)
                if side in sides and side not in self.seen | self.raised:
                    yield decision, truth

    def missing(self) -> bool:
        return next(self.missing_sides(), None) is not None

    def force_one(self, decision: Decision, truth: bool) -> None:
        """Force ``decision`` to ``truth``, and those before it so that it is reached; on each case's inputs in turn."""
        assert decision.number is not None
        forced = dict((*decision.path, (decision.number, truth)))
        for case in range(self.cases):
            for turns in (_SOME, 1):
                self.until_seen(forced, (decision.number, truth), (case + decision.number) % self.cases, turns)
                if (decision.number, truth) in self.seen | self.raised:
                    return

    def until_seen(self, forced: dict[int, bool], side: tuple[int, bool], case: int, turns: int) -> None:
        """Run as ``forced``; until ``side`` is seen, with the last decision that was free the other way, and so on.

        What is decided on the way to a side is not all known: flags that depend on other decisions are not forced.
        """
        forced = dict(forced)
        for _ in range(_TRIES):
            table = self.free()
            for number, before in forced.items():
                table[number] = self.ending(np.array([[before]]), turns)[0]
            self.attempt(table, case)
            free = [(number, truth) for number, truth in self.follower.followed.taken if number not in forced]
            if side in self.seen | self.raised or not free:
                return
            forced[free[-1][0]] = not free[-1][1]

    def uniform(self, truth: bool) -> Table:
        return self.ending(np.full((max(self.count, 1), 1), truth))

    @staticmethod
    def ending(truths: np.ndarray[Any, Any], turns: int = _SOME) -> Table:
        """A table of ``truths`` in the first turns of a loop and the opposite after, so that loops end."""
        column = np.arange(TURNS)[None, :]
        return np.where(column < turns, truths, 1 - truths.astype(np.int8)).astype(np.int8)

    # Runs of the user's own code.

    def refuse_other(self, case: int, followed: Forced) -> None:
        """Refuse where the outlined code gives something else than the user's on the same inputs."""

        def own() -> list[Any]:
            with preserved(self.module):
                return self.run(case)

        expected = own()
        self.refuse_unlike(expected, followed, own)
        followed.outputs = expected

    def refuse_unlike(self, expected: list[Any], followed: Forced, again: Callable[[], list[Any]]) -> None:
        """Refuse where the outlined code gave something else than ``expected``, which the user's own gave."""
        if self.same(expected, followed.outputs):
            return
        if not self.same(expected, again()):
            raise Refusal("the module gives something else each time: it uses random numbers or keeps state", None)
        raise Refusal("the module does not compute the same when its source is taken apart", None)

    def prefer_own_code(self) -> None:
        """Take the outputs of the user's own code wherever it can be given the same answers."""
        for forced, followed in zip(self.runs, self.answers, strict=True):
            if not followed.faithful or not (forced.table >= 0).any():
                continue
            with contextlib.suppress(Misaligned, Exception):
                outputs = self.dictated(forced.case, followed)
                self.refuse_unlike(outputs, forced, lambda: self.dictated(forced.case, followed))  # noqa: B023
                forced.outputs = outputs

    def dictated(self, case: int, followed: Followed) -> list[Any]:
        """What the user's own code returns, given the answers of ``followed``.

        Raises:
            Misaligned: It asks something else.
        """
        mode = Dictated(followed.answers)
        with preserved(self.module), mode:
            outputs = self.run(case)
        if mode.answers:
            raise Misaligned(somewhere())
        return outputs
