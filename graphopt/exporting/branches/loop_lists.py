"""Lists that grow in a loop: as a turn sees them, and stacked as they are after it."""

from __future__ import annotations

from typing import Any

from graphopt.exporting.branches.errors import Unstageable
from graphopt.exporting.branches.places import somewhere


class _LoopList(list[Any]):
    """A list whose length and elements are only known when the loop runs."""

    key: Any = None  # of the loop, once that has been traced

    def _refused(self, *_: Any) -> Any:
        raise Unstageable("a list that grows in it is read", somewhere(), self.key)

    __len__ = __getitem__ = __iter__ = __contains__ = __bool__ = __add__ = __eq__ = pop = index = _refused
    __hash__ = None


class GrowingList(_LoopList):
    """A list as a turn of the loop sees it: appended to, and nothing else."""

    insert = remove = clear = reverse = sort = __setitem__ = __delitem__ = _LoopList._refused  # type: ignore[assignment]

    def appended(self) -> list[Any]:
        return list(list.__iter__(self))


class StackedList(_LoopList):
    """A list after the loop: what it holds, stacked over a new first axis.

    Args:
        stacked: That tensor.
        some: Whether it holds anything.
        key: The loop's.
    """

    def __init__(self, stacked: Any, some: Any, key: Any) -> None:
        super().__init__()
        self.stacked = stacked
        self.some = some
        self.key = key

    append = insert = extend = remove = clear = reverse = sort = _LoopList._refused  # type: ignore[assignment]


def stacked_result(function: Any, args: Any, kwargs: Any) -> Any:
    """``torch.stack`` or ``torch.cat`` of a `StackedList`.

    Raises:
        Unstageable: It is given to another function.
    """
    import torch

    axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    stacked = args[0].stacked if args and isinstance(args[0], StackedList) else None
    if stacked is not None and function is torch.stack:
        return stacked.movedim(0, axis)
    if stacked is not None and function in (torch.cat, torch.concat, torch.concatenate):
        axis = axis % (stacked.dim() - 1)
        moved = stacked.movedim(0, axis)
        return moved.squeeze(axis + 1) if moved.shape[axis + 1] == 1 else moved.flatten(axis, axis + 1)
    found = next(value for value in [*args, *kwargs.values()] if isinstance(value, StackedList))
    return found._refused()
