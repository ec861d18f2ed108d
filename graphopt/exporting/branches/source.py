"""Pieces of Python source that the rewriting of functions shares."""

from __future__ import annotations

import ast

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
LOOPS = (ast.For, ast.While)


def at(near: ast.AST, source: str) -> list[ast.stmt]:
    """The statements of ``source``, all on the line of ``near``."""
    statements = ast.parse(source).body
    for statement in statements:
        for node in ast.walk(statement):
            ast.copy_location(node, near)
            if hasattr(node, "end_lineno"):  # a call of many lines is counted to the last by Python
                node.end_lineno, node.end_col_offset = node.lineno, node.col_offset  # type: ignore[attr-defined]
    return statements


def has(node: ast.AST, kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> bool:
    """Whether the body of a loop that ``node`` stands in holds a statement of ``kind`` of its own."""
    if isinstance(node, kind):
        return True
    return not isinstance(node, (*LOOPS, *SCOPES)) and any(has(child, kind) for child in ast.iter_child_nodes(node))


def is_over_range(loop: ast.For) -> bool:
    """``for name in range(…)``."""
    if not isinstance(loop.iter, ast.Call) or not isinstance(loop.target, ast.Name):
        return False
    called, arguments = loop.iter.func, loop.iter.args
    return (
        isinstance(called, ast.Name)
        and called.id == "range"
        and not any(isinstance(part, ast.Starred) for part in arguments)
    )
