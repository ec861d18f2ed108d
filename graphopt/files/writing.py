"""Writes the bytes of a model: weights block by block into one data file, the graph into the ``.onnx``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import xxhash
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from graphopt.errors import GraphoptError
from graphopt.files.folder import data_stem
from graphopt.files.placement import Slot, goes_outside, storage_key

ALIGNMENT = 64
PAGE = 4096
PAGE_ALIGNED_BYTES = 1 << 20
# What is read is hashed and written while the processor still has it: larger blocks take up to three times as long.
BLOCK = 128 << 10
# A model file up to this size is flushed to disk before it replaces the old one: that costs milliseconds.
SYNC_BYTES = 16 << 20


@dataclass(frozen=True)
class Written:
    """A data file, and where in it each tensor lies: key of the tensor -> (offset, length)."""

    file: Path
    places: dict[object, tuple[int, int]]


def saved_form(slot: Slot, written: Written | None, folder: Path) -> ir.TensorProtocol | None:
    """The tensor to write for a slot, its data file in ``folder``; None where it is written as it is."""
    tensor = slot.tensor
    if goes_outside(slot):
        assert written is not None
        offset, length = written.places[storage_key(tensor)]
        return ir.ExternalTensor(
            written.file.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=slot.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=folder,
        )
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    proto = onnx.TensorProto(name=slot.name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    for key, value in tensor.metadata_props.items():
        proto.metadata_props.add(key=key, value=value)
    with _Sources() as sources:
        proto.raw_data = b"".join(bytes(block) for block in sources.blocks(tensor))
    return ir.serde.TensorProtoTensor(proto)


class _Sources:
    """Reads external tensors block by block into one buffer, without mapping them: the pages read stay out of RSS."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._buffer = memoryview(bytearray())
        self._stack = ExitStack()

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def blocks(self, tensor: ir.ExternalTensor) -> Iterator[memoryview]:
        """The bytes of a tensor. Each block is gone when the next is asked for."""
        remaining, position = tensor.nbytes, tensor.offset or 0
        if len(self._buffer) < min(remaining, BLOCK):
            self._buffer = memoryview(bytearray(min(remaining, BLOCK)))
        while remaining:
            count = os.preadv(self._open(tensor), [self._buffer[: min(remaining, BLOCK)]], position)
            if count == 0:
                raise GraphoptError(
                    "the data file ends early", where=f"{tensor.path}: tensor {tensor.name!r}", hint="was it replaced?"
                )
            yield self._buffer[:count]
            remaining -= count
            position += count

    def _open(self, tensor: ir.ExternalTensor) -> int:
        path = tensor.path
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                where = f"{path}: tensor {tensor.name!r}"
                raise GraphoptError(f"the weights cannot be read: {error.strerror}", where=where) from None
            self._stack.callback(os.close, self._files[path])
        return self._files[path]


def write_data(folder: Path, slots: list[Slot], target: Path) -> Written:
    """Write the tensors of ``slots`` into one data file in ``folder``, named by the hash of its content.

    Raises:
        GraphoptError: A tensor cannot be read, or does not give the bytes that its type and shape take.
    """
    places: dict[object, tuple[int, int]] = {}
    digest = xxhash.xxh3_128()
    unnamed = folder / "data"
    position = 0
    descriptor = _create(unnamed, target)
    try:
        with _Sources() as sources:
            for slot in slots:
                key = storage_key(slot.tensor)
                if key in places:
                    continue
                length = slot.tensor.nbytes
                step = PAGE if length >= PAGE_ALIGNED_BYTES else ALIGNMENT
                if padding := -position % step:
                    zeros = bytes(padding)
                    digest.update(zeros)
                    _write_all(descriptor, memoryview(zeros))
                    position += padding
                count = 0
                for block in _blocks(slot, sources):
                    digest.update(block)
                    _write_all(descriptor, block)
                    count += len(block)
                if count != length:
                    raise GraphoptError(
                        f"gives {count} bytes, but its type and shape take {length}", where=f"tensor {slot.name!r}"
                    )
                places[key] = (position, length)
                position += length
    finally:
        os.close(descriptor)
    file = folder / f"{data_stem(target)}.{digest.hexdigest()}.data"
    unnamed.rename(file)
    return Written(file, places)


def _blocks(slot: Slot, sources: _Sources) -> Iterator[memoryview]:
    tensor = slot.tensor
    if isinstance(tensor, ir.ExternalTensor):
        yield from sources.blocks(tensor)
        return
    whole = _view(tensor)
    for start in range(0, len(whole), BLOCK):
        yield whole[start : start + BLOCK]


def _view(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor as the format wants them, without a copy where memory has them that way already.

    Evaluates a lazy tensor once.
    """
    if tensor.dtype.bitwidth < 8 or isinstance(tensor, ir.serde.TensorProtoTensor):
        return memoryview(tensor.tobytes())
    array = tensor.numpy()
    if array.dtype.byteorder == ">" or array.dtype.itemsize * 8 != tensor.dtype.bitwidth:
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def serialise(model: ir.Model, target: Path) -> bytes:
    """The content of the ``.onnx`` file.

    Raises:
        GraphoptError: The model does not fit the format.
    """
    try:
        content: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        return content
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, (GraphoptError, OSError)):
            raise cause from None
        first = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        large = isinstance(cause, EncodeError)
        raise GraphoptError(
            "more than the 2 GB that an .onnx file can hold" if large else f"cannot be written as ONNX: {first}",
            where=str(target),
            hint="large constants in node attributes belong in initializers" if large else None,
        ) from error


def write_file(path: Path, content: bytes, target: Path) -> None:
    """Write the ``.onnx`` file, with the permissions of ``target``; flushed to disk where that is quick."""
    descriptor = _create(path, target)
    try:
        _write_all(descriptor, memoryview(content))
        if len(content) <= SYNC_BYTES:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path, target: Path) -> int:
    """Create a file with the permissions of the one that it is to replace."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]
