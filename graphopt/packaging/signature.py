"""What a server has to know of a model: its inputs and outputs, and the files that it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import BadInput

Axis = int | str | None
"""A size; the name of a dynamic axis; None for a dynamic axis without a name."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        name: As the model calls it.
        data_type: As Triton calls it: ``TYPE_FP32``.
        shape: All axes.
        optional: An input that the model has a value for.
        is_shape: TensorRT: the numbers in it are sizes, read by the host.
    """

    name: str
    data_type: str
    shape: tuple[Axis, ...]
    optional: bool = False
    is_shape: bool = False

    @property
    def dims(self) -> list[int]:
        """The sizes, -1 for dynamic ones."""
        return [axis if isinstance(axis, int) else -1 for axis in self.shape]


@dataclass(frozen=True)
class Served:
    """A model or an engine as a Triton backend loads it.

    Attributes:
        platform: Triton's older name of what it is, ``tensorrt_plan``; some of its checks still ask for that.
        backend: The Triton backend that loads it.
        filename: What the backend looks for.
        files: Where it goes, relative to the folder of the version -> what is copied there.
        inputs: In the model's order.
        outputs: In the model's order.
        needs: What an engine is bound to, in words.
        most: The largest batch that an engine was built for; None where nothing limits it.
        preferred: Batches that an engine was tuned for.
        profiles: The number of optimization profiles of an engine.
        unbatched: Why requests cannot be batched, as far as the file tells; None where nothing speaks against it.
    """

    platform: str
    backend: str
    filename: str
    files: dict[str, Path]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    needs: str | None = None
    most: int | None = None
    preferred: tuple[int, ...] = ()
    profiles: int = 0
    unbatched: str | None = None


def refuse_odd_axes(tensors: tuple[Tensor, ...], where: str) -> None:
    """Refuse what no configuration can say.

    Raises:
        BadInput: A tensor has an axis of size 0.
    """
    for tensor in tensors:
        if 0 in tensor.shape:
            raise BadInput(f"{tensor.name!r} has an axis of size 0, which Triton refuses", where=where)


def why_not_batched(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> str | None:
    """Why the first axes are no batch that a server could put requests together along; None where they may be.

    They must be dynamic, of every input and output, and one: two names are two axes. Shapes cannot tell a batch from
    the length of a sequence.
    """
    if not inputs:
        return "there are no inputs"
    for tensor in (*inputs, *outputs):
        if not tensor.shape:
            return f"{tensor.name!r} has no axes"
        if tensor.is_shape:
            return f"{tensor.name!r} holds sizes"
        if isinstance(tensor.shape[0], int):
            return f"the first axis of {tensor.name!r} is {tensor.shape[0]}"
    names: dict[str, str] = {}
    for tensor in (*inputs, *outputs):
        if isinstance(tensor.shape[0], str):
            names.setdefault(tensor.shape[0], tensor.name)
    if len(names) > 1:
        (one, first), (other, second), *_ = names.items()
        return f"the first axis of {first!r} is {one}, that of {second!r} is {other}"
    for tensor in (*inputs, *outputs):
        for place, axis in enumerate(tensor.shape[1:], 1):
            if axis in names:
                return f"{axis} is axis {place} of {tensor.name!r}, too"
    return None
