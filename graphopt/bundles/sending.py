"""A network and its bundle, both sent a way: their decisions are forced, and where they went is told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles import forcing
from graphopt.bundles.folder import open_bundle
from graphopt.bundles.forcing import PREFIX, Forced
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plan import Branch, Loop, Plan, Port, Run, walk
from graphopt.bundles.running import backend_for
from graphopt.bundles.specialised import copy_name
from graphopt.errors import BadInput
from graphopt.files import load_model
from graphopt.runtime.ending import current_limit, run_to_end
from graphopt.shapes import infer_shapes
from graphopt.verification import runnable
from graphopt.verification.whole import Measure, Reference, narrow_feeds, run_case, session_for


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
        paths: Branch that asks for a path -> that path.
        limits: Loop -> the most turns that it takes, where that is a constant.
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
        self._opened = open_bundle(bundle)  # whose weights are read while this is there
        version, plan = self._opened.version, self._opened.plan
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
        self.paths = {s.branch: s.path for s in walk(plan.steps) if isinstance(s, Branch) and s.path}
        blocks: dict[str, ir.Model] = {}
        self.limits: dict[str, int] = {}
        held: dict[str, list[str]] = {}
        for name, block in plan.blocks.items():
            blocks[name] = load_model(version / block.file)
            for node in graphs.all_nodes(blocks[name]):
                self.decided.setdefault(node.name or "", {}).update(graphs.decided_by(node))
                if (node.domain, node.op_type) == ("", "Loop"):
                    _limit(self.limits, node.name, node.inputs[0])
            if twin:
                infer_shapes(blocks[name])
                runnable.float32_twin(blocks[name])
            held[name] = forcing.force(blocks[name]) if graphs.opset(blocks[name]) >= forcing.OLDEST else []
        given = {
            step.makes[output.name]: output
            for step in walk(plan.steps)
            if isinstance(step, Run)
            for output in blocks[step.run].graph.outputs
            if output.name in step.makes
        }
        for step in walk(plan.steps):
            if isinstance(step, Loop):
                _limit(self.limits, step.loop, given.get(step.trips or ""))
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
        self.course.way = on_lines(way or {}, self.paths)
        sent = {f"{PREFIX}{name}": np.array(forcing.sent(name, self.course.way)) for name in self.inside}
        given = {**feeds, **sent}
        backend = self._backend
        if not isinstance(backend, OrtBackend):
            return run_to_end(lambda options: self._program.run(given))
        arrays = {name: np.asarray(value) for name, value in given.items()}
        values = {name: backend.value(array) for name, array in arrays.items()}
        found = run_to_end(lambda options: self._program.run(values), backend.options)
        return {name: np.array(backend.array(value)) for name, value in found.items()}


def _limit(limits: dict[str, int], name: str | None, trips: ir.Value | None) -> None:
    """Take note of how many turns a Loop takes at the most, where that is a constant."""
    maker = None if trips is None else trips.producer()
    if maker is not None and maker.op_type == "Identity":  # how a block gives a constant
        trips = maker.inputs[0]
    most = graphs.scalar_of(trips)
    if name and most is not None and most >= 0:
        limits[name] = min(int(most), limits.get(name, int(most)))


def on_lines(way: Mapping[str, int], paths: Mapping[str, Mapping[str, bool]]) -> dict[str, int]:
    """A way of a network, for its straight lines too: sent down one are the ways that lie on its path.

    Args:
        way: Of the network; empty: as the values say, and the lines then as well.
        paths: Branch that asks for a path -> that path.
    """
    made = dict(way)
    for line, path in paths.items() if way else ():
        made[line] = int(all(way.get(name) == side for name, side in path.items()))
        made.update((copy_name(name, line), goes) for name, goes in way.items())
    return made


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

    Attributes:
        decisions: Of the network.
        limits: Loop -> the most turns that it takes where others are forced; those of what it is compared with.

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
        self.limits: Mapping[str, int] = {}
        self._names = forcing.force(model)
        self._model, self._custom_ops, self._random = model, custom_ops, random
        self._known = [] if like is None else [like]
        self._preparation = runnable.prepare(model, has_custom_ops=custom_ops is not None)
        self._session = session_for(model, custom_ops=custom_ops)
        self._outputs = [value.name or "" for value in model.graph.outputs]

    def on(self, way: Mapping[str, int], cases: Sequence[Mapping[str, Any]]) -> Reference:
        """What it gives on a way. Raises GraphoptError where it fails."""
        sent = {f"{PREFIX}{name}": np.array(forcing.sent(name, way, self.limits)) for name in self._names}
        feeds = narrow_feeds([{**case, **sent} for case in cases], self._preparation)
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
            limit=current_limit(),
        )
        self._known.append(made)
        return made


def reached(by_inputs: Collection[bool], forced: Collection[bool]) -> dict[str, str]:
    """How the sides of an If were reached."""
    return {
        side: "inputs" if truth in by_inputs else "forced" if truth in forced else "never"
        for side, truth in (("then", True), ("else", False))
    }


def told(way: Mapping[str, int]) -> str:
    """A way in words, for people."""
    return "forced " + ", ".join(f"{name} = {goes}" for name, goes in way.items())
