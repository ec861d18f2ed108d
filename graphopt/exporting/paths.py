"""The exported model on every side of every decision, each forced in the model as in the module."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.errors import GateFailed, GraphoptError
from graphopt.exporting.branches.checking import Forced, force_paths
from graphopt.exporting.branches.deciding import TABLE, force, numbers_in
from graphopt.exporting.branches.errors import Refusal
from graphopt.exporting.branches.following import Misaligned
from graphopt.exporting.capture import Captured
from graphopt.exporting.compare import Case, compare_output, run_eager, to_numpy
from graphopt.exporting.factory import Example
from graphopt.runtime.session import create_session, run
from graphopt.runtime.split import split_weights


class Uncompared(GateFailed):
    """Some side of a decision cannot be run in the module."""


def compare_paths(
    example: Example, captured: Captured, cases: list[Case], name: str
) -> tuple[list[str], list[list[torch.Tensor]]]:
    """Compare ``captured.model``, which still has its Decide nodes, with the module on every side.

    Returns:
        Notes, and what the module returned in each run.

    Raises:
        Uncompared: A side cannot be reached, or the module does not decide what it decided when it was traced.
        GateFailed: They differ.
    """
    traced = captured.traced
    assert traced is not None
    count = len(traced.course.numbered)
    try:
        coverage = force_paths(
            example.module,
            traced,
            numbers_in(captured.model),
            len(cases),
            lambda case: run_eager(example, cases[case].inputs, captured.leaves),
            _same,
        )
    except Refusal as refusal:
        raise Uncompared(f"the export cannot be compared: {refusal}", where=name, hint=refusal.hint) from refusal
    except Misaligned as error:
        raise Uncompared(
            f"the export cannot be compared: the module decides something else when it runs, at {error.place}",
            where=name,
        ) from error
    model = captured.model.clone()
    force(model, max(count, 1))
    skeleton, weights = split_weights(model)
    session = create_session(skeleton, optimized=False, initializers=weights)
    names = [value.name or "" for value in captured.model.graph.outputs]
    for forced in coverage.runs:
        feeds = {key: to_numpy(value) for key, value in cases[forced.case].inputs.items()}
        reason = _difference(session, {**feeds, TABLE: forced.table}, names, forced)
        if reason is not None:
            raise GateFailed(
                f"the ONNX does not compute what the module does on one of its paths: {reason}", where=name
            )
    note = f"{coverage.decisions} decision{'s' if coverage.decisions != 1 else ''} on values, every side compared"
    forced_sides = f"{coverage.forced} side{'s' if coverage.forced != 1 else ''} forced" if coverage.forced else ""
    raising = f"{coverage.raising} where the module raises left out" if coverage.raising else ""
    details = ", ".join(part for part in (forced_sides, raising) if part)
    told = f"{note} in {len(coverage.runs)} runs{f' ({details})' if details else ''}"
    return [told] if coverage.decisions else [], [forced.outputs for forced in coverage.runs]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        compare_output("", a, to_numpy(b)).passed for a, b in zip(one, other, strict=True)
    )


def _difference(session: Any, feeds: dict[str, Any], names: list[str], forced: Forced) -> str | None:
    try:
        found = list(run(session, feeds, names).values())
    except GraphoptError as error:
        return error.what
    if len(found) != len(forced.outputs):
        return f"{len(found)} outputs, the module {len(forced.outputs)}"
    for name, expected, array in zip(names, forced.outputs, found, strict=True):
        compared = compare_output(name, expected, array)
        if not compared.passed:
            return f"{name!r}: {compared.reason}"
    return None
