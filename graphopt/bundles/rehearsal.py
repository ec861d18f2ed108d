"""A bundle against its network, on every way that both can go.

The inputs alone show the ways that they take. So each decision is forced, both sides of every If and loops without
turns and with many, in the network as in the bundle, and what comes out is compared: on one of the inputs each, in
turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles import forcing
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.forcing import NATURAL, PREFIX, Forced, Way
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plan import Branch, Loop, Plan, Port, Run, walk
from graphopt.bundles.running import BundleRunner, backend_for
from graphopt.errors import BadInput, GraphoptError
from graphopt.files import load_model
from graphopt.shapes import infer_shapes
from graphopt.verification import runnable
from graphopt.verification.tolerance import Distance
from graphopt.verification.whole import Measure, Reference, compare, narrow_feeds, run_case, session_for

_FORCED_OPSET = 9


@dataclass
class Ways:
    """Which ways were tried.

    Attributes:
        sides: If -> ``then`` and ``else``: how it was reached: "inputs", "forced", or "never".
        turns: Loop -> how often it turned by the inputs alone, and forced.
        inside: Decisions in a block, of which only what was forced is known.
        free: Decisions that the bundle does not have: checked as the inputs take them.
        tried: How many ways were forced.
        failing: Ways on which the network itself fails, with its reason: they do not count.
        refused: Why nothing was forced; empty where something was.
    """

    sides: dict[str, dict[str, str]] = field(default_factory=dict)
    turns: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    tried: int = 0
    failing: dict[str, str] = field(default_factory=dict)
    refused: str = ""


@dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        differences: What does not count as the same, in words.
        worst: The largest distances on the inputs as they are.
        forced: The largest distances on forced ways.
        ways: Which ways were tried.
        at: What the network gives on the way of the first difference; None where that is no forced one.
    """

    differences: list[str] = field(default_factory=list)
    worst: Measure = field(default_factory=Measure)
    forced: Measure = field(default_factory=Measure)
    ways: Ways = field(default_factory=Ways)
    at: Reference | None = None


class Rehearsal:
    """A bundle that can be sent any way.

    Args:
        bundle: Its folder.
        optimized: Whether the runtime's optimizations are on.
        custom_ops: A library of custom operators.
        twin: Whether narrow floats become float32 in every block.
        course: Where decisions are sent; default: one for all samples.

    Attributes:
        course: Where decisions of the plan go and went.
        branches, loops: Decisions of the plan.
        inside: Decisions in blocks.
        decided: Decision -> Ifs that the network had and that went the same way (True) or the opposite one.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        optimized: bool,
        custom_ops: Path | None = None,
        twin: bool = False,
        course: Forced | None = None,
    ) -> None:
        version, plan = read_bundle(bundle)
        engines = [block.file for block in plan.blocks.values() if block.backend is not None]
        if engines:
            hint = "verify the bundle that it was built from"
            raise BadInput(f"its block {engines[0]} is an engine", where=str(bundle), hint=hint)
        plan = plan.model_copy(deep=True)
        self.branches = [step.branch for step in walk(plan.steps) if isinstance(step, Branch)]
        self.loops = [step.loop for step in walk(plan.steps) if isinstance(step, Loop)]
        self.decided: dict[str, dict[str, bool]] = {}
        for step in walk(plan.steps):
            if isinstance(step, Branch):
                self.decided.setdefault(step.branch, {}).update(step.decides)
        blocks: dict[str, ir.Model] = {}
        held: dict[str, list[str]] = {}
        for name, block in plan.blocks.items():
            blocks[name] = load_model(version / block.file)
            for node in graphs.all_nodes(blocks[name]):
                self.decided.setdefault(node.name or "", {}).update(graphs.decided_by(node))
            if twin:
                infer_shapes(blocks[name])
                runnable.float32_twin(blocks[name])
            held[name] = forcing.force(blocks[name]) if graphs.opset(blocks[name]) >= _FORCED_OPSET else []
        self.inside = sorted({name for names in held.values() for name in names})
        _hand_in(plan, held)
        if twin:
            _widen(plan)

        def session(name: str) -> Any:
            return session_for(blocks[name], optimized=optimized, custom_ops=custom_ops)

        self.course = course or Forced()
        self._backend = backend_for(plan, session)
        self._program = Program(plan, self._backend, self.course)

    @property
    def names(self) -> set[str]:
        """Of all its decisions."""
        return {*self.branches, *self.loops, *self.inside}

    def run(self, feeds: Mapping[str, Any], way: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Run once, sent a way; arrays by output name out."""
        self.course.way = way or {}
        told = {f"{PREFIX}{name}": np.array(self.course.way.get(name, NATURAL)) for name in self.inside}
        given = {**feeds, **told}
        backend = self._backend
        if not isinstance(backend, OrtBackend):
            return self._program.run(given)
        arrays = {name: np.asarray(value) for name, value in given.items()}
        found = self._program.run({name: backend.value(array) for name, array in arrays.items()})
        return {name: np.array(backend.array(value)) for name, value in found.items()}


