"""What the blocks of a bundle are given: seen while it runs on ONNX Runtime, with every block reached that can be."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from graphopt.bundles.backend import RunBlock
from graphopt.bundles.host import Program
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Branch, Loop, Plan, Port, Run, Step
from graphopt.calibration import failing_on
from graphopt.engines.profiles import Profile, Range, Seen, Sizes

_FEW_VALUES = 64  # an input that decides shapes has no more
_MOST_SIZES = 8  # of inputs that blocks are looked for with
_MOST_TURNS = 1000  # of a loop on a way that the network itself would not have gone: it may never end there

Way = Mapping[str, bool]


@dataclass
class Calls:
    """What one block was given.

    Attributes:
        shapes: Those of all inputs together -> how often.
        values: Input of few integers -> its values, flattened -> how often.
    """

    shapes: Counter[tuple[Sizes, ...]] = field(default_factory=Counter)
    values: dict[str, Counter[Sizes]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, names: Sequence[str], given: Sequence[Any]) -> None:
        """Note one call; what is no array is left out."""
        arrays = {name: value for name, value in zip(names, given, strict=True) if isinstance(value, np.ndarray)}
        if len(arrays) < len(names):
            return
        self.shapes[tuple(array.shape for array in arrays.values())] += 1
        for name, array in arrays.items():
            if array.dtype.kind in "iub" and array.size <= _FEW_VALUES:
                self.values[name][tuple(int(value) for value in array.flat)] += 1

    def rank(self, index: int) -> int | None:
        """How many axes an input has; None where that differs."""
        found = {len(shapes[index]) for shapes in self.shapes}
        return found.pop() if len(found) == 1 else None

    def seen(self, ports: Sequence[Port], samples: Mapping[str, int] = MappingProxyType({})) -> Seen:
        """For each axis the smallest size, the one that was there most often, and the largest; values likewise.

        Args:
            ports: The block's inputs.
            samples: Input -> its axis of samples, of which there may be fewer than were seen, down to one.
        """
        rows = {port.name: Counter[Sizes]() for port in ports}
        symbols: dict[str, Counter[Sizes]] = defaultdict(Counter)
        for shapes, count in self.shapes.items():
            for port, shape in zip(ports, shapes, strict=True):
                rows[port.name][shape] += count
                for size, declared in zip(shape, port.shape or (), strict=False):
                    if isinstance(declared, str):
                        symbols[declared][(size,)] += count
        for port in ports:
            for shape in list(rows[port.name]) if port.name in samples else ():
                at = samples[port.name]
                rows[port.name][(*shape[:at], 1, *shape[at + 1 :])] += 0
                declared = None if port.shape is None else port.shape[at]
                if isinstance(declared, str):
                    symbols[declared][(1,)] += 0
        return Seen(
            {name: _spread(found) for name, found in symbols.items()},
            {name: _spread(found) for name, found in rows.items() if _of_one_length(found)},
            {name: Profile(*_spread(found)) for name, found in self.values.items() if _of_one_length(found)},
        )


def _of_one_length(found: Iterable[Sizes]) -> bool:
    return len({len(one) for one in found}) == 1


def _spread(found: Counter[Sizes]) -> Range:
    columns: list[Counter[int]] = [Counter() for _ in next(iter(found))]
    for sizes, count in found.items():
        for column, size in zip(columns, sizes, strict=True):
            column[size] += count
    return (
        tuple(min(column) for column in columns),
        tuple(column.most_common(1)[0][0] for column in columns),
        tuple(max(column) for column in columns),
    )


def watch_blocks(plan: Plan, session: Callable[[str], Any], feeds: Iterable[Mapping[str, Any]]) -> dict[str, Calls]:
    """Run a bundle and see what its blocks are given.

    Where the inputs by themselves do not lead to a block, runs are sent there, with inputs of each size: every branch
    and loop on the way goes as it must, once.

    Args:
        plan: Of the bundle.
        session: Makes the session of a block.
        feeds: Inputs; all are run.

    Returns:
        Block -> what it was given. Without the blocks that nothing leads to.

    Raises:
        GraphoptError: The bundle does not run on its own inputs.
    """
    backend, course = _Watching(session), _Course()
    program = Program(plan, backend, course)
    chosen: dict[tuple[Sizes, ...], tuple[Mapping[str, Any], set[str]]] = {}
    for one in feeds:
        course.send({})
        with failing_on(one):
            program.run(one)
        key = tuple(np.shape(value) for value in one.values())
        if key in chosen:
            chosen[key][1].update(course.reached)
        elif len(chosen) < _MOST_SIZES or _is_extreme(key, chosen):
            chosen[key] = one, course.reached
    ways = list(_ways(plan.steps, {}))
    for one, reached in chosen.values():
        for made, way in ways:
            if made in reached:
                continue
            course.send(way)
            try:
                program.run(one)
            except Exception:  # a way that the network never goes: there anything may be wrong with the values
                continue
            finally:
                reached |= course.reached
    return dict(backend.calls)


def _is_extreme(sizes: tuple[Sizes, ...], others: Iterable[tuple[Sizes, ...]]) -> bool:
    """Whether inputs are smaller or larger than all others."""
    elements = [sum(map(math.prod, other)) for other in others]
    return not min(elements) <= sum(map(math.prod, sizes)) <= max(elements)


class _Watching(PlainBackend):
    def __init__(self, session: Callable[[str], Any]) -> None:
        super().__init__(session)
        self.calls: dict[str, Calls] = defaultdict(Calls)

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        run = super().block(name, inputs, outputs)

        def watched(values: Sequence[Any]) -> Sequence[Any]:
            made = run(values)
            self.calls[name].add(inputs, values)
            return made

        return watched


class _Course:
    """Goes as the network says, but for the branches and loops that a run is sent through, each once.

    Attributes:
        reached: What blocks have made in this run.
    """

    def __init__(self) -> None:
        self.reached: set[str] = set()
        self._way: dict[str, bool] = {}
        self._forced = False

    def send(self, way: Way) -> None:
        """Where the next run goes."""
        self.reached = set()
        self._way = dict(way)
        self._forced = bool(way)

    def branch(self, name: str, truth: bool) -> bool:
        return self._way.pop(name, truth)

    def turn(self, name: str, number: int, truth: bool) -> bool:
        if self._forced and number >= _MOST_TURNS:
            return False
        return self._way.pop(name, truth)

    def run(self, block: str, makes: Sequence[str]) -> None:
        self.reached.update(makes)


def _ways(steps: Sequence[Step], way: Way) -> Iterator[tuple[str, Way]]:
    """For each run of a block, by the first value that it makes, the branches and loops that lead to it."""
    for step in steps:
        if isinstance(step, Run):
            yield from ((name, way) for name in list(step.makes.values())[:1])
        elif isinstance(step, Branch):
            yield from _ways(step.then, {**way, step.branch: True})
            yield from _ways(step.otherwise, {**way, step.branch: False})
        elif isinstance(step, Loop):
            yield from _ways(step.body, {**way, step.loop: True})
