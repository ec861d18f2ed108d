"""A GPU, opened: it makes memory, streams, events and modules.

Everything that is opened is closed by ``close()``, by ``with``, or when nothing refers to it any more; closing a
context closes what is left of it. The context is the device's primary one, which torch, ONNX Runtime and TensorRT
use too: pointers and streams pass between them as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt

from graphopt.gpu.memory import Memory, Pinned
from graphopt.gpu.modules import Module
from graphopt.gpu.resources import Primary
from graphopt.gpu.streams import Event, Stream

if TYPE_CHECKING:
    from graphopt.gpu.driver import Device, Driver

Array = npt.NDArray[Any]


class Context:
    """A GPU, opened. Methods may be called from any thread; each makes the context that thread's own."""

    def __init__(self, driver: Driver, device: Device) -> None:
        self.driver = driver
        self.device = device
        self.library = library = driver.library
        self.primary = Primary(library, device.index)
        self.handle = self.primary.handle
        self.make_current()

    def make_current(self) -> None:
        """Make this the calling thread's context; other libraries may have changed it."""
        self.library.call("cuCtxSetCurrent", self.handle)

    def synchronize(self) -> None:
        """Wait for all that was started on the device."""
        self.make_current()
        self.library.call("cuCtxSynchronize")

    def free_bytes(self) -> int:
        """How much of the device's memory is free now, by all its processes."""
        self.make_current()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.library.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int, stream: Stream | None = None) -> Memory:
        """Device memory of ``size`` bytes; in the order of ``stream`` where one is given and the device can.

        Raises:
            CudaError: There is not enough.
        """
        return Memory(self, size, stream)

    def pinned(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Pinned:
        """Host memory that copies to and from without a stop on the way."""
        return Pinned(self, shape, dtype)

    def stream(self) -> Stream:
        """A new stream, independent of the default one."""
        return Stream(self)

    def event(self) -> Event:
        """A new event that can be timed with."""
        return Event(self)

    def load(self, ptx: str) -> Module:
        """Compile PTX for this device and load it.

        Raises:
            GraphoptError: The driver refuses it; the message says why in plain words.
        """
        return Module(self, ptx)

    def upload(self, array: Array) -> Memory:
        """Device memory that holds an array's elements, in C order."""
        memory = self.allocate(array.nbytes)
        memory.write(array)
        return memory

    def close(self) -> None:
        """Close what is left of this context, last first, and let go of the device."""
        if not self.primary.release.alive:
            return
        # Nothing is freed under a kernel. Errors have been told where they arose; after some, every call fails.
        self.library.raw("cuCtxSetCurrent", self.handle)
        self.library.raw("cuCtxSynchronize")
        for reference in reversed(self.primary.opened):
            resource = reference()
            if resource is not None:
                resource.close()
        self.primary.opened.clear()
        # Other libraries start anew where no context is current; one that is gone would be an error to them.
        self.library.raw("cuCtxSetCurrent", None)
        self.primary.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
