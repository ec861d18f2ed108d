"""How often what a plan says was done: counted while a bundle runs, kept beside its plan, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from graphopt.bundles.plan import Branch, Plan, Run, Step
from graphopt.bundles.schema import STRICT, read_json

PROFILE = "profile.json"
LIKELY = 0.1
"""What at least this share of the inputs needs is likely."""


class _Part(BaseModel):
    model_config = STRICT


class Sides(_Part):
    """How often a branch went each way."""

    then: int = 0
    otherwise: int = 0

    @property
    def asked(self) -> int:
        """How often its condition was asked."""
        return self.then + self.otherwise


class Turns(_Part):
    """How often a loop turned.

    Attributes:
        entered: How often it was come to.
        begun: How often it took one turn at least.
        turns: All turns together.
        most: Of one time.
    """

    entered: int = 0
    begun: int = 0
    turns: int = 0
    most: int = 0


class Trial(_Part):
    """A straight line for paths, tried out (`graphopt.bundles.specialised`).

    Attributes:
        paths: The Ifs on each path, and whether they go to ``then``.
        shares: Of the inputs, how many go each.
        faster: How many times as fast as without it, by processor time over all inputs; with the interval, and on
            inputs that go the path or none of them; empty where it was not timed.
        kept: Whether it is in the bundle.
        reason: Why it is not, or was not timed.
    """

    paths: list[dict[str, bool]]
    shares: list[float]
    faster: dict[Literal["value", "low", "high", "on", "off"], float] = {}
    kept: bool = False
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self.model_dump()

    def told(self) -> str:
        """In words, for people; one line."""
        several = f"{len(self.paths)} paths" if len(self.paths) > 1 else "a path"
        counts = "+".join(str(len(path)) for path in self.paths)
        decisions = "decision" if counts == "1" else "decisions"
        what = f"{several} of {counts} {decisions}, taken by {sum(self.shares):.0%} of the inputs"
        if not self.faster:
            return f"{what}: {self.reason}"
        found = self.faster
        told = f"as a straight line {found['value']:.2f} times as fast ({found['low']:.2f} to {found['high']:.2f})"
        return f"{what}: {told}, {'kept' if self.kept else f'not kept: {self.reason}'}"


class Profile(_Part):
    """What was counted.

    Attributes:
        version: Of this schema.
        inputs: How many inputs were run.
        runs: For each run of the plan, by the first value that it makes, how often it was done.
        branches, loops: By the names that they have in the plan.
        trials: Straight lines that were tried out.
    """

    version: Literal[1] = 1
    inputs: int = 0
    runs: dict[str, int] = {}
    branches: dict[str, Sides] = {}
    loops: dict[str, Turns] = {}
    trials: list[Trial] = []

    def to_json(self) -> str:
        """As it is written to a file."""
        return self.model_dump_json(indent=2) + "\n"


class Counts:
    """The course of runs, watched and not changed; ``profile.inputs`` is the caller's to count.

    Attributes:
        profile: What was counted so far.
    """

    def __init__(self) -> None:
        self.profile = Profile()

    def branch(self, name: str, truth: bool) -> bool:
        """One more time that way."""
        sides = self.profile.branches.setdefault(name, Sides())
        if truth:
            sides.then += 1
        else:
            sides.otherwise += 1
        return truth

    def turn(self, name: str, number: int, truth: bool) -> bool:
        """One more turn, or the end of a loop."""
        counted = self.profile.loops.setdefault(name, Turns())
        counted.entered += number == 0
        if truth:
            counted.begun += number == 0
            counted.turns += 1
            counted.most = max(counted.most, number + 1)
        return truth

    def run(self, block: str, makes: Sequence[str]) -> None:
        """One more run."""
        runs = self.profile.runs
        runs[makes[0]] = runs.get(makes[0], 0) + 1


def read_profile(version: Path) -> Profile | None:
    """The profile in the folder of a bundle's version; None where there is none.

    Raises:
        BadInput: There is a file of that name, and it is none.
    """
    path = version / PROFILE
    return read_json(path, Profile, "profile", "remove it, or write it anew") if path.is_file() else None


def likely_blocks(plan: Plan, profile: Profile | None) -> list[str]:
    """The blocks that an input is likely to need, in the order in which they are first needed.

    Args:
        plan: Of a bundle.
        profile: What was counted on it; None: likely is only what every run comes to.
    """
    needed = (name for name, share in _shares(plan.steps, profile, 1.0) if share >= LIKELY)
    return list(dict.fromkeys(needed))


def _shares(steps: Sequence[Step], profile: Profile | None, share: float) -> Iterator[tuple[str, float]]:
    """The blocks of steps in their order, and the share of inputs that comes to each where ``share`` comes to these.

    What a branch and one in it decide is taken as independent.
    """
    for step in steps:
        if isinstance(step, Run):
            yield step.run, share
        elif isinstance(step, Branch):
            sides = (profile.branches.get(step.branch) if profile else None) or Sides()
            for inner, taken in ((step.then, sides.then), (step.otherwise, sides.otherwise)):
                yield from _shares(inner, profile, share * taken / max(sides.asked, 1))
        else:
            turns = (profile.loops.get(step.loop) if profile else None) or Turns()
            yield from _shares(step.body, profile, share * turns.begun / max(turns.entered, 1))
