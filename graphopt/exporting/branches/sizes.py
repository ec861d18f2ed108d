"""Sizes that torch does not know while it traces: those of what grows in a loop, or differs from path to path."""

from __future__ import annotations

from typing import Any

_LEASTS = "graphopt_least_sizes"  # what torch keeps about sizes holds ours, too
_LARGEST = 2**62


def is_size(value: object) -> bool:
    """Whether ``value`` is a size that stands for a number (an int is none)."""
    import torch

    return isinstance(value, torch.SymInt)


def is_truth(value: object) -> bool:
    """Whether ``value`` is what was asked about sizes."""
    import torch

    return isinstance(value, torch.SymBool)


def is_unknown(value: Any) -> bool:
    """Whether a size, or what was asked about one, depends on more than the sizes of the module's inputs."""
    import torch
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(value, (torch.SymInt, torch.SymBool)) and bool(free_unbacked_symbols(value))


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be the same; nothing is assumed for it."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return one is other or str(one) == str(other)


def settled(truth: Any) -> bool | None:
    """What ``truth``, asked about sizes, is for all of them; None where it depends on them.

    By the least sizes alone: what torch has learned of a size since may hold on one path, and not on another.
    """
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    expression, leasts = truth.node.expr, truth.node.shape_env.__dict__.get(_LEASTS, {})
    ranges = {symbol: ValueRanges(leasts.get(symbol, 0), _LARGEST) for symbol in expression.free_symbols}
    bounds = bound_sympy(expression, ranges)
    return bool(bounds.lower) if bounds.is_singleton() else None


def remember_least(size: Any, bound: int) -> None:
    """Note that ``size``, a new one, is ``bound`` or more on all paths."""
    size.node.shape_env.__dict__.setdefault(_LEASTS, {})[size.node.expr] = bound


def as_tensor(value: Any) -> Any:
    """A size as an int64 tensor without axes, what was asked about sizes as a bool one."""
    import torch

    return torch.scalar_tensor(value, dtype=torch.bool if isinstance(value, torch.SymBool) else torch.int64)


def least(size: Any) -> int:
    """The least that ``size`` can be. Of a module's input: 1, since torch traces no empty axis."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).lower
    known = int(bound) if bound.is_finite and bound > 0 else 0
    return known if is_unknown(size) else min(known, 1)
