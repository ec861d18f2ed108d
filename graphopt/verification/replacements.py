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
from graphopt.verification.shadow import Epoch, Pair, Shadow, Surface
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


def judge(
    shadow: Shadow, make_feeds: MakeFeeds, *, custom_ops: Path | None = None, source: Path | None = None
) -> Judgement:
    """Run the shadow on every case and compare each replaced value with its replacement.

    Args:
        shadow: Changed: sorted, values brought out of branches.
        make_feeds: Gives the cases, from the original and a function that runs it once.
        custom_ops: A library of custom operators.
        source: The original's file, where it has one.
    """
    shadow.finish()
    preparations = [runnable.prepare(epoch.model, has_custom_ops=custom_ops is not None) for epoch in shadow.epochs]
    views = [_View(epoch, custom_ops) for epoch in shadow.epochs]
    first, preparation = views[0], preparations[0]
    model = first.epoch.model
    own = [value.name or "" for value in model.graph.outputs]
    given = make_feeds(model, lambda case: run_case(first.session, narrow_feeds([case], preparation)[0], own))
    feeds = narrow_feeds(given, preparation)
    reference = make_reference(
        model, feeds, custom_ops=custom_ops, session=first.session, preparation=preparation, source=source
    )
    verdict = Judgement(reference, unchecked=list(shadow.unknown))
    judged: set[str] = set()
    for view, prepared in zip(views, preparations, strict=True):
        if (prepared.twin, prepared.opaque) == (preparation.twin, preparation.opaque):
            verdict.unchecked.extend(view.unchecked)
            for case in feeds if view.shown else ():
                view.judge(case, verdict.failed, judged)
    seen = [pair.application.key for view in views for pair, *_ in view.shown]
    verdict.unchecked.extend(dict.fromkeys(key for key in seen if key not in judged))
    verdict.unchecked = list(dict.fromkeys(verdict.unchecked))
    verdict.checked = len(judged.difference(verdict.unchecked))
    return verdict


class _View:
    """One epoch of a shadow, and a session that returns what was replaced there and what took its place."""

    def __init__(self, epoch: Epoch, custom_ops: Path | None) -> None:
        self.epoch = epoch
        self.surface = Surface(epoch.model)
        self.shown: list[tuple[Pair, ir.Value, ir.Value, dict[ir.Value, ir.Value]]] = []
        self.unchecked: dict[str, None] = {}
        self._alive = {value for node in epoch.model.graph for value in node.outputs}
        self._alive.update(epoch.model.graph.inputs)
        self._alive.update(epoch.model.graph.initializers.values())
        for pair in epoch.pairs:
            self._show(pair)
        returned = dict.fromkeys(v for _, o, r, b in self.shown for v in (o, r, *b.values()))
        self._wanted = [v for v in returned if v.producer() is not None and not graphs.is_constant(v)]
        self.session = session_for(epoch.model, custom_ops=custom_ops, outputs=self._wanted)

    def _show(self, pair: Pair) -> None:
        original, replacement = self._bring_out(pair.original), self._bring_out(pair.replacement)
        if original is None or replacement is None or pair.random:
            self.unchecked[pair.application.key] = None
            return
        boundary: dict[ir.Value, ir.Value] = {}
        if pair.application.kind is Kind.ROUNDING:
            for value in pair.boundary:
                shown_as = self._bring_out(value)
                if shown_as is not None:
                    boundary[value] = shown_as
        self.shown.append((pair, original, replacement, boundary))

    def _bring_out(self, value: ir.Value) -> ir.Value | None:
        if graphs.is_constant(value):
            return value
        found = self.surface.bring_out(value)
        return found if found is not None and (found in self._alive or found in self.surface.added) else None

    def judge(self, case: Mapping[str, Any], failed: dict[str, str], judged: set[str]) -> None:
        """Compare on one case; write into ``failed`` and ``judged``."""
        results = run_case(self.session, case, [value.name or "" for value in self._wanted])
        values = {value: results[value.name or ""] for value in self._wanted}
        for value in self.epoch.model.graph.inputs:
            if value.name and value.name in case:
                values[value] = case[value.name]
        merged_unequals = False
        for pair, original, replacement, boundary in self.shown:
            key = pair.application.key
            if self._not_taken(original, values):
                continue
            if key in failed:
                merged_unequals = merged_unequals or pair.merge
                continue
            before, after = _value(original, values), _value(replacement, values)
            if not isinstance(before, np.ndarray) or not isinstance(after, np.ndarray):
                continue  # sequences and optionals: the whole model judges them
            reason = _judge_pair(self.epoch.model, pair, before, after, boundary, values)
            if reason is not None and pair.doubtful and merged_unequals:
                continue  # an earlier merge may be to blame; without that, or with the whole model, this shows too
            merged_unequals = merged_unequals or (pair.merge and not same_bits(before, after))
            judged.add(key)
            if reason is not None:
                failed[key] = reason

    def _not_taken(self, original: ir.Value, values: dict[ir.Value, Any]) -> bool:
        """Whether the replaced value stands in a branch that did not run: it shows nothing then."""
        return original in self.surface.added and np.shape(values[original]) == (0,)


def _judge_pair(
    model: ir.Model,
    pair: Pair,
    before: np.ndarray[Any, Any],
    after: np.ndarray[Any, Any],
    boundary: dict[ir.Value, ir.Value],
    values: dict[ir.Value, Any],
) -> str | None:
    if pair.application.kind is Kind.LOSSY or same_bits(before, after):
        return None
    bitwise = pair.application.kind is Kind.BITWISE
    comparable = before.shape == after.shape and before.dtype == after.dtype and is_float(before)
    comparable = comparable and before.dtype.kind != "c"
    if bitwise or not comparable or within_eps(after, before):
        return why_different(after, before, bitwise=bitwise)
    precise = None
    try:
        known = {value: np.asarray(_value(shown_as, values)) for value, shown_as in boundary.items()}
        precise = exact.evaluate_between(model, known, pair.original)
    except exact.NotExact:
        pass
    if precise is not None and precise.shape != before.shape:
        precise = None
    return why_different(after, before, exact=precise)


def _value(value: ir.Value, values: dict[ir.Value, Any]) -> Any:
    if value in values:
        return values[value]
    tensor = graphs.constant_tensor(value)
    assert tensor is not None, f"{value.name} was not returned"
    return tensor.numpy()
