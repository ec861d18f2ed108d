"""Python numbers that became tensors, because they differ from path to path or from turn to turn.

A *number* is a tensor without axes that stands for a Python int, float or bool. It is marked by an attribute on the
tensor. Arithmetic on numbers alone gives numbers, and never changes one in place (``n += 1`` on an int does not).
A *turn* is a number computed from a loop's counter: what is indexed with it would differ in each turn.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from graphopt.exporting.branches import sizes

PLAIN = (bool, int, float)
_MARK = "_graphopt_number"
_POSITION = "_graphopt_position"
_ARITHMETIC = ["add", "sub", "mul", "div", "floor_divide", "remainder", "pow"]
_BITWISE = ["and", "or", "xor", "lshift", "rshift"]


def is_plain(value: object) -> bool:
    return isinstance(value, PLAIN)


def is_number(value: object) -> bool:
    return hasattr(value, _MARK)


def is_turn(value: object) -> bool:
    return getattr(value, _MARK, "") == "turn"


def mark(value: Any, *, turn: bool = False) -> Any:
    """Mark the tensor ``value`` as a number, and return it."""
    setattr(value, _MARK, "turn" if turn else "number")
    return value


def as_number(value: Any, device: Any = None) -> Any:
    """``value``, a Python number or a tensor, as a marked tensor without axes."""
    import torch

    if isinstance(value, torch.Tensor):
        return mark(value)
    if sizes.is_size(value):
        return mark(sizes.as_tensor(value))
    # Not `torch.tensor`: under torch.export that is a real tensor, of which the markers have no kernel.
    kinds = {bool: torch.bool, int: torch.int64, float: torch.get_default_dtype()}
    return mark(torch.full((), value, dtype=kinds[type(value)], device=device))


def as_item(tensor: Any) -> Any:
    """``tensor.item()`` as a number."""
    return mark(tensor.reshape(()).clone(), turn=is_turn(tensor))


@cache
def positions() -> frozenset[Any]:
    """Functions that give a position: 0 or more."""
    import torch

    return frozenset({torch.argmax, torch.argmin, torch.Tensor.argmax, torch.Tensor.argmin, torch.count_nonzero})


def is_position(tensor: Any) -> bool:
    """Whether ``tensor`` is known not to be negative."""
    return hasattr(tensor, _POSITION)


def mark_position(tensor: Any) -> Any:
    setattr(tensor, _POSITION, True)
    return tensor


def keep_position(number: Any, of: Any) -> Any:
    """``number``, which is ``of`` in other clothes, marked as a position where that is one."""
    return mark_position(number) if is_position(of) else number


def mark_result(result: Any, operands: list[Any]) -> None:
    """Mark what an operator made of ``operands``, its tensors, where all of them are numbers."""
    import torch

    if isinstance(result, torch.Tensor) and operands and all(map(is_number, operands)):
        mark(result, turn=any(map(is_turn, operands)))


@cache
def not_in_place() -> dict[Any, Any]:
    """Torch's in-place arithmetic → the same that makes a new tensor."""
    import torch

    names = [(f"{name}_", name) for name in _ARITHMETIC] + [(f"__i{name}__", f"__{name}__") for name in _BITWISE]
    return {getattr(torch.Tensor, inplace): getattr(torch.Tensor, name) for inplace, name in names}


def cast(kind: type, value: Any) -> Any:
    """``int(value)``, ``float(value)`` or ``bool(value)`` of a tensor of one element, as a number."""
    import torch

    scalar = value.reshape(())
    if kind is bool:
        return mark(scalar != 0)
    if kind is float:
        return mark(
            scalar.to(torch.float32 if scalar.dtype == torch.float32 else torch.get_default_dtype()),
            turn=is_turn(value),
        )
    return mark(
        scalar.trunc().to(torch.int64) if scalar.is_floating_point() else scalar.to(torch.int64), turn=is_turn(value)
    )
