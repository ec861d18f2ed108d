"""Loops in loops, and loops on whole numbers, as Python has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Restarted(nn.Module):
    """The outer loop's state is read inside; a counter is restarted and a sum goes on over all turns."""

    def forward(self, x: Any) -> Any:
        total = 0
        while x.abs().max() > 1:
            count = 0
            while x.sum() > 0.5 and count < 3:
                x = x - 0.25
                count += 1
                total = total + 1
            x = x * 0.5
        return x, torch.as_tensor(total)


class InnerDecides(nn.Module):
    """What the inner loop gives is the outer's condition."""

    def forward(self, x: Any) -> Any:
        left = x.abs().sum()
        while left > 1:
            part = torch.zeros(())
            while part < left:
                part = part + 0.7
            x = x * 0.6
            left = left - part
        return x, left


class IfBetween(nn.Module):
    def forward(self, x: Any) -> Any:
        turns = 0
        while x.abs().max() > 0.5:
            if x.sum() > 0:
                steps = 0
                while x[0, 0] + steps < 2:
                    steps += 1
                x = x * 0.5 - 0.01 * steps
            else:
                x = x * 0.4 + 0.1
            turns += 1
        return x, turns


class ThreeLevels(nn.Module):
    def forward(self, x: Any) -> Any:
        total = 0
        while x.abs().max() > 1:
            i = 0
            while x.sum() > 0.5 and i < 2:
                j = 0
                while x[0, 0] > 0.2 and j < 2 + i:
                    x = x - 0.1
                    j += 1
                    total += 1
                x = x - 0.05 * j
                i += 1
            x = x * 0.5
        return x, total


class Guarded(nn.Module):
    """The inner loop depends on nothing of the outer, and must not run where its If does not."""

    def forward(self, x: Any, y: Any) -> Any:
        z = y * 0
        while x.abs().max() > 0.5:
            if y.sum() > 0:
                v = y
                while v.sum() > 0.1:
                    v = v - 0.3
                z = z + v
            x = x * 0.5
        return x, z


class Unrelated(nn.Module):
    """The inner loop depends on nothing of the outer."""

    def forward(self, x: Any, y: Any) -> Any:
        while x.abs().max() > 1:
            v = y
            while v.abs().max() > 0.1:
                v = v * 0.5
            x = x * 0.5 + v
        return x


class ForWhileFor(nn.Module):
    def forward(self, x: Any) -> Any:
        n = 0
        for i in range(4):
            while x.abs().max() > 1 + i:
                for _ in range(5):
                    x = x * 0.9
                    n += 1
                    if x.sum() > 1:
                        break
            if x.sum() < -2:
                break
        return x, n


class RowWhereThereIsOne(nn.Module):
    """A row that is out of range where the If does not read it: nothing of the loop's turns, yet not before it."""

    def forward(self, x: Any, row: Any) -> Any:
        y, z = x.sum(), x[0, 0]
        while y.abs() > 0.5:
            if row < 3:
                z = z + torch.index_select(x, 0, row.reshape(1)).sum()
            y = y * 0.5
        return y, z


class Collatz(nn.Module):
    """Whole numbers without axes, one of them made by ``torch.tensor``."""

    def forward(self, n: Any) -> Any:
        count = torch.tensor(0)
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            count = count + 1
        return count


class EveryOther(nn.Module):
    """An If on a constant that the loop counts."""

    def forward(self, x: Any) -> Any:
        n = torch.tensor(0)
        while x.abs().max() > 0.1:
            if n % 2 == 0:  # noqa: SIM108
                x = x * 0.6
            else:
                x = x * 0.8 - 0.01
            n = n + 1
        return x, n


class AssignsInItsTest(nn.Module):
    def forward(self, x: Any) -> Any:
        i = 0
        while (m := x.abs().max()) > 1 and (i := i + 1) < 6:
            x = x / m * (1 + 1 / (i + 1))
        return x, m, i


LOOPS: dict[str, tuple[type[nn.Module], int]] = {
    kind.__name__: (kind, loops)
    for kind, loops in [
        (Restarted, 2),
        (InnerDecides, 2),
        (IfBetween, 2),
        (ThreeLevels, 3),
        (Guarded, 2),
        (Unrelated, 2),
        (ForWhileFor, 3),
        (RowWhereThereIsOne, 1),
        (Collatz, 1),
        (EveryOther, 1),
        (AssignsInItsTest, 1),
    ]
}
"""Name -> the module, and how many Loops it has."""
