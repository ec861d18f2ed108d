"""The mutable Python state that a piece of code can reach: found, read and written back.

A *box* holds values that code may replace: a variable (the cell of an outlined statement), a list, a dict, a set of
attributes. Two paths start from the same contents of all boxes and leave other contents behind.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

UNSET = type("Unset", (), {"__repr__": lambda self: "nothing"})()
_LEAVES = (
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    types.MethodType,
    types.CodeType,
)


@dataclass
class Reached:
    """What code can reach: boxes with their contents, and tensors (which operators may change in place)."""

    boxes: list[tuple[Any, Any]]
    tensors: list[Any]


@cache
def _fixed_attributes() -> frozenset[str]:
    """Attributes of a torch module that ``forward`` has no business to change."""
    from torch import nn

    return frozenset(
        {"_parameters", "_modules", "training", "forward"} | {k for k in nn.Module().__dict__ if "hook" in k}
    )


def contents(box: Any) -> Any:
    """What ``box`` holds now: a list of values, or a dict of them."""
    from torch import nn

    if isinstance(box, types.CellType):
        try:
            return [box.cell_contents]
        except ValueError:
            return [UNSET]
    if isinstance(box, list):
        return [*list.__iter__(box)]
    if isinstance(box, dict):
        return dict(box)
    fixed = _fixed_attributes() if isinstance(box, nn.Module) else frozenset()
    return {key: value for key, value in box.__dict__.items() if key not in fixed}


def write(box: Any, held: Any) -> None:
    """Make ``box`` hold what `contents` once read from it."""
    from torch import nn

    if isinstance(box, types.CellType):
        if held[0] is not UNSET:
            box.cell_contents = held[0]
        elif contents(box)[0] is not UNSET:
            del box.cell_contents
    elif isinstance(box, list):
        list.__setitem__(box, slice(None), held)
    else:
        values = box if isinstance(box, dict) else box.__dict__
        fixed = _fixed_attributes() if isinstance(box, nn.Module) else frozenset()
        for key in [key for key in values if key not in held and key not in fixed]:
            del values[key]
        values.update(held)


def same_contents(one: Any, other: Any) -> bool:
    """Whether two contents of a box are the same objects in the same places."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(one[key] is other[key] for key in one)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def reach(roots: Iterable[Any]) -> Reached:
    """All boxes and tensors that can be reached from ``roots``; parameters are left out."""
    import torch
    from torch import nn

    seen: dict[int, Any] = {}
    reached = Reached([], [])
    todo = list(roots)
    while todo:
        value = todo.pop()
        if value is None or isinstance(value, (*_LEAVES, torch.dtype, torch.device, nn.Parameter)) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            reached.tensors.append(value)
        elif isinstance(value, (tuple, set, frozenset)):
            todo.extend(value)
        elif _is_library_layer(value):
            todo.extend(value._buffers.values())
        elif _is_box(value):
            held = contents(value)
            reached.boxes.append((value, held))
            todo.extend(held.values() if isinstance(held, dict) else held)
            if isinstance(value, nn.Module):
                todo.extend(value._modules.values())
    return reached


def _is_library_layer(value: Any) -> bool:
    """A leaf module of torch's own: only its buffers change."""
    from torch import nn

    return isinstance(value, nn.Module) and type(value).__module__.startswith("torch.nn.modules") and not value._modules


def _is_box(value: Any) -> bool:
    from torch import nn

    if isinstance(value, (types.CellType, list, dict, nn.Module)):
        return True
    return hasattr(value, "__dict__") and not type(value).__module__.startswith(("torch", "graphopt"))


@contextmanager
def preserved(module: Any) -> Iterator[None]:
    """Leave the attributes, lists, dicts and buffers that ``module`` holds as they were."""
    import torch

    reached = reach([module])
    buffers = list(module.buffers())
    kept = [value.detach().clone() for value in buffers]
    others = [(value, value.detach().clone()) for value in reached.tensors if not any(value is b for b in buffers)]
    try:
        yield
    finally:
        for box, held in reached.boxes:
            if not same_contents(held, contents(box)):
                write(box, held)
        with torch.no_grad():
            for value, before in [*zip(buffers, kept, strict=True), *others]:
                if not torch.equal(value, before):
                    value.copy_(before)
