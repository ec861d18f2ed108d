"""The host: follows a plan, and runs a block where the plan says so.

A plan is turned into a program once: values become places in a list, steps become functions of it, and each place is
emptied after its last reader. Nothing of a branch that is not taken runs, nor is its block loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from graphopt.bundles import plan as plans
from graphopt.bundles.plan import Branch, Loop, Plan, Port, Run, Stack, Step
from graphopt.errors import GraphoptError

Places = list[Any]
Action = Callable[[Places], None]
RunBlock = Callable[[Sequence[Any]], Sequence[Any]]


class Backend(Protocol):
    """What runs blocks, and what the values between them are.

    Attributes:
        runs: How often each block has run.
    """

    runs: dict[str, int]

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        """How a block is run: values of its inputs in this order in, those of its outputs out."""

    def truth(self, value: Any) -> bool:
        """The boolean in a value."""

    def number(self, value: Any) -> int:
        """The integer in a value."""

    def scalar(self, value: int | bool, port: Port) -> Any:
        """A number as a value of one element."""

    def length(self, value: Any, axis: int) -> int:
        """How many indices an axis has."""

    def part(self, value: Any, axis: int, index: int) -> Any:
        """One index of an axis, which is gone then."""

    def stack(self, parts: Sequence[Any], axis: int, like: Port) -> Any:
        """Parts along a new axis; none of them: an empty value, unknown sizes 0."""


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


class Program:
    """A plan, ready to run.

    Args:
        plan: What to do.
        backend: Runs the blocks.
        course: Sees and may change which way a run goes.
    """

    def __init__(self, plan: Plan, backend: Backend, course: Course | None = None) -> None:
        self._backend = backend
        self._course = course
        self._place: dict[str, int] = {}
        self._inputs = [(port.name, self._at(port.name)) for port in plan.inputs]
        kept = frozenset(plan.gives.values())
        self._actions = self._list(plan.steps, kept, frozenset(port.name for port in plan.inputs))
        self._outputs = [(name, self._at(value)) for name, value in plan.gives.items()]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run once.

        Args:
            values: For each input, as the backend has them.

        Returns:
            For each output.
        """
        places: Places = [None] * len(self._place)
        for name, at in self._inputs:
            places[at] = values[name]
        for action in self._actions:
            action(places)
        return {name: places[at] for name, at in self._outputs}

    def _at(self, name: str) -> int:
        return self._place.setdefault(name, len(self._place))

    def _list(self, steps: Sequence[Step], kept: frozenset[str], own: frozenset[str]) -> list[Action]:
        """What a list of steps does; it empties the places of what it makes, and of ``own``, unless it is ``kept``."""
        mine = own | {name for step in steps for name in plans.makes(step)}
        last: dict[str, int] = {}
        for index, step in enumerate(steps):
            for name in (*plans.makes(step), *_reads_of_all(step)):
                last[name] = index
        actions: list[Action] = []
        for index, step in enumerate(steps):
            actions.append(self._step(step))
            over = [self._at(name) for name, at in last.items() if at == index and name in mine and name not in kept]
            if over:
                actions.append(_emptying(over))
        return actions

    def _step(self, step: Run | Branch | Loop) -> Action:
        if isinstance(step, Run):
            return self._run(step)
        return self._branch(step) if isinstance(step, Branch) else self._loop(step)

    def _run(self, step: Run) -> Action:
        call = self._backend.block(step.run, list(step.reads), list(step.makes))
        reads = [self._at(name) for name in step.reads.values()]
        makes = [self._at(name) for name in step.makes.values()]

        def act(places: Places) -> None:
            for at, value in zip(makes, call([places[at] for at in reads]), strict=True):
                places[at] = value

        course = self._course
        if course is None:
            return act

        def act_and_tell(places: Places) -> None:
            act(places)
            course.run(step.run, list(step.makes.values()))

        return act_and_tell

    def _branch(self, step: Branch) -> Action:
        condition = self._at(step.condition)
        sides = []
        for inner, steps in enumerate(plans.lists_in(step)):
            actions = self._list(steps, frozenset(plans.results(step, inner)), frozenset())
            gives = [(self._at(name), self._at(pair[inner])) for name, pair in step.gives.items()]
            over = [self._at(name) for name in _made_in(steps)]
            sides.append((actions, gives, over))
        then, otherwise = sides
        truth = self._truth_of_branch(step.branch)

        def act(places: Places) -> None:
            taken, gives, over = then if truth(places[condition]) else otherwise
            for action in taken:
                action(places)
            for at, source in gives:
                places[at] = places[source]
            for at in over:
                places[at] = None

        return act

    def _truth_of_branch(self, name: str) -> Callable[[Any], bool]:
        truth, course = self._backend.truth, self._course
        return truth if course is None else lambda value: course.branch(name, truth(value))

    def _turns_of(self, name: str) -> Callable[[int, bool], bool]:
        course = self._course
        return (lambda turn, truth: truth) if course is None else lambda turn, truth: course.turn(name, turn, truth)

    def _loop(self, step: Loop) -> Action:
        backend = self._backend
        trips = None if step.trips is None else self._at(step.trips)
        condition = None if step.condition is None else self._at(step.condition)
        counter = None if step.counter is None else (self._at(step.counter.name), step.counter)
        goes = None if step.goes is None else (self._at(step.goes.name), step.goes)
        starts = [(self._at(state.name), self._at(state.start)) for state in step.state]
        nexts = [(self._at(state.name), self._at(state.next)) for state in step.state]
        finals = [(self._at(state.gives), self._at(state.name)) for state in step.state if state.gives is not None]
        slices = [(self._at(part.name), self._at(part.of), part.axis, part.backwards) for part in step.slices]
        stacks = [(self._at(stack.each), self._at(stack.gives), stack) for stack in step.stacks]
        own = frozenset({part.name for part in step.slices} | {port.name for port in (step.counter, step.goes) if port})
        body = self._list(step.body, frozenset(plans.results(step, 0)), own)
        again = None if step.again is None else self._at(step.again)
        over = [self._at(name) for name in (*_made_in(step.body), *(state.name for state in step.state))]
        goes_on = self._turns_of(step.loop)

        def act(places: Places) -> None:
            most = min((backend.length(places[of], axis) for _, of, axis, _ in slices), default=_LIMIT)
            limit = most if trips is None else min(most, backend.number(places[trips]))
            going = condition is None or backend.truth(places[condition])
            for at, value in [(at, places[start]) for at, start in starts]:
                places[at] = value
            made: list[list[Any]] = [[] for _ in stacks]
            turn = 0
            while goes_on(turn, going and turn < limit) and turn < most:
                if counter is not None:
                    places[counter[0]] = backend.scalar(turn, counter[1])
                if goes is not None:
                    places[goes[0]] = backend.scalar(True, goes[1])
                for at, of, axis, backwards in slices:
                    index = most - 1 - turn if backwards else turn
                    places[at] = backend.part(places[of], axis, index)
                for action in body:
                    action(places)
                for parts, (each, _, _) in zip(made, stacks, strict=True):
                    parts.append(places[each])
                going = again is None or backend.truth(places[again])
                for at, value in [(at, places[after]) for at, after in nexts]:
                    places[at] = value
                turn += 1
            for at, source in finals:
                places[at] = places[source]
            for parts, (_, at, stack) in zip(made, stacks, strict=True):
                places[at] = _stacked(backend, parts, stack)
            for at in over:
                places[at] = None

        return act


