"""From a checked example to a model and the inputs it is compared on.

Mostly one export. Where the module decides on the sizes of its axes, one for each answer, made one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.exporting.branches.deciding import strip
from graphopt.exporting.branches.sinking import sink
from graphopt.exporting.capture import Captured, FixedAxis, capture
from graphopt.exporting.compare import Case, compare_output, make_cases, run_eager, to_numpy
from graphopt.exporting.factory import Example
from graphopt.exporting.scripted import NOTE, capture_scripted, is_scripted
from graphopt.exporting.sizes.guards import Guard, symbol_of
from graphopt.exporting.sizes.probes import Sizes
from graphopt.exporting.sizes.regions import Explored, TooMany, at_sizes, deciding, explore, sized, varies
from graphopt.exporting.sizes.uniting import unite
from graphopt.exporting.tidy import tidy
from graphopt.runtime.session import create_session, run
from graphopt.runtime.split import split_weights

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_EDGES = 16  # sizes next to where the module decides otherwise that are compared


@dataclass
class Made:
    """A model, not yet written, and what it is compared with.

    Attributes:
        model: The model.
        notes: What was changed or is worth knowing.
        cases: Inputs, and what the module gives for them.
        forced: What the module gave on paths that were forced, which were compared.
    """

    model: ir.Model
    notes: list[str]
    cases: list[Case]
    forced: list[list[torch.Tensor]] = field(default_factory=list)


@dataclass
class Prepared:
    """A captured model with a file's names and weights, and If and Loop for markers; notes about it."""

    captured: Captured
    notes: list[str]

    def gives(self, example: Example, expected: list[torch.Tensor]) -> bool:
        """Whether the model gives ``expected`` for the inputs of ``example``.

        Raises:
            GraphoptError: It does not run on them.
        """
        found = run(self._session, {key: to_numpy(value) for key, value in example.inputs.items()}, self.names)
        outputs = list(found.values())
        return len(outputs) == len(expected) and all(
            compare_output("", one, other).passed for one, other in zip(expected, outputs, strict=True)
        )

    @property
    def ranks(self) -> list[int]:
        return [len(value.shape) if value.shape is not None else -1 for value in self.captured.model.graph.outputs]

    @property
    def names(self) -> list[str]:
        return [value.name or "" for value in self.captured.model.graph.outputs]

    @cached_property
    def _session(self) -> Any:
        model = self.captured.model.clone()
        strip(model)
        skeleton, weights = split_weights(model)
        return create_session(skeleton, optimized=False, initializers=weights)


