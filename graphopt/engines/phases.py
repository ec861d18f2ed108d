"""How far a build is, from the phases that the library reports."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass
class _Phase:
    within: str
    steps: int
    done: int = 0


class Phases:
    """The phases that are going on, one inside the other, each a number of steps.

    A phase counts for one step of the one that it is inside. How many phases there will be is not known
    beforehand, so the fraction is that of the outermost one that is going on, and never goes back.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._furthest = 0.0

    @property
    def now(self) -> str:
        """The innermost phase, or nothing."""
        return next(reversed(self._open), "")

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        return self._furthest

    def read(self, line: str) -> None:
        """Take in one line of what the child writes; half a line, of a child that was killed, is passed over."""
        try:
            said = json.loads(line)
        except ValueError:
            return
        if "start" in said:
            self._open[said["start"]] = _Phase(said["within"], max(int(said["steps"]), 1))
        elif "of" in said and said["of"] in self._open:
            self._open[said["of"]].done = int(said["step"]) + 1
        elif "finish" in said:
            self._open.pop(said["finish"], None)
        self._furthest = max(self._furthest, self._reached())

    def _reached(self) -> float:
        """Walk from the outermost phase inwards: each step holds the phase below it."""
        reached, width, within = 0.0, 1.0, ""
        while True:
            phase = next((name for name, one in self._open.items() if one.within == within), None)
            if phase is None:
                return min(reached, 1.0)
            steps = self._open[phase].steps
            reached += width * min(self._open[phase].done, steps) / steps
            width, within = width / steps, phase
