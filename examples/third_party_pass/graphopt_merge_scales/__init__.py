"""``merge-scales``: x * a * b with constants a and b becomes x * (a * b)."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage


class MergeScales(RulePass):
    """Makes one multiplication of two whose factors are constants of one element."""

    name = "merge-scales"
    kind = Kind.ROUNDING  # a * b rounds once, x * a * b twice: not the same bits
    stage = Stage.ELIMINATE
    roots = ("Mul",)
    explanation = Explanation(
        matches="Mul by a constant of one element, behind another such Mul that nothing else reads",
        refuses="factors of more than one element; other types than float32 and float64",
        costs="nothing; saves one operator",
        source="associativity",
    )

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        outer = _factor(node)
        inner = outer and _factor(outer[0].producer())
        if not outer or not inner or graphs.sole_consumer(outer[0]) is not node:
            return False
        factor, output = outer[1] * inner[1], node.outputs[0]
        if output.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return False
        constant = ctx.constant(ir.tensor(factor, dtype=output.dtype).numpy(), "scale")
        product = ctx.node("Mul", [inner[0], constant], like=output)
        return ctx.replace({output: product.outputs[0]}, [product], rule="merge")


def _factor(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """The other operand and the number, for a product with a constant without axes."""
    if node is None or node.op_type != "Mul" or node.domain != "":
        return None
    for value, constant in (node.inputs, node.inputs[::-1]):
        number = graphs.scalar_of(constant)
        if value is not None and number is not None and graphs.rank(constant) == 0:
            return value, number
    return None
