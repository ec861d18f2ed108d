"""Statements of a function as functions of their own, so that each can be run once for each of its paths.

A statement that may decide something becomes a nested function, whose variables are the outer function's
(``nonlocal``), and a call of the hooks that stand in the function's globals under the name `HOOKS`:

    if gate > 0:                        def __graphopt_forward_3():
        x = self.layer(x)        →          nonlocal x
                                            if gate > 0: x = self.layer(x)
                                        __graphopt__.statement(__graphopt_forward_3)

An expression that may decide (``a if c else b``, ``and``, ``or``, ``a < b < c``) becomes a lambda in the same way, and
what is asked for its truth goes through a hook (``if __graphopt__.truth(gate > 0)``). A statement that leaves its block
(``return``, ``break`` of an outer loop) stays where it is. Lines keep their numbers. The code of the function is
compiled anew; the function object, its defaults and its closure stay.
"""

from __future__ import annotations
import __future__ as future

import ast
import copy
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterable, Sequence
from typing import Any

from graphopt.exporting.branches.matching import Matches
from graphopt.exporting.branches.places import HOOKS, OUTLINED
from graphopt.exporting.branches.returning import without_returns
from graphopt.exporting.branches.source import LOOPS, SCOPES, at, has, is_over_range

BROKE, WENT_ON = True, False  # what the function made of a loop's body returns

_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)
_DECIDING = (ast.Call, ast.IfExp, ast.BoolOp, ast.Compare)
_CASTS = ("int", "float", "bool", "len")
_SUSPENDING = (ast.Yield, ast.YieldFrom, ast.Await)
_FLAGS = sum(getattr(future, name).compiler_flag for name in future.all_feature_names)


def outlined(function: types.FunctionType) -> types.CodeType | None:
    """New code for ``function``, or None where there is nothing to outline or it cannot be done."""
    definition = _definition(function)
    if definition is None or not _worth_it(definition):
        return None
    definition = _Annotations().visit(definition)
    definition.body = without_returns(Matches().block(definition.body))
    variables = sorted(assigned(definition.body))
    definition = _Expressions().visit(definition)
    definition.decorator_list = []
    definition.body = _Statements(definition.name).block(definition.body)
    if variables:
        definition.body.insert(0, _declaration(variables, definition))
    code = _compiled(definition, function)
    return code if code is not None and code.co_freevars == function.__code__.co_freevars else None


