"""A bundle in which samples go their own ways, against its network run on one sample at a time.

Batches of several sizes are put together from a few samples, first as they are and then with each sample sent a way of
its own. Every result for a sample is compared with what the network gives for it alone, sent the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles import forcing
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.forcing import Forced, Way
from graphopt.bundles.plan import Branch, Loop, Plan, walk
from graphopt.bundles.samples.cutting import count_samples, result_of, sample_of
from graphopt.bundles.sending import Original, Outcome, Rehearsal, reached, told
from graphopt.errors import BadInput, GraphoptError
from graphopt.verification.tolerance import Distance, is_float
from graphopt.verification.whole import Reference, compare

SIZES = (1, 2, 7, 32)
_SAMPLES, _SENT = 8, 12


@dataclass
class SentApart(Forced):
    """A course that sends each sample a way of its own.

    Attributes:
        ways: Of each sample.
    """

    ways: Sequence[Mapping[str, int]] = ()

    def branch_of(self, name: str, sample: int, truth: bool) -> bool:
        """As `SampleCourse` asks."""
        self.way = self.ways[sample] if self.ways else {}
        return self.branch(name, truth)

    def turn_of(self, name: str, sample: int, number: int, truth: bool) -> bool:
        """As `SampleCourse` asks."""
        self.way = self.ways[sample] if self.ways else {}
        return self.turn(name, number, truth)


@dataclass(frozen=True)
class _Sample:
    """A sample, the way that it is sent, and what the network gives for it."""

    feeds: Mapping[str, Any]
    way: Way
    expected: Reference = field(repr=False)


def rehearse_samples(
    reference: Reference,
    original: Callable[[], ir.Model],
    bundle: Path,
    *,
    measure_only: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Compare a bundle in which samples go their own ways with its network, one sample at a time.

    Args:
        reference: What the network gives on the inputs, which are cut into samples.
        original: Loads the network anew: without functions, its decisions named, typed.
        bundle: Its folder.
        measure_only: Whether differences that have a distance do not count.
        say: Is told what is being done.

    Raises:
        BadInput: No sample can be cut out of the inputs, or no network fit for forcing.
        GraphoptError: The network fails on one sample.
    """
    _, plan = read_bundle(bundle)
    custom_ops, twin = reference.custom_ops, reference.preparation.twin
    runs = [
        Rehearsal(bundle, optimized=optimized, custom_ops=custom_ops, twin=twin, course=SentApart())
        for optimized in (False, True)
    ]
    model = original()
    if graphs.opset(model) < forcing.OLDEST:
        raise BadInput(f"opset {graphs.opset(model)} has no operators to force decisions with", where=str(bundle))
    network = Original(model, custom_ops=custom_ops, random=reference.random)
    network.limits = runs[0].limits
    cut = samples_of(plan, reference.feeds)[:_SAMPLES]
    if not cut:
        raise BadInput("the inputs hold no sample", where=str(bundle), hint="give some with --calibration")
    outcome = Outcome()
    say("one sample at a time")
    natural = []
    for feeds in cut:
        try:
            natural.append(_Sample(feeds, {}, network.on({}, [feeds])))
        except GraphoptError:
            if not natural:
                raise
    decided = {step.branch for step in walk(plan.steps) if isinstance(step, Branch) and step.each}
    turning = {step.loop for step in walk(plan.steps) if isinstance(step, Loop) and step.each}
    sent = _sent(network, [sample.feeds for sample in natural], decided | turning, runs[0], outcome)
    seen = runs[0].course
    by_inputs: dict[str, set[bool]] = {}
    for pool in (natural, sent):
        for count in SIZES if pool else ():
            say(f"{count} samples{', sent apart' if pool is sent else ''}")
            numbers = np.random.default_rng(count)
            chosen = [pool[index] for index in numbers.integers(0, len(pool), count)]
            for optimized, run in enumerate(runs):
                _compare(run, plan, chosen, outcome, deployed=bool(optimized), measure_only=measure_only)
        if pool is natural:
            by_inputs = {name: set(seen.sides.get(name, ())) for name in decided}
            outcome.ways.turns = {name: {"inputs": sorted(seen.turns.get(name, ()))} for name in sorted(turning)}
    for name in sorted(decided):
        outcome.ways.sides[name] = reached(by_inputs[name], seen.sides.get(name, ()))
    for name, counts in outcome.ways.turns.items():
        counts["forced"] = sorted(seen.turns.get(name, set()).difference(counts["inputs"]))
    return outcome


def samples_of(plan: Plan, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The samples in some inputs that can be put together, and others made of them where they are few.

    They have the same sizes, and what is the same for all samples is that of the first input.
    """
    found: list[dict[str, Any]] = []
    for case in feeds:
        arrays = {name: np.asarray(array) for name, array in case.items()}
        cut = [name for name in arrays if name in plan.samples]
        for index in range(count_samples(plan, arrays)):
            shared = {name: (found[0] if found else arrays)[name] for name in arrays if name not in plan.samples}
            sample = {**sample_of(plan, arrays, index), **shared}
            if not found or all(sample[name].shape == found[0][name].shape for name in cut):
                found.append(sample)
    known = len(found)
    for number in range(_SAMPLES - known if known else 0):
        found.append(_varied(found[number % known], number + 1, plan))
    return found


def _varied(sample: Mapping[str, Any], number: int, plan: Plan) -> dict[str, Any]:
    """Another sample: the same floats elsewhere."""
    return {
        name: np.roll(array, number) if name in plan.samples and is_float(array) else array
        for name, array in sample.items()
    }


def _sent(
    network: Original, cut: Sequence[Mapping[str, Any]], there: set[str], run: Rehearsal, outcome: Outcome
) -> list[_Sample]:
    """Samples that are sent ways: every way at least once as far as their number goes."""
    ways = forcing.ways(network.decisions, there, decided=run.decided, limits=run.limits)
    made: list[_Sample] = []
    for number, way in enumerate(ways[: max(_SENT, 1)]):
        feeds = cut[number % len(cut)]
        try:
            made.append(_Sample(feeds, way, network.on(way, [feeds])))
            outcome.ways.tried += 1
        except GraphoptError as error:
            outcome.ways.failing[told(way)] = error.what
    return made


def _compare(
    run: Rehearsal, plan: Plan, chosen: Sequence[_Sample], outcome: Outcome, *, deployed: bool, measure_only: bool
) -> None:
    assert isinstance(run.course, SentApart)
    run.course.ways = [sample.way for sample in chosen]
    axes = plan.samples
    feeds = {
        name: np.concatenate([sample.feeds[name] for sample in chosen], axes[name]) if name in axes else array
        for name, array in chosen[0].feeds.items()
    }
    try:
        results = run.run(feeds)
    except GraphoptError as error:
        outcome.differences.append(f"{len(chosen)} samples: the bundle fails: {error}")
        return
    for index, sample in enumerate(chosen):
        mine = result_of(plan, results, index, len(chosen), sample.expected.results[0])
        found, worst = compare(sample.expected, [mine], bitwise=False, deployed=deployed)
        measure = outcome.forced if sample.way else outcome.worst
        measure.add(Distance(worst.max_abs, worst.max_rel, worst.cosine_min))
        which = f"sample {index} of {len(chosen)}"
        outcome.differences += [f"{which}: {one}" for one in found if not (measure_only and one.measured)]
