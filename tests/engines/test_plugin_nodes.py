"""Plugin nodes as graphsurgeon writes them and as TensorRT's parser reads them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import graphs
from graphopt.engines.plugins import Choice, Plugin, find_plugins, lower, twin
from graphopt.engines.plugins import nodes as plugin_nodes
from graphopt.engines.plugins.nodes import attributes_of, attributes_to_write, write_node
from graphopt.errors import BadInput, MissingDependency
from graphopt.kernels.emulate import emulate
from graphopt.plugins.pivot_linear.tensorrt import PLUGIN as PIVOT
from tests.engines.registry import harness
from tests.engines.registry.folder.scale_add.tensorrt import PLUGIN as TOY
from tests.passes.common import op_types, run_ort
from tests.plugins.test_pivot_linear_tensorrt import case_of

pytest.importorskip("onnx_graphsurgeon")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)


def record(folder: Path, plugin: Plugin, models: Sequence[ir.Model | onnx.ModelProto], **more: Any) -> dict[str, Any]:
    """What the parser of TensorRT-RTX hands on to a plugin of that name, model by model."""
    paths = []
    for place, model in enumerate(models):
        paths.append(str(folder / f"{place}.onnx"))
        proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
        Path(paths[-1]).write_bytes(proto.SerializeToString())
    request = {
        "name": plugin.name,
        "namespace": plugin.namespace,
        "attributes": list(plugin.attributes),
        "models": paths,
        "answer": str(folder / "answer.json"),
        **more,
    }
    (folder / "request.json").write_text(json.dumps(request))
    program = Path(harness.__file__).with_name("record.py")
    words = [sys.executable, str(program), str(folder / "request.json")]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def scaled(scales: list[float], offset: float, dtype: int = TensorProto.FLOAT) -> ir.Model:
    """What ScaleAdd is lowered from."""
    to = helper.tensor_dtype_to_np_dtype(dtype)
    shape: list[str | int | None] = ["batch", len(scales)]
    nodes = [helper.make_node("Mul", ["x", "s"], ["p"]), helper.make_node("Add", ["p", "o"], ["y"], name="sum")]
    tensors = [
        numpy_helper.from_array(np.array(scales, to), "s"),
        numpy_helper.from_array(np.array(offset, to), "o"),
    ]
    ends = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def one_node(plugin: Plugin, attributes: dict[str, Any], **of_type: ir.DataType) -> tuple[ir.Model, ir.Node]:
    """A model of one plugin node whose inputs are the model's."""
    inputs = [
        ir.Value(name=name, type=ir.TensorType(of_type.get(name, ir.DataType.FLOAT)), shape=ir.Shape([2, 3]))
        for name in plugin.inputs
    ]
    outputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3])) for name in plugin.outputs
    ]
    graph = ir.Graph(inputs, outputs[:1], nodes=[], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    node = write_node(model, graph, plugin, inputs, attributes, outputs, name="node", names=graphs.value_names(model))
    graph.append(node)
    return model, node


def with_attributes(*attributes: tuple[str, str]) -> Plugin:
    """A plugin that is only written."""
    types = (("float32", "float32"),)
    return Plugin("Toy", ("x",), ("y",), types, TOY.results, TOY.kernels, TOY.lower, TOY.meaning, attributes)


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_node_says_everything() -> None:
    model, node = one_node(TOY, {"offset": -3, "scales": [0.5, 0.1, 2]})
    assert (node.domain, node.op_type, node.name) == ("third_party", "ScaleAdd", "node")
    kinds = {name: attribute.type.name for name, attribute in node.attributes.items()}
    assert kinds == {
        "offset": "INT",
        "scales": "FLOATS",
        "plugin_namespace": "STRING",
        "plugin_version": "STRING",
        "aot": "INT",
    }
    assert node.attributes["plugin_namespace"].as_string() == "third_party"
    assert node.attributes["plugin_version"].as_string() == "1" and node.attributes["aot"].as_int() == 1
    assert model.graph.opset_imports == {"": 17, "third_party": 1}
    onnx.checker.check_model(ir.to_proto(model))
    found = attributes_of(node, TOY)
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "offset": ("int64", (1,)),
        "scales": ("float32", (3,)),
    }
    assert found["scales"].tolist() == np.array([0.5, 0.1, 2], np.float32).tolist()


