"""Every spelling of a low-rank linear, from both of torch's exporters, is found; what only looks like one is not.

So are chains of two products drawn at random, with constants between, and none with anything else between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.canonical.remove_dead import RemoveDead
from graphopt.passes.canonical.remove_identities import RemoveIdentities
from graphopt.passes.lowrank.hoist_reshape import HoistReshape
from graphopt.passes.lowrank.import_pivot import ImportPivot
from graphopt.passes.lowrank.merge_adapter import MergeAdapter
from graphopt.passes.lowrank.merge_factors import MergeFactors
from graphopt.passes.lowrank.reassociate import Reassociate
from graphopt.shapes import infer_shapes
from graphopt.sites import Pair, channel_vector, linear_at, pairs
from tests.passes.common import run_ort, run_pass

torch = pytest.importorskip("torch")

from tests.models.lowrank import (  # noqa: E402
    BY_NAME,
    ENTRIES,
    OPSETS,
    SPELLINGS,
    Entry,
    Exporter,
    export,
    input_names,
    output_names,
)

# torch.export takes ten seconds for one file with all of them in it, TorchScript a third of one: the quick tests have
# those that torch.export writes in another way than TorchScript, and some of the others.
QUICK_OPSETS = (13, 17, 23)
QUICK_DYNAMO = 20
DIFFERENT = frozenset(
    [
        "sequential",
        "sequential_rows",
        "sequential_no_bias_rows",
        "flattened_middle",
        "transposed_middle",
        "cast_middle",
        "used_twice",
        "functional_rows",
        "einsum",
        "sst_rows",
        "sst_diag",
        "product_in_forward",
        "conv_3x3",
        "embedding_tied",
        "pifa",
        "pifa_rows",
        "pifa_bias_parts",
        "pifa_index_put",
        "pifa_cat_indexed",
        "pifa_overlapping",
        "lora",
        "lora_rows",
        "relu",
        "gelu",
        "rms_norm",
        "dropout_training",
        "read_elsewhere",
    ]
)
COMBINATIONS = [
    pytest.param((exporter, opset, None), marks=() if quick else pytest.mark.slow, id=f"{exporter}-{opset}")
    for exporter, opsets in OPSETS.items()
    for opset in opsets
    for quick in [exporter == "torchscript" and opset in QUICK_OPSETS]
] + [pytest.param(("dynamo", QUICK_DYNAMO, DIFFERENT), id=f"dynamo-{QUICK_DYNAMO}-different")]

# What is said of look-alikes; of the others nothing, as something else than a step between two products is there.
REASONS = {
    "relu": "Relu stands between",
    "relu_rows": "Relu stands between",
    "sigmoid": "Sigmoid stands between",
    "softmax": "Softmax stands between",
    "clamp": "Clip stands between",
    "read_elsewhere": "is read elsewhere",
    "returned": "is read elsewhere",
    "shared_down": "is read elsewhere",
    "conv_relu": "Relu stands between",
    "conv_padded_second": "both convolutions look beside",
    "conv_3x3_3x3": "both convolutions look beside",
}


@dataclass(frozen=True)
class Exported:
    """One file with every entry that its exporter can write.

    Attributes:
        exporter: Which one.
        opset: Of the file.
        model: As exported.
        prepared: What the passes make of it that come before any that looks for pairs.
        entries: What is in it.
    """

    exporter: Exporter
    opset: int
    model: ir.Model
    prepared: ir.Model
    entries: tuple[Entry, ...]

    def nodes(self, model: ir.Model, entry: Entry) -> frozenset[ir.Node]:
        """The nodes of an entry in a model."""
        outputs = {value.name: value for value in model.graph.outputs}
        return _behind(outputs[name] for name in output_names(entry))

    def found(self) -> dict[str, list[Pair]]:
        """The pairs of each entry, in the order of the data."""
        known = [pair for pair in pairs(self.prepared) if isinstance(pair, Pair)]
        nodes = {entry.name: self.nodes(self.prepared, entry) for entry in self.entries}
        return {name: [pair for pair in known if pair.second.node in mine] for name, mine in nodes.items()}

    def reasons(self, entry: Entry) -> list[str]:
        """Why look-alikes in an entry's nodes are none."""
        nodes = self.nodes(self.prepared, entry)
        near = [found for found in pairs(self.prepared) if not isinstance(found, Pair)]
        return [reason for node, reason in near if node in nodes]


