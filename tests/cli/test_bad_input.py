"""Bad input: one line that says what, where and what to do; exit code 2; nothing written, no traceback.

The lines are kept in ``snapshots/bad_input.txt``. After a wanted change: GRAPHOPT_UPDATE_SNAPSHOTS=1 pytest this file.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from graphopt.cli.main import main
from tests.files import sources

SNAPSHOT = Path(__file__).parent / "snapshots" / "bad_input.txt"
FLOAT = TensorProto.FLOAT

# A case writes what it needs into a folder and returns the arguments of the command line.
Case = Callable[[Path], list[str]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__.replace("_", " ")] = make
    return make


def model_case(change: Callable[[ModelProto], None]) -> None:
    """A case that spoils a good model: y = Relu(x + w)."""

    def make(folder: Path) -> list[str]:
        proto = good()
        change(proto)
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        return ["inspect", str(folder / "m.onnx")]

    CASES[change.__name__.replace("_", " ")] = make


def external_case(make: Callable[[Path, TensorProto], None]) -> None:
    """A case with one weight of 1000 float32 in ``w.bin``, spoiled in some way."""

    def write(folder: Path) -> list[str]:
        inner = folder / "models"
        inner.mkdir()
        proto = sources.model([sources.tensor("w", "FLOAT", (1000,))])
        weight = proto.graph.initializer[0]
        (inner / "w.bin").write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        make(inner, weight)
        (inner / "m.onnx").write_bytes(proto.SerializeToString())
        return ["inspect", str(inner / "m.onnx")]

    CASES[make.__name__.replace("_", " ")] = write


def value(name: str, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["n", 4])


def good() -> ModelProto:
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["y"], name="relu"),
    ]
    weight = helper.make_tensor("w", FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# --- the file ----------------------------------------------------------------------------------------------------


@case
def missing_file(folder: Path) -> list[str]:
    return ["inspect", str(folder / "nowhere.onnx")]


@case
def part_of_the_path_is_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("x")
    return ["inspect", str(folder / "file" / "m.onnx")]


@case
def folder_given(folder: Path) -> list[str]:
    return ["inspect", str(folder)]


@case
def folder_with_a_model_given(folder: Path) -> list[str]:
    (folder / "m.onnx").write_bytes(good().SerializeToString())
    return ["inspect", str(folder)]


@case
def pipe_given(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return ["inspect", str(folder / "pipe")]


@case
def path_with_a_null_byte(folder: Path) -> list[str]:
    return ["inspect", "m\0.onnx"]


def file_case(name: str, file: str, content: bytes) -> None:
    def make(folder: Path) -> list[str]:
        (folder / file).write_bytes(content)
        return ["inspect", str(folder / file)]

    CASES[name] = make


def _cut_in_the_graph() -> bytes:
    content: bytes = good().SerializeToString()
    return content[: len(content) // 2]


file_case("empty file", "m.onnx", b"")
file_case("garbage", "m.onnx", bytes(range(255, 128, -1)) * 10)
file_case("text", "m.onnx", b"hello, this is a model\n")
file_case("garbage that is a protobuf", "m.onnx", b"\x9a\x06\x03abc")
file_case("cut off", "m.onnx", _cut_in_the_graph())
file_case("pickle", "m.pt", pickle.dumps({"w": [1, 2, 3]}))
file_case(
    "safetensors",
    "m.safetensors",
    (lambda head: len(head).to_bytes(8, "little") + head)(json.dumps({"w": {"dtype": "F32"}}).encode()),
)
file_case(
    "onnx text", "m.onnx", b'<ir_version: 8, opset_import: ["" : 17]>\ng (float[4] x) => (float[4] y) { y = Relu(x) }'
)
file_case("protobuf text", "m.textproto", b'ir_version: 8\ngraph { name: "g" }\n')
file_case("json", "m.json", b'{"irVersion": "8", "graph": {"name": "g"}}')
file_case("git lfs pointer", "m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
file_case("html page", "m.onnx", b"<!DOCTYPE html><html><body>Not found</body></html>")
file_case("tensorflow lite", "m.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(100))
file_case("ort file", "m.ort", b"\x1c\x00\x00\x00ORTM" + bytes(100))
file_case("tensorrt engine", "m.engine", b"ptrt" + bytes(100))
file_case("tensorrt-rtx engine", "m.engine", b"vtrt" + bytes(100))


@case
def torch_checkpoint(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "m.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return ["inspect", str(folder / "m.pt")]


@case
def numpy_archive(folder: Path) -> list[str]:
    np.save(folder / "m.npy", np.zeros(3))
    return ["inspect", str(folder / "m.npy")]


@case
def data_file_given(folder: Path) -> list[str]:
    with (folder / "m.onnx.data").open("wb") as file:
        file.write(b"\x08")
        file.truncate(3_000_000_000)  # sparse: takes no space
    return ["inspect", str(folder / "m.onnx.data")]


# --- the model ---------------------------------------------------------------------------------------------------


@model_case
def no_default_opset_import(proto: ModelProto) -> None:
    proto.ClearField("opset_import")


@model_case
def opset_of_the_future(proto: ModelProto) -> None:
    proto.opset_import[0].version = 999


@model_case
def opset_zero(proto: ModelProto) -> None:
    proto.opset_import[0].version = 0


@model_case
def ir_version_of_the_future(proto: ModelProto) -> None:
    proto.ir_version = 999


@model_case
def no_ir_version(proto: ModelProto) -> None:
    proto.ClearField("ir_version")


@model_case
def no_graph(proto: ModelProto) -> None:
    proto.ClearField("graph")


@model_case
def empty_graph(proto: ModelProto) -> None:
    proto.graph.CopyFrom(GraphProto(name="g"))


@model_case
def no_outputs(proto: ModelProto) -> None:
    proto.graph.ClearField("output")


@model_case
def output_that_nobody_produces(proto: ModelProto) -> None:
    proto.graph.output[0].name = "z"


@model_case
def input_that_nobody_produces(proto: ModelProto) -> None:
    proto.graph.node[0].input[0] = "z"


@model_case
def input_of_a_nameless_node_that_nobody_produces(proto: ModelProto) -> None:
    proto.graph.node[0].input[0] = "z"
    proto.graph.node[0].name = ""


@model_case
def cyclic_graph(proto: ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


@model_case
def cycle_in_a_body(proto: ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("Neg", ["q"], ["p"], name="p"), helper.make_node("Abs", ["p"], ["q"], name="q")],
        "b",
        [],
        [value("q")],
    )
    _with_if(proto, body)


@model_case
def body_that_reads_its_own_result(proto: ModelProto) -> None:
    _with_if(proto, helper.make_graph([helper.make_node("Neg", ["z"], ["p"])], "b", [], [value("p")]))


@model_case
def body_that_returns_an_outer_value(proto: ModelProto) -> None:
    _with_if(proto, helper.make_graph([], "b", [], [value("a")]))


def _with_if(proto: ModelProto, body: GraphProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], name="if", then_branch=body, else_branch=body))


@model_case
def value_made_twice(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Neg", ["x"], ["a"], name="neg"))


@model_case
def value_named_like_an_input(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Neg", ["x"], ["x"], name="neg"))


@model_case
def duplicate_initializer(proto: ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


@model_case
def duplicate_initializer_in_a_body(proto: ModelProto) -> None:
    weight = helper.make_tensor("k", FLOAT, [1], [0.0])
    _with_if(proto, helper.make_graph([helper.make_node("Neg", ["k"], ["p"])], "b", [], [value("p")], [weight, weight]))


@model_case
def initializer_without_a_name(proto: ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("", FLOAT, [1], [0.0]))


@model_case
def duplicate_input(proto: ModelProto) -> None:
    proto.graph.input.append(proto.graph.input[0])


@model_case
def input_without_a_type(proto: ModelProto) -> None:
    proto.graph.input[0].ClearField("type")


@model_case
def unknown_element_type(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = 77


@model_case
def unknown_tensor_type(proto: ModelProto) -> None:
    proto.graph.initializer[0].data_type = 77


@model_case
def undefined_tensor_type(proto: ModelProto) -> None:
    proto.graph.initializer[0].data_type = 0


@model_case
def map_type(proto: ModelProto) -> None:
    proto.graph.output[0].type.Clear()
    proto.graph.output[0].type.map_type.key_type = TensorProto.INT64


@model_case
def sequence_without_an_element_type(proto: ModelProto) -> None:
    proto.graph.input[0].type.Clear()
    proto.graph.input[0].type.sequence_type.SetInParent()


@model_case
def raw_data_of_the_wrong_length(proto: ModelProto) -> None:
    proto.graph.initializer[0].ClearField("float_data")
    proto.graph.initializer[0].raw_data = bytes(15)


@model_case
def too_few_values(proto: ModelProto) -> None:
    del proto.graph.initializer[0].float_data[2:]


@model_case
def negative_size(proto: ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = -4


@model_case
def too_few_strings(proto: ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="s", data_type=TensorProto.STRING, dims=[3], string_data=[b"a"]))


@model_case
def constant_of_the_wrong_length(proto: ModelProto) -> None:
    tensor = TensorProto(data_type=FLOAT, dims=[2], raw_data=bytes(4))
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], name="k", value=tensor))


@model_case
def sparse_initializer(proto: ModelProto) -> None:
    sparse = proto.graph.sparse_initializer.add(dims=[9])
    sparse.values.CopyFrom(helper.make_tensor("sp", FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("sp_i", TensorProto.INT64, [1], [2]))


@model_case
def sparse_attribute(proto: ModelProto) -> None:
    node = NodeProto(op_type="Constant", output=["k"], name="k")
    node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
    proto.graph.node.append(node)


@model_case
def training_information(proto: ModelProto) -> None:
    proto.training_info.add()


@model_case
def attribute_without_a_type(proto: ModelProto) -> None:
    proto.graph.node[1].attribute.add(name="alpha")


@model_case
def attribute_of_the_wrong_type(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Softmax", ["x"], ["s"], name="softmax", axis=1.5))


@model_case
def missing_body(proto: ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["p"])], "b", [], [value("p")])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], name="if", then_branch=body))


@model_case
def missing_attribute(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Cast", ["x"], ["c"], name="cast"))


@model_case
def missing_input(proto: ModelProto) -> None:
    del proto.graph.node[0].input[1:]


@model_case
def empty_required_input(proto: ModelProto) -> None:
    proto.graph.node[0].input[0] = ""


@model_case
def too_many_inputs(proto: ModelProto) -> None:
    proto.graph.node[1].input.extend(["x", "w"])


@model_case
def too_many_outputs(proto: ModelProto) -> None:
    proto.graph.node[1].output.extend(["y2", "y3"])


@model_case
def unknown_op(proto: ModelProto) -> None:
    proto.graph.node[1].op_type = "Rleu"


@model_case
def op_newer_than_the_opset(proto: ModelProto) -> None:
    proto.graph.node[1].op_type = "Gelu"


def _function(name: str, calls: str) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["p"], ["q"], [helper.make_node(calls, ["p"], ["q"], domain="f")], imports)


@model_case
def function_that_calls_itself(proto: ModelProto) -> None:
    proto.functions.append(_function("F", "F"))


@model_case
def functions_that_call_each_other(proto: ModelProto) -> None:
    proto.functions.extend([_function("F", "G"), _function("G", "F")])


@model_case
def function_defined_twice(proto: ModelProto) -> None:
    proto.functions.extend([_function("F", "Other")] * 2)


@model_case
def function_whose_output_nobody_produces(proto: ModelProto) -> None:
    proto.functions.append(_function("F", "Other"))
    proto.functions[0].output[0] = "z"


@model_case
def function_of_a_future_opset(proto: ModelProto) -> None:
    proto.functions.append(_function("F", "Other"))
    proto.functions[0].opset_import[0].version = 999


@model_case
def function_with_an_unknown_op(proto: ModelProto) -> None:
    proto.functions.append(_function("F", "Rleu"))
    proto.functions[0].node[0].domain = ""


# --- external data -----------------------------------------------------------------------------------------------


@external_case
def external_file_missing(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, "w.bin", 0, 4000)
    (folder / "w.bin").unlink()


@external_case
def external_file_cut_off(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, "w.bin", 0, 4000)
    os.truncate(folder / "w.bin", 3000)


@external_case
def external_offset_beyond_the_end(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, "w.bin", 100, 4000)


@external_case
def external_length_wrong(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, "w.bin", 0, 2000)


@external_case
def external_offset_negative(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, "w.bin", -8, 4000)


@external_case
def external_offset_not_a_number(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, "w.bin", "many", 4000)


@external_case
def external_location_missing(folder: Path, weight: TensorProto) -> None:
    weight.data_location = TensorProto.EXTERNAL


@external_case
def external_path_up(folder: Path, weight: TensorProto) -> None:
    (folder / "w.bin").rename(folder.parent / "w.bin")
    sources.make_external(weight, "../w.bin", 0, 4000)


@external_case
def external_path_to_a_sibling_folder(folder: Path, weight: TensorProto) -> None:
    (folder.parent / "models2").mkdir()
    (folder / "w.bin").rename(folder.parent / "models2" / "w.bin")
    sources.make_external(weight, "../models2/w.bin", 0, 4000)


@external_case
def external_path_absolute(folder: Path, weight: TensorProto) -> None:
    sources.make_external(weight, str(folder / "w.bin"), 0, 4000)


@external_case
def external_link_out_of_the_folder(folder: Path, weight: TensorProto) -> None:
    (folder / "w.bin").rename(folder.parent / "w.bin")
    (folder / "w.bin").symlink_to(folder.parent / "w.bin")
    sources.make_external(weight, "w.bin", 0, 4000)


@external_case
def external_file_with_two_names(folder: Path, weight: TensorProto) -> None:
    (folder.parent / "other.bin").hardlink_to(folder / "w.bin")
    sources.make_external(weight, "w.bin", 0, 4000)


@external_case
def external_path_is_a_folder(folder: Path, weight: TensorProto) -> None:
    (folder / "data").mkdir()
    sources.make_external(weight, "data", 0, 4000)


@external_case
def external_strings(folder: Path, weight: TensorProto) -> None:
    weight.data_type = TensorProto.STRING
    sources.make_external(weight, "w.bin", 0, 4000)


# --- the command line --------------------------------------------------------------------------------------------

CASES["unknown subcommand"] = lambda folder: ["inpsect", "m.onnx"]
CASES["unknown option"] = lambda folder: ["inspect", "m.onnx", "--frobnicate"]
CASES["missing argument"] = lambda folder: ["inspect"]
CASES["one argument too many"] = lambda folder: ["inspect", "a.onnx", "b.onnx"]
CASES["value for a flag"] = lambda folder: ["inspect", "a.onnx", "--json=yes"]
CASES["unknown option of the program"] = lambda folder: ["--frobnicate"]


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: size and content (of large ones the beginning)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        size = path.lstat().st_size
        content = b""
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(1 << 20)
        found[str(path.relative_to(folder))] = (size, content)
    return found


def normalised(text: str, folder: Path) -> str:
    text = text.replace(str(folder), "FOLDER")
    return re.sub(r"onnx \d+\.\d+\S* knows up to \d+", "onnx VERSION knows up to N", text)


def snapshot() -> dict[str, str]:
    lines = SNAPSHOT.read_text().splitlines() if SNAPSHOT.exists() else []
    return dict(line.split(" | ", 1) for line in lines)


@pytest.mark.parametrize("name", list(CASES))
def test_bad_input(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = CASES[name](tmp_path)
    before = state(tmp_path)
    code = main(arguments)
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert state(tmp_path) == before
    line = normalised(err.strip(), tmp_path)
    if os.environ.get("GRAPHOPT_UPDATE_SNAPSHOTS"):
        lines = {**snapshot(), name: line}
        SNAPSHOT.write_text("".join(f"{key} | {lines[key]}\n" for key in CASES if key in lines))
    assert snapshot().get(name) == line


def test_the_snapshot_has_every_case_and_no_other() -> None:
    assert list(snapshot()) == list(CASES)
    assert len(CASES) >= 30


def test_the_model_that_the_cases_spoil_is_good(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.onnx").write_bytes(good().SerializeToString())
    assert main(["inspect", str(tmp_path / "m.onnx")]) == 0
    assert capfd.readouterr().err == ""
