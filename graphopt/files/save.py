"""Save a model: streamed, deterministic, and all or nothing.

Weights stay where the input had them: inside the ``.onnx``, or in one data file beside it, named by the hash of its
content (``model.<hash>.data``). A save is prepared in a hidden folder beside the target and takes effect when the
``.onnx`` is renamed; killed at any moment it leaves the old model or the new one, and what it had not finished (the
hidden folder; between the two renames of a commit also the new data file) is removed by the next save to the same
target. Large files are not flushed to disk: that is about killed processes and full disks, not about power cuts.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
import onnx_ir as ir
import xxhash
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from graphopt import graphs
from graphopt.errors import BadInput, GraphoptError
from graphopt.files.external import byte_count
from graphopt.files.load import EXTERNAL

# Protobuf messages end at 2 GiB; this leaves room for the graph itself.
EMBED_LIMIT = 1_800_000_000
# Smaller tensors stay in the .onnx: shapes, axes and scalars are what shape inference wants to read there.
INLINE_BYTES = 1024
ALIGNMENT = 64
PAGE = 4096
PAGE_ALIGNED_BYTES = 1 << 20
# What is read is hashed and written while the processor still has it: larger blocks take up to three times as long.
BLOCK = 128 << 10
# A model file up to this size is flushed to disk before it replaces the old one: that costs milliseconds.
SYNC_BYTES = 16 << 20

_STAGING = r"\.[a-z0-9_]{8}\.graphopt-save"
_STAGING_SUFFIX = ".graphopt-save"
_DATA = r"\.[0-9a-f]{32}\.data"


@dataclass(frozen=True)
class _Slot:
    """A place in a model that holds a tensor: what is there, and how to put another there."""

    name: str
    tensor: ir.TensorProtocol
    is_initializer: bool
    get: Callable[[], ir.TensorProtocol | None]
    put: Callable[[ir.TensorProtocol], None]


@dataclass(frozen=True)
class _Written:
    """A data file, and where in it each tensor lies: key of the tensor -> (offset, length)."""

    file: Path
    places: dict[object, tuple[int, int]]


class StagedSave:
    """A model written completely but not yet in place. Made by `stage_model`.

    Use it as a context manager: leaving the block without `commit` discards the save.

    Attributes:
        staged_path: The new ``.onnx``, loadable, in a hidden folder beside the target. `commit` moves it away, so a
            model loaded from here must not be used after that.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._folder = target.parent
        staging = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGING_SUFFIX, dir=self._folder)
        self._staging = Path(staging)
        # The lock lives as long as the process: a later save can tell a leftover from a save that is going on.
        self._lock: int | None = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY)
        _lock(self._lock, wait=False)
        self._data: Path | None = None
        self._moved: list[tuple[_Slot, ir.TensorProtocol]] = []
        self.staged_path = self._staging / target.name

    def __enter__(self) -> StagedSave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def commit(self) -> Path:
        """Put the model in place, atomically, and remove what earlier saves to this target left.

        Tensors of the saved model that lie in a file that this removes are replaced by the same tensors in the new
        file, so the model stays usable after it was saved over its own source. (Tensors that only some other model
        object holds are not found.)

        Returns:
            The target.

        Raises:
            GraphoptError: The target cannot be replaced; it is as it was.
        """
        if self._lock is None:
            raise GraphoptError("this save was committed or discarded already", where=str(self._target))
        with _as_one_line(self._target), _locked(self._folder):
            if self._data is not None:
                self._data.replace(self._folder / self._data.name)
            self.staged_path.replace(self._target)
            stale = self._stale_data()
            self._repoint(stale)
            for file in stale:
                file.unlink(missing_ok=True)
        self.discard()
        return self._target

    def discard(self) -> None:
        """Remove everything staged; after `commit` there is nothing left to remove."""
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def write(self, model: ir.Model) -> None:
        """Write ``model`` into the hidden folder; it is the same model afterwards. Called once, by `stage_model`."""
        if _embeds(model):
            _write_file(self.staged_path, _serialise(model, self._target), self._target)
            return
        slots = list(_slots(model))
        outside = [slot for slot in slots if _goes_outside(slot)]
        written = _write_data(self._staging, outside, self._target) if outside else None
        replaced: list[_Slot] = []
        try:
            for slot in slots:
                new = _saved_form(slot, written, self._staging)
                if new is None:
                    continue
                slot.put(new)
                replaced.append(slot)
                if isinstance(slot.tensor, ir.ExternalTensor):
                    final = _saved_form(slot, written, self._folder)
                    assert final is not None
                    self._moved.append((slot, final))
            content = _serialise(model, self._target)
        finally:
            for slot in replaced:
                slot.put(slot.tensor)
        if written is not None:
            self._data = written.file
        _write_file(self.staged_path, content, self._target)

    def _stale_data(self) -> list[Path]:
        """Data files of earlier saves to this target that no model in the folder refers to."""
        pattern = re.compile(re.escape(_stem(self._target)) + _DATA)
        current = None if self._data is None else self._data.name
        with os.scandir(self._folder) as entries:
            names = sorted(e.name for e in entries if pattern.fullmatch(e.name) and e.name != current)
        if not names:
            return []
        # A copy of the old model under another name needs the old data.
        others = [file for file in self._folder.glob("*.onnx") if file.name != self._target.name]
        return [self._folder / name for name in names if not any(_mentions(file, name) for file in others)]

    def _repoint(self, stale: list[Path]) -> None:
        gone = {os.path.realpath(file) for file in stale}
        if not gone:
            return
        for slot, new in self._moved:
            old = slot.tensor
            if slot.get() is old and isinstance(old, ir.ExternalTensor) and os.path.realpath(old.path) in gone:
                slot.put(new)


