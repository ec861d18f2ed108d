"""A Reshape or Transpose between two products moved before both or behind both, where it keeps the channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import made_by, permutation, rank_of, used_once
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shape_values import ShapeValues
from graphopt.shapes import trusted_shape
from graphopt.sites import Linear, Spelling, linear_at, weight_of

_DEEPEST = 4
_LAYOUT = ("Reshape", "Transpose")
_STEPS = ("Mul", "Div", "Add", "Sub", "Identity")


@dataclass(frozen=True)
class _Chain:
    """Two products, a layout operator, and what scales or shifts channels between.

    Attributes:
        first: The product that is read.
        before: Steps between it and the layout operator, in the order of the data.
        layout: Reshape or Transpose, which keeps the last axis.
        behind: Steps between the layout operator and the second product.
        second: The product that reads.
    """

    first: Linear
    before: tuple[ir.Node, ...]
    layout: ir.Node
    behind: tuple[ir.Node, ...]
    second: Linear

    @property
    def narrow(self) -> ir.Value:
        """What the layout operator reads."""
        value = self.layout.inputs[0]
        assert value is not None
        return value


class _Refused(Exception):
    """A layout operator that has to stay where it is."""


class HoistReshape(RulePass):
    """Moves a Reshape or Transpose that keeps the last axis out from between two products, so that they are a pair."""

    name = "hoist-reshape"
    kind = Kind.ROUNDING
    stage = Stage.MERGE
    explanation = Explanation(
        matches="MatMul or Gemm, Reshape or Transpose that leaves the last axis as it is, MatMul or Gemm, both with"
        " constant weights, and nothing else between but constants that scale or shift each channel",
        refuses="values between that something else reads or a caller gets; a shape that is computed otherwise than by"
        " Concat with the channels last; a Transpose where neither the product of the weights nor a pivot form would"
        " save what it costs to transpose more channels",
        costs="linear in the nodes; a Reshape costs nothing wherever it stands. Products of other batch axes may be"
        " summed in another order, which is why it is not bitwise",
        source="a product along the last axis does not know how the others are arranged",
    )
    roots = ("MatMul", "Gemm")

    def apply(self, ctx: Context) -> None:
        self._values = ShapeValues(ctx.opset)
        super().apply(ctx)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        chain = _chain(node)
        if chain is None:
            return False
        try:
            _check(chain)
            axes = self._axes(chain)
            before = _fits(chain.first, axes)
            behind = _fits(chain.second, rank_of(chain.narrow))
            if not before and not behind:
                raise _Refused("Gemm multiplies matrices: neither product can be written on the other side")
            if before and behind and chain.layout.op_type == "Transpose":
                before = chain.first.inputs <= chain.second.outputs  # the fewer numbers are transposed
            _check_gain(chain, before, ctx)
        except _Refused as refusal:
            ctx.refuse(node, str(refusal))
            return False
        return _move_before(chain, ctx) if before else _move_behind(chain, ctx)

    def _axes(self, chain: _Chain) -> int:
        """How many axes there are behind the layout operator, which is known to keep the last one.

        Raises:
            _Refused: It may not, or it cannot be written for other channels.
        """
        layout, channels = chain.layout, chain.first.outputs
        if layout.op_type == "Transpose":
            perm = permutation(layout)
            if perm is None or not perm or perm[-1] != len(perm) - 1:
                raise _Refused("the Transpose moves the channels")
            return len(perm)
        given = layout.inputs[1] if len(layout.inputs) > 1 else None
        target = None if given is None else self._values.of(given)
        rank = rank_of(chain.narrow)
        if target is None or rank is None or not len(target):
            raise _Refused("the shape of the Reshape, or of what it reads, is not known")
        if target[-1] != channels or _end(given) is None:
            raise _Refused("the Reshape may not keep the channels, or takes a shape that does not say so at its end")
        # A 0 copies an axis: at the place of the channels it would copy them.
        copies = not layout.attributes.get_int("allowzero", 0)
        if copies and rank < len(target) and not (isinstance(target[rank - 1], int) and target[rank - 1] != 0):
            raise _Refused("the Reshape may copy the channels to another axis")
        return len(target)


# -- reading -----------------------------------------------------------------------------------------------------------


def _chain(node: ir.Node) -> _Chain | None:
    """The products around a layout operator, where a node is the second of them."""
    second = linear_at(node)
    if isinstance(second, str) or not _along_last(second):
        return None
    value, steps = _through(second.x, second.inputs)
    layout = made_by(value, *_LAYOUT)
    source = None if layout is None else layout.inputs[0]
    if layout is None or source is None:
        return None
    value, earlier = _through(source, second.inputs)
    producer = value.producer()
    first = "" if producer is None or producer.outputs[0] is not value else linear_at(producer)
    if isinstance(first, str) or not _along_last(first) or first.outputs != second.inputs:
        return None
    return _Chain(first, earlier, layout, steps, second)


def _along_last(linear: Linear) -> bool:
    return linear.spelling in (Spelling.MATMUL, Spelling.GEMM) and linear.x_axis == -1


def _through(value: ir.Value, channels: int) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """Back over nodes that scale or shift channels: what the first of them reads, and they."""
    steps: list[ir.Node] = []
    while len(steps) < _DEEPEST and (node := made_by(value, *_STEPS)) is not None:
        source = _source(node, channels)
        if source is None:
            break
        steps.append(node)
        value = source
    return value, tuple(reversed(steps))


def _source(node: ir.Node, channels: int) -> ir.Value | None:
    """Of a step the operand that is no constant."""
    if node.op_type == "Identity":
        return node.inputs[0]
    left, right = node.inputs
    if _is_vector(right, channels):
        return left
    return right if node.op_type in ("Add", "Mul") and _is_vector(left, channels) else None


def _is_vector(value: ir.Value | None, channels: int) -> bool:
    """One number for each channel, or one for all, without axes that would count from the end."""
    weight = weight_of(value)
    return weight is not None and weight.shape in ((), (1,), (channels,))


def _check(chain: _Chain) -> None:
    """Raises _Refused where something is read elsewhere, or computed in another graph."""
    nodes = [chain.first.node, *chain.before, chain.layout, *chain.behind]
    if any(node.graph is not chain.second.node.graph for node in nodes):
        raise _Refused("a part is computed outside the body")
    if any(not used_once(node.outputs[0]) for node in nodes):
        raise _Refused("a value between the products is read elsewhere")
    if not chain.first.inputs * chain.first.outputs * chain.second.outputs:
        raise _Refused("a product has no channels")
    if chain.first.weight.dtype != chain.second.weight.dtype:
        raise _Refused("the products have weights of two types")


def _end(shape: ir.Value | None) -> ir.Value | None:
    """The constant that a shape ends with: all of it, or what Concat has last."""
    concat = made_by(shape, "Concat")
    last = shape if concat is None else concat.inputs[-1]
    array = graphs.constant_array(last, limit=64)
    return last if array is not None and array.size else None


def _fits(linear: Linear, rank: int | None) -> bool:
    """Whether a product can be written for an operand of so many axes."""
    return linear.node.op_type != "Gemm" or rank == 2


# -- writing -----------------------------------------------------------------------------------------------------------


def _move_before(chain: _Chain, ctx: Context) -> bool:
    first, result = chain.first, chain.layout.outputs[0]
    nodes = _layout(chain, first.x, first.inputs, _like(result, first.inputs, first.x), ctx)
    value = _again([first.node, *chain.before], nodes[-1].outputs[0], result, first.outputs, nodes, ctx)
    return ctx.replace({result: value}, nodes, rule="before", certain=True)


def _move_behind(chain: _Chain, ctx: Context) -> bool:
    second, nodes = chain.second, list[ir.Node]()
    value = _again(chain.behind, chain.narrow, chain.narrow, second.inputs, nodes, ctx)
    value = _again([second.node], value, chain.narrow, second.outputs, nodes, ctx)
    nodes += _layout(chain, value, second.outputs, second.y, ctx)
    return ctx.replace({second.y: nodes[-1].outputs[0]}, nodes, rule="behind", certain=True)


def _again(
    copied: Sequence[ir.Node], value: ir.Value, shape: ir.Value, channels: int, nodes: list[ir.Node], ctx: Context
) -> ir.Value:
    """Products and steps once more, on another operand; they are added to ``nodes``, and the last result is given."""
    for node in copied:
        linear = linear_at(node)
        source = _source(node, channels) if isinstance(linear, str) else linear.x
        inputs = [value if operand is source else operand for operand in node.inputs]
        like = _like(shape, channels, node.outputs[0])
        nodes.append(ctx.node(node.op_type, inputs, node.attributes, like=like, domain=node.domain))
        value = nodes[-1].outputs[0]
    return value


def _layout(chain: _Chain, value: ir.Value, channels: int, like: ir.Value, ctx: Context) -> list[ir.Node]:
    """The layout operator for other channels."""
    layout = chain.layout
    if layout.op_type == "Transpose":
        return [ctx.node("Transpose", [value], layout.attributes, like=like)]
    given = layout.inputs[1]
    array = graphs.constant_array(_end(given), limit=64)
    assert given is not None and array is not None  # _axes
    shape = ctx.constant(np.array([*array[:-1], channels], np.int64), "shape")
    nodes: list[ir.Node] = []
    concat = made_by(given, "Concat")
    if concat is not None:
        nodes.append(ctx.node("Concat", [*concat.inputs[:-1], shape], {"axis": 0}, like=given))
        shape = nodes[0].outputs[0]
    return [*nodes, ctx.node("Reshape", [value, shape], layout.attributes, like=like)]


def _like(value: ir.Value, channels: int, typed: ir.Value) -> ir.Value:
    """Of the shape of a value, but for the last axis."""
    shape = trusted_shape(value)
    if shape is None or not len(shape):
        return ir.Value(type=typed.type)
    return ir.Value(type=typed.type, shape=ir.Shape([*list(shape)[:-1], channels]))


def _check_gain(chain: _Chain, before: bool, ctx: Context) -> None:
    """Raises _Refused where what a pair allows does not pay for transposing more channels. A Reshape costs nothing.

    What it allows is one product with the product of the weights, or the pivot form of rows.
    """
    layout, rule = chain.layout, "before" if before else "behind"
    tags = layout.metadata_props
    if tags.get("graphopt.pass") == HoistReshape.name and tags.get("graphopt.rule") != rule:
        raise _Refused("it was moved here: of three products two are a pair")
    if layout.op_type == "Reshape":
        return
    first, second = chain.first, chain.second
    m, n, r = second.outputs, first.inputs, first.outputs
    dtype = first.weight.dtype

    def never() -> ir.TensorProtocol:
        raise AssertionError("nobody reads it: it has a size only")

    def weight(*shape: int) -> ir.Value:
        return ctx.constant(ir.LazyTensor(never, dtype=dtype, shape=ir.Shape(shape)), "weight")

    x, t, s, y, wide = (
        _like(chain.narrow, size, chain.narrow) for size in (n, r, max(m - r, 0), m, n if before else m)
    )
    down, up = ctx.node("MatMul", [x, weight(n, r)], like=t), ctx.node("MatMul", [t, weight(r, m)], like=y)
    moved = ctx.node("Transpose", [wide], like=wide)
    old = [down, ctx.node("Transpose", [t], like=t), up]
    dense = [moved, ctx.node("MatMul", [x, weight(n, m)], like=y)]
    rest = ctx.node("MatMul", [t, weight(r, max(m - r, 0))], like=s)
    pivot = [moved, down, rest, ctx.node("Concat", [t, s], {"axis": -1}, like=y)]
    # None of them is in the graph or reads anything of it.
    if not ctx.target.cheaper(dense, old) and not (r < min(m, n) and ctx.target.cheaper(pivot, old)):
        raise _Refused(f"to transpose {n if before else m} channels instead of {r} costs what a pair could save")
