"""``merge-adapter``: a low-rank branch beside a product becomes part of its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.matching import made_by, scalar_beside, split_scalar, used_once
from graphopt.numerics.affine import all_finite
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.sites import Linear, Pair, Spelling, is_channel_vector, linear_at, pair_at
from graphopt.sites.product import bounded, multiply
from graphopt.weights import read

Array = npt.NDArray[Any]

MASKED = 0.1
"""From this share of exact zeros on a weight is taken for pruned: the adapter would fill them."""
_DEEPEST = 4
_QUANTISED = frozenset({"MatMulNBits", "MatMulBnb4", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})


@dataclass(frozen=True)
class _Branch:
    """A pair times a number.

    Attributes:
        pair: The adapter's factors.
        behind: What their product is multiplied by.
        sources: Values that the pair's input is a multiple of, itself among them, with the multiple.
    """

    pair: Pair
    behind: float
    sources: dict[ir.Value, float]

    def factor(self, x: ir.Value) -> float:
        """What stands before the product of the factors, seen from one of the sources."""
        return self.behind * self.sources[x]


@dataclass(frozen=True)
class _Base:
    """The product beside an adapter, and the nodes that add to it, from the last to the first."""

    linear: Linear
    adds: tuple[ir.Node, ...]


class MergeAdapter(RulePass):
    """Adds an adapter's product to the weight beside it: W x + s B (A x) becomes (W + s B A) x."""

    name = "merge-adapter"
    kind = Kind.ROUNDING
    stage = Stage.MERGE
    roots = ("Add",)
    explanation = Explanation(
        matches="Add of a product with a constant weight (and any constant bias) and of a pair of factors that reads "
        "the same input, times a number: LoRA, PiSSA and EoRA branches, several beside one weight, too",
        refuses="a quantised base, which would have to be stored as floats; a pruned base (10 % exact zeros or more), "
        "whose zeros the adapter would fill, unless it keeps them; a base that something else reads; a branch of "
        "another input or kernel; a shift between the adapter's factors; a sum that the dtype may not hold",
        costs="linear in the nodes; saves two products for each adapter. The sum is computed in float64 when the model "
        "is saved",
        source="LoRA (Hu et al. 2021), section 4.1: the branch merges at deployment",
    )

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        one, other = node.inputs
        for value, beside in ((one, other), (other, one)):
            branch = None if value is None else _branch(value)
            if branch is None or beside is None:
                continue
            base = _base(beside, branch, node)
            reason = base if isinstance(base, str) else self._why_not(base.linear, branch, ctx)
            if reason is None:
                assert not isinstance(base, str)
                return _merge(ctx, node, base, branch)
            if reason:
                ctx.refuse(node, reason)
        return False

    def _why_not(self, base: Linear, branch: _Branch, ctx: Context) -> str | None:
        pair = branch.pair
        if base.weight.quantised:
            return "the weight beside the adapter is quantised: merged it would be stored as floats"
        if pair.quantised:
            return "the adapter is quantised"
        if base.weight.dtype != pair.dtype:
            return f"the weight is {base.weight.dtype.name}, the adapter {pair.dtype.name}"
        if base.spelling is Spelling.CONV and not _same_window(base, pair):
            return "the adapter's convolution has another kernel, stride or padding than the weight beside it"
        if base.weight.shared:
            return "something else reads the weight beside the adapter: it would be kept beside the sum"
        if pair.shift is not None:
            return "a shift stands between the adapter's factors"
        factor = branch.factor(base.x)
        if not math.isfinite(factor) or (pair.scale is not None and not all_finite(pair.scale)):
            return "a scale of the adapter is not finite"
        left, right = pair.factors(ctx.opset)
        if not bounded(left * np.float64(factor), right, base.weight.dtype):
            return f"{base.weight.dtype.name} may not hold the product of the adapter's factors"
        zeros = _zeros(base)
        if zeros >= MASKED and not _keeps_zeros(base, branch, ctx.opset):
            return f"{zeros:.0%} of the weight beside the adapter are zeros, which it would fill"
        return None


def _branch(value: ir.Value) -> _Branch | None:
    """The pair that a value is a multiple of, read by nothing else."""
    factor = 1.0
    for _ in range(_DEEPEST):
        if not used_once(value):
            return None
        node = value.producer()
        if node is None or node.outputs[0] is not value:
            return None
        inner = _multiple(node)
        if inner is None:
            pair = pair_at(node)
            if isinstance(pair, str) or pair.second.bias is not None:
                return None
            return _Branch(pair, factor, _sources(pair.x))
        value, factor = inner[0], factor * inner[1]
    return None


