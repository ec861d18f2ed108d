"""Straight lines for the paths that a user's inputs often take: tried out, and kept where they pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from graphopt.benchmarking.weighted import MOST_FEEDS, Way, compare_ways
from graphopt.bundles.counting import count
from graphopt.bundles.folder import StagedBundle, read_bundle
from graphopt.bundles.making import BundleFacts, make_parts
from graphopt.bundles.plan import Branch, walk
from graphopt.bundles.profile import Trial
from graphopt.bundles.specialised import Unfit, early_decisions, specialise
from graphopt.bundles.split import Split
from graphopt.bundles.trails import MOST_INPUTS, Trail, candidates, goes, share, trails
from graphopt.errors import GateFailed
from graphopt.targets import Target

LEAST_GAIN = 1.02
"""What the lower end of the interval must be above: what is gained is to be worth having the code twice."""
FEWEST_INPUTS = 8
SECONDS = 4.0
"""Of timing, for each line that is tried; more where twelve rounds take longer."""


@dataclass
class Tried:
    """What came of trying.

    Attributes:
        trials: Each line that was tried.
        bundle: The one that is kept, staged; None where none is.
        facts: Of that bundle.
    """

    trials: list[Trial] = field(default_factory=list)
    bundle: StagedBundle | None = None
    facts: BundleFacts | None = None

    @property
    def kept(self) -> Trial | None:
        """The one that is in the bundle."""
        return next((trial for trial in self.trials if trial.kept), None)

    def keep(self, trial: Trial, bundle: StagedBundle | None, facts: BundleFacts | None) -> None:
        """Keep this one and no other; none where there is no bundle."""
        if self.bundle is not None:
            self.bundle.discard()
        for other in self.trials:
            other.kept = other is trial and bundle is not None
        self.bundle, self.facts = bundle, facts


def try_lines(
    load: Callable[[], ir.Model],
    generic: StagedBundle,
    stage: Callable[[Split], StagedBundle],
    target: Target,
    feeds: Sequence[Mapping[str, Any]],
    verify: Callable[[Path], bool],
    *,
    custom_ops: Path | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Tried:
    """Try straight lines for the paths that inputs often take.

    Args:
        load: Loads the network that the bundle was made of anew: without functions, its control flow named.
        generic: The bundle as it is without any.
        stage: Stages another one for the same place.
        target: What it is for; no other than ONNX Runtime can be timed here.
        feeds: The user's inputs, taken for what the network will get.
        verify: Whether a bundle computes the same; it may raise GateFailed instead.
        custom_ops: A library of custom operators.
        seconds: Of timing, for each line.
        say: Is told what is being done.
    """
    made = Tried()
    if not target.control_flow.in_blocks:
        return made
    say("looking for paths")
    chosen = [feeds[index] for index in _spread(len(feeds), MOST_INPUTS)]
    found = trails(load(), chosen, custom_ops)
    todo = _todo(load(), found, made)
    for number, paths in enumerate(todo):
        say(f"trying paths, {number + 1} of {len(todo)}")
        trial = Trial(paths=paths, shares=[share(found, path) for path in paths])
        made.trials.append(trial)
        network = load()
        try:
            specialise(network, paths)
        except Unfit as reason:
            trial.reason = str(reason)
            continue
        parts, facts = make_parts(network, target)
        staged = stage(parts)
        ways = _ways(chosen, found, paths)
        timed = compare_ways(generic.path, staged.path, [*ways.values()], seconds=seconds, custom_ops=custom_ops)
        trial.faster = {"value": timed.overall.value, "low": timed.overall.low, "high": timed.overall.high}
        trial.faster.update(zip(ways, timed.each, strict=True))
        if timed.overall.low > (LEAST_GAIN if made.kept is None else made.kept.faster["low"]):
            made.keep(trial, staged, facts)
        else:
            staged.discard()
    kept = made.kept
    if kept is not None and made.bundle is not None:
        say("verifying it with a straight line")
        kept.reason = _wrong(made.bundle.path, kept.paths, chosen, found, verify, custom_ops)
        if kept.reason:
            made.keep(kept, None, None)
    for trial in made.trials:
        if trial.faster and not trial.kept:
            slow = trial.faster["low"] <= LEAST_GAIN
            trial.reason = trial.reason or (f"not surely {LEAST_GAIN:g} times" if slow else "another is faster")
    return made


def _todo(network: ir.Model, found: Sequence[Trail], made: Tried) -> list[list[Trail]]:
    """What to try; where nothing is, the reason is kept."""
    names = dict.fromkeys(name for trail in found for name in trail)
    if not names:
        return []
    todo = candidates(found, early_decisions(network, names)) if len(found) >= FEWEST_INPUTS else []
    if not todo:
        (way, count), *_ = Counter(tuple(trail.items()) for trail in found).most_common(1)
        reason = "not tried, since too few inputs take it"
        if len(found) < FEWEST_INPUTS:
            reason = f"not tried, since fewer than {FEWEST_INPUTS} inputs do not tell how often it is taken"
        made.trials.append(Trial(paths=[dict(way)], shares=[count / len(found)], reason=reason))
    return todo


def _ways(
    feeds: Sequence[Mapping[str, Any]], found: Sequence[Trail], paths: Sequence[Trail]
) -> dict[Literal["on", "off"], Way]:
    """Inputs that go one of the paths, and those that go none."""
    groups: dict[Literal["on", "off"], list[Mapping[str, Any]]] = {"on": [], "off": []}
    for feed, trail in zip(feeds, found, strict=True):
        groups["on" if any(goes(trail, path) for path in paths) else "off"].append(feed)
    return {
        side: Way(len(group) / len(feeds), [group[index] for index in _spread(len(group), MOST_FEEDS)])
        for side, group in groups.items()
        if group
    }


def _wrong(
    bundle: Path,
    paths: Sequence[Trail],
    feeds: Sequence[Mapping[str, Any]],
    found: Sequence[Trail],
    verify: Callable[[Path], bool],
    custom_ops: Path | None,
) -> str:
    """What is wrong with a bundle with straight lines; nothing where it is right."""
    first = Counter(next((n for n, path in enumerate(paths) if goes(trail, path)), None) for trail in found)
    branches = count(bundle, feeds, custom_ops=custom_ops).branches
    lines = [step.branch for step in walk(read_bundle(bundle)[1].steps) if isinstance(step, Branch) and step.path]
    for number, line in enumerate(lines):
        taken = branches[line].then if line in branches else 0
        if taken != first[number]:
            return f"{taken} inputs take it, and {first[number]} should"
    try:
        return "" if verify(bundle) else "it does not compute the same"
    except GateFailed as error:
        return error.what


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below a count, evenly spread."""
    return [number * count // min(count, most) for number in range(min(count, most))]
