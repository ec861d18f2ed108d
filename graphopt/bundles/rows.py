"""What the host does where each sample decides by itself: rows of values are taken apart, and put together again.

Values that have samples have one row for each along some axis. A branch takes the rows of its two sides apart, and a
loop those that go on from those that are done; what is the same for all samples is left as it is. The results have the
rows in the order of the samples. Blocks may be built for some numbers of rows only: then rows at the end repeat the
last one, and are dropped where rows are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.bundles.backend import Action, Part, Places, RowBackend, Rows, Truths
from graphopt.errors import GraphoptError

SAMPLES = "graphopt.samples"
"""In the metadata of a value: the axis along which it has samples. Of an If or Loop: each sample decides by itself."""

LIVE = ""
"""What the place is called that holds the numbers of the samples that are there."""


def bucket(count: int) -> int:
    """The next power of two, for backends whose blocks are built for fixed sizes."""
    return 1 << max(count - 1, 0).bit_length()


def padded(rows: Rows, count: int) -> Rows:
    """Rows with the last one again, up to a number of them."""
    return rows if len(rows) == count else np.pad(rows, (0, count - len(rows)), mode="edge")


# -- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One side of a branch.

    Attributes:
        actions: What it does.
        reads: Places of values with samples that it reads from around it, and their axes.
        gives: For each result the place that it goes to, the place where the side has it, and whether that is a value
            from around it, of which rows need not be taken.
        over: Places to empty afterwards.
    """

    actions: Sequence[Action]
    reads: Sequence[tuple[int, int]]
    gives: Sequence[tuple[int, int, bool]]
    over: Sequence[int]

    def run_all(self, places: Places) -> None:
        """For all rows that there are."""
        for action in self.actions:
            action(places)
        for at, source, _ in self.gives:
            places[at] = places[source]
        for at in self.over:
            places[at] = None

    def run_some(self, places: Places, live: int, rows: Rows, backend: RowBackend) -> list[Part]:
        """For some rows; what it gives for them."""
        held = [(at, places[at]) for at, _ in self.reads]
        samples = places[live]
        chosen = padded(rows, backend.rows(len(rows)))
        for at, axis in self.reads:
            places[at] = backend.take(places[at], axis, chosen)
        places[live] = samples[rows]
        for action in self.actions:
            action(places)
        for at, value in held:
            places[at] = value
        places[live] = samples
        made = [Part(places[source], rows if whole else None, rows) for _, source, whole in self.gives]
        for at in self.over:
            places[at] = None
        return made


def branch_of_each(
    condition: int,
    live: int,
    sides: tuple[Side, Side],
    axes: Sequence[int],
    backend: RowBackend,
    decide: Callable[[Rows, Truths], Truths],
) -> Action:
    """A branch to whose sides rows go apart.

    Args:
        condition: Place of one boolean a row.
        live: Place of the samples.
        sides: ``then`` and ``otherwise``.
        axes: Of the results.
        backend: Takes rows.
        decide: Sees and may change where samples go.
    """
    then, otherwise = sides
    targets = [at for at, _, _ in then.gives]

    def act(places: Places) -> None:
        samples = places[live]
        truths = decide(samples, backend.truths(places[condition])[: len(samples)])
        ahead = np.flatnonzero(truths)
        if len(ahead) in (0, len(samples)):
            (then if len(ahead) else otherwise).run_all(places)
            return
        first = then.run_some(places, live, ahead, backend)
        second = otherwise.run_some(places, live, np.flatnonzero(~truths), backend)
        count = backend.rows(len(samples))
        for at, axis, *parts in zip(targets, axes, first, second, strict=True):
            places[at] = backend.merge(parts, axis, count)

    return act