@pytest.mark.parametrize(
    ("declared", "given", "reason"),
    [
        ("int64", 2**31, "needs more than 32 bits, which TensorRT's parser drops"),
        ("int64", [1, -(2**31) - 1], "needs more than 32 bits"),
        ("int64", 2**40, "needs more than 32 bits"),
        ("int32", 2**31, "does not fit into int32"),
        ("int64", 0.5, "does not fit into int64"),
        ("float32", 1e300, "is no finite number of float32"),
        ("float32", float("-inf"), "is no finite number of float32"),
        ("float32", [1.0, float("nan")], "is no finite number of float32"),
        ("int64", [], "is no number and no list of numbers"),
        ("int64", [[1, 2]], "is no number and no list of numbers"),
    ],
)
def test_attributes_that_would_not_arrive(declared: str, given: object, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        attributes_to_write(with_attributes(("a", declared)), {"a": given})


@pytest.mark.parametrize("given", [{}, {"a": 1, "b": 2}, {"b": 1}])
def test_attributes_that_are_missing_or_unknown(given: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="Toy has the attributes a, not"):
        attributes_to_write(with_attributes(("a", "int64")), given)


def test_a_node_without_an_attribute_is_no_node_of_the_plugin() -> None:
    _, node = one_node(TOY, {"offset": -3, "scales": [0.5, 0.1, 2]})
    node.attributes.pop("offset")
    with pytest.raises(BadInput, match="the attribute 'offset' of ScaleAdd is missing"):
        attributes_of(node, TOY)


def test_packed_weights_are_written_as_int8() -> None:
    plugin = Plugin(
        "Toy", ("x", "w"), ("y",), (("float32", "int8", "float32"),), TOY.results, TOY.kernels, TOY.lower, TOY.meaning
    )
    codes = np.array([[0, 1, 127, 128], [200, 254, 255, 7]], np.uint8)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 4]))
    packed = ir.Value(name="w", type=ir.TensorType(ir.DataType.UINT8), const_value=ir.tensor(codes, name="w"))
    y = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 4])) for name in ("y", "z")]
    graph = ir.Graph([x], y, nodes=[], initializers=[packed], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    names = graphs.value_names(model)
    nodes = [write_node(model, graph, plugin, [x, packed], {}, [out], name=f"to {out.name}", names=names) for out in y]
    graph.extend(nodes)
    written = [node.inputs[1] for node in nodes]
    assert written[0] is written[1] and written[0] is not None and written[0].dtype is ir.DataType.INT8
    array = graphs.constant_array(written[0])
    assert array is not None and array.dtype == np.int8 and array.view(np.uint8).tolist() == codes.tolist()
    onnx.checker.check_model(ir.to_proto(model))

    computed = ir.Value(name="c", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([2, 4]))
    with pytest.raises(BadInput, match="c is uint8 and no constant"):
        write_node(model, graph, plugin, [x, computed], {}, [ir.Value(name="q")], name="n", names=names)
    with pytest.raises(BadInput, match="Toy has 2 inputs and 1 outputs, not 1 and 1"):
        write_node(model, graph, plugin, [x], {}, [ir.Value(name="q")], name="n", names=names)


def test_large_packed_weights_are_read_when_they_are_saved() -> None:
    large = ir.Value(
        name="w", type=ir.TensorType(ir.DataType.UINT8), const_value=ir.tensor(np.zeros((512, 512), np.uint8), name="w")
    )
    graph = ir.Graph([], [], nodes=[], initializers=[large], opset_imports={"": 17}, name="g")
    made = plugin_nodes._as_bytes(large, graph, {"w"})
    assert isinstance(made.const_value, ir.LazyTensor) and made.shape is not None and made.shape.numpy() == (512, 512)


def test_graphsurgeon_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(MissingDependency, match=r"writing a node of ScaleAdd needs onnx-graphsurgeon \(.*graphsurgeon"):
        one_node(TOY, {"offset": 0, "scales": [1.0]})


# ---- a plugin that graphopt does not know ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_another_plugin_goes_the_same_way(dtype: int) -> None:
    model = scaled([0.5, -2.0, 0.125], 7, dtype)
    lowered = model.clone()
    done = lower(lowered, Choice("always"), {"ScaleAdd": TOY})
    assert [written.node for written in done.written] == ["sum"] and op_types(lowered) == ["ScaleAdd"]
    onnx.checker.check_model(ir.to_proto(lowered))
    feeds = {"x": np.random.default_rng(0).standard_normal((50, 3)).astype(helper.tensor_dtype_to_np_dtype(dtype))}
    (wanted,) = run_ort(model, feeds)
    if shutil.which("g++"):
        (written,) = done.written
        kernel = TOY.kernel(written.types, written.attributes, 2)
        y, told = emulate(kernel, [feeds["x"]], [((50, 3), written.types[1]), ((2,), "int32")])
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6 if dtype == TensorProto.FLOAT else 1e-2)
        assert told.tolist() == [150, 4 * kernel.threads - 150]
    assert twin(lowered, {"ScaleAdd": TOY}) == 1
    assert sorted(op_types(lowered)) == ["Add", "Mul"]
    assert "third_party" not in lowered.graph.opset_imports
    np.testing.assert_array_equal(run_ort(lowered, feeds)[0], wanted)


