"""Find the one rewrite after which a model no longer computes the same, and the first tensor that differs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import gates
from graphopt.attempts import Attempt, Plan, run_attempt
from graphopt.cases import read_feeds
from graphopt.checking import reference_of, run_file
from graphopt.errors import GraphoptError
from graphopt.files import load_model, stage_model
from graphopt.numerics.blas import single_threaded_blas
from graphopt.recipes import load_recipes, passes_of
from graphopt.report import Verification
from graphopt.rewrite.application import Application
from graphopt.runtime.ending import under
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target
from graphopt.verification import runnable
from graphopt.verification.tolerance import distance
from graphopt.verification.whole import Reference, compare, run_case, session_for


@dataclass
class Culprit:
    """What ``bisect`` found.

    Attributes:
        application: The first application with which the tolerance breaks.
        number: Its place among all applications, counted from 1.
        applications: How many there are.
        reason: How the result differs.
        tensor: The first value, in the order of the original, that differs; None where only outputs do.
        tensor_max_abs: By how much.
        runs: How many rewritten models were run.
    """

    application: Application
    number: int
    applications: int
    reason: str
    tensor: str | None
    tensor_max_abs: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for ``json.dumps``."""
        return dataclasses.asdict(self)


@single_threaded_blas()
def bisect(
    path: str | Path,
    *,
    recipe: str | Sequence[str] = ("safe",),
    settings: str | Sequence[str] = (),
    calibration: str | Path | None = None,
    target: str = "onnxruntime",
    custom_ops: str | Path | None = None,
    fail_if: str | Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Culprit | None:
    """Find the application that breaks the tolerance, by running ever smaller numbers of them.

    Models are run with the runtime's optimizations off and on. Where the optimizations alone move the unchanged model
    by more than the tolerance, they are left off: what they do is no application's fault.

    Args:
        path: The model.
        recipe, settings, calibration, target, custom_ops: As for ``optimize``.
        fail_if: The tolerance, as conditions such as ``max_abs>1e-5``; default: the rounding rule.
        progress: Told in words what is being done.

    Returns:
        The culprit, or None where the whole recipe passes.

    Raises:
        GraphoptError: The unchanged model does not pass either, so that no application is to blame.
    """
    say = progress or (lambda text: None)
    source = Path(path)
    conditions = gates.parse_conditions(fail_if)
    recipes = load_recipes(recipe)
    model = load_model(source)
    plan = Plan(
        source,
        load_target(target),
        lambda: passes_of(recipes, settings),
        read_feeds(calibration, model),
        Path(custom_ops) if custom_ops is not None else None,
    )
    plan.make_passes()  # mistakes in recipes and settings come before anything runs
    original = load_model(source)
    infer_shapes(original)
    reference = reference_of(plan, original)
    runs = 0
    modes: tuple[bool, ...] = (False, True)

    def failure(attempt: Attempt) -> str | None:
        nonlocal runs
        runs += 1
        with (
            tempfile.TemporaryDirectory(prefix="graphopt-") as folder,
            stage_model(attempt.model, Path(folder) / "candidate.onnx") as staged,
        ):
            return why_not_same(plan, reference, staged.staged_path, conditions, modes)

    def run(limit: int | None) -> Attempt:
        say(f"running {'all' if limit is None else limit} applications")
        return run_attempt(plan, limit=limit, watch=False)

    whole = run(None)
    reason = failure(whole)
    if reason is None:
        return None
    applications = list(whole.context.applications)
    remark = ""
    if (own := failure(run(0))) is not None:
        modes = (False,)
        if failure(run(0)) is not None:
            raise GraphoptError(
                f"the unchanged model fails too, so no rewrite is to blame: {own}",
                where=str(source),
                hint="give a --fail-if that the unchanged model passes",
            )
        reason = failure(whole)
        if reason is None:
            raise GraphoptError(
                f"no rewrite is to blame: the unchanged model breaks the tolerance as well: {own}",
                where=str(source),
                hint="the runtime's optimizations round too; give a --fail-if above that",
            )
        remark = ", with the runtime's optimizations off (on, they alone break the tolerance)"
    low, high = 0, len(applications)
    while high - low > 1:
        middle = (low + high) // 2
        found = failure(run(middle))
        if found is None:
            low = middle
        else:
            high, reason = middle, found
    tensor, gap = first_difference(plan, reference, run(high))
    return Culprit(applications[high - 1], high, len(applications), reason + remark, tensor, gap, runs)


def why_not_same(
    plan: Plan, reference: Reference, path: Path, conditions: Sequence[gates.FailIf], modes: Sequence[bool]
) -> str | None:
    """Why a file does not count as the same as the original; None where it does.

    Args:
        plan: For the custom operator library.
        reference: The original's results.
        path: The file.
        conditions: The user's tolerance; without one the rounding rule holds.
        modes: Whether to run it with the runtime's optimizations off (False), on (True), or both.
    """
    for deployed in modes:
        results = run_file(path, reference, plan.custom_ops, deployed=deployed)
        if results is None:
            continue
        differences, worst = compare(reference, results, bitwise=False, deployed=deployed)
        measured = Verification(max_abs=worst.max_abs, max_rel=worst.max_rel, cosine_min=worst.cosine_min)
        held = next((condition for condition in conditions if condition.holds(measured)), None)
        if held is not None:
            how = ", with the runtime's optimizations on" if deployed else ""
            return f"{held.text} holds: {held.metric} is {held.value(measured):.6g}{how}"
        plain = next((d for d in differences if not (conditions and d.measured)), None)
        if plain is not None:
            return str(plain)
    return None


def first_difference(plan: Plan, reference: Reference, attempt: Attempt) -> tuple[str | None, float]:
    """The first value, in the original's order, that both models have and that differs, and by how much.

    A value differs where it is further off than rounding explains: more than 1e-4 of its largest magnitude.
    """
    original = reference.model
    candidate = attempt.model
    infer_shapes(candidate)
    runnable.prepare(candidate, has_custom_ops=plan.custom_ops is not None)
    theirs = {v.name: v for node in candidate.graph for v in node.outputs if v.name}
    shared = [
        (value, theirs[value.name])
        for node in original.graph
        for value in node.outputs
        if value.name in theirs and value.dtype is not None and theirs[value.name].dtype == value.dtype
    ]
    before = session_for(original, custom_ops=plan.custom_ops, outputs=[a for a, _ in shared])
    after = session_for(candidate, custom_ops=plan.custom_ops, outputs=[b for _, b in shared])
    for case in reference.feeds:
        names = [value.name or "" for value, _ in shared]
        with under(reference.limit):
            a, b = run_case(before, case, names), run_case(after, case, names)
        for name in names:
            if not isinstance(a[name], np.ndarray) or not isinstance(b[name], np.ndarray):
                continue
            if a[name].shape != b[name].shape:
                return name, float("inf")
            gap = distance(b[name], a[name])
            if gap.max_rel > 1e-4:
                return name, gap.max_abs
    return None, 0.0
