"""How much the outputs of a model suffer from an error in one weight, measured: the model is run with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.calibration import failing_on
from graphopt.passes.lowrank.dense import DenseWeight
from graphopt.rewrite import Context
from graphopt.sites import Linear

Array = npt.NDArray[Any]

SAMPLES = 4
MOST_BYTES = 1 << 30
"""Of all weights together. They are all in memory while the model runs."""


def sensitivities(
    ctx: Context, weights: Sequence[DenseWeight], trials: Sequence[Callable[[], Array]]
) -> list[float | None]:
    """The relative squared error of the outputs when one weight is replaced and all others are as they were.

    Args:
        ctx: The model, and the data: the first samples are used.
        weights: Of the model.
        trials: For each weight what takes its place, (m, n).

    Returns:
        A number for each weight; None where it cannot be measured: without data, of a weight behind other nodes, or
        where all weights together take more than a gigabyte.
    """
    direct = [_direct(weight) for weight in weights]
    sizes = sum(linear.weight.tensor.nbytes for linear in direct if linear is not None)
    if not ctx.feeds or sizes > MOST_BYTES:
        return [None] * len(weights)
    feeds = [ctx.feeds[i] for i in range(min(SAMPLES, len(ctx.feeds)))]
    names = [None if linear is None else linear.weight.root.name for linear in direct]
    stored = {
        linear.weight.root.name: np.ascontiguousarray(linear.weight.tensor.numpy())
        for linear in direct
        if linear is not None
    }
    run = _open(ctx, [name for name in names if name is not None])
    if run is None:
        return [None] * len(weights)
    reference = []
    for feed in feeds:
        with failing_on(feed):
            reference.append(run(feed, stored))
    found: list[float | None] = []
    for number, (linear, name, trial) in enumerate(zip(direct, names, trials, strict=True)):
        if linear is None or name is None:
            found.append(None)
            continue
        ctx.say(f"factorize: measuring {name}, {number + 1} of {len(weights)}")
        changed = {**stored, name: _as_stored(linear, trial())}
        found.append(_distance(reference, [run(feed, changed) for feed in feeds]))
    return found


def _direct(weight: DenseWeight) -> Linear | None:
    """A product that reads the constant as it is stored."""
    linear = weight.linears()[0]
    return None if linear.weight.through or linear.weight.root.producer() is not None else linear


def _as_stored(linear: Linear, matrix: Array) -> Array:
    """A matrix (m, n) the way that a product's constant holds it; ``alpha`` of Gemm is taken out again."""
    shaped = matrix.reshape(linear.outputs, linear.inputs, *linear.kernel)
    stored = shaped if linear.weight.shape == shaped.shape and not _turned(linear) else shaped.T
    alpha = linear.node.attributes.get("alpha")
    if alpha is not None and alpha.as_float() not in (0.0, 1.0):
        stored = stored / alpha.as_float()
    return np.ascontiguousarray(stored.astype(linear.weight.dtype.numpy()))


def _turned(linear: Linear) -> bool:
    return linear.node.op_type in ("MatMul", "Gemm") and not (
        linear.node.attributes.get_int("transB", 0) or linear.spelling.value == "left matmul"
    )


Run = Callable[[Mapping[str, Any], Mapping[str | None, Array]], list[Array]]


def _open(ctx: Context, names: Sequence[str]) -> Run | None:
    """A session of the model in which some weights are inputs."""
    from graphopt.errors import BadInput
    from graphopt.runtime.session import create_session
    from graphopt.runtime.session import run as run_session
    from graphopt.runtime.split import split_weights

    model = ctx.model.clone()
    for name in names:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    proto, weights = split_weights(model)
    try:
        session = create_session(proto, optimized=False, threads=1, initializers=weights)
    except BadInput:
        return None

    def run(feed: Mapping[str, Any], replaced: Mapping[str | None, Array]) -> list[Array]:
        results = run_session(session, {**feed, **replaced})  # type: ignore[dict-item]
        return [value for value in results.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]

    return run


def _distance(reference: Sequence[Sequence[Array]], found: Sequence[Sequence[Array]]) -> float | None:
    """The mean over samples and outputs of |y' - y|^2 / |y|^2."""
    ratios = []
    for before, after in zip(reference, found, strict=True):
        for one, other in zip(before, after, strict=True):
            wide = one.astype(np.float64)
            size = float(np.sum(wide**2))
            if size > 0 and one.shape == other.shape:
                ratios.append(float(np.sum((other.astype(np.float64) - wide) ** 2)) / size)
    value = float(np.mean(ratios)) if ratios else float("nan")
    return value if np.isfinite(value) else None
