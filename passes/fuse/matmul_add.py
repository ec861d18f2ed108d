"""MatMul and the Add of a bias as one Gemm, for matrices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import FLOATS, float_attribute, int_attribute, made_by, permutation, rank_of, used_once
from graphopt.numerics.affine import all_finite
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shapes import trusted_shape

_SUM_LIMIT = 1 << 20


class FuseMatMulAdd(RulePass):
    """Turns A B + C of matrices into Gemm."""

    name = "fuse-matmul-add"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="MatMul of two matrices followed by Add of a bias; a Transpose of either operand becomes transA or "
        "transB; a second constant bias after Gemm is merged into the first",
        refuses="operands of a rank that is not two or not known (Gemm has no batch axes); a bias that broadcasts the"
        " product to a larger shape, or might; integer matrices; an empty inner axis; a product that "
        "something else reads",
        costs="linear in the nodes; saves one pass over the product",
        source="ONNX operator Gemm",
    )
    roots = ("Add",)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        if ctx.opset < 7:  # Gemm needed an attribute to broadcast
            return False
        for product, bias in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            if product is None or bias is None:
                continue
            source = made_by(product, "MatMul", "Gemm")
            if source is None:
                continue
            if not used_once(product):
                ctx.refuse(node, "the product is read elsewhere")
                continue
            if source.graph is not node.graph:
                ctx.refuse(node, "the product is computed outside the body: a loop must not repeat it")
                continue
            rule = self._matmul if source.op_type == "MatMul" else self._gemm
            if rule(node, source, bias, ctx):
                return True
        return False

    def _matmul(self, node: ir.Node, source: ir.Node, bias: ir.Value, ctx: Context) -> bool:
        left, right = source.inputs
        if rank_of(left) != 2 or rank_of(right) != 2:
            ctx.refuse(node, f"ranks {rank_of(left)} and {rank_of(right)}: Gemm multiplies matrices")
            return False
        assert left is not None and right is not None
        rows, columns = trusted_shape(left), trusted_shape(right)
        if left.dtype not in FLOATS or rows is None or columns is None:
            return False
        inner = [axis for axis in (rows[1], columns[0]) if isinstance(axis, int)]
        if not inner or min(inner) == 0:
            ctx.refuse(node, "the inner axis is empty, or its size is not known")
            return False
        if not _fits(bias, rows[0], columns[1]):
            ctx.refuse(node, f"a bias of shape {bias.shape} may broadcast a product of {rows[0]} x {columns[1]}")
            return False
        attributes: dict[str, object] = {}
        left, flipped = _without_transpose(left)
        if flipped:
            attributes["transA"] = 1
        right, flipped = _without_transpose(right)
        if flipped:
            attributes["transB"] = 1
        gemm = ctx.node("Gemm", [left, right, bias], attributes, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: gemm.outputs[0]}, [gemm], rule="matmul-add")

    def _gemm(self, node: ir.Node, source: ir.Node, bias: ir.Value, ctx: Context) -> bool:
        left, right = source.inputs[:2]
        if left is None or right is None or left.dtype not in FLOATS:
            return False
        a, b = trusted_shape(left), trusted_shape(right)
        if a is None or b is None or len(a) != 2 or len(b) != 2:
            return False
        beta = float_attribute(source, "beta", 1.0)
        flips = int_attribute(source, "transA", 0), int_attribute(source, "transB", 0)
        alpha = float_attribute(source, "alpha", 1.0)
        if beta is None or alpha is None or None in flips:
            return False
        rows = a[1 if flips[0] else 0]
        columns = b[0 if flips[1] else 1]
        if not _fits(bias, rows, columns):
            ctx.refuse(node, f"a bias of shape {bias.shape} may broadcast a product of {rows} x {columns}")
            return False
        present = source.inputs[2] if len(source.inputs) > 2 else None
        if present is not None:
            merged = _sum_of_constants(present, beta, bias)
            if merged is None:
                ctx.refuse(node, "the two biases are not constants")
                return False
            bias = ctx.constant(merged, f"{present.name or 'bias'}_sum")
        attributes = {key: value for key, value in (("transA", flips[0]), ("transB", flips[1])) if value}
        if alpha != 1.0:
            attributes["alpha"] = alpha  # type: ignore[assignment]
        gemm = ctx.node("Gemm", [left, right, bias], attributes, like=node.outputs[0])
        return ctx.replace({node.outputs[0]: gemm.outputs[0]}, [gemm], rule="gemm-add")


def _fits(bias: ir.Value, rows: int | ir.SymbolicDim, columns: int | ir.SymbolicDim) -> bool:
    """Whether adding the bias to a product of rows x columns surely leaves the product's shape as it is."""
    shape = trusted_shape(bias)
    if shape is None or len(shape) > 2:
        return False
    return all(
        axis == 1 or ((isinstance(axis, int) or axis.value is not None) and axis == size)
        for axis, size in zip(reversed(list(shape)), (columns, rows), strict=False)
    )


def _without_transpose(value: ir.Value) -> tuple[ir.Value, bool]:
    """The matrix that a value is the transpose of, if it is one."""
    node = made_by(value, "Transpose")
    source = node.inputs[0] if node is not None else None
    if node is None or source is None or rank_of(source) != 2:
        return value, False
    # Without perm the axes are reversed.
    if "perm" not in node.attributes or permutation(node) == (1, 0):
        return source, True
    return value, False


def _sum_of_constants(one: ir.Value, beta: float, other: ir.Value) -> np.ndarray | None:
    """beta * one + other in float64, rounded once; None where one is no constant or the sum is not finite."""
    a, b = graphs.constant_array(one, limit=_SUM_LIMIT), graphs.constant_array(other, limit=_SUM_LIMIT)
    if a is None or b is None:
        return None
    with np.errstate(all="ignore"):
        merged = (beta * a.astype(np.float64) + b.astype(np.float64)).astype(a.dtype)
    return merged if merged.size <= _SUM_LIMIT and all_finite(merged) else None
