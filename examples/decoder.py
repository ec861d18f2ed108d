"""A decoder with a KV cache whose linears are low-rank, from torch to a verified file that runs prefill and decode.

pip install '.[cpu,export]'                      # in graphopt's folder
python examples/decoder.py [FOLDER]              # a minute; the files go to FOLDER, demo/decoder by default

One file does both: `past` may be 0. Prefill gives it many tokens and an empty cache, decode one token and the cache
that the last call returned.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt

RECIPE = "lowrank"

PROMPT, STEPS = 128, 16
LAYERS = 4
# What float32 may differ by, of the logits' largest magnitude: each model sums in another order.
TOLERANCE = 1e-4

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """A LLaMA-style decoder in small."""

    width: int = 512
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 1408
    vocabulary: int = 512

    @property
    def head(self) -> int:
        return self.width // self.heads


class LowRank(nn.Module):
    """y = U V x at half the full rank. ``merge`` puts their product in their place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        rank = min(inputs, outputs) // 2
        # Singular values that fall to a twentieth, as those of trained weights do.
        spectrum = torch.logspace(0, -1.3, rank)
        spectrum *= (outputs / spectrum.square().sum()).sqrt()
        left, _ = torch.linalg.qr(torch.randn(outputs, rank))
        right, _ = torch.linalg.qr(torch.randn(inputs, rank))
        self.v, self.u = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.v.weight = nn.Parameter((right * spectrum.sqrt()).T.contiguous())
        self.u.weight = nn.Parameter(left * spectrum.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))

    def merge(self) -> nn.Linear:
        """The same map as one dense linear."""
        dense = nn.Linear(self.v.in_features, self.u.out_features, bias=False)
        dense.weight = nn.Parameter((self.u.weight.double() @ self.v.weight.double()).float())
        return dense


