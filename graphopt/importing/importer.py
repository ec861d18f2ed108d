"""`import_factors`: a state dict and a graph become a graph with the structure of the state dict, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs, weights
from graphopt.errors import BadInput, GateFailed
from graphopt.files import load_model, stage_model
from graphopt.importing.formats import Form, Module, recognise
from graphopt.importing.places import Finder, Match, eps
from graphopt.importing.states import State, open_state
from graphopt.importing.writing import ImportFactors
from graphopt.rewrite import Context
from graphopt.shapes import infer_shapes
from graphopt.sites import Linear, is_channel_vector, weight_of
from graphopt.targets import load_target
from graphopt.verification.structure import check_structure, interface_of

if TYPE_CHECKING:
    from graphopt.report import Verification

# A condition that never holds: the distance is measured and judged by nobody.
_MEASURE_ONLY = ("cosine<-2",)


@dataclass(frozen=True)
class ImportedModule:
    """A module that was imported.

    Attributes:
        name: In the state dict.
        form: ``factors``, ``scaled factors``, ``pivot`` or ``adapter``.
        outputs: Rows of its matrix.
        inputs: Columns (of a convolution: times the places of the kernel).
        rank: The size between the factors.
        before: Elements of the dense weight.
        after: Elements that stand in its place; with an adapter the dense weight stays, and counts.
        difference: ||W - product|| / ||W||, W being the graph's; None of an adapter.
        products: How many products of the graph read the weight.
        by: How it was found in the graph: ``weight name``, ``node name`` or ``values``.
        present: Whether the graph held the factors already; then it was left as it was.
    """

    name: str
    form: str
    outputs: int
    inputs: int
    rank: int
    before: int
    after: int
    difference: float | None
    products: int
    by: str
    present: bool


@dataclass
class ImportReport:
    """What `import_factors` did.

    Attributes:
        path: The file written.
        modules: What was imported.
        unread: Tensors of the state dict that belong to no module imported: norms, dense layers, embeddings.
        replaced: Whether the numbers in the graph were to be replaced (``replace``).
        verification: How far the result is from the original.
        notes: What is worth knowing, one sentence each.
    """

    path: str
    modules: list[ImportedModule]
    unread: int
    replaced: bool
    verification: Verification
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for ``json.dumps``."""
        return dataclasses.asdict(self)


