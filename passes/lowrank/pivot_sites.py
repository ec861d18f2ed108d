"""What the pivot pass works on: pairs of factors, and dense weights of hidden rank, as one kind of thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.passes.lowrank.hidden import FORM, HiddenRank, factored, hidden_ranks
from graphopt.rewrite import Context
from graphopt.sites import Linear, Pair, Spelling, pairs
from graphopt.store import Arrays, digest

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PivotSite:
    """A matrix of low rank in a graph: a pair of factors, or a dense weight whose rank is found to be low.

    Attributes:
        first: How the product that reads x is written.
        second: How the product that makes y is written.
        nodes: What goes.
        y: The result.
        rank: Of the matrix.
        key: The digest of what it is.
        left: Reads U, (outputs, rank[, *kernel]), scales in it.
        right: Reads V, (rank, inputs[, *kernel]).
        offset: Reads U c of U (V x) + U c, float64 (outputs,); None: nothing is added between.
        owed: The rank was chosen for this form, within a budget of elements: time does not count.
        multiple: Of what the number of pivots is to be a multiple.
        spare: Pivots beyond the rank. A thirty-second part more halves what rounding the coefficients adds.
    """

    first: Linear
    second: Linear
    nodes: tuple[ir.Node, ...]
    y: ir.Value
    rank: int
    key: str
    left: Callable[[], Array]
    right: Callable[[], Array]
    offset: Callable[[], Array] | None = None
    owed: bool = False
    multiple: int = 1
    spare: int = 0

    @property
    def pivots(self) -> int:
        """The number of pivots: the rank, rounded up where there are rows and columns left for that."""
        padded = -(-(self.rank + self.spare) // self.multiple) * self.multiple
        return padded if padded < min(self.second.outputs, self.first.inputs) else self.rank

    @property
    def x(self) -> ir.Value:
        """What is multiplied."""
        return self.first.x

    @property
    def is_current(self) -> bool:
        """Whether the nodes are still in the graph, and still read what they did."""
        return all(node.graph is not None for node in self.nodes) and self.x in self.nodes[0].inputs


def pivot_sites(ctx: Context) -> list[PivotSite]:
    """Every matrix of low rank that has a pivot form smaller than it is."""
    found = []
    opset = ctx.opset
    for pair in pairs(ctx.model):
        if not isinstance(pair, Pair):
            if not _is_ours(pair[0]):
                ctx.refuse(*pair)
            continue
        m, n = pair.second.outputs, pair.first.inputs
        if pair.quantised:
            ctx.refuse(pair.second.node, "the factors are quantised")
        elif pair.first.weight.shared or pair.second.weight.shared:
            ctx.refuse(pair.second.node, "something else reads a factor too: it would be kept beside the pivots")
        elif not (pair.first.pointwise or pair.second.pointwise):
            ctx.refuse(pair.second.node, "both convolutions look beside a position")
        elif pair.rank >= min(m, n):
            ctx.refuse(pair.second.node, f"rank {pair.rank} is full: the pivot form would be the dense weight")
        elif not _fits(ctx, site := _of_pair(pair, opset)):
            ctx.refuse(pair.second.node, f"the product of the factors may leave the range of {pair.dtype.name}")
        else:
            found.append(site)
    found.extend(_of_hidden(hidden, opset) for hidden in hidden_ranks(ctx, factored(ctx.model)))
    return found


def _fits(ctx: Context, site: PivotSite) -> bool:
    """Whether every number of the matrix is sure to be one of its type: pivots are made of those."""

    def compute() -> Arrays:
        left, right = (factor().astype(np.float64).reshape(-1) for factor in (site.left, site.right))
        u, v = left.reshape(site.second.outputs, site.rank, -1), right.reshape(site.rank, -1)
        with np.errstate(all="ignore"):
            rows, columns = np.einsum("ijk,ijk->ik", u, u), np.einsum("ij,ij->j", v, v)
            return {"bound": np.sqrt(rows.max() * columns.max())}

    bound = float(ctx.store.arrays(digest("bound", site.key), compute)["bound"])
    most = float(ml_dtypes.finfo(site.second.weight.dtype.numpy()).max)  # type: ignore[no-untyped-call]
    return bound < most / 4


def _is_ours(node: ir.Node) -> bool:
    return node.metadata_props.get("graphopt.pass", "").startswith("pivot")


def _of_pair(pair: Pair, opset: int) -> PivotSite:
    first, second = pair.first, pair.second
    # One of two matrix products may be MatMul and the other Gemm: then both may be Gemm.
    if {first.spelling, second.spelling} == {Spelling.MATMUL, Spelling.GEMM}:
        first = replace(first, spelling=Spelling.GEMM)
        second = replace(second, spelling=Spelling.GEMM)
    key = digest(*first.parts(), *second.parts(), pair.scale, first.inputs, second.outputs)
    return PivotSite(
        first,
        second,
        pair.nodes(),
        pair.y,
        pair.rank,
        key,
        lambda: pair.factors(opset)[0],
        lambda: pair.first.matrix(opset),
        None if pair.shift is None else lambda: _through(second, pair.shift, opset),
        is_owed(pair),
    )


def is_owed(pair: Pair) -> bool:
    """Whether the rank of a pair was chosen for its pivot form."""
    return pair.second.node.metadata_props.get(FORM) == "pivot"


def _through(second: Linear, shift: Array | None, opset: int) -> Array:
    """What a shift between the factors adds behind them. The scale is in it already: U alone is applied."""
    left = second.matrix(opset).astype(np.float64)
    return np.asarray(left.reshape(*left.shape[:2], -1).sum(axis=2) @ shift)


def _of_hidden(hidden: HiddenRank, opset: int) -> PivotSite:
    linear = hidden.linear
    kernel = linear.kernel
    return PivotSite(
        linear,
        replace(linear.follower(), y=linear.y, outputs=linear.outputs, bias=linear.bias),
        (linear.node,),
        linear.y,
        hidden.rank,
        hidden.key,
        lambda: hidden.factors()["left"].reshape(linear.outputs, hidden.rank, *[1] * len(kernel)),
        lambda: hidden.factors()["right"].reshape(hidden.rank, linear.inputs, *kernel),
    )
