"""PivotLinear for TensorRT: which forms become plugin nodes, which do not and why, and that the nodes mean the same."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import graphopt.plugins.pivot_linear.tensorrt as lowering
from graphopt import graphs
from graphopt.engines import build_engine
from graphopt.engines.plugins import Choice, Lowered, find_plugins, lower, module_of, twin
from graphopt.engines.plugins.measured import Measurements, load_measurements
from graphopt.engines.plugins.nodes import attributes_of, is_node_of
from graphopt.engines.plugins.qdp import prepare
from graphopt.errors import BadInput, GraphoptError
from graphopt.kernels.emulate import emulate
from graphopt.plugins.pivot_linear import collapse
from graphopt.plugins.pivot_linear.tensorrt import PLUGIN
from graphopt.shapes import infer_shapes
from tests.passes.common import op_types, run_ort
from tests.passes.fuse.common import DOUBLE, FLOAT16, G, in_body, random
from tests.plugins.test_pivot_linear import M, N, R, _Case, _pair

Array = npt.NDArray[Any]

pytest.importorskip("onnx_graphsurgeon")

ALWAYS = Choice("always")
B = 3
SPELLINGS = [("MatMul", "MatMul"), ("Gemm transB", "Gemm transB"), ("Gemm", "MatMul")]


def case_of(
    *shape: int | str,
    rows: bool = True,
    bias: bool = True,
    kinds: tuple[str, str] = ("MatMul", "MatMul"),
    opset: int = 17,
) -> ir.Model:
    """A model with one pivot form in standard operators, its permutation as a Gather."""
    g = G(opset)
    g.output(_pair(g, g.input("x", *shape), kinds, (N, R, M)))
    return _Case(g, rows=rows, bias=bias).write()


def nodes_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in graphs.all_nodes(model) if is_node_of(node, PLUGIN)]


def constant(value: ir.Value | None) -> Array:
    array = graphs.constant_array(value)
    assert array is not None
    return array


def by_contract(node: ir.Node, x: Array) -> Array:
    """What the kernel writes to y, said element by element as kernels.py says it: nothing of the lowering is used."""
    kept, coefficients, bias, positions = (constant(value) for value in node.inputs[1:])
    assert positions.dtype == np.int32 and kept.dtype == coefficients.dtype == bias.dtype
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    kept, coefficients = kept.astype(np.float64), coefficients.astype(np.float64)
    y = np.full((len(rows), len(bias)), np.nan)
    if attributes_of(node, PLUGIN)["form"].tolist() == [0]:
        pivots = rows @ kept.T
        made = np.concatenate([pivots, pivots @ coefficients.T], axis=1)
        for place, channel in enumerate(positions):
            y[:, channel] = made[:, place]
    else:
        gathered = np.stack([rows[:, channel] for channel in positions], axis=1)
        r = kept.shape[1]
        y = (gathered[:, :r] + gathered[:, r:] @ coefficients.T) @ kept.T
    return (y + bias.astype(np.float64)).reshape(*x.shape[:-1], -1)


def assert_lowers(model: ir.Model, feeds: Mapping[str, Array], *, checked: bool = True) -> tuple[ir.Model, ir.Node]:
    """The form becomes a plugin node that means the same, as does its twin. Gives the lowered model and the node."""
    lowered = model.clone()
    done = lower(lowered, ALWAYS)
    (node,) = nodes_of(lowered)
    assert [written.node for written in done.written] == [node.name] and done.refused == ()
    assert done.op_types == ("PivotLinear",) and done.modules == ("graphopt.plugins.pivot_linear.tensorrt",)
    assert not lowered.functions and lowered.ir_version == model.ir_version
    assert lowered.graph.opset_imports == {"": graphs.opset(model), "graphopt_trt": 1}
    assert [value.name for value in lowered.graph.outputs] == [value.name for value in model.graph.outputs]
    if checked:
        onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
    (wanted,) = run_ort(model, feeds)
    scale = 2e-5 * max(1.0, float(np.abs(wanted).max(initial=0.0)))
    assert node.inputs[0] is lowered.graph.inputs[0] and node.outputs[0] is lowered.graph.outputs[0]
    np.testing.assert_allclose(by_contract(node, feeds["x"]), wanted, rtol=0, atol=scale)

    back = lowered.clone()
    assert twin(back) == 1 and nodes_of(back) == []
    assert dict(back.graph.opset_imports) == {"": graphs.opset(model)}
    onnx.checker.check_model(ir.to_proto(back), full_check=True)
    (found,) = run_ort(back, feeds)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=scale)
    again = lower(back, ALWAYS)
    assert [written.types for written in again.written] == [written.types for written in done.written]
    return lowered, node


# ---- forms that the kernels run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "kinds", [("MatMul", "MatMul"), ("Gemm transB", "Gemm transB"), ("Gemm", "MatMul")], ids="-".join
)
@pytest.mark.parametrize("opset", [13, 17, 23])
def test_forms_become_nodes(kinds: tuple[str, str], rows: bool, bias: bool, opset: int) -> None:
    model = case_of(B, N, rows=rows, bias=bias, kinds=kinds, opset=opset)
    _, node = assert_lowers(model, {"x": random((B, N))})
    assert attributes_of(node, PLUGIN)["form"].tolist() == [0 if rows else 1]
    shapes = [value.shape.numpy() for value in node.inputs if value is not None and value.shape is not None]
    wide, narrow = ((R, N), (M - R, R)) if rows else ((M, R), (R, N - R))
    assert shapes == [(B, N), wide, narrow, (M,), (M if rows else N,)]
    inner = node.outputs[1]
    assert inner.shape is not None and inner.shape.numpy() == (B, R) and inner.dtype is ir.DataType.FLOAT


@pytest.mark.parametrize("shape", [(N,), (2, 4, N), ("batch", "length", N)], ids=str)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_axes_before_the_channels(rows: bool, shape: tuple[int | str, ...]) -> None:
    sizes = [2 if isinstance(size, str) else size for size in shape]
    _, node = assert_lowers(case_of(*shape, rows=rows), {"x": random(sizes)})
    assert node.outputs[1].shape is not None
    assert [d if isinstance(d, int) else d.value for d in node.outputs[1].shape] == [*shape[:-1], R]


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_without_a_permutation_and_without_a_bias_the_inputs_are_filled_in(rows: bool) -> None:
    g = G(17)
    x = g.input("x", B, 6)
    if rows:
        t = g.op("MatMul", x, g.const(random((6, 2))))
        g.output(g.op("Concat", t, g.op("MatMul", t, g.const(random((2, 3), seed=1))), axis=-1))
    else:
        g.nodes.append(helper.make_node("Split", [x, g.ints(2, 4)], ["a", "b"], axis=-1))
        inner = g.op("Add", "a", g.op("MatMul", "b", g.const(random((4, 2)))))
        g.output(g.op("MatMul", inner, g.const(random((2, 5), seed=1))))
    model = ir.from_proto(g.model())
    lowered, node = assert_lowers(model, {"x": random((B, 6))})
    assert constant(node.inputs[3]).tolist() == [0] * 5
    assert constant(node.inputs[4]).tolist() == [*range(5 if rows else 6)]
    assert twin(lowered) == 1
    # What was filled in is not in the twin, and nothing of the lowering is left behind.
    assert "Gather" not in op_types(lowered) and op_types(lowered).count("Add") == (0 if rows else 1)
    assert len(lowered.graph.initializers) == 2


@pytest.mark.parametrize("attached", ["bare", "with bodies"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_pivot_linear_nodes_become_plugin_nodes(rows: bool, attached: str) -> None:
    model = case_of(B, N, rows=rows)
    infer_shapes(model)
    assert collapse(model) == 1
    if attached == "bare":
        model.functions.clear()
    lowered = model.clone()
    assert len(lower(lowered, ALWAYS).written) == 1
    (node,) = nodes_of(lowered)
    assert not lowered.functions and op_types(lowered) == ["PivotLinear"] and node.domain == "graphopt_trt"
    (wanted,) = run_ort(case_of(B, N, rows=rows), {"x": random((B, N))})
    np.testing.assert_allclose(by_contract(node, random((B, N))), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype: str, rows: bool) -> None:
    kind = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    model = case_of("batch", N, rows=rows)
    to = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.BFLOAT16
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]:
        value.type = ir.TensorType(to)
    for value in model.graph.initializers.values():
        array = constant(value)
        if array.dtype == np.float32:
            value.const_value = ir.tensor(array.astype(kind), dtype=to, name=value.name)
            value.type = ir.TensorType(to)
    done = lower(model, ALWAYS)
    (node,) = nodes_of(model)
    assert [written.types for written in done.written] == [(dtype,) * 4 + ("int32",) + (dtype,) * 2]
    assert {value.dtype for value in node.inputs[:4] if value is not None} == {to} == {v.dtype for v in node.outputs}
    (wanted,) = run_ort(case_of("batch", N, rows=rows), {"x": random((B, N)).astype(kind).astype(np.float32)})
    found = by_contract(node, random((B, N)).astype(kind))
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=(2e-2 if dtype == "float16" else 2e-1) * np.abs(wanted).max()
    )
    assert twin(model) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_the_kernel_of_a_node_computes_what_the_model_did(rows: bool) -> None:
    """From the model to the node to the kernel, emulated, with what TensorRT gives it in its order."""
    model = case_of(B, N, rows=rows)
    x = random((B, N))
    (wanted,) = run_ort(model, {"x": x})
    done = lower(model, ALWAYS)
    (node,) = nodes_of(model)
    (written,) = done.written
    kernel = PLUGIN.kernel(written.types, attributes_of(node, PLUGIN), 2)
    inputs = [x, *(np.ascontiguousarray(constant(value)) for value in node.inputs[1:])]
    shapes = PLUGIN.results([array.shape for array in inputs], attributes_of(node, PLUGIN))
    outputs = [(tuple(shape), dtype) for shape, dtype in zip(shapes, written.types[len(inputs) :], strict=True)]
    y, inner = emulate(kernel, inputs, outputs)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-5 * float(np.abs(wanted).max()))
    assert inner.shape == (B, R)


def test_weights_are_not_copied_until_they_are_saved() -> None:
    g = G(17)
    x = g.input("x", B, 512)
    t = g.op("MatMul", x, g.const(random((512, 128))))
    g.output(g.op("Concat", t, g.op("MatMul", t, g.const(random((128, 384), seed=1))), axis=-1))
    model = ir.from_proto(g.model())
    lower(model, ALWAYS)
    (node,) = nodes_of(model)
    for value in node.inputs[1:3]:
        assert value is not None and isinstance(value.const_value, ir.LazyTensor)


def test_two_forms_of_which_one_stays() -> None:
    g = G(17)
    x = g.input("x", B, 8)
    t = g.op("MatMul", x, g.const(random((8, 2))))
    y = g.op("Concat", t, g.op("MatMul", t, g.const(random((2, 6), seed=1))), axis=-1)
    turned = g.op("Transpose", y, perm=[1, 0])  # (8, B): channels along -2
    s = g.op("MatMul", g.const(random((2, 8), seed=2)), turned)
    g.output(g.op("Concat", s, g.op("MatMul", g.const(random((4, 2), seed=3)), s), axis=-2))
    model = ir.from_proto(g.model())
    lowered = model.clone()
    done = lower(lowered, ALWAYS)
    assert len(done.written) == 1 and [refused.reason for refused in done.refused] == [
        "its channels are along axis -2; the kernels take the last one"
    ]
    assert op_types(lowered).count("Concat") == 1 == len(nodes_of(lowered))
    assert twin(lowered) == 1
    feeds = {"x": random((B, 8))}
    np.testing.assert_allclose(run_ort(lowered, feeds)[0], run_ort(model, feeds)[0], rtol=0, atol=1e-4)


def test_what_reads_the_result_and_other_outputs_stay() -> None:
    g = G(17)
    x = g.input("x", B, 8)
    t = g.op("MatMul", x, g.const(random((8, 2))))
    y = g.op("Concat", t, g.op("MatMul", t, g.const(random((2, 6), seed=1))), axis=-1)
    g.output(y)
    g.output(g.op("Relu", y))
    g.output(g.op("Add", y, y))
    model = ir.from_proto(g.model())
    lowered = model.clone()
    lower(lowered, ALWAYS)
    assert sorted(op_types(lowered)) == ["Add", "PivotLinear", "Relu"]
    assert [v.name for v in lowered.graph.outputs] == [v.name for v in model.graph.outputs]
    twin(lowered)
    feeds = {"x": random((B, 8))}
    for wanted, found in zip(run_ort(model, feeds), run_ort(lowered, feeds), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


# ---- those that they do not run, or that are not wanted --------------------------------------------------------------


def refusals(model: ir.Model, choice: Choice = ALWAYS) -> list[str]:
    """Why nothing is written; the model means what it meant, operator by operator."""
    before = sorted(op_types(model))
    done = lower(model, choice)
    assert done.written == () and nodes_of(model) == [] and sorted(op_types(model)) == before
    assert "graphopt_trt" not in model.graph.opset_imports
    assert all(refused.plugin == "PivotLinear" and refused.node for refused in done.refused)
    assert done.to_json()["refused"] == [vars(refused) for refused in done.refused]
    return [refused.reason for refused in done.refused]


def convolutions() -> ir.Model:
    g = G(17)
    t = g.op("Conv", g.input("x", 1, 6, 5, 5), g.const(random((2, 6, 3, 3))), pads=[1, 1, 1, 1])
    g.output(g.op("Concat", t, g.op("Conv", t, g.const(random((4, 2, 1, 1), seed=1))), axis=1))
    return ir.from_proto(g.model())


def of_type(dtype: int) -> ir.Model:
    g = G(17, dtype)
    t = g.op("MatMul", g.input("x", B, 6), g.const(random((6, 2))))
    g.output(g.op("Concat", t, g.op("MatMul", t, g.const(random((2, 3), seed=1))), axis=-1))
    return ir.from_proto(g.model())


def table() -> ir.Model:
    g = G(17)
    t = g.op("Gather", g.const(random((9, 2))), g.input("x", B, dtype=TensorProto.INT64), axis=0)
    g.output(g.op("Concat", t, g.op("MatMul", t, g.const(random((2, 3), seed=1))), axis=-1))
    return ir.from_proto(g.model())


def left() -> ir.Model:
    return case_of(N, B, kinds=("left", "left"))


def test_refusals() -> None:
    assert refusals(convolutions()) == ["it is a convolution; the kernels multiply matrices"]
    assert refusals(left()) == ["its channels are along axis -2; the kernels take the last one"]
    assert refusals(of_type(DOUBLE)) == ["its weights are float64; there are kernels for float16, bfloat16, float32"]
    assert refusals(table()) == ["it looks rows of a table up; the kernels multiply"]
    assert refusals(case_of(B, N, opset=11)) == ["the model is of opset 11; 13 or newer is needed"]
    assert refusals(of_type(FLOAT16), Choice("always", backend="tensorrt-rtx")) == [
        "TensorRT-RTX runs no plugins of this kind; the standard operators are used"
    ]
    huge = Choice("always", sizes={"batch": (1, 2**31 // max(M, N) + 1)})
    (reason,) = refusals(case_of("batch", N), huge)
    assert reason.endswith("rows are more elements than the kernels count")


def test_a_body_keeps_its_standard_operators() -> None:
    g = G(17)
    x = g.input("x", B, 6)
    t = g.op("MatMul", x, g.const(random((6, 2))))
    g.output(g.op("Concat", t, g.op("MatMul", t, g.const(random((2, 3), seed=1))), axis=-1))
    (reason,) = refusals(ir.from_proto(in_body(g.model())))
    assert reason == "it is in the body of another node, where no plugin has been tried"


def test_never_changes_nothing() -> None:
    model = case_of(B, N)
    infer_shapes(model)
    collapse(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert lower(model, Choice("never")) == Lowered()
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_shipped_file_says_that_nothing_has_been_measured() -> None:
    shipped = load_measurements(lowering.MEASURED)
    assert shipped.measurements == () and "Nothing has been measured yet" in shipped.note
    for gpu in (None, "NVIDIA H100 PCIe"):
        assert refusals(case_of(1, N), Choice("measured", gpu=gpu)) == ["the plugin has not been measured on any GPU"]


def interval(median: float) -> dict[str, float]:
    return {"low": 0.9 * median, "median": median, "high": 1.1 * median}


def measured(rows: int, plugin: float, other: float, **changed: Any) -> dict[str, Any]:
    entry = {
        "gpu": "G1",
        "date": "2026-11-21",
        "library": "TensorRT 11.4",
        "variant": "row",
        "dtype": "float32",
        "rows": rows,
        "sizes": {"inputs": N, "outputs": M, "rank": R},
        "tactic": 1,
        "plugin": interval(plugin),
        "other": interval(other),
    }
    return {**entry, **changed}


@pytest.mark.parametrize(
    ("entries", "shape", "sizes", "gpu", "reason"),
    [
        ([measured(1, 1, 2), measured(16, 4, 8)], (3, N), {}, "G1", None),
        ([measured(1, 1, 2), measured(16, 4, 8)], ("batch", N), {"batch": (1, 16)}, "G1", None),
        ([measured(3, 1, 2)], (3, N), {}, "G1", None),
        ([measured(1, 1, 2)], (3, N), {}, "G1", "at 3 rows has not been measured on G1"),
        ([measured(1, 1, 2), measured(16, 4, 8)], ("batch", N), {"batch": (1, 17)}, "G1", "at 1 to 17 rows has not"),
        ([measured(1, 1, 2), measured(16, 4, 8)], ("batch", N), {}, "G1", "how many rows x has is not known"),
        ([measured(1, 1, 2), measured(4, 9, 8), measured(16, 4, 8)], (3, N), {}, "G1", "at 4 rows it takes 9 µs"),
        ([measured(1, 1, 2), measured(4, 7.9, 8)], (3, N), {}, "G1", "at 4 rows it takes 7.9 µs, the products 8 µs"),
        ([measured(1, 1, 2), measured(4, 1, 8), measured(16, 9, 8)], (3, N), {}, "G1", None),
        ([measured(3, 1, 2)], (3, N), {}, "G2", "the plugin has not been measured on G2"),
        ([measured(3, 1, 2)], (3, N), {}, None, "there is no GPU here"),
        ([measured(3, 1, 2, dtype="float16")], (3, N), {}, "G1", "row form, float32"),
        ([measured(3, 1, 2, variant="column")], (3, N), {}, "G1", "row form, float32"),
        ([measured(3, 1, 2, sizes={"inputs": 3 * N, "outputs": M, "rank": R})], (3, N), {}, "G1", f"inputs {N}"),
        ([measured(3, 1, 2, sizes={"inputs": 2 * N, "outputs": M, "rank": R})], (3, N), {}, "G1", None),
    ],
)
def test_measurements_decide(
    entries: list[dict[str, Any]],
    shape: tuple[int | str, ...],
    sizes: dict[str, tuple[int, int]],
    gpu: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Measurements.model_validate({"format": 1, "measurements": entries})
    monkeypatch.setattr(lowering, "load_measurements", lambda _: made)
    done = lower(case_of(*shape), Choice("measured", gpu=gpu, sizes=sizes))
    if reason is None:
        assert [written.reason for written in done.written] == ["measured faster on G1"] and done.refused == ()
    else:
        assert done.written == () and len(done.refused) == 1 and reason in done.refused[0].reason


# ---- the plugin as it is declared ------------------------------------------------------------------------------------


def test_it_is_found_by_its_folder() -> None:
    assert find_plugins()["PivotLinear"] is PLUGIN
    assert module_of("PivotLinear") == "graphopt.plugins.pivot_linear.tensorrt"


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("types", PLUGIN.types, ids=lambda types: types[0])
def test_every_kernel_takes_what_the_plugin_declares(types: tuple[str, ...], form: int) -> None:
    attributes = {"form": np.array([form])}
    tactics = PLUGIN.kernels(types, attributes)
    assert len(tactics) >= 2 and all(tactic > 0 for tactic in tactics)
    for tactic in tactics:
        kernel = PLUGIN.kernel(types, attributes, tactic)
        names = [parameter.name for parameter in kernel.parameters if parameter.kind != "scalar"]
        assert names == [*PLUGIN.inputs, *PLUGIN.outputs]


def test_a_form_that_does_not_exist() -> None:
    with pytest.raises(BadInput, match="no form 2"):
        PLUGIN.kernels(PLUGIN.types[0], {"form": np.array([2])})


def test_kernels_of_an_engine_are_compiled_beforehand() -> None:
    pytest.importorskip("nvidia.cuda_nvrtc")
    done = lower(case_of(B, N), ALWAYS)
    prepared = prepare(done, "compute_80")
    types = ("float32",) * 4 + ("int32",) + ("float32",) * 2
    assert [kernel.tactic for kernel in prepared] == [*PLUGIN.kernels(types, {"form": np.array([0])})]
    assert {kernel.entry for kernel in prepared} == {"graphopt_pivot_rows"}
    assert all(kernel.isa <= (8, 7) and kernel.architecture == "compute_80" for kernel in prepared)
    assert prepare(done, "compute_80") == prepared
    assert prepared[0].to_json()["isa"] == "8.7"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_the_twin_is_what_an_engine_without_plugins_is_built_from(tmp_path: Path) -> None:
    """TensorRT-RTX takes the twin, and of a model with plugin nodes it says that it has no such operator."""
    model = case_of("batch", N)
    assert len(lower(model, ALWAYS).written) == 1
    ir.save(model, tmp_path / "plugin.onnx")
    twin(model)
    ir.save(model, tmp_path / "twin.onnx")
    shapes = ["batch=1/4/16"]
    built = build_engine(tmp_path / "twin.onnx", tmp_path / "twin.engine", backend="tensorrt-rtx", shapes=shapes)
    assert built.bytes > 0
    with pytest.raises(GraphoptError, match="PivotLinear"):
        build_engine(tmp_path / "plugin.onnx", tmp_path / "plugin.engine", backend="tensorrt-rtx", shapes=shapes)


def test_scratch_memory_must_not_be_read() -> None:
    model = case_of(B, N)
    lower(model, ALWAYS)
    (node,) = nodes_of(model)
    model.graph.outputs.append(node.outputs[1])
    with pytest.raises(BadInput, match="is scratch memory of a plugin and is read"):
        twin(model)