@dataclass
class Maker:
    """How a factory is exported: its name for messages, the opset, whether torch's warnings are let through."""

    name: str
    opset: int
    verbose: bool

    def make(self, example: Example, expected: list[torch.Tensor]) -> Made:
        """The model of ``example``'s module, which gives ``expected`` for its inputs.

        Raises:
            GraphoptError: It cannot be exported, or not for the sizes that the example declares.
            GateFailed: It does not compute what the module does.
        """
        if is_scripted(example.module):
            return self._made(example, expected, self._prepared(example, self._scripted(example)))
        try:
            captured = self._capture(example)
        except GraphoptError as failure:
            found = self._explored_despite(failure, example) if example.axes else None
            if found is None or (len(found.regions) == 1 and len(found.sizes_of(0)) == 1):
                raise
            return self._made_of(example, found)
        if _narrowed(captured, _own(example)):
            found = self._explored(example)
            if len(found.regions) > 1 or not found.raising:
                return self._made_of(example, found)
        return self._made(example, expected, self._prepared(example, captured))

    def make_with_ones_apart(self, example: Example) -> Made | None:
        """The module where axes of size 1 may be computed otherwise; None where they are not."""
        found = self._explored(example, ones=True)
        return self._made_of(example, found) if len(found.regions) > 1 else None

    def _explored(self, example: Example, *, ones: bool = False) -> Explored[Prepared]:
        """The module exported once for each range of sizes that it computes otherwise in.

        ``ones``: An export does not count for axes of size 1 unless it computes the same there.
        """
        return explore(_own(example), _InRanges(self, example, ones), self.name)

    def _explored_despite(self, failure: GraphoptError, example: Example) -> Explored[Prepared] | None:
        """The same where torch has no one export for all sizes; None where it has none in ranges either."""
        try:
            return self._explored(example)
        except TooMany as error:
            if isinstance(failure, FixedAxis) and ", at " not in failure.what:
                raise FixedAxis(f"{failure.what}{error.at}", where=self.name, hint=failure.hint) from error
            return None
        except GraphoptError:
            return None

    def _made_of(self, example: Example, found: Explored[Prepared]) -> Made:
        """One model of the exports ``found``."""
        leaves = found.regions[0].made.captured.leaves
        if any(region.made.captured.leaves != leaves for region in found.regions):
            raise GraphoptError("the module returns other outputs at other sizes", where=self.name)
        parts, notes = [], _without_other_ranks(found, self.name)
        for index, region in enumerate(found.regions):
            there = at_sizes(example, region.sizes)
            expected = run_eager(there, there.inputs, leaves)
            made = self._made(there, expected, region.made, _sizes_to_try(found, index), free=True)
            at = f"at {sized(region.sizes)}: " if index else ""
            notes += [note if note in notes else f"{at}{note}" for note in made.notes]
            parts.append(made)
        conditions = [deciding(found, index, self.name) for index in range(len(parts) - 1)]
        model = unite([made.model for made in parts], conditions, example.axes) if conditions else parts[0].model
        cases = [case for made in parts for case in made.cases] + _edges(example, found, leaves)
        forced = [outputs for made in parts for outputs in made.forced]
        return Made(model, list(dict.fromkeys(notes)) + _told(found, conditions), cases, forced)

    def _capture(self, example: Example, *, free: bool = False, promote: bool = True) -> Captured:
        return capture(example, self.name, opset=self.opset, verbose=self.verbose, promote=promote, free=free)

    def _scripted(self, example: Example) -> Captured:
        return capture_scripted(example, self.name, opset=self.opset, verbose=self.verbose)

    def _prepared(self, example: Example, captured: Captured) -> Prepared:
        """``captured`` with a file's names and weights, If and Loop made of its markers."""
        notes = tidy(captured.model, list(example.inputs), captured.outputs, example.axes)
        if captured.traced is not None:
            sink(captured.model, captured.traced.places)
        return Prepared(captured, notes)

    def _made(
        self,
        example: Example,
        expected: list[torch.Tensor],
        prepared: Prepared,
        sizes: list[list[Sizes]] | None = None,
        free: bool = False,
    ) -> Made:
        """``prepared`` with what it is compared with; where the module branches on values, every side compared."""
        from graphopt.exporting.paths import Uncompared

        captured = prepared.captured
        limits = [] if free else _limits(captured)
        if captured.traced is None:
            notes = [NOTE] if is_scripted(example.module) else []
            cases, more = make_cases(example, expected, captured.bounds, self.name, sizes=sizes)
            return Made(captured.model, [*prepared.notes, *notes, *more, *limits], cases)
        try:
            made = self._checked(example, prepared, sizes)
        except Uncompared:  # perhaps since Python numbers are tensors in the trace: once more without that
            captured = self._capture(example, free=free, promote=False)
            made = self._checked(example, self._prepared(example, captured), sizes)
        made.notes += limits
        return made

    def _checked(self, example: Example, prepared: Prepared, sizes: list[list[Sizes]] | None) -> Made:
        from graphopt.exporting.branches.following import Bounded
        from graphopt.exporting.paths import compare_paths

        captured = prepared.captured
        expected = run_eager(example, example.inputs, captured.leaves)
        with Bounded():
            cases, more = make_cases(example, expected, captured.bounds, self.name, leaves=captured.leaves, sizes=sizes)
        told, forced = compare_paths(example, captured, cases, self.name)
        strip(captured.model)
        return Made(captured.model, [*prepared.notes, *more, *told], cases, forced)


class _InRanges:
    """A module as `explore` wants it; see `sizes.regions.Module`."""

    def __init__(self, maker: Maker, example: Example, ones: bool) -> None:
        self.maker, self.example, self.ones = maker, example, ones

    def export(self, sizes: Sizes) -> tuple[Prepared, list[Guard]]:
        there = at_sizes(self.example, sizes)
        captured = self.maker._capture(there, free=True)
        apart = [Guard(symbol_of(s) > 1, None, False) for s, size in sizes.items() if self.ones and size > 1]
        return self.maker._prepared(there, captured), captured.guards + apart

    def runs(self, sizes: Sizes) -> bool:
        return _runs(at_sizes(self.example, sizes))

    def agrees(self, made: Prepared, sizes: Sizes) -> bool:
        there = at_sizes(self.example, sizes)
        try:
            expected = run_eager(there, there.inputs, made.captured.leaves)
            return made.gives(there, expected)
        except GraphoptError:
            return False


