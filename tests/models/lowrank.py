"""Every way in which torch modules spell a low-rank linear map, and what only looks like one.

``SPELLINGS`` and ``LOOK_ALIKES`` hold one ``Entry`` each. A spelling's module knows its matrices (``matrices()``, in
the order in which forward uses them) and computes the same from them, without factors (``dense(*inputs)``).
``export`` writes entries with one of torch's exporters, many of them in one file where asked: an export by
torch.export costs half a second and more, whatever its size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUT, IN, RANK = 40, 24, 6
WORDS = 50
Exporter = Literal["torchscript", "dynamo"]
# What each of torch's exporters writes itself: torch.export rewrites its opset 18 into newer ones, and leaves older
# ones to onnx's version converter, which is none of an exporter's spellings.
OPSETS: dict[Exporter, range] = {"torchscript": range(13, 24), "dynamo": range(18, 26)}


@dataclass(frozen=True)
class Input:
    """One input: the example's sizes, and the axes that stay dynamic."""

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("batch",)
    below: int | None = None  # integers below this instead of floats

    def draw(self, seed: int, *, batch: int = 3, length: int = 5) -> Tensor:
        """Values of this input, its dynamic axes at the sizes given."""
        sizes = {"batch": batch, "length": length}
        shape = [sizes[self.axes[i]] if i < len(self.axes) else size for i, size in enumerate(self.shape)]
        generator = torch.Generator().manual_seed(seed)
        if self.below is not None:
            return torch.randint(0, self.below, shape, generator=generator)
        return torch.randn(shape, generator=generator)


ROWS = (Input((3, IN)),)  # [batch, features]
TOKENS = (Input((3, 5, IN), ("batch", "length")),)
IDS = (Input((3, 5), ("batch", "length"), below=WORDS),)
IMAGE = (Input((3, IN, 9, 9)),)
SIGNAL = (Input((3, IN, 11)),)


@dataclass(frozen=True)
class Entry:
    """One module and what should be made of it.

    Attributes:
        name: Unique; a Python identifier.
        make: Builds the module, in evaluation mode. ``module()`` seeds it.
        inputs: What forward takes.
        verdict: "pair": two factors. "pivot": kept rows and coefficients. "adapter": a low-rank branch added to a dense
            linear. "refused": none of them.
        dims: (m, n, r) of every low-rank map, in the order of the module's ``matrices()``. A convolution's n (or m) has
            its kernel's elements multiplied in; an embedding's n is its number of words.
        why: What makes it refusable.
        fails: The exporters that cannot write it, with a part of what they say.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    verdict: Literal["pair", "pivot", "adapter", "refused"]
    dims: tuple[tuple[int, int, int], ...] = ()
    why: str = ""
    fails: tuple[tuple[Exporter, str], ...] = ()

    def module(self) -> nn.Module:
        """The module, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return self.make().eval()

    def draw(self, seed: int = 0, *, batch: int = 3, length: int = 5) -> tuple[Tensor, ...]:
        """Inputs of forward at other sizes and values."""
        return tuple(one.draw(seed + i, batch=batch, length=length) for i, one in enumerate(self.inputs))

    def failure(self, exporter: Exporter) -> str | None:
        """What the exporter says where it cannot write the module."""
        return dict(self.fails).get(exporter)


# ---- modules: two linears -------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """Two nn.Linear one after the other, under the names that a method gives them."""

    def __init__(
        self,
        names: tuple[str, str] = ("0", "1"),
        *,
        middle_bias: bool = False,
        bias: bool = True,
        sizes: tuple[int, int, int] = (OUT, IN, RANK),
    ) -> None:
        super().__init__()
        m, n, r = sizes
        self.names = names
        self.add_module(names[0], nn.Linear(n, r, bias=middle_bias))
        self.add_module(names[1], nn.Linear(r, m, bias=bias))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.get_submodule(self.names[0]), self.get_submodule(self.names[1])  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(first(x))

    def matrices(self) -> list[Tensor]:
        first, second = self.linears
        return [second.weight @ first.weight]

    def dense(self, x: Tensor) -> Tensor:
        first, second = self.linears
        bias = torch.zeros(second.out_features) if second.bias is None else second.bias
        if first.bias is not None:
            bias = bias + second.weight @ first.bias
        return F.linear(x, self.matrices()[0], bias)


