"""Steps of a plan in which samples go their own ways, as functions of places: see `graphopt.bundles.rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.bundles import flow
from graphopt.bundles.actions import Actions, numbers_of_turns
from graphopt.bundles.backend import Action, Backend, RowBackend
from graphopt.bundles.course import Course, decide_branch, decide_turn
from graphopt.bundles.plan import Branch, Loop, lists_in
from graphopt.bundles.rows import LIVE, Side, Turns, branch_of_each, loop_of_each
from graphopt.errors import BadInput


class ActionsApart(Actions):
    """Makes actions of steps, of those that take samples apart too.

    Args:
        backend: Runs the blocks.
        course: Sees and may change which way a run goes.
        axes: Value -> the axis along which it has samples.

    Attributes:
        rows: The backend, which takes rows.
        live: The place of the numbers of the samples that are there.

    Raises:
        BadInput: The backend takes no rows.
    """

    def __init__(self, backend: Backend, course: Course | None, axes: Mapping[str, int]) -> None:
        super().__init__(backend, course)
        if not isinstance(backend, RowBackend):
            raise BadInput("this backend cannot take samples apart", hint="run the bundle on onnxruntime")
        self.rows: RowBackend = backend
        self.live = self.at(LIVE)
        self._axes = axes

    def of_branch(self, step: Branch) -> Action:
        return self._branch_of_each(step) if step.each else super().of_branch(step)

    def of_loop(self, step: Loop) -> Action:
        return self._loop_of_each(step) if step.each else super().of_loop(step)

    def _branch_of_each(self, step: Branch) -> Action:
        sides = []
        for inner, steps in enumerate(lists_in(step)):
            made = set(flow.made_in(steps))
            actions = self.of_steps(steps, frozenset(flow.results(step, inner)), frozenset())
            reads = [(self.at(name), self._axes[name]) for name in flow.from_around(steps) if name in self._axes]
            gives = [
                (self.at(name), self.at(pair[inner]), pair[inner] not in made) for name, pair in step.gives.items()
            ]
            sides.append(Side(actions, reads, gives, [self.at(name) for name in made]))
        axes = [self._axes[name] for name in step.gives]
        decide = decide_branch(self.course, step.branch)
        return branch_of_each(self.at(step.condition), self.live, (sides[0], sides[1]), axes, self.rows, decide)

    def _loop_of_each(self, step: Loop) -> Action:
        backend = self.backend
        own = frozenset(port.name for port in (step.counter, step.goes) if port)
        body = self.of_steps(step.body, frozenset(flow.results(step, 0)), own)
        mine = own | {state.name for state in step.state}
        around = [*flow.from_around(step.body), *flow.results(step, 0)]
        made = {*flow.made_in(step.body), *mine}
        reads = [name for name in dict.fromkeys(around) if name in self._axes and name not in made]
        counter, goes = step.counter, step.goes
        turns = Turns(
            trips=None if step.trips is None else self.at(step.trips),
            condition=None if step.condition is None else self.at(step.condition),
            counter=None if counter is None else (self.at(counter.name), numbers_of_turns(backend, counter)),
            goes=None if goes is None else (self.at(goes.name), _always(backend.scalar(True, goes))),
            states=[
                (self.at(state.name), self.at(state.start), self.at(state.next), self._axes.get(state.name))
                for state in step.state
            ],
            reads=[(self.at(name), self._axes[name]) for name in reads],
            body=body,
            again=None if step.again is None else self.at(step.again),
            gives=[(index, self.at(state.gives)) for index, state in enumerate(step.state) if state.gives is not None],
            over=[self.at(name) for name in made],
        )
        return loop_of_each(turns, self.live, self.rows, decide_turn(self.course, step))


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value