def _own(example: Example) -> Sizes:
    return {
        symbol: int(example.inputs[key].shape[axis])
        for key, axes in example.axes.items()
        for axis, symbol in axes.items()
    }


def _narrowed(captured: Captured, own: Sizes) -> bool:
    """Whether the export holds for some of the sizes alone."""
    if any(low > 1 or high is not None for low, high in captured.bounds.values()):
        return True
    return varies([guard for guard in captured.guards if guard.asked], own)


def _limits(captured: Captured) -> list[str]:
    return [
        f"{symbol!r} is {low} {'or more' if high is None else f'to {high}'}: the module does not run at other sizes"
        for symbol, (low, high) in captured.bounds.items()
        if high is not None or low > 1
    ]


def _runs(example: Example) -> bool:
    from graphopt.exporting.branches.following import Bounded

    try:
        with Bounded():
            run_eager(example, example.inputs)
    except Exception:
        return False
    return True


def _without_other_ranks(found: Explored[Prepared], name: str) -> list[str]:
    """Leave out regions of axes of size 1 in which outputs have other ranks (a squeeze takes such an axis away).

    Returns notes.

    Raises:
        GraphoptError: Outputs have other ranks at other sizes as well.
    """
    ranks = found.regions[0].made.ranks
    notes = []
    for index in reversed(range(1, len(found.regions))):
        region = found.regions[index]
        if region.made.ranks == ranks:
            continue
        at = sized(region.sizes)
        if not all(1 in sizes.values() for sizes in found.sizes_of(index)):
            raise GraphoptError(f"the module returns tensors of other ranks at {at}, as no ONNX does", where=name)
        notes.append(f"at {at} and the like the module returns tensors of other ranks, the ONNX does not")
        del found.regions[index]
        moved: dict[int | None, int | None] = {old: old - (old > index) for old in range(len(found.regions) + 1)}
        moved[index] = moved[None] = None
        found.probes = [(sizes, moved[old]) for sizes, old in found.probes]
    return notes


def _sizes_to_try(found: Explored[Prepared], index: int) -> list[list[Sizes]]:
    """Sizes of region ``index`` for the second and the third case, best first."""
    own = found.regions[index].sizes
    members = [sizes for sizes in found.sizes_of(index) if sizes != own]

    def volume(sizes: Sizes) -> int:
        product = 1
        for size in sizes.values():
            product *= size
        return product

    moderate = [sizes for sizes in members if volume(sizes) <= 4 * volume(own)] or members
    ordered = sorted(moderate, key=volume)
    return [[*ordered[:4], own], [*ordered[::-1][:4], own]] if ordered else [[own], [own]]


def _edges(example: Example, found: Explored[Prepared], leaves: list[int]) -> list[Case]:
    """Cases at sizes that differ little and are in different regions."""
    by_sizes = {tuple(sizes.values()): region for sizes, region in found.probes}
    chosen: dict[tuple[int, ...], None] = {}
    for key, region in by_sizes.items():
        for axis in range(len(key)):
            near = (*key[:axis], key[axis] + 1, *key[axis + 1 :])
            other = by_sizes.get(near)
            if region is not None and other is not None and region != other:
                chosen.update({key: None, near: None})
    cases = []
    for key in list(chosen)[:_EDGES]:
        sizes = dict(zip(found.regions[0].sizes, key, strict=True))
        there = at_sizes(example, sizes, seed=1)
        if _runs(there):
            cases.append(Case(sizes, there.inputs, run_eager(there, there.inputs, leaves)))
    return cases


def _told(found: Explored[Prepared], conditions: Sequence[Sequence[Guard]]) -> list[str]:
    """Notes: where the sizes decide, and at which the module raises."""
    said = []
    for guards in conditions:
        place = next((guard.place for guard in guards if guard.place is not None), None)
        truth = " and ".join(map(str, guards))
        said.append(f"an If on {truth}{f', from {place}' if place is not None else ''}: both sides compared")
    raising = (f"the module raises at {sized(sizes)} and sizes like it" for sizes in found.raising)
    return said + [f"{sentence}, which the ONNX does not check" for sentence in raising]
