"""The paths that inputs go through a network, and those of them that a straight line may pay for."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plan import Branch, Step, lists_in
from graphopt.bundles.running import backend_for
from graphopt.bundles.split import Split, split
from graphopt.calibration import failing_on
from graphopt.verification.whole import session_for

Trail = dict[str, bool]
"""The Ifs that one input has come to, in order, and whether it went to ``then``; without those in loops."""

LEAST = 0.25
"""Of the inputs, how many must go a path of which all is known beforehand: others pay for asking."""
USUAL = 0.8
"""How many must go one that is gone before it is known whether it is wanted: others pay for all of it."""
MOST_PATHS = 2
MOST_INPUTS = 256


class _Watch:
    """A course that is watched and not changed."""

    def __init__(self, names: frozenset[str]) -> None:
        self.trail: Trail = {}
        self._names = names

    def branch(self, name: str, truth: bool) -> bool:
        if name in self._names:
            self.trail[name] = truth
        return truth

    def turn(self, name: str, number: int, truth: bool) -> bool:
        return truth

    def run(self, block: str, makes: Sequence[str]) -> None:
        return None


def trails(model: ir.Model, feeds: Sequence[Mapping[str, Any]], custom_ops: Path | None = None) -> list[Trail]:
    """Where inputs go.

    Args:
        model: Without functions, its control flow named; is changed. It is split at every If, whatever that costs.
        feeds: Read one at a time.
        custom_ops: A library of custom operators.

    Raises:
        BadInput: It does not run on one of the user's inputs, and on which.
    """
    found = _followed(split(model), feeds, custom_ops)
    gc.collect()  # sessions are found by nothing else, and the collector may be paused
    return found


def _followed(parts: Split, feeds: Sequence[Mapping[str, Any]], custom_ops: Path | None) -> list[Trail]:
    watch = _Watch(frozenset(_outside(parts.plan.steps)))
    backend = backend_for(parts.plan, lambda name: session_for(parts.blocks[name], custom_ops=custom_ops))
    program = Program(parts.plan, backend, watch)
    found: list[Trail] = []
    for index in range(len(feeds)):
        watch.trail = {}
        feed: Mapping[str, Any] = feeds[index]
        values = feed
        if isinstance(backend, OrtBackend):
            values = {name: backend.value(np.asarray(value)) for name, value in feed.items()}
        with failing_on(feed):
            program.run(values)
        found.append(watch.trail)
    return found


def _outside(steps: Sequence[Step]) -> Iterator[str]:
    """The branches that are in no loop."""
    for step in steps:
        if isinstance(step, Branch):
            yield step.branch
            for inner in lists_in(step):
                yield from _outside(inner)


def goes(trail: Trail, path: Mapping[str, bool]) -> bool:
    """Whether an input goes a path."""
    return all(trail.get(name) is side for name, side in path.items())


def share(found: Sequence[Trail], path: Mapping[str, bool]) -> float:
    """Of some inputs, how many go a path."""
    return sum(goes(trail, path) for trail in found) / max(len(found), 1)


def candidates(found: Sequence[Trail], early: Sequence[str]) -> list[list[Trail]]:
    """What to try, each a list of paths; the most frequent paths first.

    Args:
        found: Where inputs go.
        early: The Ifs whose conditions are known before any of them runs.

    Returns:
        The most frequent path through the early Ifs, alone and with the next one, where these are half of the Ifs that
        an input comes to: a line that branches most of the way gains little. And that way through all Ifs that the
        inputs usually go, as far as they do.
    """
    made: list[list[Trail]] = []
    ways = Counter(tuple((name, trail[name]) for name in early if name in trail) for trail in found)
    often = [dict(way) for way, count in ways.most_common(MOST_PATHS) if way and count >= LEAST * len(found)]
    asked = sum(map(len, found)) / len(found)
    often = [path for path in often if len(path) >= asked / 2]
    made += [often[: count + 1] for count in range(len(often))]
    usual = usual_path(found)
    if usual and [usual] not in made:
        made.append([usual])
    return made


def usual_path(found: Sequence[Trail]) -> Trail:
    """The sides that inputs go to, one after the other, as long as `USUAL` of them go to all of these."""
    path: Trail = {}
    left = [list(trail.items()) for trail in found]
    while left:
        decided = Counter(trail[len(path)] for trail in left if len(trail) > len(path))
        if not decided:
            break
        (name, side), count = decided.most_common(1)[0]
        if count < USUAL * len(found):
            break
        left = [trail for trail in left if len(trail) > len(path) and trail[len(path)] == (name, side)]
        path[name] = side
    return path
