"""T1: judges every replacement by itself, on the values that the original has there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import GraphoptError
from graphopt.rewrite.contract import Kind
from graphopt.runtime.ending import limit_of, under
from graphopt.verification import exact, runnable
from graphopt.verification.shadow import Epoch, Pair, Shadow, Surface
from graphopt.verification.tolerance import is_float, same_bits, why_different, within_eps
from graphopt.verification.whole import Reference, compare, make_reference, narrow_feeds, run_case, session_soon


@dataclass
class Span:
    """A part of the run in which nothing lossy happened, judged as a whole (T2) where the file cannot be.

    Attributes:
        reference: What the model computes where the span begins.
        begins_at: How many applications were made before it.
        ends_at: And before its end; None where the span ends with the run, and the file is what to compare.
        bitwise: Whether everything in it promises the same bits.
        reason: Why its end does not compute the same as its beginning; None where it does.
    """

    reference: Reference
    begins_at: int
    ends_at: int | None = None
    bitwise: bool = False
    reason: str | None = None


@dataclass
class Judgement:
    """What T1 found.

    Attributes:
        reference: The original's results for the cases, from the same run.
        failed: Application key -> why it does not compute the same.
        checked: How many applications were judged by themselves.
        unchecked: Keys of applications that only the whole model can judge: in bodies of Loop and Scan, in functions.
        spans: The lossless parts of a run with lossy passes.
    """

    reference: Reference
    failed: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    unchecked: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


MakeFeeds = Callable[[ir.Model, Callable[[Mapping[str, Any]], object]], Sequence[Mapping[str, Any]]]


class Watch:
    """Watches passes at work, for ``judge`` to say afterwards what they did wrong.

    Args:
        model: The model before any pass; typed as far as inference gets.
        custom_ops: A library of custom operators.

    Attributes:
        shadow: The observer to give to the context.
    """

    def __init__(self, model: ir.Model, custom_ops: Path | None = None) -> None:
        self._custom_ops = custom_ops
        self._views: list[_View] = []
        self._judged: set[str] = set()
        self._closed = False
        # Sessions of the parts that are done are made while passes go on.
        self.shadow = Shadow(model, closed=lambda epoch: self._views.append(_View(epoch, custom_ops)))

    def close(self) -> None:
        """The last pass has run: begin to load what it left."""
        if not self._closed:
            self._closed = True
            self.shadow.finish()

    def judge(
        self,
        make_feeds: MakeFeeds,
        *,
        made_up: bool = False,
        source: Path | None = None,
        exact_soon: bool = False,
    ) -> Judgement:
        """Compare each replaced value with its replacement, on every case. Call once, after the last pass.

        Args:
            make_feeds: Gives the cases, from the original and a function that runs it once.
            made_up: Whether these are made up.
            source: The original's file, where it has one.
            exact_soon: Whether to begin with the float64 result in the background, since it will be asked for.
        """
        self.close()
        with under(limit_of(self._views[0].model, made_up=made_up)):
            return self._judge(make_feeds, source, exact_soon)

    def _judge(self, make_feeds: MakeFeeds, source: Path | None, exact_soon: bool) -> Judgement:
        first = self._views[0]
        own = [value.name or "" for value in first.model.graph.outputs]
        results: dict[int, tuple[Mapping[str, Any], dict[str, Any]]] = {}
        refused: list[GraphoptError] = []

        def once(case: Mapping[str, Any]) -> dict[str, Any]:
            try:
                session = first.session
            except GraphoptError as error:  # the runtime refuses the model: that is no fault of the feeds
                refused.append(error)
                raise
            found = run_case(session, first.feeds([case])[0], own)
            results[id(case)] = case, found
            return found

        try:
            given = make_feeds(first.model, once)
        except GraphoptError:
            if refused:
                raise refused[0] from None
            raise
        known = [results[id(case)][1] if id(case) in results else once(case) for case in given]
        reference = first.reference(given, self._custom_ops, source, known)
        if exact_soon:
            reference.exact_soon()
        verdict = Judgement(reference, unchecked=list(self.shadow.unknown))
        self._judged.update(self.shadow.proved)
        for view in self._views:
            if view.preparation.opaque != first.preparation.opaque:
                verdict.unchecked.extend(pair.application.key for pair in view.epoch.pairs)
                continue
            verdict.unchecked.extend(view.unchecked)
            view.judge(view.feeds(given), verdict.failed, self._judged)
        seen = [shown.pair.application.key for view in self._views for shown in view.shown]
        verdict.unchecked.extend(key for key in seen if key not in self._judged)
        verdict.unchecked = list(dict.fromkeys(verdict.unchecked))
        verdict.checked = len(self._judged.difference(verdict.unchecked))
        if not verdict.failed:
            verdict.spans = self._spans(reference, given)
        return verdict

    def _spans(self, reference: Reference, given: Sequence[Mapping[str, Any]]) -> list[Span]:
        """T2 on each part without lossy passes; none where nothing lossy ran: the file stands for the whole then."""
        lossy = [index for index, view in enumerate(self._views) if view.epoch.lossy_before]
        if not lossy:
            return []
        spans = []
        for begin, end in zip([0, *lossy], [*(index - 1 for index in lossy), None], strict=True):
            view = self._views[begin]
            start = reference if begin == 0 else view.reference(given, self._custom_ops)
            span = Span(start, view.epoch.begins_at)
            if end is not None:
                last = self._views[end]
                span.ends_at, span.bitwise = last.epoch.begins_at, last.epoch.bitwise_before
                if end > begin and last.preparation == view.preparation:
                    names = [value.name or "" for value in last.model.graph.outputs]
                    results = [run_case(last.session, case, names) for case in last.feeds(given)]
                    differences, _ = compare(start, results, bitwise=span.bitwise)
                    span.reason = str(differences[0]) if differences else None
            spans.append(span)
        return spans


@dataclass
class _Shown:
    """A pair, and the values of the main graph that show it."""

    pair: Pair
    original: ir.Value
    replacement: ir.Value
    boundary: dict[ir.Value, ir.Value]


class _View:
    """One epoch of a shadow, and a session that returns what was replaced there and what took its place."""

    def __init__(self, epoch: Epoch, custom_ops: Path | None) -> None:
        self.epoch = epoch
        self.model = epoch.model
        self.preparation = runnable.prepare(self.model, has_custom_ops=custom_ops is not None)
        self.surface = Surface(self.model)
        self.shown: list[_Shown] = []
        self.unchecked: dict[str, None] = {}
        self._alive = {value for node in self.model.graph for value in node.outputs}
        self._alive.update(self.model.graph.inputs)
        self._alive.update(self.model.graph.initializers.values())
        for pair in epoch.pairs:
            self._show(pair)
        returned = dict.fromkeys(v for s in self.shown for v in (s.original, s.replacement, *s.boundary.values()))
        self._wanted = [v for v in returned if v.producer() is not None and not graphs.is_constant(v)]
        self._session = session_soon(self.model, custom_ops=custom_ops, outputs=self._wanted)

    @property
    def session(self) -> Any:
        """The session; waits until it is there."""
        return self._session.result()

    def feeds(self, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The cases as this epoch's session takes them."""
        return narrow_feeds(given, self.preparation)

    def reference(
        self,
        given: Sequence[Mapping[str, Any]],
        custom_ops: Path | None,
        source: Path | None = None,
        results: list[dict[str, Any]] | None = None,
    ) -> Reference:
        """What the epoch's model computes; ``results`` where that is known."""
        return make_reference(
            self.model,
            self.feeds(given),
            custom_ops=custom_ops,
            session=self.session,
            preparation=self.preparation,
            source=source,
            results=results,
        )

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
        self.shown.append(_Shown(pair, original, replacement, boundary))

    def _bring_out(self, value: ir.Value) -> ir.Value | None:
        if graphs.is_constant(value):
            return value
        found = self.surface.bring_out(value)
        return found if found is not None and (found in self._alive or found in self.surface.added) else None

    def judge(self, feeds: Sequence[Mapping[str, Any]], failed: dict[str, str], judged: set[str]) -> None:
        """Compare on every case, constants once; write into ``failed`` and ``judged``."""
        constant: list[_Shown] = []
        varying: list[_Shown] = []
        for one in self.shown:
            both = graphs.is_constant(one.original) and graphs.is_constant(one.replacement)
            (constant if both else varying).append(one)
        merged_unequals = self._compare(constant, {}, failed, judged)
        for case in feeds if varying else ():
            results = run_case(self.session, case, [value.name or "" for value in self._wanted])
            values = {value: results[value.name or ""] for value in self._wanted}
            for value in self.model.graph.inputs:
                if value.name and value.name in case:
                    values[value] = case[value.name]
            self._compare(varying, values, failed, judged, merged_unequals)

    def _compare(
        self,
        shown: Sequence[_Shown],
        values: dict[ir.Value, Any],
        failed: dict[str, str],
        judged: set[str],
        merged_unequals: bool = False,
    ) -> bool:
        """Compare on one case. Takes and gives back whether a merge so far was of values that are not the same."""
        for one in shown:
            pair, key = one.pair, one.pair.application.key
            if self._not_taken(one.original, values):
                continue
            if key in failed:
                merged_unequals = merged_unequals or pair.merge
                continue
            before, after = _value(one.original, values), _value(one.replacement, values)
            if before is after:
                judged.add(key)
                continue
            if not isinstance(before, np.ndarray) or not isinstance(after, np.ndarray):
                continue  # sequences and optionals: the whole model judges them
            reason = _judge_pair(self.model, pair, before, after, one.boundary, values)
            if reason is not None and pair.doubtful and merged_unequals:
                continue  # an earlier merge may be to blame; without that, or with the whole model, this shows too
            merged_unequals = merged_unequals or (pair.merge and not same_bits(before, after))
            judged.add(key)
            if reason is not None:
                failed[key] = reason
        return merged_unequals

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
    if same_bits(before, after):
        return None
    bitwise = pair.application.kind is Kind.BITWISE
    comparable = before.shape == after.shape and before.dtype == after.dtype and is_float(before)
    comparable = comparable and before.dtype.kind != "c"
    if bitwise or not comparable:
        return why_different(after, before, bitwise=bitwise)
    if within_eps(after, before):
        return None
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
