"""Loops whose state grows: token loops, caches, and what else changes its size from turn to turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WORDS, WIDTH, END, LONGEST = 12, 8, 2, 9


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST + 4, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS)

    def next(self, state: Any, at: Any, bias: Any) -> Any:
        """The likeliest word after position ``at``: what ``bias`` wants, mostly."""
        return (self.head(state) + bias[at]).argmax(-1, keepdim=True)


class TokenLoop(Base):
    """All tokens again in each turn, under a causal mask."""

    def forward(self, tokens: Any, bias: Any) -> Any:
        while tokens[0, -1] != END and tokens.shape[1] < LONGEST:
            n = tokens.shape[1]
            x = self.words(tokens) + self.places(torch.arange(n))
            scores = self.q(x) @ self.k(x).transpose(1, 2)
            seen = torch.tril(torch.ones(n, n))
            x = scores.masked_fill(seen == 0, -1e9).softmax(-1) @ self.v(x)
            tokens = torch.cat([tokens, self.next(x[:, -1], n - 1, bias)], 1)
        return tokens


class CacheFromNothing(Base):
    """Keys and values of one length, empty at first."""

    def forward(self, tokens: Any, bias: Any) -> Any:
        k = torch.zeros(1, 2, 0, 4)
        v = torch.zeros(1, 2, 0, 4)
        for at in range(LONGEST):
            x = self.words(tokens[:, -1:]) + self.places.weight[at]
            q, more_k, more_v = (part(x).view(1, 1, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
            k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 8)
            tokens = torch.cat([tokens, self.next(x, at, bias)], 1)
            if tokens[0, -1] == END:
                break
        return tokens, k.sum(2), v


class Until(Base):
    """A flag ends it; the length is read as a position, and after the loop."""

    def forward(self, tokens: Any, bias: Any) -> Any:
        cache = self.k(self.words(tokens))
        done = False
        while tokens.shape[1] < LONGEST and not done:
            at = tokens.shape[1] - 1
            x = self.q(self.words(tokens[:, -1])) + self.places.weight[at]
            x = (x[:, None] @ cache.transpose(1, 2)).softmax(-1) @ cache
            word = self.next(x[:, 0], at, bias)
            done = bool(word[0, 0] == END)
            tokens = torch.cat((tokens, word), dim=1)
            cache = torch.cat((cache, self.k(self.words(word))), dim=1)
        return tokens, cache.mean(1), tokens.shape[1]


class ReturnsFromWithin(Base):
    def forward(self, tokens: Any, bias: Any) -> Any:
        while tokens.shape[1] < LONGEST:
            word = self.next(self.words(tokens).mean(1), tokens.shape[1] - 1, bias)
            if word[0, 0] == END:
                return tokens, word
            tokens = torch.cat([tokens, word], 1)
        return tokens, tokens[:, :1]


class TwoLengths(Base):
    """One state grows by two in a turn, one by one or by none; both are read in the turn and after it."""

    def forward(self, tokens: Any, bias: Any) -> Any:
        seen = self.words(tokens)
        few = seen[:, :0]
        at = 0
        while at < 6 and seen.shape[1] + few.shape[1] < LONGEST + 3:
            x = seen.mean(1) + few.sum(1)
            word = self.next(x, at, bias)
            if word[0, 0] > 5:
                few = torch.cat([few, x[:, None]], 1)
            seen = torch.cat([seen, self.words(word), x[:, None]], 1)
            at += 1
            if word[0, 0] == END:
                break
        return seen, few, at


class Doubles(nn.Module):
    """Twice as long in each turn, until it is too long or sums to enough."""

    def forward(self, x: Any, bias: Any) -> Any:
        while x.shape[0] < 20 and x.sum().abs() < 8:
            x = torch.cat([x, x * 1.5])
        return x


class Shrinks(nn.Module):
    def forward(self, x: Any, bias: Any) -> Any:
        while x.shape[0] > 1 and x[0] < 1:
            x = x[1:] + 0.25
        return x


class InFront(nn.Module):
    """Grows in front, and reads a size that stays."""

    def forward(self, x: Any, bias: Any) -> Any:
        y = x[:2]
        for step in range(7):
            y = torch.cat([y[:1] * 0.5 + x[step % x.shape[0]], y])
            if y.sum() > 2:
                break
        return y.flip(0)


class SizeDecides(nn.Module):
    """An If on the size in the body, and a number that is counted from it."""

    def forward(self, x: Any, bias: Any) -> Any:
        y, most = x[:1], 0
        while y.abs().sum() < 6 and len(y) < 9:
            if y.shape[0] > 3:  # noqa: SIM108
                y = torch.cat([y, y[-1:] * 1.25])
            else:
                y = torch.cat([y, y[-1:] + 0.5, y[:1]])
            most = y.shape[0] * 2
        return y, most


class Nested(nn.Module):
    """A loop that grows in a loop that grows."""

    def forward(self, x: Any, bias: Any) -> Any:
        rows = x[:1]
        while rows.shape[0] < 8 and rows.abs().sum() < 9:
            part = rows[-1:]
            while part.shape[0] < 4 and part.sum() < 1:
                part = torch.cat([part, part[-1:] + 0.4])
            rows = torch.cat([rows, part.sum(0, keepdim=True) * 0.5, part[:1]])
        return rows


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Any, cache: Any) -> Any:
        k, v = self.k(x), self.v(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        return x + (self.q(x) @ k.transpose(1, 2)).softmax(-1) @ v, (k, v)


class Layers(Base):
    """Caches of layers in a list of tuples, made by a first pass over the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, tokens: Any, bias: Any) -> Any:
        caches = []
        x = self.words(tokens)
        for layer in self.layers:
            x, cache = layer(x, None)
            caches.append(cache)
        word = self.next(x[:, -1], 0, bias)
        while word[0, 0] != END and tokens.shape[1] < LONGEST:
            tokens = torch.cat([tokens, word], 1)
            x = self.words(word)
            for i, layer in enumerate(self.layers):
                x, caches[i] = layer(x, caches[i])
            word = self.next(x[:, -1], tokens.shape[1] - 1, bias)
        return tokens, caches[1][0].sum(1)


