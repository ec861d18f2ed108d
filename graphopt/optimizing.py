"""The main job: read a model, rewrite it, prove that it still computes the same, write it.

A run is repeated from the original until verification has nothing to say against it: an application that a check
refuses is put on a skip list, and the passes run again without it. They are deterministic, so the rest stays the same.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt import garbage, gates, graphs
from graphopt.errors import BadInput, GateFailed
from graphopt.files import load_model, stage_model
from graphopt.numerics.blas import single_threaded_blas
from graphopt.recipes import load_recipes, passes_of
from graphopt.report import ModelFacts, Report, Verification, environment, facts
from graphopt.rewrite.context import Application, Context
from graphopt.rewrite.contract import Kind, Pass
from graphopt.rewrite.manager import PassRecord, run_passes
from graphopt.runtime.session import import_soon
from graphopt.shapes import infer_shapes
from graphopt.targets import Target, load_target

if TYPE_CHECKING:
    from concurrent.futures import Future

    from graphopt.verification.replacements import Judgement, Span, Watch
    from graphopt.verification.whole import Reference

# How often a run may be repeated without what was refused. Each repetition skips at least one application.
MAX_ATTEMPTS = 12
CALIBRATION_CASES = 4

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What the user asked for, read and checked.

    Attributes:
        source: The model.
        target: What the result runs on.
        make_passes: Makes the passes anew: a pass may keep state while it runs.
        feeds: Calibration cases; None where there are none.
        custom_ops: A library of custom operators.
    """

    source: Path
    target: Target
    make_passes: Callable[[], list[Pass]]
    feeds: Sequence[Mapping[str, Any]] | None = None
    custom_ops: Path | None = None


@dataclass
class Attempt:
    """One run of the passes."""

    model: ir.Model
    context: Context
    records: list[PassRecord]
    watch: Watch | None

    @property
    def bitwise(self) -> bool:
        """Whether everything that was done promises the same bits."""
        return all(a.kind is Kind.BITWISE for a in self.context.applications)

    @property
    def lossy(self) -> bool:
        """Whether something that was done loses accuracy by intention."""
        return any(a.kind is Kind.LOSSY for a in self.context.applications)


@dataclass
class _Checked:
    """The outcome of checking one attempt: a verification, or what to leave out next time."""

    verification: Verification
    refused: dict[str, str] = field(default_factory=dict)


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
    )
    _require_budget(plan, verify=verify, has_budget=bool(conditions) or minimum is not None)

    undone: dict[str, str] = {}
    size = 0
    reused: ir.Model | None = model
    for _ in range(MAX_ATTEMPTS):
        attempt = run_attempt(plan, skip=undone, model=reused, watch=verify, progress=say)
        reused = None
        gates.require_lossy_effect(attempt.records, undone, str(source))
        say("writing")
        with stage_model(attempt.model, destination) as staged:
            if not verify:
                verification = Verification()
                checked = _Checked(verification)
            else:
                say("verifying")
                with single_threaded_blas():
                    checked = check(plan, attempt, staged.staged_path)
            if checked.refused:
                undone.update(checked.refused)
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


def run_attempt(
    plan: Plan,
    *,
    skip: Mapping[str, str] | None = None,
    limit: int | None = None,
    model: ir.Model | None = None,
    watch: bool = True,
    progress: Progress | None = None,
) -> Attempt:
    """Run the passes once on a fresh copy of the model.

    Args:
        plan: What to do.
        skip: Application keys to leave out.
        limit: Make only the first so many applications.
        model: The model, if it was loaded already and not changed.
        watch: Whether to watch the passes for T1.
        progress: Told the name of each pass.
    """
    if model is None:
        model = load_model(plan.source)
    declared = {output for node in graphs.all_nodes(model) for output in node.outputs if output.type is not None}
    untyped = [(g, i) for g in graphs.all_graphs(model) for i, output in enumerate(g.outputs) if output.type is None]
    infer_shapes(model)
    watching = _watch(model, plan) if watch else None
    context = Context(
        model,
        plan.target,
        skip=(skip or {}).keys(),
        observers=[] if watching is None else [watching.shadow],
        limit=limit,
        feeds=plan.feeds,
    )
    passes = plan.make_passes()
    told = None if progress is None else (lambda name, seconds: progress(f"{name} ({seconds:.1f} s)"))
    records = run_passes(context, passes, progress=told)
    if watching is not None:
        watching.close()
    _forget_inferred(model, declared, untyped)
    return Attempt(model, context, records, watching)


def _watch(model: ir.Model, plan: Plan) -> Watch:
    from graphopt.verification.replacements import Watch

    return Watch(model, plan.custom_ops)


