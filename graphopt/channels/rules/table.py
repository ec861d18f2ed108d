"""The table of rules, which the modules beside this one fill."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.channels.tying import Tying

Rule = Callable[[Tying, ir.Node], None]

RULES: dict[str, Rule] = {}
"""The rule of each operator of the standard domain that has one."""


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return enter
