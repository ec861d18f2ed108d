"""A plan that was read is one that a host can follow: told before anything of it runs.

Each value is made once, before it is read and where it can be seen; each block gets what it takes; types fit. Every
step is looked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from graphopt.bundles.plan import Block, Branch, Loop, Plan, Port, Run, State, Step
from graphopt.bundles.ports import type_of, type_text
from graphopt.errors import BadInput

TRUTH, COUNT = "tensor(bool)", "tensor(int64)"
ANEW = "copy the bundle again, or write it anew"
"""What helps where a file of a bundle is not what it should be."""

_ENGINES = frozenset({"tensorrt", "tensorrt-rtx"})
_MOST_AXES = 64  # numpy's


def check_plan(plan: Plan, where: Path) -> None:
    """Refuse a plan that no host can follow.

    Args:
        plan: What was read.
        where: From which file.

    Raises:
        BadInput: What is wrong, and with which step: by its place, as in ``steps.1.else.0``.
    """
    _Checker(plan, where).check()


@dataclass
class _Checker:
    """Goes through a plan as a host does.

    Attributes:
        types: What can be read where the check stands: value -> its type.
        order: The values of ``types``, in the order in which they were made.
        made: All values so far, those that cannot be read any more included.
        steps_named: Branches and loops so far.
        inputs, outputs: Of each block: name -> type.
    """

    plan: Plan
    where: Path
    types: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    steps_named: set[str] = field(default_factory=set)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)

    def check(self) -> None:
        plan = self.plan
        for name, block in plan.blocks.items():
            self.block(name, block)
        for name, kind in self.ports(plan.inputs, "inputs").items():
            self.make(name, kind, "inputs")
        outputs = self.ports(plan.outputs, "outputs")
        self.same_names(plan.gives, outputs, "gives", "output")
        self.steps(plan.steps, "steps")
        for name, value in plan.gives.items():
            self.read(value, outputs[name], "gives")
        self.samples()

    def wrong(self, place: str, what: str) -> BadInput:
        return BadInput(f"is no plan: {place}: {what}", where=str(self.where), hint=ANEW)

    # -- values --------------------------------------------------------------------------------------------------------

    def make(self, name: str, kind: str, place: str) -> None:
        if not name:
            raise self.wrong(place, "makes a value without a name")
        if name in self.made:
            raise self.wrong(place, f"makes {name!r}, which is made already")
        self.made.add(name)
        self.order.append(name)
        self.types[name] = kind

    def read(self, name: str, wanted: str | None, place: str) -> str:
        """The type of a value; raises BadInput where it is not there, or is not of the type wanted."""
        kind = self.types.get(name)
        if kind is None:
            raise self.wrong(place, f"reads {name!r}, which is not there at this point")
        if wanted is not None and _content(kind) != _content(wanted):
            raise self.wrong(place, f"reads {name!r}, a {kind}, as a {wanted}")
        return kind

    def leave(self, count: int) -> None:
        """Out of a side or a body: what was made there cannot be read any more."""
        for name in self.order[count:]:
            del self.types[name]
        del self.order[count:]

    # -- descriptions --------------------------------------------------------------------------------------------------

    def port(self, port: Port, place: str) -> str:
        if not _is_type(port.type):
            raise self.wrong(place, f"{port.name!r} is of the unknown type {port.type!r}")
        return port.type

    def ports(self, ports: Sequence[Port], place: str) -> dict[str, str]:
        types = {port.name: self.port(port, place) for port in ports}
        if len(types) != len(ports):
            raise self.wrong(place, "two have the same name")
        return types

    def block(self, name: str, block: Block) -> None:
        place = f"blocks.{name}"
        self.inputs[name] = self.ports(block.inputs, f"{place}.inputs")
        self.outputs[name] = self.ports(block.outputs, f"{place}.outputs")
        if block.backend is not None and block.backend not in _ENGINES:
            raise self.wrong(place, f"is built for {block.backend!r}, which is unknown")

    def same_names(self, given: Iterable[str], wanted: Iterable[str], place: str, what: str) -> None:
        given, wanted = set(given), set(wanted)
        for name in sorted(given - wanted):
            raise self.wrong(place, f"there is no {what} {name!r}")
        for name in sorted(wanted - given):
            raise self.wrong(place, f"the {what} {name!r} is left out")

    def samples(self) -> None:
        samples = self.plan.samples
        for name, axis in samples.items():
            if name not in self.made:
                raise self.wrong("samples", f"there is no value {name!r}")
            self.axis(axis, 0, "samples")
        if samples and not any(port.name in samples for port in self.plan.inputs):
            raise self.wrong("samples", "no input has samples")
        for name, value in self.plan.gives.items() if samples else ():
            if value not in samples:
                raise self.wrong("samples", f"the output {name!r} has none")

    def axis(self, axis: int, least: int, place: str) -> None:
        if not least <= axis < _MOST_AXES:
            raise self.wrong(place, f"there is no axis {axis}")

    # -- steps ---------------------------------------------------------------------------------------------------------

    def steps(self, steps: Sequence[Step], place: str) -> None:
        for index, step in enumerate(steps):
            if isinstance(step, Run):
                self.run(step, f"{place}.{index}")
            elif isinstance(step, Branch):
                self.branch(step, f"{place}.{index}")
            else:
                self.loop(step, f"{place}.{index}")

    def run(self, step: Run, place: str) -> None:
        if step.run not in self.plan.blocks:
            raise self.wrong(place, f"there is no block {step.run!r}")
        inputs, outputs = self.inputs[step.run], self.outputs[step.run]
        self.same_names(step.reads, inputs, place, f"input of {step.run!r}")
        self.same_names({*step.makes, *outputs}, outputs, place, f"output of {step.run!r}")
        if not step.makes:
            raise self.wrong(place, f"runs {step.run!r} for nothing")
        for name, value in step.reads.items():
            self.read(value, inputs[name], place)
        for name, value in step.makes.items():
            self.make(value, outputs[name], place)

    def decision(self, name: str, each: bool, asked: Sequence[str | None], place: str) -> None:
        if name in self.steps_named:
            raise self.wrong(place, f"the name {name!r} is given twice")
        self.steps_named.add(name)
        if each and not self.plan.samples:
            raise self.wrong(place, "takes samples apart, and nothing has samples")
        for value in asked:
            if value in self.plan.samples and not each:
                raise self.wrong(place, f"asks {value!r}, which has samples, once for all")

    def branch(self, step: Branch, place: str) -> None:
        self.decision(step.branch, step.each, [step.condition], place)
        self.read(step.condition, TRUTH, place)
        gives: dict[str, str | None] = dict.fromkeys(step.gives)
        for side, (word, steps) in enumerate((("then", step.then), ("else", step.otherwise))):
            around = len(self.order)
            self.steps(steps, f"{place}.{word}")
            for name, pair in step.gives.items():
                gives[name] = self.read(pair[side], gives[name], f"{place}.{word}")
            self.leave(around)
        for name, kind in gives.items():
            if step.each and name not in self.plan.samples:
                raise self.wrong(place, f"takes samples apart, and {name!r} has none")
            self.make(name, kind or "", place)

    def loop(self, step: Loop, place: str) -> None:
        self.decision(step.loop, step.each, [step.trips, step.condition, step.again], place)
        if step.each and (step.slices or step.stacks):
            raise self.wrong(place, "takes samples apart, and cuts or stacks")
        for name, kind in ((step.trips, COUNT), (step.condition, TRUTH)):
            if name is not None:
                self.read(name, kind, place)
        states = [(state, self.start(state, place)) for state in step.state]
        cut = [(part.name, self.tensor(part.of, place)) for part in step.slices]
        for axis in (*(part.axis for part in step.slices), *(stack.axis for stack in step.stacks)):
            self.axis(axis, -_MOST_AXES, place)
        around = len(self.order)
        for port, kind in ((step.counter, COUNT), (step.goes, TRUTH)):
            if port is not None:
                if port.type != kind:
                    raise self.wrong(place, f"{port.name!r} is a {port.type}, and not a {kind}")
                self.make(port.name, kind, place)
        for name, kind in (*((state.name, kind) for state, kind in states), *cut):
            self.make(name, kind, place)
        body = f"{place}.body"
        self.steps(step.body, body)
        for state, kind in states:
            self.read(state.next, kind, body)
        for stack in step.stacks:
            self.read(stack.each, self.port(stack.part, place), body)
            self.tensor(stack.each, body)
        if step.again is not None:
            self.read(step.again, TRUTH, body)
        self.leave(around)
        for state, kind in states:
            if state.gives is not None:
                self.make(state.gives, kind, place)
        for stack in step.stacks:
            self.make(stack.gives, stack.part.type, place)

    def start(self, state: State, place: str) -> str:
        """The type of a state."""
        return self.read(state.start, None if state.like is None else self.port(state.like, place), place)

    def tensor(self, name: str, place: str) -> str:
        """The type of a value that is cut or stacked."""
        kind = self.read(name, None, place)
        if not kind.startswith("tensor("):
            raise self.wrong(place, f"cuts or stacks {name!r}, a {kind}")
        return kind


def _content(kind: str) -> str:
    """What an optional value holds, which may stand for it: a turn may get none and hand on one."""
    return kind[len("optional(") : -1] if kind.startswith("optional(") else kind


@cache
def _is_type(text: str) -> bool:
    try:
        return type_text(type_of(text)) == text
    except (KeyError, RecursionError):
        return False
