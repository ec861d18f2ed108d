"""What torch's exporter leaves, made a file: names kept, shape arithmetic folded, metadata dropped.

Weights are not computed with: a product of two weights is structure (a low-rank pair, an adapter, a scale)
that the passes look for, and `graphopt optimize` folds what they leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.exporting.branches.markers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAYOUT_ONLY = frozenset({"Transpose", "Identity"})


def tidy(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], axes: Mapping[str, Mapping[int, str]]
) -> list[str]:
    """Clean ``model`` in place; its interface becomes ``inputs`` and ``outputs``, in that order.

    Returns notes, one sentence each: inputs that nothing consumes, weights that are computed at run time.

    Raises:
        GraphoptError: torch returned another number of inputs or outputs than the module has.
    """
    if len(model.graph.inputs) != len(inputs) or len(model.graph.outputs) != len(outputs):
        raise GraphoptError(
            f"torch exported {len(model.graph.inputs)} inputs and {len(model.graph.outputs)} outputs"
            f" of a module that has {len(inputs)} and {len(outputs)}",
            hint="modules must take and return tensors only",
        )
    weights = _fold_all_but_weights(model)
    kept = _weight_arithmetic(model.graph, weights)
    _separate_outputs(model.graph)
    notes = _name_interface(model.graph, inputs, outputs)
    _name_axes(model.graph, axes)
    _drop_metadata(model)
    model.producer_name, model.producer_version = "graphopt", None
    model.graph.name = "main_graph"
    notes += _unused_inputs(model.graph)
    return notes + kept


def _module_tensors(graph: ir.Graph) -> set[str]:
    """The names of the module's parameters and buffers (a constant made in ``forward`` is neither)."""
    kind = "pkg.torch.export.graph_signature.InputSpec.kind"
    return {
        name for name, value in graph.initializers.items() if value.metadata_props.get(kind) in ("PARAMETER", "BUFFER")
    }


def _depends_on_weights_alone(node: ir.Node, weights: Set[str]) -> bool:
    """Whether ``node`` computes on weights and constants only, and on one weight at least."""
    found = False
    stack, seen = [node], {node}
    while stack:
        for value in stack.pop().inputs:
            if value is None:
                continue
            producer = value.producer()
            if value.is_initializer():
                found = found or value.name in weights
            elif producer is None:
                return False  # an input of the graph, or of a body
            elif producer not in seen:
                seen.add(producer)
                stack.append(producer)
    return found


def _fold_all_but_weights(model: ir.Model) -> set[str]:
    """Fold what computes on constants, leave what computes on weights. Returns the names of the weights."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants

    weights = _module_tensors(model.graph)
    stored: dict[str, str] = {}  # a folded weight → the module's name for it

    def should_fold(node: ir.Node) -> bool | None:
        if not _depends_on_weights_alone(node, weights):
            return None
        # A weight stored transposed is the same weight. Where it is shared, a copy would grow the file.
        source = node.inputs[0]
        if node.op_type not in _LAYOUT_ONLY or source is None or len(list(source.uses())) > 1:
            return False
        folded = node.outputs[0].name or ""
        stored[folded] = stored.get(source.name or "", source.name or "")
        weights.add(folded)
        return True

    common.InlinePass()(model)
    fold_constants(model, should_fold=should_fold)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=16)(model)  # shapes and axes
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _give_bodies_their_outputs(model.graph)
    taken = set(model.graph.initializers)
    for folded, name in stored.items():
        value = model.graph.initializers.get(folded)
        if value is not None and f"{name}.T" not in taken:
            value.name = f"{name}.T"
            weights.add(f"{name}.T")
    return weights


def _give_bodies_their_outputs(graph: ir.Graph) -> None:
    """Copy what a branch or body returns from outside: the Identity that did so was taken for needless."""
    for node in list(graph.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            body = attribute.as_graph()
            own = {value for inner in body for value in inner.outputs} | set(body.inputs)
            own |= set(body.initializers.values())
            for index, value in enumerate(body.outputs):
                if value not in own:
                    copied = ir.Node("", "Identity", [value], name=f"{body.name}_output_{index}")
                    output = copied.outputs[0]
                    output.name, output.shape, output.type = f"{value.name}_{copied.name}", value.shape, value.type
                    body.append(copied)
                    body.outputs[index] = output


def _separate_outputs(graph: ir.Graph) -> None:
    """Give each output a value of its own: not an input, not a weight, not another output."""
    seen: set[ir.Value] = set()
    for index, value in enumerate(graph.outputs):
        if value.is_graph_input() or value.is_initializer() or value in seen:
            node = ir.Node("", "Identity", [value], name=f"node_output_{index}")
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = copy
            value = copy
        seen.add(value)


def _name_interface(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> list[str]:
    notes = []
    names = []
    for name in outputs:
        if name in inputs:
            notes.append(f"the output {name!r} has the name of an input; it is called '{name}_out'")
            name = f"{name}_out"
        names.append(name)
    interface = [*graph.inputs, *graph.outputs]
    wanted = set(inputs) | set(names)
    for value in _values(graph):  # make room for the interface's names
        if value.name in wanted:
            _rename(graph, value, f"{value.name}__")
    for value, name in zip(interface, [*inputs, *names], strict=True):
        _rename(graph, value, name)
    from onnx_ir.passes.common import NameFixPass

    NameFixPass()(ir.Model(graph, ir_version=10))
    return notes


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph.all_nodes():
        yield from node.outputs


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    value.name = name  # onnx_ir keeps the graph's table of initializers and its tensors in step


def _name_axes(graph: ir.Graph, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Inputs show the user's symbols (torch shows its own for the second of two tied axes)."""
    for value in graph.inputs:
        symbols = axes.get(value.name or "", {})
        if value.shape is not None:
            value.shape = ir.Shape([symbols.get(axis, size) for axis, size in enumerate(value.shape)])


def _drop_metadata(model: ir.Model) -> None:
    """Drop what torch notes down: stack traces hold the paths of this machine, and are half of a small file."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for holder in (model, model.graph):
        holder.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()


def _unused_inputs(graph: ir.Graph) -> list[str]:
    return [
        f"the input {value.name!r} has no consumer: nothing that the module returns depends on it"
        for value in graph.inputs
        if not value.uses() and not value.is_graph_output()
    ]


def _weight_arithmetic(graph: ir.Graph, weights: Set[str]) -> list[str]:
    """What the graph computes from weights alone: kept, since folding it would erase structure."""
    kept = [
        node
        for node in graph.all_nodes()
        if node.op_type != "Constant" and node.domain != DOMAIN and _depends_on_weights_alone(node, weights)
    ]
    if all(node.op_type in _LAYOUT_ONLY for node in kept):  # a shared weight, transposed for one of its uses
        return []
    sources = {value.name or "" for node in kept for value in node.inputs if value and value.name in weights}
    named = ", ".join(sorted(sources)[:4]) + (", …" if len(sources) > 4 else "")
    operators = ", ".join(sorted({node.op_type for node in kept}))
    count = f"{len(kept)} nodes compute" if len(kept) > 1 else "1 node computes"
    return [f"{count} on weights alone ({operators} of {named}): kept, since folding would erase this structure"]
