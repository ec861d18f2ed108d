"""T2 and T3: the whole model, run with the runtime's optimizations off and as deployed, against the original.

The reference is the original with the runtime's optimizations off; the yardstick for rounding is its float64 result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.background import in_background
from graphopt.runtime.ending import Endless, Limit, current_limit, under
from graphopt.verification import exact, runnable
from graphopt.verification.tolerance import (
    SLACK,
    Distance,
    distance,
    eps_of,
    is_float,
    same_bits,
    why_different,
    within_eps,
)

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Any]


@dataclass
class Difference:
    """One output of one case that does not count as the same.

    Attributes:
        output: Its name.
        case: Which feeds, counted from 0.
        reason: In words.
        deployed: Whether it shows only with the runtime's optimizations on.
        measured: Whether the distances tell of it. What is missing or has another shape has none.
    """

    output: str
    case: int
    reason: str
    deployed: bool = False
    measured: bool = True

    def __str__(self) -> str:
        how = ", only with the runtime's optimizations on" if self.deployed else ""
        return f"output {self.output}, case {self.case}{how}: {self.reason}"


@dataclass
class Measure:
    """The worst distances over all outputs and cases."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    cosine_min: float = 1.0

    def add(self, gap: Distance) -> None:
        self.max_abs = max(self.max_abs, gap.max_abs)
        self.max_rel = max(self.max_rel, gap.max_rel)
        self.cosine_min = min(self.cosine_min, gap.cosine)


