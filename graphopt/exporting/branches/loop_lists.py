"""Lists that grow in a loop: as a turn sees them, and stacked as they are after it."""

from __future__ import annotations

from typing import Any

from graphopt.exporting.branches import numbers
from graphopt.exporting.branches.errors import Unstageable
from graphopt.exporting.branches.joining import derived
from graphopt.exporting.branches.places import Place, somewhere
from graphopt.exporting.branches.questions import is_tensor
from graphopt.exporting.branches.sizes import same_size

Kind = tuple[Any, Any]  # dtype and shape of a tensor

READ_AFTER = "in the loop, only append to it; after the loop, read it by torch.stack, torch.cat, len or [index]"


class _LoopList(list[Any]):
    """A list whose length and elements are only known when the loop runs."""

    key: Any = None  # of the loop, once that has been traced

    def refused(self, *_: Any) -> Any:
        raise Unstageable("a list that grows in it is read", somewhere(), self.key, READ_AFTER)

    __len__ = __getitem__ = __iter__ = __contains__ = __bool__ = __add__ = __eq__ = pop = index = refused
    insert = remove = clear = reverse = sort = __setitem__ = __delitem__ = copy = count = refused  # type: ignore[assignment]
    __hash__ = None

    def appended(self) -> list[Any]:
        """What was appended since the list was made."""
        return list(list.__iter__(self))


class GrowingList(_LoopList):
    """A list as a turn of the loop sees it: appended to, and nothing else."""


class StackedList(_LoopList):
    """A list after the loop: what it held then, stacked over a new first axis, and what was appended since.

    Args:
        stacked: That tensor.
        some: Whether it held anything.
        key: The loop's.
    """

    def __init__(self, stacked: Any, some: Any, key: Any) -> None:
        super().__init__()
        self.stacked = stacked
        self.some = some
        self.key = key
        self.returned_at: Place | None = None

    def returned(self) -> Unstageable:
        """Why the module cannot return it."""
        what = "a list that grows in it is returned"
        return Unstageable(what, self.returned_at or somewhere(), self.key, "return torch.stack of it")

    def whole(self) -> Any:
        """All that it holds, stacked."""
        return _cat([self.stacked, *self._rest_stacked()])

    def length(self) -> Any:
        """How many it holds, as a size."""
        return self.stacked.shape[0] + len(self.appended())

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return self.refused()
        rest = self.appended()
        if -len(rest) <= index < 0:
            return rest[index]
        if index < 0:
            return self.stacked[index + len(rest)]
        return self.whole()[index]

    def stack(self, axis: int) -> Any:
        """``torch.stack`` of it."""
        return self.whole().movedim(0, axis)

    def cat(self, axis: int) -> Any:
        """``torch.cat`` of it."""
        axis = axis % (self.stacked.dim() - 1)
        moved = self.stacked.movedim(0, axis)
        joined = moved.squeeze(axis + 1) if moved.shape[axis + 1] == 1 else moved.flatten(axis, axis + 1)
        return _cat([joined, *self.appended()], axis)

    def _rest_stacked(self) -> list[Any]:
        rest = [value if is_tensor(value) else numbers.as_number(value) for value in self.appended()]
        for value in rest:
            if _differ((value.dtype, value.shape), (self.stacked.dtype, self.stacked.shape[1:])):
                what = "a tensor of another shape is appended to a list that grows in it"
                raise Unstageable(what, somewhere(), self.key, READ_AFTER)
        return [value[None] for value in rest]


def after_loop(grows: list[Any], held: list[Any], parts: list[Any], first: Any, key: Any, place: Place) -> StackedList:
    """A list after a loop that appended to it.

    Args:
        grows: The list, which may have grown in a loop before.
        held: What it held when the loop began; of a `StackedList`, what was appended since.
        parts: What each of its ``append`` added, stacked over the turns.
        first: Whether there was a turn.
        key: The loop's.
        place: The loop's.

    Raises:
        Unstageable: It holds tensors of different shapes.
    """
    import torch

    before = [value if is_tensor(value) else numbers.as_number(value) for value in held]
    stacked = [grows.stacked, *parts] if isinstance(grows, StackedList) else parts
    kinds = [(part.dtype, part.shape[1:]) for part in stacked] + [(value.dtype, value.shape) for value in before]
    if any(_differ(kind, kinds[0]) for kind in kinds):
        raise Unstageable("a list grows in it by tensors of different shapes", place, hint=READ_AFTER)
    some: Any = bool(held)
    if isinstance(grows, StackedList) and not held:
        some = grows.some if not is_tensor(grows.some) else torch.logical_or(grows.some, first)
    if some is False:
        some = first
    each = parts[0] if len(parts) == 1 else torch.stack(parts, 1).flatten(0, 1)
    whole = [grows.stacked] if isinstance(grows, StackedList) else []
    rest = [torch.stack(before)] if before else []
    return StackedList(_cat([*whole, *rest, each]), derived(some) if is_tensor(some) else some, key)


def _differ(one: Kind, other: Kind) -> bool:
    """Whether two tensors, by dtype and shape, are not known to be alike."""
    sizes_differ = any(not same_size(a, b) for a, b in zip(one[1], other[1], strict=False))
    return one[0] != other[0] or len(one[1]) != len(other[1]) or sizes_differ


def _cat(parts: list[Any], axis: int = 0) -> Any:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def stacked_result(function: Any, args: Any, kwargs: Any) -> Any:
    """``torch.stack`` or ``torch.cat`` of a `StackedList`.

    Raises:
        Unstageable: It is given to another function.
    """
    import torch

    axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    found = next(value for value in [*args, *kwargs.values()] if isinstance(value, StackedList))
    if args and args[0] is found and function is torch.stack:
        return found.stack(axis)
    if args and args[0] is found and function in (torch.cat, torch.concat, torch.concatenate):
        return found.cat(axis)
    return found.refused()
