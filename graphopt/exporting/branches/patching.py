"""The user's functions, outlined while a trace runs, and put back after it whatever happens."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from graphopt.exporting.branches.higher_order import stand_ins
from graphopt.exporting.branches.outlining import outlined
from graphopt.exporting.branches.places import HOOKS


class Hooks(Protocol):
    """What outlined code calls; see `outlining`."""

    def statement(self, run: Callable[[], Any]) -> Any: ...

    def expression(self, run: Callable[[], Any]) -> Any: ...

    def truth(self, value: Any) -> bool: ...

    def plain(self, value: Any) -> Any: ...

    def returned(self, value: Any) -> Any: ...

    def while_loop(self, whole: Callable[[], Any], test: Callable[[], Any], body: Callable[[], Any]) -> None: ...

    def for_loop(
        self,
        whole: Callable[[], Any],
        over: Callable[[], tuple[Any, ...]],
        target: Callable[[Any], Any],
        body: Callable[[], Any],
        breaks: bool,
    ) -> None: ...

    def cast(self, kind: type, *arguments: Any) -> Any: ...

    def call(self, module: Any, run: Callable[[], Any], arguments: tuple[Any, ...]) -> Any: ...


@contextmanager
def patched(module: Any, hooks: Hooks) -> Iterator[None]:
    """Outline the functions that ``module`` runs; what they ask goes to ``hooks``."""
    replaced: list[tuple[types.FunctionType, types.CodeType]] = []
    hooked: list[dict[str, Any]] = []
    try:
        for function in [*_functions(module), *stand_ins()]:
            code = outlined(function)
            if code is not None:
                replaced.append((function, function.__code__))
                function.__code__ = code
                hooked.append(function.__globals__)
                function.__globals__[HOOKS] = hooks
        with _module_stack_kept():
            yield
    finally:
        for function, code in replaced:
            function.__code__ = code
        for names in hooked:
            names.pop(HOOKS, None)


@contextmanager
def calls_through(hooks: Hooks) -> Iterator[None]:
    """Send the calls of the user's modules through ``hooks.call``.

    For use while the module runs: torch.export puts a function of its own in the same place before that.
    """
    from torch import nn

    original = nn.Module.__call__

    def call(called: Any, *args: Any, **kwargs: Any) -> Any:
        if type(called).__module__.startswith("torch."):
            return original(called, *args, **kwargs)
        return hooks.call(called, lambda: original(called, *args, **kwargs), (args, kwargs))

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = original


@contextmanager
def _module_stack_kept() -> Iterator[None]:
    """torch.fx forgets to pop its stack of modules where a call raises; a path may raise and be given up."""
    from torch.fx._symbolic_trace import Tracer

    original = Tracer.call_module

    def call_module(tracer: Any, *arguments: Any) -> Any:
        kept = dict(tracer.module_stack)
        try:
            return original(tracer, *arguments)
        except BaseException:
            tracer.module_stack.clear()
            tracer.module_stack.update(kept)
            raise

    Tracer.call_module = call_module
    try:
        yield
    finally:
        Tracer.call_module = original


def _functions(module: Any) -> list[types.FunctionType]:
    """The user's functions that ``module`` may run: its classes' methods, and what those name, transitively."""
    found: dict[int, types.FunctionType] = {}
    todo: list[Any] = [value for kind in _classes(module) for value in vars(kind).values()]
    while todo:
        function = _plain(todo.pop())
        if function is None or id(function) in found or function.__name__ == "__init__" or not _is_users(function):
            continue
        found[id(function)] = function
        todo.extend(_named(function.__code__, function.__globals__))
        todo.extend(_held(function))
    return list(found.values())


def _classes(module: Any) -> list[type]:
    kinds = {kind: None for part in module.modules() for kind in type(part).__mro__}
    return [kind for kind in kinds if not kind.__module__.startswith(("torch.", "builtins", "typing"))]


def _plain(value: Any) -> types.FunctionType | None:
    """The Python function behind a method, a property or a decorated function."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.MethodType):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else None
    return value if isinstance(value, types.FunctionType) else None


def _is_users(function: types.FunctionType) -> bool:
    name = function.__code__.co_filename
    library = "site-packages" in name or "dist-packages" in name or name.startswith("<")
    return not library and not function.__module__.startswith(("torch", "graphopt.")) and "/lib/python3" not in name


def _named(code: types.CodeType, names: dict[str, Any]) -> list[Any]:
    """Functions and methods of classes that ``code`` and the functions in it name as globals."""
    values: list[Any] = []
    for name in code.co_names:
        value = names.get(name)
        if isinstance(value, types.FunctionType):
            values.append(value)
        elif isinstance(value, type) and not value.__module__.startswith(("torch", "builtins", "graphopt.")):
            values.extend(vars(value).values())
        elif isinstance(value, types.ModuleType) and not value.__name__.startswith(("torch", "numpy")):
            values.extend(v for k, v in vars(value).items() if k in code.co_names and isinstance(v, types.FunctionType))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            values.extend(_named(constant, names))
    return values


def _held(function: types.FunctionType) -> list[Any]:
    held = []
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:
            continue
    return held
