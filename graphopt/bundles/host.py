"""The host: follows a plan, and runs a block where the plan says so.

A plan is turned into a program once: values become places in a list, and steps functions of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graphopt.bundles.actions import Actions
from graphopt.bundles.apart import ActionsApart
from graphopt.bundles.backend import Backend, Places
from graphopt.bundles.course import Course
from graphopt.bundles.plan import Plan
from graphopt.bundles.rows import padded, samples_of
from graphopt.errors import GraphoptError


class Program:
    """A plan, ready to run. Several threads may run it at once where its backend and course allow that.

    Args:
        plan: What to do.
        backend: Runs the blocks.
        course: Sees and may change which way a run goes.

    Raises:
        BadInput: Samples go their own ways in the plan, and the backend takes no rows.
    """

    def __init__(self, plan: Plan, backend: Backend, course: Course | None = None) -> None:
        self._plan = plan
        self._backend = backend
        self._apart = ActionsApart(backend, course, plan.samples) if plan.samples else None
        actions = self._apart or Actions(backend, course)
        self._inputs = [(port.name, actions.at(port.name)) for port in plan.inputs]
        kept = frozenset(plan.gives.values())
        self._actions = actions.of_steps(plan.steps, kept, frozenset(port.name for port in plan.inputs))
        self._outputs = [(name, actions.at(value)) for name, value in plan.gives.items()]
        self._count = actions.count

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run once.

        Args:
            values: For each input, as the backend has them.

        Returns:
            For each output.

        Raises:
            GraphoptError: A block failed, or a value that the host asks, cuts or stacks has not the shape for that.
        """
        places: Places = [None] * self._count
        for name, at in self._inputs:
            places[at] = values[name]
        try:
            return self._follow(places) if self._apart is None else self._run_samples(places, self._apart)
        except (ValueError, IndexError) as error:  # numpy's
            raise GraphoptError(f"a value does not fit the plan: {error}") from error

    def _follow(self, places: Places) -> dict[str, Any]:
        for action in self._actions:
            action(places)
        return {name: places[at] for name, at in self._outputs}

    def _run_samples(self, places: Places, apart: ActionsApart) -> dict[str, Any]:
        """On as many rows as the backend runs, of which the first are samples."""
        axes, rows = self._plan.samples, apart.rows
        with_samples = [(name, at, axes[name]) for name, at in self._inputs if name in axes]
        count = samples_of({name: self._backend.length(places[at], axis) for name, at, axis in with_samples})
        if not count:
            return self._no_samples()
        every = np.arange(count)
        places[apart.live] = every
        size = rows.rows(count)
        if size == count:
            return self._follow(places)
        for _, at, axis in with_samples:
            places[at] = rows.take(places[at], axis, padded(every, size))
        made = self._follow(places)
        return {name: rows.take(value, axes[self._plan.gives[name]], every) for name, value in made.items()}

    def _no_samples(self) -> dict[str, Any]:
        """Outputs of no samples; sizes that only a run would tell are 0."""
        made = {}
        for port in self._plan.outputs:
            axis = self._plan.samples[self._plan.gives[port.name]]
            rest = [size for place, size in enumerate(port.shape or ()) if place != axis]
            made[port.name] = self._backend.stack([], axis, port.model_copy(update={"shape": rest}))
        return made
