"""The user's own inputs: an ``.npz`` of samples, or a folder with one ``.npz`` for each feed.

Feeds are read when they are asked for, so that memory does not grow with their number.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import onnx_ir as ir

from graphopt.errors import BadInput, GraphoptError
from graphopt.feeds import Feeds

Array = np.ndarray[Any, Any]


class Sample(dict[str, Any]):
    """A feed of the user's.

    Attributes:
        where: The file that it was read from, and which of its samples it is, counted from 0.
    """

    def __init__(self, arrays: Mapping[str, Any], where: str) -> None:
        super().__init__(arrays)
        self.where = where


@contextmanager
def failing_on(feeds: Mapping[str, Any]) -> Iterator[None]:
    """Say of a run that fails which of the user's samples it failed on; of made-up feeds nothing is added.

    Raises:
        BadInput: The block failed on a `Sample`.
    """
    try:
        yield
    except GraphoptError as error:
        if not isinstance(feeds, Sample):
            raise
        raise BadInput(f"the network does not run on it: {error}", where=feeds.where) from error


class CalibrationData(Sequence[Feeds]):
    """Feeds that are read one at a time. Reading one can raise BadInput."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feeds]: ...
    def __getitem__(self, index: int | slice) -> Feeds | list[Feeds]:
        if isinstance(index, slice):
            return [self._read(position) for position in range(*index.indices(self._count))]
        position = index + self._count if index < 0 else index
        if not 0 <= position < self._count:
            raise IndexError(index)
        return self._read(position)

    def _read(self, position: int) -> Feeds:
        raise NotImplementedError


def read_calibration(path: Path, inputs: Sequence[ir.Value]) -> CalibrationData:
    """Read calibration data.

    Args:
        path: An ``.npz`` with one array an input, whose first axis counts the samples, or a folder of ``.npz``
            files, each one feed, in the order of their names. In the single file, an array of the input's rank
            holds samples along the batch axis (each becomes a batch of 1); one axis more, and each sample is a
            whole input.
        inputs: The model's inputs.

    Returns:
        A sequence of feeds, read one at a time. Headers (names, dtypes, shapes) are checked here, all of them.

    Raises:
        BadInput: The path, an array's name, dtype or shape does not fit, or there are no samples.
    """
    wanted = {value.name or "": value for value in inputs if not value.is_initializer()}
    if path.is_dir():
        files = sorted(path.glob("*.npz"), key=lambda file: file.name)
        if not files:
            raise BadInput("the folder holds no .npz file", where=str(path), hint="one .npz a feed")
        return _Folder(files, wanted)
    if not path.exists():
        raise BadInput("no such file", where=str(path), hint="an .npz file, or a folder of them")
    return _Samples(path, wanted)


class _Folder(CalibrationData):
    """One file, one feed."""

    def __init__(self, files: Sequence[Path], wanted: dict[str, ir.Value]) -> None:
        super().__init__(len(files))
        self._files = files
        self._wanted = wanted
        for file in files:
            headers = _headers(file)
            _check_names(headers, wanted, file)
            for name, (shape, dtype) in headers.items():
                _check_array(wanted[name], shape, dtype, file)

    def _read(self, position: int) -> Feeds:
        file = self._files[position]
        with _open(file) as archive:
            return Sample({name: _as_declared(archive[name], self._wanted[name]) for name in archive.files}, str(file))


