"""Execution of an engine: a session a profile, with the shapes it is set to and CUDA graphs of what ran before."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.engines.loading import OpenEngine
from graphopt.engines.pool import InUse, Lease, Pool, make_allocator
from graphopt.engines.tensors import Shapes, Tensor, sizes
from graphopt.errors import GraphoptError
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.memory import Memory
from graphopt.gpu.streams import Graph, Stream

Array = npt.NDArray[Any]

_MOST_GRAPHS = 8  # a profile; the one that was not used for longest goes
_MOST_GONE = 32  # after so many, addresses change too often for graphs to be of use


class Sessions:
    """The sessions of an engine, each made when it is first wanted, and what they share.

    Attributes:
        opened: The engine.
        tensors: Its inputs and outputs.
        stream: Where all of them run.
        pool: What their outputs lie in.
        cuda_graphs: Whether what runs twice on the same addresses is recorded, and replayed from then on.
        own_graphs: Whether the library records and replays by itself, as RTX does.
        graphs_refused: Why CUDA graphs are not used; None where they are, or have not been tried yet.
        in_use: Inputs of others that the GPU may still read.
    """

    def __init__(
        self,
        opened: OpenEngine,
        tensors: Sequence[Tensor],
        stream: Stream,
        *,
        cuda_graphs: bool,
        pool: Pool | None = None,
    ) -> None:
        self.opened = opened
        self.tensors = tensors
        self.stream = stream
        self.pool = Pool(stream.context, stream) if pool is None else pool
        self.cuda_graphs = cuda_graphs
        self.own_graphs = hasattr(opened.trt, "CudaGraphStrategy")
        self.graphs_refused: str | None = None
        self.in_use = InUse(stream)
        self._of_profile: dict[int, Session] = {}

    def of_profile(self, index: int) -> Session:
        """The session on a profile. Raises GraphoptError where the library does not make one."""
        if index not in self._of_profile:
            self._of_profile[index] = Session(self, index)
        return self._of_profile[index]

    def clear(self) -> None:
        """Let go of all that the sessions hold on the GPU."""
        self.in_use.clear()
        self._of_profile.clear()
        self.pool.clear()


class Session:
    """An execution context on one profile, with the shapes that it is set to."""

    def __init__(self, shared: Sessions, profile: int) -> None:
        self._shared = shared
        self._trt = shared.opened.trt
        self._context = self._create_context(profile)
        self._shapes: Shapes | None = None
        self.host_values: dict[str, Array] = {}
        self._inputs: dict[str, Memory] = {}
        self._outputs: dict[str, tuple[int, ...]] = {}
        self._allocators: dict[str, Any] = {}
        self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._gone = 0

    def _create_context(self, profile: int) -> Any:
        shared, engine = self._shared, self._shared.opened.engine
        if shared.own_graphs:
            config = engine.create_runtime_config()
            strategy = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if shared.cuda_graphs else strategy.DISABLED
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise shared.opened.failure("could not prepare it to run")
        if not context.set_optimization_profile_async(profile, shared.stream.handle):
            raise shared.opened.failure(f"does not take profile {profile}")
        shared.stream.synchronize()
        return context

    def set_shapes(self, shapes: Shapes, given: Mapping[str, Array | DeviceArray]) -> None:
        """Set the shapes of the inputs, and the values of those that decide shapes."""
        shared = self._shared
        values = {
            tensor.name: np.array(given[tensor.name]) for tensor in shared.tensors if tensor.is_input and tensor.on_host
        }
        same = all(np.array_equal(value, self.host_values[name]) for name, value in values.items() if self._shapes)
        if shapes == self._shapes and same:
            return
        shared.stream.synchronize()  # what still runs was told the old shapes
        self._shapes = None
        self._graphs.clear()  # they hold the old ones
        self._seen.clear()
        self.host_values = values
        context = self._context
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise shared.opened.failure(f"does not take shape {sizes(shape)} for input '{name}'")
        for name, value in values.items():
            if not context.set_tensor_address(name, value.ctypes.data):
                raise shared.opened.failure(f"does not take a value for input '{name}'")
        missing = context.infer_shapes()
        if missing:
            raise shared.opened.failure(f"does not know the shape of '{missing[0]}'")
        self._outputs, self._allocators = {}, {}
        for tensor in shared.tensors:
            if tensor.is_input:
                continue
            shape = tuple(context.get_tensor_shape(tensor.name))
            self._outputs[tensor.name] = shape
            if any(size < 0 for size in shape):  # known when it has run
                allocator = make_allocator(self._trt, shared.pool)
                if not context.set_output_allocator(tensor.name, allocator):
                    raise shared.opened.failure(f"does not take an allocator for output '{tensor.name}'")
                self._allocators[tensor.name] = allocator
        self._shapes = dict(shapes)

    def input_memory(self, name: str, size: int) -> Memory:
        """Device memory for an input that comes from the host."""
        if name not in self._inputs or self._inputs[name].size < size:
            self._inputs[name] = self._shared.stream.context.allocate(size)
        return self._inputs[name]

    def run(self, inputs: Mapping[str, int], *, graphs: bool = True) -> dict[str, DeviceArray]:
        """Run once on inputs at these addresses; the outputs are not waited for."""
        shared = self._shared
        leases = {
            tensor.name: shared.pool.lend(math.prod(self._outputs[tensor.name]) * tensor.dtype.itemsize)
            for tensor in shared.tensors
            if not tensor.is_input and tensor.name not in self._allocators
        }
        addresses = {**inputs, **{name: lease.memory.pointer for name, lease in leases.items()}}
        key = tuple(sorted(addresses.items()))
        if not (graphs and self._records_graphs()):
            self._execute(addresses)
        elif key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].launch(shared.stream)
        elif key in self._seen and (graph := self._capture(addresses)) is not None:
            self._graphs[key] = graph
            if len(self._graphs) > _MOST_GRAPHS:
                shared.stream.synchronize()
                self._graphs.popitem(last=False)
                self._gone += 1
                if self._gone == _MOST_GONE:
                    shared.graphs_refused = "the addresses of inputs and outputs change too often"
            graph.launch(shared.stream)
        else:
            self._execute(addresses)
            self._seen[key] = None
            if len(self._seen) > 8 * _MOST_GRAPHS:
                self._seen.popitem(last=False)
        return {tensor.name: self._result(tensor, leases) for tensor in shared.tensors if not tensor.is_input}

    def repeat(self, inputs: Mapping[str, int], outputs: Mapping[str, DeviceArray]) -> tuple[bool, Callable[[], None]]:
        """What puts the same run, which ran once already, into the stream again, and whether it is a graph."""
        shared = self._shared
        addresses = {
            **inputs,
            **{name: array.pointer for name, array in outputs.items() if name not in self._allocators},
        }
        graph = self._capture(addresses) if self._records_graphs() else None
        if graph is not None:
            captured = graph
            return True, lambda: captured.launch(shared.stream)
        self._set_addresses(addresses)
        context, handle = self._context, shared.stream.handle

        def enqueue() -> None:
            if not context.execute_async_v3(handle):
                raise shared.opened.failure("could not run it")

        return False, enqueue

    def _records_graphs(self) -> bool:
        shared = self._shared
        wanted = shared.cuda_graphs and not shared.own_graphs and shared.graphs_refused is None
        return wanted and not self._allocators

    def _result(self, tensor: Tensor, leases: Mapping[str, Lease]) -> DeviceArray:
        shape, lease = self._outputs[tensor.name], leases.get(tensor.name)
        if lease is None:
            allocator = self._allocators[tensor.name]
            shape, lease = allocator.shape, allocator.lease
            allocator.lease = None
        assert lease is not None
        shared = self._shared
        array = DeviceArray(
            shared.stream.context, lease.memory.pointer, shape, tensor.dtype, owner=lease, stream=shared.stream
        )
        array.takers = lease.takers
        return array

    def _set_addresses(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._shared.opened.failure(f"does not take memory for '{name}'")

    def _execute(self, addresses: Mapping[str, int]) -> None:
        self._set_addresses(addresses)
        done = self._context.execute_async_v3(self._shared.stream.handle)
        for name, allocator in self._allocators.items():
            if allocator.error is not None:
                raise GraphoptError(
                    f"no memory for output '{name}': {allocator.error}", where=str(self._shared.opened.path)
                )
        if not done:
            raise self._shared.opened.failure("could not run it")

    def _capture(self, addresses: Mapping[str, int]) -> Graph | None:
        """The run as a graph; None where it cannot be recorded, which is remembered."""
        shared = self._shared
        try:
            with shared.stream.capture() as captured:
                self._execute(addresses)
            return captured.graph
        except GraphoptError as error:
            shared.graphs_refused = str(error)
            return None
