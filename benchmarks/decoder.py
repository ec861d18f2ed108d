"""A small language model in torch, trained in minutes on the text of `benchmarks.text`: LLaMA's parts, no biases.

The weights of its linear layers are 95 of 100 of its parameters with the defaults.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]

THREADS = 2


@dataclass(frozen=True)
class Config:
    """Sizes of the network, and how it is trained."""

    vocabulary: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    hidden: int = 352
    context: int = 128
    batch: int = 16
    steps: int = 1200
    rate: float = 2e-3
    dropout: float = 0.1
    decay: float = 0.1
    seed: int = 0

    def key(self, tokens: Array) -> str:
        """A name for what training on ``tokens`` gives."""
        about = json.dumps([dataclasses.asdict(self), torch.__version__], sort_keys=True).encode()
        return hashlib.sha256(about + tokens.tobytes()).hexdigest()[:16]


class Attention(nn.Module):  # type: ignore[misc]
    """Causal attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            linear(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        scores = _rotate(q, cos, sin) @ _rotate(k, cos, sin).transpose(2, 3) / math.sqrt(width // self.heads)
        attention = functional.softmax(scores + mask, dim=-1)
        attention = functional.dropout(attention, self.dropout, self.training)
        return self.o((attention @ v).transpose(1, 2).reshape(batch, length, width))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Layer(nn.Module):  # type: ignore[misc]
    """Attention, then gate, up and down, each on what a norm gives and added to what came in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.width, 1e-5), nn.RMSNorm(config.width, 1e-5)
        self.attention = Attention(config)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), cos, sin, mask))
        y = self.mlp_norm(x)
        return x + self.drop(self.down(functional.silu(self.gate(y)) * self.up(y)))


class Decoder(nn.Module):  # type: ignore[misc]
    """Tokens to the logits of the next: int64 [batch, sequence] → float32 [batch, sequence, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, 1e-5)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.drop = nn.Dropout(config.dropout)
        size = config.width // config.heads
        rates = 10000.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("rates", rates.repeat(2), persistent=False)
        depth = math.sqrt(2 * config.layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / (depth if name.endswith(("o.weight", "down.weight")) else 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1])
        angles = places[:, None] * self.rates
        mask = (places[None, :] > places[:, None]) * -1e9
        x = self.drop(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def train(config: Config, tokens: Array, *, say: Say = print) -> Decoder:
    """Train on windows drawn from ``tokens`` (int64 [n]); the same arguments on one machine give the same network."""
    torch.set_num_threads(THREADS)  # sums are taken in an order that depends on it
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    network = Decoder(config)
    network.train()
    matrices = [weight for weight in network.parameters() if weight.dim() == 2]
    vectors = [weight for weight in network.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.95))
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    start, mean = time.perf_counter(), math.nan
    for step in range(config.steps):
        at = rng.integers(0, len(tokens) - config.context, config.batch)
        rows = torch.from_numpy(np.stack([tokens[first : first + config.context + 1] for first in at]))
        loss = functional.cross_entropy(network(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        shape.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {config.steps}: loss {mean:.3f}, {time.perf_counter() - start:.0f} s")
    network.eval()
    return network


def _rate(step: int, steps: int) -> float:
    """Linear over the first twentieth, then half a cosine down to a twentieth."""
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def trained(config: Config, tokens: Array, folder: Path, *, say: Say = print) -> Path:
    """The ONNX file of the network trained on ``tokens``: out of ``folder`` where a run before this one left it."""
    import graphopt

    out = folder / f"decoder-{config.key(tokens)}.onnx"
    if out.exists():
        say(f"already trained: {out.name}")
        return out
    folder.mkdir(parents=True, exist_ok=True)
    network = train(config, tokens, say=say)
    torch.save(network.state_dict(), out.with_suffix(".pt"))
    example = torch.from_numpy(tokens[: 2 * 16].reshape(2, 16))
    graphopt.export(lambda: (network, {"tokens": example}, {"tokens": {0: "batch", 1: "sequence"}}), out)
    return out


def perplexity(logits: Callable[[Array], Array], rows: Array, *, batch: int = 16) -> float:
    """The perplexity of ``rows`` (int64 [count, length + 1]), each token but the first predicted from those before.

    Args:
        logits: int64 [batch, length] → float [batch, length, vocabulary].
        rows: As `benchmarks.text.windows` makes them.
        batch: Rows at a time.
    """
    total = 0.0
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        found = logits(part[:, :-1]).astype(np.float64)
        found -= found.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(found, part[:, 1:, None], axis=-1)[..., 0]
        total += float((np.log(np.exp(found).sum(axis=-1)) - chosen).sum())
    return math.exp(total / rows[:, 1:].size)


def n_gram_perplexity(training: Array, rows: Array, size: int, orders: Sequence[float]) -> float:
    """The perplexity of ``rows`` under counts of ``training``: what a network has to beat to have learnt anything.

    Args:
        training: Tokens.
        rows: As for `perplexity`.
        size: Of the vocabulary.
        orders: The weights of the uniform distribution, of single tokens and, if there is a third, of pairs.
    """
    single = np.bincount(training, minlength=size) / len(training)
    before, after = rows[:, :-1], rows[:, 1:]
    found = orders[0] / size + orders[1] * single[after]
    if len(orders) > 2:
        pairs = np.bincount(training[:-1] * size + training[1:], minlength=size * size).reshape(size, size)
        seen = pairs.sum(axis=1)[before]
        pair = np.where(seen > 0, pairs[before, after] / np.maximum(seen, 1), single[after])
        found = found + orders[2] * pair
    return float(np.exp(-np.log(found).mean()))
