"""What Triton does when it loads a model, as far as that needs no server: it parses the configuration, and checks it.

The checks are those that Triton's documentation and the messages of its core, onnxruntime and tensorrt backends name.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
    text_format,
)

from graphopt.engines.report import BuildResult

_NUMBERS = {"string": 9, "int64": 3, "int32": 5, "bool": 8, "enum": 14, "message": 11}
_DATA_TYPES = (
    *("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "STRING", "BF16"),
)
_MESSAGES: dict[str, list[tuple[str, str, str]]] = {
    "ModelTensorReshape": [("shape", "int64", "repeated")],
    "ModelInput": [
        *[("name", "string", ""), ("data_type", "enum", "DataType"), ("dims", "int64", "repeated")],
        *[("reshape", "message", "ModelTensorReshape"), ("is_shape_tensor", "bool", ""), ("optional", "bool", "")],
    ],
    "ModelOutput": [
        *[("name", "string", ""), ("data_type", "enum", "DataType"), ("dims", "int64", "repeated")],
        *[("reshape", "message", "ModelTensorReshape"), ("is_shape_tensor", "bool", "")],
    ],
    "ModelInstanceGroup": [("count", "int32", ""), ("kind", "enum", "Kind"), ("profile", "string", "repeated")],
    "ModelDynamicBatching": [("preferred_batch_size", "int32", "repeated")],
    "ModelConfig": [
        *[("name", "string", ""), ("platform", "string", ""), ("backend", "string", "")],
        *[("max_batch_size", "int32", ""), ("input", "message", "ModelInput*"), ("output", "message", "ModelOutput*")],
        *[
            ("instance_group", "message", "ModelInstanceGroup*"),
            ("dynamic_batching", "message", "ModelDynamicBatching"),
        ],
    ],
}


def published() -> ModuleType | None:
    """NVIDIA's own definition of the configuration, of the package tritonclient; None where that is not installed.

    By its path: importing its package would ask for grpc.
    """
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _described() -> Any:
    """The same, of the fields that we write: text is parsed by names, so that the numbers do not matter."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="described", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(_DATA_TYPES):
        types.value.add(name=f"TYPE_{name}", number=number)
    kinds = file.enum_type.add(name="Kind")
    for number, name in enumerate(("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")):
        kinds.value.add(name=name, number=number)
    for message, fields in _MESSAGES.items():
        made = file.message_type.add(name=message)
        for number, (name, kind, more) in enumerate(fields, 1):
            field = made.field.add(name=name, number=number, type=_NUMBERS[kind])
            field.label = 3 if more == "repeated" or more.endswith("*") else 1
            if kind in ("enum", "message"):
                field.type_name = f".described.{more.rstrip('*')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("described.ModelConfig"))


_DESCRIBED = _described()
_PUBLISHED = published()


def parse(text: str) -> Any:
    """The configuration, read by NVIDIA's definition too if that is here. Raises ``ParseError`` where it is none."""
    config = text_format.Parse(text, _DESCRIBED())
    if _PUBLISHED is not None:
        theirs = text_format.Parse(text, _PUBLISHED.ModelConfig())
        assert json_format.MessageToDict(theirs) == json_format.MessageToDict(config)
    return config


def configured(model: Path) -> Any:
    """The configuration of a model in a repository."""
    return parse((model / "config.pbtxt").read_text(encoding="utf-8"))


def whole(config: Any, tensor: Any) -> list[int]:
    """The shape that the backend gets of a tensor: reshaped, with the batch before it."""
    dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    return [-1, *dims] if config.max_batch_size else dims


def data_type(tensor: Any) -> str:
    return str(tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name)


def kind(group: Any) -> str:
    return str(group.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[group.kind].name)


def check_core(config: Any, model: Path) -> None:
    """What the server asks of every configuration."""
    assert config.name == model.name
    assert (config.platform, config.backend) in {("onnxruntime_onnx", "onnxruntime"), ("tensorrt_plan", "tensorrt")}
    assert config.max_batch_size >= 0
    for tensor in (*config.input, *config.output):
        assert tensor.name and data_type(tensor) != "TYPE_INVALID"
        assert tensor.dims, "no shape may be empty"
        assert all(size >= 1 or size == -1 for size in tensor.dims)
        if tensor.HasField("reshape"):
            assert tensor.reshape.shape or config.max_batch_size, "of a model that is not batched no shape is empty"
            assert tensor.reshape.shape or list(tensor.dims) == [1], "as many elements as before"
        assert not tensor.is_shape_tensor or config.platform == "tensorrt_plan"
    for size in config.dynamic_batching.preferred_batch_size:
        assert 0 < size <= config.max_batch_size
    (group,) = config.instance_group
    assert group.count >= 1
    assert not group.profile or config.platform == "tensorrt_plan"


_ORT_TYPES = {
    **{f"tensor({s}int{b})": f"TYPE_{s.upper()}INT{b}" for s in ("", "u") for b in (8, 16, 32, 64)},
    "tensor(float16)": "TYPE_FP16",
    "tensor(bfloat16)": "TYPE_BF16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
    "tensor(bool)": "TYPE_BOOL",
}


def check_onnxruntime(model: Path, version: int = 1) -> Any:
    """What the onnxruntime backend asks: the session's names, types and shapes. Returns the configuration."""
    config = configured(model)
    check_core(config, model)
    session = onnxruntime.InferenceSession(model / str(version) / "model.onnx", providers=["CPUExecutionProvider"])
    overridable = {value.name: value for value in session.get_overridable_initializers()}
    inputs = {value.name: value for value in session.get_inputs()}
    assert {t.name for t in config.input if not t.optional} == set(inputs)
    assert {t.name for t in config.input if t.optional} <= set(overridable)
    assert not config.max_batch_size or not any(t.optional for t in config.input)
    for tensor in config.input:
        _check_tensor(config, tensor, (inputs | overridable)[tensor.name], exact=False)
    outputs = {value.name: value for value in session.get_outputs()}
    assert [t.name for t in config.output] == list(outputs)
    for tensor in config.output:
        _check_tensor(config, tensor, outputs[tensor.name], exact=True)
    return config


def _check_tensor(config: Any, tensor: Any, value: Any, *, exact: bool) -> None:
    assert data_type(tensor) == _ORT_TYPES[value.type]
    found = [size if isinstance(size, int) else -1 for size in value.shape]
    told = whole(config, tensor)
    if not found:
        assert not config.max_batch_size and set(told) == {1}
        return
    assert not config.max_batch_size or found[0] == -1
    assert len(told) == len(found), tensor.name
    assert all(one == other or (other == -1 and not exact) for one, other in zip(told, found, strict=True)), tensor.name


def check_tensorrt(model: Path, engine: BuildResult) -> Any:
    """What the tensorrt backend asks of an engine: its names, shapes, largest batch. Returns the configuration."""
    config = configured(model)
    check_core(config, model)
    assert [t.name for t in config.input] == [t.name for t in engine.inputs]
    assert [t.name for t in config.output] == [t.name for t in engine.outputs]
    for told, found in zip((*config.input, *config.output), (*engine.inputs, *engine.outputs), strict=True):
        assert tuple(whole(config, told)) == found.shape != ()
    largest = min((profile.max[0] for profile in engine.profiles.values()), default=0)
    assert config.max_batch_size <= largest
    (group,) = config.instance_group
    assert kind(group) == "KIND_GPU"
    assert list(group.profile) == [str(i) for i in range(len(engine.buckets))]
    return config
