"""Second moments of activations: sums of x xᵀ in float64, added to in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.moments.layouts import Dense, Layout, Tokens, blocks

Array = np.ndarray[Any, Any]


class NotFinite(Exception):
    """An activation holds NaN or infinity."""


@dataclass(frozen=True)
class Moments:
    """What is known of the rows x of an activation.

    Attributes:
        gram: Σ x xᵀ, (n, n) float64; of `Tokens` the diagonal, (n,), all else being zero.
        total: Σ x, (n,) float64.
        rows: How many rows.
    """

    gram: Array
    total: Array
    rows: int

    @property
    def mean(self) -> Array:
        """The mean row; zeros where there are no rows."""
        return self.total / max(self.rows, 1)


@dataclass(frozen=True)
class CrossMoments:
    """What is known of the rows u of an activation in one model and o of the activation paired with it in another.

    Attributes:
        current: Of u.
        cross: Σ o uᵀ, (n, n) float64; of `Tokens` the diagonal, (n,).
    """

    current: Moments
    cross: Array


class MomentSum:
    """Sums of one activation."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._gram = _zeros(layout)
        self._total = np.zeros(layout.size)
        self._rows = 0
        # Imported before anything is added, since a limit on threads holds for the libraries that are loaded.
        from scipy.linalg.blas import dsyrk

        self._add_product = dsyrk

    def add(self, x: Array) -> None:
        """Add the rows of an activation.

        Raises:
            NotFinite: A row is not.
            ValueError: The activation is not as the layout says.
        """
        if isinstance(self.layout, Tokens):
            self._total += np.bincount(self.layout.indices(x), minlength=self.layout.size)
            self._rows += x.size
            return
        for (rows,) in blocks((self.layout, x)):
            self._add_rows(rows)

    def _add_rows(self, rows: Array) -> None:
        total = rows.sum(axis=0)
        if not np.isfinite(total).all():
            raise NotFinite
        self._total += total
        self._rows += len(rows)
        # The upper triangle, in place: neither a product nor its sum is made beside it.
        self._gram = self._add_product(1.0, rows.T, beta=1.0, c=self._gram, overwrite_c=1)

    def result(self) -> Moments:
        """The sums, which are not to be added to any more."""
        if isinstance(self.layout, Tokens):
            return Moments(self._total.copy(), self._total, self._rows)
        for column in range(len(self._gram)):
            self._gram[column + 1 :, column] = self._gram[column, column + 1 :]
        return Moments(self._gram, self._total, self._rows)


class CrossSum:
    """Sums of two activations that have the same positions."""

    def __init__(self, original: Layout, current: Layout) -> None:
        if original.size != current.size or isinstance(original, Tokens) is not isinstance(current, Tokens):
            raise ValueError(f"{original} and {current} cannot be paired")
        self._original = original
        self._sum = MomentSum(current)
        self._cross = _zeros(current)
        from scipy.linalg.blas import dgemm

        self._add_product = dgemm

    def add(self, original: Array, current: Array) -> None:
        """Add the rows of two activations, paired.

        Raises:
            NotFinite: A row is not.
            ValueError: An activation is not as the layout says, or the positions differ.
            GraphoptError: Indices differ, so that the sum would not be diagonal.
        """
        theirs, ours = self._original, self._sum.layout
        if isinstance(theirs, Tokens) or isinstance(ours, Tokens):
            if not np.array_equal(original, current):
                raise GraphoptError("an embedding is given other indices than in the original")
            self._sum.add(current)
            return
        self._add_dense(theirs, ours, original, current)

    def _add_dense(self, theirs: Dense, ours: Dense, original: Array, current: Array) -> None:
        for before, now in blocks((theirs, original), (ours, current)):
            if not np.isfinite(before.sum(axis=0)).all():
                raise NotFinite
            self._sum._add_rows(now)
            self._cross = self._add_product(1.0, before.T, now.T, trans_b=1, beta=1.0, c=self._cross, overwrite_c=1)

    def result(self) -> CrossMoments:
        """The sums, which are not to be added to any more."""
        current = self._sum.result()
        return CrossMoments(current, current.gram.copy() if isinstance(self._original, Tokens) else self._cross)


def bytes_of(layout: Layout) -> int:
    """What the sum of one matrix takes."""
    return 8 * layout.size * (1 if isinstance(layout, Tokens) else layout.size)


def _zeros(layout: Layout) -> Array:
    return np.zeros(layout.size) if isinstance(layout, Tokens) else np.zeros((layout.size, layout.size), order="F")