def import_factors(
    model: str | Path,
    state: str | Path,
    out: str | Path,
    *,
    replace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Write the factors of a state dict into the graph of the same network.

    The graph is the network exported dense: each weight that the state dict holds as factors must be their product,
    to the rounding of its dtype. In its place stand the factors: two products, or in pivot form two products, Concat
    and Gather. A LoRA adapter is added beside its layer.

    Args:
        model: The ``.onnx`` file.
        state: A ``.safetensors`` file, a torch file (only tensors are loaded), or a folder of either. LoRA's
            ``adapter_config.json`` lies beside it.
        out: Where to write.
        replace: The graph is that of the network before it was compressed: its weights are replaced, whatever they
            are, and modules are found by name only.
        progress: Told in words what is being done.

    Returns:
        What was imported, and how far the result is from the graph given: of factors no further than rounding
        explains, unless ``replace``; of an adapter as far as it changes the network.

    Raises:
        BadInput: A file cannot be used, or a module of the state dict is not in the graph, or is another there.
            Nothing was written.
        GateFailed: The result does not compute what the graph does, and should. Nothing was written.
        MissingDependency: The state dict is a torch file and torch is not installed.
    """
    say = progress or (lambda text: None)
    if Path(out).exists() and Path(state).exists() and Path(out).samefile(state):
        raise BadInput("is the checkpoint: it would be overwritten", where=str(out), hint="give -o another name")
    say("reading")
    opened = open_state(state)
    modules = recognise(opened)
    graph = load_model(model)
    infer_shapes(graph)
    say("matching")
    matches = _match(graph, opened, modules, replace=replace)
    rows = [_row(match) for match in matches]
    read = {key for match in matches for key in match.module.keys.values()}
    _require_finite(opened, read)
    others = _other_weights(graph, opened, read)
    if others and not replace:
        raise BadInput(
            f"{others[0]} is another tensor in the graph, and is not part of a module that can be imported",
            where=str(opened.path),
            hint="export the graph from the network of this checkpoint; with --replace the graph's own numbers stay",
        )
    say("writing")
    interface = interface_of(graph)
    known = frozenset(check_structure(graph))
    ctx = Context(graph, load_target("onnxruntime"))
    writing = ImportFactors(opened, [match for match in matches if not match.present])
    ctx.running(writing)
    writing.apply(ctx)
    ctx.running(None)
    beside = [
        match.module.name
        for match in matches
        if match.module.form is not Form.ADAPTER and not match.present and match.place.linear.weight.root.uses()
    ]
    assert not (broken := [line for line in check_structure(graph, interface) if line not in known]), broken[0]
    with stage_model(graph, out) as staged:
        say("verifying")
        verification = _verify(model, staged.staged_path, matches, replace=replace)
        staged.commit()
    unread = sum(key not in read for key in opened.shapes)
    return ImportReport(str(out), rows, unread, replace, verification, _notes(rows, beside, others))


def _match(model: ir.Model, state: State, modules: Sequence[Module], *, replace: bool) -> list[Match]:
    finder = Finder(model, state)
    matches: list[Match] = []
    taken: dict[int, Module] = {}
    for module in modules:
        by_value = not replace and module.form is not Form.ADAPTER
        match = finder.find(module, by_value=by_value)
        if match is None:
            continue
        where = f"{state.path}: {module.name}"
        if match.present:
            _require_same_factors(match, where)
            matches.append(match)
            continue
        if (other := taken.setdefault(id(match.place), module)) is not module:
            raise BadInput(
                f"is the same product of the graph as {other.name}: {match.place.linear.node.name}",
                where=where,
                hint="tied weights cannot be imported as two modules",
            )
        if module.form is Form.PIVOT:
            module.positions(state, match.layout)
        if by_value:
            _require_same(match, where)
            _require_no_quantisation(match, where)
        _require_bias(match, state, where, graphs.opset(model))
        matches.append(match)
    if not matches:
        raise BadInput(
            "none of its modules is in the graph", where=str(state.path), hint="is it the graph of the same network?"
        )
    if all(match.present for match in matches):
        raise BadInput(
            "the graph holds all of its factors already",
            where=str(state.path),
            hint="there is nothing to import: `graphopt optimize` works on the graph as it is",
        )
    return matches


def _require_same_factors(match: Match, where: str) -> None:
    assert match.difference is not None and match.limit is not None
    if not match.difference <= match.limit:
        raise BadInput(
            f"the graph holds factors of this name with other numbers: relative difference {match.difference:.2g}",
            where=where,
            hint="export the graph from this state dict; factors are written in the place of dense weights only",
        )


def _require_same(match: Match, where: str) -> None:
    assert match.difference is not None and match.limit is not None
    if not match.difference <= match.limit:
        raise BadInput(
            f"the product of its factors is not the weight in the graph: relative difference {match.difference:.2g},"
            f" rounding explains {match.limit:.1g}",
            where=where,
            hint="export the graph from the compressed network, or give --replace where it is the uncompressed one's",
        )


def _require_no_quantisation(match: Match, where: str) -> None:
    if match.place.linear.weight.quantised:
        raise BadInput(
            "the weight in the graph is quantised", where=where, hint="import into the graph as it was before"
        )


def _require_bias(match: Match, state: State, where: str, opset: int) -> None:
    """Weights are imported, biases are the graph's own: those of the state dict must be the same."""
    module = match.module
    if (key := module.keys.get("middle")) is not None and np.any(state.read(key)):
        raise BadInput(f"{key} is a bias between the factors, which a dense layer has no place for", where=where)
    if (key := module.keys.get("bias")) is None:
        return
    wanted = state.read(key).astype(np.float64).reshape(-1)
    for linear in match.place.linears:
        found = _bias_of(linear, opset)
        if found is None and np.any(wanted):
            told = " (PIFA's own layer registers one and never adds it)" if module.form is Form.PIVOT else ""
            raise BadInput(
                f"{key} is not zero, and the graph's layer adds no bias{told}",
                where=where,
                hint="leave it out of the state dict to go without, or export the graph from a network that adds it",
            )
        limit = 8 * max(eps(state.dtype(key)), eps(np.dtype(linear.weight.dtype.numpy())))
        if found is not None and not np.allclose(found, wanted, rtol=limit, atol=limit * float(np.abs(wanted).max())):
            raise BadInput(
                f"{key} is not the bias that the graph's layer adds",
                where=where,
                hint="is the graph of the same network?",
            )


def _bias_of(linear: Linear, opset: int) -> np.ndarray | None:
    """What is added to a product, by the node or by the only Add that reads it, in float64; None: nothing."""
    bias = linear.bias
    if bias is None and len(linear.y.uses()) == 1 and not linear.y.is_graph_output():
        reader = next(iter(linear.y.uses())).node
        if reader.op_type == "Add" and reader.domain == "":
            operand = next((v for v in reader.inputs if v is not linear.y), None)
            axis = linear.y_axis if linear.y_axis < 0 else -1 - len(linear.kernel)
            bias = operand if is_channel_vector(operand, linear.outputs, axis) else None
    weight = weight_of(bias)
    if weight is None:
        return None
    return np.broadcast_to(weight.read(opset).astype(np.float64).reshape(-1), (linear.outputs,))


def _row(match: Match) -> ImportedModule:
    layout, module = match.layout, match.module
    inputs = layout.inputs * math.prod(module.kernel)
    before = layout.outputs * inputs
    factors = layout.rank * (inputs + layout.outputs)
    after = {Form.ADAPTER: before + factors, Form.PIVOT: factors - layout.rank**2}.get(module.form, factors)
    if match.present:
        before = after
    return ImportedModule(
        module.name,
        module.form.value,
        layout.outputs,
        inputs,
        layout.rank,
        before,
        after,
        match.difference,
        len(match.place.linears),
        match.by,
        match.present,
    )


def _require_finite(state: State, read: Collection[str]) -> None:
    for key in sorted(read):
        array = state.read(key)
        if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
            continue
        if not np.isfinite(array.astype(np.float32)).all():
            raise BadInput("holds NaN or infinity", where=f"{state.path}: {key}", hint="is the checkpoint damaged?")


def _other_weights(model: ir.Model, state: State, read: Collection[str]) -> list[str]:
    """Tensors of the state dict that belong to no module, and that the graph holds under their names, but other."""
    bare = {_bare(key): key for key in state.shapes if key not in read}
    found = []
    for name, value in model.graph.initializers.items():
        key = bare.get(_bare(name))
        tensor = value.const_value
        if key is None or tensor is None or not tensor.dtype.is_floating_point():
            continue
        theirs = state.read(key).astype(np.float64)
        ours = weights.read(tensor).astype(np.float64)
        same = [turned for turned in (ours, ours.T) if turned.shape == theirs.shape]
        limit = 8 * max(eps(state.dtype(key)), eps(np.dtype(tensor.dtype.numpy())))
        floor = limit * float(np.abs(theirs).max(initial=0.0))
        # Of another shape the name means something else here.
        if same and not any(np.allclose(one, theirs, rtol=limit, atol=floor) for one in same):
            found.append(key)
    return sorted(found)


def _bare(name: str) -> str:
    """A tensor's name without what wrappers put before it."""
    for prefix in ("base_model.model.", "module.", "model."):
        name = name.removeprefix(prefix)
    return name


def _notes(rows: Sequence[ImportedModule], beside: Sequence[str], others: Sequence[str]) -> list[str]:
    notes = []
    if others:
        listed = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        notes.append(f"{len(others)} tensors are others in the graph, whose own stay: {listed}")
    present = [row.name for row in rows if row.present]
    larger = [row.name for row in rows if row.form != Form.ADAPTER and row.after >= row.before and not row.present]
    for names, told in (
        (present, "stood in the graph already"),
        (larger, "take no less than the dense weight"),
        (beside, "leave the dense weight where it is, since something else reads it"),
    ):
        if names:
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            notes.append(f"{len(names)} of {len(rows)} {told}: {listed}")
    return notes


def _verify(model: str | Path, staged: Path, matches: Sequence[Match], *, replace: bool) -> Verification:
    """Run both on made-up inputs. Factors must compute what the dense weights did; the rest is measured only."""
    from graphopt.verifying import verify

    # Where the state dict is in a narrower dtype than the graph, the weights differ by that dtype's rounding.
    exact = not replace and all(_as_precise(match) for match in matches)
    report = verify(model, staged, fail_if=() if exact else _MEASURE_ONLY)
    if exact and not report.passed:
        raise GateFailed(
            f"with the factors the graph computes something else: {report.reason}",
            where=str(staged.name),
            hint="nothing was written; with --replace the checkpoint's numbers are taken all the same",
        )
    if not exact and report.passed:
        report.verification.verdict = "measured"
    return report.verification


def _as_precise(match: Match) -> bool:
    if match.module.form is Form.ADAPTER or match.limit is None:
        return False
    return match.limit <= 8.0 * eps(np.dtype(match.place.linear.weight.dtype.numpy()))
