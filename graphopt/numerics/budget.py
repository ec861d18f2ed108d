"""Ranks for many weights under one budget of weight elements, from what each rank of each weight costs and loses.

Every site has options, points of elements and loss: its ranks, and perhaps staying dense. One option is chosen for
each site so that the losses add up to as little as possible and the elements stay within the budget. On the lower
convex hull of a site's points each step gains less per element than the one before, so the steps of all sites are taken
in the order of what they gain per element (the Lagrange multiplier of the budget falls). That is the optimum for the
budgets it stops at, and elsewhere no worse than it by more than the first step that no longer fitted. What is left is
filled greedily, and a few exchanges between two sites make up for steps that were too large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.numerics.low_rank import Form, elements, rank_at_density

Array = npt.NDArray[Any]

_EXCHANGES = 16


@dataclass(frozen=True)
class Site:
    """One weight, and what its ranks are worth.

    Attributes:
        m: Outputs.
        n: Inputs.
        losses: (k + 1,), the loss at the rank 0, 1, ... k with k at most min(m, n), as ``tail_losses`` gives.
        form: What a rank is stored as.
        dense: Whether it may stay as it is, m n elements without a loss.
        multiple: Ranks are multiples of this; the last, min(m, n), always counts as one.
        minimum: The least rank.
        cost: Elements at a rank, where ``form`` does not say (several weights that share factors).
    """

    m: int
    n: int
    losses: Array
    form: Form = "pivot"
    dense: bool = True
    multiple: int = 1
    minimum: int = 1
    cost: Callable[[int], int] | None = None

    def ranks(self) -> list[int]:
        """The ranks that may be chosen, ascending."""
        last = min(len(self.losses) - 1, self.m, self.n)
        ranks = list(range(self.multiple, last + 1, self.multiple))
        if last == min(self.m, self.n) and last % self.multiple:
            ranks.append(last)
        return [rank for rank in ranks if rank >= self.minimum]

    def elements(self, rank: int | None) -> int:
        """Elements at a rank; None: dense."""
        if rank is None:
            return self.m * self.n
        return self.cost(rank) if self.cost is not None else elements(self.m, self.n, rank, self.form)

    def loss(self, rank: int | None) -> float:
        """The loss at a rank; None: dense, none."""
        return 0.0 if rank is None else float(self.losses[rank])


def tail_losses(singular_values: Array, sensitivity: float = 1.0) -> npt.NDArray[np.float64]:
    """What truncation at each rank 0 to k leaves: the sums of the squares of the later singular values, (k + 1,).

    Args:
        singular_values: (k,), descending, as ``weighted_singular_values`` gives.
        sensitivity: The model's loss for each unit of this site's squared error.
    """
    squares = singular_values.astype(np.float64) ** 2
    return sensitivity * np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])


def allocate(sites: Sequence[Site], budget: int) -> list[int | None]:
    """The rank of each site, None where it stays dense, of about the least summed loss within a budget of elements.

    Raises:
        ValueError: A site has no option, or the least of all sites exceed the budget.
    """
    frontiers = [_frontier(site) for site in sites]
    chosen = [0] * len(sites)
    left = budget - sum(options[0][0] for options in frontiers)
    if left < 0:
        raise ValueError(f"a budget of {budget} elements, {-left} less than the least ranks take")
    steps = []
    for index, options in enumerate(frontiers):
        hull = _hull(options)
        steps += [(_gain(options, first, then), index, then) for first, then in pairwise(hull)]
    blocked = set()
    for _, index, then in sorted(steps, key=lambda step: -step[0]):
        more = frontiers[index][then][0] - frontiers[index][chosen[index]][0]
        if index in blocked or more > left:
            blocked.add(index)  # later steps of this site start where this one ends
            continue
        chosen[index] = then
        left -= more
    _fill(frontiers, chosen, left)
    return [options[which][2] for options, which in zip(frontiers, chosen, strict=True)]


def same_density(shapes: Sequence[tuple[int, int]], density: float, form: Form, multiple: int = 1) -> list[int]:
    """The rank of each weight (m, n) at one density, rounded down to a multiple, but at least one multiple.

    A rank of min(m, n) stays, and none is larger.
    """
    ranks = []
    for m, n in shapes:
        rank = rank_at_density(m, n, density, form)
        if rank < min(m, n):
            rank = min(max(rank // multiple * multiple, multiple), m, n)
        ranks.append(rank)
    return ranks


def energy_rank(singular_values: Array, fraction: float, multiple: int = 1) -> int:
    """The least rank that keeps a fraction of the sum of squares, rounded up to a multiple, at least 1.

    Raises:
        ValueError: The fraction is not within 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of {fraction}")
    losses = tail_losses(singular_values)
    rank = int(np.argmax(losses <= (1 - fraction) * losses[0]))
    return min(-(-max(rank, 1) // multiple) * multiple, len(singular_values))


_Option = tuple[int, float, int | None]  # elements, loss, rank


def _frontier(site: Site) -> list[_Option]:
    """Options that no other beats in both, elements ascending, losses falling."""
    ranks: list[int | None] = [*site.ranks()]
    if site.dense:
        ranks.append(None)
    if not ranks:
        raise ValueError(f"no rank of {site.m} x {site.n} is a multiple of {site.multiple} from {site.minimum} on")
    # Of equals the dense one: the weight stays as it was.
    options = sorted(
        ((site.elements(rank), site.loss(rank), rank) for rank in ranks), key=lambda o: (o[0], o[1], o[2] is not None)
    )
    kept = [options[0]]
    for option in options[1:]:
        if option[1] < kept[-1][1]:
            kept.append(option)
    return kept


def _hull(options: Sequence[_Option]) -> list[int]:
    """The indices of the lower convex hull of a frontier."""
    hull: list[int] = []
    for index in range(len(options)):
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _gain(options: Sequence[_Option], first: int, then: int) -> float:
    """The loss that is saved for each element more."""
    return (options[first][1] - options[then][1]) / (options[then][0] - options[first][0])


def _fill(frontiers: Sequence[Sequence[_Option]], chosen: list[int], left: int) -> None:
    """Spend what is left, then let pairs of sites exchange elements for a lower sum."""
    costs = [np.array([option[0] for option in options]) for options in frontiers]
    losses = [np.array([option[1] for option in options]) for options in frontiers]
    least = 1e-12 * sum(float(each[0]) for each in losses)
    left = _spend(costs, losses, chosen, left)
    for _ in range(_EXCHANGES):
        saved, giver, less, taker, more = _best_exchange(costs, losses, chosen, left)
        if saved <= least:
            return
        left += int(costs[giver][chosen[giver]] - costs[giver][less])
        left -= int(costs[taker][more] - costs[taker][chosen[taker]])
        chosen[giver], chosen[taker] = less, more
        left = _spend(costs, losses, chosen, left)


def _spend(costs: Sequence[Array], losses: Sequence[Array], chosen: list[int], left: int) -> int:
    """Take the largest gain that fits, again and again; returns what is left then."""
    while True:
        best = (0.0, 0, 0)
        for index, now in enumerate(chosen):
            then = int(_last_within(costs[index], costs[index][now] + left))
            best = max(best, (float(losses[index][now] - losses[index][then]), index, then))
        saved, index, then = best
        if saved <= 0:
            return left
        left -= int(costs[index][then] - costs[index][chosen[index]])
        chosen[index] = then


def _best_exchange(
    costs: Sequence[Array], losses: Sequence[Array], chosen: Sequence[int], left: int
) -> tuple[float, int, int, int, int]:
    """What one site going down and another up saves at most, the first and its option, the second and its option."""
    best = (0.0, 0, 0, 0, 0)
    for giver, now in enumerate(chosen):
        if now == 0:
            continue
        freed = costs[giver][now] - costs[giver][:now]
        given_up = losses[giver][:now] - losses[giver][now]
        for taker, own in enumerate(chosen):
            if taker == giver:
                continue
            then = _last_within(costs[taker], costs[taker][own] + left + freed)
            saved = losses[taker][own] - losses[taker][then] - given_up
            less = int(np.argmax(saved))
            best = max(best, (float(saved[less]), giver, less, taker, int(then[less])))
    return best


def _last_within(costs: Array, most: Array) -> Array:
    """The last option of a frontier within an amount of elements: losses fall along it, so it loses the least."""
    return np.searchsorted(costs, most, side="right") - 1