def _hand_in(plan: Plan, held: Mapping[str, Sequence[str]]) -> None:
    """Let blocks that hold decisions read the inputs that force them."""
    for step in walk(plan.steps):
        if isinstance(step, Run):
            step.reads.update((f"{PREFIX}{name}", f"{PREFIX}{name}") for name in held[step.run])
    inside = dict.fromkeys(name for names in held.values() for name in names)
    plan.inputs.extend(Port(name=f"{PREFIX}{name}", type="tensor(int64)", shape=[]) for name in inside)


def _widen(plan: Plan) -> None:
    """Narrow floats of values that the host makes itself become float32."""
    for step in walk(plan.steps):
        if isinstance(step, Loop):
            for stack in step.stacks:
                if "float" in stack.part.type:
                    stack.part.type = "tensor(float)"


class Original:
    """A network that can be sent any way.

    Args:
        model: Without functions, its decisions named, typed as far as inference gets; changed in place.
        custom_ops: A library of custom operators.
        random: Whether it draws random numbers.
        like: What it gives on the inputs as they are.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        custom_ops: Path | None = None,
        random: bool = False,
        like: Reference | None = None,
    ) -> None:
        self.decisions = forcing.decisions(model)
        self._names = forcing.force(model)
        self._model, self._custom_ops, self._random = model, custom_ops, random
        self._known = [] if like is None else [like]
        self._preparation = runnable.prepare(model, has_custom_ops=custom_ops is not None)
        self._session = session_for(model, custom_ops=custom_ops)
        self._outputs = [value.name or "" for value in model.graph.outputs]

    def on(self, way: Mapping[str, int], cases: Sequence[Mapping[str, Any]]) -> Reference:
        """What it gives on a way. Raises GraphoptError where it fails."""
        told = {f"{PREFIX}{name}": np.array(way.get(name, NATURAL)) for name in self._names}
        feeds = narrow_feeds([{**case, **told} for case in cases], self._preparation)
        results = [run_case(self._session, case, self._outputs) for case in feeds]
        # Its rounding error is about as large as on a way where it was measured, which takes long.
        self._known = [other for other in self._known if other.is_measured or other is self._known[0]]
        made = Reference(
            self._model,
            feeds,
            results,
            self._random,
            self._preparation,
            self._custom_ops,
            forced=True,
            like=[*self._known],
        )
        self._known.append(made)
        return made


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
        from graphopt.bundles.samples.rehearsal import rehearse_samples

        return rehearse_samples(reference, original, bundle, measure_only=measure_only, say=say)
    judge = _Judge(bundle, reference, bitwise, measure_only)
    outcome = Outcome(judge(reference, {}, reference.feeds), judge.worst, judge.forced)
    found = outcome.ways
    seen = judge.plain.course
    natural = {name: set(seen.sides.get(name, ())) for name in judge.plain.branches}
    found.turns = {name: {"inputs": sorted(seen.turns.get(name, ()))} for name in judge.plain.loops}
    _force_all(reference, original(), judge, outcome, say)
    found.inside = judge.plain.inside
    for name, counts in found.turns.items():
        counts["forced"] = sorted(seen.turns.get(name, set()).difference(counts["inputs"]))
    for name, sides in natural.items():
        forced = seen.sides.get(name, set())
        found.sides[name] = {
            side: "inputs" if truth in sides else "forced" if truth in forced else "never"
            for side, truth in (("then", True), ("else", False))
        }
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
    if graphs.opset(model) < _FORCED_OPSET:
        found.refused = f"opset {graphs.opset(model)} has no operators to force decisions with"
        return
    original = Original(model, custom_ops=reference.custom_ops, random=reference.random, like=reference)
    most = {name: max(counts["inputs"], default=0) + 1 for name, counts in found.turns.items()}
    todo = forcing.ways(known, there, most, judge.plain.decided)
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


def told(way: Mapping[str, int]) -> str:
    """A way in words, for people."""
    return "forced " + ", ".join(f"{name} = {goes}" for name, goes in way.items())
