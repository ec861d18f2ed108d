"""The main job: read a model, rewrite it, prove that it still computes the same, write it.

A run is repeated from the original until verification has nothing to say against it: an application that a check
refuses is put on a skip list, and the passes run again without it. They are deterministic, so the rest stays the same.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt import garbage, gates, graphs
from graphopt.attempts import Attempt, Plan, Progress, run_attempt
from graphopt.cases import read_feeds
from graphopt.checking import Checked, check
from graphopt.errors import BadInput, GateFailed
from graphopt.files import load_model, stage_model
from graphopt.numerics.blas import single_threaded_blas
from graphopt.recipes import load_recipes, passes_of
from graphopt.report import ModelFacts, Report, Verification, environment, facts
from graphopt.rewrite.contract import Kind
from graphopt.rewrite.manager import PassRecord
from graphopt.runtime.session import import_soon
from graphopt.store import Store
from graphopt.targets import load_target

if TYPE_CHECKING:
    pass

# How often a run may be repeated without what was refused. Each repetition skips at least one application.
MAX_ATTEMPTS = 12
# In so many of the last ones a pass that is refused something is left out as a whole.
PATIENCE = 4


@garbage.paused()
def optimize(
    path: str | Path,
    out: str | Path | None = None,
    *,
    recipe: Sequence[str] = ("safe",),
    settings: Sequence[str] = (),
    calibration: str | Path | None = None,
    target: str = "onnxruntime",
    verify: bool = True,
    custom_ops: str | Path | None = None,
    evaluate: str | gates.Metric | None = None,
    minimum: float | None = None,
    fail_if: Sequence[str] = (),
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Rewrite a model, verify it, and write it.

    Args:
        path: The ``.onnx`` file.
        out: Where to write; default: ``NAME.opt.onnx`` beside it.
        recipe: Names of recipes or YAML files; they compose.
        settings: ``PASS.KEY=VALUE`` each; override the recipes.
        calibration: An ``.npz`` (one array an input, first axis the samples) or a folder (one ``.npz`` a feed).
        target: What the result is to run on.
        verify: False skips T1 to T3; the structure is checked all the same.
        custom_ops: A shared library of ONNX Runtime custom operators.
        evaluate: The user's metric: ``MODULE:FN`` or a function, FN(run) -> float.
        minimum: The least value of that metric.
        fail_if: Conditions such as ``cosine<0.999`` under which nothing is written.
        work: A folder for results of long computations on weights: a run that was interrupted goes on from there.
        progress: Told in words what is being done.

    Returns:
        What was done.

    Raises:
        BadInput: The model or an option cannot be used.
        GateFailed: A condition failed, or verification can say nothing; nothing was written.
        GraphoptError: Something else went wrong; nothing was written.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    source = Path(path)
    destination = Path(out) if out is not None else source.with_name(f"{source.stem}.opt.onnx")
    say("reading")
    if verify:
        import_soon()
    model = load_model(source)
    before = facts(model, source)
    conditions = [gates.parse_fail_if(text) for text in fail_if]
    spec = evaluate if isinstance(evaluate, str) else "the given function"
    metric = gates.load_function(evaluate, "--evaluate") if isinstance(evaluate, str) else evaluate
    if minimum is not None and metric is None:
        raise BadInput("--min needs --evaluate MODULE:FN")
    if conditions and not verify:
        raise BadInput(f"--fail-if {conditions[0].text} has nothing to go by with --no-verify")
    recipes = load_recipes(recipe)
    feeds = read_feeds(calibration, model)
    plan = Plan(
        source,
        load_target(target),
        lambda: passes_of(recipes, settings),
        feeds,
        Path(custom_ops) if custom_ops is not None else None,
        Store(Path(work) if work is not None else None),
    )
    _require_budget(plan, verify=verify, has_budget=bool(conditions) or minimum is not None)

    undone: dict[str, str] = {}
    size = 0
    reused: ir.Model | None = model
    for number in range(MAX_ATTEMPTS):
        attempt = run_attempt(plan, skip=undone, model=reused, watch=verify, progress=say)
        reused = None
        gates.require_lossy_effect(attempt.records, undone, str(source))
        say("writing")
        with stage_model(attempt.model, destination) as staged:
            if not verify:
                verification = Verification()
                checked = Checked(verification)
            else:
                say("verifying")
                with single_threaded_blas():
                    checked = check(plan, attempt, staged.staged_path)
            if checked.refused:
                undone.update(checked.refused)
                if number >= MAX_ATTEMPTS - PATIENCE:
                    undone.update(_whole_passes(checked.refused, attempt))
                del attempt, checked
                gc.collect()  # it is paused, and graphs are cyclic
                continue
            verification = checked.verification
            if metric is not None:
                say("evaluating")
                verification.metric = _measure(metric, spec, source, staged.staged_path, minimum)
            if conditions and verification.coverage["random"]:
                raise GateFailed(
                    "the model draws random numbers, so there is nothing to measure",
                    where=f"--fail-if {conditions[0].text}",
                    hint="nothing was written",
                )
            for condition in conditions:
                condition.check(verification)
            size = sum(file.stat().st_size for file in staged.staged_path.parent.iterdir())
            staged.commit()
        break
    else:
        key, reason = next(iter(undone.items()))
        raise GateFailed(f"verification keeps failing: {key}: {reason}", where=str(source), hint="nothing was written")

    _count_undone(attempt.records, undone)
    return Report(
        input=before,
        output=ModelFacts(
            str(destination), graphs.count_nodes(attempt.model), graphs.parameters(attempt.model)[0], size
        ),
        passes=attempt.records,
        verification=verification,
        environment=environment(),
        recipe=[r.name for r in recipes],
        target=plan.target.name,
        undone=undone,
        seconds=time.perf_counter() - start,
    )


def _whole_passes(refused: Mapping[str, str], attempt: Attempt) -> dict[str, str]:
    """Keys that leave out the passes of refused applications; not of lossy ones, which were asked for."""
    lossy = {record.name for record in attempt.records if record.kind == Kind.LOSSY.value}
    names = {key.partition(":")[0]: reason for key, reason in refused.items()}
    return {f"{name}:": reason for name, reason in names.items() if name not in lossy}


def _require_budget(plan: Plan, *, verify: bool, has_budget: bool) -> None:
    """Lossy passes need data to be judged on, and a limit that the user names."""
    lossy = [p.name for p in plan.make_passes() if p.kind is Kind.LOSSY]
    if not lossy:
        return
    if plan.feeds is None:
        raise BadInput(
            f"{lossy[0]} loses accuracy and needs data to be judged on", hint="give --calibration F.npz or a folder"
        )
    if not has_budget:
        raise BadInput(
            f"{lossy[0]} loses accuracy and no budget is given",
            hint="give --fail-if 'cosine<0.999' or --evaluate MODULE:FN --min X",
        )
    if not verify:
        raise BadInput(f"{lossy[0]} loses accuracy and cannot run with --no-verify")


def _measure(metric: gates.Metric, spec: str, source: Path, candidate: Path, minimum: float | None) -> dict[str, float]:
    from graphopt.runtime import load

    before = gates.evaluate(metric, load(source).run, spec)
    after = gates.evaluate(metric, load(candidate).run, spec)
    if minimum is not None and not (after >= minimum and math.isfinite(after)):
        raise GateFailed(
            f"the metric is {after:.6g}, below {minimum:.6g} (the original has {before:.6g})",
            where=f"--evaluate {spec}",
            hint="nothing was written",
        )
    return {"before": before, "after": after}


def _count_undone(records: Sequence[PassRecord], undone: Mapping[str, str]) -> None:
    for record in records:
        mine = [reason for key, reason in undone.items() if key.startswith(f"{record.name}:")]
        if mine:
            record.undone = len(mine)
            record.applications += len(mine)
            record.reason = "; ".join(filter(None, [record.reason, f"{len(mine)} undone: {mine[0]}"]))
