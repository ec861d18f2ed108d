"""A model with plugin nodes against the model it was made from, on ONNX Runtime: before an engine is built of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GateFailed, GraphoptError
from graphopt.numerics.blas import single_threaded_blas

if TYPE_CHECKING:
    import onnx_ir as ir


@single_threaded_blas()
def verify_lowered(source: Path, lowered: ir.Model, feeds: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Run a lowered model, its plugin nodes written as the standard operators that they stand for, and the original.

    What the kernels compute is not shown by that; `graphopt selftest` shows it.

    Args:
        source: The original.
        lowered: What was made of it. Used up: its plugin nodes are replaced in place.
        feeds: The user's inputs; None: made up.

    Returns:
        ``verdict``: ``passed``, or ``not run`` with the ``reason``; ``cases``, ``max_abs`` and ``max_rel``.

    Raises:
        GateFailed: They do not compute the same.
    """
    from graphopt.attempts import Plan
    from graphopt.checking import coverage_of, reference_of, says_nothing
    from graphopt.engines.plugins import twin
    from graphopt.files.load import load_model
    from graphopt.runtime.ending import under
    from graphopt.shapes import infer_shapes
    from graphopt.targets import load_target
    from graphopt.verification import runnable
    from graphopt.verification.whole import compare, run_case, session_for

    twin(lowered)
    infer_shapes(lowered)
    original = load_model(source)
    infer_shapes(original)
    plan = Plan(source, load_target("onnxruntime"), list, feeds, None)
    try:
        reference = reference_of(plan, original)
    except GraphoptError as error:  # ONNX Runtime is not here, or does not run the original
        return {"verdict": "not run", "reason": error.what}
    if reference.preparation.needed:
        runnable.prepare(lowered, has_custom_ops=False)
    try:
        session = session_for(lowered)
        with under(reference.limit):
            results = [run_case(session, case) for case in reference.feeds]
    except GraphoptError as error:  # the original did run
        raise _failed(source, error.what) from error
    differences, worst = compare(reference, results, bitwise=False)
    if differences:
        raise _failed(source, str(differences[0]))
    coverage = coverage_of(plan, reference)
    if says_nothing(coverage):
        return {"verdict": "not run", "reason": "every output is constant, or nowhere finite, on all inputs tried"}
    return {
        "verdict": "passed",
        "cases": len(reference.feeds),
        "max_abs": float(worst.max_abs),
        "max_rel": float(worst.max_rel),
        "feeds": coverage["feeds"],
    }


def _failed(source: Path, reason: str) -> GateFailed:
    return GateFailed(
        f"with plugin nodes it does not compute the same: {reason}",
        where=str(source),
        hint="a fault of graphopt; --plugins never builds without",
    )
