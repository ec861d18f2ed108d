"""Steps of a plan as functions of the places that values are in.

Places are given to values once, and each is emptied after its last reader. Nothing of a branch that is not taken runs,
nor is its block loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graphopt.bundles import flow
from graphopt.bundles.backend import Action, Backend, Call, Compiles, Places
from graphopt.bundles.course import Course, decide_bare_turn, runs_nothing
from graphopt.bundles.plan import Branch, Loop, Port, Run, Stack, Step, lists_in


class Actions:
    """Makes actions of steps.

    Args:
        backend: Runs the blocks.
        course: Sees and may change which way a run goes.
    """

    def __init__(self, backend: Backend, course: Course | None) -> None:
        self.backend = backend
        self.course = course
        self._place: dict[str, int] = {}

    @property
    def count(self) -> int:
        """How many places there are so far."""
        return len(self._place)

    def at(self, name: str) -> int:
        """The place of a value."""
        return self._place.setdefault(name, len(self._place))

    def of_steps(self, steps: Sequence[Step], kept: frozenset[str], own: frozenset[str]) -> list[Action]:
        """What a list of steps does; it empties the places of what it makes, and of ``own``, unless it is ``kept``."""
        mine = own | {name for step in steps for name in flow.makes(step)}
        last: dict[str, int] = {}
        for index, step in enumerate(steps):
            for name in (*flow.makes(step), *flow.all_reads(step)):
                last[name] = index
        actions: list[Action] = []
        together: list[Call] = []

        def compiled() -> Iterator[Action]:
            if together and isinstance(self.backend, Compiles):
                yield self.backend.action([*together])
                together.clear()

        for index, step in enumerate(steps):
            over = [self.at(name) for name, at in last.items() if at == index and name in mine and name not in kept]
            if isinstance(step, Run) and self.course is None and isinstance(self.backend, Compiles):
                together.append(self._call(step, over))
                continue
            actions += [*compiled(), self.of_step(step)]
            if over:
                actions.append(_emptying(over))
        return [*actions, *compiled()]

    def of_step(self, step: Run | Branch | Loop) -> Action:
        """What one step does."""
        if isinstance(step, Run):
            return self.of_run(step)
        return self.of_branch(step) if isinstance(step, Branch) else self.of_loop(step)

    def _call(self, step: Run, over: Sequence[int]) -> Call:
        reads = {name: self.at(value) for name, value in step.reads.items()}
        makes = {name: self.at(value) for name, value in step.makes.items()}
        return Call(step.run, reads, makes, over)

    def of_run(self, step: Run) -> Action:
        """Runs a block."""
        call = self.backend.block(step.run, list(step.reads), list(step.makes))
        reads = [self.at(name) for name in step.reads.values()]
        makes = [self.at(name) for name in step.makes.values()]

        def act(places: Places) -> None:
            for at, value in zip(makes, call([places[at] for at in reads]), strict=True):
                places[at] = value

        course = self.course
        if course is None:
            return act

        def act_and_tell(places: Places) -> None:
            act(places)
            course.run(step.run, list(step.makes.values()))

        return act_and_tell

    def of_branch(self, step: Branch) -> Action:
        """Runs one of two lists of steps."""
        condition = self.at(step.condition)
        sides = []
        for inner, steps in enumerate(lists_in(step)):
            actions = self.of_steps(steps, frozenset(flow.results(step, inner)), frozenset())
            gives = [(self.at(name), self.at(pair[inner])) for name, pair in step.gives.items()]
            over = [self.at(name) for name in flow.made_in(steps)]
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
        truth, course = self.backend.truth, self.course
        return truth if course is None else lambda value: course.branch(name, truth(value))

    def _turns_of(self, step: Loop) -> Callable[[int, bool], bool]:
        course, name = self.course, step.loop
        if course is not None:
            return lambda turn, truth: course.turn(name, turn, truth)
        return decide_bare_turn if runs_nothing(step) else lambda turn, truth: truth

    def of_loop(self, step: Loop) -> Action:
        """Runs a list of steps again and again."""
        backend, truth = self.backend, self.backend.truth
        trips = None if step.trips is None else self.at(step.trips)
        condition = None if step.condition is None else self.at(step.condition)
        counter = None if step.counter is None else (self.at(step.counter.name), step.counter)
        goes = None if step.goes is None else (self.at(step.goes.name), step.goes)
        starts = [(self.at(state.name), self.at(state.start)) for state in step.state]
        nexts = [(self.at(state.name), self.at(state.next)) for state in step.state]
        finals = [(self.at(state.gives), self.at(state.name)) for state in step.state if state.gives is not None]
        slices = [(self.at(part.name), self.at(part.of), part.axis, part.backwards) for part in step.slices]
        stacks = [(self.at(stack.each), self.at(stack.gives), stack) for stack in step.stacks]
        states = {state.name for state in step.state}
        own = frozenset(name for name in flow.begun_with(step) if name not in states)
        body = self.of_steps(step.body, frozenset(flow.results(step, 0)), own)
        again = None if step.again is None else self.at(step.again)
        over = [self.at(name) for name in (*flow.made_in(step.body), *states)]
        goes_on = self._turns_of(step)
        number = None if counter is None else numbers_of_turns(backend, counter[1])
        yes = None if goes is None else backend.scalar(True, goes[1])
        begin, hand_on = _moving(starts), _moving(nexts)

        def act(places: Places) -> None:
            most = min((backend.length(places[of], axis) for _, of, axis, _ in slices), default=_LIMIT)
            limit = most if trips is None else min(most, backend.number(places[trips]))
            going = condition is None or truth(places[condition])
            begin(places)
            made: list[list[Any]] = [[] for _ in stacks]
            turn = 0
            while goes_on(turn, going and turn < limit) and turn < most:
                if counter is not None and number is not None:
                    places[counter[0]] = number(turn)
                if goes is not None:
                    places[goes[0]] = yes
                for at, of, axis, backwards in slices:
                    index = most - 1 - turn if backwards else turn
                    places[at] = backend.part(places[of], axis, index)
                for action in body:
                    action(places)
                for parts, (each, _, _) in zip(made, stacks, strict=True) if stacks else ():
                    parts.append(places[each])
                going = again is None or truth(places[again])
                hand_on(places)
                turn += 1
            for at, source in finals:
                places[at] = places[source]
            for parts, (_, at, stack) in zip(made, stacks, strict=True):
                places[at] = _stacked(backend, parts, stack)
            for at in over:
                places[at] = None

        return act


_LIMIT = (1 << 63) - 1
_KNOWN_NUMBERS = 1024


def _stacked(backend: Backend, parts: list[Any], stack: Stack) -> Any:
    return backend.stack(parts[::-1] if stack.backwards else parts, stack.axis, stack.part)


def _moving(pairs: Sequence[tuple[int, int]]) -> Action:
    """Puts what is in some places into others, all at once."""
    if not pairs:
        return lambda places: None
    targets = ", ".join(f"places[{to}]" for to, _ in pairs)
    sources = ", ".join(f"places[{source}]" for _, source in pairs)
    known: dict[str, Any] = {}
    exec(f"def move(places):\n    {targets} = {sources}", known)
    move: Action = known["move"]
    return move


def numbers_of_turns(backend: Backend, port: Port) -> Callable[[int], Any]:
    """The numbers of turns as values: those of the first turns are made once."""
    known: dict[int, Any] = {}  # no list: two threads might add the same number to its end

    def number(turn: int) -> Any:
        value = known.get(turn)
        if value is None:
            value = backend.scalar(turn, port)
            if turn < _KNOWN_NUMBERS:
                known[turn] = value
        return value

    return number


def _emptying(places_over: Sequence[int]) -> Action:
    def act(places: Places) -> None:
        for at in places_over:
            places[at] = None

    return act
