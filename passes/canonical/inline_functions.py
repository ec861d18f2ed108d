"""Calls of model-local functions become the nodes of the functions."""

from __future__ import annotations

from graphopt.inlining import inline
from graphopt.rewrite import Context, Explanation, Kind, Stage
from graphopt.rewrite.contract import ForeignPass

KEPT_DOMAIN = "graphopt"
"""Functions of this domain are the meaning of custom operators, and stay."""


class InlineFunctions(ForeignPass):
    """Replaces every call of a model-local function by the function's nodes, in bodies and other functions too."""

    name = "inline-functions"
    kind = Kind.BITWISE
    stage = Stage.IMPORT
    explanation = Explanation(
        matches="nodes that call a function which the model carries",
        refuses="functions of the domain graphopt, which say what custom operators mean; functions that call each "
        "other in a circle, take a body as an attribute, or import an operator set in which one of their operators "
        "means something else than in the model's",
        costs="a copy of the function's nodes for each call; later passes see into it",
        source="ONNX IR specification, model-local functions",
    )

    def rewrite_model(self, ctx: Context) -> bool:
        ours = {key for key in ctx.model.functions if key[0] == KEPT_DOMAIN}
        return inline(ctx.model, ctx.model.functions.keys() - ours, ctx.refuse)