def stage_model(model: ir.Model, path: str | Path) -> StagedSave:
    """Write a model beside its target without replacing the target.

    Weights are evaluated (`ir.LazyTensor`) and written one at a time. The same model gives the same bytes.

    Args:
        model: The model; unchanged afterwards.
        path: The target, which may be the file that ``model`` was loaded from.

    Returns:
        The staged save: check ``staged_path``, then ``commit()`` or ``discard()``.

    Raises:
        BadInput: The target cannot be written to at all: no such folder, a folder itself, no permission.
        GraphoptError: Writing failed (disk full, ...), or the model does not fit the format. Nothing is left behind.
    """
    target = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would write through a link, not replace it
    _check_target(target)
    with _as_one_line(target):
        _remove_leftovers(target)
        staged = StagedSave(target)
        try:
            staged.write(model)
        except BaseException:
            staged.discard()
            raise
    return staged


def save_model(model: ir.Model, path: str | Path) -> Path:
    """Save a model, atomically. See `stage_model`, `StagedSave.commit`. Returns the absolute path written."""
    with stage_model(model, path) as staged:
        return staged.commit()


# --- what goes where ---------------------------------------------------------------------------------------------


def _slots(model: ir.Model) -> Iterator[_Slot]:
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield _Slot(
                    value.name or "",
                    value.const_value,
                    True,
                    partial(getattr, value, "const_value"),
                    partial(setattr, value, "const_value"),
                )
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield _attribute_slot(node, attribute, None)
                elif attribute.type is ir.AttributeType.TENSORS and not attribute.is_ref():
                    for index in range(len(attribute.as_tensors())):
                        yield _attribute_slot(node, attribute, index)


def _attribute_slot(node: ir.Node, attribute: ir.Attr, index: int | None) -> _Slot:
    name = attribute.name

    def get() -> ir.TensorProtocol | None:
        found = node.attributes.get(name)
        if found is None or found.type is not attribute.type or found.is_ref():
            return None
        return found.as_tensor() if index is None else found.as_tensors()[index]

    def put(tensor: ir.TensorProtocol) -> None:
        if index is None:
            node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=attribute.doc_string)
        else:
            tensors = list(node.attributes[name].as_tensors())
            tensors[index] = tensor
            node.attributes[name] = ir.AttrTensors(name, tensors, doc_string=attribute.doc_string)

    tensor = get()
    assert tensor is not None
    return _Slot(tensor.name or name, tensor, False, get, put)