def _sources(x: ir.Value) -> dict[ir.Value, float]:
    """What an adapter's input is a multiple of, with the factors: itself, and what it was before it was scaled."""
    found = {x: 1.0}
    for _ in range(_DEEPEST):
        node = x.producer()
        inner = None if node is None or node.outputs[0] is not x else _multiple(node)
        if inner is None:
            break
        found[inner[0]] = found[x] * inner[1]
        x = inner[0]
    return found


def _multiple(node: ir.Node) -> tuple[ir.Value, float] | None:
    """What a node multiplies by a constant number, and the number; None of any other node."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Identity":
        return node.inputs[0], 1.0
    if node.op_type == "Mul":
        return split_scalar(node)
    if node.op_type == "Div":
        number = scalar_beside(node.inputs[1], node.inputs[0])
        return None if number is None or number == 0 else (node.inputs[0], 1.0 / number)
    return None


def _base(value: ir.Value, branch: _Branch, root: ir.Node) -> _Base | str:
    """The product beside an adapter; else why there is none that it can become a part of, "" where there is none."""
    adds: list[ir.Node] = []
    pair = branch.pair
    shared = False
    for _ in range(_DEEPEST):
        node = value.producer()
        if node is None or node.outputs[0] is not value:
            return ""
        shared |= not used_once(value)
        linear = linear_at(node)
        if isinstance(linear, Linear):
            if linear.x not in branch.sources:
                return "the adapter reads another input than the weight beside it"
            if (linear.outputs, linear.inputs) != (pair.second.outputs, pair.first.inputs) or (
                (linear.x_axis, linear.y_axis) != (pair.first.x_axis, pair.second.y_axis)
            ):
                return "the adapter is of other channels than the weight beside it"
            if any(made.graph is not root.graph for made in (node, pair.second.node, *adds)):
                return "the weight or the adapter is applied outside the body: a loop must not repeat it"
            return "the product beside the adapter is read elsewhere" if shared else _Base(linear, tuple(adds))
        if node.op_type in _QUANTISED and any(v in branch.sources for v in node.inputs):
            return "the weight beside the adapter is quantised: merged it would be stored as floats"
        if made_by(value, "Add", "Identity") is None:
            return ""
        channels, axis = pair.second.outputs, -_from_end(pair)
        inner = [v for v in node.inputs if v is not None and not is_channel_vector(v, channels, axis)]
        branches = [v for v in inner if _branch(v) is not None]
        if len(inner) == 2 and len(branches) == 1:
            inner = [v for v in inner if v is not branches[0]]  # another adapter, which stays as it is
        if len(inner) != 1:
            return ""
        adds.append(node)
        value = inner[0]
    return ""


def _from_end(pair: Pair) -> int:
    second = pair.second
    return len(second.kernel) + 1 if second.spelling is Spelling.CONV else -second.y_axis


def _same_window(base: Linear, pair: Pair) -> bool:
    wide = pair.first if pair.second.pointwise else pair.second

    def window(linear: Linear) -> object:
        told = {k: v for k, v in linear.node.attributes.items() if k not in ("kernel_shape", "group")}
        plain = {"strides": 1, "dilations": 1, "pads": 0}
        return linear.kernel, {
            k: str(v.value) for k, v in told.items() if k not in plain or any(i != plain[k] for i in v.as_ints())
        }

    return (pair.first.pointwise or pair.second.pointwise) and window(base) == window(wide)


def _zeros(base: Linear) -> float:
    """The share of exact zeros in a weight."""
    return float(np.mean(read(base.weight.tensor) == 0)) if base.elements else 0.0


def _keeps_zeros(base: Linear, branch: _Branch, opset: int) -> bool:
    delta = multiply(*branch.pair.factors(opset)).reshape(base.outputs, base.inputs, *base.kernel)
    return not np.any(delta[base.matrix(opset) == 0])


def _merge(ctx: Context, node: ir.Node, found: _Base, branch: _Branch) -> bool:
    base, adds = found.linear, found.adds
    opset, dtype = ctx.opset, base.weight.dtype.numpy()
    pair, factor = branch.pair, branch.factor(base.x)
    shape = (base.outputs, base.inputs, *base.kernel)

    def merged() -> Array:
        delta = multiply(*pair.factors(opset)).reshape(shape)
        return (base.matrix(opset).astype(np.float64) + factor * delta).astype(dtype)

    weight = base.constant(ctx, f"{base.weight.root.name or 'weight'}_adapted", shape, merged)
    product = base.apply(ctx, base.x, weight, base.bias)
    nodes, old, new = [product], base.y, product.outputs[0]
    for add in reversed(adds):
        copied = ctx.node(
            add.op_type, [new if v is old else v for v in add.inputs], add.attributes, like=add.outputs[0]
        )
        nodes.append(copied)
        old, new = add.outputs[0], copied.outputs[0]
    return ctx.replace({node.outputs[0]: new}, nodes, rule="adapter", before=node)
