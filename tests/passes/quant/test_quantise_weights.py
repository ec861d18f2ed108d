"""``quantise-weights``: what it stores is what ONNX Runtime reads back, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from graphopt import graphs
from graphopt.files.load import load_model
from graphopt.files.save import save_model
from graphopt.numerics import quantise
from graphopt.numerics.quantise import Scheme
from graphopt.passes.quant.quantise_weights import QuantiseWeights
from graphopt.rewrite import Saves
from graphopt.targets import load_target
from graphopt.targets.target import Quantised
from tests.passes.common import op_types, run_ort, run_pass

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng


def weight(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return RNG(seed).standard_normal(shape).astype(dtype)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    x: tuple[str | int, ...] = ("n", 64),
    *,
    opset: int = 21,
    dtype: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    extra_inputs: tuple[onnx.ValueInfoProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x), *extra_inputs],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def matmul(*, opset: int = 21, w: Array | None = None) -> onnx.ModelProto:
    w = weight(64, 48) if w is None else w
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, opset=opset)


def with_weight(proto: onnx.ModelProto, w: Array, name: str = "w") -> onnx.ModelProto:
    """The same model with another weight: the float model that a quantised one has to equal."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(w, name))
    return copy


def read_back(w: Array, scheme: Scheme) -> Array:
    scales, zeros = quantise.scales_of(w, scheme)
    return quantise.dequantise(quantise.codes_of(w, scales, zeros, scheme), scales, zeros, scheme)


def refused(records: Any) -> str:
    assert records[0].applications == 0
    (reason,) = records[0].near_misses.values()
    return str(reason)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["MatMul", "MatMul-left", "MatMul-batched", "Gemm", "Gemm-transB"])
def test_equals_the_model_with_the_weights_read_back(kind: str, bits: int, block: int, symmetric: bool) -> None:
    x: tuple[int, ...] = (3, 64)
    if kind == "MatMul":
        w, axes, node = weight(64, 48), (1, 0), helper.make_node("MatMul", ["x", "w"], ["y"])
    elif kind == "MatMul-left":
        w, axes, x = weight(48, 64), (0, 1), (64, 3)
        node = helper.make_node("MatMul", ["w", "x"], ["y"])
    elif kind == "MatMul-batched":
        w, axes, x = weight(2, 64, 48), (2, 1), (2, 3, 64)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    elif kind == "Gemm":
        w, axes = weight(64, 48), (1, 0)
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0)
    else:
        w, axes = weight(48, 64), (0, 1)
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    weights = {"w": w, "b": weight(48, seed=1)} if "Gemm" in kind else {"w": w}
    proto = model_of([node], weights, x)
    found, records = run_pass(proto, QuantiseWeights, bits=bits, block=block, symmetric=symmetric)

    assert records[0].applications == 1
    assert op_types(found) == ["DequantizeLinear", node.op_type]
    codes = found.graph.node(0).inputs[0]
    assert codes is not None
    assert codes.dtype is not None
    assert codes.dtype.bitwidth == bits
    assert "w" not in found.graph.initializers
    feed = {"x": weight(*x, seed=2)}
    scheme = Scheme(bits, axes[1] if block else axes[0], block, symmetric)
    expected = run_ort(with_weight(proto, read_back(w, scheme)), feed)[0]
    np.testing.assert_array_equal(run_ort(found, feed)[0], expected)
    original = run_ort(proto, feed)[0]
    assert np.linalg.norm(expected - original) < (0.02 if bits == 8 else 0.2) * np.linalg.norm(original)


@pytest.mark.parametrize("block", [0, 32])
def test_a_convolution_has_a_scale_for_each_channel(block: int) -> None:
    w = weight(6, 4, 3, 3) * np.array([1, 10, 100, 1e-3, 0, 5], np.float32)[:, None, None, None]
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=2, pads=[1, 1, 1, 1], strides=[2, 2])
    proto = model_of([node], {"w": w, "b": weight(6)}, (1, 8, 9, 9), opset=13 if not block else 21)
    found, _ = run_pass(proto, QuantiseWeights, block=block)
    assert op_types(found) == ["DequantizeLinear", "Conv"]
    feed = {"x": weight(1, 8, 9, 9, seed=3)}
    expected = run_ort(with_weight(proto, read_back(w, Scheme(8, 0))), feed)[0]
    np.testing.assert_array_equal(run_ort(found, feed)[0], expected)


def test_a_convolution_is_not_stored_in_4_bits() -> None:
    proto = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight(6, 8, 3, 3)}, (1, 8, 9, 9))
    _, records = run_pass(proto, QuantiseWeights, bits=4)
    assert "8 bits only" in refused(records)


