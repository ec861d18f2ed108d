"""T1: judges every replacement by itself, on the values that the original has there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite.contract import Kind
from graphopt.verification import exact, runnable
from graphopt.verification.shadow import Pair, Shadow, Surface
from graphopt.verification.tolerance import is_float, same_bits, why_different, within_eps
from graphopt.verification.whole import Reference, make_reference, narrow_feeds, run_case, session_for


@dataclass
class Judgement:
    """What T1 found.

    Attributes:
        reference: The original's results for the cases, from the same run.
        failed: Application key -> why it does not compute the same.
        checked: How many applications were judged by themselves.
        unchecked: Keys of applications that only the whole model can judge: in bodies of Loop and Scan, in functions.
    """

    reference: Reference
    failed: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    unchecked: list[str] = field(default_factory=list)


MakeFeeds = Callable[[ir.Model, Callable[[Mapping[str, Any]], object]], Sequence[Mapping[str, Any]]]


def judge(shadow: Shadow, make_feeds: MakeFeeds, *, custom_ops: Path | None = None) -> Judgement:
    """Run the shadow on every case and compare each replaced value with its replacement.

    Args:
        shadow: Changed: sorted, values brought out of branches.
        make_feeds: Gives the cases, from the original and a function that runs it once.
        custom_ops: A library of custom operators.
    """
    shadow.finish()
    preparation = runnable.prepare(shadow.model, has_custom_ops=custom_ops is not None)
    surface = Surface(shadow.model)
    shown: list[tuple[Pair, ir.Value, ir.Value, dict[ir.Value, ir.Value]]] = []
    unchecked: dict[str, None] = {}
    alive = {value for node in shadow.model.graph for value in node.outputs}
    alive.update(shadow.model.graph.inputs)
    alive.update(shadow.model.graph.initializers.values())

    def bring_out(value: ir.Value) -> ir.Value | None:
        return value if graphs.is_constant(value) else surface.bring_out(value)

    def visible(value: ir.Value) -> bool:
        return value in alive or value in surface.added or graphs.is_constant(value)

    for pair in shadow.pairs:
        original, replacement = bring_out(pair.original), bring_out(pair.replacement)
        if original is None or replacement is None or not visible(original) or not visible(replacement):
            unchecked[pair.application.key] = None
            continue
        boundary: dict[ir.Value, ir.Value] = {}
        if pair.application.kind is Kind.ROUNDING:
            for value in pair.boundary:
                shown_as = bring_out(value)
                if shown_as is not None:
                    boundary[value] = shown_as
        shown.append((pair, original, replacement, boundary))

    wanted = dict.fromkeys(
        v for _, o, r, b in shown for v in (o, r, *b.values()) if v.producer() is not None and not graphs.is_constant(v)
    )
    session = session_for(shadow.model, custom_ops=custom_ops, outputs=list(wanted))
    own = [value.name or "" for value in shadow.model.graph.outputs]
    given = make_feeds(shadow.model, lambda case: run_case(session, narrow_feeds([case], preparation)[0], own))
    feeds = narrow_feeds(given, preparation)
    reference = make_reference(shadow.model, feeds, custom_ops=custom_ops, session=session, preparation=preparation)
    verdict = Judgement(reference, unchecked=list(unchecked))
    if reference.random or not shown:
        return verdict
    names = [value.name or "" for value in wanted]
    judged: set[str] = set()
    for case in feeds:
        results = run_case(session, case, names)
        values = {value: results[value.name or ""] for value in wanted}
        for value in shadow.model.graph.inputs:
            if value.name in case:
                values[value] = case[value.name]
        for pair, original, replacement, boundary in shown:
            key = pair.application.key
            if key in verdict.failed:
                continue
            if _branch_not_taken(original, replacement, surface, values):
                continue
            judged.add(key)
            reason = _judge_pair(shadow, pair, original, replacement, boundary, values)
            if reason is not None:
                verdict.failed[key] = reason
    verdict.unchecked.extend(sorted({pair.application.key for pair, *_ in shown} - judged - unchecked.keys()))
    verdict.checked = len(judged - unchecked.keys())
    return verdict


def _branch_not_taken(original: ir.Value, replacement: ir.Value, surface: Surface, values: dict[ir.Value, Any]) -> bool:
    """Whether a value in a branch was replaced by a constant, and the branch did not run: it shows nothing then."""
    if not graphs.is_constant(replacement) or original not in surface.added:
        return False
    return np.shape(values[original]) == (0,)


def _judge_pair(
    shadow: Shadow,
    pair: Pair,
    original: ir.Value,
    replacement: ir.Value,
    boundary: dict[ir.Value, ir.Value],
    values: dict[ir.Value, Any],
) -> str | None:
    before, after = _value(original, values), _value(replacement, values)
    if not isinstance(before, np.ndarray) or not isinstance(after, np.ndarray):
        return None  # sequences and optionals: the whole model judges them
    if pair.application.kind is Kind.LOSSY or same_bits(before, after):
        return None
    bitwise = pair.application.kind is Kind.BITWISE
    comparable = before.shape == after.shape and before.dtype == after.dtype and is_float(before)
    if bitwise or not comparable or within_eps(after, before):
        return why_different(after, before, bitwise=bitwise)
    precise = None
    try:
        known = {value: np.asarray(_value(shown_as, values)) for value, shown_as in boundary.items()}
        precise = exact.evaluate_between(shadow.model, known, pair.original)
    except exact.NotExact:
        pass
    return why_different(after, before, exact=precise)


def _value(value: ir.Value, values: dict[ir.Value, Any]) -> Any:
    if value in values:
        return values[value]
    tensor = graphs.constant_tensor(value)
    assert tensor is not None, f"{value.name} was not returned"
    return tensor.numpy()