class _Samples(CalibrationData):
    """One file; the first axis of every array counts the samples."""

    def __init__(self, path: Path, wanted: dict[str, ir.Value]) -> None:
        headers = _headers(path)
        _check_names(headers, wanted, path)
        self._path = path
        self._wanted = wanted
        self._keep_axis: dict[str, bool] = {}
        counts: dict[str, int] = {}
        for name, (shape, dtype) in headers.items():
            where = f"{path}: input '{name}'"
            if not shape:
                raise BadInput("a single number holds no samples", where=where, hint="first axis: the samples")
            declared = wanted[name].shape
            self._keep_axis[name] = declared is not None and len(declared) == len(shape) and len(shape) > 0
            counts[name] = shape[0]
            _check_array(wanted[name], (1, *shape[1:]) if self._keep_axis[name] else shape[1:], dtype, path)
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            raise BadInput(f"the inputs differ in their number of samples: {listed}", where=str(path))
        count = next(iter(counts.values()), 0)
        if count == 0:
            raise BadInput("no samples", where=str(path))
        super().__init__(count)
        self._names = list(headers)

    def _read(self, position: int) -> Feeds:
        feeds: Feeds = {}
        with zipfile.ZipFile(self._path) as archive:
            for name in self._names:
                with archive.open(f"{name}.npy") as member:
                    sample = _row(member, position)
                sample = _as_declared(sample, self._wanted[name])
                feeds[name] = sample[None] if self._keep_axis[name] else sample
        return Sample(feeds, f"{self._path}, sample {position}")


def _row(member: IO[bytes], position: int) -> Array:
    """Row ``position`` of the array in an ``.npy`` stream, holding no more than that row in memory."""
    shape, fortran, dtype = _header(member)
    if fortran:  # rows are not contiguous: there is no way around reading it all
        whole = np.frombuffer(member.read(), dtype=dtype).reshape(shape, order="F")
        return np.ascontiguousarray(whole[position])
    size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    member.seek(member.tell() + position * size)
    return np.frombuffer(member.read(size), dtype=dtype).reshape(shape[1:]).copy()


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """The shape and dtype of every array in an ``.npz``; no data is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as member:
                    shape, _, dtype = _header(member)
                if dtype.hasobject:
                    raise BadInput("object arrays are not read", where=f"{path}: '{name.removesuffix('.npy')}'")
                found[name.removesuffix(".npy")] = (shape, dtype)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise BadInput("not an .npz file", where=str(path), hint="write it with numpy.savez") from error
    if not found:
        raise BadInput("no arrays", where=str(path))
    return found


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        opened = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise BadInput("not an .npz file", where=str(path)) from error
    assert isinstance(opened, np.lib.npyio.NpzFile)  # its headers were read as a zip archive's
    return opened


def _check_names(given: dict[str, Any], wanted: dict[str, ir.Value], path: Path) -> None:
    for name in given:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"inputs: {', '.join(wanted)}"
            raise BadInput(f"array '{name}' is not an input of the model", where=str(path), hint=hint)
    for name in wanted:
        if name not in given:
            raise BadInput(
                f"there is no array for input '{name}'", where=str(path), hint=f"it holds {', '.join(given)}"
            )


def _check_array(value: ir.Value, shape: tuple[int, ...], dtype: np.dtype[Any], path: Path) -> None:
    where = f"{path}: input '{value.name}'"
    wanted = None if value.dtype is None else value.dtype.numpy()
    strings = wanted is not None and wanted.kind == "O" and dtype.kind in "US"
    # numpy writes the dtypes it has no name for (bfloat16, float8) as nameless bytes.
    nameless = wanted is not None and dtype.kind == "V" and dtype.itemsize == wanted.itemsize
    if wanted is not None and wanted != dtype and not strings and not nameless:
        raise BadInput(f"the dtype is {dtype}, the model takes {wanted}", where=where)
    if value.shape is None:
        return
    sizes = [int(size) if isinstance(size, (int, np.integer)) else None for size in value.shape]
    fits = len(sizes) == len(shape) and all(
        size is None or size < 0 or size == got for size, got in zip(sizes, shape, strict=True)
    )
    if not fits:
        raise BadInput(f"a sample has shape {_text(shape)}, the model takes {_text(value.shape)}", where=where)


def _as_declared(array: Array, value: ir.Value) -> Array:
    """The array with the dtype that the model declares, where numpy could not write that down."""
    if value.dtype is None:
        return array
    wanted = value.dtype.numpy()
    if wanted.kind == "O":
        return array.astype(object)
    return array.view(wanted) if array.dtype.kind == "V" and array.dtype != wanted else array


def _text(shape: Any) -> str:
    sizes = (
        str(size) if isinstance(size, (int, np.integer)) else str(getattr(size, "value", None) or "?") for size in shape
    )
    return f"[{', '.join(sizes)}]"
