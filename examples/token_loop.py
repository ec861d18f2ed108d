"""A small decoder that writes words until it writes the end: greedy, with a cache of keys and values. Seeded weights.

graphopt export examples/token_loop.py:network -o tokens.onnx
graphopt optimize tokens.onnx --recipe static --target onnx -o tokens.bundle
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORDS, WIDTH, HEADS, END, LONGEST = 40, 32, 4, 34, 16


class Layer(nn.Module):
    """Attention over all words so far, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mix = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x``: [1, words, WIDTH], added to the cache, [1, HEADS, words before, WIDTH / HEADS]."""
        query, key, value = (
            part(x).view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        scores = query @ keys.transpose(2, 3) / query.shape[3] ** 0.5
        if x.shape[1] > 1:  # the first words: none sees those after it
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) == 1, -1e9)
        x = x + (scores.softmax(3) @ values).transpose(1, 2).flatten(2)
        return x + self.mix(x), keys, values


class TokenLoop(nn.Module):
    """Two layers that write at most `LONGEST` words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.first, self.second = Layer(), Layer()
        self.head = nn.Linear(WIDTH, WORDS)

    def next(self, words: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The word [1, 1] that follows ``words`` [1, n], which are added to the keys and values of both layers."""
        before = caches[0].shape[2]
        x = self.words(words) + self.places(before + torch.arange(words.shape[1]))
        x, keys, values = self.first(x, *caches[:2])
        x, more_keys, more_values = self.second(x, *caches[2:])
        return self.head(x[:, -1]).argmax(1, keepdim=True), [keys, values, more_keys, more_values]

    def forward(self, words: Tensor) -> Tensor:
        """The words [1, 4] and what follows them, at most [1, 4 + LONGEST]."""
        caches = self.next(words[:, :-1], [torch.zeros(1, HEADS, 0, WIDTH // HEADS)] * 4)[1]
        word = words[:, -1:]
        for _ in range(LONGEST):
            word, caches = self.next(word, caches)
            words = torch.cat([words, word], 1)
            if word == END:
                break
        return words


def network() -> tuple[TokenLoop, dict[str, Tensor], None]:
    """As `graphopt export` takes it: module, example inputs, no dynamic axes."""
    return TokenLoop().eval(), {"words": torch.randint(1, WORDS, (1, 4))}, None
