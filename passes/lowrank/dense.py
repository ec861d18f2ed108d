"""Dense weights that can be factorised: which products read them, and what their inputs are."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.moments import Tap, tap_of
from graphopt.passes.lowrank.hidden import LEAST, factored
from graphopt.rewrite import Context
from graphopt.sites import ROOTS, Linear, Spelling, linear_at
from graphopt.store import digest


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight, and every product that reads it.

    Attributes:
        name: Of the constant.
        nodes: The products, in the order of the graph.
        outputs: m.
        inputs: n, of a convolution channels times kernel: W is (m, n).
        key: The digest of its numbers.
        taps: For each product its input, and how the rows of that are read.
    """

    name: str
    nodes: tuple[ir.Node, ...]
    outputs: int
    inputs: int
    key: str
    taps: tuple[Tap, ...]

    @property
    def elements(self) -> int:
        """m n."""
        return self.outputs * self.inputs

    def linears(self) -> list[Linear]:
        """The products as they are now: what they read may have been replaced."""
        found = [linear_at(node) for node in self.nodes if node.graph is not None]
        return [linear for linear in found if isinstance(linear, Linear)]

    def matrix(self, opset: int) -> np.ndarray:
        """W, (m, n)."""
        return self.linears()[0].matrix(opset).reshape(self.outputs, self.inputs)


def dense_weights(ctx: Context, skip: Iterable[str] = ()) -> list[DenseWeight]:
    """The weights of a model that can be factorised, in the order of their first products.

    Args:
        ctx: The model; near misses are noted.
        skip: Patterns of names of constants to leave alone.
    """
    patterns = tuple(skip)
    in_pairs = factored(ctx.model)
    found: dict[ir.Value, list[Linear]] = {}
    main = ctx.model.graph
    for node in graphs.all_nodes(ctx.model):
        if node.op_type not in ROOTS or node in in_pairs:
            continue
        linear = linear_at(node)
        if isinstance(linear, str):
            continue
        reason = _why_not(linear, patterns, main)
        if reason is None:
            found.setdefault(linear.weight.root, []).append(linear)
        elif linear.spelling is not Spelling.GATHER:
            ctx.refuse(node, f"{linear.weight.root.name}: {reason}")
    weights = []
    for root, linears in found.items():
        if linears[0].weight.readers() != len(linears) or root.is_graph_output():
            ctx.refuse(
                linears[0].node, f"{root.name}: something else reads it too: it would be kept beside its factors"
            )
        elif len({(linear.spelling, linear.kernel, linear.reading) for linear in linears}) > 1:
            ctx.refuse(linears[0].node, f"{root.name}: its readers write the product differently")
        else:
            weights.append(_dense(root, linears))
    return weights


def _why_not(linear: Linear, patterns: Collection[str], main: ir.Graph) -> str | None:
    if linear.spelling is Spelling.GATHER:
        return "a table"
    name = linear.weight.root.name or ""
    if any(fnmatchcase(name, pattern) for pattern in patterns):
        return "left out by the parameter skip"
    if linear.node.graph is not main:
        return "in a body, whose values cannot be calibrated"
    if linear.weight.quantised:
        return "quantised"
    if min(linear.outputs, linear.inputs * int(np.prod(linear.kernel))) < LEAST:
        return f"a side of fewer than {LEAST}"
    return None


def _dense(root: ir.Value, linears: list[Linear]) -> DenseWeight:
    first = linears[0]
    return DenseWeight(
        root.name or "weight",
        tuple(linear.node for linear in linears),
        first.outputs,
        first.inputs * int(np.prod(first.kernel)),
        digest(*first.parts(), first.spelling),
        tuple(tap_of(linear) for linear in linears),
    )
