"""The driver for pattern rules: looks at each node of the wanted types once, and again where something changed."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import ClassVar

import onnx_ir as ir

from graphopt.rewrite.context import Context
from graphopt.rewrite.contract import Pass


class RulePass(Pass):
    """A pass that looks at one node at a time.

    Attributes:
        roots: The operator types that ``rewrite`` is called for; empty means all.
    """

    roots: ClassVar[tuple[str, ...]] = ()

    def apply(self, ctx: Context) -> None:
        queue = deque(ctx.nodes(*self.roots))
        wanted = frozenset(self.roots)
        while queue:
            node = queue.popleft()
            if node.graph is None:  # removed since it was queued
                continue
            readers = [use.node for output in node.outputs for use in output.uses()]
            if self.rewrite(node, ctx):
                # Only what read the old values can match now and could not before.
                queue.extend(r for r in readers if not wanted or (r.op_type in wanted and r.domain == ""))

    @abstractmethod
    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        """Try the rules on a node. Returns whether something was replaced."""
