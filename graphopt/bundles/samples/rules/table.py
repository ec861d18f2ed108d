"""The table of rules, which the modules beside this one fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import Lifted

Rule = Callable[[Lift, ir.Node], Sequence[Lifted]]
"""Writes what computes a node's results for all samples; the results."""

RULES: dict[tuple[str, str], Rule] = {}
"""By domain and operator. A rule is asked where an input of the node has samples."""

_SIZES = "the sizes of what it makes differ by sample"
REASONS: dict[str, str] = {
    **dict.fromkeys(("NonZero", "Unique", "NonMaxSuppression", "Compress", "Range", "ConstantOfShape"), _SIZES),
    **dict.fromkeys(("DynamicQuantizeLinear", "MaxUnpool"), "it looks at the whole batch"),
}
"""Why operators have no rule, where more can be said than that."""


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Enter a function as the rule of operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(((domain, op_type) for op_type in op_types), function))
        return function

    return enter
