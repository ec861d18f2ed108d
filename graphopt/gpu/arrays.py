"""Arrays on a GPU, and DLPack both ways: tensors of torch, CuPy or JAX in and out without a copy."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput
from graphopt.gpu.context import Context
from graphopt.gpu.library import LEGACY_STREAM
from graphopt.gpu.memory import Memory
from graphopt.gpu.streams import Stream

Array = npt.NDArray[Any]

CUDA = 2  # DLPack's number of the device kind
_MANAGED = 13
_USED, _FRESH = b"used_dltensor", b"dltensor"


class _DLDevice(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_python = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _python)
)
_get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _python))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
# In a destructor the capsule is dying already: no reference to it may be taken.
_dying_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_dying_get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))

# (code, bits) of DLPack <-> numpy
_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    **{(0, bits): np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{(1, bits): np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{(2, bits): np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (6, 8): np.dtype(np.bool_),
    (10, 8): np.dtype(ml_dtypes.float8_e4m3fn),
    (12, 8): np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# What was given away, by the address of its description, until whoever took it lets go.
_given: dict[int, tuple[Any, ...]] = {}


def _forget(address: int) -> None:
    _given.pop(address, None)


def _forget_untaken(capsule: int) -> None:
    if _dying_is_valid(capsule, _FRESH):  # nobody took what is in it
        _forget(_dying_get(capsule, _FRESH))


_let_go = _DELETER(_forget)
_capsule_dies = _DESTRUCTOR(_forget_untaken)


class DeviceArray:
    """An array on a GPU: C order, whole.

    Attributes:
        context: Where it is.
        memory: What it lies in; None where it is somebody else's.
        pointer: Its address.
        shape: In elements.
        dtype: A numpy dtype (``ml_dtypes`` for those that numpy lacks).
        stream: What writes it; it is ready once that has been waited for. None where it is ready.
        takers: Streams that it was handed to; until they are done, its memory may not be written.
    """

    def __init__(
        self,
        context: Context,
        pointer: int,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        *,
        owner: object = None,
        stream: Stream | None = None,
    ) -> None:
        self.context = context
        self.pointer = pointer
        self.shape = tuple(int(size) for size in shape)
        self.dtype = np.dtype(dtype)
        self.stream = stream
        self._owner = owner
        self.takers: set[int] = set()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> Array:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        if self.stream is not None:
            self.stream.synchronize()
        if self.nbytes:
            self.context.make_current()
            self.context.library.call("cuMemcpyDtoH_v2", array.ctypes.data, self.pointer, self.nbytes)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array on a GPU becomes a numpy array by a copy only")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype.name}, device='{self.context.device.name}')"

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.context.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Hand the array over without a copy. ``stream`` (the taker's) is made to wait for what writes the array.

        Raises:
            BufferError: Another device or a copy is wanted, or DLPack has no such dtype.
        """
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on GPU {self.context.device.index}")
        if copy:
            raise BufferError("a copy is not made; take the array as it is")
        if self.dtype not in _CODES:
            raise BufferError(f"DLPack has no {self.dtype.name}")
        self._ready_for(stream)
        code, bits = _CODES[self.dtype]
        rank = len(self.shape)
        shape = (ctypes.c_int64 * max(rank, 1))(*self.shape)
        strides = (ctypes.c_int64 * max(rank, 1))(*_c_strides(self.shape))
        managed = _DLManagedTensor()
        managed.tensor.data = self.pointer
        managed.tensor.device = _DLDevice(*self.__dlpack_device__())
        managed.tensor.ndim = rank
        managed.tensor.dtype = _DLDataType(code, bits, 1)
        managed.tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        managed.tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
        managed.deleter = ctypes.cast(_let_go, ctypes.c_void_p)
        address = ctypes.addressof(managed)
        _given[address] = (managed, shape, strides, self)
        return _new(address, _FRESH, ctypes.cast(_capsule_dies, ctypes.c_void_p))

    def _ready_for(self, stream: int | None) -> None:
        if stream == -1:  # the taker sees to it
            return
        # DLPack: without a stream the default one is meant; 0 would not say which.
        taker = stream or LEGACY_STREAM
        if self.stream is not None and taker != self.stream.handle:
            self.stream.hold_back(taker)
        self.takers.add(taker)


def upload(context: Context, array: Array) -> DeviceArray:
    """A copy of an array on the device; numpy's rules for what is C order."""
    memory = context.upload(array)
    return DeviceArray(context, memory.pointer, array.shape, array.dtype, owner=memory)


def allocate(context: Context, shape: Sequence[int], dtype: npt.DTypeLike, stream: Stream | None = None) -> DeviceArray:
    """An array on the device, with nothing in it yet; written in the order of ``stream`` where one is given."""
    kind = np.dtype(dtype)
    memory: Memory = context.allocate(math.prod(shape) * kind.itemsize, stream)
    return DeviceArray(context, memory.pointer, shape, kind, owner=memory, stream=stream)


def is_on_gpu(value: object) -> bool:
    """Whether something is an array of this or another library that lies on a GPU."""
    if isinstance(value, DeviceArray):
        return True
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    return int(value.__dlpack_device__()[0]) in (CUDA, _MANAGED)


class _Taken:
    """Another library's tensor, held until this goes."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __del__(self) -> None:
        managed = _DLManagedTensor.from_address(self.address)
        if managed.deleter:
            _DELETER(managed.deleter)(self.address)


def take(context: Context, value: Any, stream: Stream, where: str = "array") -> DeviceArray:
    """Another library's GPU array as ours, without a copy; ``stream`` is made to wait for what writes it.

    Raises:
        BadInput: It lies on another GPU, is not in C order, or has a dtype without a name in numpy.
    """
    if isinstance(value, DeviceArray):
        if value.stream is not None and value.stream.handle != stream.handle:
            value._ready_for(stream.handle)
        return value
    kind, index = (int(part) for part in value.__dlpack_device__())
    if kind == CUDA and index != context.device.index:
        raise BadInput(f"it is on GPU {index}, and the engine on GPU {context.device.index}", where=where)
    try:
        capsule = value.__dlpack__(stream=stream.handle)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"its library does not hand it over: {error}", where=where) from error
    if not _is_valid(capsule, _FRESH):
        raise BadInput("its library hands it over as no DLPack tensor that is known here", where=where)
    address = int(_get(capsule, _FRESH))
    _set_name(capsule, _USED)
    taken = _Taken(address)
    tensor = _DLManagedTensor.from_address(address).tensor
    code = (int(tensor.dtype.code), int(tensor.dtype.bits))
    if code not in _DTYPES or tensor.dtype.lanes != 1:
        raise BadInput(f"its dtype (DLPack {code[0]}, {code[1]} bits) is not known here", where=where)
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = [tensor.strides[axis] for axis in range(tensor.ndim)]
        expected = _c_strides(shape)
        if 0 not in shape and any(
            size > 1 and one != other for size, one, other in zip(shape, strides, expected, strict=True)
        ):
            raise BadInput("it is not in C order", where=where, hint="call .contiguous() on it first")
    pointer = (tensor.data or 0) + int(tensor.byte_offset)
    return DeviceArray(context, pointer, shape, _DTYPES[code], owner=taken)


def _c_strides(shape: Sequence[int]) -> list[int]:
    """In elements."""
    return list(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else []
