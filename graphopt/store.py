"""Results of long computations on weights: kept in memory while they are few, on disk when there are more.

A store in a folder of the user's outlives the run: a run that was interrupted goes on where it was. A result is found
again by the digest of everything it was computed from.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import xxhash

from graphopt import weights
from graphopt.errors import BadInput, GraphoptError
from graphopt.numerics.blas import single_threaded_blas

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

_IN_MEMORY = 64 << 20
_VERSION = "1"  # of what the computations give: another one makes old results unfindable
_USER_DEFINED = 2  # numpy's mark of a dtype that a library adds: its files cannot name those of ml_dtypes
_CODES = {1: np.uint8, 2: np.uint16}


class Store:
    """Results by key.

    Args:
        folder: Where to keep them for a later run; None keeps them for this one, on disk too where they are large.
        limit: Bytes of results held in memory.

    Raises:
        BadInput: The folder cannot be made.

    Its methods raise GraphoptError where a result cannot be written to the folder.
    """

    def __init__(self, folder: Path | None = None, *, limit: int = _IN_MEMORY) -> None:
        self._folder = folder
        self._limit = limit
        self._held: OrderedDict[str, Arrays] = OrderedDict()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(
                    f"cannot make the folder: {error.strerror}", where=str(folder), hint="--work takes a folder"
                ) from error

    def arrays(self, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """The result under a key: remembered, or computed now."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        path = None if self._folder is None else self._folder / f"{key}.npz"
        found = None if path is None else _load(path)
        if found is None:
            with _one_thread():
                found = compute()
            if path is not None:
                _save(path, found)
        self._hold(key, found)
        return found

    def has(self, key: str) -> bool:
        """Whether there is a result under a key."""
        return key in self._held or (self._folder is not None and _load(self._folder / f"{key}.npz") is not None)

    def tensor(
        self, key: str, name: str, compute: Callable[[], Arrays], dtype: ir.DataType, shape: Iterable[int]
    ) -> ir.TensorProtocol:
        """One array of a result as a weight, which is fetched each time that it is read."""
        return weights.computed(lambda: ir.tensor(self.arrays(key, compute)[name]), dtype, list(shape))

    def _hold(self, key: str, arrays: Arrays) -> None:
        self._held[key] = arrays
        total = sum(_bytes(held) for held in self._held.values())
        while total > self._limit and len(self._held) > 1:
            oldest, dropped = self._held.popitem(last=False)
            total -= _bytes(dropped)
            if self._folder is None:
                self._folder = _temporary(self)
            path = self._folder / f"{oldest}.npz"
            if not path.exists():
                _save(path, dropped)


def digest(*parts: object) -> str:
    """A key for what follows from some tensors, arrays and settings alone; tensors are read, one at a time.

    Parts are numbers, strings, enums, None, arrays, tensors, and tuples and lists of such.

    Raises:
        GraphoptError: A data file cannot be read.
    """
    total = xxhash.xxh3_128(_VERSION.encode())
    _add(total, parts)
    return total.hexdigest()


def _add(total: xxhash.xxh3_128, parts: Sequence[object]) -> None:
    """Each part with its kind and size before it, so that no two lists of parts run together to the same bytes."""
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"array {part.dtype} {part.shape}:".encode())
            total.update(_raw(part))
        elif isinstance(part, ir.TensorProtocol):
            total.update(f"tensor {part.dtype.name} {tuple(part.shape.numpy())}:".encode())
            total.update(_raw(weights.read(part)))
        elif isinstance(part, (tuple, list)):
            total.update(f"list {len(part)}:".encode())
            _add(total, part)
        else:
            text = repr(part).encode()
            total.update(f"{len(text)}:".encode() + text)


def _raw(array: Array) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _one_thread() -> AbstractContextManager[None]:
    """One thread for matrix products: the result then is the same on any number of cores.

    It costs little. Most of these products are narrow, and threads that wait for a core that something else is using
    take ten times as long over them as one thread.
    """
    import scipy.linalg  # noqa: F401 - it has a BLAS of its own, and only what is loaded can be told

    return single_threaded_blas()


def _temporary(owner: Store) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    weakref.finalize(owner, folder.cleanup)
    return Path(folder.name)


def _save(path: Path, arrays: Arrays) -> None:
    """Write a result under another name first: who finds the file finds all of it, whoever else is writing it."""
    named = {f"{n}|{a.dtype.name}" if _is_foreign(a) else n: _bits(a) for n, a in arrays.items()}
    partial: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            np.savez(file, **named)  # type: ignore[arg-type]
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise GraphoptError(f"cannot keep a result: {error.strerror}", where=str(path)) from error


def _is_foreign(array: Array) -> bool:
    return array.dtype.isbuiltin == _USER_DEFINED


def _bits(array: Array) -> Array:
    return array.view(_CODES[array.dtype.itemsize]) if _is_foreign(array) else array


def _load(path: Path) -> Arrays | None:
    """What a file holds; None where there is none, or one that is damaged."""
    damaged = (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), np.load(path, allow_pickle=False) as archive:
        found = {}
        for name in archive.files:
            plain, _, dtype = name.partition("|")
            found[plain] = archive[name].view(getattr(ml_dtypes, dtype)) if dtype else archive[name]
        return found
    return None