@pytest.mark.parametrize(
    ("dtype", "parameters", "opset", "needed"),
    [
        (np.float32, {}, 12, 13),
        (np.float16, {}, 18, 19),
        (ml_dtypes.bfloat16, {}, 18, 19),
        (np.float32, {"bits": 4}, 20, 21),
        (np.float32, {"block": 32}, 20, 21),
    ],
)
def test_the_opset_must_know_it(dtype: Any, parameters: dict[str, Any], opset: int, needed: int) -> None:
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    w = weight(64, 48, dtype=dtype)

    def build(version: int) -> onnx.ModelProto:
        return model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, opset=version, dtype=onnx_type)

    _, records = run_pass(build(opset), QuantiseWeights, **parameters)
    assert f"needs opset {needed}, the model has {opset}" in refused(records)
    found, records = run_pass(build(needed), QuantiseWeights, **parameters)
    assert records[0].applications == 1
    onnx.shape_inference.infer_shapes(ir.to_proto(found), check_type=True, strict_mode=True)


def test_float16_weights_have_float16_scales() -> None:
    w = weight(64, 48, dtype=np.float16)
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, dtype=TensorProto.FLOAT16)
    found, _ = run_pass(proto, QuantiseWeights)
    feed = {"x": weight(2, 64, dtype=np.float16)}
    expected = run_ort(with_weight(proto, read_back(w, Scheme(8, 1))), feed)[0]
    np.testing.assert_array_equal(run_ort(found, feed)[0], expected)


def test_a_shared_weight_is_stored_once() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    found, records = run_pass(model_of(nodes, {"w": weight(64, 64)}), QuantiseWeights)
    assert records[0].applications == 2
    assert op_types(found) == ["DequantizeLinear", "MatMul", "DequantizeLinear", "MatMul"]
    assert len(found.graph.initializers) == 2


def test_readers_that_sum_over_different_axes() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "w"], ["y"], transB=1),
    ]
    _, records = run_pass(model_of(nodes, {"w": weight(64, 64)}), QuantiseWeights)
    assert "different axes" in refused(records)


def test_a_tied_embedding_is_left_alone() -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"]),
        helper.make_node("Gemm", ["e", "w"], ["y"], transB=1),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    _, records = run_pass(model_of(nodes, {"w": weight(100, 64)}, extra_inputs=(ids,)), QuantiseWeights)
    assert "also read by Gather: it would be stored twice" in refused(records)


def test_a_weight_that_is_an_output() -> None:
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight(64, 48)}, outputs=("y", "w"))
    _, records = run_pass(proto, QuantiseWeights)
    assert "also read by a caller" in refused(records)


def test_an_overridable_weight() -> None:
    default = helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 48])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    _, records = run_pass(model_of(nodes, {"w": weight(64, 48)}, extra_inputs=(default,)), QuantiseWeights)
    assert "a caller can override it" in refused(records)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_must_be_finite(bad: float) -> None:
    w = weight(64, 48)
    w[3, 4] = bad
    _, records = run_pass(matmul(w=w), QuantiseWeights)
    assert "NaN or infinity" in refused(records)


def test_blocks_must_divide_the_reduction() -> None:
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight(40, 64)}, (1, 40))
    _, records = run_pass(proto, QuantiseWeights, block=16)
    assert "blocks of 16 do not divide its 40 input channels" in refused(records)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(("bits", "codes"), [(8, "uint8"), (4, "uint4")])
def test_the_target_must_take_the_codes(target: str, bits: int, codes: str) -> None:
    found, records = run_pass(matmul(), QuantiseWeights, target=target, bits=bits, symmetric=False)
    reason = f"w: {target} takes no {codes} codes, only float4e2m1, float8e4m3fn, int4, int8"
    assert refused(records) == reason
    assert op_types(found) == ["MatMul"]
    _, records = run_pass(matmul(), QuantiseWeights, target=target, bits=bits)
    assert records[0].applications == 1


def test_the_target_must_take_zero_points(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = Quantised(types=frozenset({"uint8"}), zero_points=False)
    picky = load_target("onnxruntime").model_copy(update={"quantised": quantised})
    monkeypatch.setattr("tests.passes.common.load_target", lambda name: picky)
    _, records = run_pass(matmul(), QuantiseWeights, symmetric=False)
    assert refused(records) == "w: onnxruntime takes no zero points other than 0"


def test_a_dear_node_is_no_obstacle() -> None:
    """It is judged by bytes: the DequantizeLinear that it adds costs time on any target."""
    assert QuantiseWeights.saves is Saves.BYTES
    _, records = run_pass(matmul(), QuantiseWeights)
    assert (records[0].applications, records[0].reason) == (1, "")


@pytest.mark.parametrize("rows", [0, 1])
def test_it_must_get_smaller(rows: int) -> None:
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight(rows, 48)}, (2, rows))
    _, records = run_pass(proto, QuantiseWeights)
    assert "codes and scales take" in refused(records)


def test_double_weights_are_refused() -> None:
    proto = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": weight(64, 48, dtype=np.float64)},
        dtype=TensorProto.DOUBLE,
    )
    _, records = run_pass(proto, QuantiseWeights)
    assert "gives no DOUBLE" in refused(records)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([helper.make_node("MatMul", ["x", "x2"], ["y"])], {}),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones(64, np.float32)}),
    ],
    ids=["computed", "vector"],
)
def test_what_is_no_weight_matrix(nodes: list[onnx.NodeProto], weights: dict[str, Array]) -> None:
    second = helper.make_tensor_value_info("x2", TensorProto.FLOAT, [64, 3])
    _, records = run_pass(model_of(nodes, weights, extra_inputs=(second,)), QuantiseWeights)
    assert records[0].applications == 0


