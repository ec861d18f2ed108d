"""A dense product written as two: V x, and U of it at every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewrite import Context
from graphopt.sites import Linear

Array = npt.NDArray[Any]


def factor_constants(
    ctx: Context, linear: Linear, rank: int, right: Callable[[], Array], left: Callable[[], Array]
) -> tuple[ir.Value, ir.Value]:
    """Constants for V (rank, inputs * kernel) and U (outputs, rank), in the dtype of the weight, computed when read."""
    dtype: np.dtype[Any] = linear.weight.dtype.numpy()
    name = linear.weight.root.name or "weight"
    inner = (rank, linear.inputs, *linear.kernel)
    outer = (linear.outputs, rank, *[1] * len(linear.kernel))
    follower = linear.follower()
    return (
        linear.constant(ctx, f"{name}_right", inner, lambda: right().reshape(inner).astype(dtype)),
        follower.constant(ctx, f"{name}_left", outer, lambda: left().reshape(outer).astype(dtype)),
    )


def factor_nodes(ctx: Context, linear: Linear, rank: int, right: ir.Value, left: ir.Value) -> tuple[ir.Node, ir.Node]:
    """Both products on constants of ``factor_constants``; what the dense product added, the second adds."""
    inner = linear.apply(ctx, linear.x, right, outputs=rank)
    return inner, linear.follower().apply(ctx, inner.outputs[0], left, linear.bias)
