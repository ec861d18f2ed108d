"""What a ``for`` over a range counts, where its bounds may be sizes and tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from graphopt.exporting.branches import numbers, sizes
from graphopt.exporting.branches.errors import Unstageable
from graphopt.exporting.branches.places import somewhere
from graphopt.exporting.branches.questions import is_tensor


@dataclass
class Counted:
    """The numbers that a ``for`` runs over.

    Attributes:
        start: The first one: an int, a size or a number.
        step: From one to the next.
        known: How many they are, where that is known.
        count: How many they are, otherwise: an int64 tensor without axes, 0 or less where there is none.
        of_values: Whether the values of tensors tell how many.
    """

    start: Any
    step: int
    known: int | None
    count: Any = None
    of_values: bool = False

    def at(self, turn: Any) -> Any:
        """The number of turn ``turn``, which is an int or a number."""
        if self.step != 1:
            turn = turn * self.step
        return turn if isinstance(self.start, int) and self.start == 0 else turn + self.start

    def after(self, turns: int) -> Counted:
        """What is left of it after some turns, which there are."""
        known = None if self.known is None else self.known - turns
        return replace(self, known=known, count=self.count - turns if turns and self.known is None else self.count)


def counted(arguments: tuple[Any, ...]) -> Counted:
    """How ``range(*arguments)`` counts.

    Raises:
        Unstageable: Its step is not known.
    """
    of_values = any(map(is_tensor, arguments))
    if not of_values and not any(map(sizes.is_size, arguments)):
        known = range(*arguments)
        return Counted(known.start, known.step, len(known))
    start, stop, step = (0, *arguments, 1) if len(arguments) == 1 else (*arguments, 1)[:3]
    if not isinstance(step, int) or not step:
        raise Unstageable("the step of its range is not known", somewhere())
    start, stop = (_whole(bound) for bound in (start, stop))
    distance = stop - start if step > 0 else start - stop
    if not is_tensor(distance):
        distance = sizes.as_tensor(distance)
    if abs(step) > 1:
        distance = (distance + (abs(step) - 1)).div(abs(step), rounding_mode="floor")
    return Counted(start, step, None, numbers.mark(distance), of_values)


def _whole(bound: Any) -> Any:
    """A bound of a range; a tensor of one whole number without axes."""
    import torch

    if not is_tensor(bound):
        return bound
    if bound.dtype == torch.bool or bound.dtype.is_floating_point or bound.numel() != 1:
        raise Unstageable("a bound of its range is no whole number", somewhere())
    return numbers.mark(bound.reshape(()).to(torch.int64), turn=numbers.is_turn(bound))
