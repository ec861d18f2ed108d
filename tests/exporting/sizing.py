"""Modules that decide on the sizes of their axes: each with its example, its dynamic axes, and how inputs are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop

N = {"x": {0: "n"}}
ROWS: tuple[Any, ...] = ({"x": (5, 4)}, N, [{"n": n} for n in (*range(1, 13), 30)])


class Threshold(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.shape[0] > 6:  # both sides take any size: nothing raises where the wrong one is run
            return x[:6].sum(0)
        return x.sum(0) * 2


class Gate(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.size(0) > 6 or x.sum() > 1:
            return torch.tanh(x)
        return x * 3


class InSubmodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.gate, self.after = nn.Linear(4, 4), Gate(), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.after(self.gate(self.before(x)))


class Parity(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.shape[0] % 2 == 0:
            return x.reshape(-1, 2, 4).sum(1).sum(0)
        return x.sum(0)


class Bits(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.shape[0] & 1:
            x = torch.cat([x, x[-1:]])
        return x.unflatten(0, (-1, 2)).mean(1)


class OneRow(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.shape[0] == 1:
            return x.squeeze(0) * 5
        return x.mean(0)


class Squeezed(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.squeeze(1).sum(-1)


class OneOfTheSecond(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.shape[1] == 1:
            return x * 5
        return x - 1


class Length(nn.Module):
    def forward(self, x: Any) -> Any:
        if len(x) > 3:
            x = x * 2
        return x.sum(0)


class CountsUp(nn.Module):
    def forward(self, x: Any) -> Any:
        i, h = 0, torch.zeros(4)
        while i < x.shape[0] and h.sum() < 1.5:
            h = torch.tanh(h + x[i])
            i += 1
        return h


class Ranges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        x = self.one(x)
        if 2 < x.shape[0] <= 6:
            x = self.two(x)
        elif x.shape[0] > 9:
            x = self.two(x) * 2
        return x.sum(0) - x.max() if x.max() > 1 else x.sum(0)


class Membership(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.shape[0] in (3, 5):
            return x.sum(0)
        return x.mean(0) if not x.shape[0] >= 8 else x.amax(0)


class Compared(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        if x.shape[0] == y.shape[0]:
            return (x + y).sum(0)
        return x.sum(0) - y.sum(0)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Any) -> Any:
        x = self.one(x)
        if x.shape[-1] > x.shape[-2]:
            x = x.transpose(-1, -2)
        if x.shape[-1] * x.shape[-2] > 12:
            x = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        return self.two(x).mean((2, 3))


class Operator(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.cond(x.shape[0] > 4, lambda a: a.sin().sum(0), lambda a: a.cos().sum(0) * 3, (x,))


class Asserted(nn.Module):
    def forward(self, x: Any) -> Any:
        assert x.shape[0] <= 8
        if x.shape[0] > 6:
            x = x * 2
        return x.sum(0)


class EachRow(nn.Module):
    def forward(self, x: Any) -> Any:
        h = torch.zeros(4)
        for row in x.unbind(0):  # as many copies of the body as there are rows
            h = torch.tanh(h + row)
        return h


class Longest(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        longest = max(x.shape[0], y.shape[0])
        x, y = (nn.functional.pad(t, (0, 0, 0, longest - t.shape[0])) for t in (x, y))
        return x + y * y


class Halved(nn.Module):
    def forward(self, x: Any) -> Any:
        half = x.shape[0] / 2
        return x * half if half > 2.5 else x


PAIR = {"x": {0: "n"}, "y": {0: "m"}}
SECOND: tuple[Any, ...] = (
    {"x": (3, 5, 4)},
    {"x": {0: "b", 1: "n"}},
    [{"b": b, "n": n} for b in (1, 2, 4) for n in (1, 2, 6)],
)
SIZES: dict[str, tuple[Any, Any, Any, list[dict[str, int]]]] = {
    "threshold": (Threshold, *ROWS),
    "in a submodule, with a tensor": (InSubmodule, *ROWS),
    "parity": (Parity, *ROWS),
    "bits": (Bits, *ROWS),
    "one row": (OneRow, *ROWS),
    "one of the second axis": (OneOfTheSecond, *SECOND),
    "len": (Length, *ROWS),
    "while": (CountsUp, *ROWS),
    "ranges": (Ranges, *ROWS),
    "membership": (Membership, *ROWS),
    "two axes": (
        Compared,
        {"x": (5, 4), "y": (5, 4)},
        PAIR,
        [{"n": n, "m": m} for n in (1, 2, 5, 8) for m in (1, 2, 5)],
    ),
    "the longest": (
        Longest,
        {"x": (5, 4), "y": (3, 4)},
        PAIR,
        [{"n": n, "m": m} for n in (1, 3, 6) for m in (1, 3, 7)],
    ),
    "a half": (Halved, *ROWS),
    "convolved": (
        Convolved,
        {"x": (1, 3, 8, 10)},
        {"x": {2: "h", 3: "w"}},
        [{"h": h, "w": w} for h in (1, 2, 5, 8, 20) for w in (1, 3, 8, 15)],
    ),
    "torch.cond": (Operator, *ROWS),
    "asserted": (Asserted, {"x": (5, 4)}, N, [{"n": n} for n in range(1, 9)]),
}


class NestedOperators(nn.Module):
    def forward(self, x: Any) -> Any:
        y = torch.cond(
            x.sum() > 0,
            lambda a: torch.cond(a.max() > 1, lambda b: b.sin(), lambda b: b.exp(), (a,)),
            lambda a: a.cos() * 3,
            (x,),
        )
        return while_loop(
            lambda i, y: (i < 3) & (y.sum() < 5),
            lambda i, y: (i + 1, torch.cond(y.sum() > 2, lambda q: q * 1.5, lambda q: q + 1, (y,))),
            (torch.tensor(0), y),
        )


class Integer(nn.Module):
    def forward(self, n: Any) -> Any:
        if n > 3:
            return n * 2
        return n + 1


class Noisy(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 1e6:
            return x + torch.rand(4)
        return x