@pytest.fixture(scope="module", params=COMBINATIONS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    exporter, opset, names = request.param
    entries = tuple(e for e in ENTRIES if e.failure(exporter) is None and (names is None or e.name in names))
    folder = tmp_path_factory.mktemp("spellings")
    model = ir.load(export(entries, exporter, opset, folder))
    # What is asked is whether a spelling is seen, not whether it pays in modules of this size.
    target = folder / "arithmetic.yaml"
    target.write_text(
        "name: arithmetic\nbackend: onnxruntime\nversion: '1'\nopset: 24\nir_version: 12\n"
        "costs: {node: 0.0, gigaflops: 0.001, gigabytes: 1.0e+12}\n"
    )
    passes = (ImportPivot, RemoveIdentities, Reassociate, HoistReshape, RemoveDead)
    prepared, _ = run_pass(model, *passes, target=str(target))
    infer_shapes(prepared)
    return Exported(exporter, opset, model, prepared, entries)


def _behind(values: Iterable[ir.Value | None]) -> frozenset[ir.Node]:
    """The nodes that make values."""
    seen: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += node.inputs
    return frozenset(seen)


def matrix(pair: Pair, opset: int) -> np.ndarray[Any, Any]:
    """U V of a pair as (outputs * kernel of the second, inputs * kernel of the first)."""
    left, right = pair.factors(opset)
    return np.moveaxis(left, 1, -1).reshape(-1, left.shape[1]) @ right.reshape(right.shape[0], -1)


# ---- the modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", SPELLINGS, ids=lambda entry: entry.name)
def test_a_spelling_is_the_matrix_that_it_says(entry: Entry) -> None:
    module, inputs = entry.module(), entry.draw(1, batch=4, length=6)
    with torch.no_grad():
        made, wanted = module(*inputs), module.dense(*inputs)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
        for dims, product in zip(entry.dims, module.matrices(), strict=True):
            assert (*product.shape, int(torch.linalg.matrix_rank(product.double(), rtol=1e-5))) == dims


def test_a_module_is_the_same_every_time() -> None:
    for entry in ENTRIES:
        for a, b in zip(entry.module().parameters(), entry.module().parameters(), strict=True):
            assert torch.equal(a, b)


CANNOT = [(entry, exporter, says) for entry in ENTRIES for exporter, says in entry.fails]


@pytest.mark.parametrize(("entry", "exporter", "says"), CANNOT, ids=lambda value: getattr(value, "name", None))
def test_what_an_exporter_cannot_write(entry: Entry, exporter: Exporter, says: str, tmp_path: Path) -> None:
    for opset in (OPSETS[exporter][0], OPSETS[exporter][-1]):
        with pytest.raises(Exception, match=says):
            export(entry, exporter, opset, tmp_path)


# ---- the files ------------------------------------------------------------------------------------------------------


def test_the_file_computes_what_the_modules_do(exported: Exported) -> None:
    for batch, length in ((4, 6), (2, 3)):
        feeds: dict[str, np.ndarray[Any, Any]] = {}
        wanted: dict[str, Any] = {}
        for entry in exported.entries:
            inputs = entry.draw(2, batch=batch, length=length)
            feeds |= {name: value.numpy() for name, value in zip(input_names(entry), inputs, strict=True)}
            with torch.no_grad():
                made = entry.module()(*inputs)
            made = made if isinstance(made, tuple) else (made,)
            wanted |= dict(zip(output_names(entry), made, strict=True))
        for model in (exported.model, exported.prepared):
            for value, found in zip(model.graph.outputs, run_ort(model, feeds), strict=True):
                if value.name == "dropout_training.y0":
                    continue  # random numbers
                assert value.name is not None
                np.testing.assert_allclose(found, wanted[value.name].numpy(), rtol=0, atol=1e-4, err_msg=value.name)


def test_every_spelling_is_found_with_its_matrix(exported: Exported) -> None:
    wrong: dict[str, object] = {}
    every = exported.found()
    for entry in exported.entries:
        if entry.verdict not in ("pair", "adapter"):
            continue
        found = every[entry.name]
        if len(found) != len(entry.dims):
            wrong[entry.name] = f"{len(found)} pairs of {len(entry.dims)}"
            continue
        for pair, (m, n, r), product in zip(found, entry.dims, entry.module().matrices(), strict=True):
            made, wanted = matrix(pair, exported.opset), product.detach().numpy()
            if pair.rank != r or made.shape != (m, n):
                wrong[entry.name] = (made.shape, pair.rank)
            elif np.abs(made - wanted).max() > 1e-5 * np.abs(wanted).max():
                wrong[entry.name] = "another matrix"
    assert wrong == {}


def test_no_look_alike_is_found(exported: Exported) -> None:
    found = exported.found()
    none = [entry.name for entry in exported.entries if entry.verdict in ("refused", "pivot")]
    assert none
    assert {name: found[name] for name in none if found[name]} == {}


def test_a_pivot_form_is_two_products_a_concat_and_a_gather(exported: Exported) -> None:
    entries = [entry for entry in exported.entries if entry.verdict == "pivot"]
    assert len(entries) >= 5
    for entry in entries:
        ops = Counter(node.op_type for node in exported.nodes(exported.prepared, entry))
        biases = ops.pop("Add", 0)
        assert ops.pop("MatMul", 0) + ops.pop("Gemm", 0) == 2, entry.name
        assert ops.pop("Concat") == 1, entry.name
        assert ops == ({} if entry.name == "pifa_in_order" else {"Gather": 1}), entry.name
        assert biases <= 2, entry.name


def test_pivot_rows_that_overlap_stay_scatters(exported: Exported) -> None:
    ops = {node.op_type for node in exported.nodes(exported.prepared, BY_NAME["pifa_overlapping"])}
    assert ops & {"ScatterElements", "ScatterND"}


def test_a_look_alike_is_refused_with_a_reason(exported: Exported) -> None:
    names = REASONS.keys() & {entry.name for entry in exported.entries}
    assert names
    for name in names:
        reasons = exported.reasons(BY_NAME[name])
        assert reasons, name
        assert all(REASONS[name] in reason for reason in reasons), (name, reasons)


def test_merging_keeps_the_numbers_and_the_look_alikes(exported: Exported) -> None:
    def products(model: ir.Model, entry: Entry) -> int:
        return sum(not isinstance(linear_at(node), str) for node in exported.nodes(model, entry))

    feeds = {
        name: value.numpy()
        for entry in exported.entries
        for name, value in zip(input_names(entry), entry.draw(4, batch=2, length=4), strict=True)
    }
    merged, records = run_pass(exported.prepared, MergeAdapter, MergeFactors)
    assert all(record.kept for record in records)
    before, after = run_ort(exported.prepared, feeds), run_ort(merged, feeds)
    for value, wanted, found in zip(exported.model.graph.outputs, before, after, strict=True):
        if value.name != "dropout_training.y0":
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4, err_msg=str(value.name))
    for entry in exported.entries:
        if entry.verdict == "adapter":
            assert products(merged, entry) == 1, entry.name
        elif entry.verdict == "refused":
            assert products(merged, entry) == products(exported.prepared, entry), entry.name


