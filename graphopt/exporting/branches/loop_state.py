"""What a loop carries from turn to turn: found by what a turn changes, begun and ended with markers in its places."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import CellType
from typing import TYPE_CHECKING, Any

from graphopt.exporting.branches import numbers, sizes
from graphopt.exporting.branches.errors import Unstageable
from graphopt.exporting.branches.joining import derived, is_derived
from graphopt.exporting.branches.loop_lists import GrowingList, after_loop
from graphopt.exporting.branches.markers import FIXED, differing_axes, operators
from graphopt.exporting.branches.questions import is_tensor
from graphopt.exporting.branches.state import UNSET, Reached, contents, reach, same_contents, write

if TYPE_CHECKING:
    from graphopt.exporting.branches.counting import Counted
    from graphopt.exporting.branches.staging import StagedLoop


@dataclass
class Slot:
    """A place whose value a turn of the loop changes.

    Attributes:
        box: The variable, list, dict or object.
        key: Which of its values.
        spec: The structure of the value.
        initial: Its leaves as the loop begins: a tensor, or what is the same in each turn.
        leasts: For each leaf that is carried, and each of its axes: the least size, where turns change it, or `FIXED`.
            None for the other leaves.
        begins: Leaves as a turn begins.
    """

    box: Any
    key: Any
    spec: Any
    initial: list[Any]
    leasts: list[list[int] | None]
    begins: list[Any] = field(default_factory=list)


class LoopState:
    """What a loop carries from turn to turn."""

    def __init__(self, loop: StagedLoop, place: Any) -> None:
        self.loop, self.place = loop, place
        self.before: Reached = reach([*loop.cells.values(), loop.tracer.module])
        self.versions = [tensor._version for tensor in self.before.tensors]
        self.originals = [tensor.clone() for tensor in self.before.tensors]
        self.slots: list[Slot] = []
        self.changed: list[int] = []  # tensors changed in place, by index
        self.lists: list[list[Any]] = []  # lists that grow
        self.growing: list[GrowingList] = []
        self.in_place: list[Any] = []

    def restore(self) -> None:
        """Everything as it was before the loop."""
        for box, held in self.before.boxes:
            write(box, held)
        for index, tensor in enumerate(self.before.tensors):
            if tensor._version != self.versions[index]:
                tensor.copy_(self.originals[index])
                self.versions[index] = tensor._version

    # What a turn changes.

    def note_changes(self) -> bool:
        """Note what the turn just traced changed and no marker stands for yet; whether there was anything."""
        new = [*self._new_tensors(), *self._new_slots(), *self._new_leaves(), *self._new_sizes()]
        return bool(new)

    def _new_leaves(self) -> Iterable[Slot]:
        """Slots of which a leaf changes that the first turn left alone (a counter set to what it was)."""
        from torch.utils import _pytree as pytree

        for slot in self.slots:
            now, spec = pytree.tree_flatten(_get(slot.box, slot.key))
            for index, leasts in enumerate(slot.leasts):
                if leasts is not None or spec != slot.spec or not slot.begins or now[index] is slot.begins[index]:
                    continue
                if _is_carried(now[index]) and _is_carried(slot.initial[index]):
                    slot.initial[index] = _as_tensor(slot.initial[index])
                    slot.leasts[index] = least_sizes(slot.initial[index], _as_tensor(now[index]))
                    yield slot

    def _new_sizes(self) -> Iterable[Slot]:
        """Slots of which an axis changes its size otherwise than was taken for granted when the turn was traced."""
        from torch.utils import _pytree as pytree

        for slot in self.slots:
            now, spec = pytree.tree_flatten(_get(slot.box, slot.key))
            if spec != slot.spec or not slot.begins:
                continue
            for index, (begin, leaf, leasts) in enumerate(zip(slot.begins, now, slot.leasts, strict=True)):
                if leasts is None or not _is_carried(leaf) or _as_tensor(leaf).dim() != len(leasts):
                    continue
                wider = widened(leasts, begin, _as_tensor(leaf))
                if wider != leasts:
                    slot.leasts[index] = wider
                    yield slot

    def _new_tensors(self) -> Iterable[int]:
        for index, tensor in enumerate(self.before.tensors):
            if tensor._version != self.versions[index] and index not in self.changed:
                self.changed.append(index)
                yield index

    def _new_slots(self) -> Iterable[Any]:
        for box, held in self.before.boxes:
            now = contents(box)
            if same_contents(held, now):
                continue
            if isinstance(box, list) and len(now) > len(held) and same_contents(held, now[: len(held)]):
                if not any(box is known for known in self.lists):
                    self._refuse_other_holders(box)
                    self.lists.append(box)
                    yield box
                continue
            if len(held) != len(now) or (isinstance(held, dict) and list(held) != list(now)):
                kind = type(box).__name__
                raise Unstageable(f"it changes which values a {kind} holds", self.place)
            for key in held if isinstance(held, dict) else range(len(held)):
                known = any(slot.box is box and slot.key == key for slot in self.slots)
                grown = any(held[key] is growing for growing in self.lists)
                if held[key] is not now[key] and not known and not grown:
                    try:
                        slot = self._slot(box, key, held[key], now[key])
                    except Unstageable as reason:
                        reason.first_differs = True
                        raise
                    if slot is not None:
                        self.slots.append(slot)
                        yield slot

    def _refuse_other_holders(self, growing: list[Any]) -> None:
        for box, held in self.before.boxes:
            values = held.values() if isinstance(held, dict) else held
            if not isinstance(box, CellType) and any(value is growing for value in values):
                raise Unstageable("it appends to a list that is no local variable", self.place)

    def _slot(self, box: Any, key: Any, before: Any, after: Any) -> Slot | None:
        """The marker for one changed value; None where there is nothing to carry."""
        from torch.utils import _pytree as pytree

        new, spec = pytree.tree_flatten(after)
        if before is UNSET:
            if not all(_is_carried(leaf) for leaf in new):
                return None  # a variable of the body alone
            initial = [_nothing_like(leaf) for leaf in new]
        else:
            initial, initial_spec = pytree.tree_flatten(before)
            if initial_spec != spec:
                raise Unstageable(f"{self._named(box, key)} changes its structure from turn to turn", self.place)
        leaves: list[Any] = []
        leasts: list[list[int] | None] = []
        for old, leaf in zip(initial, new, strict=True):
            if _is_carried(old) and _is_carried(leaf) and (before is UNSET or old is not leaf):
                old_tensor, new_tensor = _as_tensor(old), _as_tensor(leaf)
                if old_tensor.dtype != new_tensor.dtype or old_tensor.dim() != new_tensor.dim():
                    raise self._changes_kind(box, key, old_tensor, new_tensor)
                if isinstance(old, bool) and (isinstance(leaf, bool) or is_derived(leaf)):
                    derived(old_tensor)  # a flag
                leaves.append(old_tensor)
                leasts.append(least_sizes(old_tensor, new_tensor))
            elif old is leaf or (not is_tensor(old) and not is_tensor(leaf) and old == leaf):
                leaves.append(old)
                leasts.append(None)
            else:
                raise Unstageable(f"{self._named(box, key)} is no tensor and changes", self.place)
        return Slot(box, key, spec, leaves, leasts)

    def _changes_kind(self, box: Any, key: Any, before: Any, after: Any) -> Unstageable:
        name = self._named(box, key)
        return Unstageable(f"{name} is {_kind(before)} before a turn and {_kind(after)} after it", self.place)

    def _named(self, box: Any, key: Any) -> str:
        name = next((name for name, cell in self.loop.cells.items() if cell is box), key)
        return f"{name!r}" if isinstance(name, str) else "a value"

    # Markers.

    def begin(self, first: Any, number: int) -> None:
        """Put a marker in each place that a turn changes."""
        from torch.utils import _pytree as pytree

        indices = itertools.count()
        for slot in self.slots:
            slot.begins = []
            for leaf, leasts in zip(slot.initial, slot.leasts, strict=True):
                if leasts is None:
                    slot.begins.append(leaf)
                    continue
                begin = operators().loop_begin(leaf, number, next(indices), leasts)
                slot.begins.append(_marked_like(begin, leaf))
            _put(slot.box, slot.key, pytree.tree_unflatten(slot.begins, slot.spec))
        self.in_place = []
        for index in self.changed:
            tensor = self.before.tensors[index]
            begin = operators().loop_begin(self.originals[index], number, next(indices), [FIXED] * tensor.dim())
            tensor.copy_(begin)
            self.in_place.append(begin)
        self.growing = []
        for grows in self.lists:
            replacement = GrowingList()
            self.growing.append(replacement)
            self._replace(grows, replacement)

    def _replace(self, old: list[Any], new: list[Any]) -> None:
        for box, held in self.before.boxes:
            if isinstance(box, CellType) and held[0] is old:
                box.cell_contents = new

    def end(self, first: Any, again: Any, number: int, counted: Counted | None) -> None:
        """Tie the markers together as one loop, and put its results in their places."""
        from torch.utils import _pytree as pytree

        initials, news, begins, leasts = self._carried()
        each = [_as_tensor(value) for growing in self.growing for value in growing.appended()]
        trips = counted.known if counted is not None and counted.known is not None else -1
        count = counted.count if counted is not None and counted.of_values else None
        state = operators().loop_state(first, again, count, initials, news, begins, each, number, trips)
        results = iter(
            operators().loop_result(state, begin, index, False, least)
            for index, (begin, least) in enumerate(zip(begins, leasts, strict=True))
        )
        kept = [growing.appended() for growing in self.growing]
        self.restore()
        for slot in self.slots:
            leaves = [
                leaf if least is None else _marked_like(next(results), leaf, turn=False)
                for leaf, least in zip(slot.initial, slot.leasts, strict=True)
            ]
            _put(slot.box, slot.key, pytree.tree_unflatten(leaves, slot.spec))
        for index in self.changed:
            self.before.tensors[index].copy_(next(results))
        index = len(news)
        for grows, appended in zip(self.lists, kept, strict=True):
            parts = [
                operators().loop_result(state, _as_tensor(v), index + i, True, [FIXED] * _as_tensor(v).dim())
                for i, v in enumerate(appended)
            ]
            index += len(parts)
            held = self._held_before(grows)
            self._replace(grows, after_loop(grows, held, parts, first, self.loop.key, self.place))

    def _carried(self) -> tuple[list[Any], list[Any], list[Any], list[list[int]]]:
        """Of all carried leaves: as the loop begins, as the turn ends, as the turn begins, and the least sizes."""
        from torch.utils import _pytree as pytree

        initials, news, begins, bounds = [], [], [], []
        for slot in self.slots:
            now, spec = pytree.tree_flatten(_get(slot.box, slot.key))
            if spec != slot.spec:
                raise Unstageable(
                    f"{self._named(slot.box, slot.key)} changes its structure from turn to turn", self.place
                )
            for begin, initial, new, leasts in zip(slot.begins, slot.initial, now, slot.leasts, strict=True):
                if leasts is None:
                    if new is not initial and not (not is_tensor(new) and new == initial):
                        raise Unstageable(f"{self._named(slot.box, slot.key)} is no tensor and changes", self.place)
                    continue
                value = _as_tensor(new)
                if value.dtype != begin.dtype or value.dim() != begin.dim():
                    raise self._changes_kind(slot.box, slot.key, begin, value)
                initials.append(initial)
                news.append(value)
                begins.append(begin)
                bounds.append(leasts)
        for index, begin in zip(self.changed, self.in_place, strict=True):
            initials.append(self.originals[index])
            news.append(self.before.tensors[index].clone())
            begins.append(begin)
            bounds.append([FIXED] * begin.dim())
        return initials, news, begins, bounds

    def _held_before(self, grows: list[Any]) -> Any:
        return next(held for box, held in self.before.boxes if box is grows)


def least_sizes(before: Any, after: Any) -> list[int]:
    """For each axis the least of the sizes of two tensors, or `FIXED` where both have one size."""
    axes = zip(before.shape, after.shape, differing_axes(before, after), strict=True)
    return [min(sizes.least(a), sizes.least(b)) if differ else FIXED for a, b, differ in axes]


def widened(leasts: list[int], begin: Any, end: Any) -> list[int]:
    """``leasts``, with which ``begin`` was made, so that they hold for ``end`` too, which the next turn begins with."""
    axes = zip(leasts, begin.shape, end.shape, differing_axes(begin, end), strict=True)
    return [
        min(sizes.least(was), sizes.least(size)) if differ and known == FIXED else min(known, sizes.least(size))
        for known, was, size, differ in axes
    ]


def _is_carried(value: Any) -> bool:
    return is_tensor(value) or numbers.is_plain(value) or sizes.is_size(value)


def _as_tensor(value: Any) -> Any:
    return value if is_tensor(value) else numbers.as_number(value)


def _nothing_like(value: Any) -> Any:
    """What a variable holds before its first turn: anything, since Python would raise."""
    import torch

    if numbers.is_plain(value) or sizes.is_size(value):
        return type(value)(0) if numbers.is_plain(value) else 0
    shape = [0 if sizes.is_unknown(size) else size for size in value.shape]
    nothing = torch.zeros(shape, dtype=value.dtype, device=value.device)
    return numbers.mark(nothing) if numbers.is_number(value) else nothing


def _marked_like(value: Any, like: Any, *, turn: bool | None = None) -> Any:
    if is_derived(like):
        derived(value)
    if not numbers.is_number(like):
        return value
    return numbers.mark(value, turn=numbers.is_turn(like) if turn is None else turn)


def _kind(value: Any) -> str:
    shape = "×".join(map(str, value.shape)) or "scalar"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {shape}"


def _get(box: Any, key: Any) -> Any:
    return contents(box)[key]


def _put(box: Any, key: Any, value: Any) -> None:
    if isinstance(box, CellType):
        box.cell_contents = value
    elif isinstance(box, (list, dict)):
        box[key] = value
    else:
        box.__dict__[key] = value
