"""Factors fitted again to what a partly compressed network computes, from second moments alone: the M of MPIFA.

Zhao et al., ICML 2025, arXiv 2501.19090 (PIFA). x_o are the inputs of a site in the dense network and x_u in the
network whose earlier sites are compressed already. The outputs to reach are a mix of the two flows,
``y = W ((1 - l) x_u + l x_o)``, and the factors are to make them from x_u, so each site also makes up for what the
earlier ones lost. Of the samples only ``G = sum x_u x_u^T`` and ``K = sum x_o x_u^T`` are needed, so memory does not
grow with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.numerics.low_rank import Factors, balance

Array = npt.NDArray[Any]


def reconstruct(
    weight: Array,
    factors: Factors,
    gram: Array,
    cross: Array,
    *,
    mix: float = 0.25,
    damping: float = 1e-3,
    steps: int = 2,
) -> Factors:
    """Factors of the same rank that minimise ``sum ||y - U V x_u||^2 + a ||W - U V||^2``, U and V in turn, in float64.

    With H = (1 - l) W G + l W K, the first step is ``U <- (H + a W) V^T (V (G + a I) V^T)^-1``, the second
    ``V <- U^+ (H + a W) (G + a I)^-1``, and so on. Each is the minimum with the other factor held, so no step raises
    the objective. The paper's code damps the step of V alone, which then no longer minimises what the step of U did.

    The damping a is ``damping`` times the mean of the diagonal of G. The paper's code adds an absolute 1e-3, which is
    much or nothing by how many samples were summed and how large activations are; relative, the result is the same for
    any number of samples. What G does not see is held at W by it.

    Args:
        weight: W, (m, n), dense.
        factors: To begin with, as ``weighted_truncated_svd`` gives.
        gram: G, (n, n), symmetric, positive semidefinite but for rounding, of any rank.
        cross: K, (n, n), row i the products of input i of the dense network.
        mix: l, 0 to 1.
        damping: Above 0.
        steps: How many of the steps are taken.

    Returns:
        The new factors, balanced; those given, in float64, where nothing was calibrated (G is zero).

    Raises:
        ValueError: The shapes do not fit, an argument is out of range, or a number is not finite.
    """
    m, n = weight.shape
    if factors.left.shape[0] != m or factors.right.shape[1] != n or gram.shape != (n, n) or cross.shape != (n, n):
        raise ValueError(
            f"a weight of {weight.shape}, factors of {factors.left.shape} and {factors.right.shape}, moments of "
            f"{gram.shape} and {cross.shape}"
        )
    if not 0 <= mix <= 1 or damping <= 0 or steps < 0:
        raise ValueError(f"mix {mix}, damping {damping}, {steps} steps")
    if not all(np.isfinite(each).all() for each in (weight, gram, cross, factors.left, factors.right)):
        raise ValueError("NaN or infinity in the weight, the factors or the moments")
    wide = weight.astype(np.float64)
    left, right = factors.left.astype(np.float64), factors.right.astype(np.float64)
    damped = gram.astype(np.float64)
    damped = (damped + damped.T) / 2
    size = float(np.trace(damped)) / n
    if size <= 0 or steps == 0:
        return Factors(left, right)
    # Divided by the scale of G, so that nothing depends on how much was summed.
    target = wide @ ((1 - mix) * damped + mix * cross) / size + damping * wide
    damped /= size
    damped[np.diag_indices_from(damped)] += damping
    unrestricted = _solve(damped, target.T).T if steps > 1 else target
    for step in range(steps):
        # Only what the held factor spans matters: an orthonormal basis of it keeps the condition to that of G.
        if step % 2 == 0:
            right = _orthonormal(right.T).T
            left = _solve(right @ damped @ right.T, right @ target.T).T
        else:
            left = _orthonormal(left)
            right = left.T @ unrestricted
    return balance(left, right)


def _solve(matrix: Array, values: Array) -> Array:
    """matrix^-1 values, for a matrix that is positive definite but for rounding."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh

    try:
        result: Array = cho_solve(cho_factor(matrix, check_finite=False), values, check_finite=False)
    except LinAlgError:  # a G summed in a narrow type: its noise outweighs the damping
        squares, directions = eigh(matrix, check_finite=False)
        squares = np.maximum(squares, max(-squares[0], 1e-12 * squares[-1]))
        result = directions @ ((directions.T @ values) / squares[:, None])
    return result


def _orthonormal(columns: Array) -> Array:
    from scipy.linalg import qr

    result: Array = qr(columns, mode="economic", check_finite=False)[0]
    return result
