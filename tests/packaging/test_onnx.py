"""ONNX models in a Triton repository: what the server's onnxruntime backend would ask of the configuration holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import BadInput
from graphopt.packaging import DEFAULT_MAX_BATCH, TritonModel, package_triton
from tests.packaging.common import HEADER, saved
from tests.packaging.server import check_onnxruntime, data_type, kind, published

BATCHED = "g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }"


def packaged(text: str, folder: Path, **options: Any) -> tuple[TritonModel, Any]:
    """What is said of a model in a repository, and its configuration, which a server would take."""
    made = package_triton(saved(text, folder), folder / "models", **options)
    return made, check_onnxruntime(made.path, made.version)


def dims(tensors: Any) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in tensors}


def test_a_batch(tmp_path: Path) -> None:
    made, config = packaged(BATCHED, tmp_path)
    assert (made.max_batch, config.max_batch_size) == (DEFAULT_MAX_BATCH, DEFAULT_MAX_BATCH)
    assert dims(config.input) == {"x": [3]} and dims(config.output) == {"y": [3]}
    assert config.HasField("dynamic_batching") and list(config.dynamic_batching.preferred_batch_size) == []
    assert [kind(group) for group in config.instance_group] == ["KIND_AUTO"]
    assert sorted(str(p.relative_to(made.path)) for p in made.path.rglob("*")) == ["1", "1/model.onnx", "config.pbtxt"]
    assert (made.path / "1/model.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_one_batch_needs_no_batcher(tmp_path: Path) -> None:
    _, config = packaged(BATCHED, tmp_path, max_batch=1)
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("text", "reason", "inputs", "outputs"),
    [
        ("g (float[4, 3] x) => (float[4, 3] y) { y = Relu(x) }", "the first axis of 'x' is 4", [[4, 3]], [[4, 3]]),
        ("g (float[n, 3] x) => (float[1] y) { y = ReduceMax<keepdims = 0>(x) }", "no axes", [[-1, 3]], [[1]]),
        ("g (float[n, 3] a, float[m, 3] b) => (float[n, 3] c, float[m, 3] d) { c = Relu(a)  d = Relu(b) }",
         "the first axis of 'a' is n, that of 'b' is m", [[-1, 3], [-1, 3]], [[-1, 3], [-1, 3]]),
        ("g (float[n, 3] x) => (float[n, n] y) { t = Transpose<perm = [1, 0]>(x)  y = MatMul(x, t) }",
         "n is axis 1 of 'y', too", [[-1, 3]], [[-1, -1]]),
        ("g (float s) => (float t) { t = Neg(s) }", "'s' has no axes", [[1]], [[1]]),
        ("g (float[n, 3] x, float s) => (float[n, 3] y) { y = Mul(x, s) }",
         "'s' has no axes", [[-1, 3], [1]], [[-1, 3]]),
        ("g () => (float[2] y) { y = Constant<value = float[2] {1, 2}>() }", "no inputs", [], [[2]]),
        # Shapes cannot tell these from a batch; running them can.
        ("g (float[n, 3] x) => (float[n, 3] y) { y = Softmax<axis = 0>(x) }", "'y' is another among other rows",
         [[-1, 3]], [[-1, 3]]),
        ("g (float[n, 3] x) => (float[n, 3] y) { t = ReduceMean<keepdims = 1>(x)  y = Sub(x, t) }",
         "'y' is another among other rows", [[-1, 3]], [[-1, 3]]),
        ("g (int64[n] x) => (int64[n] y) { z = Constant<value = int64 {0}>()  y = CumSum(x, z) }",
         "'y' is another among other rows", [[-1]], [[-1]]),
        ("g (float[?, 3] x) => (int64[m, 2] y) { b = Cast<to = 9>(x)  t = NonZero(b)  y = Transpose(t) }",
         "'y'", [[-1, 3]], [[-1, 2]]),
    ],
)  # fmt: skip
def test_no_batch(text: str, reason: str, inputs: list[list[int]], outputs: list[list[int]], tmp_path: Path) -> None:
    made, config = packaged(text, tmp_path)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert reason in made.why
    assert list(dims(config.input).values()) == inputs and list(dims(config.output).values()) == outputs
    with pytest.raises(BadInput, match="requests cannot be batched"):
        package_triton(tmp_path / "m.onnx", tmp_path / "models", name="asked", max_batch=8)


def test_what_is_not_run_is_taken_at_its_shapes(tmp_path: Path) -> None:
    mixing = "g (float[n, 3] x) => (float[n, 3] y) { y = Softmax<axis = 0>(x) }"
    assert packaged(mixing, tmp_path, verify=False)[0].max_batch == DEFAULT_MAX_BATCH


@pytest.mark.parametrize(
    "text",
    [
        "g (float[?, 3] x) => (float[?, 3] y) { y = Relu(x) }",
        "g (float[n, 3] x) => (float[other, 3] y) { y = Relu(x) }",  # a name that only the exporter knows
        "g (float[n, 3] x, float[n] z) => (float[n] y) "
        "{ a = Constant<value = int64[1] {1}>() s = ReduceSum<keepdims = 0>(x, a)  y = Add(s, z) }",
        "g (float[n, s] x, int64[n, s] m) => (float[n, s] y) { c = Cast<to = 1>(m)  y = Mul(x, c) }",
        "g (float[n, 3] x) => (float[?, ?] y) "
        "{ s = Constant<value = int64[2] {-1, 3}>() z = Constant<value = int64[2] {0, 0}>() t = Add(s, z) "
        "y = Reshape(x, t) }",
    ],
)
def test_batches_of_other_spellings(text: str, tmp_path: Path) -> None:
    made, config = packaged(text, tmp_path, max_batch=16)
    assert made.max_batch == config.max_batch_size == 16
    assert made.why == "as asked"


def test_a_row_of_one_number(tmp_path: Path) -> None:
    _, config = packaged("g (float[n] x) => (float[n] y) { y = Relu(x) }", tmp_path)
    assert dims(config.input) == {"x": [1]} and config.input[0].HasField("reshape")
    assert list(config.output[0].reshape.shape) == []


def test_sizes_that_only_the_runtime_finds(tmp_path: Path) -> None:
    """Triton compares shapes of outputs with what the optimized session says, to the number."""
    text = (
        "g (float[n, 3] x) => (float[a, b] y) { s = Constant<value = int64[2] {3, -1}>() "
        "z = Constant<value = int64[2] {0, 0}>() t = Add(s, z) y = Reshape(x, t) }"
    )
    _, config = packaged(text, tmp_path)
    assert dims(config.output) == {"y": [3, -1]}


@pytest.mark.parametrize(
    ("onnx_type", "wanted"),
    [
        *[("float16", "TYPE_FP16"), ("bfloat16", "TYPE_BF16"), ("float", "TYPE_FP32"), ("double", "TYPE_FP64")],
        *[("int8", "TYPE_INT8"), ("uint8", "TYPE_UINT8"), ("int16", "TYPE_INT16"), ("uint16", "TYPE_UINT16")],
        *[("int32", "TYPE_INT32"), ("uint32", "TYPE_UINT32"), ("int64", "TYPE_INT64"), ("uint64", "TYPE_UINT64")],
        *[("bool", "TYPE_BOOL"), ("string", "TYPE_STRING")],
    ],
)
def test_every_type(onnx_type: str, wanted: str, tmp_path: Path) -> None:
    text = f"g ({onnx_type}[n, 2] x) => ({onnx_type}[n, 2] y) {{ y = Identity(x) }}"
    made, config = packaged(text, tmp_path)
    assert data_type(config.input[0]) == data_type(config.output[0]) == wanted
    assert made.max_batch == DEFAULT_MAX_BATCH


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("g (float[2] x) => (seq(float[a]) y) { y = SequenceConstruct(x) }", "output 'y': is a sequence"),
        ("g (seq(float[a]) x) => (float[a] y) { i = Constant<value = int64 {0}>()  y = SequenceAt(x, i) }",
         "input 'x': is a sequence"),
        ("g (optional(float[a]) x) => (bool y) { y = OptionalHasElement(x) }", "input 'x': is optional"),
        ("g (float8e4m3fn[2] x) => (float8e4m3fn[2] y) { y = Identity(x) }", "input 'x': is FLOAT8E4M3FN"),
        ("g (float[n, 0] x) => (float[n, 0] y) { y = Relu(x) }", "'x' has an axis of size 0"),
        ("g (float x, int64[r] s) => (float y) { y = Reshape(x, s) }", "output 'y': has no known rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_served(text: str, told: str, tmp_path: Path) -> None:
    path = saved(text, tmp_path)
    if "Reshape" in text:
        model = onnx.load(path)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        onnx.save(model, path)
    with pytest.raises(BadInput) as caught:
        package_triton(path, tmp_path / "models")
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_optional_inputs(tmp_path: Path) -> None:
    """Those of a model that is batched are left out, since the server refuses them; else they are optional."""
    text = "g (float[n, 3] x, float[3] w) => (float[n, 3] y) <float[3] w = {1, 2, 3}> { y = Mul(x, w) }"
    made, config = packaged(text, tmp_path)
    assert made.max_batch == 4 and made.optional == ("w",) and dims(config.input) == {"x": [3]}
    made, config = packaged(text, tmp_path, max_batch=0, name="alone")
    assert made.optional == () and dims(config.input) == {"x": [-1, 3], "w": [3]}
    assert [tensor.optional for tensor in config.input] == [False, True]


def test_weights_among_the_inputs_of_old_files(tmp_path: Path) -> None:
    text = '<ir_version: 3, opset_import: ["" : 8]> g (float[n, 3] x, float[3] w) => (float[n, 3] y) '
    made, config = packaged(text + "<float[3] w = {1, 2, 3}> { y = Mul(x, w) }", tmp_path)
    assert made.optional == () and dims(config.input) == {"x": [3]}


@pytest.mark.parametrize("name", ['he said "x"', "back\\slash", "tab\there", "größe"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", [name], [name + "'"])],
            "g",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2])],
            [helper.make_tensor_value_info(name + "'", TensorProto.FLOAT, ["n", 2])],
        ),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    onnx.save(model, tmp_path / "m.onnx")
    called = name.replace("\t", " ")
    made = package_triton(tmp_path / "m.onnx", tmp_path / "models", name=called)
    config = check_onnxruntime(made.path)
    assert config.name == called and config.input[0].name == name and config.output[0].name == name + "'"


def external(folder: Path, *locations: str, name: str = "m.onnx") -> Path:
    """A model with a weight in each data file."""
    folder.mkdir(exist_ok=True)
    tensors, nodes, last = [], [], "x"
    for i, location in enumerate(locations):
        array = np.full(300, i + 1, np.float32)
        tensor = numpy_helper.from_array(array, f"w{i}")
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        (folder / location).write_bytes(array.tobytes())
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "1200")):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
        nodes.append(helper.make_node("Mul", [last, f"w{i}"], [f"t{i}"]))
        last = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 300])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", 300])],
        tensors,
    )
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


def test_external_data_goes_along(tmp_path: Path) -> None:
    path = external(tmp_path / "source", "m.data", "weights/b.bin", "./c.bin")
    made = package_triton(path, tmp_path / "models")
    config = check_onnxruntime(made.path)  # a session needs all of them
    assert config.max_batch_size == DEFAULT_MAX_BATCH
    assert made.bytes == 3600 + path.stat().st_size
    names = sorted(str(p.relative_to(made.path / "1")) for p in (made.path / "1").rglob("*") if p.is_file())
    assert names == ["c.bin", "m.data", "model.onnx", "weights/b.bin"]
    assert (path.parent / "m.data").stat().st_nlink == 1  # a second name would make the source unreadable


def test_a_data_file_in_the_way(tmp_path: Path) -> None:
    path = external(tmp_path / "source", "model.onnx")
    with pytest.raises(BadInput, match=r"its data file is called model\.onnx"):
        package_triton(path, tmp_path / "models")


def test_devices_and_instances(tmp_path: Path) -> None:
    for device, wanted in (("gpu", "KIND_GPU"), ("cpu", "KIND_CPU"), ("auto", "KIND_AUTO")):
        _, config = packaged(BATCHED, tmp_path, device=device, instances=3, name=device)
        (group,) = config.instance_group
        assert (kind(group), group.count) == (wanted, 3)


def test_without_a_runtime_that_loads_it(tmp_path: Path) -> None:
    """Operators of nobody here: refused, unless asked for; then shapes are as the file tells them."""
    text = HEADER.replace('["" : 20]', '["" : 20, "custom" : 1]')
    path = saved(f"{text} g (float[n, 3] x) => (float[m, 3] y) {{ y = custom.Odd(x) }}", tmp_path)
    for max_batch in (None, 0):
        with pytest.raises(BadInput, match=r"m\.onnx: onnxruntime refuses the model: .*custom.*--no-verify"):
            package_triton(path, tmp_path / "models", max_batch=max_batch)
    assert not (tmp_path / "models").exists()
    assert package_triton(path, tmp_path / "models", name="trusted", verify=False, max_batch=2).max_batch == 2


def test_nvidia_reads_the_same() -> None:
    """Every configuration above was read by the published definition too, where that is installed."""
    definition = published()
    if definition is None:
        pytest.skip("tritonclient is not installed: only our description of its fields was used")
    with pytest.raises(text_format.ParseError):
        text_format.Parse("max_batchsize: 4", definition.ModelConfig())


def test_files_are_the_callers_own(tmp_path: Path) -> None:
    """A read-only source gives a model that the next run can replace."""
    path = saved(BATCHED, tmp_path)
    path.chmod(0o444)
    made = package_triton(path, tmp_path / "models")
    assert os.access(made.path / "1" / "model.onnx", os.W_OK)
