"""PivotLinear in standard operators, spelled as the products that it stands for: MatMul, Gemm, Conv, or a table.

The permutation is not written here: where the class of the channels allows, it is folded into their other readers and
makers, and only else a Gather is put behind (row form) or before (column form).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.rewrite import Context
from graphopt.sites import Linear, Spelling, resized


@dataclass(frozen=True)
class Side:
    """The two products of a pivot form, and the constants that they read.

    Attributes:
        first: How the product that reads x is spelled.
        second: How the product that makes y is spelled.
        kept: Pivot rows (r, inputs[, *kernel]) or columns (outputs, r[, *kernel]) as a constant of that spelling.
        coefficients: (outputs - r, r) or (r, inputs - r), likewise.
        rank: r.
        channels: The size of the axis that the pivots are of: outputs of the row form, inputs of the column form.
        first_bias: What the first product adds, for spellings that can.
        second_bias: What the second product adds, likewise.
        offset: What is added behind, of a shape that broadcasts along the channel axis; for spellings that add nothing.
    """

    first: Linear
    second: Linear
    kept: ir.Value
    coefficients: ir.Value
    rank: int
    channels: int
    first_bias: ir.Value | None = None
    second_bias: ir.Value | None = None
    offset: ir.Value | None = None


def row_nodes(ctx: Context, side: Side, x: ir.Value, like: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """t = K x; s = C t; y = Concat(t, s) + offset: pivots first.

    Args:
        ctx: Makes the nodes.
        side: The products.
        x: What is multiplied.
        like: Of the type and shape of the result.
    """
    kept = side.first.apply(ctx, x, side.kept, side.first_bias, outputs=side.rank)
    others = side.channels - side.rank
    made = side.second.apply(ctx, kept.outputs[0], side.coefficients, side.second_bias, outputs=others)
    axis = side.second.y_axis
    joined = ctx.node("Concat", [kept.outputs[0], made.outputs[0]], {"axis": axis}, like=like)
    return _with_offset(ctx, side, [kept, made, joined], like)


def column_nodes(ctx: Context, side: Side, x: ir.Value, like: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """x_p, x_np = Split(x); y = K (x_p + C x_np) + offset, where x has its pivots first.

    Args:
        ctx: Makes the nodes.
        side: The products.
        x: What is multiplied, in the order of the pivots.
        like: Of the type and shape of the result.
    """
    axis = side.first.x_axis
    sizes = [side.rank, side.channels - side.rank]
    halves = [resized(x, axis, size) for size in sizes]
    if ctx.opset >= 13:
        lengths = ctx.constant(np.array(sizes, np.int64), "pivot_split")
        split = ctx.node("Split", [x, lengths], {"axis": axis}, like=halves)
    else:
        split = ctx.node("Split", [x], {"axis": axis, "split": sizes}, like=halves)
    pivots, others = split.outputs
    if side.first.spelling is Spelling.GEMM:
        brought = side.first.apply(ctx, others, side.coefficients, pivots, outputs=side.rank)
        nodes, inner = [split, brought], brought.outputs[0]
    else:
        brought = side.first.apply(ctx, others, side.coefficients, outputs=side.rank)
        total = ctx.node("Add", [pivots, brought.outputs[0]], like=brought.outputs[0])
        nodes, inner = [split, brought, total], total.outputs[0]
    product = side.second.apply(ctx, inner, side.kept, side.second_bias)
    return _with_offset(ctx, side, [*nodes, product], like)


def _with_offset(ctx: Context, side: Side, nodes: list[ir.Node], like: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    y = nodes[-1].outputs[0]
    if side.offset is None:
        return nodes, y
    added = ctx.node("Add", [y, side.offset], like=like)
    return [*nodes, added], added.outputs[0]
