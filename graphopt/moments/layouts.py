"""How an activation is read as rows of channels: the x of y = W x, one row for each place where the weight is applied.

Rows come in blocks of float64 of a bounded size, whatever the size and the type of the activation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Channels:
    """The input of MatMul, Gemm or a 1×1 Conv: every position is a row.

    Attributes:
        size: The number of channels n.
        axis: The axis that holds them; the others are positions.
    """

    size: int
    axis: int = -1
    row_axes: ClassVar[int] = 1

    def view(self, x: Array) -> Array:
        """A view of ``x`` whose last axis is a row; the axes before it are positions."""
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.size:
            raise ValueError(f"an activation of shape {list(x.shape)} has not {self.size} channels on axis {self.axis}")
        return np.moveaxis(x, self.axis, -1)


@dataclass(frozen=True)
class Patches:
    """The input of a Conv with any kernel and group 1: every patch is a row, in the order of ``weight.reshape(m, -1)``.

    Attributes:
        channels: Input channels.
        kernel: Kernel sizes, one for each spatial axis.
        strides: One for each spatial axis; empty: 1.
        pads: As ONNX has them, all beginnings and then all ends; empty: 0.
        dilations: One for each spatial axis; empty: 1.
        auto_pad: "SAME_UPPER" or "SAME_LOWER": pads follow from the size of the activation, and ``pads`` is not read.
    """

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    auto_pad: str = ""

    @property
    def size(self) -> int:
        """The length n of a row."""
        return self.channels * math.prod(self.kernel)

    @property
    def row_axes(self) -> int:
        """How many axes at the end of `view` make up a row."""
        return 1 + len(self.kernel)

    def view(self, x: Array) -> Array:
        """A view of ``x`` (padded) of shape (batch, positions…, channels, kernel…)."""
        spatial = len(self.kernel)
        if x.ndim != spatial + 2 or x.shape[1] != self.channels:
            raise ValueError(f"an activation of shape {list(x.shape)} has not {self.channels} channels to convolve")
        windows = patches(x, self.kernel, self.strides, self._pads(x.shape[2:]), self.dilations)
        return np.moveaxis(windows, 1, 1 + spatial)

    def _pads(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not self.auto_pad:
            return self.pads
        ones = (1,) * len(self.kernel)
        geometry = zip(sizes, self.kernel, self.strides or ones, self.dilations or ones, strict=True)
        sums = [
            max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            for size, kernel, stride, dilation in geometry
        ]
        less, more = [total // 2 for total in sums], [total - total // 2 for total in sums]
        return (*less, *more) if self.auto_pad == "SAME_UPPER" else (*more, *less)


@dataclass(frozen=True)
class Tokens:
    """The indices of an embedding (Gather on axis 0): rows are one-hot, so the Gram is diagonal, a count for each.

    Attributes:
        size: The number of rows of the table.
    """

    size: int

    def indices(self, x: Array) -> Array:
        """The indices in a row, negative ones counted from the end as Gather does."""
        flat = np.asarray(x, np.int64).reshape(-1)
        if flat.size and not (-self.size <= flat.min() and flat.max() < self.size):
            raise ValueError(f"an index is outside a table of {self.size} rows")
        return np.where(flat < 0, flat + self.size, flat)


Dense = Channels | Patches
Layout = Channels | Patches | Tokens


def patches(
    x: Array,
    kernel: tuple[int, ...],
    strides: tuple[int, ...] = (),
    pads: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
) -> Array:
    """What a convolution multiplies its weight with, without copying (but for the padding).

    Args:
        x: (batch, channels, spatial…).
        kernel, strides, pads, dilations: As a Conv has them; see `Patches`.

    Returns:
        A view of shape (batch, channels, positions…, kernel…).
    """
    count = len(kernel)
    strides = strides or (1,) * count
    dilations = dilations or (1,) * count
    if any(pads):
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:count], pads[count:], strict=True)])
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    if any(size < span for size, span in zip(x.shape[2:], spans, strict=True)):
        return np.empty((*x.shape[:2], *(0 for _ in kernel), *kernel), x.dtype)
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, 2 + count)))
    steps = tuple(slice(None, None, step) for step in (*strides, *dilations))
    return windows[:, :, *steps]


def blocks(*activations: tuple[Dense, Array]) -> Iterator[tuple[Array, ...]]:
    """The same rows of several activations, block by block.

    Args:
        activations: Each with how it is read; all of them have the same positions.

    Yields:
        Arrays of shape (rows, n), float64 and C-contiguous, one for each activation.

    Raises:
        ValueError: An activation is not as its layout says, or positions differ.
    """
    views = [layout.view(x) for layout, x in activations]
    sizes = [layout.size for layout, _ in activations]
    found = {view.shape[: view.ndim - layout.row_axes] for view, (layout, _) in zip(views, activations, strict=True)}
    if len(found) > 1:
        raise ValueError(f"positions differ: {' and '.join(str(list(shape)) for shape in sorted(found))}")
    yield from _split(views, found.pop(), sizes)


def _split(views: list[Array], positions: tuple[int, ...], sizes: list[int]) -> Iterator[tuple[Array, ...]]:
    if 0 in positions:
        return
    inner = math.prod(positions[1:]) * max(sizes) * 8
    if len(positions) > 1 and inner > BLOCK_BYTES:
        for index in range(positions[0]):
            yield from _split([view[index] for view in views], positions[1:], sizes)
        return
    if not positions:
        views, positions = [view[None] for view in views], (1,)
    step = max(1, BLOCK_BYTES // inner)
    for start in range(0, positions[0], step):
        yield tuple(
            np.ascontiguousarray(view[start : start + step], np.float64).reshape(-1, size)
            for view, size in zip(views, sizes, strict=True)
        )
