"""Dense weights whose rank is lower than their size: what somebody multiplied out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.numerics.low_rank import find_rank
from graphopt.rewrite import Context
from graphopt.sites import ROOTS, Linear, Pair, Spelling, linear_at, pairs
from graphopt.store import Arrays, Store, digest

LEAST = 48
"""Of a smaller side there is nothing to gain, by looking for its rank or by lowering it."""
GAIN = 0.97
"""The rank must be below this fraction of the smaller side."""
FACTOR = "graphopt.factor"
"""Marks products by a factor that a pass made: it is of the rank that the pass gave it."""
FORM = "graphopt.form"
"""Marks the second of two factors whose rank was chosen for another form: "pivot" is owed, whatever it costs."""
_FACTORED = frozenset({"factorize", "slice-rank"})
"""All products that these passes write are such. Others also write products that they only relabel."""


@dataclass(frozen=True)
class HiddenRank:
    """A dense product whose matrix has a low rank.

    Attributes:
        linear: The product.
        rank: Of its matrix; of a convolution, of the matrix (outputs, inputs * kernel).
        key: The digest of the weight.
        store: Holds the factors.
        opset: Of the model.
    """

    linear: Linear
    rank: int
    key: str
    store: Store
    opset: int

    def factors(self) -> Arrays:
        """``left`` (outputs, rank) and ``right`` (rank, inputs * kernel)."""
        return _factors(self.store, self.linear, self.key, self.opset)


def hidden_ranks(ctx: Context, skip: Collection[ir.Node] = ()) -> Iterator[HiddenRank]:
    """Every dense product of a model whose weight was multiplied out of smaller factors, in the order of the nodes.

    Args:
        ctx: The model.
        skip: Nodes that are no candidates: those of known pairs.
    """
    opset = ctx.opset
    candidates = [linear for node in graphs.all_nodes(ctx.model) if node not in skip and (linear := _candidate(node))]
    for number, linear in enumerate(candidates, 1):
        ctx.say(f"looking for hidden rank: {number} of {len(candidates)} weights")
        key = digest("rank", *linear.parts(), linear.spelling)
        found = _factors(ctx.store, linear, key, opset)
        if found:
            yield HiddenRank(linear, found["right"].shape[0], key, ctx.store, opset)


def _candidate(node: ir.Node) -> Linear | None:
    if node.op_type not in ROOTS or _is_factor(node):
        return None
    linear = linear_at(node)
    # Tables are tall, and nobody merges a factor into one: looking would take longest where there is least hope.
    if isinstance(linear, str) or linear.spelling is Spelling.GATHER or linear.weight.quantised:
        return None
    columns = linear.inputs * int(np.prod(linear.kernel))
    return None if min(linear.outputs, columns) < LEAST or linear.weight.shared else linear


def factored(model: ir.Model) -> set[ir.Node]:
    """The nodes of every pair of factors. Two products in a row of a rank that is full are none: both are dense."""
    found: set[ir.Node] = set()
    for pair in pairs(model):
        if isinstance(pair, Pair) and pair.rank < min(pair.first.inputs * _positions(pair), pair.second.outputs):
            found.update(pair.nodes())
    return found


def _positions(pair: Pair) -> int:
    """What a convolution multiplies of each channel."""
    return int(np.prod(pair.first.kernel))


def _is_factor(node: ir.Node) -> bool:
    return FACTOR in node.metadata_props or node.metadata_props.get("graphopt.pass", "") in _FACTORED


def _factors(store: Store, linear: Linear, key: str, opset: int) -> Arrays:
    def compute() -> Arrays:
        matrix = linear.matrix(opset)
        flat = matrix.reshape(matrix.shape[0], -1)
        try:
            found = find_rank(flat, max(1, int(GAIN * min(flat.shape))))
        except ValueError:  # a number that is not finite
            return {}
        return {} if found is None else {"left": found.left, "right": found.right}

    return store.arrays(key, compute)
