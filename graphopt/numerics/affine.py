"""Folding a per-channel affine map, y = scale * x + shift, into the weights of the linear operator before it.

Everything is computed in float64 and rounded once, so that the folded weights are the best the dtype can hold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def batch_norm_affine(
    gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float
) -> tuple[Float64, Float64]:
    """The affine map that batch normalisation is at inference.

    Args:
        gamma, beta, mean, variance: One number a channel, [C], any float dtype.
        epsilon: Added to the variance.

    Returns:
        Scale and shift, [C], float64; not finite where variance + epsilon is not positive.
    """
    with np.errstate(all="ignore"):
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        shift = beta.astype(np.float64) - mean.astype(np.float64) * scale
    return scale, shift


def scale_axis(weight: np.ndarray, scale: Float64, axis: int) -> np.ndarray:
    """A weight with each slice along an axis multiplied by its scale, in the weight's dtype.

    Args:
        weight: Any shape and float dtype; ``weight.shape[axis] == len(scale)``.
        scale: [C].
    """
    shape = [1] * weight.ndim
    shape[axis] = len(scale)
    with np.errstate(all="ignore"):
        scaled: np.ndarray = (weight.astype(np.float64) * scale.reshape(shape)).astype(weight.dtype)
    return scaled


def scale_transposed_conv(weight: np.ndarray, scale: Float64, groups: int) -> np.ndarray:
    """The weight of a transposed convolution with each output channel multiplied by its scale.

    Args:
        weight: [C_in, C_out / groups, k...]: the first axis counts through the groups, the second through the output
            channels of one group.
        scale: [C_out].
        groups: Number of groups.

    Returns:
        A weight of the same shape and dtype.
    """
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    per_channel = np.repeat(scale.reshape(groups, 1, outputs), inputs, axis=1).reshape(weight.shape[0], outputs)
    with np.errstate(all="ignore"):
        spread = per_channel.reshape(per_channel.shape + (1,) * (weight.ndim - 2))
        scaled: np.ndarray = (weight.astype(np.float64) * spread).astype(weight.dtype)
    return scaled


def fold_bias(bias: np.ndarray | None, scale: Float64, shift: Float64, dtype: np.dtype) -> np.ndarray:
    """The bias after an affine map: scale * bias + shift.

    Args:
        bias: [C], or None for zeros.
        scale, shift: [C].
        dtype: Of the result.
    """
    with np.errstate(all="ignore"):
        folded = shift if bias is None else bias.astype(np.float64) * scale + shift
        rounded: np.ndarray = folded.astype(dtype)
    return rounded


def all_finite(*arrays: np.ndarray) -> bool:
    """Whether no array holds an infinity or a NaN."""
    return all(bool(np.isfinite(a.astype(np.float64) if a.dtype.kind == "V" else a).all()) for a in arrays)
