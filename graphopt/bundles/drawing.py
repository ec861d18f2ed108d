"""A plan drawn as lines of text: which block leads where, what goes between, how often each ran."""

from __future__ import annotations

from collections import Counter
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
    drawing = _Drawing(plan, profile, whole, {} if whole else shortened(_names(plan)))
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
    shorter: dict[str, str]

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
        told = f", {len(step.path)} decisions" if step.path else ""
        head = f"if {self.short(step.condition)}{_EACH if step.each else ''}:  [{self.short(step.branch)}{told}]"
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
        return self.shorter.get(name, name)


def shortened(names: Iterable[str], width: int = _NAME) -> dict[str, str]:
    """Long names shortened, no two of them alike.

    The end of a name tells values apart better than its beginning. Where several end alike their beginnings are shown
    too, and where that is not enough a number.
    """
    long = [name for name in dict.fromkeys(names) if len(name) > width]
    ends = Counter(name[3 - width :] for name in long)
    half = (width - 3) // 2
    taken: dict[str, str] = {}
    for name in long:
        end = f"...{name[3 - width :]}"
        short = base = end if ends[name[3 - width :]] == 1 else f"{name[:half]}...{name[half + 3 - width :]}"
        number = 1
        while short in taken:
            number += 1
            short = f"{base}#{number}"
        taken[short] = name
    return {name: short for short, name in taken.items()}


def _names(plan: Plan) -> Iterator[str]:
    """Every name that is drawn."""
    yield from (port.name for port in plan.inputs)
    yield from (name for pair in plan.gives.items() for name in pair)
    for step in walk(plan.steps):
        if isinstance(step, Run):
            yield from (*step.reads.values(), *step.makes.values())
        elif isinstance(step, Branch):
            yield from (step.branch, step.condition)
            yield from (name for gives, pair in step.gives.items() for name in (gives, *pair))
        else:
            told = (step.loop, step.trips, step.condition, step.again, step.counter and step.counter.name)
            states = [name for state in step.state for name in (state.name, state.start, state.next, state.gives)]
            parts = [name for part in step.slices for name in (part.name, part.of)]
            stacks = [name for stack in step.stacks for name in (stack.each, stack.gives)]
            yield from (name for name in (*told, *states, *parts, *stacks) if name)


def _part(count: int, of: int) -> str:
    return f"{count:,} of {of:,}" + (f" ({count / of:.0%})" if of else "")


def _times(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
