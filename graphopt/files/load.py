"""Load a model: lazily, and checked so that nothing further down meets a file it cannot trust."""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graphopt import garbage, graphs
from graphopt.errors import BadInput
from graphopt.files.bundle_folder import is_bundle, not_one_file
from graphopt.files.check import check_model
from graphopt.files.explain import explain
from graphopt.files.external import ExternalFiles
from graphopt.files.sniff import recognise

PROTOBUF_LIMIT = (1 << 31) - 1
_SMALL_BYTES = 1024

# Set in ``model.graph.meta`` where the file had external data: a save then keeps the weights outside, even if passes
# have replaced every one of them. (On the graph because ``ir.Model.clone`` does not copy the model's own meta.)
EXTERNAL = "graphopt.files.external"


def load_model(path: str | Path) -> ir.Model:
    """Load and check an ONNX model. Weights in external files are not read, only mapped when touched.

    Nodes are put in topological order where the file has them in another; runtimes take any order, passes do not.

    A file of IR version 3 or older lists its weights among the graph inputs although no caller can set them (ONNX
    Runtime treats them as constants). Such a model becomes IR version 4, in which a weight need not be an input, and
    its weights leave the inputs: otherwise they would look like values that a caller may override. Nothing else
    changes: names, metadata and doc strings are kept.

    Args:
        path: The ``.onnx`` file. External data is looked for in its folder, and only there.

    Raises:
        BadInput: The file is missing, unreadable, no ONNX model, incomplete, or no valid model.
    """
    file = Path(path)
    where = _printable(os.fspath(path))
    folder = Path(os.path.abspath(file)).parent  # as given: a linked .onnx has its data beside the link  # noqa: PTH100
    proto = _parse(_read(file, where), where)
    _declare_passed_on(proto.graph)
    with _quiet(), garbage.paused():
        try:
            model = ir.serde.deserialize_model(proto)
        except Exception as error:
            raise explain(proto, error, where) from None
        external = check_model(model, proto, ExternalFiles(folder, where), where)
        _take_weights_out(model)
    if external:
        model.graph.meta[EXTERNAL] = True
    if model.ir_version < 4:
        kept = [value for value in model.graph.inputs if not value.is_initializer()]
        if len(kept) != len(model.graph.inputs):
            model.graph.inputs.clear()
            model.graph.inputs.extend(kept)
        model.ir_version = 4
    return model


def _declare_passed_on(graph: onnx.GraphProto) -> None:
    """Let an output that is an input itself, in a graph or a body, have the shape that the input is declared with.

    They become one value, and what is said last would count: ONNX Runtime runs no Loop whose body does not say how many
    axes the condition has that it is handed.
    """
    inputs = {value.name: value.type for value in graph.input if value.type.tensor_type.HasField("shape")}
    for value in graph.output:
        if value.name in inputs:
            value.type.CopyFrom(inputs[value.name])
    for node in graph.node:
        if node.domain or node.op_type in graphs.CONTROL_FLOW:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    _declare_passed_on(attribute.g)


def _take_weights_out(model: ir.Model) -> None:
    """Make arrays of the weights in the file, once: a protobuf message copies its bytes whenever they are looked at.

    The message is dropped with the last of them.
    """
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.serde.TensorProtoTensor) or tensor.nbytes <= _SMALL_BYTES:
                continue
            if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
                continue
            value.const_value = ir.Tensor(
                tensor.numpy(),
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )


def _printable(text: str) -> str:
    """Text without line breaks and control characters, so that an error stays one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _read(file: Path, where: str) -> bytes:
    try:
        found = file.stat()
        if stat.S_ISDIR(found.st_mode) and is_bundle(file):
            raise not_one_file(where)
        if stat.S_ISDIR(found.st_mode):
            inside = sorted(entry.name for entry in file.glob("*.onnx"))
            hint = f"give the file, such as {inside[0]}" if inside else "give the .onnx file"
            raise BadInput("is a folder", where=where, hint=hint)
        if not stat.S_ISREG(found.st_mode):
            raise BadInput("is not a file", where=where, hint="give the .onnx file")
        with file.open("rb") as stream:
            head = stream.read(4096)
            if not head:
                raise BadInput("is empty", where=where, hint="export or download the model again")
            if known := recognise(head):
                raise BadInput(f"is {known[0]}, not an ONNX model", where=where, hint=known[1])
            if found.st_size > PROTOBUF_LIMIT:
                raise BadInput(
                    f"has {found.st_size / 1e9:.1f} GB; an ONNX file cannot be over 2 GB",
                    where=where,
                    hint="is it a data file? give the .onnx file",
                )
            return head + stream.read()
    except FileNotFoundError:
        raise BadInput("no such file", where=where, hint="check the path") from None
    except NotADirectoryError:
        raise BadInput("no such file: a part of the path is not a folder", where=where, hint="check the path") from None
    except PermissionError:
        raise BadInput("is not readable", where=where, hint="check its permissions") from None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where, hint="check the path"
        ) from None


def _parse(content: bytes, where: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        # The first field of every ONNX file is the IR version: tag 8, then a small number.
        cut_off = content[:1] == b"\x08"
        raise BadInput(
            "is cut off or damaged" if cut_off else "is not an ONNX model",
            where=where,
            hint="copy or download it again" if cut_off else "give an .onnx file",
        ) from None
    if not proto.ir_version and not proto.HasField("graph"):
        raise BadInput("is not an ONNX model", where=where, hint="give an .onnx file")
    if not proto.ir_version:
        raise BadInput("has no IR version", where=where, hint="export the model again")
    if proto.ir_version > onnx.IR_VERSION:
        raise BadInput(
            f"has IR version {proto.ir_version}; onnx {onnx.__version__} knows up to {onnx.IR_VERSION}",
            where=where,
            hint="upgrade onnx, or export with a lower opset",
        )
    if not proto.HasField("graph"):
        raise BadInput("has no graph", where=where, hint="the file is cut off; copy or download it again")
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx_ir from logging what the checks then say in one line."""
    logger = logging.getLogger("onnx_ir.serde")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
