"""Memory of a GPU, and host memory that copies to and from it without a stop on the way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphopt.gpu.library import LEGACY_STREAM
from graphopt.gpu.resources import Resource, freeing

if TYPE_CHECKING:
    from graphopt.gpu.context import Context
    from graphopt.gpu.streams import Stream

Array = npt.NDArray[Any]


class Memory(Resource):
    """Device memory.

    Attributes:
        pointer: Its address on the device.
        size: In bytes.
    """

    def __init__(self, context: Context, size: int, stream: Stream | None) -> None:
        self.size = size
        context.make_current()
        pointer = ctypes.c_uint64()
        # An address is wanted for empty tensors too: one byte.
        if stream is not None and context.device.memory_pools:
            context.library.call("cuMemAllocAsync", ctypes.byref(pointer), max(size, 1), stream.handle)
            free = _freeing_in_order(context, pointer.value, stream)
        else:
            context.library.call("cuMemAlloc_v2", ctypes.byref(pointer), max(size, 1))
            free = freeing(context, "cuMemFree_v2", pointer.value)
        super().__init__(context, pointer.value, free)

    @property
    def pointer(self) -> int:
        return self.handle

    def write(self, array: Array) -> None:
        """Copy an array in, and wait until it is there. ValueError where it is larger than this."""
        contiguous = np.ascontiguousarray(array)
        if contiguous.nbytes > self.size:
            raise ValueError(f"{contiguous.nbytes} bytes do not fit into {self.size}")
        if contiguous.nbytes:
            self.context.make_current()
            self.context.library.call("cuMemcpyHtoD_v2", self.pointer, contiguous.ctypes.data, contiguous.nbytes)
            # The copy returns when the host's side is done; our streams do not wait for the default one.
            self.context.library.call("cuStreamSynchronize", LEGACY_STREAM)

    def read(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Copy out, once all that was started before on the default stream is done. ValueError if it holds less."""
        array = np.empty(shape, dtype)
        if array.nbytes > self.size:
            raise ValueError(f"{array.nbytes} bytes are wanted of {self.size}")
        if array.nbytes:
            self.context.make_current()
            self.context.library.call("cuMemcpyDtoH_v2", array.ctypes.data, self.pointer, array.nbytes)
        return array


class Pinned(Resource):
    """Page-locked host memory.

    Attributes:
        array: The memory as an array. It is gone when this is closed.
    """

    def __init__(self, context: Context, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        context.make_current()
        pointer = ctypes.c_void_p()
        context.library.call("cuMemHostAlloc", ctypes.byref(pointer), max(size, 1), 0)
        address = pointer.value or 0
        super().__init__(context, address, freeing(context, "cuMemFreeHost", address))
        buffer = (ctypes.c_ubyte * max(size, 1)).from_address(address)
        self.array: Array = np.frombuffer(memoryview(buffer), np.uint8, size).view(kind).reshape(tuple(shape))


def address_of(memory: Memory | int, size: int) -> int:
    """Where memory lies; another library's is known by its address. ValueError if ours is smaller than ``size``."""
    if isinstance(memory, int):
        return memory
    if memory.size < size:
        raise ValueError(f"{size} bytes do not fit into {memory.size}")
    return memory.pointer


def _freeing_in_order(context: Context, pointer: int, stream: Stream) -> Callable[[], None]:
    """What frees memory after all that its stream still has to do; it keeps the stream."""
    library, primary = context.library, context.primary

    def free() -> None:
        with primary.pushed(library):
            if stream.closed:
                library.raw("cuMemFree_v2", pointer)
            else:
                library.raw("cuMemFreeAsync", pointer, stream.handle)

    return free
