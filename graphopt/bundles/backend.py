"""What runs the blocks of a plan, and what the values between them are: the host asks nothing else of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from graphopt.bundles.plan import Port

Places = list[Any]
"""The values of one run, each in the place that it has in all runs; None where none is yet, or no longer."""
Action = Callable[[Places], None]
RunBlock = Callable[[Sequence[Any]], Sequence[Any]]

Rows = np.ndarray[Any, np.dtype[np.int64]]
"""Indices of rows."""
Truths = np.ndarray[Any, np.dtype[np.bool_]]


class Backend(Protocol):
    """What runs blocks, and what the values between them are.

    Attributes:
        runs: How often each block has run.
    """

    runs: dict[str, int]

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        """How a block is run: values of its inputs in this order in, those of its outputs out."""

    def truth(self, value: Any) -> bool:
        """The boolean in a value."""

    def number(self, value: Any) -> int:
        """The integer in a value."""

    def scalar(self, value: int | bool, port: Port) -> Any:
        """A number as a value of one element."""

    def length(self, value: Any, axis: int) -> int:
        """How many indices an axis has."""

    def part(self, value: Any, axis: int, index: int) -> Any:
        """One index of an axis, which is gone then."""

    def stack(self, parts: Sequence[Any], axis: int, like: Port) -> Any:
        """Parts along a new axis; none of them: an empty value, unknown sizes 0."""


@dataclass(frozen=True)
class Call:
    """A run of a block on the values in places.

    Attributes:
        block: Which.
        reads: Input -> the place of its value.
        makes: Output -> the place that its value goes to.
        over: Places to empty afterwards.
    """

    block: str
    reads: Mapping[str, int]
    makes: Mapping[str, int]
    over: Sequence[int]


@runtime_checkable
class Compiles(Protocol):
    """A backend that makes one action of runs that follow each other."""

    def action(self, calls: Sequence[Call]) -> Action:
        """Do them in this order."""


@dataclass(frozen=True)
class Part:
    """Rows of a value.

    Attributes:
        value: As the backend has it.
        rows: Which of its rows; None: those at its beginning.
        to: Which rows of the whole they are.
    """

    value: Any
    rows: Rows | None
    to: Rows


@runtime_checkable
class RowBackend(Protocol):
    """A backend that takes rows of values."""

    def rows(self, count: int) -> int:
        """On how many rows blocks are run for so many samples: as many, or the next number that they are built for."""

    def truths(self, value: Any) -> Truths:
        """The booleans in a value."""

    def integers(self, value: Any) -> Rows:
        """The integers in a value."""

    def take(self, value: Any, axis: int, rows: Rows) -> Any:
        """Some rows of a value."""

    def merge(self, parts: Sequence[Part], axis: int, count: int) -> Any:
        """A value of so many rows, put together; rows at its end that no part has are the last row that one has."""

    def repeat(self, value: Any, count: int) -> Any:
        """A value again and again, along a new axis in front."""