def test_integer_weights_are_not_touched() -> None:
    proto = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((64, 4), np.int32)}, dtype=TensorProto.INT32
    )
    _, records = run_pass(proto, QuantiseWeights)
    assert records[0].applications == 0
    assert records[0].near_misses == {}


def test_a_weight_in_a_constant_node() -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(64, 48)))
    proto = model_of([constant, helper.make_node("MatMul", ["x", "w"], ["y"])], {})
    found, _ = run_pass(proto, QuantiseWeights)
    assert op_types(found, constants=True) == ["DequantizeLinear", "MatMul"]
    feed = {"x": weight(2, 64)}
    inline = matmul(w=read_back(weight(64, 48), Scheme(8, 1)))
    np.testing.assert_array_equal(run_ort(found, feed)[0], run_ort(inline, feed)[0])


def branches(w_in: str) -> onnx.ModelProto:
    def branch(name: str, second: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], [f"{name}_h"]), helper.make_node(second, [f"{name}_h"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )

    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg"))]
    if w_in == "main too":
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["z"]))
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    outputs = ("y", "z") if w_in == "main too" else ("y",)
    return model_of(nodes, {"w": weight(64, 48)}, extra_inputs=(condition,), outputs=outputs)


@pytest.mark.parametrize("w_in", ["bodies", "main too"])
def test_a_weight_that_bodies_capture(w_in: str, tmp_path: Path) -> None:
    proto = branches(w_in)
    found, records = run_pass(proto, QuantiseWeights)
    assert records[0].applications == (3 if w_in == "main too" else 2)
    expected = with_weight(proto, read_back(weight(64, 48), Scheme(8, 1)))
    for c in (True, False):
        feed = {"x": weight(2, 64), "c": np.array(c)}
        for a, b in zip(run_ort(found, feed), run_ort(expected, feed), strict=True):
            np.testing.assert_array_equal(a, b)
    codes = {id(v.const_value) for g in graphs.all_graphs(found) for v in g.initializers.values() if v.name != "w"}
    assert len(codes) == 2, "codes and scales are one tensor each, however many graphs hold them"


def test_a_function_body() -> None:
    w = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(64, 48)))
    function = helper.make_function(
        "local",
        "Linear",
        ["a"],
        ["b"],
        [w, helper.make_node("MatMul", ["a", "w"], ["b"])],
        [helper.make_opsetid("", 21)],
    )
    proto = model_of([helper.make_node("Linear", ["x"], ["y"], domain="local")], {})
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    found, records = run_pass(proto, QuantiseWeights)
    assert records[0].applications == 1
    feed = {"x": weight(2, 64)}
    inline = matmul(w=read_back(weight(64, 48), Scheme(8, 1)))
    np.testing.assert_array_equal(run_ort(found, feed)[0], run_ort(inline, feed)[0])


def test_large_weights_are_computed_when_saved(tmp_path: Path) -> None:
    proto = matmul(w=weight(512, 300))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 512
    onnx.save_model(proto, tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0, location="in.data")
    found, _ = run_pass(load_model(tmp_path / "in.onnx"), QuantiseWeights, bits=4, block=32)
    codes = found.graph.node(0).inputs[0]
    assert codes is not None
    assert isinstance(codes.const_value, ir.LazyTensor)
    saved = save_model(found, tmp_path / "out.onnx")
    reloaded = load_model(saved)
    feed = {"x": weight(2, 512)}
    expected = run_ort(with_weight(proto, read_back(weight(512, 300), Scheme(4, 0, 32))), feed)[0]
    external = [v.const_value for v in reloaded.graph.initializers.values()]
    assert sum(t.nbytes for t in external if t is not None) == 512 * 300 // 2 + 16 * 300 * 4
    from graphopt.runtime.session import create_session

    got = create_session(saved, optimized=False, threads=1).run(None, feed)[0]
    np.testing.assert_array_equal(got, expected)
    deployed = create_session(saved, optimized=True, threads=1).run(None, feed)[0]
    # Its optimizer fuses this into MatMulNBits, which by default rounds activations to 8 bits as well.
    assert np.linalg.norm(deployed - expected) < 0.02 * np.linalg.norm(expected)


def test_a_second_run_finds_nothing() -> None:
    found, _ = run_pass(matmul(), QuantiseWeights)
    _, records = run_pass(found, QuantiseWeights)
    assert records[0].applications == 0


def test_an_application_can_be_left_out() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    proto = model_of(nodes, {"w": weight(64, 64), "v": weight(64, 64, seed=1)})
    found, records = run_pass(proto, QuantiseWeights, skip=["quantise-weights:int8@h"])
    assert records[0].applications == 1
    assert op_types(found) == ["MatMul", "DequantizeLinear", "MatMul"]


@pytest.mark.parametrize("bad", [{"bits": 3}, {"block": 7}, {"block": -1}, {"colour": "red"}])
def test_parameters_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantiseWeights(bad)