@dataclass
class Reference:
    """What the original computes.

    Attributes:
        model: The original, made runnable; in topological order.
        feeds: The cases.
        results: For each case: output name -> array.
        random: Whether it draws random numbers, so that only types and shapes can be compared.
        preparation: What was done to make it runnable.
        custom_ops: A library of custom operators.
        source: Its file, which shows how it runs as deployed; None where it has none.
        yardstick: Why there is no float64 result, or "float64".
        forced: Whether inputs say which way it goes (`graphopt.bundles.forcing`).
        like: The same network on other ways, where its error is known: it is about as large.
        limit: How long what is compared with it may take; None where every loop is sure to end.
        endless: How many runs on other made-up inputs had no end: they are not among the cases.
    """

    model: ir.Model
    feeds: list[dict[str, Any]]
    results: list[dict[str, Any]]
    random: bool
    preparation: runnable.Preparation
    custom_ops: Path | None = None
    source: Path | None = None
    yardstick: str = "float64"
    forced: bool = False
    like: Sequence[Reference] = ()
    limit: Limit | None = None
    endless: int = 0
    _exact: dict[int, Future[tuple[dict[str, Array] | None, str]]] = field(default_factory=dict)
    _noise: dict[tuple[int, str], float] = field(default_factory=dict)
    _deployed: list[dict[str, Any]] | None = None

    def exact(self, case: int) -> dict[str, Array] | None:
        """The float64 outputs of a case, or None where they cannot be had."""
        if case not in self._exact:
            self._exact[case] = in_background(self._evaluate, case)
        found, reason = self._exact[case].result()
        if reason:
            self.yardstick = f"none: {reason}"
        return found

    def exact_soon(self) -> None:
        """Begin with the float64 outputs of the case that is asked for first."""
        if self.feeds:
            self._exact[self.smallest_case] = in_background(self._evaluate, self.smallest_case)

    def _evaluate(self, case: int) -> tuple[dict[str, Array] | None, str]:
        try:
            values = exact.evaluate(self.model, self.feeds[case])
        except (exact.NotExact, MemoryError) as error:
            return None, str(error) or "not enough memory"
        names = [value.name or "" for value in self.model.graph.outputs]
        return dict(zip(names, values, strict=True)), ""

    @cached_property
    def smallest_case(self) -> int:
        """The case with the smallest inputs: the float64 result is computed there first."""
        sizes = [sum(np.size(array) for array in case.values() if array is not None) for case in self.feeds]
        return int(np.argmin(sizes)) if sizes else 0

    def relative_error(self, name: str) -> float | None:
        """How far the original's output is from float64, relative to its largest magnitude, on the smallest case."""
        case = self.smallest_case
        values = self.exact(case)
        precise = None if values is None else np.asarray(values.get(name))
        original = self.results[case][name]
        if precise is None or precise.shape != original.shape:
            return None
        return distance(original, precise).max_rel

    @property
    def is_measured(self) -> bool:
        """Whether its error was asked for."""
        return bool(self._exact)

    def noise(self, case: int, output: str) -> float:
        """How far an output moves when every float input moves by one unit in the last place."""
        key = (case, output)
        if key not in self._noise:
            moved = {name: _jitter(array, seed=7 + case) for name, array in self.feeds[case].items()}
            session = session_for(self.model, custom_ops=self.custom_ops)
            try:
                with under(self.limit):
                    results = run_case(session, moved)
            except Endless:  # a loop ends on the values alone as they are: they cannot move
                results = dict(self.results[case])
            for name, array in results.items():
                before = self.results[case][name]
                same = isinstance(array, np.ndarray) and array.shape == before.shape and is_float(before)
                self._noise[case, name] = distance(array, before).max_abs if same else 0.0
        return self._noise[key]

    def deployed(self, case: int) -> dict[str, Any]:
        """What the original gives with the runtime's optimizations on."""
        if self._deployed is None:
            from graphopt.runtime.session import create_session

            if self.source is not None and not self.preparation.needed:
                # What the runtime makes of a model in memory may differ: weights handed over are not repacked.
                session = create_session(self.source, optimized=True, threads=1, custom_ops=self.custom_ops)
            else:
                session = session_for(self.model, optimized=True, custom_ops=self.custom_ops)
            with under(self.limit):
                self._deployed = [run_case(session, feeds) for feeds in self.feeds]
        return self._deployed[case]

    def vacuous(self) -> list[str]:
        """The outputs that show nothing: constant, or nowhere finite, although they depend on an input.

        An output that no input reaches is what it is, and is compared like any other.
        """
        silent = [
            value
            for value in self.model.graph.outputs
            if (arrays := [result.get(value.name or "") for result in self.results])
            and all(map(_says_nothing, arrays))
            and _all_alike(arrays)
        ]
        if not silent:
            return []
        reached = _reached_by_inputs(self.model)
        return [value.name or "" for value in silent if value in reached]


def session_for(
    model: ir.Model, *, optimized: bool = False, custom_ops: Path | None = None, outputs: Sequence[ir.Value] = ()
) -> Any:
    """A session of a model in memory, as ``session_soon`` makes it."""
    return session_soon(model, optimized=optimized, custom_ops=custom_ops, outputs=outputs).result()


def session_soon(
    model: ir.Model, *, optimized: bool = False, custom_ops: Path | None = None, outputs: Sequence[ir.Value] = ()
) -> Future[Any]:
    """A session of a model in memory, made in the background; large weights are handed over, not serialised.

    Single-threaded: bits must repeat.

    Args:
        model: Left as it is.
        optimized: Whether the runtime's optimizations are on.
        custom_ops: A library of custom operators.
        outputs: Values of the main graph to return besides its outputs.
    """
    from graphopt.runtime.session import create_session_soon
    from graphopt.runtime.split import split_weights

    content, weights = split_weights(model, outputs=outputs)
    return create_session_soon(content, optimized=optimized, threads=1, custom_ops=custom_ops, initializers=weights)