# ---- drawn chains ---------------------------------------------------------------------------------------------------

ROWS = 3
HARMLESS = ("Mul", "Div", "Add", "Sub", "Identity")
BREAKING = ("Relu", "LayerNormalization", "Softmax", "activation", "position", "read", "returned")


@st.composite
def chains(draw: st.DrawFn, breaking: bool) -> tuple[onnx.ModelProto, list[str]]:
    """Two products with constants, spelled at random, and what stands between: its steps."""
    plain = draw(st.booleans())
    m, n, r = draw(st.permutations(range(2, 7)))[:3]
    steps = draw(st.lists(st.sampled_from(HARMLESS), max_size=3))
    if breaking:
        steps.insert(draw(st.integers(0, len(steps))), draw(st.sampled_from(BREAKING)))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    weights: dict[str, np.ndarray[Any, Any]] = {}
    nodes: list[onnx.NodeProto] = []
    extra: list[str] = []
    helper = onnx.helper

    def node(op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def constant(array: np.ndarray[Any, Any]) -> str:
        name = f"w{len(weights)}"
        weights[name] = array
        return name

    def stored(shape: tuple[int, int]) -> str:
        """A weight, itself or behind what a product sees through."""
        array = random.standard_normal(shape).astype(np.float32)
        match draw(st.sampled_from(["plain", "Transpose", "Cast", "Identity", "Constant", "DequantizeLinear"])):
            case "Transpose":
                return node("Transpose", [constant(np.ascontiguousarray(array.T))], perm=[1, 0])
            case "Cast":
                return node("Cast", [constant(array.astype(np.float64))], to=onnx.TensorProto.FLOAT)
            case "Identity":
                return node("Identity", [constant(array)])
            case "Constant":
                return node("Constant", [], value=onnx.numpy_helper.from_array(array))
            case "DequantizeLinear":
                codes = random.integers(-99, 99, shape, dtype=np.int8)
                axis = draw(st.integers(0, 1))
                scale = (random.random(shape[axis]) + 0.5).astype(np.float32)
                return node("DequantizeLinear", [constant(codes), constant(scale)], axis=axis)
        return constant(array)

    def product(x: str, inputs: int, outputs: int) -> str:
        spelling = draw(st.sampled_from(["MatMul", "FusedMatMul", "Gemm"] if plain else ["MatMul", "FusedMatMul"]))
        if spelling == "MatMul":
            return node("MatMul", [x, stored((inputs, outputs))])
        flipped = draw(st.booleans())
        weight = stored((outputs, inputs) if flipped else (inputs, outputs))
        options: dict[str, Any] = {"transB": int(flipped), "alpha": draw(st.sampled_from([1.0, -0.5]))}
        if spelling == "FusedMatMul":
            return node("FusedMatMul", [x, weight], domain="com.microsoft", **options)
        biases = [constant(random.standard_normal(outputs).astype(np.float32))] if draw(st.booleans()) else []
        return node("Gemm", [x, weight, *biases], **options)

    value = product("x", n, r)
    for step in steps:
        match step:
            case "Identity" | "Relu" | "Softmax":
                value = node(step, [value])
            case "LayerNormalization":
                value = node(step, [value, constant(np.ones(r, np.float32))])
            case "activation":
                value = node("Mul", [value, node("Slice", ["x", *map(constant, map(np.array, ([0], [1], [-1])))])])
            case "position":
                value = node("Mul", [value, constant(random.random((ROWS, 1)).astype(np.float32) + 0.5)])
            case "read":
                extra.append(node("Sin", [value]))
            case "returned":
                extra.append(value)
            case _:
                # Of com.microsoft's results no number of axes is known: a constant of two may add one.
                fused = any(one.op_type == "FusedMatMul" for one in nodes)
                shape: tuple[int, ...] = draw(
                    st.sampled_from([(r,), (1,), ()] if fused else [(r,), (1, r), (1, 1), (1,), ()])
                )
                other = constant((random.random(shape) + 0.5).astype(np.float32))
                swapped = step in ("Mul", "Add") and draw(st.booleans())
                value = node(step, [other, value] if swapped else [value, other])
    y = product(value, r, m)
    sizes = [ROWS, n] if plain else [2, ROWS, n]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in [y, *extra]],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), steps


@settings(max_examples=150, deadline=None)
@given(chains(breaking=False))
def test_two_products_with_constants_between_are_a_pair(chain: tuple[onnx.ModelProto, list[str]]) -> None:
    """What is found, multiplied out, is what ONNX Runtime computes."""
    proto, _ = chain
    model = ir.from_proto(proto)
    infer_shapes(model)
    (pair,) = pairs(model)
    assert isinstance(pair, Pair)
    shape = [int(size.dim_value) for size in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    left, right = pair.factors(17)
    wanted = x.astype(np.float64) @ right.T @ left.T
    if pair.shift is not None:
        wanted = wanted + pair.second.matrix(17) @ pair.shift
    if pair.second.bias is not None:
        wanted = wanted + channel_vector(pair.second.bias, pair.second.outputs)
    (found,) = run_ort(proto, {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


@settings(max_examples=150, deadline=None)
@given(chains(breaking=True))
def test_anything_else_between_breaks_the_pair(chain: tuple[onnx.ModelProto, list[str]]) -> None:
    proto, steps = chain
    run_ort(proto, {"x": np.ones([d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim], np.float32)})
    model = ir.from_proto(proto)
    infer_shapes(model)
    assert not [found for found in pairs(model) if isinstance(found, Pair)], steps
