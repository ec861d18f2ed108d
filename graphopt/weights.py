"""Weights one at a time: reading one without keeping it, and making one that is computed when it is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import GraphoptError

EAGER_BYTES = 1 << 16
"""Results up to this size are computed at once; larger ones when they are saved."""


def read(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """The values of a weight, in memory that is free again when the array goes.

    An external tensor is read, not mapped: mapped pages would stay in the process for as long as the model.

    Raises:
        GraphoptError: Its data file cannot be read.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8 or tensor.size == 0:
        return tensor.numpy()
    dtype = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
    try:
        values = np.fromfile(tensor.path, dtype, count=tensor.size, offset=tensor.offset or 0)
    except OSError as error:
        raise GraphoptError(
            f"the weights cannot be read: {error.strerror}", where=f"{tensor.path}: tensor {tensor.name!r}"
        ) from error
    if values.size != tensor.size:
        raise GraphoptError("the data file ends early", where=f"{tensor.path}: tensor {tensor.name!r}")
    return values.reshape(tensor.shape.numpy())


def computed(compute: Callable[[], ir.TensorProtocol], dtype: ir.DataType, shape: Sequence[int]) -> ir.TensorProtocol:
    """A tensor from a function: computed now where it is small, else each time that it is read, never kept."""
    lazy = ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(list(shape)))
    return compute() if lazy.nbytes <= EAGER_BYTES else lazy