class CachesOfNone(Layers):
    """The first turn makes the caches, and reads the whole prompt."""

    def forward(self, tokens: Any, bias: Any) -> Any:
        caches = [None, None]
        new = tokens
        for at in range(LONGEST):
            x = self.words(new)
            for i, layer in enumerate(self.layers):
                x, caches[i] = layer(x, caches[i])
            new = self.next(x[:, -1], at, bias)
            tokens = torch.cat([tokens, new], 1)
            if new[0, 0] == END:
                break
        return tokens, caches[0][1].sum(1)


class ReturnsWithCacheOfNone(Layers):
    def forward(self, tokens: Any, bias: Any) -> Any:
        cache = None
        while True:
            x = self.words(tokens if cache is None else tokens[:, -1:])
            x, cache = self.layers[0](x, cache)
            new = self.next(x[:, -1], tokens.shape[1] - 1, bias)
            if new[0, 0] == END:
                return tokens
            tokens = torch.cat([tokens, new], 1)
            if tokens.shape[1] >= LONGEST:
                break
        return tokens + 1


class LargestOfNone(nn.Module):
    def forward(self, x: Any, bias: Any) -> Any:
        best = None
        for i in range(5):
            x = torch.tanh(x) * 1.7 + 0.1 * i
            best = x.sum() if best is None else torch.maximum(best, x.sum())
            if best > 2:
                break
        return best, i


class OneBranchKnowsMore(nn.Module):
    """What reads at a place says of the size holds on its path alone."""

    def forward(self, x: Any, bias: Any) -> Any:
        y, n = x[:1], 0
        while y.shape[0] < 9 and y.abs().sum() < 30:
            if y.shape[0] > 4:
                y = y + y[4]
            if y.shape[0] > 3:
                n = n + 1
                y = y * 1.1
            else:
                y = y + 1
            y = torch.cat([y, y[-1:] * 0.9])
        return y, n


