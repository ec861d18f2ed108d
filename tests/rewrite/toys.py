"""Toy passes and models for the tests of the machinery: a pass from a function, right and wrong on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import graphs
from graphopt.rewrite import Context, Explanation, Kind, Pass, RulePass, Saves, Stage, discovery
from graphopt.rewrite.application import Observer
from graphopt.rewrite.manager import PassRecord, run_passes
from graphopt.shapes import infer_shapes
from graphopt.targets import load_target

Rewrite = Callable[[ir.Node, Context], bool]
EXPLANATION = Explanation("toys", "nothing", "nothing", "this test")


def model(
    text: str, *, opset: int = 17, imports: str = "", weights: Mapping[str, np.ndarray] | None = None
) -> ir.Model:
    """A model from ONNX text without its header; ``weights`` fill initializers that the text only declares."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}{imports}]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    return ir.from_proto(proto)


def rule(
    rewrite: Rewrite,
    *,
    roots: Sequence[str] = (),
    name: str = "toy",
    kind: Kind = Kind.BITWISE,
    stage: Stage = Stage.MERGE,
) -> type[RulePass]:
    """A pass class whose ``rewrite`` is a function of node and context."""

    class Toy(RulePass):
        def rewrite(self, node: ir.Node, ctx: Context) -> bool:
            return rewrite(node, ctx)

    Toy.name, Toy.kind, Toy.stage, Toy.explanation, Toy.roots = name, kind, stage, EXPLANATION, tuple(roots)
    Toy.__doc__ = f"A toy pass called {name}."
    return Toy


def whole(
    apply: Callable[[Context], None],
    *,
    name: str = "toy",
    kind: Kind = Kind.BITWISE,
    stage: Stage = Stage.MERGE,
) -> type[Pass]:
    """A pass class whose ``apply`` is a function of the context."""

    class Toy(Pass):
        def apply(self, ctx: Context) -> None:
            apply(ctx)

    Toy.name, Toy.kind, Toy.stage, Toy.explanation = name, kind, stage, EXPLANATION
    return Toy


def swap(
    old: str,
    new: str,
    attributes: Mapping[str, object] | None = None,
    *,
    where: str = "",
    swap_inputs: bool = False,
    inputs: int | None = None,
    domain: str = "",
    **how: object,
) -> type[RulePass]:
    """A pass that writes ``new`` in place of every ``old`` node (whose output name starts with ``where``)."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != old or (where and not (node.outputs[0].name or "").startswith(where)):
            return False
        operands = list(node.inputs)[:inputs]
        if swap_inputs:
            operands.reverse()
        kept = dict(node.attributes) if attributes is None else attributes
        made = ctx.node(new, operands, like=node.outputs[0], domain=domain)
        for key, value in kept.items():
            made.attributes[key] = value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
        return ctx.replace({node.outputs[0]: made.outputs[0]}, [made], rule=f"{old}-to-{new}", certain=True)

    return rule(rewrite, **how)  # type: ignore[arg-type]


def bypass(op_type: str, *, where: str = "", **how: object) -> type[RulePass]:
    """A pass that lets the first input of every node of a type take the place of its output."""

    def rewrite(node: ir.Node, ctx: Context) -> bool:
        if node.op_type != op_type or (where and not (node.outputs[0].name or "").startswith(where)):
            return False
        source = node.inputs[0]
        assert source is not None
        return ctx.replace({node.outputs[0]: source}, rule=f"bypass-{op_type}")

    return rule(rewrite, **how)  # type: ignore[arg-type]


def context(
    made: ir.Model, *, target: str = "onnxruntime", observers: Sequence[Observer] = (), **how: object
) -> Context:
    """A context on a model (changed in place), its shapes inferred."""
    infer_shapes(made)
    return Context(made, load_target(target), observers=observers, **how)  # type: ignore[arg-type]


def run(made: ir.Model, *passes: type[Pass], **how: object) -> tuple[Context, list[PassRecord]]:
    """Run passes on a model in place."""
    ctx = context(made, **how)  # type: ignore[arg-type]
    return ctx, run_passes(ctx, [cls() for cls in passes])


def running(made: ir.Model, *, kind: Kind = Kind.BITWISE, saves: Saves = Saves.TIME, **how: object) -> Context:
    """A context as it is inside a pass, so that a test can call ``replace`` itself."""
    ctx = context(made, **how)  # type: ignore[arg-type]
    toy = whole(lambda ctx: None, kind=kind)
    toy.saves = saves
    ctx.running(toy())
    return ctx


def register(monkeypatch: pytest.MonkeyPatch, *passes: type[Pass]) -> list[str]:
    """Let graphopt know passes, besides its own; returns the settings that put them into a recipe."""
    found = {**discovery.all_passes(), **{cls.name: cls for cls in passes}}
    monkeypatch.setattr(discovery, "all_passes", lambda: found)
    return [f"{cls.name}.enabled=true" for cls in passes]


def ops(made: ir.Model) -> list[str]:
    """The operators of the main graph and its bodies, in order."""
    return [node.op_type for graph in graphs.nested_graphs(made.graph) for node in graph]


def producer(made: ir.Model, name: str) -> ir.Node:
    """The node that makes the value of this name, in any graph."""
    return next(n for n in graphs.all_nodes(made) if any(o.name == name for o in n.outputs))


def value(made: ir.Model, name: str) -> ir.Value:
    """The value of this name, in any graph."""
    for graph in graphs.all_graphs(made):
        for found in (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)):
            if found.name == name:
                return found
    raise KeyError(name)


def dangling(made: ir.Model) -> list[str]:
    """Uses of values by nodes that no graph of the model holds, and inputs that no graph of the model makes."""
    nodes = set(graphs.all_nodes(made))
    known: set[ir.Value] = {o for n in nodes for o in n.outputs}
    for graph in graphs.all_graphs(made):
        known.update(graph.inputs)
        known.update(graph.initializers.values())
    lines = [
        f"{v.name} is used by a removed {use.node.op_type}" for v in known for use in v.uses() if use.node not in nodes
    ]
    lines += [f"{n.op_type} reads {v.name}" for n in nodes for v in n.inputs if v is not None and v not in known]
    return lines


def ort(made: ir.Model, feeds: Mapping[str, np.ndarray], *, optimized: bool = False) -> dict[str, np.ndarray]:
    """The outputs of a model on ONNX Runtime, by name."""
    from graphopt.runtime.session import create_session

    session = create_session(ir.to_proto(made).SerializeToString(), optimized=optimized, threads=1)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