def test_its_refusals_are_told() -> None:
    done = lower(scaled([1.0, 2.0], 0.5), Choice("always"), {"ScaleAdd": TOY})
    assert [(refused.node, refused.reason) for refused in done.refused] == [("sum", "the offset is no whole number")]


# ---- what TensorRT's parser makes of it ------------------------------------------------------------------------------


@needs_rtx
def test_attributes_arrive(tmp_path: Path) -> None:
    """The types that tensorrt.plugin can read, and the values that were given."""
    given: list[dict[str, Any]] = [
        {"offset": -3, "scales": [0.5, 0.1, 2]},
        {"offset": 2**31 - 1, "scales": [1.5]},
        {"offset": -(2**31), "scales": [3.0e38, -1e-38]},
        {"offset": [1, -2, 3], "scales": [1.0]},
    ]
    answer = record(tmp_path, TOY, [one_node(TOY, attributes)[0] for attributes in given])
    for attributes, found in zip(given, answer["models"], strict=True):
        assert found["reasons"] == ["Assertion failed: plugin: Could not create the plugin."]
        offset = np.atleast_1d(attributes["offset"]).tolist()
        scales = np.array(attributes["scales"], np.float32).tolist()
        assert found["fields"] == [
            ["offset", "INT32", "int32", offset],
            ["scales", "FLOAT32", "float32", scales],
        ]


@needs_rtx
def test_why_they_are_written_so(tmp_path: Path) -> None:
    """The parser's faults that the way of writing avoids. Where one of these is gone, it may be written otherwise."""
    plugin = with_attributes(("a", "int64"), ("b", "int64"))
    wrong: list[dict[str, Any]] = [
        {"a": 2**40 + 5, "b": 1},
        {"a": numpy_helper.from_array(np.array([5], np.int64)), "b": 1},
        {"b": 1},
        {"a": numpy_helper.from_array(np.array([5.5], np.float64)), "b": 1},
    ]
    models = []
    for attributes in wrong:
        more = {"plugin_namespace": plugin.namespace, "plugin_version": "1", **attributes}
        node = helper.make_node("Toy", ["x"], ["y"], domain=plugin.namespace, name="n", **more)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(plugin.namespace, 1)]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:])
        models.append(helper.make_model(graph, opset_imports=imports, ir_version=8))
    upper, tensor, absent, double = (found["fields"] for found in record(tmp_path, plugin, models)["models"])
    assert upper[0] == ["a", "INT32", "int32", [5]]  # the upper half is gone
    assert tensor[0][2] is None  # it cannot be read at all
    assert absent == [["b", "INT32", "int32", [1]]]  # so b would be taken for a
    assert double[0][2] == "float32"


@needs_rtx
def test_constants_of_uint8_become_int32_and_others_do_not(tmp_path: Path) -> None:
    models = []
    for kind in (np.uint8, np.int8, np.int32, np.float16, np.float32):
        tensor = numpy_helper.from_array(np.zeros((2, 3), kind), "c")
        end = helper.make_tensor_value_info("y", tensor.data_type, [2, 3])
        graph = helper.make_graph([helper.make_node("Identity", ["c"], ["y"])], "g", [], [end], [tensor])
        models.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    found = record(tmp_path, TOY, models)["models"]
    assert [model["outputs"] for model in found] == [["INT32"], ["INT8"], ["INT32"], ["HALF"], ["FLOAT"]]


@needs_rtx
def test_lowered_models_reach_the_plugin(tmp_path: Path) -> None:
    models = []
    for rows in (True, False):
        model = case_of("batch", 7, rows=rows)
        lower(model, Choice("always"))
        models.append(model)
    answer = record(tmp_path, PIVOT, models, operators=[*find_plugins(), "ScaleAdd"])
    for form, found in enumerate(answer["models"]):
        assert found["reasons"] == ["Assertion failed: plugin: Could not create the plugin."]
        assert found["fields"] == [["form", "INT32", "int32", [form]]]
    # The names are none of the parser's own.
    assert answer["known"] == {"PivotLinear": False, "ScaleAdd": False}