class NoneLeft(nn.Module):
    def forward(self, x: Any, bias: Any) -> Any:
        while x.shape[0] > 0 and x[0] < 1:
            x = x[1:] + 0.1
        return x, x.shape[0]


GROWING: dict[str, tuple[type[nn.Module], int, int]] = {
    kind.__name__: (kind, loops, branches)
    for kind, loops, branches in [
        (TokenLoop, 1, 1),
        (CacheFromNothing, 1, 0),
        (Until, 1, 1),
        (ReturnsFromWithin, 1, 2),
        (TwoLengths, 1, 2),
        (Doubles, 1, 1),
        (Shrinks, 1, 1),
        (InFront, 1, 0),
        (SizeDecides, 1, 2),
        (Nested, 2, 2),
        (Layers, 1, 1),
        (CachesOfNone, 1, 0),
        (ReturnsWithCacheOfNone, 1, 3),
        (LargestOfNone, 1, 0),
        (OneBranchKnowsMore, 1, 3),
        (NoneLeft, 1, 1),
    ]
}
"""Name -> the module, how many Loops it has, and how many Ifs."""


def inputs(kind: type[nn.Module], seed: int) -> dict[str, Any]:
    """Inputs by which loops end after none, some, or the most turns; the end comes after ``seed`` words."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(LONGEST + 4, WORDS, generator=generator)
    bias[:, END] = -9
    bias[seed % (LONGEST + 4), END] = 99
    if not issubclass(kind, Base):
        return {"x": torch.randn(3, generator=generator) * (0.2 + seed % 4), "bias": bias}
    tokens = torch.randint(3, WORDS, (1, 1 + seed % 3), generator=generator)
    if seed % 8 == 7:
        tokens[0, -1] = END
    return {"tokens": tokens, "bias": bias}


def axes(kind: type[nn.Module]) -> dict[str, dict[int, str]]:
    return {"tokens": {1: "time"}} if issubclass(kind, Base) else {"x": {0: "time"}}


def ranged(seed: int) -> dict[str, Any]:
    """Inputs of a loop over a range of tensors: ``t`` from -2 to 6."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 3, generator=generator) * (1 + seed % 4), "t": torch.tensor(seed % 9 - 2)}


