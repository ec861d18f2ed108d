"""What two paths leave behind, made one: equal things stay, tensors and numbers become a Select."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import Any

from graphopt.exporting.branches import sizes
from graphopt.exporting.branches.errors import Unjoinable
from graphopt.exporting.branches.markers import operators
from graphopt.exporting.branches.numbers import as_number, is_number, is_plain, is_turn, mark
from graphopt.exporting.branches.places import Place
from graphopt.exporting.branches.state import UNSET

_DERIVED = "_graphopt_derived"
_COMPARABLE = (str, bytes, type(None), slice, range, enum.Enum, type, frozenset)


def is_derived(value: object) -> bool:
    """Whether ``value`` is a truth that follows from decisions: no decision of its own."""
    return hasattr(value, _DERIVED)


def derived(truth: Any) -> Any:
    """``truth``, a scalar bool tensor that follows from decisions, marked as that."""
    setattr(truth, _DERIVED, True)
    return truth


def join(condition: Any, one: Any, other: Any, place: Place, number: int, promote: bool) -> Any:
    """``one`` where ``condition`` (a scalar bool tensor) is true, else ``other``; of any structure.

    Args:
        condition: What tells the paths apart.
        one: What the path left behind on which it is true.
        other: What the other path left behind.
        place: The line that decided, for messages.
        number: The number of the join, which its Selects share.
        promote: Whether Python numbers that differ become tensors.

    Raises:
        Unjoinable: They differ in structure, in dtype or rank, or in something that is no tensor.
    """
    return _Join(condition, place, number, promote).of(one, other, "")


class _Join:
    def __init__(self, condition: Any, place: Place, number: int, promote: bool) -> None:
        self.condition, self.place, self.number, self.promote = condition, place, number, promote
        self.done: dict[tuple[int, int], Any] = {}
        self.kept: list[Any] = []  # so that no id is given twice

    def of(self, one: Any, other: Any, path: str) -> Any:
        if one is other or other is UNSET:
            return one
        if one is UNSET:
            return other
        key = (id(one), id(other))
        if key not in self.done:
            self.kept.append((one, other))
            self.done[key] = self._of_different(one, other, path)
        return self.done[key]

    def _of_different(self, one: Any, other: Any, path: str) -> Any:
        import torch

        if sizes.is_size(one) and sizes.is_size(other) and sizes.same_size(one, other):
            return one
        if isinstance(one, bool) and isinstance(other, bool) and one != other:
            truth = self.condition if one else torch.logical_not(self.condition)
            return mark(derived(truth))
        if _is_value(one) and _is_value(other):
            if is_plain(one) and is_plain(other) and type(one) is type(other) and one == other:
                return one
            return self._selected(one, other, path)
        if type(one) is not type(other):
            raise self._unjoinable(one, other, path)
        if isinstance(one, (list, tuple)) and list.__len__(list(one)) == len(list(other)):
            parts = [self.of(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
            if isinstance(one, list):
                return parts
            return tuple(parts) if type(one) is tuple else _namedtuple(type(one), parts)
        if isinstance(one, dict) and list(one) == list(other):
            return {key: self.of(one[key], other[key], f"{path}.{key}") for key in one}
        if isinstance(one, (*_COMPARABLE, torch.Size, torch.dtype, torch.device)) and one == other:
            return one
        if _is_plain_object(one) and list(vars(one)) == list(vars(other)):
            joined = copy.copy(one)
            joined.__dict__.update({key: self.of(v, vars(other)[key], f"{path}.{key}") for key, v in vars(one).items()})
            return joined
        raise self._unjoinable(one, other, path)

    def _selected(self, one: Any, other: Any, path: str) -> Any:
        import torch

        if not self.promote and path and (is_plain(one) or is_plain(other)):
            raise Unjoinable(f"the Python numbers {_shown(one)} and {_shown(other)} differ", self.place)
        device = next((v.device for v in (one, other) if isinstance(v, torch.Tensor)), self.condition.device)
        a, b = (v if isinstance(v, torch.Tensor) else as_number(v, device) for v in (one, other))
        if a.dtype != b.dtype or a.dim() != b.dim():
            raise self._unjoinable(a, b, path)
        result = operators().select(self.condition, a, b, self.number)
        if is_number(a) and is_number(b):
            mark(result, turn=is_turn(a) or is_turn(b))
        if all(is_derived(v) or isinstance(v, bool) for v in (one, other)):
            derived(result)
        return result

    def _unjoinable(self, one: Any, other: Any, path: str) -> Unjoinable:
        name = f" ({path.lstrip('.')})" if path else ""
        return Unjoinable(
            f"its paths leave {_shown(one)} and {_shown(other)}, which cannot be one value{name}", self.place
        )


def _is_value(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or is_plain(value) or sizes.is_size(value)


def _is_plain_object(value: Any) -> bool:
    from torch import nn

    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Callable))  # type: ignore[arg-type]


def _namedtuple(kind: Any, parts: list[Any]) -> Any:
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _shown(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        shape = "×".join(map(str, value.shape)) or "scalar"
        return f"{str(value.dtype).removeprefix('torch.')} of shape {shape}"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:40] if is_plain(value) or isinstance(value, _COMPARABLE) else f"a {type(value).__name__}"
