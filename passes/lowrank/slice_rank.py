"""``slice-rank``: a pair of factors cut to its first ranks, as networks trained with ordered dropout allow."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from graphopt.errors import BadInput
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.sites import Linear, Pair, Spelling, channel_vector, pair_at, pairs

Array = npt.NDArray[Any]


class Parameters(BaseModel):
    """How much of the rank is kept. Without ``fraction``, ``rank`` or ``ranks`` the pass does nothing.

    Attributes:
        fraction: Of each pair's rank, rounded up.
        rank: Of each pair, the rank; pairs of a lower rank stay.
        ranks: Pattern of the name of the second factor's constant -> rank; what no pattern names stays.
    """

    model_config = ConfigDict(extra="forbid")

    fraction: float | None = Field(default=None, gt=0, le=1)
    rank: int | None = Field(default=None, ge=1)
    ranks: dict[str, int] = Field(default_factory=dict)


Settings = Parameters  # its name means the class attribute within the pass


class SliceRank(Pass):
    """Cuts pairs of factors to their first ranks: one checkpoint gives a family of models."""

    name = "slice-rank"
    kind = Kind.LOSSY
    stage = Stage.SLICE
    explanation = Explanation(
        matches="pairs of factors, nothing between them but constants: the first columns of one and rows of the other",
        refuses="quantised factors; factors that something else reads. The order is the checkpoint's: for factors that "
        "are not sorted by importance use factorize",
        costs="linear in the nodes; no decomposition",
        source="Maestro (Horvath et al., ICML 2024), section 3: ordered dropout",
    )
    Parameters: ClassVar[type[BaseModel] | None] = Parameters

    @property
    def settings(self) -> Settings:
        """The parameters."""
        assert isinstance(self.parameters, Settings)
        return self.parameters

    @property
    def asked(self) -> bool:
        return self.settings.fraction is not None or self.settings.rank is not None or bool(self.settings.ranks)

    def apply(self, ctx: Context) -> None:
        if self.settings.fraction is not None and self.settings.rank is not None:
            raise BadInput("give one of fraction and rank", where=f"pass {self.name}")
        for found in list(pairs(ctx.model)):
            pair = _anew(found)
            if pair is None:
                continue
            if not isinstance(pair, Pair):
                ctx.refuse(*pair)
            elif pair.second.node.metadata_props.get("graphopt.pass") == self.name:
                continue  # cut already
            elif pair.quantised:
                ctx.refuse(pair.second.node, "the factors are quantised")
            elif pair.first.weight.shared or pair.second.weight.shared:
                ctx.refuse(pair.second.node, "something else reads a factor too")
            elif (rank := self._rank(pair)) < pair.rank:
                _cut(ctx, pair, rank)

    def _rank(self, pair: Pair) -> int:
        settings = self.settings
        name = pair.second.weight.root.name or ""
        for pattern, rank in settings.ranks.items():
            if fnmatchcase(name, pattern):
                return max(rank, 1)
        if settings.fraction is not None:
            return max(1, int(np.ceil(settings.fraction * pair.rank)))
        return pair.rank if settings.rank is None else settings.rank


def _anew(found: Pair | tuple[ir.Node, str]) -> Pair | tuple[ir.Node, str] | None:
    """A pair as it is now: what was cut before may be its first product, or what that reads. None: it is gone."""
    node = found.second.node if isinstance(found, Pair) else found[0]
    pair = pair_at(node) if node.graph is not None else ""
    if isinstance(pair, Pair):
        return pair
    return (node, pair) if pair else None


def _cut(ctx: Context, pair: Pair, rank: int) -> None:
    first, second, opset = pair.first, pair.second, ctx.opset
    dtype = pair.dtype.numpy()
    scaled = pair.scale
    right = first.constant(
        ctx,
        f"{first.weight.root.name or 'weight'}_first",
        (rank, first.inputs, *first.kernel),
        lambda: np.ascontiguousarray(first.matrix(opset)[:rank]),
    )

    def kept() -> Array:
        left = second.matrix(opset)[:, :rank]
        if scaled is None:
            return np.ascontiguousarray(left)
        spread = scaled[:rank].reshape(1, -1, *[1] * len(second.kernel))
        return np.ascontiguousarray((left.astype(np.float64) * spread).astype(dtype))

    left = second.constant(
        ctx, f"{second.weight.root.name or 'weight'}_first", (second.outputs, rank, *second.kernel), kept
    )
    offset = _offset(pair, rank, opset)
    bias = second.bias
    behind = offset is not None and second.spelling not in (Spelling.GEMM, Spelling.CONV)
    if offset is not None and not behind:
        total = offset if bias is None else offset + channel_vector(bias, second.outputs)
        bias = ctx.constant(total.astype(dtype), "cut_bias")
    inner = first.apply(ctx, first.x, right, outputs=rank)
    outer = second.apply(ctx, inner.outputs[0], left, bias)
    nodes = [inner, outer]
    if offset is not None and behind:
        nodes.append(_added(ctx, second, outer.outputs[0], offset.astype(dtype)))
    ctx.replace({pair.y: nodes[-1].outputs[0]}, nodes, rule="first-ranks", certain=True)


def _offset(pair: Pair, rank: int, opset: int) -> Array | None:
    """What the shift between the factors adds to y, of the ranks that are kept; float64 (outputs,)."""
    if pair.shift is None:
        return None
    left = pair.second.matrix(opset).astype(np.float64)
    return np.asarray(left.reshape(*left.shape[:2], -1).sum(axis=2)[:, :rank] @ pair.shift[:rank])


def _added(ctx: Context, second: Linear, y: ir.Value, offset: Array) -> ir.Node:
    spread = offset.reshape(-1, 1) if second.spelling is Spelling.LEFT else offset
    return ctx.node("Add", [y, ctx.constant(spread, "cut_offset")], like=second.y)
