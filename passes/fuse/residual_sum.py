"""A chain of additions before a LayerNormalization as one Sum."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.matching import INVENTED, made_by, rank_of, used_once
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage

_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})


class FuseResidualSum(RulePass):
    """Turns Add(Add(a, b), c) before LayerNormalization into Sum(a, b, c)."""

    name = "fuse-residual-sum"
    kind = Kind.BITWISE
    stage = Stage.FUSE
    explanation = Explanation(
        matches="two or more Add nodes in a row (product + bias + residual) whose result a LayerNormalization reads",
        refuses="operands of the last Add whose shapes are not known to be equal: the runtime leaves such an Add alone "
        "and two Adds are a little faster than a Sum; a partial sum that something else reads; dtypes other than "
        "float32 and float64, for which runtimes have no kernel of Sum; a product of matrices and its bias, which Gemm "
        "takes whole",
        costs="linear in the nodes; one node fewer. It keeps ONNX Runtime's CPU from fusing Add and LayerNormalization "
        "into SkipLayerNormalization, which takes several times as long as the two",
        source="ONNX operator Sum adds its operands from left to right, as the chain does",
    )
    roots = ("LayerNormalization",)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        total = node.inputs[0]
        last = made_by(total, "Add")
        if total is None or last is None or ctx.opset < 8:  # Sum broadcasts from opset 8 on
            return False
        terms = _terms(last)
        if len(terms) < 3:
            return False
        if not _known_equal(last.inputs[0], last.inputs[1]):
            ctx.refuse(node, "the shapes of the last two operands are not known to be equal")
            return False
        if total.dtype not in _TYPES:
            ctx.refuse(
                node, f"{total.dtype.name.lower() if total.dtype else 'no known type'}: only float32 and float64"
            )
            return False
        first = next((m for m in (made_by(t, "MatMul") for t in terms[:2]) if m is not None), None)
        if first is not None and all(rank_of(v) == 2 for v in first.inputs):
            ctx.refuse(node, "the product of two matrices and its bias are better in one Gemm")
            return False
        added = ctx.node("Sum", terms, like=total)
        return ctx.replace({total: added.outputs[0]}, [added], rule="add-chain")


def _known_equal(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether a reader of the file sees that two values have the same shape.

    This asks for what is declared and not for what is proven: the runtime that fuses such an addition does too. The
    rewrite is right whatever the shapes are.
    """
    a, b = (None if v is None else v.shape for v in (one, other))
    if a is None or b is None or len(a) != len(b):
        return False
    return all(
        x == y and (isinstance(x, int) or (x.value is not None and not x.value.startswith(INVENTED)))
        for x, y in zip(a, b, strict=True)
    )


def _terms(add: ir.Node) -> list[ir.Value]:
    """The operands of a chain of additions in the order in which they are added.

    (a + b) + (c + d) is opened on one side only: opening both would change the order, and with it the last bits.
    """
    backwards: list[ir.Value] = []
    while True:
        left, right = add.inputs
        assert left is not None and right is not None
        below = made_by(left, "Add")
        if below is not None and used_once(left):
            backwards.append(right)
        else:
            below = made_by(right, "Add")
            if below is None or not used_once(right):
                return [left, right, *reversed(backwards)]
            backwards.append(left)
        if below.graph is not add.graph:
            return [left, right, *reversed(backwards[:-1])]
        add = below