class FlattenedMiddle(Linears):
    """Rows and tokens flattened between the two: the last axis stays."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        middle = first(x).reshape(-1, RANK)
        return second(middle).reshape(x.shape[0], x.shape[1], OUT)


class TransposedMiddle(Linears):
    """Batch and length swapped between the two: the last axis stays."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(first(x).transpose(0, 1))

    def dense(self, x: Tensor) -> Tensor:
        return super().dense(x.transpose(0, 1))


class IdentityMiddle(Linears):
    """A dropout that evaluation switches off, and an Identity."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(self.identity(self.dropout(first(x))))


class CastMiddle(Linears):
    """A cast between the two that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(first(x).float())


class UsedTwice(Linears):
    """The same two weights on two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.linears
        return second(first(x)), second(first(y))

    def matrices(self) -> list[Tensor]:
        return super().matrices() * 2

    def dense(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().dense(x), super().dense(y)


# ---- modules: parameters and plain arithmetic -----------------------------------------------------------------------

Spelled = Callable[["Factors", Tensor], Tensor]


class Factors(nn.Module):
    """W = u diag(s) v as parameters, and any way to write the product with x.

    Args:
        spelled: Forward: from the module and x to the result.
        sizes: (m, n, r).
        stored: How u and v are stored: "out_in" (as nn.Linear does), "in_out", or "half" (out_in, float16).
        scaled: Whether there is an s.
        bias: Whether there is a b.
    """

    def __init__(
        self,
        spelled: Spelled,
        *,
        sizes: tuple[int, int, int] = (OUT, IN, RANK),
        stored: str = "out_in",
        scaled: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        m, n, r = sizes
        u, v = torch.randn(m, r) / math.sqrt(r), torch.randn(r, n) / math.sqrt(n)
        self.stored = stored
        if stored == "in_out":
            u, v = u.T.contiguous(), v.T.contiguous()
        elif stored == "half":
            u, v = u.half(), v.half()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)
        self.s = nn.Parameter(torch.rand(r) + 0.5) if scaled else None
        self.b = nn.Parameter(torch.randn(m)) if bias else None
        self.spelled = spelled

    def forward(self, x: Tensor) -> Tensor:
        y = self.spelled(self, x)
        return y if self.b is None else y + self.b

    def matrices(self) -> list[Tensor]:
        u, v = self.u.float(), self.v.float()
        if self.stored == "in_out":
            u, v = u.T, v.T
        return [(u if self.s is None else u * self.s) @ v]

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrices()[0], self.b)


def _diag(p: Factors, x: Tensor) -> Tensor:
    return x @ (p.u @ torch.diag(p.s) @ p.v).T


def _product(p: Factors, x: Tensor) -> Tensor:
    return x @ (p.u @ p.v).T


def _scaled_triple(p: Factors, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p.v) * p.s, p.u)


def _half_round_trip(p: Factors, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p.v.half().float()), p.u.half().float())


class HalfRoundTrip(Factors):
    """Weights rounded to float16 and back in forward."""

    def matrices(self) -> list[Tensor]:
        return [self.u.half().float() @ self.v.half().float()]


class Chunked(nn.Module):
    """Maestro: u and v kept at full rank, the leading columns used."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(OUT, IN) / 5)
        self.v = nn.Parameter(torch.randn(IN, IN) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v[:RANK]), self.u[:, :RANK])

    def matrices(self) -> list[Tensor]:
        return [self.u[:, :RANK] @ self.v[:RANK]]

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrices()[0])


# ---- modules: PIFA --------------------------------------------------------------------------------------------------


