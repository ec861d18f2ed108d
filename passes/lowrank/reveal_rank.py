"""``reveal-rank``: dense weights that somebody multiplied out become factors again."""

from __future__ import annotations

from dataclasses import replace

from graphopt.passes.lowrank.factor_chain import factor_constants, factor_nodes
from graphopt.passes.lowrank.hidden import HiddenRank, factored, hidden_ranks
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.sites import linear_at


class RevealRank(Pass):
    """Replaces a dense weight whose rank is low, because it was multiplied out, by two factors."""

    name = "reveal-rank"
    kind = Kind.ROUNDING
    stage = Stage.FACTORIZE
    explanation = Explanation(
        matches="MatMul, Gemm, Conv and tables with a weight of at least 48 x 48 whose rank is below 97 % of its "
        "smaller side, every entry within the rounding of its type: W x becomes U (V x) where two products are cheaper",
        refuses="weights of full rank, however fast their singular values fall (factorize is for those); ranks at "
        "which the factors hold more elements than the weight (pivot takes them); weights that something else reads",
        costs="a random sketch of each weight, O(m n r), and a check of every entry",
        source="Halko, Martinsson and Tropp 2011, section 4: randomised range finder",
    )

    def apply(self, ctx: Context) -> None:
        for hidden in list(hidden_ranks(ctx, factored(ctx.model))):
            linear = linear_at(hidden.linear.node)  # what it reads may have been revealed meanwhile
            if isinstance(linear, str):
                continue
            held, dense = hidden.rank * (linear.inputs + linear.outputs), linear.elements
            if linear.kernel:
                held = hidden.rank * (linear.elements // linear.outputs + linear.outputs)
            if held >= dense:
                ctx.refuse(
                    linear.node, f"of rank {hidden.rank} the factors hold {held:,} elements, the weight {dense:,}"
                )
                continue
            _write(ctx, replace(hidden, linear=linear))


def _write(ctx: Context, hidden: HiddenRank) -> None:
    linear, rank = hidden.linear, hidden.rank
    made = factor_constants(ctx, linear, rank, lambda: hidden.factors()["right"], lambda: hidden.factors()["left"])
    inner, outer = factor_nodes(ctx, linear, rank, *made)
    ctx.replace({linear.y: outer.outputs[0]}, [inner, outer], rule="factors")
