"""A plan drawn as lines of text: which block leads where, what goes between, how often each ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graphopt.bundles.plan import Branch, Loop, Plan, Run, Step, walk
from graphopt.bundles.profile import Profile

_NAME = 28
_MOST_VALUES = 3
_EACH = ", each sample for itself"


@dataclass(frozen=True)
class Line:
    """A line of the drawing.

    Attributes:
        depth: How deep it is in branches and loops.
        text: What is done.
        ran: How often, where that was counted; else empty.
    """

    depth: int
    text: str
    ran: str = ""


def draw(plan: Plan, profile: Profile | None = None, *, whole: bool = False) -> list[Line]:
    """Draw a plan.

    Args:
        plan: Of a bundle.
        profile: What was counted on it.
        whole: Whether names and lists of values are written out, however long they are.
    """
    drawing = _Drawing(plan, profile, whole)
    inputs = drawing.values(port.name for port in plan.inputs)
    renamed = [drawing.pair(name, value) for name, value in plan.gives.items()]
    told = "" if profile is None else _times(profile.inputs, "input")
    return [
        Line(0, f"takes {inputs}", told),
        *drawing.steps(plan.steps, 0),
        Line(0, f"gives {drawing.listed(renamed)}"),
    ]


def used_by(plan: Plan) -> dict[str, int]:
    """How many runs of a plan take each block."""
    counts = dict.fromkeys(plan.blocks, 0)
    for step in walk(plan.steps):
        if isinstance(step, Run):
            counts[step.run] = counts.get(step.run, 0) + 1
    return counts


@dataclass(frozen=True)
class _Drawing:
    plan: Plan
    profile: Profile | None
    whole: bool

    def steps(self, steps: Sequence[Step], depth: int) -> Iterator[Line]:
        for step in steps:
            if isinstance(step, Run):
                yield self.run(step, depth)
            elif isinstance(step, Branch):
                yield from self.branch(step, depth)
            else:
                yield from self.loop(step, depth)

    def run(self, step: Run, depth: int) -> Line:
        text = f"run {step.run}: {self.values(step.reads.values())} -> {self.values(step.makes.values())}"
        ran = "" if self.profile is None else f"{self.profile.runs.get(next(iter(step.makes.values()), ''), 0):,}"
        return Line(depth, text, ran)

    def branch(self, step: Branch, depth: int) -> Iterator[Line]:
        sides = None if self.profile is None else self.profile.branches.get(step.branch)
        then, otherwise = (0, 0) if sides is None else (sides.then, sides.otherwise)
        head = f"if {self.short(step.condition)}{_EACH if step.each else ''}:  [{self.short(step.branch)}]"
        for inner, (word, steps, taken) in enumerate(((head, step.then, then), ("else:", step.otherwise, otherwise))):
            yield Line(depth, word, "" if self.profile is None else _part(taken, then + otherwise))
            yield from self.steps(steps, depth + 1)
            gives = [self.pair(name, pair[inner]) for name, pair in step.gives.items()]
            yield Line(depth + 1, self.listed(gives))

    def loop(self, step: Loop, depth: int) -> Iterator[Line]:
        limits = [f"at most {self.short(step.trips)} turns"] if step.trips is not None else []
        limits += [f"if {self.short(step.condition)}"] if step.condition is not None else []
        limits += [f"each {self.short(part.name)} of {self.short(part.of)}" for part in step.slices]
        told = ""
        if self.profile is not None:
            counted = self.profile.loops.get(step.loop)
            turns, entered, most = (counted.turns, counted.entered, counted.most) if counted else (0, 0, 0)
            told = f"{_times(turns, 'turn')} in {entered:,}, {most:,} at most"
        head = " ".join(["loop", ", ".join(limits)]).rstrip() + (_EACH if step.each else "")
        yield Line(depth, f"{head}:  [{self.short(step.loop)}]", told)
        if step.state:
            yield Line(depth + 1, f"begin with {self.listed([self.pair(s.name, s.start) for s in step.state])}")
        if step.counter is not None:
            yield Line(depth + 1, f"count turns in {self.short(step.counter.name)}")
        yield from self.steps(step.body, depth + 1)
        if step.state:
            yield Line(depth + 1, f"hand on {self.listed([self.pair(s.name, s.next) for s in step.state])}")
        if step.stacks:
            yield Line(depth + 1, f"collect {self.listed([self.pair(s.gives, s.each) for s in step.stacks])}")
        if step.again is not None:
            yield Line(depth + 1, f"again if {self.short(step.again)}")
        finals = [self.pair(state.gives, state.name) for state in step.state if state.gives is not None]
        if finals:
            yield Line(depth, f"then {self.listed(finals)}")

    def pair(self, name: str, value: str) -> str:
        return self.short(name) if name == value else f"{self.short(name)} = {self.short(value)}"

    def values(self, names: Iterable[str]) -> str:
        return self.listed([self.short(name) for name in names]) or "nothing"

    def listed(self, texts: Sequence[str]) -> str:
        if self.whole or len(texts) <= _MOST_VALUES + 1:
            return ", ".join(texts) or "nothing"
        return f"{', '.join(texts[:_MOST_VALUES])} and {len(texts) - _MOST_VALUES:,} more"

    def short(self, name: str) -> str:
        """The end of a long name, which tells values apart better than its beginning."""
        return name if self.whole or len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _part(count: int, of: int) -> str:
    return f"{count:,} of {of:,}" + (f" ({count / of:.0%})" if of else "")


def _times(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