_LIMIT = (1 << 63) - 1


def _stacked(backend: Backend, parts: list[Any], stack: Stack) -> Any:
    return backend.stack(parts[::-1] if stack.backwards else parts, stack.axis, stack.part)


def _made_in(steps: Sequence[Step]) -> list[str]:
    """What stands after the last of some steps."""
    return list(dict.fromkeys(name for step in steps for name in plans.makes(step)))


def _emptying(places_over: Sequence[int]) -> Action:
    def act(places: Places) -> None:
        for at in places_over:
            places[at] = None

    return act


def _reads_of_all(step: Run | Branch | Loop) -> list[str]:
    """What a step reads, with all that is in it."""
    found = list(plans.reads(step))
    for inner, steps in enumerate(plans.lists_in(step)):
        found += plans.results(step, inner)
        for nested in steps:
            found += _reads_of_all(nested)
    return found


class PlainBackend:
    """ONNX Runtime with numpy arrays, lists of them and None between blocks: runs whatever ONNX Runtime does.

    Args:
        session: How a block's session is made; asked when a block is run for the first time.
    """

    def __init__(self, session: Callable[[str], Any]) -> None:
        self._make = session
        self._sessions: dict[str, Any] = {}
        self.runs: dict[str, int] = {}

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        from graphopt.runtime.session import run

        wanted = list(outputs)
        self.runs[name] = 0

        def call(values: Sequence[Any]) -> Sequence[Any]:
            self.runs[name] += 1
            if name not in self._sessions:
                self._sessions[name] = self._make(name)
            try:
                made = run(self._sessions[name], dict(zip(inputs, values, strict=True)), wanted)
            except GraphoptError as error:
                raise type(error)(error.what, where=name, hint=error.hint) from error
            return [made[output] for output in wanted]

        return call

    def truth(self, value: Any) -> bool:
        return bool(np.asarray(value).reshape(-1)[0])

    def number(self, value: Any) -> int:
        return int(np.asarray(value).reshape(-1)[0])

    def scalar(self, value: int | bool, port: Port) -> Any:
        return np.full((1,) * len(port.shape or ()), value, np.bool_ if port.type == "tensor(bool)" else np.int64)

    def length(self, value: Any, axis: int) -> int:
        return int(np.asarray(value).shape[axis])

    def part(self, value: Any, axis: int, index: int) -> Any:
        return np.asarray(np.take(value, index, axis))

    def stack(self, parts: Sequence[Any], axis: int, like: Port) -> Any:
        if parts:
            return np.stack([np.asarray(part) for part in parts], axis)
        from graphopt.runtime.session import numpy_dtype

        shape = [size if isinstance(size, int) else 0 for size in like.shape or ()]
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 0)
        return np.empty(shape, numpy_dtype(like.type))
