"""The inputs that verification runs on: the user's, or made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.attempts import Plan
from graphopt.calibration import failing_on, read_calibration

CALIBRATION_CASES = 4


def feed_source(plan: Plan) -> Callable[[ir.Model, Callable[[Mapping[str, Any]], object]], list[Mapping[str, Any]]]:
    """What makes the cases: the first few of the user's, else synthesised ones that the model runs on."""

    def make(model: ir.Model, run: Callable[[Mapping[str, Any]], object]) -> list[Mapping[str, Any]]:
        from graphopt.feeds import feeds_that_run

        if plan.feeds is not None:
            cases: list[Mapping[str, Any]] = []
            for index in range(min(CALIBRATION_CASES, len(plan.feeds))):
                sample = plan.feeds[index]
                cases.append({**_for_opaque(model, sample, index), **sample})
                with failing_on(sample):
                    run(cases[-1])
            return cases
        return list(feeds_that_run(model, run))

    return make


def _for_opaque(model: ir.Model, case: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Arrays for the inputs that stand for what an operator unknown to the runtime gives: nobody has real ones."""
    from graphopt.feeds import synthesise_feeds
    from graphopt.verification.runnable import OPAQUE

    missing = [v.name for v in model.graph.inputs if v.name and v.name.startswith(OPAQUE) and v.name not in case]
    if not missing:
        return {}
    shapes = {name: np.shape(array) for name, array in case.items() if not isinstance(array, list)}
    made = synthesise_feeds(model, cases=1, seed=seed, shapes=shapes)[0]
    return {name: made[name] for name in missing}


def read_feeds(calibration: str | Path | None, model: ir.Model) -> Sequence[Mapping[str, Any]] | None:
    """The user's cases, read one at a time; None where there are none."""
    if calibration is None:
        return None
    return read_calibration(Path(calibration), list(model.graph.inputs))
