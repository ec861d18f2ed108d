"""What a kernel is: a source file, an entry point with its parameters, and the grid to launch it on.

The order of parameters is the one that TensorRT passes to kernels compiled ahead of time: inputs, then int32 scalars,
then outputs. Sizes may be symbolic, since TensorRT works the grid out anew for each shape at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Any
"""An int, or a symbolic size that knows + - * //, the symbolic one on the left (``size * 2``, never ``2 * size``)."""
Shape = Sequence[Size]

ARCHITECTURES = ("compute_80", "compute_89", "compute_90", "compute_100")
"""What kernels are compiled for. PTX of one runs on every later GPU."""
WARP = 32
"""Threads of a warp."""
SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory, static and dynamic together, that every GPU gives a block without being asked for more."""


def ceil_div(a: Size, b: int) -> Size:
    """a / b, rounded up; for ints and for symbolic sizes.

    >>> ceil_div(130, 64)
    3
    """
    return (a + (b - 1)) // b


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel's entry point.

    Attributes:
        name: Its name in the source.
        kind: An input and an output are pointers to whole tensors, C-contiguous; a scalar is passed by value.
        dtype: Of the tensor's elements, by numpy's name (``bfloat16`` is ml_dtypes'); of a scalar ``int32``.
    """

    name: str
    kind: Literal["input", "scalar", "output"]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel on given shapes.

    Attributes:
        grid: Blocks in x, y, z.
        scalars: Values of the scalar parameters, in their order.
    """

    grid: tuple[Size, Size, Size]
    scalars: tuple[Size, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel: one entry point of one source, with what its macros are set to.

    Attributes:
        name: The entry point, extern "C"; unique in its source.
        source: The .cu file. It includes headers of the kit ("kit.h", "tile_product.h") and nothing else.
        parameters: Of the entry point, in its order: inputs, scalars, outputs.
        threads: Threads of a block (along x); a multiple of 32.
        launch: From the shapes of the inputs, in order, to the grid and the scalars.
        defines: Macros set for this dtype or tactic, e.g. ``("T", "half")``, ``("WARPS", "4")``.
        shared: Dynamic shared memory of a block, in bytes. With the static one at most `SHARED_LIMIT`.
    """

    name: str
    source: Path
    parameters: tuple[Parameter, ...]
    threads: int
    launch: Callable[[Sequence[Shape]], Launch]
    defines: tuple[tuple[str, str], ...] = ()
    shared: int = 0
