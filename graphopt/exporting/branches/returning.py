"""``return`` in a loop as a flag, a ``break`` and a return after the loop, so that the loop can be one Loop."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from typing import Any

from graphopt.exporting.branches.source import LOOPS, SCOPES, at, has, is_over_range

RETURNED = "graphopt_returned_"  # how the variables begin that stand for a return inside a loop


def without_returns(body: list[ast.stmt], count: Iterator[int] | None = None) -> list[ast.stmt]:
    """``return value`` in a loop as a flag, a ``break`` and a return after the loop, which can be a Loop then."""
    count = itertools.count() if count is None else count
    done: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, SCOPES):
            done.append(statement)
            continue
        for field in ("body", "orelse", "finalbody"):
            if getattr(statement, field, None):
                setattr(statement, field, without_returns(getattr(statement, field), count))
        if not _may_return_as_loop(statement):
            done.append(statement)
            continue
        assert isinstance(statement, LOOPS)
        flag, value = (f"{RETURNED}{kind}_{next(count)}" for kind in ("flag", "value"))
        statement.body = [_Leaves(flag, value).visit(part) for part in statement.body]
        statement.body = [part for parts in statement.body for part in (parts if isinstance(parts, list) else [parts])]
        done += [*at(statement, f"{flag} = False"), statement]
        done += at(statement, f"def f():\n    if {flag}:\n        return {value}")[0].body  # type: ignore[attr-defined]
    return done


def _may_return_as_loop(statement: ast.stmt) -> bool:
    """Whether ``statement`` is a loop that returns from within, of a kind that may be one Loop."""
    if not isinstance(statement, LOOPS) or statement.orelse or not any(has(s, ast.Return) for s in statement.body):
        return False
    return isinstance(statement, ast.While) or (is_over_range(statement) and not _picks_by_counter(statement))


def _picks_by_counter(loop: ast.For) -> bool:
    """Whether a ``for`` takes ``self.something[i]``, mostly a module: other code in each turn, which no Loop has."""
    assert isinstance(loop.target, ast.Name)
    picked = [n for statement in loop.body for n in ast.walk(statement) if isinstance(n, ast.Subscript)]
    named = [p for p in picked if any(isinstance(n, ast.Name) and n.id == "self" for n in ast.walk(p.value))]
    return any(isinstance(n, ast.Name) and n.id == loop.target.id for p in named for n in ast.walk(p.slice))


class _Leaves(ast.NodeTransformer):
    """``return value`` of one loop's body as three statements: value kept, flag raised, break."""

    def __init__(self, flag: str, value: str) -> None:
        self.flag, self.value = flag, value

    def visit_Return(self, node: ast.Return) -> Any:
        kept, raised, left = at(node, f"{self.value} = None\n{self.flag} = True\nwhile 1: break")
        assert isinstance(kept, ast.Assign) and isinstance(left, ast.While)
        kept.value = node.value or kept.value
        return [kept, raised, left.body[0]]

    def _leave(self, node: Any) -> Any:
        return node

    visit_For = visit_While = visit_FunctionDef = visit_Lambda = visit_ClassDef = _leave
