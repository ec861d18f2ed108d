"""Where a value has the samples: what a value of the network for one sample is in the network for many.

The network for one sample has its batch axis, and every other axis it may have, for one sample. In the network for B
samples a value is one of three things:

* the same for all samples (a weight, a counter, the sizes of a shape): as it was;
* along an axis that has one element for one sample: as it was, but with B elements on that axis;
* stacked: with an axis in front of all that it had, of B elements. So is a number of rank 0 a vector of B numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

STACKED = -1
"""The place of a value that has an axis of samples in front of its own axes; others are the number of an axis."""

Sizes = tuple[int | None, ...]
"""Sizes of axes for one sample, None where a size is not a number."""


class RankUnknownError(Exception):
    """A rule asked for the axes of a value whose rank is not known."""


@dataclass(frozen=True)
class Lifted:
    """A value of the network for one sample, in the network for many.

    Attributes:
        value: In the network for many.
        place: The axis along which it has the samples, STACKED, or None: it is the same for all.
        sizes: For one sample; None where not even the rank is known.
    """

    value: ir.Value
    place: int | None
    sizes: Sizes | None

    @property
    def rank(self) -> int:
        """The number of axes for one sample; raises RankUnknownError."""
        if self.sizes is None:
            raise RankUnknownError(f"the rank of '{self.value.name}' is not known")
        return len(self.sizes)

    @property
    def axis(self) -> int:
        """The axis of the samples in ``value``."""
        return max(self.place or 0, 0)

    def is_one(self, axis: int) -> bool:
        """Whether an axis surely has one element for one sample; an axis in front of all others has."""
        return axis < 0 or (self.sizes is not None and self.sizes[axis] == 1)

    def padded(self, rank: int) -> Sizes:
        """Its sizes for one sample with ones in front, as broadcasting sees them."""
        return (1,) * (rank - self.rank) + (self.sizes or ())


def common_place(values: Iterable[Lifted]) -> int | None:
    """Where values that shall be one value have the samples: where all have them already, else in front."""
    found = list(values)
    places = {value.place for value in found if value.place is not None}
    if not places:
        return None
    place = min(places)
    if len(places) == 1 and place != STACKED and all(v.place == place or can_be(v, place) for v in found):
        return place
    return front_place(found)


def front_place(values: Iterable[Lifted]) -> int:
    """The first axis where that has one element in all of some values, else STACKED."""
    return 0 if all(can_be(value, 0) for value in values) else STACKED


def can_be(value: Lifted, axis: int) -> bool:
    """Whether a value can have the samples along an axis."""
    return value.sizes is not None and len(value.sizes) > axis and value.is_one(axis)
