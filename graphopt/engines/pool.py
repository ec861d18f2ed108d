"""Memory for the outputs of engines. What somebody still holds is never written again, nor freed while it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.gpu.context import Context
from graphopt.gpu.errors import CudaError
from graphopt.gpu.memory import Memory
from graphopt.gpu.streams import Event, Stream


class Lease:
    """Memory of the pool, lent to one result; it comes back when nothing holds the result any more."""

    def __init__(self, pool: Pool, memory: Memory) -> None:
        self._pool = pool
        self.memory = memory
        self.takers: set[int] = set()

    def __del__(self) -> None:
        self._pool.give_back(self.memory, self.takers)


class Pool:
    """Memory for outputs. What somebody still holds is never written again."""

    def __init__(self, context: Context, stream: Stream) -> None:
        self._context = context
        self._stream = stream
        self._free: list[tuple[Memory, set[int]]] = []

    def lend(self, size: int) -> Lease:
        """Memory of that many bytes or a few more: what grows from run to run takes few different sizes."""
        size = _rounded(size)
        # The one that came back last: what runs in turns keeps to few addresses, and graphs are recorded for addresses.
        for index in reversed(range(len(self._free))):
            memory, takers = self._free[index]
            if memory.size == size:
                del self._free[index]
                for taker in takers:  # another library's work on what it was handed may not be over
                    self._stream.wait_for(taker)
                return Lease(self, memory)
        return Lease(self, self._context.allocate(size))

    def give_back(self, memory: Memory, takers: set[int]) -> None:
        if not memory.closed:
            self._free.append((memory, takers))

    def clear(self) -> None:
        self._free.clear()


def _rounded(size: int) -> int:
    """Up to the next of eight sizes between two powers of two."""
    step = 1 << max((size - 1).bit_length() - 4, 9)
    return -(-max(size, 1) // step) * step


class InUse:
    """What the GPU may still read: inputs of others, each until the run that read them is over."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._held: deque[tuple[Event, Sequence[object]]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, inputs: Sequence[object]) -> None:
        """Hold on to inputs until all that was put into the stream so far is over."""
        event = self._stream.context.event()
        event.record(self._stream)
        self._held.append((event, inputs))

    def let_go(self) -> None:
        """Let go of those that have been read."""
        while self._held and self._held[0][0].over:
            self._held.popleft()

    def clear(self) -> None:
        self._held.clear()


def make_allocator(trt: Any, pool: Pool) -> Any:
    """Memory for an output whose size is known only when the engine has run."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.lease: Lease | None = None
            self.shape: tuple[int, ...] = ()
            self.error: GraphoptError | None = None

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            self.error = None
            if self.lease is None or self.lease.memory.size < size:
                try:
                    self.lease = pool.lend(1 << max(size - 1, 511).bit_length())
                except CudaError as error:  # nothing may be raised through the library
                    self.error = error
                    return 0
            return self.lease.memory.pointer

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()
