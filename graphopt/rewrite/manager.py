"""Runs passes in the order of their stages, and adds what passes do not contain: timing, memory, structure checks."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from graphopt import graphs
from graphopt.errors import GraphoptError
from graphopt.rewrite.application import Checkpoint
from graphopt.rewrite.context import Context
from graphopt.rewrite.contract import Kind, Pass, Stage
from graphopt.verification.structure import check_structure, interface_of, sort_if_needed

# A stage is repeated while it still finds something; elimination chains are short, and a pass that never settles
# must not hang the tool.
MAX_ROUNDS = 12


@dataclass
class PassRecord:
    """What one pass did in a run.

    Attributes:
        applications: Replacements that it tried.
        kept: Replacements in the result.
        undone: Replacements that verification took back.
        reason: Why applications were undone or not kept, in words; of a pass that did nothing, why most of the
            nodes that it nearly matched were left alone. What a pass remarks at the end stands here, too.
        seconds: Wall time.
        peak_bytes: The process's highest resident memory so far.
        nodes_before: Nodes when the pass first ran.
        nodes_after: The same less what this pass removed, in all its rounds (other passes run in between).
        error: The exception that ended the pass early, if one did.
        near_misses: Node -> why it nearly matched and did not.
    """

    name: str
    kind: str
    stage: str
    applications: int = 0
    kept: int = 0
    undone: int = 0
    reason: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    error: str = ""
    near_misses: dict[str, str] = field(default_factory=dict)


Progress = Callable[[str, float], None]


def run_passes(
    ctx: Context, passes: Sequence[Pass], *, check: bool = True, progress: Progress | None = None
) -> list[PassRecord]:
    """Run passes on a model: stages in order, each repeated until nothing changes, then elimination once more.

    Args:
        ctx: The model and its target.
        passes: In any order; the stage decides, then the order given.
        check: Whether to check the structure after each pass that changed something.
        progress: Called with a pass's name and its seconds.

    Returns:
        One record a pass, in the order in which they first ran.

    Raises:
        GraphoptError: A pass broke the structure of the graph (a bug in that pass).
    """
    ctx.passes = frozenset(p.name for p in passes)
    interface = interface_of(ctx.model)
    known = frozenset(check_structure(ctx.model)) if check else frozenset()  # no pass is to blame for these
    nodes = graphs.count_nodes(ctx.model)
    order = sorted(passes, key=lambda p: p.stage)
    records = {p.name: PassRecord(p.name, p.kind.value, p.stage.name.lower()) for p in order}
    by_stage = {stage: [p for p in order if p.stage is stage] for stage in Stage}

    def run_stage(stage: Stage) -> bool:
        changed = False
        for _ in range(MAX_ROUNDS):
            round_changed = False
            for p in by_stage[stage]:
                if not (p.patient and round_changed):
                    round_changed = run_one(p) or round_changed
            changed = changed or round_changed
            if round_changed:
                ctx.checkpoint(Checkpoint.ROUND_DONE)
            if not round_changed or stage is Stage.IMPORT:
                break
        return changed

    def run_one(p: Pass) -> bool:
        nonlocal nodes
        record = records[p.name]
        if not record.nodes_before:
            record.nodes_before = record.nodes_after = nodes
        before = len(ctx.applications)
        start = time.perf_counter()
        lossy = p.kind is Kind.LOSSY
        if lossy:
            ctx.checkpoint(Checkpoint.BEFORE_LOSSY)
        ctx.running(p)
        try:
            p.apply(ctx)
        except GraphoptError:
            raise
        except Exception as error:
            # Each replacement leaves a whole graph behind, so what was done before the error stands (and is verified).
            record.error = f"{type(error).__name__}: {error}"
        finally:
            ctx.running(None)
        made = len(ctx.applications) - before
        if made:
            sort_if_needed(ctx.model)
            if check and (problems := [line for line in check_structure(ctx.model, interface) if line not in known]):
                raise GraphoptError(
                    f"left a broken graph: {problems[0]}",
                    where=f"pass {p.name}",
                    hint=f"leave it out with --set {p.name}.enabled=false, and report it",
                )
            if lossy:
                ctx.checkpoint(Checkpoint.AFTER_LOSSY)
        record.seconds += time.perf_counter() - start
        record.applications += made
        record.kept += made
        record.peak_bytes = peak_rss()
        if made:
            left = graphs.count_nodes(ctx.model)
            record.nodes_after += left - nodes
            nodes = left
        if progress is not None:
            progress(p.name, record.seconds)
        return made > 0

    changed_later = False
    for stage in Stage:
        changed = run_stage(stage)
        changed_later = changed_later or (changed and stage > Stage.ELIMINATE)
    if changed_later:
        run_stage(Stage.ELIMINATE)

    for p in order:
        record = records[p.name]
        record.near_misses = ctx.near_misses.get(p.name, {})
        if ctx.not_cheaper[p.name]:
            record.reason = f"{ctx.not_cheaper[p.name]} not cheaper on {ctx.target.name}"
        elif not record.applications:
            record.reason = most_frequent(record.near_misses.values())
        if remark := p.remark(ctx):
            record.reason = "; ".join(filter(None, (record.reason, remark)))
    return list(records.values())


def most_frequent(reasons: Iterable[str]) -> str:
    """The reason given most often, without the name that it may begin with (``w: too small``); "" where there is none.

    Of several that are given equally often the first one wins.
    """
    counted = Counter(re.sub(r"^[^\s:]+: ", "", reason) for reason in reasons)
    if not counted:
        return ""
    (reason, _), *others = counted.most_common()
    return f"mostly: {reason}" if others else reason


def peak_rss() -> int:
    """The highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_seconds(records: Iterable[PassRecord]) -> float:
    """Wall time of all passes."""
    return sum(record.seconds for record in records)
