"""What an engine takes and gives: its inputs and outputs, and the shapes that its profiles take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.engines.loading import OpenEngine
from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.loading import TensorSpec

Shapes = dict[str, tuple[int, ...]]
# The smallest, the best and the largest shape of each input on the device.
ShapeRanges = Mapping[str, tuple[tuple[int, ...], ...]]

_DTYPES: dict[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "FP8": ml_dtypes.float8_e4m3fn,
}
TYPES = frozenset(np.dtype(kind) for kind in _DTYPES.values())
"""What inputs and outputs of engines may be."""


@dataclass(frozen=True)
class Tensor:
    """An input or output; ``shape`` has -1 where it varies. ``on_host``: the library reads it on the host."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool

    def spec(self) -> TensorSpec:
        """As a runner tells it."""
        return TensorSpec(self.name, self.dtype, tuple(size if size >= 0 else None for size in self.shape))


def read_tensors(opened: OpenEngine) -> list[Tensor]:
    """The inputs and outputs of an engine. Raises GraphoptError where no array can hold one."""
    trt, engine = opened.trt, opened.engine
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        if kind not in _DTYPES:
            raise GraphoptError(f"'{name}' is {kind}, which no array can hold", where=str(opened.path))
        if engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
            layout = engine.get_tensor_format_desc(name)
            raise GraphoptError(f"'{name}' is not stored row by row: {layout}", where=str(opened.path))
        found.append(
            Tensor(
                name,
                np.dtype(_DTYPES[kind]),
                tuple(engine.get_tensor_shape(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
        )
    return found


def read_profiles(opened: OpenEngine, tensors: Sequence[Tensor]) -> list[ShapeRanges]:
    """What each profile of an engine takes."""
    engine = opened.engine
    return [_read_profile(engine, tensors, index) for index in range(engine.num_optimization_profiles)]


def _read_profile(engine: Any, tensors: Sequence[Tensor], index: int) -> ShapeRanges:
    found = {}
    for tensor in tensors:
        if tensor.is_input and not tensor.on_host:
            shapes = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, index))
            # Where nothing varies there is nothing to choose.
            found[tensor.name] = shapes if any(size < 0 for size in tensor.shape) else (tensor.shape,) * 3
    return found


def find_profile(profiles: Sequence[ShapeRanges], shapes: Shapes, path: Path) -> int:
    """The first profile that takes the shapes. Raises BadInput, with ``path`` as the engine's, where none does."""
    index = next((index for index, profile in enumerate(profiles) if _fits(profile, shapes)), None)
    if index is None:
        raise _no_profile(profiles, shapes, path)
    return index


def _no_profile(profiles: Sequence[ShapeRanges], shapes: Shapes, path: Path) -> BadInput:
    for name, shape in shapes.items():
        ranges = [profile[name] for profile in profiles if name in profile]
        if ranges and not any(_within(shape, smallest, largest) for smallest, _, largest in ranges):
            told = " or ".join(
                dict.fromkeys(
                    sizes(smallest) if smallest == largest else f"{sizes(smallest)} to {sizes(largest)}"
                    for smallest, _, largest in ranges
                )
            )
            return BadInput(
                f"the engine takes {told}, not {sizes(shape)}",
                where=f"input '{name}'",
                hint="build it for more shapes: graphopt build --shapes",
            )
    listed = ", ".join(f"{name} {sizes(shape)}" for name, shape in shapes.items())
    return BadInput(f"no profile of the engine takes these shapes together: {listed}", where=str(path))


def _fits(profile: ShapeRanges, shapes: Shapes) -> bool:
    return all(_within(shapes[name], smallest, largest) for name, (smallest, _, largest) in profile.items())


def _within(shape: Sequence[int], smallest: Sequence[int], largest: Sequence[int]) -> bool:
    return len(shape) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )


def sizes(shape: Sequence[int]) -> str:
    """A shape as messages say it: ``2x128``."""
    return "x".join(map(str, shape)) or "a scalar"


def describe(dtype: np.dtype[Any], shape: Sequence[int]) -> str:
    """An array as messages say it: ``float32[?, 128]``."""
    return f"{dtype.name}[{', '.join('?' if size < 0 else str(size) for size in shape)}]"
