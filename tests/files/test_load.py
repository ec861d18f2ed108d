from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.errors import BadInput
from graphopt.files import load_model
from tests.files import sources


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    *,
    weights: Sequence[TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    opsets: Mapping[str, int] | None = None,
) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, made, weights)
    imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": 17}).items()]
    proto = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=8)
    path.write_bytes(proto.SerializeToString())
    return path


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Neg", ["x"], ["a"])]
    model = load_model(write(tmp_path / "m.onnx", nodes, ["y"]))
    assert [node.op_type for node in model.graph] == ["Neg", "Relu"]


def test_a_body_may_read_a_value_that_is_made_later_in_the_file(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    bodies = [helper.make_graph([helper.make_node("Neg", ["late"], ["t"])], name, [], [value]) for name in ("a", "b")]
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
        helper.make_node("Relu", ["x"], ["late"]),
    ]
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    model = load_model(write(tmp_path / "m.onnx", nodes, ["y"], weights=[condition]))
    assert [node.op_type for node in model.graph] == ["Relu", "If"]


@pytest.mark.parametrize("version", [3, 4])
def test_weights_leave_the_inputs_of_old_files_only(tmp_path: Path, version: int) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "w")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", inputs, [output], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=version)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = load_model(tmp_path / "m.onnx")
    assert [value.name for value in model.graph.inputs] == (["x"] if version == 3 else ["x", "w"])
    assert model.graph.initializers["w"].is_graph_input() is (version == 4)
    assert model.ir_version == 4


def test_what_is_not_ours_is_carried_through(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("FusedMatMul", ["x", "x"], ["a"], domain="com.microsoft", transB=1),
        helper.make_node("Mine", ["a", ""], ["b", "b2"], domain="example", what=[1, 2]),
        helper.make_node("LayerNormalization", ["b", "x"], ["c"]),  # ONNX Runtime writes it before opset 17
        helper.make_node("EfficientNMS_TRT", ["c"], ["d"]),
        helper.make_node("SkipLayerNormPluginDynamic", ["d"], ["y"]),
    ]
    imports = {"": 12, "com.microsoft": 1}
    model = load_model(write(tmp_path / "m.onnx", nodes, ["y"], opsets=imports))
    assert [node.op_type for node in model.graph] == [node.op_type for node in nodes]


def test_a_function_may_define_an_op_of_the_standard_domain(tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("", "NewOp", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], imports)
    model = load_model(
        write(tmp_path / "m.onnx", [helper.make_node("NewOp", ["x"], ["y"])], ["y"], functions=[function])
    )
    assert list(model.functions) == [("", "NewOp", "")]


def test_nothing_is_mapped_before_it_is_touched(tmp_path: Path) -> None:
    path = sources.write(sources.model([sources.tensor("w", "FLOAT", (1000,))]), tmp_path / "m.onnx", external=True)
    weight = load_model(path).graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor) and weight.raw is None
    weight.numpy()
    assert weight.raw is not None


def test_data_in_a_folder_below_and_behind_a_link_inside_is_read(tmp_path: Path) -> None:
    proto = sources.model([sources.tensor("w", "FLOAT", (1000,))])
    expected = proto.graph.initializer[0].raw_data
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(expected)
    (tmp_path / "link.bin").symlink_to(tmp_path / "sub" / "w.bin")
    for location in ("sub/w.bin", "./sub/../sub/w.bin", "link.bin"):
        external = onnx.ModelProto()
        external.CopyFrom(proto)
        external.graph.initializer[0].ClearField("raw_data")
        sources.make_external(external.graph.initializer[0], location, None, None)
        (tmp_path / "m.onnx").write_bytes(external.SerializeToString())
        weight = load_model(tmp_path / "m.onnx").graph.initializers["w"].const_value
        assert weight is not None and weight.tobytes() == expected


def test_an_unreadable_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sources.write(sources.model([sources.tensor("w", "FLOAT", (3,))]), tmp_path / "m.onnx")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadInput, match=r"m\.onnx: is not readable \(check its permissions\)"):
        load_model(path)


def test_logging_is_as_before_after_a_failed_load(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["nowhere"], ["y"])], ["y"])
    with pytest.raises(BadInput):
        load_model(path)
    assert not logging.getLogger("onnx_ir.serde").disabled


def test_every_runtime_op_is_unknown_to_onnx_or_newer_than_its_first_use() -> None:
    from graphopt.files.signatures import RUNTIME_OPS

    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert RUNTIME_OPS & known <= {"LayerNormalization"}


def test_an_output_that_is_an_input_has_its_shape(tmp_path: Path) -> None:
    def told(name: str, kind: int, shape: list[int] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [told("i", TensorProto.INT64, []), told("on", TensorProto.BOOL, []), told("s", TensorProto.FLOAT, [2, 4])]
    outputs = [told("on", TensorProto.BOOL, None), told("t", TensorProto.FLOAT, None)]
    body = helper.make_graph([helper.make_node("Neg", ["s"], ["t"])], "b", inputs, outputs)
    loop = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
    turns = helper.make_tensor("n", TensorProto.INT64, [], [2])
    model = load_model(write(tmp_path / "m.onnx", [loop], ["y", "x"], weights=[turns]))
    assert model.graph.inputs[0].shape == ir.Shape(["n", 4])
    assert [value.shape for value in model.graph[0].attributes["body"].as_graph().inputs[:2]] == [ir.Shape([])] * 2
