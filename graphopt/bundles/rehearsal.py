"""A bundle against its network, on every way that both can go.

The inputs alone show the ways that they take. So each decision is forced, both sides of every If and loops without
turns and with many, in the network as in the bundle, and what comes out is compared: on one of the inputs each, in
turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles import forcing
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.forcing import Way
from graphopt.bundles.running import BundleRunner
from graphopt.bundles.samples.rehearsal import rehearse_samples
from graphopt.bundles.sending import Original, Outcome, Rehearsal, reached, told
from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.ending import under
from graphopt.verification.tolerance import Distance
from graphopt.verification.whole import Measure, Reference, compare


def rehearse(
    reference: Reference,
    original: Callable[[], ir.Model],
    bundle: Path,
    *,
    bitwise: bool,
    measure_only: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Compare a bundle with its network: on the inputs as they are, then sent every way.

    Blocks run with the runtime's optimizations off, and as deployed.

    Args:
        reference: What the network gives on the inputs, with the runtime's optimizations off.
        original: Loads the network anew: without functions, its decisions named, typed.
        bundle: Its folder.
        bitwise: Whether the bits must be the same with the optimizations off.
        measure_only: Whether differences that have a distance do not count.
        say: Is told what is being done.

    Raises:
        BadInput: A block cannot be run.
        GraphoptError: A block fails.
    """
    if reference.preparation.opaque:
        raise BadInput(
            f"the bundle cannot be run: ONNX Runtime does not know {reference.preparation.opaque[0]}",
            where=str(bundle),
            hint="give its library with --custom-ops, or skip the check with --no-verify",
        )
    if read_bundle(bundle)[1].samples:
        with under(reference.limit):
            return rehearse_samples(reference, original, bundle, measure_only=measure_only, say=say)
    judge = _Judge(bundle, reference, bitwise, measure_only)
    with under(reference.limit):
        return _rehearse(reference, original, judge, say)


def _rehearse(
    reference: Reference, original: Callable[[], ir.Model], judge: _Judge, say: Callable[[str], None]
) -> Outcome:
    outcome = Outcome(judge(reference, {}, reference.feeds), judge.worst, judge.forced)
    found = outcome.ways
    seen = judge.plain.course
    natural = {name: set(seen.sides.get(name, ())) for name in judge.plain.branches}
    found.turns = {name: {"inputs": sorted(seen.turns.get(name, ()))} for name in judge.plain.loops}
    _force_all(reference, original(), judge, outcome, say)
    found.inside = judge.plain.inside
    for name, counts in found.turns.items():
        counts["forced"] = sorted(seen.turns.get(name, set()).difference(counts["inputs"]))
    found.sides = {name: reached(sides, seen.sides.get(name, set())) for name, sides in natural.items()}
    return outcome


class _Judge:
    """Runs a bundle on cases, with the runtime's optimizations off and as deployed, and compares.

    Attributes:
        plain: The bundle with the optimizations off.
        worst, forced: The largest distances, on the inputs as they are and on forced ways.
    """

    def __init__(self, bundle: Path, reference: Reference, bitwise: bool, measure_only: bool) -> None:
        self._bitwise, self._measure_only = bitwise, measure_only
        custom_ops, twin = reference.custom_ops, reference.preparation.twin
        self.plain = Rehearsal(bundle, optimized=False, custom_ops=custom_ops, twin=twin)
        self._deployed = Rehearsal(bundle, optimized=True, custom_ops=custom_ops, twin=twin)
        # What runs without being watched goes another way through the host.
        self._unwatched = None if twin else BundleRunner(bundle, 1, custom_ops=custom_ops)
        self.worst, self.forced = Measure(), Measure()

    def send_lines_as_told(self, names: set[str]) -> None:
        """Straight lines that the network has as well are sent where a way says, as any other decision."""
        for one in (self.plain, self._deployed):
            one.paths = {line: path for line, path in one.paths.items() if line not in names}

    def __call__(self, expected: Reference, way: Way, cases: Sequence[Mapping[str, Any]]) -> list[str]:
        """What does not count as the same."""
        lines: list[str] = []
        for deployed in (False, True):
            try:
                results = [self._run(case, way, deployed) for case in cases]
            except GraphoptError as error:
                return [*lines, f"the bundle fails: {error}"]
            found, worst = compare(expected, results, bitwise=self._bitwise and not deployed, deployed=deployed)
            (self.forced if way else self.worst).add(Distance(worst.max_abs, worst.max_rel, worst.cosine_min))
            lines += [str(one) for one in found if not (self._measure_only and one.measured)]
        return lines

    def _run(self, case: Mapping[str, Any], way: Way, deployed: bool) -> dict[str, Any]:
        if deployed and not way and self._unwatched is not None:
            return self._unwatched.run(case)
        return (self._deployed if deployed else self.plain).run(case, way)


def _force_all(
    reference: Reference, model: ir.Model, judge: _Judge, outcome: Outcome, say: Callable[[str], None]
) -> None:
    found = outcome.ways
    known = forcing.decisions(model)
    there = judge.plain.names
    gone = {name for others in judge.plain.decided.values() for name in others}
    found.free = sorted({decision.name for decision in known} - there - gone)
    if not known:
        return
    judge.send_lines_as_told({decision.name for decision in known})
    if graphs.opset(model) < forcing.OLDEST:
        found.refused = f"opset {graphs.opset(model)} has no operators to force decisions with"
        return
    original = Original(model, custom_ops=reference.custom_ops, random=reference.random, like=reference)
    original.limits = judge.plain.limits
    most = {name: max(counts["inputs"], default=0) + 1 for name, counts in found.turns.items()}
    todo = forcing.ways(known, there, most, judge.plain.decided, judge.plain.paths.values(), judge.plain.limits)
    for number, way in enumerate(todo):
        say(f"way {number + 1} of {len(todo)}")
        cases = [reference.feeds[number % len(reference.feeds)]]
        try:
            expected = original.on(way, cases)
        except GraphoptError as error:
            found.failing[told(way)] = error.what
            continue
        found.tried += 1
        lines = judge(expected, way, cases)
        own = {name: goes for name, goes in way.items() if name in there}
        if lines and len(own) < len(way):
            # What the bundle no longer has may have been merged with what is forced, or may follow the values still.
            with contextlib.suppress(GraphoptError):
                lines = judge(original.on(own, cases), own, cases) and lines
        if lines and not outcome.differences:
            outcome.at = expected
        outcome.differences += [f"{told(way)}: {line}" for line in lines]