class Pivot(nn.Module):
    """y[kept] = W_p x, y[rest] = C y[kept]: kept rows of W, and coefficients for the others.

    Args:
        spelled: How the two parts are put in their places.
        bias: "none"; "parts" (b_p on the kept rows, b_n - C b_p on the others); "after" (added at the end).
    """

    def __init__(self, spelled: Callable[[Pivot, Tensor, Tensor, Tensor], Tensor], *, bias: str = "none") -> None:
        super().__init__()
        self.first = nn.Linear(IN, RANK, bias=bias == "parts")
        self.second = nn.Linear(RANK, OUT - RANK, bias=bias == "parts")
        order = torch.randperm(OUT)
        self.register_buffer("kept", order[:RANK].sort().values)
        self.register_buffer("rest", order[RANK:].sort().values)
        self.register_buffer("inverse", torch.argsort(torch.cat([self.kept, self.rest])))
        self.bias = nn.Parameter(torch.randn(OUT)) if bias == "after" else None
        self.spelled = spelled

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)
        y = self.spelled(self, x, kept, self.second(kept))
        return y if self.bias is None else y + self.bias

    def matrices(self) -> list[Tensor]:
        return [torch.cat([self.first.weight, self.second.weight @ self.first.weight])[self.inverse]]

    def dense(self, x: Tensor) -> Tensor:
        bias = self.bias
        if self.first.bias is not None:
            rest = self.second.weight @ self.first.bias + self.second.bias
            bias = torch.cat([self.first.bias, rest])[self.inverse]
        return F.linear(x, self.matrices()[0], bias)