class RMSNorm(nn.Module):
    """Scales by the root mean square, then by a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    """Grouped-query attention with rotary positions and a cache, then gate, up and down."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, kv = sizes.width, sizes.kv_heads * sizes.head
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.o = (LowRank(width, n) for n in (width, kv, kv, width))
        self.gate, self.up = LowRank(width, sizes.hidden), LowRank(width, sizes.hidden)
        self.down = LowRank(sizes.hidden, width)

    def forward(
        self, x: Tensor, past_k: Tensor, past_v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's result, and the cache with the new tokens' keys and values."""
        batch, length, width = x.shape
        normed = self.attention_norm(x)
        query, key, value = (
            part(normed).view(batch, length, -1, self.sizes.head).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        key = torch.cat([past_k, rotate(key, cos, sin)], dim=2)
        value = torch.cat([past_v, value], dim=2)
        times = self.sizes.heads // self.sizes.kv_heads
        keys, values = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        scores = rotate(query, cos, sin) @ keys.transpose(-1, -2) / self.sizes.head**0.5
        mixed = scores.masked_fill(mask, -1e9).softmax(-1) @ values
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = self.mlp_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed)), key, value


class Decoder(nn.Module):
    """ids and a cache to logits and a longer cache."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(LAYERS))
        self.norm = RMSNorm(sizes.width)
        self.logits = LowRank(sizes.width, sizes.vocabulary)
        frequencies = 10000.0 ** (-torch.arange(0, sizes.head, 2) / sizes.head)
        self.register_buffer("frequencies", torch.cat([frequencies, frequencies]))

    def forward(
        self,
        ids: Tensor,
        past_k_0: Tensor,
        past_v_0: Tensor,
        past_k_1: Tensor,
        past_v_1: Tensor,
        past_k_2: Tensor,
        past_v_2: Tensor,
        past_k_3: Tensor,
        past_v_3: Tensor,
    ) -> dict[str, Tensor]:
        """int64 [batch, length], then float32 [batch, kv_heads, past, head] each; the cache grows by ``length``."""
        past = [(past_k_0, past_v_0), (past_k_1, past_v_1), (past_k_2, past_v_2), (past_k_3, past_v_3)]
        before, length = past_k_0.shape[2], ids.shape[1]
        positions = torch.arange(before, before + length)
        mask = torch.arange(before + length)[None, :] > positions[:, None]
        angles = positions[:, None] * self.frequencies
        x = self.words(ids)
        present: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x, key, value = block(x, *past[i], angles.cos(), angles.sin(), mask)
            present |= {f"present_k_{i}": key, f"present_v_{i}": value}
        return {"logits": self.logits(self.norm(x)), **present}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the first half of a head is turned against the second."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def decoder(sizes: Sizes, *, merged: bool = False) -> Decoder:
    """The seeded network, its linears two factors each, or merged: the same function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Decoder(sizes)
    made.eval()
    if merged:
        for module in list(made.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LowRank):
                    setattr(module, name, child.merge())
    return made


def factory(sizes: Sizes, *, merged: bool = False) -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]]]:
    """What `graphopt.export` asks for: the network, example inputs, and the axes that may change."""
    examples: dict[str, Tensor] = {"ids": torch.randint(0, sizes.vocabulary, (2, 6))}
    axes = {"ids": {0: "batch", 1: "length"}}
    for i in range(LAYERS):
        for name in (f"past_k_{i}", f"past_v_{i}"):
            examples[name] = torch.randn(2, sizes.kv_heads, 4, sizes.head)
            axes[name] = {0: "batch", 2: "past"}
    return decoder(sizes, merged=merged), examples, axes


def empty_cache(sizes: Sizes, length: int = 0) -> Feeds:
    """A cache of ``length`` tokens for one sequence."""
    rng = np.random.default_rng(length)
    shape = (1, sizes.kv_heads, length, sizes.head)
    names = [f"past_{part}_{i}" for i in range(LAYERS) for part in "kv"]
    return {name: rng.standard_normal(shape).astype(np.float32) for name in names}


class Session:
    """A model and the cache of one sequence."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.runner = graphopt.load(path, threads=1)
        self.cache = empty_cache(sizes)

    def step(self, ids: list[int]) -> Array:
        """The logits of the tokens' last one; the cache is then longer by all of them."""
        results = self.runner.run({"ids": np.array([ids], np.int64), **self.cache})
        self.cache = {name: results[name.replace("past", "present")] for name in self.cache}
        return np.asarray(results["logits"][0, -1])


def compare(original: Path, others: list[Path], sizes: Sizes, *, prompt: int, steps: int) -> dict[Path, float]:
    """Prefill and decode step by step. The largest difference of each model's logits and caches, of the original's.

    Every step feeds the token that the original likes best, to every model beside its own cache.

    Raises:
        SystemExit: A model differs by more than ``TOLERANCE``.
    """
    reference, sessions = Session(original, sizes), {path: Session(path, sizes) for path in others}
    worst = dict.fromkeys(others, 0.0)
    ids = np.random.default_rng(0).integers(0, sizes.vocabulary, prompt).tolist()
    for step in range(steps + 1):
        expected = {"logits": reference.step(ids), **reference.cache}
        for path, session in sessions.items():
            found = {"logits": session.step(ids), **session.cache}
            for name, array in expected.items():
                difference = float(np.abs(found[name] - array).max() / np.abs(array).max())
                worst[path] = max(worst[path], difference)
                if not difference <= TOLERANCE:
                    raise SystemExit(f"{path.name} differs by {difference:.1e} in {name} at step {step}")
        ids = [int(expected["logits"].argmax())]
    return worst


def timed(paths: list[Path], sizes: Sizes, *, length: int, past: int, seconds: float) -> list[str]:
    """Each model's median milliseconds on one thread, and how much faster than the first it is: the 95 % interval."""
    shapes = {name: array.shape for name, array in empty_cache(sizes, past).items()}
    cells: list[str] = []
    for model in graphopt.bench(paths, shapes={"ids": [1, length], **shapes}, seconds=seconds).models:
        interval = f"[{model.speedup.low:.2f}, {model.speedup.high:.2f}]" if cells else ""
        cells.append(f"{model.wall_ms.p50:.2f} {interval:<14}")
    return cells


def main(folder: Path, sizes: Sizes | None = None, *, seconds: float = 4.0) -> None:
    """Export the dense network and its factors, optimize the factors, compare all three, print the table.

    Args:
        folder: Where the files go.
        sizes: Of the network.
        seconds: How long prefill and decode are timed, each.
    """
    start = time.perf_counter()
    sizes = Sizes() if sizes is None else sizes
    folder.mkdir(parents=True, exist_ok=True)
    dense, factors, optimized = paths = [folder / f"decoder.{name}.onnx" for name in ("dense", "factors", "opt")]
    graphopt.export(lambda: factory(sizes, merged=True), dense)
    graphopt.export(lambda: factory(sizes), factors)
    report = graphopt.optimize(factors, optimized, recipe=[RECIPE])
    assert report.verification is not None
    kept = ", ".join(f"{record.name} {record.kept}" for record in report.passes if record.kept)
    print(f"{optimized.name}: {kept}.\nAgainst {factors.name}: {report.verification.verdict}.\n")

    worst = compare(dense, [factors, optimized], sizes, prompt=PROMPT, steps=STEPS)
    prefill = timed(paths, sizes, length=PROMPT, past=0, seconds=seconds)
    decode = timed(paths, sizes, length=1, past=PROMPT, seconds=seconds)

    print(f"{'':<8}{'weights':>10}{'MB':>8}{'nodes':>7}{'prefill ms':>14}{'decode ms':>23}{'difference':>23}")
    for path, first, later in zip(paths, prefill, decode, strict=True):
        found = graphopt.inspect(path)
        stored = sum(file.stat().st_size for file in folder.glob(f"{path.stem}.*"))
        difference = f"{worst[path]:.0e}" if path in worst else ""
        print(
            f"{path.suffixes[-2][1:]:<8}{found.parameters:>10,}{stored / 1e6:>8.2f}{found.nodes:>7}"
            f"{first:>27}{later:>23}{difference:>10}"
        )
    print(f"\nPrefill: {PROMPT} tokens, no past. Decode: 1 token, {PROMPT} before it. One thread, medians; in brackets")
    print("how many times faster than dense, 95 % interval. Difference: the largest to dense, of the largest")
    print(f"magnitude, over prefill and {STEPS} steps of decoding, logits and caches.")
    print(f"The files are in {folder}/. Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo/decoder"))
