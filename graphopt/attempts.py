"""One run of the passes on a fresh copy of the model: what the user asked for, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.files import load_model
from graphopt.inlining import inline_all
from graphopt.rewrite.context import Context
from graphopt.rewrite.contract import Kind, Pass
from graphopt.rewrite.manager import PassRecord, run_passes
from graphopt.shapes import infer_shapes
from graphopt.store import Store
from graphopt.targets import Target

if TYPE_CHECKING:
    from graphopt.verification.replacements import Watch

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What the user asked for, read and checked.

    Attributes:
        source: The model.
        target: What the result runs on.
        make_passes: Makes the passes anew: a pass may keep state while it runs.
        feeds: Calibration cases; None where there are none.
        custom_ops: A library of custom operators.
        store: Results of long computations on weights, which every run of the passes asks for again.
        bundle: Whether the result is to be split into a bundle.
    """

    source: Path
    target: Target
    make_passes: Callable[[], list[Pass]]
    feeds: Sequence[Mapping[str, Any]] | None = None
    custom_ops: Path | None = None
    store: Store = field(default_factory=Store)
    bundle: bool = False

    def load(self) -> ir.Model:
        """The model as the passes get it: decisions have names, and a model that is to be split no functions."""
        return self.ready(load_model(self.source))

    def load_typed(self) -> ir.Model:
        """What `load` gives, with types and shapes as far as inference gets."""
        model = self.load()
        infer_shapes(model)
        return model

    def ready(self, model: ir.Model) -> ir.Model:
        """A model that was just loaded, changed in place to what `load` gives."""
        if self.bundle:
            inline_all(model)
        graphs.name_control_flow(model)
        return model


@dataclass
class Attempt:
    """One run of the passes."""

    model: ir.Model
    context: Context
    records: list[PassRecord]
    watch: Watch | None

    @property
    def bitwise(self) -> bool:
        """Whether everything that was done promises the same bits."""
        return all(a.kind is Kind.BITWISE for a in self.context.applications)

    @property
    def lossy(self) -> bool:
        """Whether something that was done loses accuracy by intention."""
        return any(a.kind is Kind.LOSSY for a in self.context.applications)


def run_attempt(
    plan: Plan,
    *,
    skip: Mapping[str, str] | None = None,
    limit: int | None = None,
    model: ir.Model | None = None,
    watch: bool = True,
    progress: Progress | None = None,
) -> Attempt:
    """Run the passes once on a fresh copy of the model.

    Args:
        plan: What to do.
        skip: Application keys to leave out.
        limit: Make only the first so many applications.
        model: The model, if it was loaded already and not changed.
        watch: Whether to watch the passes for T1.
        progress: Told the name of each pass.
    """
    model = plan.load() if model is None else plan.ready(model)
    declared = {output for node in graphs.all_nodes(model) for output in node.outputs if output.type is not None}
    untyped = [(g, i) for g in graphs.all_graphs(model) for i, output in enumerate(g.outputs) if output.type is None]
    infer_shapes(model)
    watching = _watch(model, plan) if watch else None
    context = Context(
        model,
        plan.target,
        skip=(skip or {}).keys(),
        observers=[] if watching is None else [watching.shadow],
        limit=limit,
        feeds=plan.feeds,
        store=plan.store,
        say=progress,
    )
    passes = plan.make_passes()
    told = None if progress is None else (lambda name, seconds: progress(f"{name} ({seconds:.1f} s)"))
    records = run_passes(context, passes, progress=told)
    if watching is not None:
        watching.close()
    _forget_inferred(model, declared, untyped)
    return Attempt(model, context, records, watching)


def _watch(model: ir.Model, plan: Plan) -> Watch:
    from graphopt.verification.replacements import Watch

    return Watch(model, plan.custom_ops)


def _forget_inferred(model: ir.Model, declared: set[ir.Value], untyped: Sequence[tuple[ir.Graph, int]]) -> None:
    """Take away the types and shapes that only inference gave, so that the file holds what its author put there."""
    for node in graphs.all_nodes(model):
        for value in node.outputs:
            if value not in declared and not value.is_graph_output():
                value.type = None
                value.shape = None
    for graph, index in untyped:  # outputs of bodies, which may leave their types to the node that has them
        if index < len(graph.outputs):
            graph.outputs[index].type = None
            graph.outputs[index].shape = None
