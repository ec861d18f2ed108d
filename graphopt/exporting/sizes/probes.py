"""Sizes at which decisions on sizes may turn out otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.exporting.sizes.guards import Guard

Sizes = dict[str, int]

_FIRST = 9  # every size below is looked at
_SCANNED = 256  # every size below is looked at for where a guard of one symbol turns
_DOUBLED = 1 << 16  # and powers of two up to here
_GUARDS = 40  # the user's own questions first
_TURNS = 4  # of one guard
_MOST = 1_500  # combinations
_LARGEST = 1 << 20


def probes(own: Mapping[str, int], guards: Iterable[Guard]) -> list[Sizes]:
    """Sizes of all symbols around the places where ``guards`` turn; ``own`` are the example's.

    Ordered: no axis of size 1 first, then those nearest to the example's.
    """
    guards = sorted(guards, key=lambda guard: not guard.asked)[:_GUARDS]
    values = {symbol: _values(symbol, size, guards) for symbol, size in own.items()}
    while math.prod(map(len, values.values())) > _MOST:
        longest = max(values, key=lambda symbol: len(values[symbol]))
        values[longest] = [*values[longest][:8], *values[longest][8::2]]
        if len(values[longest]) <= 9:
            break
    combined = [
        dict(zip(own, sizes, strict=True)) for sizes in itertools.islice(itertools.product(*values.values()), _MOST)
    ]
    return sorted(combined, key=lambda sizes: _strangeness(sizes, own))


def _strangeness(sizes: Sizes, own: Mapping[str, int]) -> tuple[int, float]:
    return sum(size == 1 for size in sizes.values()), sum(abs(math.log(sizes[s] / own[s])) for s in own)


def _values(symbol: str, own: int, guards: list[Guard]) -> list[int]:
    """Sizes of ``symbol``, the most telling first."""
    telling = [own, 1, 2, 3, own + 1, own - 1, 2 * own]
    for guard in guards:
        if symbol not in guard.symbols():
            continue
        telling += [near for constant in sorted(guard.constants()) for near in (constant - 1, constant, constant + 1)]
        if guard.symbols() == {symbol}:
            telling += _turns(guard, symbol)
    order = dict.fromkeys([*telling, *range(1, _FIRST)])
    return [size for size in order if 1 <= size <= _LARGEST]


def _turns(guard: Guard, symbol: str) -> list[int]:
    """The sizes on both sides of where ``guard`` turns."""
    scanned = [*range(1, _SCANNED), *(1 << power for power in range(8, _DOUBLED.bit_length()))]
    truths = [guard.holds({symbol: size}) for size in scanned]
    found: list[int] = []
    for low, high, before, after in zip(scanned, scanned[1:], truths, truths[1:], strict=False):
        if before == after or len(found) >= 2 * _TURNS:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if guard.holds({symbol: middle}) == before else (low, middle)
        found += [low, high]
    return found
