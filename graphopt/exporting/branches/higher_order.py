"""torch.cond and while_loop as the Python that they stand for.

Eager torch.cond compiles its branches, and torch's ONNX exporter takes no nested one. As Python's own ``if`` and
``while`` they are followed like the module's other decisions: traced on both sides, forced, compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

NOTE = "torch.cond and while_loop were compared as the inputs took them, none was forced"
_INSTEAD = "__graphopt_instead__"


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """What torch.cond gives."""
    return true_fn(*operands) if pred else false_fn(*operands)


def while_loop(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried_inputs: Any) -> Any:
    """What torch's while_loop gives."""
    carried = tuple(carried_inputs)
    while cond_fn(*carried):
        carried = tuple(body_fn(*carried))
    return carried


def stand_ins() -> list[FunctionType]:
    """The functions that run instead of torch's."""
    return [cond, while_loop]  # type: ignore[list-item]


@dataclass
class Used:
    """Whether one of the stand-ins ran."""

    any: bool = False


@contextmanager
def as_python() -> Iterator[Used]:
    """Run `cond` and `while_loop` instead of torch's, wherever those were imported."""
    import importlib

    used = Used()

    def noting(instead: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            used.any = True
            return instead(*arguments, **options)

        return run

    # Their modules by path: the package's attribute of one of these names is the function.
    found = [
        getattr(importlib.import_module(f"torch._higher_order_ops.{name}"), name) for name in ("cond", "while_loop")
    ]
    kept = [(function, function.__code__, function.__defaults__, function.__kwdefaults__) for function in found]
    try:
        for function, instead in zip(found, stand_ins(), strict=True):
            function.__globals__[_INSTEAD] = noting(instead)
            function.__defaults__ = function.__kwdefaults__ = None
            function.__code__ = _through(function.__name__)
        yield used
    finally:
        for function, code, defaults, keywords in kept:
            function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords
            function.__globals__.pop(_INSTEAD, None)


def _through(name: str) -> Any:
    """Code that calls what stands under `_INSTEAD` among the function's globals."""
    namespace: dict[str, Any] = {}
    source = f"def {name}(*args, **kwargs):\n    return {_INSTEAD}(*args, **kwargs)\n"
    exec(compile(source, __file__, "exec"), namespace)
    return namespace[name].__code__
