"""A captioner with attention (Show, Attend and Tell; Xu et al., ICML 2015): words one by one, until <end>."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.dynamic.models.dynamic import Exits

START, END = 0, 1
LONGEST = 10


class Attention(nn.Module):
    """The mean of the places of a map, weighted by what the decoder's state asks for."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.of_place, self.of_state = nn.Linear(channels, hidden), nn.Linear(hidden, hidden)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, places: Tensor, hidden: Tensor) -> Tensor:
        told = (self.of_place(places) + self.of_state(hidden).unsqueeze(1)).relu()
        return (places * self.weight(told).softmax(1)).sum(1)


class Captioner(Exits):
    """An encoder, whose map is pooled by 4, and a decoder; gives the words, int64 [batch, 1 + words].

    At each step the score of <end> is lowered by that step's threshold, as a prior on the length does.
    """

    is_end: Tensor

    def __init__(self, encoder: nn.Module, channels: int, *, hidden: int, words: int, size: int) -> None:
        super().__init__(LONGEST, size)
        self.encoder = nn.Sequential(encoder, nn.AvgPool2d(4))
        self.attention = Attention(channels, hidden)
        self.embedding = nn.Embedding(words, hidden)
        self.first_hidden, self.first_cell = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.doubt = nn.Linear(hidden, channels)
        self.decoder = nn.LSTMCell(hidden + channels, hidden)
        self.scores = nn.Linear(hidden, words)
        self.register_buffer("is_end", (torch.arange(words) == END).float())

    def forward(self, image: Tensor, thresholds: Tensor | None = None) -> Tensor:
        if thresholds is None:
            thresholds = self.thresholds
        places = self.encoder(image).flatten(2).transpose(1, 2)
        mean = places.mean(1)
        hidden, cell = self.first_hidden(mean), self.first_cell(mean)
        word = torch.full((image.shape[0],), START, dtype=torch.int64)
        caption = [word]
        for step in range(LONGEST):
            seen = self.doubt(hidden).sigmoid() * self.attention(places, hidden)
            hidden, cell = self.decoder(torch.cat([self.embedding(word), seen], 1), (hidden, cell))
            word = (self.scores(hidden) - thresholds[step] * self.is_end).argmax(1)
            caption.append(word)
            if (word == END).all():
                break
        return torch.stack(caption, 1)

    def judges(self) -> tuple[Sequence[nn.Module], Callable[[Tensor], Tensor]]:
        return [self.scores], lead_of_end


def lead_of_end(scores: Tensor) -> Tensor:
    """By how much the score of <end> is above that of every other word."""
    others = torch.cat([scores[:, :END], scores[:, END + 1 :]], 1)
    return (scores[:, END] - others.amax(1)).min()