def _definition(function: types.FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    return tree.body[0]


def _worth_it(definition: ast.FunctionDef) -> bool:
    nodes = list(ast.walk(definition))
    decides = any(isinstance(node, (ast.If, ast.IfExp, ast.While, ast.BoolOp, ast.For, ast.Match)) for node in nodes)
    refused = (*_SUSPENDING, ast.Nonlocal, ast.Global, ast.AsyncFor, ast.AsyncWith)
    return decides and not any(isinstance(node, refused) or _is_mangled(node) for node in nodes)


def _is_mangled(node: ast.AST) -> bool:
    """``self.__name``: Python renames it by the class that it stands in, which new code does not."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.startswith("__") and not name.endswith("__")


def _declaration(variables: Sequence[str], near: ast.AST) -> ast.stmt:
    """``if 0: a = b = None``: makes the variables the function's own, so that ``nonlocal`` finds them."""
    return at(near, f"if 0:\n    {' = '.join(variables)} = None")[0]


def _compiled(definition: ast.FunctionDef, function: types.FunctionType) -> types.CodeType | None:
    """The code of ``definition``, compiled where the function's free variables are free again."""
    free = ", ".join(function.__code__.co_freevars)
    outer = ast.parse(f"def __outer({free}):\n    pass")
    holder = outer.body[0]
    assert isinstance(holder, ast.FunctionDef)
    holder.body = [definition]
    ast.copy_location(holder, definition)
    flags = function.__code__.co_flags & _FLAGS
    module = compile(
        ast.fix_missing_locations(outer), function.__code__.co_filename, "exec", flags=flags, dont_inherit=True
    )
    inner = _constant(module, "__outer")
    return None if inner is None else _constant(inner, definition.name)


def _constant(code: types.CodeType, name: str) -> types.CodeType | None:
    return next((c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name), None)


def _hook(near: ast.AST, name: str, functions: Sequence[str]) -> ast.stmt:
    return at(near, f"{HOOKS}.{name}({', '.join(functions)})")[0]


def _nested(near: ast.AST, name: str, variables: Iterable[str], body: list[ast.stmt], argument: str = "") -> ast.stmt:
    """``def name(argument): nonlocal variables; body``."""
    definition = at(near, f"def {name}({argument}):\n    pass")[0]
    assert isinstance(definition, ast.FunctionDef)
    names = sorted(variables)
    definition.body = (at(near, f"def f():\n    nonlocal {', '.join(names)}")[0].body if names else []) + body  # type: ignore[attr-defined]
    return definition


class _Assigned(ast.NodeVisitor):
    """The names that statements assign in their own scope."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.names.add(node.id)

    def visit_FunctionDef(self, node: Any) -> None:
        if not node.name.startswith(OUTLINED):  # those are used where they are defined
            self.names.add(node.name)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Its names are its own."""

    def visit_ListComp(self, node: Any) -> None:
        # Its loop's names are its own; what `:=` assigns in it is the function's.
        self.names |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.names |= {node.name} - {None}  # type: ignore[arg-type]
        self.generic_visit(node)

    def visit_MatchAs(self, node: Any) -> None:
        self.names |= {node.name} - {None}
        self.generic_visit(node)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self.names |= {node.rest} - {None}  # type: ignore[arg-type]
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import


def assigned(statements: Iterable[ast.stmt]) -> set[str]:
    """The names that ``statements`` assign in the scope they stand in."""
    visitor = _Assigned()
    for statement in statements:
        visitor.visit(statement)
    return visitor.names


def leaves_its_block(node: ast.AST, depth: int = 0) -> bool:
    """Whether running ``node`` elsewhere would change where it goes on (return, an outer loop's break, yield)."""
    if isinstance(node, (ast.Return, *_SUSPENDING, ast.Global, ast.Nonlocal)):
        return True
    if isinstance(node, (ast.Break, ast.Continue)):
        return depth == 0
    if isinstance(node, ast.Name) and node.id in ("super", "locals", "__class__"):
        return True
    if isinstance(node, SCOPES):
        return False
    return any(
        leaves_its_block(child, depth + (isinstance(node, LOOPS) and child in node.body))
        for child in ast.iter_child_nodes(node)
    )


class _Annotations(ast.NodeTransformer):
    """``name: type = value`` without its type: an annotated name cannot be another scope's."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if not isinstance(node.target, ast.Name):
            return node
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        return node  # its annotations are fields


class _BodyReturns(ast.NodeTransformer):
    """``break`` and ``continue`` of one loop become returns of `BROKE` and `WENT_ON`."""

    def visit_Break(self, node: ast.Break) -> ast.stmt:
        return _returning(node, BROKE)

    def visit_Continue(self, node: ast.Continue) -> ast.stmt:
        return _returning(node, WENT_ON)

    def _leave(self, node: Any) -> Any:
        return node

    visit_For = visit_While = visit_FunctionDef = visit_Lambda = visit_ClassDef = _leave


def _returning(near: ast.AST, value: bool) -> ast.stmt:
    return ast.copy_location(ast.Return(ast.copy_location(ast.Constant(value), near)), near)


def _body_function(loop: ast.For | ast.While, name: str, variables: Iterable[str]) -> ast.stmt:
    """The loop's body as a function that says whether it broke."""
    body = [_BodyReturns().visit(copy.deepcopy(statement)) for statement in loop.body]
    return _nested(loop, name, variables, [*body, _returning(loop, WENT_ON)])


class _Expressions(ast.NodeTransformer):
    """Deciding expressions as lambdas, what is asked for its truth through `truth`, casts that keep tensors."""

    def condition(self, node: ast.expr) -> ast.expr:
        """``node`` where only its truth counts: every part that is asked goes through the hook."""
        if isinstance(node, ast.BoolOp):
            node.values = [self.condition(value) for value in node.values]
            return self._asked(self._as_region(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.condition(node.operand)
            return node
        return self._asked(self.visit(node))

    def _asked(self, node: ast.expr) -> ast.expr:
        call = _expression(node, f"{HOOKS}.truth(0)")
        call.args[0] = node
        return call

    def _as_region(self, node: ast.expr) -> ast.expr:
        """``hooks.expression(lambda: node)``, where that changes nothing."""
        for part in ast.walk(node):
            if isinstance(part, (ast.NamedExpr, *_SUSPENDING)) or (isinstance(part, ast.Name) and part.id == "super"):
                return node
        call = _expression(node, f"{HOOKS}.expression(lambda: 0)")
        call.args[0].body = node  # type: ignore[attr-defined]
        return call

    def visit_If(self, node: Any) -> Any:
        test = self.condition(node.test)
        node.test = ast.Constant(True)
        self.generic_visit(node)
        node.test = test
        return node

    visit_While = visit_If

    def visit_Assert(self, node: ast.Assert) -> Any:
        node.test = self.condition(node.test)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> Any:
        node.iter = self.visit(node.iter)
        node.ifs = [self.condition(test) for test in node.ifs]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        node.test = self.condition(node.test)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return self._as_region(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        self.generic_visit(node)
        return self._as_region(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return self._as_region(self.condition(node))
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        return self._as_region(node) if len(node.ops) > 1 else node

    def visit_Return(self, node: ast.Return) -> Any:
        self.generic_visit(node)
        if isinstance(node.value, (ast.Name, ast.Tuple)):
            call = _expression(node, f"{HOOKS}.returned(0)")
            call.args[0], node.value = node.value, call
        return node

    def visit_Match(self, node: ast.Match) -> Any:
        self.generic_visit(node)
        subject = _expression(node.subject, f"{HOOKS}.plain(0)")
        subject.args[0] = node.subject
        node.subject = subject
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in _CASTS and len(node.args) == 1:
            node.args.insert(0, node.func)
            node.func = _expression(node, f"{HOOKS}.cast()").func
        return node


def _expression(near: ast.AST, source: str) -> ast.Call:
    statement = at(near, source)[0]
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    return statement.value


class _Statements:
    """Outlines the statements of one function."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.count = itertools.count()

    def fresh(self) -> str:
        return f"{OUTLINED}{self.function}_{next(self.count)}"

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return [new for statement in body for new in self.statement(statement)]

    def statement(self, statement: ast.stmt) -> list[ast.stmt]:
        """``statement``, its blocks outlined, and itself where it can be."""
        variables, stays = assigned([statement]), leaves_its_block(statement)
        if not isinstance(statement, SCOPES):
            for field in ("body", "orelse", "finalbody"):
                caught = field == "body" and isinstance(statement, ast.Try) and statement.handlers
                if getattr(statement, field, None) and not caught:  # what raises there goes on in the handler
                    setattr(statement, field, self.block(getattr(statement, field)))
            for part in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
                part.body = self.block(part.body)
        if isinstance(statement, ast.For) and not stays and any(has(part, ast.Continue) for part in statement.body):
            staged = self.outlined_loop(copy.deepcopy(statement), variables) if _is_stageable(statement) else None
            statement.body = self.joined_body(statement)
            if staged is not None:
                staged[0] = _nested(statement, staged[0].name, variables, [statement])  # type: ignore[attr-defined]
                return staged
        if stays or not _may_decide(statement):
            return [statement]
        if isinstance(statement, LOOPS) and _is_stageable(statement):
            return self.outlined_loop(statement, variables)
        name = self.fresh()
        return [_nested(statement, name, variables, [statement]), _hook(statement, "statement", [name])]

    def joined_body(self, loop: ast.For) -> list[ast.stmt]:
        """A body with ``continue`` as one region, so that its paths meet again before the next turn."""
        name = self.fresh()
        function = _body_function(loop, name, assigned(loop.body))
        if not any(has(part, ast.Break) for part in loop.body):
            return [function, _hook(loop, "statement", [name])]
        check = at(loop, f"while 1:\n    if {HOOKS}.truth({HOOKS}.statement({name})): break")[0].body[0]  # type: ignore[attr-defined]
        return [function, check]

    def outlined_loop(self, loop: ast.For | ast.While, variables: set[str]) -> list[ast.stmt]:
        """The loop as a whole, and in pieces that can be put together as one ONNX Loop."""
        whole = self.fresh()
        if isinstance(loop, ast.While):
            test, body = f"{whole}_test", f"{whole}_body"
            by_test = assigned([ast.Expr(loop.test)])
            return [
                _nested(loop, whole, variables, [loop]),
                _nested(loop, test, by_test, [ast.copy_location(ast.Return(copy.deepcopy(loop.test)), loop)]),
                _body_function(loop, body, variables),
                _hook(loop, "while_loop", [whole, test, body]),
            ]
        range_, target, body = f"{whole}_range", f"{whole}_target", f"{whole}_body"
        assert isinstance(loop.target, ast.Name)
        assign = at(loop, f"{loop.target.id} = value")
        return [
            _nested(loop, whole, variables, [loop]),
            _nested(loop, range_, [], [_range_arguments(loop)]),
            _nested(loop, target, [loop.target.id], assign, "value"),
            _body_function(loop, body, variables),
            _hook(loop, "for_loop", [whole, range_, target, body, str(_breaks(loop))]),
        ]


def _range_arguments(loop: ast.For) -> ast.stmt:
    """``return (0, stop)``: what the loop's range is called with. (range itself would fix a size that is dynamic.)"""
    assert isinstance(loop.iter, ast.Call)
    arguments = ast.Tuple(copy.deepcopy(loop.iter.args), ast.Load())
    return ast.copy_location(ast.Return(ast.copy_location(arguments, loop)), loop)


def _may_decide(statement: ast.stmt) -> bool:
    if isinstance(statement, _SIMPLE):
        if isinstance(statement, ast.Expr) and _is_hook(statement.value):
            return False
        return any(isinstance(node, _DECIDING) for node in ast.walk(statement))
    return isinstance(statement, (ast.If, *LOOPS, ast.With, ast.Match, ast.Try))


def _is_hook(node: ast.expr) -> bool:
    owner = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id == HOOKS


def _is_stageable(loop: ast.For | ast.While) -> bool:
    """A ``while``, or a ``for`` over a range that may break or may be of tensors: its turns may depend on the data."""
    if loop.orelse:
        return False
    if isinstance(loop, ast.While):
        return True
    return is_over_range(loop) and (_breaks(loop) or _may_be_tensors(loop.iter.args))  # type: ignore[attr-defined]


def _breaks(loop: ast.For) -> bool:
    return any(has(part, ast.Break) for part in loop.body)


def _may_be_tensors(arguments: list[ast.expr]) -> bool:
    """Whether the bounds of a range may be tensors, and can be asked for twice."""
    parts = [part for argument in arguments for part in ast.walk(argument)]
    called = [part.func for part in parts if isinstance(part, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else "" for f in called}
    once = any(isinstance(part, ast.NamedExpr) for part in parts) or names & {"next", "pop", "popleft", "popitem"}
    return not once and any(isinstance(part, (ast.Name, ast.Attribute, ast.Call)) for part in parts)
