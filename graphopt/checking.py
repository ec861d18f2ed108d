"""Checks one attempt, T1 to T3, and finds which application is to blame where only the whole model shows a fault."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.attempts import Attempt, Plan, run_attempt
from graphopt.bundles.forcing import force
from graphopt.cases import feed_source
from graphopt.errors import GateFailed, GraphoptError
from graphopt.files import load_model, stage_model
from graphopt.report import Verification
from graphopt.rewrite.application import Application
from graphopt.rewrite.contract import Kind
from graphopt.runtime.ending import limit_of, under
from graphopt.shapes import infer_shapes

if TYPE_CHECKING:
    from concurrent.futures import Future

    from graphopt.verification.replacements import Span
    from graphopt.verification.whole import Reference

# What a small model will need is begun early, side by side: its weights fit into memory several times.
_SIDE_BY_SIDE_BYTES = 1 << 28


@dataclass
class Checked:
    """The outcome of checking one attempt: a verification, or what to leave out next time.

    Attributes:
        verification: What was found.
        refused: Application key -> why it is to be left out.
        reference: What the original computes.
    """

    verification: Verification
    refused: dict[str, str] = field(default_factory=dict)
    reference: Reference | None = None

    @property
    def needs_preparation(self) -> bool:
        """Whether the model as it is does not run here."""
        return self.reference is not None and self.reference.preparation.needed


@dataclass
class WholeCheck:
    """T2 and T3 on a file: distances, and why it does not count as the same (None where it does)."""

    verification: Verification
    reason: str | None
    differences: list[str] = field(default_factory=list)


def check(plan: Plan, attempt: Attempt, candidate: Path) -> Checked:
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
    exact_soon = bool(sessions) and not attempt.bitwise  # the same bits need no yardstick
    judgement = attempt.watch.judge(
        feed_source(plan), made_up=plan.feeds is None, source=plan.source, exact_soon=exact_soon
    )
    if judgement.failed:
        return Checked(Verification(), judgement.failed)
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
        return Checked(verification, {culprit.key: span.reason})
    verification.coverage = {
        # What removes dead code replaces nothing: there is nothing to compare.
        "applications": sum(1 for a in attempt.context.applications if a.outputs),
        "checked_alone": judgement.checked,
        **coverage_of(plan, reference),
    }
    verification.seconds = time.perf_counter() - start
    if says_nothing(verification.coverage):
        raise GateFailed(
            "verification is vacuous: every output is constant, or nowhere finite, on all inputs tried",
            where=str(plan.source),
            hint="give real inputs with --calibration, or skip the check with --no-verify",
        )
    return Checked(verification, reference=reference)


def check_bundle(plan: Plan, attempt: Attempt, checked: Checked, bundle: Path, say: Callable[[str], None]) -> Checked:
    """T3 on a bundle: on the cases, and sent every way that it and the original can go.

    Args:
        plan: What was asked for.
        attempt: The rewritten model.
        checked: What `check` found of the same model in one file.
        bundle: Its folder.
        say: Is told what is being done.
    """
    from graphopt.bundles.rehearsal import rehearse
    from graphopt.verification.replacements import Span

    start = time.perf_counter()
    assert checked.reference is not None
    outcome = rehearse(
        checked.reference,
        plan.load_typed,
        bundle,
        bitwise=attempt.bitwise,
        measure_only=attempt.lossy,
        say=say,
    )
    if outcome.differences:
        first = outcome.differences[0]
        if outcome.at is not None:
            # Did a rewrite do it, where the inputs alone did not lead?
            culprit = _culprit(plan, Span(outcome.at, 0, None, attempt.bitwise, first), attempt)
            if culprit is not None:
                return Checked(checked.verification, {culprit.key: first})
        raise GateFailed(f"the bundle is not the same: {first}", where=str(plan.source), hint="nothing was written")
    verification = checked.verification
    verification.add(**dataclasses.asdict(outcome.worst))
    verification.coverage["ways"] = dataclasses.asdict(outcome.ways)
    verification.seconds += time.perf_counter() - start
    return checked


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
        try:
            results = run_file(candidate, reference, plan.custom_ops, deployed=deployed, session=session)
        except GraphoptError as error:
            found.append(f"it fails{', with the optimizations on' if deployed else ''}: {error.what}")
            break
        if results is None:
            continue
        differences, worst = compare(reference, results, bitwise=bitwise and not deployed, deployed=deployed)
        verification.add(**dataclasses.asdict(worst))
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

    if reference.preparation.needed or reference.forced:
        if deployed and reference.preparation.twin:
            return None
        model = load_model(path)
        infer_shapes(model)
        if reference.forced:
            force(model)
        runnable.prepare(model, has_custom_ops=custom_ops is not None)
        made = session_for(model, optimized=deployed, custom_ops=custom_ops)
    elif session is not None:
        made = session.result()
    else:
        made = create_session(path, optimized=deployed, threads=1, custom_ops=custom_ops)
    with under(reference.limit):
        return [run_case(made, case) for case in reference.feeds]


def _culprit(plan: Plan, span: Span, attempt: Attempt) -> Application | None:
    """The first application without which everything before it passes and with which it does not, by bisection."""
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


def reference_of(plan: Plan, original: ir.Model) -> Reference:
    """The original's results on the plan's cases.

    Args:
        plan: For the cases and the custom operator library.
        original: Typed as far as inference gets; made runnable in place where it is not.
    """
    from graphopt.verification import runnable
    from graphopt.verification.whole import make_reference, narrow_feeds, run_case, session_for

    preparation = runnable.prepare(original, has_custom_ops=plan.custom_ops is not None)
    session = session_for(original, custom_ops=plan.custom_ops)
    with under(limit_of(original, made_up=plan.feeds is None)):
        given = feed_source(plan)(original, lambda case: run_case(session, narrow_feeds([case], preparation)[0]))
        return make_reference(
            original,
            narrow_feeds(given, preparation),
            custom_ops=plan.custom_ops,
            session=session,
            preparation=preparation,
            source=plan.source,
        )


def coverage_of(plan: Plan, reference: Reference) -> dict[str, Any]:
    """What the cases show of the model, and what they do not. After the last comparison: it settles the yardstick."""
    return {
        "outputs": len(reference.model.graph.outputs),
        "vacuous": reference.vacuous(),
        "opaque": reference.preparation.opaque,
        "unchecked": reference.preparation.dropped,
        "reference": reference.yardstick,
        "random": reference.random,
        "twin": reference.preparation.twin,
        "feeds": "synthesised" if plan.feeds is None else "calibration",
        "endless": reference.endless,
    }


def says_nothing(coverage: Mapping[str, Any]) -> bool:
    """Whether no output shows anything."""
    return bool(coverage["vacuous"]) and len(coverage["vacuous"]) == coverage["outputs"]