def run_case(session: Any, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a session on one case; feeds that the session does not take are left out."""
    from graphopt.runtime.session import run

    if outputs is not None and not outputs:
        return {}  # ONNX Runtime takes an empty list for all of them
    names = {spec.name for spec in session.get_inputs()}
    return run(session, {name: array for name, array in feeds.items() if name in names}, outputs)


def compare(
    reference: Reference, results: Sequence[Mapping[str, Any]], *, bitwise: bool, deployed: bool = False
) -> tuple[list[Difference], Measure]:
    """Compare what a candidate computes with the original, output by output and case by case.

    Args:
        reference: The original.
        results: The candidate's outputs for the reference's cases.
        bitwise: Whether the bits must be the same.
        deployed: Whether the candidate ran with the runtime's optimizations on. Then it may be as far from float64 as
            the original as deployed.

    Returns:
        What does not count as the same, and the worst distances.
    """
    differences: list[Difference] = []
    worst = Measure()
    for case, (expected, found) in enumerate(zip(reference.results, results, strict=True)):
        for name, original in expected.items():
            if name not in found:
                differences.append(Difference(name, case, "is missing", deployed, measured=False))
                continue
            reason = _compare_value(reference, case, name, found[name], original, bitwise, deployed, worst)
            if reason is not None:
                measured = _has_distance(found[name], original)
                differences.append(Difference(name, case, reason, deployed, measured))
    return differences, worst


def _has_distance(found: Any, original: Any) -> bool:
    arrays = isinstance(found, np.ndarray) and isinstance(original, np.ndarray)
    alike = arrays and found.shape == original.shape and found.dtype == original.dtype
    return bool(alike and (is_float(original) or original.dtype.kind in "iub"))


def _compare_value(
    reference: Reference,
    case: int,
    name: str,
    found: Any,
    original: Any,
    bitwise: bool,
    deployed: bool,
    worst: Measure,
) -> str | None:
    if original is None or found is None:
        return None if original is found else "one is absent"
    if isinstance(original, list) or isinstance(found, list):
        if not (isinstance(original, list) and isinstance(found, list)) or len(original) != len(found):
            return "sequences differ in length"
        for index, (a, b) in enumerate(zip(found, original, strict=True)):
            reason = why_different(np.asarray(a), np.asarray(b), bitwise=bitwise)
            if reason is not None:
                return f"element {index} {reason}"
        return None
    found, original = np.asarray(found), np.asarray(original)
    if reference.random:
        same = found.dtype == original.dtype and found.shape == original.shape
        return None if same else f"is {found.dtype}{list(found.shape)}, was {original.dtype}{list(original.shape)}"
    if same_bits(found, original):
        return None
    if found.shape == original.shape and found.dtype == original.dtype:
        worst.add(distance(found, original))
    comparable = found.shape == original.shape and found.dtype == original.dtype and is_float(original)
    comparable = comparable and original.dtype.kind != "c"
    if bitwise or not comparable:
        return why_different(found, original, bitwise=bitwise)
    if within_eps(found, original):
        return None
    if case != reference.smallest_case or reference.like:
        # The float64 result is dear. What the original's error is on the smallest case, it is about on the others; a
        # candidate within that is no further from float64 than the rule allows. Only beyond it is the result computed.
        errors = (other.relative_error(name) for other in reference.like or [reference])
        error = max((known for known in errors if known is not None), default=None)
        if error is not None and distance(found, original).max_rel <= (SLACK - 1) * error:
            return None
    exact_values = reference.exact(case)
    precise = None if exact_values is None else np.asarray(exact_values.get(name))
    if precise is not None and precise.shape != original.shape:
        precise = None
    noise = 0.0
    if precise is None:
        noise = reference.noise(case, name)
    reason = why_different(found, original, exact=precise, noise=noise)
    if reason is not None and deployed:
        # The runtime's own optimizations round too: measure them on the original.
        own = reference.deployed(case).get(name)
        if isinstance(own, np.ndarray) and own.shape == original.shape:
            against = precise if precise is not None else original
            noise = max(noise, distance(own, against).max_abs)
            reason = why_different(found, original, exact=precise, noise=noise)
    return reason


def _jitter(array: Any, *, seed: int) -> Any:
    if not (isinstance(array, np.ndarray) and is_float(array) and array.dtype.kind != "c"):
        return array
    sign = np.random.default_rng(seed).choice([-1.0, 1.0], array.shape)
    return (array.astype(np.float64) * (1 + sign * eps_of(array.dtype))).astype(array.dtype)


def _reached_by_inputs(model: ir.Model) -> set[ir.Value]:
    """Every value of the main graph that some input can change, by the graph alone."""
    reached: set[ir.Value] = set(model.graph.inputs)
    for node in model.graph:
        reads = graphs.read_by(node)
        if node.op_type in ("Shape", "Size") and reads and graphs.static_shape(reads[0]) is not None:
            continue
        if node.op_type == "ConstantOfShape":
            continue  # its inputs show in the shape, which is always compared
        if any(value in reached for value in reads):
            reached.update(node.outputs)
    return reached


def _says_nothing(array: Any) -> bool:
    if not isinstance(array, np.ndarray) or array.dtype.kind in "OUS":
        return False
    if array.size <= 1:
        return array.size == 1 and is_float(array) and not np.isfinite(array.astype(np.float64)).all()
    first = array.reshape(-1)[0]
    if is_float(array):
        wide = array.astype(np.float64)
        if not np.isfinite(wide).any():
            return True
    return bool(np.all(array == first))


def _all_alike(arrays: Sequence[Any]) -> bool:
    firsts = [array.reshape(-1)[0] for array in arrays if isinstance(array, np.ndarray) and array.size]
    return all(bool(first == firsts[0]) or bool(first != first) for first in firsts)


def make_reference(
    model: ir.Model,
    feeds: list[dict[str, Any]],
    *,
    custom_ops: Path | None = None,
    session: Any = None,
    preparation: runnable.Preparation | None = None,
    source: Path | None = None,
    results: list[dict[str, Any]] | None = None,
) -> Reference:
    """Run the original on the cases.

    Args:
        model: The original; made runnable in place where it is not, unless ``preparation`` says that was done.
        feeds: The cases.
        custom_ops: A library of custom operators.
        session: A session of the model, if there is one already.
        preparation: What ``runnable.prepare`` did to the model, where it was called already.
        source: The model's file.
        results: Its outputs for the cases, if they are known already.
    """
    if preparation is None:
        preparation = runnable.prepare(model, has_custom_ops=custom_ops is not None)
    if session is None:
        session = session_for(model, custom_ops=custom_ops)
    names = [value.name or "" for value in model.graph.outputs]
    if results is None:
        results = [run_case(session, case, names) for case in feeds]
    random = any(node.op_type in graphs.RANDOM for node in graphs.all_nodes(model)) and not _repeats(
        session, feeds, results
    )
    limit = current_limit()
    made = Reference(model, feeds, results, random, preparation, custom_ops, source, limit=limit)
    if limit is not None:
        made.endless = limit.cut
        limit.compare()
    return made


def _repeats(session: Any, feeds: Sequence[Feeds], results: Sequence[Mapping[str, Any]]) -> bool:
    for case, result in zip(feeds, results, strict=True):
        again = run_case(session, case, list(result))
        for name, array in result.items():
            if isinstance(array, np.ndarray) and not same_bits(array, again[name]):
                return False
    return True


def narrow_feeds(feeds: Sequence[Feeds], preparation: runnable.Preparation) -> list[dict[str, Any]]:
    """Feeds for a model that ``runnable.prepare`` changed: narrow floats become float32 in a twin."""
    if not preparation.twin:
        return [dict(case) for case in feeds]
    return [{name: _as_float32(array) for name, array in case.items()} for case in feeds]


def _as_float32(array: Any) -> Any:
    if isinstance(array, np.ndarray) and is_float(array) and array.dtype.itemsize < 4:
        return array.astype(np.float32)
    return array