def _forget_inferred(model: ir.Model, declared: set[ir.Value], untyped: Sequence[tuple[ir.Graph, int]]) -> None:
    """Take away the types and shapes that only inference gave, so that the file holds what its author put there."""
    for node in graphs.all_nodes(model):
        for value in node.outputs:
            if value not in declared and not value.is_graph_output():
                value.type = None
                value.shape = None
    for graph, index in untyped:  # outputs of bodies, which may leave their types to the node that has them
        if index < len(graph.outputs):
            graph.outputs[index].type = None
            graph.outputs[index].shape = None


def check(plan: Plan, attempt: Attempt, candidate: Path) -> _Checked:
    """T1 to T3 on one attempt.

    Args:
        plan: What was asked for.
        attempt: The rewritten model, and its shadow.
        candidate: The same model as written.
    """
    from graphopt.verification.replacements import Span

    start = time.perf_counter()
    assert attempt.watch is not None
    sessions = _open_candidate(candidate, plan.custom_ops)
    judgement = attempt.watch.judge(feed_source(plan), source=plan.source, bitwise=attempt.bitwise)
    if judgement.failed:
        return _Checked(Verification(), judgement.failed)
    reference = judgement.reference
    outcome = check_whole(
        plan, reference, candidate, bitwise=attempt.bitwise, measure_only=attempt.lossy, sessions=sessions
    )
    verification = outcome.verification
    whole = Span(reference, 0, None, attempt.bitwise, outcome.reason)
    for span in [*judgement.spans, whole]:
        if span.ends_at is None and span is not whole:
            # Compared with the optimizations off: as deployed the file has been compared with the original.
            kinds = [application.kind for application in attempt.context.applications[span.begins_at :]]
            if not kinds:
                continue
            span.bitwise = all(kind is Kind.BITWISE for kind in kinds)
            span.reason = why_not_same(plan, span.reference, candidate, bitwise=span.bitwise)
        if span.reason is None:
            continue
        culprit = _culprit(plan, span, attempt)
        if culprit is None:
            raise GateFailed(
                span.reason, where=str(plan.source), hint="no single rewrite is to blame; nothing was written"
            )
        return _Checked(verification, {culprit.key: span.reason})
    _describe_coverage(verification, plan, attempt, judgement)
    verification.seconds = time.perf_counter() - start
    if verification.coverage["vacuous"] and len(verification.coverage["vacuous"]) == len(
        judgement.reference.model.graph.outputs
    ):
        raise GateFailed(
            "verification is vacuous: every output is constant, or nowhere finite, on all inputs tried",
            where=str(plan.source),
            hint="give real inputs with --calibration, or skip the check with --no-verify",
        )
    return _Checked(verification)


@dataclass
class WholeCheck:
    """T2 and T3 on a file: distances, and why it does not count as the same (None where it does)."""

    verification: Verification
    reason: str | None
    differences: list[str] = field(default_factory=list)


def check_whole(
    plan: Plan,
    reference: Reference,
    candidate: Path,
    *,
    bitwise: bool,
    measure_only: bool = False,
    sessions: Mapping[bool, Future[Any]] | None = None,
) -> WholeCheck:
    """T2 and T3: the file with the runtime's optimizations off, and as deployed.

    Args:
        plan: For the custom operator library.
        reference: The original's results.
        candidate: The file.
        bitwise: Whether T2 asks for the same bits.
        measure_only: Whether differences that have a distance count only as that (lossy; the user's budget decides).
        sessions: Sessions of the file that are being made already, by whether they are as deployed.
    """
    from graphopt.verification.whole import compare

    verification = Verification(cases=len(reference.feeds))
    found: list[str] = []
    for deployed in (False, True):
        session = (sessions or {}).get(deployed)
        results = run_file(candidate, reference, plan.custom_ops, deployed=deployed, session=session)
        if results is None:
            continue
        differences, worst = compare(reference, results, bitwise=bitwise and not deployed, deployed=deployed)
        verification.max_abs = max(verification.max_abs, worst.max_abs)
        verification.max_rel = max(verification.max_rel, worst.max_rel)
        verification.cosine_min = min(verification.cosine_min, worst.cosine_min)
        found.extend(str(difference) for difference in differences if not (measure_only and difference.measured))
    reason = found[0] if found else None
    passed = "within budget" if measure_only else "passed"
    verification.verdict = passed if reason is None else "failed"
    return WholeCheck(verification, reason, found)


def why_not_same(plan: Plan, reference: Reference, candidate: Path, *, bitwise: bool) -> str | None:
    """T2 alone: why a file, with the runtime's optimizations off, does not count as the same; None where it does."""
    from graphopt.verification.whole import compare

    results = run_file(candidate, reference, plan.custom_ops, deployed=False)
    assert results is not None
    differences, _ = compare(reference, results, bitwise=bitwise)
    return str(differences[0]) if differences else None


