"""PivotLinear in TensorRT engines: one launch for both products, where there are few rows.

Inputs of the plugin, all of them always given; T is float16, bfloat16 or float32:
    x (..., n) T; kept (r, n), column form (m, r); coefficients (m - r, r), column form (r, n - r);
    bias (m,) T, zeros where there is none; positions (m,), column form (n,), int32: see ``kernels.positions_of``.
Attribute:
    form: 0 row, 1 column.
Outputs:
    y (..., m); inner (..., r), what is between the two products: memory for the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import add_constant, fresh, remove, take_place
from graphopt.engines.plugins import (
    Attributes,
    Choice,
    Lowered,
    Meaning,
    Plugin,
    Refused,
    Types,
    Written,
)
from graphopt.engines.plugins.measured import Measurements, load_measurements
from graphopt.engines.plugins.nodes import write_node
from graphopt.errors import BadInput
from graphopt.kernels.kernel import Kernel, Shape
from graphopt.plugins.pivot_linear.collapse import collapse, expand
from graphopt.plugins.pivot_linear.function import (
    DOMAIN,
    OLDEST_OPSET,
    OP,
    Form,
    Signature,
    attach,
    is_pivot_linear,
    standard_nodes,
)
from graphopt.plugins.pivot_linear.kernels import DTYPES, FORMS, kernels_for, positions_of
from graphopt.plugins.pivot_linear.match import PivotSite, pivot_at
from graphopt.shapes import infer_shapes
from graphopt.sites import Spelling
from graphopt.targets.target import type_name

MEASURED = Path(__file__).with_name("measured.json")
INPUTS = ("x", "kept", "coefficients", "bias", "positions")
OUTPUTS = ("y", "inner")
_MOST_ELEMENTS = 2**31
"""The kernels count elements in int32."""


def results(shapes: Sequence[Shape], attributes: Attributes) -> Sequence[Shape]:
    """y (..., m) and inner (..., r)."""
    x, kept, bias = shapes[0], shapes[1], shapes[3]
    rank = kept[0] if _form(attributes) == "row" else kept[1]
    return [[*x[:-1], bias[0]], [*x[:-1], rank]]


def kernels(types: Types, attributes: Attributes) -> Mapping[int, Kernel]:
    """The kernels of the form and the element type of x."""
    return kernels_for(_form(attributes), types[0])


def _form(attributes: Attributes) -> Form:
    number = int(attributes["form"][0])
    if number not in range(len(FORMS)):
        raise BadInput(f"{OP} has no form {number}")
    return FORMS[number]


# -- into a model ------------------------------------------------------------------------------------------------------


def lower(model: ir.Model, choice: Choice) -> Lowered:
    """Write a plugin node for each pivot form of a model that the kernels can run and the choice wants.

    Args:
        model: Changed in place. PivotLinear nodes are written as standard operators where they do not become plugins.
        choice: What is wanted.

    Raises:
        MissingDependency: A node is to be written and onnx-graphsurgeon is not installed.
    """
    expand(model)
    infer_shapes(model)
    measurements = load_measurements(MEASURED)
    refused: list[Refused] = []
    taken: dict[ir.Value, str] = {}
    for site in _sites(model):
        reason = _cannot(model, site) or choice.refusal or _unwanted(site, choice, measurements)
        if reason is None:
            taken[site.y] = _why(choice)
        else:
            last = site.nodes[-1]
            refused.append(Refused(OP, last.name or site.y.name or "", reason))
    if not taken:
        return Lowered((), tuple(refused))
    version = model.ir_version
    reasons = {value.name: reason for value, reason in taken.items()}
    collapse(model, wanted=lambda site: site.y in taken)
    names = graphs.value_names(model)
    written: list[Written] = []
    for node in [node for node in model.graph if is_pivot_linear(node)]:
        reason = reasons[node.outputs[0].name]
        written.append(_write(model, node, reason, names))
    attach(model)  # no node is left that has a body
    model.ir_version = version  # which those bodies had raised
    if not any(node.domain == DOMAIN for node in graphs.all_nodes(model)):
        model.graph.opset_imports.pop(DOMAIN, None)
    return Lowered(tuple(written), tuple(refused))


def _sites(model: ir.Model) -> Iterator[PivotSite]:
    """The largest form at each place, in the order of the graph."""
    for graph in list(graphs.nested_graphs(model.graph)):
        found: list[PivotSite] = []
        seen: set[ir.Node] = set()
        for node in reversed(list(graph)):
            if node not in seen and isinstance(site := pivot_at(node), PivotSite):
                found.append(site)
                seen.update(site.nodes)
        yield from reversed(found)


def _cannot(model: ir.Model, site: PivotSite) -> str | None:
    """Why the kernels do not run a form; None where they do."""
    dtype = type_name(site.kept.weight.dtype)
    if graphs.opset(model) < OLDEST_OPSET:
        return f"the model is of opset {graphs.opset(model)}; {OLDEST_OPSET} or newer is needed"
    if site.nodes[-1].graph is not model.graph:
        return "it is in the body of another node, where no plugin has been tried"
    if Spelling.GATHER in (site.first.spelling, site.second.spelling):
        return "it looks rows of a table up; the kernels multiply"
    if site.kept.kernel or site.axis == 1:
        return "it is a convolution; the kernels multiply matrices"
    if site.axis != -1:
        return f"its channels are along axis {site.axis}; the kernels take the last one"
    if site.first.weight.quantised or site.second.weight.quantised:
        return "its weights are quantised; the kernels take them as they are"
    if dtype not in DTYPES:
        return f"its weights are {dtype}; there are kernels for {', '.join(DTYPES)}"
    if site.x.shape is None or len(site.x.shape) < 1:
        return "the number of axes of x is not known"
    if not site.rank or (site.outputs if site.form == "row" else site.inputs) == site.rank:
        return "all of its channels are pivots; there is one product only"
    return None


def _unwanted(site: PivotSite, choice: Choice, measurements: Measurements) -> str | None:
    """Why a form that the kernels can run is not given to them."""
    rows = choice.rows(site.x.shape)
    if rows is not None and rows[1] * max(site.inputs, site.outputs) >= _MOST_ELEMENTS:
        return f"{rows[1]} rows are more elements than the kernels count"
    if choice.mode == "always":
        return None
    return measurements.why_not(
        gpu=choice.gpu,
        variant=site.form,
        dtype=type_name(site.kept.weight.dtype),
        rows=rows,
        sizes={"inputs": site.inputs, "outputs": site.outputs, "rank": site.rank},
    )


def _why(choice: Choice) -> str:
    return "wanted wherever it can run" if choice.mode == "always" else f"measured faster on {choice.gpu}"


def _write(model: ir.Model, node: ir.Node, reason: str, names: set[str]) -> Written:
    """The plugin node in the place of a PivotLinear node."""
    signature = Signature.of(node, graphs.opset(model))
    given: list[ir.Value | None] = [*node.inputs, *[None] * (5 - len(node.inputs))]
    x, kept, coefficients, bias, order = given
    assert x is not None and kept is not None and coefficients is not None
    assert kept.shape is not None and coefficients.shape is not None and kept.dtype is not None
    first, second = kept.shape.numpy()
    rank = first if signature.form == "row" else second
    outputs = rank + coefficients.shape.numpy()[0] if signature.form == "row" else first
    channels = outputs if signature.form == "row" else rank + coefficients.shape.numpy()[1]
    old = node.outputs[0]
    base = old.name or OP
    graph = model.graph
    if bias is None:
        zeros = ir.tensor(np.zeros(outputs, kept.dtype.numpy()), dtype=kept.dtype)
        bias = add_constant(graph, zeros, f"{base}/bias", names)
    positions = positions_of(graphs.constant_array(order), signature.form, channels)
    placed = add_constant(graph, ir.tensor(positions), f"{base}/positions", names)
    leading = list(x.shape)[:-1] if x.shape is not None else []
    y = ir.Value(name=fresh(f"{base}/plugin", names), type=old.type, shape=old.shape)
    inner = ir.Value(name=fresh(f"{base}/inner", names), type=old.type, shape=ir.Shape([*leading, rank]))
    form = {"form": FORMS.index(signature.form)}
    inputs = [x, kept, coefficients, bias, placed]
    made = write_node(model, graph, PLUGIN, inputs, form, [y, inner], name=f"{base}/{OP}", names=names)
    graph.insert_before(node, made)
    take_place(old, y, graph)
    remove(node)
    dtype = type_name(kept.dtype)
    attributes = {"form": np.array([form["form"]], np.int64)}
    return Written(OP, made.name or "", PLUGIN.types_of([dtype] * 4 + ["int32"]), attributes, reason)


# -- and out again -----------------------------------------------------------------------------------------------------


def meaning(node: ir.Node, attributes: Attributes, opset: int) -> Meaning:
    """The standard operators that a node of the plugin stands for.

    Raises:
        BadInput: Its positions are no constant, or its weights have no known shape.
    """
    form = _form(attributes)
    x, kept, coefficients, bias, positions = node.inputs
    placed = graphs.constant_array(positions)
    sizes = graphs.static_shape(coefficients)
    if placed is None or sizes is None or kept is None or bias is None:
        raise BadInput(f"{OP} has constant positions, and weights of known shapes", where=node.name)
    order = np.argsort(placed) if form == "row" else placed
    ordered = not np.array_equal(order, np.arange(len(order)))
    added = graphs.constant_array(bias)
    biased = added is None or bool(np.any(np.asarray(added, np.float64) != 0))
    nodes: list[ir.Node] = []
    gathered: ir.Value | None = None
    if ordered:
        made = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.asarray(order, np.int64)))])
        nodes.append(made)
        gathered = made.outputs[0]
    signature = Signature(opset, form, -1, bias=biased, order=ordered)
    inputs = [x, kept, coefficients, bias if biased else None, gathered]
    nodes += standard_nodes(signature, inputs, sizes=sizes)
    return Meaning(nodes, [nodes[-1].outputs[0], None])


PLUGIN = Plugin(
    name=OP,
    inputs=INPUTS,
    outputs=OUTPUTS,
    attributes=(("form", "int64"),),
    types=tuple((dtype, dtype, dtype, dtype, "int32", dtype, dtype) for dtype in DTYPES),
    results=results,
    kernels=kernels,
    lower=lower,
    meaning=meaning,
)
