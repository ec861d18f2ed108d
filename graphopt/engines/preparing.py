"""The file that the parser is given: the user's own where nothing has to change, else a copy of the graph alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import graphs

# Constants up to this size stay in the .onnx file.
_SMALL_BYTES = 1 << 10
_BLOCK = 1 << 20


def write_for_parser(model: ir.Model, folder: Path) -> Path:
    """Write a model into a folder of its own, without copying weights that already lie in files.

    Such a weight keeps its place: the folder gets a link to its file. The others go into one new data file, since an
    ``.onnx`` file cannot hold more than 2 GB.

    Raises:
        OSError: The disk is full, or the like.
    """
    data = "graphopt-weights.data"
    linked: dict[str, str] = {}
    with (folder / data).open("wb") as file:
        for graph in graphs.all_graphs(model):
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    linked[str(tensor.location)] = str(Path(tensor.path).absolute())
                elif tensor is not None and tensor.nbytes > _SMALL_BYTES and tensor.dtype != ir.DataType.STRING:
                    offset = file.tell()
                    file.write(tensor.tobytes())
                    value.const_value = ir.ExternalTensor(
                        data, offset, tensor.nbytes, tensor.dtype, shape=_fixed(tensor), name=name, base_dir=folder
                    )
    for location, path in linked.items():
        link = folder / location
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    written = folder / "model.onnx"
    written.write_bytes(ir.to_proto(model).SerializeToString())
    return written


def _fixed(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape([int(size) for size in tensor.shape.numpy()])


def describe_model(model: ir.Model, source: Path) -> dict[str, Any]:
    """The name of an ONNX file and the sha256 of it, its data files behind it in the order of their names."""
    external = {
        str(value.const_value.location): Path(value.const_value.path)
        for graph in graphs.all_graphs(model)
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    digest = hashlib.sha256()
    for path in (source, *(external[name] for name in sorted(external))):
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return {"name": source.name, "sha256": digest.hexdigest(), "data_files": sorted(external)}


def runtime_operators(model: ir.Model) -> list[str]:
    """The types of ONNX Runtime's own operators in a model; the parser's errors do not tell domains."""
    nodes = [
        *model.graph.all_nodes(),
        *(node for function in model.functions.values() for node in function.all_nodes()),
    ]
    return sorted({node.op_type for node in nodes if node.domain == "com.microsoft"})
