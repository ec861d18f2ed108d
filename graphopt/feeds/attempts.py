"""The ways to choose what a model leaves open, for one case of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

_LADDER = (4, 8, 16, 32, 64, 128, 224, 256, 384, 512, 640)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to choose what the model leaves open."""

    size: int | None = None  # of every free axis; None: by name and use
    ties: str = "shared"  # unnamed axes: "shared" between inputs by position, "separate", or "equal": all sizes
    batch: int | None = None  # None: 2, 1, 3, ...
    unknown_rank: int | None = None
    unknown_limit: int = 2  # indices into nobody knows what
    integers: tuple[int, int] | None = None  # of unknown use: from, below
    timid: bool = False  # sizes, bounds and optional inputs: the values that run most often, not those that tell most


@dataclasses.dataclass(frozen=True)
class Draw:
    """One way to draw the values, where the sizes are chosen."""

    scale: float = 1.0  # of floats that may have any magnitude
    again: int = 0  # another number, other values
    few: bool = False  # few different values, so that some are equal


# What is tried in a case that is to have large magnitudes: overflow shows there alone, and limits are passed. Powers of
# two, which leave the digits as they are; the second for what overflows by itself, as float16 does.
STRETCHES = (Draw(scale=256.0), Draw(scale=16.0))
# What is tried where every output is constant.
REDRAWS = (Draw(again=1), Draw(few=True), Draw(scale=8.0), Draw(again=2), Draw(again=3))


def sizes_to_try() -> Iterator[Attempt]:
    """The ways to choose sizes, the most telling first."""
    yield Attempt()
    plain = Attempt(timid=True)
    yield plain
    yield dataclasses.replace(plain, ties="separate")
    yield dataclasses.replace(plain, unknown_limit=1)
    yield from (dataclasses.replace(plain, integers=span) for span in ((0, 2), (1, 2), (0, 1)))
    for batch in (None, 1):
        yield from (dataclasses.replace(plain, size=size, batch=batch) for size in _LADDER)
    yield from (dataclasses.replace(plain, size=size, ties="equal") for size in (2, 1, *_LADDER))
    yield from (dataclasses.replace(plain, unknown_rank=rank) for rank in range(5))
