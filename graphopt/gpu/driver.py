"""A GPU through the driver alone: memory, streams, events, PTX, launches, CUDA graphs.

Everything that is opened is closed by ``close()``, by ``with``, or when nothing refers to it any more; closing a
context closes what is left of it. The context is the device's primary one, which torch, ONNX Runtime and TensorRT
use too: pointers and streams pass between them as they are.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graphopt.errors import BadInput, GraphoptError
from graphopt.gpu.errors import NOT_READY, SUCCESS, NoGpu, explain_refused_ptx, isa_of_driver
from graphopt.gpu.library import Library, library_path, open_library

Array = npt.NDArray[Any]

_ATTRIBUTES = {
    "major": 75,
    "minor": 76,
    "multiprocessors": 16,
    "l2_bytes": 38,
    "memory_pools": 115,
}
LEGACY_STREAM = 1
"""The handle of the default stream."""
_NON_BLOCKING = 1  # a stream that does not wait for the legacy default stream
_CAPTURE_THREAD_LOCAL = 1  # other threads may allocate while this one captures
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_LOG_BYTES = 16384
_STATIC_SHARED_BYTES = 1  # of cuFuncGetAttribute
_REGISTERS = 4
_LOCAL_BYTES = 3


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


class _Resource:
    """Something of a context with a handle; freed once."""

    def __init__(self, context: Context, handle: int, free: Callable[[], None]) -> None:
        self.context = context
        self.handle = handle
        self._finalizer = weakref.finalize(self, free)
        context._opened.append(weakref.ref(self))

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Free it now; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Primary:
    """A device's primary context, held. What is open in it keeps this alive: it is let go of last."""

    def __init__(self, library: Library, device: int) -> None:
        index, handle = ctypes.c_int(), ctypes.c_void_p()
        library.call("cuDeviceGet", ctypes.byref(index), device)
        library.call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), index)
        self.handle = handle.value or 0
        self.release = weakref.finalize(self, library.raw, "cuDevicePrimaryCtxRelease_v2", index)

    @contextmanager
    def pushed(self, library: Library) -> Iterator[None]:
        """Current for a while: what is collected as garbage is freed anywhere, and must leave no context behind."""
        library.raw("cuCtxPushCurrent_v2", self.handle)
        try:
            yield
        finally:
            library.raw("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Context:
    """A GPU, opened. Methods may be called from any thread; each makes the context that thread's own."""

    def __init__(self, driver: Driver, device: Device) -> None:
        self.driver = driver
        self.device = device
        self.library = library = driver.library
        self._opened: list[weakref.ref[_Resource]] = []
        self._primary = _Primary(library, device.index)
        self.handle = self._primary.handle
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
        if not self._primary.release.alive:
            return
        # Nothing is freed under a kernel. Errors have been told where they arose; after some, every call fails.
        self.library.raw("cuCtxSetCurrent", self.handle)
        self.library.raw("cuCtxSynchronize")
        for reference in reversed(self._opened):
            resource = reference()
            if resource is not None:
                resource.close()
        self._opened.clear()
        # Other libraries start anew where no context is current; one that is gone would be an error to them.
        self.library.raw("cuCtxSetCurrent", None)
        self._primary.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tidy(self) -> None:
        """Forget resources that are gone."""
        if len(self._opened) > 256:
            self._opened = [reference for reference in self._opened if reference() is not None]


def _freeing(context: Context, function: str, *arguments: Any) -> Callable[[], None]:
    """What frees a handle. It asks for no success: the process may be ending, and the driver gone already."""
    library, primary = context.library, context._primary
    context._tidy()

    def free() -> None:
        with primary.pushed(library):
            library.raw(function, *arguments)

    return free


def _freeing_in_order(context: Context, pointer: int, stream: Stream) -> Callable[[], None]:
    """What frees memory after all that its stream still has to do; it keeps the stream."""
    library, primary = context.library, context._primary

    def free() -> None:
        with primary.pushed(library):
            if stream.closed:
                library.raw("cuMemFree_v2", pointer)
            else:
                library.raw("cuMemFreeAsync", pointer, stream.handle)

    return free


class Memory(_Resource):
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
            free = _freeing(context, "cuMemFree_v2", pointer.value)
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


class Pinned(_Resource):
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
        super().__init__(context, address, _freeing(context, "cuMemFreeHost", address))
        buffer = (ctypes.c_ubyte * max(size, 1)).from_address(address)
        self.array: Array = np.frombuffer(memoryview(buffer), np.uint8, size).view(kind).reshape(tuple(shape))


class Stream(_Resource):
    """Work that is done in order."""

    def __init__(self, context: Context) -> None:
        context.make_current()
        handle = ctypes.c_void_p()
        context.library.call("cuStreamCreate", ctypes.byref(handle), _NON_BLOCKING)
        super().__init__(context, handle.value or 0, _freeing(context, "cuStreamDestroy_v2", handle.value))

    def synchronize(self) -> None:
        """Wait for all that was put into it."""
        self.context.make_current()
        self.context.library.call("cuStreamSynchronize", self.handle)

    def upload(self, memory: Memory | int, source: Pinned | Array) -> None:
        """Start to copy host memory to the device; pinned memory must stay as it is until then."""
        array = source.array if isinstance(source, Pinned) else source
        if array.nbytes:
            self._copy("cuMemcpyHtoDAsync_v2", _pointer(memory, array.nbytes), array.ctypes.data, array.nbytes)

    def download(self, target: Pinned | Array, memory: Memory | int) -> None:
        """Start to copy device memory to the host; it is there once the stream has been waited for."""
        array = target.array if isinstance(target, Pinned) else target
        if array.nbytes:
            self._copy("cuMemcpyDtoHAsync_v2", array.ctypes.data, _pointer(memory, array.nbytes), array.nbytes)

    def copy(self, target: Memory | int, source: Memory | int, size: int) -> None:
        """Start to copy on the device."""
        if size:
            self._copy("cuMemcpyDtoDAsync_v2", _pointer(target, size), _pointer(source, size), size)

    def fill(self, memory: Memory, byte: int = 0) -> None:
        """Start to fill memory with one byte."""
        if memory.size:
            self.context.make_current()
            self.context.library.call("cuMemsetD8Async", memory.pointer, byte, memory.size, self.handle)

    def wait(self, event: Event) -> None:
        """Let what comes next wait for an event of another stream."""
        self.context.make_current()
        self.context.library.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def wait_for(self, stream: int) -> None:
        """Let what comes next wait for what another library's stream has to do so far; no other thread waits."""
        event = self.context.event()
        event.record(stream)
        self.wait(event)

    def hold_back(self, stream: int) -> None:
        """Let what comes next in another library's stream wait for what this one has to do so far."""
        event = self.context.event()
        event.record(self)
        self.context.library.call("cuStreamWaitEvent", stream, event.handle, 0)

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Record what is put into this stream instead of doing it.

        ``with stream.capture() as captured: ...`` and then ``captured.graph.launch(stream)``.

        Raises:
            CudaError: Something ran that cannot be recorded.
        """
        library = self.context.library
        self.context.make_current()
        library.call("cuStreamBeginCapture_v2", self.handle, _CAPTURE_THREAD_LOCAL)
        captured = Capture()
        recorded = ctypes.c_void_p()
        try:
            yield captured
        except BaseException:
            # The stream must leave the capture whatever happened; the error that comes first is the one to tell.
            if library.raw("cuStreamEndCapture", self.handle, ctypes.byref(recorded)) == 0 and recorded.value:
                library.raw("cuGraphDestroy", recorded)
            raise
        library.call("cuStreamEndCapture", self.handle, ctypes.byref(recorded))
        try:
            captured._graph = Graph(self.context, recorded)
        finally:
            library.raw("cuGraphDestroy", recorded)

    def _copy(self, function: str, *arguments: int) -> None:
        self.context.make_current()
        self.context.library.call(function, *arguments, self.handle)


class Capture:
    """What `Stream.capture` yields; it holds the graph once the block is over."""

    _graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        assert self._graph is not None, "the block is not over"
        return self._graph


class Graph(_Resource):
    """Recorded work, ready to be launched again and again. Addresses and sizes are part of it."""

    def __init__(self, context: Context, recorded: ctypes.c_void_p) -> None:
        handle = ctypes.c_void_p()
        context.library.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), recorded, 0)
        super().__init__(context, handle.value or 0, _freeing(context, "cuGraphExecDestroy", handle.value))

    def launch(self, stream: Stream) -> None:
        """Put the work into a stream."""
        self.context.make_current()
        self.context.library.call("cuGraphLaunch", self.handle, stream.handle)


class Event(_Resource):
    """A moment in a stream."""

    def __init__(self, context: Context) -> None:
        context.make_current()
        handle = ctypes.c_void_p()
        context.library.call("cuEventCreate", ctypes.byref(handle), 0)
        super().__init__(context, handle.value or 0, _freeing(context, "cuEventDestroy_v2", handle.value))

    def record(self, stream: Stream | int) -> None:
        """Record the moment in a stream; an int is another library's, or `LEGACY_STREAM`."""
        self.context.make_current()
        self.context.library.call("cuEventRecord", self.handle, _handle(stream))

    @property
    def over(self) -> bool:
        """Whether the stream has come here."""
        self.context.make_current()
        code = self.context.library.raw("cuEventQuery", self.handle)
        if code not in (SUCCESS, NOT_READY):
            raise self.context.library.error(code, "cuEventQuery")
        return code == SUCCESS

    def synchronize(self) -> None:
        """Wait until the stream has come here."""
        self.context.make_current()
        self.context.library.call("cuEventSynchronize", self.handle)

    def since(self, earlier: Event) -> float:
        """Milliseconds from another event to this one, on the GPU's clock. Both must be over."""
        elapsed = ctypes.c_float()
        self.context.make_current()
        self.context.library.call("cuEventElapsedTime", ctypes.byref(elapsed), earlier.handle, self.handle)
        return float(elapsed.value)


class Module(_Resource):
    """PTX, compiled for the device and loaded."""

    def __init__(self, context: Context, ptx: str) -> None:
        context.make_current()
        library, handle = context.library, ctypes.c_void_p()
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        code = library.raw("cuModuleLoadDataEx", ctypes.byref(handle), ptx.encode(), 2, options, values)
        if code:
            name, _ = library.describe(code)
            device, said = context.device, log.value.decode(errors="replace")
            what, hint = explain_refused_ptx(name, code, said, ptx, context.driver.cuda, device.name, device.capability)
            raise GraphoptError(what, hint=hint)
        super().__init__(context, handle.value or 0, _freeing(context, "cuModuleUnload", handle.value))

    def function(self, name: str) -> Function:
        """A kernel by its entry name. Raises CudaError where there is none."""
        return Function(self, name)


class Function:
    """A kernel of a loaded module.

    Attributes:
        static_shared: Bytes of shared memory that it declares.
        registers: Registers of a thread.
        local_bytes: Bytes of a thread that spilled out of the registers.
    """

    def __init__(self, module: Module, name: str) -> None:
        self.module = module  # must outlive this
        self.name = name
        library, handle = module.context.library, ctypes.c_void_p()
        module.context.make_current()
        library.call("cuModuleGetFunction", ctypes.byref(handle), module.handle, name.encode())
        self.handle = handle.value or 0

        def attribute(which: int) -> int:
            value = ctypes.c_int()
            library.call("cuFuncGetAttribute", ctypes.byref(value), which, self.handle)
            return value.value

        self.static_shared = attribute(_STATIC_SHARED_BYTES)
        self.registers = attribute(_REGISTERS)
        self.local_bytes = attribute(_LOCAL_BYTES)

    def launch(
        self,
        stream: Stream,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[Memory | int | np.int32],
        shared: int = 0,
    ) -> None:
        """Start the kernel.

        Args:
            stream: Where.
            grid: Blocks along x, y, z.
            threads: Of a block.
            arguments: In the kernel's order: device memory (or its address, a plain int), and np.int32 for scalars.
            shared: Dynamic shared memory of a block, in bytes.
        """
        boxes: list[Any] = [
            ctypes.c_int32(int(value))
            if isinstance(value, np.int32)
            else ctypes.c_uint64(value.pointer if isinstance(value, Memory) else value)
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * max(len(boxes), 1))(*(ctypes.addressof(box) for box in boxes))
        self.module.context.make_current()
        self.module.context.library.call(
            "cuLaunchKernel", self.handle, *grid, threads, 1, 1, shared, stream.handle, pointers, None
        )


def _handle(stream: Stream | int) -> int:
    return stream if isinstance(stream, int) else stream.handle


def _pointer(memory: Memory | int, size: int) -> int:
    if isinstance(memory, int):
        return memory
    if memory.size < size:
        raise ValueError(f"{size} bytes do not fit into {memory.size}")
    return memory.pointer
