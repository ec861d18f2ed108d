"""The main job: read a model, rewrite it, prove that it still computes the same, write it.

A run is repeated from the original until verification has nothing to say against it: an application that a check
refuses is put on a skip list, and the passes run again without it. They are deterministic, so the rest stays the same.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt import garbage, gates, graphs
from graphopt.attempts import Attempt, Plan, Progress, run_attempt
from graphopt.bundles.folder import StagedBundle, check_bundle_target, stage_bundle
from graphopt.bundles.making import BundleFacts, make_parts, write_profile
from graphopt.cases import read_feeds
from graphopt.checking import Checked, check, check_bundle
from graphopt.errors import BadInput, GateFailed
from graphopt.files import StagedSave, load_model, stage_model
from graphopt.files.folder import bytes_in, check_target
from graphopt.numerics.blas import single_threaded_blas
from graphopt.recipes import load_recipes, passes_of
from graphopt.report import ModelFacts, Report, Verification, environment, facts
from graphopt.rewrite.contract import Kind
from graphopt.rewrite.manager import PassRecord
from graphopt.runtime.session import import_soon
from graphopt.specialising import Tried, try_lines
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
    recipe: str | Sequence[str] = ("safe",),
    settings: str | Sequence[str] = (),
    calibration: str | Path | None = None,
    target: str = "onnxruntime",
    verify: bool = True,
    custom_ops: str | Path | None = None,
    evaluate: str | gates.Metric | None = None,
    minimum: float | None = None,
    fail_if: str | Sequence[str] = (),
    work: str | Path | None = None,
    per_sample: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Rewrite a model, verify it, and write it.

    Args:
        path: The ``.onnx`` file.
        out: Where to write; default: ``NAME.opt.onnx`` beside it, ``NAME.bundle`` with a recipe that makes a bundle.
        recipe: Names of recipes or YAML files, one or several; they compose.
        settings: ``PASS.KEY=VALUE`` each; override the recipes.
        calibration: An ``.npz`` (one array an input, first axis the samples) or a folder (one ``.npz`` a feed).
        target: What the result is to run on.
        verify: False skips T1 to T3; the structure is checked all the same.
        custom_ops: A shared library of ONNX Runtime custom operators.
        evaluate: The user's metric: ``MODULE:FN`` or a function, FN(run) -> float.
        minimum: The least value of that metric.
        fail_if: Conditions such as ``cosine<0.999`` under which nothing is written.
        work: A folder for results of long computations on weights: a run that was interrupted goes on from there.
        per_sample: Whether each sample of a bundle goes its own way; those that are done leave the batch.
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
    recipes = load_recipes(recipe)
    bundle = any(found.bundle for found in recipes)
    if per_sample and not bundle:
        raise BadInput("--per-sample makes a bundle", hint="add --recipe static")
    destination = _destination(source, out, bundle)
    say("reading")
    if verify:
        import_soon()
    model = load_model(source)
    before = facts(model, source)
    conditions = gates.parse_conditions(fail_if)
    spec = evaluate if isinstance(evaluate, str) else "the given function"
    metric = gates.load_function(evaluate, "--evaluate") if isinstance(evaluate, str) else evaluate
    if minimum is not None and metric is None:
        raise BadInput("--min needs --evaluate MODULE:FN")
    if conditions and not verify:
        raise BadInput(f"--fail-if {conditions[0].text} has nothing to go by with --no-verify")
    feeds = read_feeds(calibration, model)
    plan = Plan(
        source,
        load_target(target),
        lambda: passes_of(recipes, settings),
        feeds,
        Path(custom_ops) if custom_ops is not None else None,
        Store(Path(work) if work is not None else None),
        bundle,
    )
    _require_budget(plan, verify=verify, has_budget=bool(conditions) or minimum is not None)

    undone: dict[str, str] = {}
    size = 0
    made: BundleFacts | None = None
    reused: ir.Model | None = model
    for number in range(MAX_ATTEMPTS):
        attempt = run_attempt(plan, skip=undone, model=reused, watch=verify, progress=say)
        reused = None
        gates.require_lossy_effect(attempt.records, undone, str(source))
        say("writing")
        with ExitStack() as stack:
            staged = stack.enter_context(stage_model(attempt.model, _whole(destination, bundle)))
            result: StagedSave | StagedBundle = staged
            path = staged.staged_path
            if not verify:
                verification = Verification()
                checked = Checked(verification)
            else:
                say("verifying")
                with single_threaded_blas():
                    checked = check(plan, attempt, path)
            if bundle and not checked.refused:
                say("splitting")
                parts, made = make_parts(load_model(path), plan.target, per_sample=per_sample)
                split_up = stack.enter_context(stage_bundle(parts, destination))
                result, path = split_up, split_up.path
                if verify:
                    say("verifying the bundle")
                    with single_threaded_blas():
                        checked = check_bundle(plan, attempt, checked, path, say)
                    if plan.feeds is not None and not checked.refused and not checked.needs_preparation:
                        if not per_sample:
                            tried = _try_lines(plan, attempt, checked, staged, split_up, destination, stack, say)
                            made = tried.facts or made
                            made.trials = tried.trials
                            result = split_up = tried.bundle or split_up
                            path = split_up.path
                        say("counting")
                        write_profile(split_up, plan.feeds, plan.custom_ops, made.trials)
                made.bytes = bytes_in(split_up.version)
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
                verification.metric = _measure(metric, spec, source, path, minimum)
            if conditions and verification.coverage["random"]:
                raise GateFailed(
                    "the model draws random numbers, so there is nothing to measure",
                    where=f"--fail-if {conditions[0].text}",
                    hint="nothing was written",
                )
            for condition in conditions:
                condition.check(verification)
            size = made.bytes if made is not None else bytes_in(path.parent)
            result.commit()
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
        bundle=made,
    )


def _try_lines(
    plan: Plan,
    attempt: Attempt,
    checked: Checked,
    whole: StagedSave,
    generic: StagedBundle,
    destination: Path,
    stack: ExitStack,
    say: Progress,
) -> Tried:
    """Try straight lines for the paths that the user's inputs often take."""
    assert plan.feeds is not None

    def load() -> ir.Model:
        model = load_model(whole.staged_path)
        graphs.name_control_flow(model)
        return model

    def verify(bundle: Path) -> bool:
        with single_threaded_blas():
            return not check_bundle(plan, attempt, checked, bundle, say).refused

    return try_lines(
        load,
        generic,
        lambda parts: stack.enter_context(stage_bundle(parts, destination)),
        plan.target,
        plan.feeds,
        verify,
        custom_ops=plan.custom_ops,
        say=say,
    )


def _destination(source: Path, out: str | Path | None, bundle: bool) -> Path:
    """Where the result goes; refused where it cannot be written, before anything is done."""
    name = f"{source.stem}.bundle" if bundle else f"{source.stem}.opt.onnx"
    destination = source.with_name(name) if out is None else Path(out)
    if bundle:
        check_bundle_target(destination)
    else:
        check_target(destination)
    return destination


def _whole(destination: Path, bundle: bool) -> Path:
    """Where the model in one file is staged; that of a bundle is not put in place."""
    return destination.with_name(f"{destination.name}.onnx") if bundle else destination


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