class Counts(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        for _ in range(int(t)):
            x = torch.tanh(x) * 1.3 + 0.1
        return x


class CountsAndBreaks(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        turns, last = 0, -1
        for i in range(t):
            x = torch.tanh(x) + i * 0.3
            turns += 1
            last = i
            if x.sum() > 4:
                break
        return x, turns, last


class StartStopStep(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        up = down = 0
        for i in range(1, t.item() + 2, 2):
            up = up + i * i
        for i in range(t, -3, -2):
            down = down * 2 + i
        return x * up, torch.as_tensor(down)


class CountsAList(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        seen = [x]
        for i in range(max(int(t), 0)):
            if x.sum() > 9:
                continue
            x = x * 1.1 + i
        for _ in range((x > 0).sum()):
            x = x * 0.5
            seen.append(x)
        return torch.stack(seen), len(seen)


class CountsTriangles(nn.Module):
    """The counter of a loop bounds the loop in it; what grows is returned, and its size."""

    def forward(self, x: Any, t: Any) -> Any:
        y = x[:1]
        for i in range(int(t)):
            for j in range(i):
                x = x * 0.9 + j
            y = torch.cat([y, x[:1]])
            if x.sum() > 20:
                return y, y.shape[0]
        return y * 2, y.shape[0]


RANGES: dict[str, tuple[type[nn.Module], int]] = {
    kind.__name__: (kind, loops)
    for kind, loops in [
        (Counts, 1),
        (CountsAndBreaks, 1),
        (StartStopStep, 2),
        (CountsAList, 2),
        (CountsTriangles, 2),
    ]
}
"""Name -> the module, and how many Loops it has."""


class OnceMore(nn.Module):
    """Appended to in the loop and after it."""

    def forward(self, x: Any) -> Any:
        seen: list[Any] = []
        while x.abs().max() > 1:
            x = x * 0.7
            seen.append(x)
        seen.append(x * 2)
        return torch.stack(seen), len(seen), seen[-1]


class SometimesOnceMore(nn.Module):
    def forward(self, x: Any) -> Any:
        seen = [x]
        while x.abs().max() > 1:
            x = x * 0.7
            seen.append(x)
        if x.sum() > 0:
            seen.append(x * 2)
        return torch.cat(seen, 1)


class ReadByIndex(nn.Module):
    def forward(self, x: Any) -> Any:
        seen = [x]
        for _ in range(6):
            x = x * 0.7
            seen.append(x + 1)
            if x.abs().max() < 1:
                break
        seen.extend([x, x - 1])
        more = seen[0] if len(seen) > 5 else seen[2]
        return seen[-1], seen[-3], more, torch.cat(seen)


class TwoLoopsOneList(nn.Module):
    def forward(self, x: Any) -> Any:
        seen: list[Any] = []
        while x.abs().max() > 1:
            x = x * 0.7
            seen.append(x)
        seen.append(x)
        while x.abs().max() > 0.5:
            x = x * 0.7
            seen.append(x + 2)
        return torch.stack(seen)


LISTS: dict[str, tuple[type[nn.Module], int]] = {
    kind.__name__: (kind, loops)
    for kind, loops in [(OnceMore, 1), (SometimesOnceMore, 1), (ReadByIndex, 1), (TwoLoopsOneList, 2)]
}
"""Name -> the module, and how many Loops it has."""


class MatchesAPosition(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        match int(x[0].argmax()):
            case 0:
                return x * 3 + t
            case 1:
                y = x * 2
            case _:
                y = x - 1
        return y + t


class MatchesAlternatives(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        k = t.item()
        match k:
            case -1 | 0:
                y = x
            case 2 if x[0, 0] > 0:
                y = x * 3
            case 2:
                y = x * 4
            case n:
                y = x * n
        return y


class MatchesATuple(nn.Module):
    def forward(self, x: Any, t: Any) -> Any:
        match bool(x.sum() > 0), int(t):
            case (True, 3):
                x = x * 2
            case (False, _):
                x = x * 3
            case _:
                x = x * 5
        return x


MATCHES: dict[str, tuple[type[nn.Module], int]] = {
    kind.__name__: (kind, branches)
    for kind, branches in [(MatchesAPosition, 2), (MatchesAlternatives, 5), (MatchesATuple, 3)]
}
"""Name -> the module, and how many Ifs it has."""


class Iterated(nn.Module):
    """Refused: the list is gone through after an unbounded loop."""

    def forward(self, x: Any) -> Any:
        seen: list[Any] = []
        while x.abs().max() > 1:
            x = x * 0.7
            seen.append(x + 1)
        for y in seen:
            x = x + y
        return x


class Returned(nn.Module):
    """Refused: as many outputs as there are turns."""

    def forward(self, x: Any) -> Any:
        seen: list[Any] = []
        while x.abs().max() > 1:
            x = x * 0.7
            seen.append(x + 1)
        return seen


class NoTurnNoTensor(nn.Module):
    """Refused: without a turn there is no tensor."""

    def forward(self, x: Any) -> Any:
        best = None
        while x.sum() < 30:
            x = x + 0.3
            best = x.sum() if best is None else torch.maximum(best, x.sum())
        return x if best is None else x * best


class ManyValues(nn.Module):
    """Refused: an int of any value picks what is computed."""

    def forward(self, x: Any) -> Any:
        names = {k: k * 2 for k in range(-500, 500)}
        return x * names[int(x.sum() * 9)]
