"""Memory for the outputs of engines. What somebody still holds is never written again."""

from __future__ import annotations

from typing import Any

from graphopt.errors import GraphoptError
from graphopt.gpu.context import Context
from graphopt.gpu.errors import CudaError
from graphopt.gpu.memory import Memory
from graphopt.gpu.streams import Stream


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
        for index, (memory, takers) in enumerate(self._free):
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
