"""NVIDIA's driver, started, and the GPUs that it sees."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from graphopt.errors import BadInput
from graphopt.gpu.context import Context
from graphopt.gpu.errors import NoGpu, isa_of_driver
from graphopt.gpu.library import LEGACY_STREAM, Library, library_path, open_library
from graphopt.gpu.streams import Graph, Stream

__all__ = ["LEGACY_STREAM", "Context", "Device", "Driver", "Graph", "Stream", "find_driver"]

_ATTRIBUTES = {
    "major": 75,
    "minor": 76,
    "multiprocessors": 16,
    "l2_bytes": 38,
    "memory_pools": 115,
}


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        index: As the driver counts, CUDA_VISIBLE_DEVICES applied.
        name: As NVIDIA calls it.
        capability: Its compute capability, such as (8, 9).
        memory_bytes: All of its memory.
        multiprocessors: How many it has.
        l2_bytes: The size of its L2 cache.
        memory_pools: Whether memory can be allocated in the order of a stream.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    l2_bytes: int
    memory_pools: bool

    @property
    def architecture(self) -> str:
        """What a compiler calls PTX for it: ``compute_89``."""
        return f"compute_{self.capability[0]}{self.capability[1]}"


class Driver:
    """The driver, started.

    Attributes:
        cuda: The CUDA release that it is for, such as (12, 8).
        isa: The newest PTX ISA that a driver of this release takes.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        version = ctypes.c_int()
        library.call("cuDriverGetVersion", ctypes.byref(version))
        self.cuda = (version.value // 1000, version.value % 1000 // 10)
        self.isa = isa_of_driver(self.cuda)
        count = ctypes.c_int()
        library.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise NoGpu("no GPU: the driver sees none", hint="is CUDA_VISIBLE_DEVICES set?")
        self.devices = tuple(self._describe(index) for index in range(count.value))

    def open(self, device: int = 0) -> Context:
        """Open the primary context of a device; ``with driver.open() as context: ...``.

        Raises:
            BadInput: There is no such device.
            CudaError: It cannot be opened.
        """
        if not 0 <= device < len(self.devices):
            raise BadInput(f"there is no GPU {device}; the driver sees {len(self.devices)}")
        return Context(self, self.devices[device])

    def _describe(self, index: int) -> Device:
        library, handle = self.library, ctypes.c_int()
        library.call("cuDeviceGet", ctypes.byref(handle), index)
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        library.call("cuDeviceGetName", name, 256, handle)
        library.call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)

        def attribute(which: str) -> int:
            value = ctypes.c_int()
            library.call("cuDeviceGetAttribute", ctypes.byref(value), _ATTRIBUTES[which], handle)
            return value.value

        return Device(
            index=index,
            name=name.value.decode(errors="replace"),
            capability=(attribute("major"), attribute("minor")),
            memory_bytes=memory.value,
            multiprocessors=attribute("multiprocessors"),
            l2_bytes=attribute("l2_bytes"),
            memory_pools=bool(attribute("memory_pools")) and library.has("cuMemAllocAsync"),
        )


def find_driver() -> Driver:
    """The driver of this machine's GPUs.

    Raises:
        NoGpu: There is no driver, it does not start, or it sees no GPU.
    """
    return Driver(open_library(library_path()))
