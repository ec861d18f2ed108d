"""External data: where a tensor's bytes lie, checked without reading them."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from graphopt.errors import BadInput

_AGAIN = "export the model again"

BITWIDTH: dict[int, int] = {
    kind.value: kind.bitwidth for kind in ir.DataType if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING)
}


def byte_count(dtype: int, elements: int) -> int:
    """The bytes that ``elements`` numbers of an ONNX data type take, sub-byte types packed.

    Raises:
        KeyError: The type has no fixed size (strings) or does not exist.
    """
    return (BITWIDTH[dtype] * elements + 7) // 8


def external_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """For each data file of a model, by its location, how many bytes it must have at least.

    Raises:
        KeyError, ValueError: A tensor does not say what it takes of its file.
    """
    sizes: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            told = {entry.key: entry.value for entry in tensor.external_data}
            length = int(told["length"]) if "length" in told else byte_count(tensor.data_type, math.prod(tensor.dims))
            end = int(told.get("offset", 0)) + length
            sizes[told["location"]] = max(end, sizes.get(told["location"], 0))
    return sizes


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _tensors(body)


class ExternalFiles:
    """Ties external tensors of one model to its folder and checks them; each data file is looked up once.

    Args:
        folder: The folder of the model, absolute. No data may lie outside.
        where: How error messages call the model file.
    """

    def __init__(self, folder: Path, where: str) -> None:
        self._folder = folder
        self._real_folder = Path(os.path.realpath(folder))
        self._where = where
        self._sizes: dict[str, int] = {}

    def adopt(self, tensor: ir.ExternalTensor) -> None:
        """Tell a tensor its folder and check that its bytes are there: containment, presence, offset, length.

        Raises:
            BadInput: They are not, or lie outside the model's folder.
        """
        tensor.base_dir = self._folder
        location = os.fspath(tensor.location)
        where = f"{self._where}: tensor {tensor.name!r}"
        size = self._sizes.get(location)
        if size is None:
            size = self._sizes[location] = self._look_up(location, where)
        if tensor.dtype.value not in BITWIDTH:
            raise BadInput(f"{tensor.dtype.name} tensors cannot be stored as external data", where=where, hint=_AGAIN)
        needed = tensor.nbytes
        offset = tensor.offset or 0
        length = needed if tensor.length is None else tensor.length
        if length != needed:
            raise BadInput(
                f"its external data has {length} bytes, but {tensor.dtype.name}{list(tensor.shape.numpy())}"
                f" takes {needed}",
                where=where,
                hint=_AGAIN,
            )
        if offset + length > size:
            raise BadInput(
                f"needs bytes {offset} to {offset + length} of {location!r}, which has {size}",
                where=where,
                hint="the data file is incomplete; copy or download it again",
            )

    def _look_up(self, location: str, where: str) -> int:
        if not location:
            raise BadInput("external data without a location", where=where, hint=_AGAIN)
        if "\0" in location or Path(location).is_absolute():
            raise BadInput(
                f"external data at {location!r}, not relative to the model's folder",
                where=where,
                hint="only files in the model's folder are read",
            )
        lexical = Path(os.path.normpath(self._folder / location))
        if not lexical.is_relative_to(self._folder):
            raise BadInput(
                f"external data at {location!r} is outside the model's folder",
                where=where,
                hint="only files in the model's folder are read",
            )
        real = Path(os.path.realpath(self._folder / location))
        if not real.is_relative_to(self._real_folder):
            raise BadInput(
                f"external data at {location!r} is a link to a file outside the model's folder",
                where=where,
                hint="copy the model and its data into one folder: cp -L",
            )
        try:
            found = real.stat()
        except FileNotFoundError:
            raise BadInput(
                f"external data file {location!r} is missing",
                where=where,
                hint="put it into the folder of the .onnx file",
            ) from None
        except OSError as error:
            raise BadInput(f"external data file {location!r}: {error.strerror}", where=where, hint=_AGAIN) from None
        if not stat.S_ISREG(found.st_mode):
            raise BadInput(f"external data {location!r} is not a file", where=where, hint=_AGAIN)
        if found.st_nlink > 1:
            # onnx and onnx_ir refuse such files when the weights are read; better now than half-way.
            raise BadInput(
                f"external data file {location!r} has {found.st_nlink} hard links, one may lie elsewhere",
                where=where,
                hint="make it a copy of its own: cp FILE NEW && mv NEW FILE",
            )
        if not os.access(real, os.R_OK):
            raise BadInput(f"external data file {location!r} is not readable", where=where, hint="chmod u+r")
        return found.st_size