def _embeds(model: ir.Model) -> bool:
    """Whether the weights go into the .onnx: as the input had them, as long as they fit."""
    if EXTERNAL in model.graph.meta:
        return False
    total = 0
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            return False
        total += _size(tensor)
    return total <= EMBED_LIMIT


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor in a model, wherever it is."""
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()
                elif attribute.type is ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from attribute.as_tensors()


def _size(tensor: ir.TensorProtocol) -> int:
    """The bytes of a tensor; those of strings do not count, they are never many."""
    if tensor.dtype is ir.DataType.STRING:
        return 0
    if isinstance(tensor, ir.serde.TensorProtoTensor):  # its .nbytes builds a shape object first
        return byte_count(tensor.raw.data_type, math.prod(tensor.raw.dims))
    return tensor.nbytes


def _goes_outside(slot: _Slot) -> bool:
    """Strings cannot be external; constants in attributes are only where they were (runtimes differ about them)."""
    if _size(slot.tensor) < INLINE_BYTES:
        return False
    return slot.is_initializer or isinstance(slot.tensor, ir.ExternalTensor)


def _identity(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors that are the same bytes in the same place: such are written once."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    return id(tensor)


def _saved_form(slot: _Slot, written: _Written | None, folder: Path) -> ir.TensorProtocol | None:
    """The tensor to write for a slot, its data file in ``folder``; None where it is written as it is."""
    tensor = slot.tensor
    if _goes_outside(slot):
        assert written is not None
        offset, length = written.places[_identity(tensor)]
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


# --- writing -----------------------------------------------------------------------------------------------------


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


def _write_data(folder: Path, slots: list[_Slot], target: Path) -> _Written:
    places: dict[object, tuple[int, int]] = {}
    digest = xxhash.xxh3_128()
    unnamed = folder / "data"
    position = 0
    descriptor = _create(unnamed, target)
    try:
        with _Sources() as sources:
            for slot in slots:
                key = _identity(slot.tensor)
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
    file = folder / f"{_stem(target)}.{digest.hexdigest()}.data"
    unnamed.rename(file)
    return _Written(file, places)


def _blocks(slot: _Slot, sources: _Sources) -> Iterator[memoryview]:
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


def _serialise(model: ir.Model, target: Path) -> bytes:
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


def _write_file(path: Path, content: bytes, target: Path) -> None:
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


# --- files and locks ---------------------------------------------------------------------------------------------


def _stem(target: Path) -> str:
    return target.stem if target.suffix == ".onnx" else target.name


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise BadInput("is a folder", where=str(target), hint="give the name of the file to write")
    folder = target.parent
    if not folder.is_dir():
        raise BadInput("no such folder", where=str(folder), hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput("no permission to write here", where=str(folder), hint="write to another folder")


def _remove_leftovers(target: Path) -> None:
    """Remove the hidden folders of saves to this target that were killed."""
    pattern = re.compile(re.escape(f".{target.name}") + _STAGING)
    with os.scandir(target.parent) as entries:
        found = [e.path for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # another save removed it, or it belongs to someone else
        try:
            if _lock(descriptor, wait=False):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Take the lock of a folder; False where someone else has it or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one save at a time commits in a folder: one must not take another's new data for stale."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _mentions(file: Path, name: str) -> bool:
    """Whether a file holds a name anywhere; True where it cannot be read."""
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return False
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(name.encode()) >= 0
    except (OSError, ValueError):
        return True


@contextmanager
def _as_one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise GraphoptError(
            f"cannot be written: {error.strerror or error}",
            where=str(target),
            hint="free some space; what was there is as it was" if full else "what was there is as it was",
        ) from error
