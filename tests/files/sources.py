"""Small models for the tests of reading and writing files, made with the ``onnx`` package alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

DTYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "FLOAT16": np.dtype(np.float16),
    "BFLOAT16": np.dtype(ml_dtypes.bfloat16),
    "DOUBLE": np.dtype(np.float64),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT16": np.dtype(np.int16),
    "UINT16": np.dtype(np.uint16),
    "INT32": np.dtype(np.int32),
    "UINT32": np.dtype(np.uint32),
    "INT64": np.dtype(np.int64),
    "UINT64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
    "COMPLEX64": np.dtype(np.complex64),
    "INT4": np.dtype(ml_dtypes.int4),
    "UINT4": np.dtype(ml_dtypes.uint4),
    "INT2": np.dtype(ml_dtypes.int2),
    "UINT2": np.dtype(ml_dtypes.uint2),
    "FLOAT8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "FLOAT8E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "FLOAT8E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "FLOAT8E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "FLOAT8E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "FLOAT4E2M1": np.dtype(ml_dtypes.float4_e2m1fn),
}
STRING = "STRING"


def payload(dtype: str, count: int, seed: int = 0) -> bytes:
    """Random bytes that hold ``count`` elements of an ONNX data type as the format packs them."""
    kind = ir.DataType[dtype]
    length = (kind.bitwidth * count + 7) // 8
    data = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)
    if dtype == "BOOL":
        data &= 1
    spare = length * 8 - kind.bitwidth * count
    if spare:
        data[-1] &= 0xFF >> spare  # the unused bits of the last byte are zero
    return data.tobytes()


def tensor(name: str, dtype: str, shape: Sequence[int], seed: int = 0) -> TensorProto:
    """A tensor of random bits, or of strings."""
    proto = TensorProto(name=name, data_type=ir.DataType[dtype].value, dims=shape)
    count = int(np.prod(shape))
    if dtype == STRING:
        proto.string_data.extend(f"text {seed} {index} ä".encode() for index in range(count))
    else:
        proto.raw_data = payload(dtype, count, seed)
    return proto


def model(tensors: Sequence[TensorProto], *, opset: int = 21, ir_version: int = 10) -> onnx.ModelProto:
    """A model whose outputs are copies of the given weights."""
    nodes = [helper.make_node("Identity", [t.name], [f"{t.name}_out"], name=f"copy_{t.name}") for t in tensors]
    outputs = [helper.make_tensor_value_info(f"{t.name}_out", t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph(nodes, "weights", [], outputs, list(tensors))
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="test")


def write(proto: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model; with ``external`` every weight but strings goes to ``<stem>.bin``, 16 bytes apart."""
    if external:
        blob = bytearray(b"\xee" * 16)
        for weight in proto.graph.initializer:
            if weight.data_type == TensorProto.STRING:
                continue
            make_external(weight, f"{path.stem}.bin", len(blob), len(weight.raw_data))
            blob += weight.raw_data + b"\xee" * 16
            weight.ClearField("raw_data")
        (path.parent / f"{path.stem}.bin").write_bytes(blob)
    path.write_bytes(proto.SerializeToString())
    return path


def make_external(proto: TensorProto, location: str, offset: int | str | None, length: int | str | None) -> None:
    """Say that a tensor's bytes lie in a file."""
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            proto.external_data.add(key=key, value=str(value))


def contents(found: ir.Model) -> Mapping[str, tuple[str, tuple[int, ...], object]]:
    """Every weight of a model: data type, shape, exact content."""
    result: dict[str, tuple[str, tuple[int, ...], object]] = {}
    for name, value in found.graph.initializers.items():
        weight = value.const_value
        assert weight is not None
        data = tuple(weight.string_data()) if isinstance(weight, ir.StringTensor) else weight.tobytes()
        result[name] = (weight.dtype.name, tuple(weight.shape.numpy()), data)
    return result
