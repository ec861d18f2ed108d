"""``merge-factors``: two products in a row become one where that is cheaper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.numerics.affine import all_finite
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.sites import Linear, Pair, Spelling, channel_vector, pair_at, pairs
from graphopt.sites.product import fits, fits_numbers, merged_attributes, multiply
from graphopt.weights import computed

Array = npt.NDArray[Any]

SMALL_BYTES = 1 << 16
"""Up to this size a product may take more bytes than its factors did, where it is faster."""


@dataclass(frozen=True)
class _Merged:
    """The constants of a merged pair: pairs that read the same factors share them."""

    weight: ir.Value
    offset: ir.Value | None


class MergeFactors(Pass):
    """Multiplies two factors into one weight where one product is cheaper than two."""

    name = "merge-factors"
    kind = Kind.ROUNDING
    stage = Stage.MERGE
    explanation = Explanation(
        matches="MatMul, Gemm, Conv or Gather of a table, then MatMul, Gemm or Conv, both with constant weights and "
        "nothing between but constants that scale or shift each channel: U (s * (V x) + c) becomes (U s V) x + U c. Of "
        "convolutions at most one may look beside a position in each spatial axis: k x k and 1 x 1, or k x 1 and 1 x k",
        refuses="a rank at which the factors hold fewer weights than their product does (over 64 KB); factors that "
        "something else reads, which would have to stay; quantised factors; a product that the dtype may not hold; a "
        "nonlinearity, a norm or an activation between; a value between that is read elsewhere or returned; a shift "
        "before a padded convolution",
        costs="linear in the nodes; the product is computed in float64 when the model is saved, one at a time",
        source="associativity of matrix products; SST checkpoints are of full rank and are meant to be merged",
    )

    def apply(self, ctx: Context) -> None:
        made: dict[tuple[object, ...], _Merged] = {}
        readers: dict[ir.Value, set[ir.Node]] = {}
        for found in pairs(ctx.model):
            if isinstance(found, Pair) and _why_not(found) is None:
                for linear in (found.first, found.second):
                    readers.setdefault(linear.weight.root, set()).add(linear.node)
        for node in list(graphs.all_nodes(ctx.model)):
            # What was found before the last replacement may be gone: three products in a row are two pairs.
            pair = pair_at(node) if node.graph is not None else ""
            if isinstance(pair, str):
                if pair:
                    ctx.refuse(node, pair)
            elif (reason := _why_not(pair) or _why_kept(pair, readers) or _why_not_held(pair, ctx.opset)) is not None:
                ctx.refuse(node, reason)
            else:
                _merge(ctx, pair, made)


def merge_larger(ctx: Context, pair: Pair) -> bool:
    """Merge a pair whose factors hold more elements than their product; False where it stays."""
    first, second = pair.first, pair.second
    elements = first.inputs * second.outputs * math.prod(first.kernel) * math.prod(second.kernel)
    readers = {linear.weight.root: {linear.node} for linear in (first, second)}
    if pair.elements <= elements or _why_not(pair) or _why_kept(pair, readers) or _why_not_held(pair, ctx.opset):
        return False
    return _merge(ctx, pair, {})


def _why_not(pair: Pair) -> str | None:
    """Why a pair is not merged, by what can be told without reading its weights."""
    first, second = pair.first, pair.second
    if pair.quantised:
        return "the factors are quantised"
    attributes = merged_attributes(pair)
    if isinstance(attributes, str):
        return attributes
    elements = first.inputs * second.outputs * math.prod(first.kernel) * math.prod(second.kernel)
    if elements > pair.elements and elements * pair.dtype.itemsize > SMALL_BYTES:
        return f"of rank {pair.rank} the factors hold {pair.elements:,} weights, their product {elements:,}"
    return None


def _why_kept(pair: Pair, readers: dict[ir.Value, set[ir.Node]]) -> str | None:
    """Why a factor would stay in the model beside the product."""
    for weight in (pair.first.weight, pair.second.weight):
        merging = readers.get(weight.root, set())
        if weight.shared and (weight.root.is_graph_output() or weight.readers() > len(merging)):
            return "something else reads a factor too: it would be kept beside the product"
    return None


def _why_not_held(pair: Pair, opset: int) -> str | None:
    """Why the dtype does not hold the product, whose numbers may be far larger or smaller than those of the factors."""
    if not all_finite(*(vector for vector in (pair.scale, pair.shift) if vector is not None)):
        return "a scale or a shift is not finite"
    left, right = pair.factors(opset)
    if not fits(left, right, pair.dtype):
        return f"{pair.dtype.name} may not hold the product of the factors"
    offset = _offset(pair, opset)
    if offset is not None and not fits_numbers(offset, pair.dtype):
        return f"{pair.dtype.name} does not hold what the shift between becomes"
    return None


def _merge(ctx: Context, pair: Pair, made: dict[tuple[object, ...], _Merged]) -> bool:
    first, second = pair.first, pair.second
    key = _key(pair)
    known = made.get(key)
    merged = known or _constants(ctx, pair)
    bias = merged.offset if merged.offset is not None else second.bias
    added = [bias] if bias is not None else []
    nodes: list[ir.Node]
    if first.spelling is Spelling.CONV:
        attributes = merged_attributes(pair)
        assert not isinstance(attributes, str)  # _why_not
        nodes = [ctx.node("Conv", [first.x, merged.weight, *added], attributes, like=second.y)]
    elif first.spelling is Spelling.GATHER:
        nodes = [ctx.node("Gather", [merged.weight, first.x], first.node.attributes, like=second.y)]
    elif first.spelling is Spelling.LEFT:
        nodes = [ctx.node("MatMul", [merged.weight, first.x], like=second.y)]
    elif Spelling.GEMM in (first.spelling, second.spelling):
        turned = {"transA": 1} if first.x_axis == -2 else {}
        nodes = [ctx.node("Gemm", [first.x, merged.weight, *added], turned, like=second.y)]
    else:
        nodes = [ctx.node("MatMul", [first.x, merged.weight], like=second.y)]
    if added and nodes[0].op_type not in ("Conv", "Gemm"):
        nodes.append(ctx.node("Add", [nodes[0].outputs[0], *added], like=second.y))
    done = ctx.replace({pair.y: nodes[-1].outputs[0]}, nodes, rule="product")
    if done and known is None:
        made[key] = merged
    return done


def _key(pair: Pair) -> tuple[object, ...]:
    """The same for pairs whose product and shift are the same constants, stored the same way."""

    def read(linear: Linear) -> tuple[object, ...]:
        return linear.weight.root, linear.bias, linear.spelling, *linear.reading

    steps = tuple((step.node.op_type, step.constant) for step in pair.steps)
    return read(pair.first), read(pair.second), steps, pair.second.node.graph


def _constants(ctx: Context, pair: Pair) -> _Merged:
    """The product of the factors, stored as the new node reads it, and what it adds."""
    first, second, opset, dtype = pair.first, pair.second, ctx.opset, pair.dtype.numpy()
    kernel = [k * other for k, other in zip(first.kernel, second.kernel, strict=True)]
    plain = first.spelling in (Spelling.CONV, Spelling.LEFT)
    shape = [second.outputs, first.inputs, *kernel]

    def product() -> ir.TensorProtocol:
        dense = multiply(*pair.factors(opset)).astype(dtype)
        return ir.tensor(np.ascontiguousarray(dense if plain else dense.T))

    name = f"{second.weight.root.name or 'weight'}_merged"
    weight = ctx.constant(computed(product, pair.dtype, shape if plain else shape[::-1]), name)
    offset = _offset(pair, opset)
    if offset is None:
        return _Merged(weight, None)
    spread = offset.reshape(-1, 1) if first.spelling is Spelling.LEFT else offset
    return _Merged(weight, ctx.constant(spread.astype(dtype), f"{second.weight.root.name or 'weight'}_offset"))


def _offset(pair: Pair, opset: int) -> Array | None:
    """What the shift between becomes behind the second factor, with that factor's own bias; float64 (outputs,)."""
    if pair.shift is None:
        return None
    left = pair.second.matrix(opset).astype(np.float64)
    offset: Array = left.sum(axis=tuple(range(2, left.ndim))) @ pair.shift
    return offset if pair.second.bias is None else offset + channel_vector(pair.second.bias, pair.second.outputs)