# Sessions of a file are made side by side where its weights fit into memory several times.
_SIDE_BY_SIDE_BYTES = 1 << 28


def _open_candidate(candidate: Path, custom_ops: Path | None) -> dict[bool, Future[Any]]:
    """Begin to load a small file as deployed and with the optimizations off, while T1 is at work."""
    from graphopt.runtime.session import create_session_soon

    if sum(file.stat().st_size for file in candidate.parent.iterdir()) > _SIDE_BY_SIDE_BYTES:
        return {}
    return {
        deployed: create_session_soon(candidate, optimized=deployed, threads=1, custom_ops=custom_ops)
        for deployed in (False, True)
    }


def run_file(
    path: Path,
    reference: Reference,
    custom_ops: Path | None,
    *,
    deployed: bool,
    session: Future[Any] | None = None,
) -> list[dict[str, Any]] | None:
    """Run a file on the reference's cases. None: as deployed it cannot run here (it needs a float32 twin).

    Args:
        path: The file.
        reference: For the cases, and what it took to run the original.
        custom_ops: A library of custom operators.
        deployed: Whether the runtime's optimizations are on.
        session: A session of the file that is being made already.
    """
    from graphopt.runtime.session import create_session
    from graphopt.verification import runnable
    from graphopt.verification.whole import run_case, session_for

    if reference.preparation.needed:
        if deployed and reference.preparation.twin:
            return None
        model = load_model(path)
        infer_shapes(model)
        runnable.prepare(model, has_custom_ops=custom_ops is not None)
        made = session_for(model, optimized=deployed, custom_ops=custom_ops)
    elif session is not None:
        made = session.result()
    else:
        made = create_session(path, optimized=deployed, threads=1, custom_ops=custom_ops)
    return [run_case(made, case) for case in reference.feeds]


def _culprit(plan: Plan, span: Span, attempt: Attempt) -> Application | None:
    """The first application without which everything before it passes and with which it does not, by bisection."""
    import tempfile

    applications = attempt.context.applications
    is_whole = span.begins_at == 0 and span.ends_at is None

    def passes(count: int) -> bool:
        trial = run_attempt(plan, skip=dict.fromkeys(attempt.context.skip, ""), limit=count, watch=False)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            target = Path(folder) / "candidate.onnx"
            with stage_model(trial.model, target) as staged:
                if is_whole:
                    outcome = check_whole(
                        plan, span.reference, staged.staged_path, bitwise=trial.bitwise, measure_only=trial.lossy
                    )
                    return outcome.reason is None
                return why_not_same(plan, span.reference, staged.staged_path, bitwise=span.bitwise) is None

    low, high = span.begins_at, len(applications) if span.ends_at is None else span.ends_at
    if low == high or not passes(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return applications[high - 1]


def feed_source(plan: Plan) -> Callable[[ir.Model, Callable[[Mapping[str, Any]], object]], list[Mapping[str, Any]]]:
    """What makes the cases: the first few of the user's, else synthesised ones that the model runs on."""

    def make(model: ir.Model, run: Callable[[Mapping[str, Any]], object]) -> list[Mapping[str, Any]]:
        from graphopt.feeds import feeds_that_run

        if plan.feeds is not None:
            cases = [plan.feeds[index] for index in range(min(CALIBRATION_CASES, len(plan.feeds)))]
            return [{**_for_opaque(model, case, seed), **case} for seed, case in enumerate(cases)]
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
    from graphopt.calibration import read_calibration

    return read_calibration(Path(calibration), list(model.graph.inputs))


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


def _describe_coverage(verification: Verification, plan: Plan, attempt: Attempt, judgement: Judgement) -> None:
    reference = judgement.reference
    verification.coverage = {
        # What removes dead code replaces nothing: there is nothing to compare.
        "applications": sum(1 for a in attempt.context.applications if a.outputs),
        "checked_alone": judgement.checked,
        "outputs": len(reference.model.graph.outputs),
        "vacuous": reference.vacuous(),
        "opaque": reference.preparation.opaque,
        "unchecked": reference.preparation.dropped,
        "reference": reference.yardstick,
        "random": reference.random,
        "twin": reference.preparation.twin,
        "feeds": "synthesised" if plan.feeds is None else "calibration",
    }


def _count_undone(records: Sequence[PassRecord], undone: Mapping[str, str]) -> None:
    for record in records:
        mine = [reason for key, reason in undone.items() if key.startswith(f"{record.name}:")]
        if mine:
            record.undone = len(mine)
            record.applications += len(mine)
            record.reason = "; ".join(filter(None, [record.reason, f"{len(mine)} undone: {mine[0]}"]))
