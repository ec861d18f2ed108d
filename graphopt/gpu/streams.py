"""Work of a GPU in order: streams, the moments in them, and graphs that replay what was recorded of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from graphopt.garbage import paused
from graphopt.gpu.errors import NOT_READY, SUCCESS
from graphopt.gpu.memory import Memory, Pinned, address_of
from graphopt.gpu.resources import Resource, freeing

if TYPE_CHECKING:
    from graphopt.gpu.context import Context

Array = npt.NDArray[Any]

_NON_BLOCKING = 1  # a stream that does not wait for the legacy default stream
_CAPTURE_THREAD_LOCAL = 1  # other threads may allocate while this one captures


class Stream(Resource):
    """Work that is done in order."""

    def __init__(self, context: Context) -> None:
        context.make_current()
        handle = ctypes.c_void_p()
        context.library.call("cuStreamCreate", ctypes.byref(handle), _NON_BLOCKING)
        super().__init__(context, handle.value or 0, freeing(context, "cuStreamDestroy_v2", handle.value))

    def synchronize(self) -> None:
        """Wait for all that was put into it."""
        self.context.make_current()
        self.context.library.call("cuStreamSynchronize", self.handle)

    def upload(self, memory: Memory | int, source: Pinned | Array) -> None:
        """Start to copy host memory to the device; pinned memory must stay as it is until then."""
        array = source.array if isinstance(source, Pinned) else source
        if array.nbytes:
            self._copy("cuMemcpyHtoDAsync_v2", address_of(memory, array.nbytes), array.ctypes.data, array.nbytes)

    def download(self, target: Pinned | Array, memory: Memory | int) -> None:
        """Start to copy device memory to the host; it is there once the stream has been waited for."""
        array = target.array if isinstance(target, Pinned) else target
        if array.nbytes:
            self._copy("cuMemcpyDtoHAsync_v2", array.ctypes.data, address_of(memory, array.nbytes), array.nbytes)

    def copy(self, target: Memory | int, source: Memory | int, size: int) -> None:
        """Start to copy on the device."""
        if size:
            self._copy("cuMemcpyDtoDAsync_v2", address_of(target, size), address_of(source, size), size)

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
            with paused():  # what is collected may free memory of the device, which spoils the capture
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


class Graph(Resource):
    """Recorded work, ready to be launched again and again. Addresses and sizes are part of it."""

    def __init__(self, context: Context, recorded: ctypes.c_void_p) -> None:
        handle = ctypes.c_void_p()
        context.library.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), recorded, 0)
        super().__init__(context, handle.value or 0, freeing(context, "cuGraphExecDestroy", handle.value))

    def launch(self, stream: Stream) -> None:
        """Put the work into a stream."""
        self.context.make_current()
        self.context.library.call("cuGraphLaunch", self.handle, stream.handle)


class Event(Resource):
    """A moment in a stream."""

    def __init__(self, context: Context) -> None:
        context.make_current()
        handle = ctypes.c_void_p()
        context.library.call("cuEventCreate", ctypes.byref(handle), 0)
        super().__init__(context, handle.value or 0, freeing(context, "cuEventDestroy_v2", handle.value))

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


def _handle(stream: Stream | int) -> int:
    return stream if isinstance(stream, int) else stream.handle
