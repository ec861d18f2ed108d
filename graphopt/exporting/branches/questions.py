"""What Python asks of tensors, and hooks ask of values: the part that a trace and a run on real values share."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from graphopt.exporting.branches import numbers, sizes
from graphopt.exporting.branches.errors import Refusal
from graphopt.exporting.branches.places import somewhere

LIMIT = 64  # decisions and paths in one region, values of one index


def is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


class Questions(TorchFunctionMode):  # type: ignore[misc]
    """A mode in which a tensor's truth and its value as an index are decided by the subclass.

    ``item()`` gives a number (see `numbers`), not a Python number.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        kwargs = kwargs or {}
        if function in (torch.Tensor.__bool__, torch.is_nonzero, torch.Tensor.is_nonzero):
            return self.decide(args[0])
        if function is torch.Tensor.item:
            return numbers.keep_position(numbers.as_item(args[0]), args[0])
        if function in (torch.Tensor.__int__, torch.Tensor.__index__):
            return self.value(args[0])
        if function in (torch.Tensor.__float__, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            raise Refusal(f"{function.__name__} makes Python values of a tensor", somewhere())
        if getattr(function, "__name__", "") == "__get__" and function.__self__ not in _tensor_properties():
            return function(*args, **kwargs)  # .shape, .dtype: no operator
        return self.operator(function, args, kwargs)

    def decide(self, tensor: Any, *, of_value: bool = False) -> bool:
        """The truth of ``tensor``."""
        raise NotImplementedError

    def operator(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What ``function`` gives."""
        return computed(function, args, kwargs)

    def value(self, tensor: Any) -> int:
        """``tensor`` as a Python int: is it negative, is it 0, is it 1, …"""
        negative = not numbers.is_position(tensor) and self.decide(tensor < 0)
        for candidate in range(-1, -LIMIT, -1) if negative else range(LIMIT):
            if self.decide(tensor == candidate, of_value=True):
                return candidate
        raise Refusal(f"a tensor is used as a Python int that may be more than {LIMIT - 1}", somewhere())

    def plain(self, value: Any) -> Any:
        """A number as Python's own, where nothing else will do."""
        import torch

        if is_tensor(value) and numbers.is_number(value):
            return self.decide(value) if value.dtype == torch.bool else self.value(value)
        return value

    def returned(self, value: Any) -> Any:
        """What a function returns: the line that does is noted where that matters."""
        return value

    def cast(self, kind: Any, *arguments: Any) -> Any:
        if kind is len and is_tensor(arguments[0]) and arguments[0].dim():
            return arguments[0].shape[0]  # `len` itself would ask a size that is not known for a number
        if kind is not len and len(arguments) == 1 and is_tensor(arguments[0]):
            return numbers.keep_position(numbers.cast(kind, arguments[0]), arguments[0])
        return kind(*arguments)


def computed(function: Any, args: Any, kwargs: Any) -> Any:
    """What ``function`` gives; of numbers alone a number, and none of them changed."""
    operands = [a for a in args if is_tensor(a)]
    if operands and all(map(numbers.is_number, operands)):
        args = [numbers.as_number(a) if sizes.is_size(a) else a for a in args]
        function = numbers.not_in_place().get(function, function)
    result = function(*args, **kwargs)
    numbers.mark_result(result, operands)
    if function in numbers.positions():
        numbers.mark_position(result)
    return result


def _tensor_properties() -> list[Any]:
    import torch

    return [getattr(torch.Tensor, name) for name in ("T", "mT", "H", "mH", "data", "real", "imag")]
