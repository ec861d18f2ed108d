"""What PivotLinear computes, in numpy float64. Knows nothing of how pivots are found or weights are packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def row_form(x: Array, kept: Array, coefficients: Array, order: Array, bias: Array | None = None) -> Array:
    """y = P [K; C K] x + b: some rows of W, and the others as combinations of them.

    Args:
        x: (..., n).
        kept: K, (r, n): the pivot rows of W.
        coefficients: C, (m - r, r).
        order: (m,): which row of W each row of [K; C K] is.
        bias: (m,), in the order of W.

    Returns:
        (..., m) in float64, in the order of W.

    Source: PIFA (arXiv 2501.19090), section 3; the bias is ours, the paper's layer adds none.
    """
    pivots = np.asarray(x, np.float64) @ np.asarray(kept, np.float64).T
    stacked = np.concatenate([pivots, pivots @ np.asarray(coefficients, np.float64).T], axis=-1)
    y = np.empty_like(stacked)
    y[..., np.asarray(order)] = stacked
    return y if bias is None else y + np.asarray(bias, np.float64)


def column_form(x: Array, kept: Array, coefficients: Array, order: Array, bias: Array | None = None) -> Array:
    """y = K (x_p + C x_np) + b: some columns of W, and what brings the other channels of x to them.

    Args:
        x: (..., n).
        kept: K, (m, r): the pivot columns of W.
        coefficients: C, (r, n - r).
        order: (n,): the channels of x, pivots first.
        bias: (m,).

    Returns:
        (..., m) in float64.
    """
    r = kept.shape[1]
    ordered = np.asarray(x, np.float64)[..., np.asarray(order)]
    inner = ordered[..., :r] + ordered[..., r:] @ np.asarray(coefficients, np.float64).T
    y = inner @ np.asarray(kept, np.float64).T
    return y if bias is None else y + np.asarray(bias, np.float64)