def _index_copy(p: Pivot, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    out = torch.empty(*x.shape[:-1], OUT, dtype=x.dtype, device=x.device)
    out.index_copy_(-1, p.kept, kept)
    out.index_copy_(-1, p.rest, rest)
    return out


def _index_put(p: Pivot, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    out = torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype, device=x.device)
    out[:, :, p.kept] = kept
    out[:, :, p.rest] = rest
    return out


def _index_select(p: Pivot, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([kept, rest], dim=-1).index_select(-1, p.inverse)


def _indexed(p: Pivot, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([kept, rest], dim=-1)[..., p.inverse]


def _in_order(p: Pivot, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([kept, rest], dim=-1)


class PivotInOrder(Pivot):
    """The kept rows come first: no index is left."""

    def __init__(self) -> None:
        super().__init__(_in_order)
        self.inverse = torch.arange(OUT)


def _overlapping(p: Pivot, x: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    """Two writes that overlap: some rows are never written."""
    out = torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype, device=x.device)
    out.index_copy_(-1, p.kept, kept)
    out.index_copy_(-1, torch.clamp(p.rest, max=OUT - 3), rest)
    return out


# ---- modules: adapters ----------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """base(x) + scale * B(A(dropout(x))), for each adapter."""

    def __init__(self, adapters: int = 1, *, base_bias: bool = True, scale: float | None = 2.0) -> None:
        super().__init__()
        self.base = nn.Linear(IN, OUT, bias=base_bias)
        self.lora_A = nn.ModuleList(nn.Linear(IN, RANK, bias=False) for _ in range(adapters))
        self.lora_B = nn.ModuleList(nn.Linear(RANK, OUT, bias=False) for _ in range(adapters))
        self.dropout = nn.Dropout(0.1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for down, up in zip(self.lora_A, self.lora_B, strict=True):
            branch = up(down(self.dropout(x)))
            y = y + (branch if self.scale is None else branch * self.scale)
        return y

    def matrices(self) -> list[Tensor]:
        """B A of each adapter, without the scale."""
        return [up.weight @ down.weight for down, up in zip(self.lora_A, self.lora_B, strict=True)]

    def dense(self, x: Tensor) -> Tensor:
        scale = 1.0 if self.scale is None else self.scale
        return F.linear(x, self.base.weight + scale * sum(self.matrices()), self.base.bias)


# ---- modules: convolutions ------------------------------------------------------------------------------------------

Conv = nn.Conv1d | nn.Conv2d


class Convs(nn.Module):
    """Two convolutions one after the other; ``middle`` between them.

    ``dense`` knows the pair as one convolution, where it is one.
    """

    def __init__(self, first: Conv, second: Conv, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.middle = first, second, middle

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y if self.middle is None else self.middle(y))

    def matrices(self) -> list[Tensor]:
        """[(m, kernel of the second), (n, kernel of the first)] through the rank."""
        left = self.second.weight.movedim(1, -1).flatten(0, -2)
        return [left @ self.first.weight.flatten(1)]

    def dense(self, x: Tensor) -> Tensor:
        first, second = self.first, self.second
        # second.weight [m, r, *b], first.weight [r, n, *a]: one of the kernels is 1 along each axis.
        # A stride in the first spreads the taps of the second, which only a kernel of 1 does not notice.
        letters = "xyz"[: first.weight.dim() - 2]
        b, a = letters.upper(), letters
        product = torch.einsum(
            f"or{b},ri{a}->oi{''.join(p + q for p, q in zip(b, a, strict=True))}", [second.weight, first.weight]
        )
        kernel = [p * q for p, q in zip(second.weight.shape[2:], first.weight.shape[2:], strict=True)]
        weight = product.reshape(second.out_channels, first.in_channels, *kernel)
        bias = torch.zeros(second.out_channels) if second.bias is None else second.bias
        if first.bias is not None:
            bias = bias + second.weight.flatten(2).sum(-1) @ first.bias
        one = [k == 1 for k in first.weight.shape[2:]]  # along these axes the second is the wider
        return (F.conv2d if len(kernel) == 2 else F.conv1d)(
            x,
            weight,
            bias,
            stride=tuple(p * q for p, q in zip(first.stride, second.stride, strict=True)),
            padding=tuple(p + q for p, q in zip(first.padding, second.padding, strict=True)),  # type: ignore[operator]
            dilation=tuple(
                q if narrow else p for p, q, narrow in zip(first.dilation, second.dilation, one, strict=True)
            ),
        )


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)  # type: ignore[arg-type]


def _convs(
    first: tuple[int | tuple[int, int], dict[str, object]],
    second: tuple[int | tuple[int, int], dict[str, object]] = (1, {}),
    middle: nn.Module | None = None,
) -> Convs:
    one = _conv(IN, RANK, first[0], **{"bias": False, **first[1]})
    two = _conv(RANK, OUT, second[0], **second[1])
    return Convs(one, two, middle)


# ---- modules: embeddings --------------------------------------------------------------------------------------------


class FactoredEmbedding(nn.Module):
    """ALBERT's: a table of V x r, then a linear to the width."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, RANK)
        self.project = nn.Linear(RANK, OUT, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.words(ids))

    def matrices(self) -> list[Tensor]:
        return [self.project.weight @ self.words.weight.T]

    def dense(self, ids: Tensor) -> Tensor:
        y = F.embedding(ids, self.matrices()[0].T)
        return y if self.project.bias is None else y + self.project.bias


class TiedEmbedding(nn.Module):
    """The factors of the embedding are those of the output, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, RANK)
        self.project = nn.Linear(RANK, OUT, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.project(self.words(ids)))
        return F.linear(F.linear(hidden, self.project.weight.t()), self.words.weight)

    def matrices(self) -> list[Tensor]:
        embedding = self.project.weight @ self.words.weight.T
        return [embedding, embedding.T]

    def dense(self, ids: Tensor) -> Tensor:
        embedding, head = self.matrices()
        return F.linear(torch.tanh(F.embedding(ids, embedding.T)), head)


# ---- modules: one V for many, look-alikes ---------------------------------------------------------------------------


class SharedDown(nn.Module):
    """q, k and v read one V x: the middle has three readers, all of them linears."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(IN, RANK, bias=False)
        self.up = nn.ModuleList(nn.Linear(RANK, OUT) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        middle = self.down(x)
        return tuple(up(middle) for up in self.up)


class Between(Linears):
    """Something between the two linears."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(self.between(first(x)))


class ReadElsewhere(Linears):
    """The middle is read by something else too."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        middle = first(x)
        return second(middle) + torch.sin(middle).sum(-1, keepdim=True)


class Returned(Linears):
    """The middle is an output: the latent that SVD-LLM's cache keeps."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.linears
        middle = first(x)
        return second(middle), middle


class SkippedInto(Linears):
    """Something that depends on the input is added to the middle."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(first(x) + x[..., :RANK])


class GatedMiddle(Linears):
    """The middle is multiplied by something that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(first(x) * torch.sigmoid(x[..., :1]))


class ActivationOperand(nn.Module):
    """x V^T y: the second operand is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(IN, RANK, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.down(x) @ y


class ScalePerToken(nn.Module):
    """A constant for each position scales the middle: it is not along the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Linears()
        self.s = nn.Parameter(torch.rand(7, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair.linears
        return second(first(x) * self.s)


class HeadsMiddle(Linears):
    """The last axis of the middle is taken apart and put together in another order with the tokens'."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        middle = first(x).reshape(x.shape[0], x.shape[1], 2, RANK // 2).transpose(1, 2)
        return second(middle.reshape(x.shape[0], x.shape[1], RANK))


class NormedMiddle(Linears):
    """A norm between: DeepSeek's q_a, norm, q_b."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linears
        return second(self.norm(first(x)))


# ---- the entries ----------------------------------------------------------------------------------------------------

_DIMS = ((OUT, IN, RANK),)
_FULL = ((OUT, IN, IN),)
# torch.export's exporter multiplies weights of up to 8192 elements itself: of smaller ones no factors would be left.
_LARGE = ((400, 360, 24),)
_WIDE = (Input((3, 5, 360), ("batch", "length")),)


def _pair(name: str, make: Callable[[], nn.Module], inputs: tuple[Input, ...] = TOKENS, **rest: object) -> Entry:
    return Entry(name, make, inputs, "pair", **{"dims": _DIMS, **rest})  # type: ignore[arg-type]


def _factors(name: str, spelled: Spelled, *, inputs: tuple[Input, ...] = TOKENS, **options: object) -> Entry:
    return _pair(name, lambda: Factors(spelled, **options), inputs)  # type: ignore[arg-type]


def _pivot(name: str, spelled: Callable[..., Tensor], bias: str = "none", inputs: tuple[Input, ...] = TOKENS) -> Entry:
    return Entry(name, lambda: Pivot(spelled, bias=bias), inputs, "pivot", _DIMS)


def _adapter(name: str, count: int = 1, inputs: tuple[Input, ...] = TOKENS, **options: object) -> Entry:
    return Entry(name, lambda: Lora(count, **options), inputs, "adapter", _DIMS * count)  # type: ignore[arg-type]


def _refused(
    name: str, make: Callable[[], nn.Module], why: str, inputs: tuple[Input, ...] = TOKENS, **rest: object
) -> Entry:
    return Entry(name, make, inputs, "refused", why=why, **rest)  # type: ignore[arg-type]


def _fails(says: str, exporter: Exporter = "torchscript") -> tuple[tuple[Exporter, str], ...]:
    return ((exporter, says),)


SPELLINGS: tuple[Entry, ...] = (
    # two linears
    _pair("sequential", Linears),
    _pair("sequential_rows", Linears, ROWS),
    _pair("sequential_no_bias", lambda: Linears(bias=False)),
    _pair("sequential_no_bias_rows", lambda: Linears(bias=False), ROWS),
    _pair("middle_bias", lambda: Linears(middle_bias=True)),
    _pair("middle_bias_rows", lambda: Linears(middle_bias=True), ROWS),
    _pair("middle_bias_only", lambda: Linears(middle_bias=True, bias=False)),
    _pair("asvd", lambda: Linears(("BLinear", "ALinear"))),
    _pair("svd_llm", lambda: Linears(("q_v_proj", "q_u_proj"), bias=False)),
    _pair("welore", lambda: Linears(("V", "U"), bias=False)),
    _pair("wide_to_narrow", lambda: Linears(sizes=(8, IN, 4)), dims=((8, IN, 4),)),
    _pair("rank_above_half", lambda: Linears(sizes=(OUT, IN, 20)), dims=((OUT, IN, 20),)),
    _pair("flattened_middle", FlattenedMiddle),
    _pair("transposed_middle", TransposedMiddle),
    _pair("identity_middle", IdentityMiddle),
    _pair("cast_middle", CastMiddle),
    _pair("used_twice", UsedTwice, TOKENS * 2, dims=_DIMS * 2),
    # parameters and arithmetic
    _factors("functional", lambda p, x: F.linear(F.linear(x, p.v), p.u, p.b)),
    _factors("functional_rows", lambda p, x: F.linear(F.linear(x, p.v), p.u), inputs=ROWS, bias=True),
    _factors("matmul", lambda p, x: x @ p.v @ p.u, stored="in_out", bias=True),
    _factors("matmul_rows", lambda p, x: x @ p.v @ p.u, inputs=ROWS, stored="in_out"),
    _factors("matmul_transposed", lambda p, x: x @ p.v.t() @ p.u.t(), bias=True),
    _factors("matmul_from_left", lambda p, x: (p.u @ (p.v @ x.transpose(-1, -2))).transpose(-1, -2)),
    _factors("linear_of_transposed", lambda p, x: F.linear(F.linear(x, p.v.t()), p.u.t()), stored="in_out"),
    _factors("einsum", lambda p, x: torch.einsum("blr,or->blo", torch.einsum("bli,ri->blr", x, p.v), p.u)),
    _factors("einsum_three", lambda p, x: torch.einsum("bli,ri,or->blo", x, p.v, p.u), bias=True),
    _factors("sst", _scaled_triple, scaled=True, bias=True),
    _factors("sst_rows", _scaled_triple, inputs=ROWS, scaled=True),
    _pair("sst_full", lambda: Factors(_scaled_triple, sizes=_FULL[0], scaled=True, bias=True), dims=_FULL),
    _pair(
        "sst_diag",
        lambda: Factors(_diag, sizes=_LARGE[0], scaled=True, bias=True),
        _WIDE,
        dims=_LARGE,
        fails=_fails("aten::diag"),
    ),
    _pair("product_in_forward", lambda: Factors(_product, sizes=_LARGE[0], bias=True), _WIDE, dims=_LARGE),
    _factors("scaled_weight", lambda p, x: F.linear(F.linear(x, p.v), p.u * p.s), scaled=True),
    _factors("half_weights", lambda p, x: F.linear(F.linear(x, p.v.float()), p.u.float()), stored="half"),
    _pair("half_round_trip", lambda: HalfRoundTrip(_half_round_trip)),
    _pair("maestro", Chunked),
    # convolutions
    _pair("conv_1x1", lambda: _convs((1, {})), IMAGE),
    _pair("conv_1x1_middle_bias", lambda: _convs((1, {"bias": True})), IMAGE),
    _pair("conv_1x1_stride_first", lambda: _convs((1, {"stride": 2})), IMAGE),
    _pair("conv_1x1_stride_both", lambda: _convs((1, {"stride": 2}), (1, {"stride": 2})), IMAGE),
    _pair("conv_3x3", lambda: _convs((3, {"padding": 1})), IMAGE, dims=((OUT, IN * 9, RANK),)),
    _pair("conv_3x3_bias", lambda: _convs((3, {"padding": 1, "bias": True})), IMAGE, dims=((OUT, IN * 9, RANK),)),
    _pair("conv_3x3_stride", lambda: _convs((3, {"padding": 1, "stride": 2})), IMAGE, dims=((OUT, IN * 9, RANK),)),
    _pair("conv_3x3_dilation", lambda: _convs((3, {"padding": 2, "dilation": 2})), IMAGE, dims=((OUT, IN * 9, RANK),)),
    _pair("conv_3x3_stride_1x1", lambda: _convs((3, {}), (1, {"stride": 2})), IMAGE, dims=((OUT, IN * 9, RANK),)),
    _pair("conv_3x1", lambda: _convs(((3, 1), {"padding": (1, 0)})), IMAGE, dims=((OUT, IN * 3, RANK),)),
    _pair("conv_1d", lambda: Convs(nn.Conv1d(IN, RANK, 1, bias=False), nn.Conv1d(RANK, OUT, 1)), SIGNAL),
    _pair(
        "conv_1d_wide",
        lambda: Convs(nn.Conv1d(IN, RANK, 5, padding=2, bias=False), nn.Conv1d(RANK, OUT, 1)),
        SIGNAL,
        dims=((OUT, IN * 5, RANK),),
    ),
    _pair(
        "conv_3x1_1x3",
        lambda: _convs(((3, 1), {"padding": (1, 0)}), ((1, 3), {"padding": (0, 1)})),
        IMAGE,
        dims=((OUT * 3, IN * 3, RANK),),
    ),
    _pair(
        "conv_3x1_1x3_stride",
        lambda: _convs(
            ((3, 1), {"padding": (1, 0), "stride": (2, 1)}), ((1, 3), {"padding": (0, 1), "stride": (1, 2)})
        ),
        IMAGE,
        dims=((OUT * 3, IN * 3, RANK),),
    ),
    # embeddings
    _pair("embedding", FactoredEmbedding, IDS, dims=((OUT, WORDS, RANK),)),
    _pair("embedding_no_bias", lambda: FactoredEmbedding(bias=False), IDS, dims=((OUT, WORDS, RANK),)),
    _pair("embedding_tied", TiedEmbedding, IDS, dims=((OUT, WORDS, RANK), (WORDS, OUT, RANK))),
    # PIFA
    _pivot("pifa", _index_copy),
    _pivot("pifa_rows", _index_copy, inputs=ROWS),
    _pivot("pifa_bias_parts", _index_copy, "parts"),
    _pivot("pifa_bias_after", _index_copy, "after"),
    _pivot("pifa_index_put", _index_put),
    _pivot("pifa_cat", _index_select),
    _pivot("pifa_cat_rows", _index_select, inputs=ROWS),
    _pivot("pifa_cat_bias_parts", _index_select, "parts"),
    _pivot("pifa_cat_bias_after", _index_select, "after"),
    _pivot("pifa_cat_indexed", _indexed),
    Entry("pifa_in_order", PivotInOrder, TOKENS, "pivot", _DIMS),
    # adapters
    _adapter("lora"),
    _adapter("lora_rows", inputs=ROWS),
    _adapter("lora_no_bias", base_bias=False),
    _adapter("lora_no_scale", scale=None),
    _adapter("lora_two", 2),
)

LOOK_ALIKES: tuple[Entry, ...] = (
    _refused("relu", lambda: Between(torch.relu), "a nonlinearity between"),
    _refused("relu_rows", lambda: Between(torch.relu), "a nonlinearity between", ROWS),
    _refused("gelu", lambda: Between(F.gelu), "a nonlinearity between"),
    _refused("sigmoid", lambda: Between(torch.sigmoid), "a nonlinearity between"),
    _refused("softmax", lambda: Between(lambda h: h.softmax(-1)), "a nonlinearity between"),
    _refused("clamp", lambda: Between(lambda h: h.clamp(-1, 1)), "a nonlinearity between"),
    _refused("layer_norm", lambda: NormedMiddle(nn.LayerNorm(RANK)), "a norm between"),
    _refused("rms_norm", lambda: NormedMiddle(nn.RMSNorm(RANK)), "a norm between", fails=_fails("aten::rms_norm")),
    _refused("dropout_training", lambda: Between(lambda h: F.dropout(h, 0.5, training=True)), "random numbers between"),
    _refused(
        "activation_operand", ActivationOperand, "the second operand is an input", (*TOKENS, Input((3, RANK, OUT)))
    ),
    _refused("read_elsewhere", ReadElsewhere, "the middle has another reader"),
    _refused("returned", Returned, "the middle is an output"),
    _refused("shared_down", SharedDown, "the middle has several readers"),
    _refused("skipped_into", SkippedInto, "something that depends on the input is added to the middle"),
    _refused("gated_middle", GatedMiddle, "something that depends on the input scales the middle"),
    _refused("scale_per_token", ScalePerToken, "the scale is not along the rank", (Input((3, 7, IN)),)),
    _refused("heads_middle", HeadsMiddle, "the middle's last axis is mixed with others"),
    _refused("pifa_overlapping", lambda: Pivot(_overlapping), "the two index sets are not disjoint"),
    _refused("conv_relu", lambda: _convs((1, {}), middle=nn.ReLU()), "a nonlinearity between", IMAGE),
    _refused("conv_pool", lambda: _convs((1, {}), middle=nn.MaxPool2d(2)), "a pooling between", IMAGE),
    _refused(
        "conv_padded_second",
        lambda: _convs((3, {"padding": 1, "bias": True}), (1, {"padding": 1})),
        "the second pads what the first's bias would fill",
        IMAGE,
    ),
    _refused(
        "conv_3x3_3x3",
        lambda: _convs((3, {"padding": 1}), (3, {"padding": 1})),
        "the two kernels overlap: no low-rank matrix",
        IMAGE,
    ),
    _refused(
        "conv_depthwise",
        lambda: Convs(_conv(IN, IN, 3, padding=1, groups=IN), _conv(IN, OUT)),
        "the first is depthwise",
        IMAGE,
    ),
    _refused("conv_grouped_first", lambda: _convs((3, {"groups": 2})), "the first is grouped", IMAGE),
    _refused("conv_grouped_second", lambda: _convs((1, {}), (1, {"groups": 2})), "the second is grouped", IMAGE),
)

ENTRIES: tuple[Entry, ...] = SPELLINGS + LOOK_ALIKES
BY_NAME: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}


# ---- exporting ------------------------------------------------------------------------------------------------------


class Together(nn.Module):
    """Many modules side by side: each has inputs and outputs of its own."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({entry.name: entry.module() for entry in entries})
        self.counts = {entry.name: len(entry.inputs) for entry in entries}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        rest = list(inputs)
        for name, count in self.counts.items():
            made = self.parts[name](*rest[:count])
            outputs += made if isinstance(made, tuple) else (made,)
            rest = rest[count:]
        return tuple(outputs)


def input_names(entry: Entry) -> list[str]:
    """The entry's inputs in an exported file."""
    return [f"{entry.name}.x{i}" for i in range(len(entry.inputs))]


def output_names(entry: Entry) -> list[str]:
    """The entry's outputs in an exported file."""
    with torch.no_grad():
        made = entry.module()(*entry.draw())
    return [f"{entry.name}.y{i}" for i in range(len(made) if isinstance(made, tuple) else 1)]


def export(entries: Entry | Sequence[Entry], exporter: Exporter, opset: int, folder: Path) -> Path:
    """Write one ONNX file with the entries side by side, nothing shared between them.

    Args:
        entries: One or many. None of them may be in the exporter's way (``Entry.failure``).
        exporter: Which of torch's two exporters.
        opset: One of ``OPSETS[exporter]``.
        folder: Where the file goes; its name says what is in it.

    Returns:
        The file. Inputs and outputs are called as ``input_names`` and ``output_names`` say.
    """
    entries = [entries] if isinstance(entries, Entry) else list(entries)
    title = entries[0].name if len(entries) == 1 else f"{len(entries)}-modules"
    path = folder / f"{title}.{exporter}.{opset}.onnx"
    module = Together(entries).eval()
    examples = tuple(value for entry in entries for value in entry.draw())
    names = [name for entry in entries for name in input_names(entry)]
    # Symbols of their own: torch.export would read one entry's sizes off another's input.
    axes = [{i: f"{entry.name}_{axis}" for i, axis in enumerate(x.axes)} for entry in entries for x in entry.inputs]
    outputs = [name for entry in entries for name in output_names(entry)]
    with _quiet(), torch.no_grad():
        if exporter == "dynamo":
            dims = {symbol: torch.export.Dim(symbol) for one in axes for symbol in one.values()}
            shapes = tuple({axis: dims[symbol] for axis, symbol in one.items()} for one in axes)
            torch.onnx.export(
                module,
                examples,
                path,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=(shapes,),
                external_data=False,
                verbose=False,
            )
        else:
            torch.onnx.export(
                module,
                examples,
                path,
                dynamo=False,
                opset_version=opset,
                input_names=names,
                output_names=outputs,
                dynamic_axes=dict(zip(names, axes, strict=True)),
            )
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither exporter's warnings nor what it prints."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