@dataclass(frozen=True)
class Turns:
    """A loop of which each sample takes its own number of turns.

    Attributes:
        trips, condition: Places of the most turns, and of whether to begin: one for each row, or one for all.
        counter, goes: Places of the number of the turn, and of True, with what makes them.
        states: In the body: place, the place of what it begins with, of what a turn makes of it, and its axis (None:
            the same for all samples).
        reads: Places of values with samples that the body reads from around it, and their axes.
        body: What a turn does.
        again: Place of whether there is a next turn.
        gives: Index of a state, and the place that its value after the last turn goes to.
        over: Places to empty afterwards.
    """

    trips: int | None
    condition: int | None
    counter: tuple[int, Callable[[int], Any]] | None
    goes: tuple[int, Callable[[], Any]] | None
    states: Sequence[tuple[int, int, int, int | None]]
    reads: Sequence[tuple[int, int]]
    body: Sequence[Action]
    again: int | None
    gives: Sequence[tuple[int, int]]
    over: Sequence[int]


def loop_of_each(turns: Turns, live: int, backend: RowBackend, decide: Callable[[Rows, int, Truths], Truths]) -> Action:
    """A loop that samples leave after their own last turn.

    Args:
        turns: What it does.
        live: Place of the samples.
        backend: Takes rows.
        decide: Sees and may change which samples take a turn of a number.
    """
    axis_of = [axis for *_, axis in turns.states]

    def act(places: Places) -> None:
        samples = places[live]
        count = len(samples)
        rows: Rows = np.arange(count)
        limit = None if turns.trips is None else _for_each(backend.integers(places[turns.trips]), count)
        going = _asked(backend, places, turns.condition, count)
        held = [(at, places[at]) for at, _ in turns.reads]
        for at, value in [(at, places[start]) for at, start, _, _ in turns.states]:
            places[at] = value
        left: list[list[Part]] = [[] for _ in turns.gives]
        turn = 0
        while True:
            takes = decide(places[live], turn, going if limit is None else going & (turn < limit[rows]))
            stay, leave = np.flatnonzero(takes), np.flatnonzero(~takes)
            if len(leave):
                for parts, (index, _) in zip(left, turns.gives, strict=True):
                    at, axis = turns.states[index][0], axis_of[index]
                    value = backend.repeat(places[at], len(leave)) if axis is None else places[at]
                    parts.append(Part(value, None if axis is None else leave, rows[leave]))
            if not len(stay):
                break
            if len(leave):
                chosen = padded(stay, backend.rows(len(stay)))
                moved = [*turns.reads, *((at, axis) for at, _, _, axis in turns.states if axis is not None)]
                for at, axis in moved:
                    places[at] = backend.take(places[at], axis, chosen)
                rows = rows[stay]
                places[live] = samples[rows]
            if turns.counter is not None:
                places[turns.counter[0]] = turns.counter[1](turn)
            if turns.goes is not None:
                places[turns.goes[0]] = turns.goes[1]()
            for action in turns.body:
                action(places)
            going = _asked(backend, places, turns.again, len(rows))
            for at, value in [(at, places[after]) for at, _, after, _ in turns.states]:
                places[at] = value
            turn += 1
        for at, value in held:
            places[at] = value
        places[live] = samples
        for parts, (index, at) in zip(left, turns.gives, strict=True):
            whole = len(parts) == 1 and parts[0].rows is not None  # all have left together, with their padding
            axis = axis_of[index]
            places[at] = parts[0].value if whole else backend.merge(parts, axis or 0, backend.rows(count))
        for at in turns.over:
            places[at] = None

    return act


def _asked(backend: RowBackend, places: Places, at: int | None, count: int) -> Truths:
    return np.ones(count, np.bool_) if at is None else _for_each(backend.truths(places[at]), count)


def _for_each(array: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """One for each row, of an array that has that, or one for all."""
    return array[:count] if len(array) >= count else np.broadcast_to(array, count)


def samples_of(lengths: Mapping[str, int]) -> int:
    """How many samples there are, by the inputs that have them; raises GraphoptError where they do not agree."""
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"'{name}' has {count}" for name, count in lengths.items())
        raise GraphoptError(f"inputs have different numbers of samples: {told}")
    return next(iter(lengths.values()))
