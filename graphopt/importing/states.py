"""A state dict in a file or a folder: what it holds, and one tensor at a time."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput, MissingDependency, install_hint

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# A checkpoint of a training run keeps the state dict under one of these.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_NARROW = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NUMPY = {
    **dict(zip(("F64", "F32", "F16", "BOOL"), ("<f8", "<f4", "<f2", "?"), strict=True)),
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
}


class State(ABC):
    """Tensors by name. Shapes are known without reading; ``read`` reads one tensor, and keeps none.

    Attributes:
        path: The file or folder, as given.
        folder: Where files that describe it lie.
    """

    path: Path
    folder: Path

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The name of each tensor, with its shape."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that ``read`` would give."""

    @abstractmethod
    def read(self, name: str) -> Array:
        """A tensor as an array of its own dtype (bfloat16 as ``ml_dtypes`` has it)."""


def open_state(path: str | Path) -> State:
    """Open a state dict.

    Args:
        path: A ``.safetensors`` file, a torch file (``.pt``, ``.pth``, ``.bin``), or a folder that holds shards of
            either.

    Raises:
        BadInput: There is none, it is damaged, or it holds more than tensors.
        MissingDependency: It is a torch file and torch is not installed.
    """
    given = Path(path)
    if given.is_dir():
        files = sorted(given.glob("*.safetensors")) or sorted(
            file for suffix in _TORCH_SUFFIXES for file in given.glob(f"*{suffix}")
        )
        if not files:
            raise BadInput("holds no .safetensors, .pt or .bin file", where=str(given), hint="give the file itself")
        return _Shards(given, [_open_file(file) for file in files])
    if not given.exists():
        raise BadInput("no such file", where=str(given), hint="check the path")
    return _open_file(given)


def _open_file(path: Path) -> State:
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _TorchFile(path)
    raise BadInput(
        f"is no state dict by its name ({path.suffix or 'no suffix'})",
        where=str(path),
        hint="give a .safetensors file, or a .pt or .bin file written by torch.save(model.state_dict(), ...)",
    )


class _Safetensors(State):
    """The format is a header of JSON and the bytes; read without torch, so that bfloat16 is no exception."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                size = path.stat().st_size
                if length > size - 8:
                    raise ValueError("the header is longer than the file")
                header = json.loads(stream.read(length))
                self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
                self._start = 8 + length
                self._shapes = {name: _shape(entry, size - self._start) for name, entry in self._entries.items()}
        except OSError as error:
            raise BadInput(f"cannot be read: {error.strerror}", where=str(path)) from error
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise BadInput("is no safetensors file, or cut off", where=str(path), hint="download it again") from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> np.dtype[Any]:
        dtype = _dtype(self._entries[name]["dtype"])
        if dtype is None:
            told = self._entries[name]["dtype"]
            raise BadInput(f"has the dtype {told}, which is not known", where=f"{self.path}: {name}")
        return dtype

    def read(self, name: str) -> Array:
        dtype = self.dtype(name)
        begin, end = self._entries[name]["data_offsets"]
        count = (end - begin) // dtype.itemsize
        values = np.fromfile(self.path, dtype, count=count, offset=self._start + begin)
        return values.reshape(self._shapes[name])


def _shape(entry: Any, available: int) -> tuple[int, ...]:
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= available or any(size < 0 for size in shape):
        raise ValueError("a tensor lies outside of the file")
    dtype = _dtype(entry["dtype"])
    if dtype is not None and int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != end - begin:
        raise ValueError("a tensor has another size than its shape says")
    return shape


def _dtype(name: str) -> np.dtype[Any] | None:
    if name in _NARROW:
        import ml_dtypes

        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _NARROW[name]))
        return narrow
    return np.dtype(_NUMPY[name]) if name in _NUMPY else None


class _TorchFile(State):
    """What torch.save wrote, loaded as tensors only: no code of the file is run."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        try:
            import torch
        except ImportError as error:
            raise MissingDependency(
                "a torch file needs torch",
                where=str(path),
                hint=f"{install_hint('export')}, or save it as .safetensors",
            ) from error
        import pickle

        try:
            found = self._load(torch)
        except pickle.UnpicklingError as error:
            raise BadInput(
                "holds more than tensors, and its code is not run",
                where=str(path),
                hint="save the state dict alone: torch.save(model.state_dict(), ...)",
            ) from error
        except Exception as error:  # of damaged bytes torch's reader raises anything, IndexError and KeyError too
            raise BadInput(
                "torch cannot read it", where=str(path), hint="is it cut off? save or copy it again"
            ) from error
        for wrapper in _WRAPPERS:
            if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
                found = found[wrapper]
        if not isinstance(found, dict):
            raise BadInput(
                f"holds a {type(found).__name__}, not a state dict",
                where=str(path),
                hint="save it with torch.save(model.state_dict(), ...)",
            )
        self._tensors: dict[str, torch.Tensor] = {
            str(name): tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)
        }

    def _load(self, torch: Any) -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that it then refuses
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of before torch 1.6 cannot be mapped
                return torch.load(self.path, map_location="cpu", weights_only=True)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._numpy(self._tensors[name].detach()[:0] if self._tensors[name].ndim else self._tensors[name]).dtype

    def read(self, name: str) -> Array:
        return np.array(self._numpy(self._tensors[name].detach()))

    @staticmethod
    def _numpy(tensor: Any) -> Array:
        import torch

        if tensor.dtype is torch.bfloat16:
            import ml_dtypes

            return np.asarray(tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(tensor.numpy())


class _Shards(State):
    """Several files as one."""

    def __init__(self, folder: Path, parts: list[State]) -> None:
        self.path = self.folder = folder
        self._owner: dict[str, State] = {}
        for part in parts:
            for name in part.shapes:
                if name in self._owner:
                    raise BadInput(
                        f"{self._owner[name].path.name} and {part.path.name} both hold {name}",
                        where=str(folder),
                        hint="give the file to import, not the folder",
                    )
                self._owner[name] = part
        self._shapes = {name: shape for part in parts for name, shape in part.shapes.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._owner[name].dtype(name)

    def read(self, name: str) -> Array:
        return self._owner[name].read(name)
