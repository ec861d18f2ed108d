"""The ranges of sizes that a module computes otherwise in, found by exporting it in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from graphopt.errors import GraphoptError
from graphopt.exporting.sizes.guards import Guard, fixes_an_axis
from graphopt.exporting.sizes.probes import Sizes, probes

if TYPE_CHECKING:
    from graphopt.exporting.factory import Example

MOST = 8  # ranges of sizes; a loop over a size is another range for each size
_FIXED = 1  # exports for one size alone, which torch made so
_TRIES = 4  # sizes of a kind at which the module is run before it is taken for one that raises there

T = TypeVar("T")


@dataclass
class Region(Generic[T]):
    """Sizes in which one export of the module holds.

    Attributes:
        sizes: The sizes of its example.
        made: The export.
        guards: What it depends on.
    """

    sizes: Sizes
    made: T
    guards: list[Guard]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        return all(guard.holds(sizes) for guard in self.guards)

    def decides_alike(self, sizes: Mapping[str, int]) -> bool:
        """Whether the user's own questions have the same answers at ``sizes``."""
        return all(guard.holds(sizes) for guard in self.guards if guard.asked)


@dataclass
class Explored(Generic[T]):
    """What `explore` found.

    Attributes:
        regions: In the order found; the example's own first.
        raising: Sizes at which the module raises, one of each kind.
        probes: The sizes that were looked at, with the region that each is in (None: the module raises).
    """

    regions: list[Region[T]]
    raising: list[Sizes] = field(default_factory=list)
    probes: list[tuple[Sizes, int | None]] = field(default_factory=list)

    def sizes_of(self, index: int) -> list[Sizes]:
        """The sizes looked at that region ``index`` stands for."""
        return [sizes for sizes, region in self.probes if region == index]


class Module(Protocol[T]):
    """What `explore` does with a module; sizes are by symbol."""

    def export(self, sizes: Sizes) -> tuple[T, list[Guard]]:
        """Export it at ``sizes``: the export, and what it depends on."""

    def runs(self, sizes: Sizes) -> bool:
        """Whether it runs at ``sizes``."""

    def agrees(self, made: T, sizes: Sizes) -> bool:
        """Whether ``made`` computes what the module does at ``sizes``."""


def varies(guards: Iterable[Guard], own: Mapping[str, int]) -> bool:
    """Whether one of ``guards`` is false at some sizes."""
    guards = list(guards)
    return any(not guard.holds(sizes) for sizes in probes(own, guards) for guard in guards)


def explore(own: Sizes, module: Module[T], name: str) -> Explored[T]:
    """Export ``module`` until there is an export for all sizes that it runs at.

    What torch itself took for granted on the way (that no size is 1, mostly) often does not matter: where the user's
    own questions have the same answers, an export counts wherever it computes the same.

    Args:
        own: The example's sizes.
        module: The module.
        name: The factory's, for messages.

    Raises:
        TooMany: It computes something else in more than `MOST` ranges.
    """
    found = Explored([Region(own, *module.export(own))])
    tried = _Tried(module)
    while (new := _uncovered(found, tried)) is not None:
        fixed = sum(fixes_an_axis(region.guards) for region in found.regions)
        if len(found.regions) == MOST or fixed > _FIXED:
            raise _too_many(found, name)
        region = Region(new, *module.export(new))
        if not region.holds(new):
            raise GraphoptError(f"the module decides something else at {sized(new)} each time", where=name)
        found.regions.append(region)
    return found


class _Tried(Generic[T]):
    """What is known about a module at single sizes."""

    def __init__(self, module: Module[T]) -> None:
        self.module = module
        self.known: dict[tuple[int, ...], bool] = {}

    def runs(self, sizes: Sizes) -> bool:
        return self._once((-1, *sizes.values()), lambda: self.module.runs(sizes))

    def agrees(self, found: Explored[T], index: int, sizes: Sizes) -> bool:
        return self._once((index, *sizes.values()), lambda: self.module.agrees(found.regions[index].made, sizes))

    def _once(self, key: tuple[int, ...], ask: Callable[[], bool]) -> bool:
        if key not in self.known:
            self.known[key] = ask()
        return self.known[key]


def _uncovered(found: Explored[T], tried: _Tried[T]) -> Sizes | None:
    """Sizes at which the module runs and no export is right; the rest of ``found`` is made anew."""
    guards = [guard for region in found.regions for guard in region.guards]
    kinds: dict[tuple[bool, ...], list[Sizes]] = {}
    found.probes, found.raising = [], []
    for sizes in probes(found.regions[0].sizes, guards):
        index = next((i for i, region in enumerate(found.regions) if region.holds(sizes)), None)
        if index is None:
            kinds.setdefault(tuple(guard.holds(sizes) for guard in guards), []).append(sizes)
        else:
            found.probes.append((sizes, index))
    for members in kinds.values():
        chosen = members if len(members) <= _TRIES else [*members[: _TRIES - 1], members[-1]]
        running = [sizes for sizes in chosen if tried.runs(sizes)]
        index = None
        if running:
            right = (
                i
                for i, region in enumerate(found.regions)
                if region.decides_alike(members[0]) and all(tried.agrees(found, i, sizes) for sizes in running)
            )
            index = next(right, None)
            if index is None:
                return running[0]
        else:
            found.raising.append(members[0])
        found.probes += [(sizes, index) for sizes in members]
    return None


def _too_many(found: Explored[T], name: str) -> TooMany:
    first = found.regions[0].sizes
    telling = [g for g in found.regions[-1].guards if g.place is not None and not g.holds(first)]
    return TooMany(f", at {telling[-1].place}" if telling else "", name)


class TooMany(GraphoptError):
    """The module computes something else in more than `MOST` ranges of sizes; ``at`` tells of a line."""

    def __init__(self, at: str, name: str) -> None:
        self.at = at
        super().__init__(
            f"the module computes otherwise in more than {MOST} ranges of its sizes, or at each of them{at}",
            where=name,
            hint="a loop over a size is a Loop where a turn changes tensors and numbers alone",
        )


def sized(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())


def deciding(found: Explored[T], index: int, name: str) -> list[Guard]:
    """The guards of region ``index`` that tell its sizes from those of later regions: as few as are found to do.

    The user's own questions are preferred. Empty where the region is the last.

    Raises:
        GraphoptError: They do not tell them apart.
    """
    ours = found.sizes_of(index)
    others = [sizes for later in range(index + 1, len(found.regions)) for sizes in found.sizes_of(later)]
    chosen: list[Guard] = []
    for guard in sorted(found.regions[index].guards, key=lambda g: (not g.asked, g.place is None)):
        left = [sizes for sizes in others if guard.holds(sizes)]
        if len(left) < len(others) and all(guard.holds(sizes) for sizes in ours):
            chosen.append(guard)
            others = left
    if others:
        raise GraphoptError(f"no question tells what the module computes at {sized(others[0])}", where=name)
    return chosen


def at_sizes(example: Example, sizes: Sizes, seed: int = 0) -> Example:
    """``example`` with inputs drawn like its own at other sizes; itself at its own."""
    import torch

    from graphopt.exporting.compare import draw_like

    own = {s: int(example.inputs[key].shape[axis]) for key, axes in example.axes.items() for axis, s in axes.items()}
    if own == sizes:
        return example
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for key, value in example.inputs.items():
        axes = example.axes.get(key, {})
        shape = [sizes[axes[axis]] if axis in axes else int(size) for axis, size in enumerate(value.shape)]
        inputs[key] = draw_like(value, key, shape, generator)
    return replace(example, inputs=inputs)
