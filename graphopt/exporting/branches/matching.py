"""``match`` on values as ``if`` and ``elif``: a tensor is compared then, not asked for a Python int."""

from __future__ import annotations

import ast
import itertools

from graphopt.exporting.branches.places import HOOKS

MATCHED = "graphopt_matched_"  # how the variables begin that hold what is matched


class Matches(ast.NodeTransformer):
    """Rewrites each ``match`` whose patterns are values, alternatives, names, ``_`` or tuples of those."""

    def __init__(self) -> None:
        self.count = itertools.count()

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements of a function's body, rewritten."""
        made = [self.visit(statement) for statement in body]
        return [statement for part in made for statement in (part if isinstance(part, list) else [part])]

    def visit_Match(self, node: ast.Match) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        subjects = node.subject.elts if isinstance(node.subject, ast.Tuple) else [node.subject]
        if any(isinstance(subject, ast.Starred) for subject in subjects):
            return node
        names = [f"{MATCHED}{next(self.count)}" for _ in subjects]
        cases = [_case(case, names, isinstance(node.subject, ast.Tuple)) for case in node.cases]
        whole: list[ast.stmt] = []
        for case, parts in zip(reversed(node.cases), reversed(cases), strict=True):
            if parts is None:
                return node
            condition, bound = parts
            chosen = ast.If(condition, [*bound, *case.body], whole)
            whole = [ast.copy_location(chosen, case.pattern)]
        held = [ast.Assign([ast.Name(name, ast.Store())], value) for name, value in zip(names, subjects, strict=True)]
        made = [*(ast.copy_location(statement, node.subject) for statement in held), *whole]
        for statement in made:
            ast.fix_missing_locations(statement)
        return made

    def _leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_Lambda = visit_ClassDef = _leave


def _case(case: ast.match_case, names: list[str], is_tuple: bool) -> tuple[ast.expr, list[ast.stmt]] | None:
    """When a case is taken, and what it assigns; None where that is not rewritten."""
    bound: list[ast.stmt] = []
    if is_tuple and isinstance(case.pattern, ast.MatchSequence) and len(case.pattern.patterns) == len(names):
        parts = [_condition(part, name, bound) for part, name in zip(case.pattern.patterns, names, strict=True)]
    elif is_tuple and not _is_wildcard(case.pattern):
        return None
    else:
        parts = [_condition(case.pattern, names[0], bound)]
    if case.guard is not None:
        if bound:
            return None  # its names are bound before it is asked
        parts.append(case.guard)
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    for part in known:
        _placed(part, case.pattern)
    for statement in bound:
        _placed(statement, case.pattern)
    asked = [part for part in known if not (isinstance(part, ast.Constant) and part.value is True)]
    if len(asked) > 1:
        return ast.copy_location(ast.BoolOp(ast.And(), asked), case.pattern), bound
    return asked[0] if asked else ast.copy_location(ast.Constant(True), case.pattern), bound


def _condition(pattern: ast.pattern, name: str, bound: list[ast.stmt]) -> ast.expr | None:
    """When ``pattern`` matches the variable ``name``; None where that is not rewritten."""
    if isinstance(pattern, ast.MatchValue):
        return ast.Compare(ast.Name(name, ast.Load()), [ast.Eq()], [pattern.value])
    if isinstance(pattern, ast.MatchSingleton):
        plain = "" if pattern.value is None else f"{HOOKS}.plain"
        return ast.parse(f"{plain}({name}) is {pattern.value}", mode="eval").body
    if isinstance(pattern, ast.MatchOr) and all(isinstance(part, ast.MatchValue) for part in pattern.patterns):
        return ast.BoolOp(ast.Or(), [part for p in pattern.patterns if (part := _condition(p, name, bound))])
    if isinstance(pattern, ast.MatchAs):
        inner = _condition(pattern.pattern, name, bound) if pattern.pattern is not None else ast.Constant(True)
        if pattern.name is not None:
            bound.append(ast.Assign([ast.Name(pattern.name, ast.Store())], ast.Name(name, ast.Load())))
        return inner
    return None


def _is_wildcard(pattern: ast.pattern) -> bool:
    return isinstance(pattern, ast.MatchAs) and pattern.pattern is None and pattern.name is None


def _placed(made: ast.AST, near: ast.AST) -> None:
    """Give what was made the place of ``near``, where it has none."""
    for node in ast.walk(made):
        if isinstance(node, (ast.expr, ast.stmt)) and getattr(node, "lineno", 1) == 1:
            ast.copy_location(node, near)
