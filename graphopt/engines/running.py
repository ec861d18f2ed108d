"""Runs engines: inputs and outputs stay on the GPU, CUDA graphs replay what ran before, DLPack goes in and comes out.

One execution context a profile: shapes of one profile do not disturb those of another, and an engine built for a list
of sizes (one profile each) never changes the shapes of a context, which leaks memory where plugins take part
(NVIDIA/TensorRT#4849).
"""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.engines.loading import OpenEngine
from graphopt.errors import BadInput, GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.driver import Context, Event, Graph, Memory, Stream, find_driver
from graphopt.gpu.errors import CudaError
from graphopt.gpu.program import Program
from graphopt.runtime.loading import TensorSpec

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]

_DTYPES: dict[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "FP8": ml_dtypes.float8_e4m3fn,
}
_ALIGNMENT = 256  # the libraries want addresses to be multiples of this
_MOST_GRAPHS = 8  # a profile; the one that was not used for longest goes


@dataclass(frozen=True)
class _Tensor:
    """An input or output; ``shape`` has -1 where it varies. ``on_host``: the library reads it on the host."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool


class _Lease:
    """Memory of the pool, lent to one result; it comes back when nothing holds the result any more."""

    def __init__(self, pool: _Pool, memory: Memory) -> None:
        self._pool = pool
        self.memory = memory
        self.takers: set[int] = set()

    def __del__(self) -> None:
        self._pool.give_back(self.memory, self.takers)


class _Pool:
    """Memory for outputs. What somebody still holds is never written again."""

    def __init__(self, context: Context, stream: Stream) -> None:
        self._context = context
        self._stream = stream
        self._free: list[tuple[Memory, set[int]]] = []

    def lend(self, size: int) -> _Lease:
        for index, (memory, takers) in enumerate(self._free):
            if memory.size == size:
                del self._free[index]
                for taker in takers:  # another library's work on what it was handed may not be over
                    self._stream.wait_for(taker)
                return _Lease(self, memory)
        return _Lease(self, self._context.allocate(size))

    def give_back(self, memory: Memory, takers: set[int]) -> None:
        if not memory.closed:
            self._free.append((memory, takers))

    def clear(self) -> None:
        self._free.clear()


class EngineRunner:
    """An engine on a GPU. For one thread at a time.

    Attributes:
        inputs: What `run` takes; None in a shape where the engine takes more than one size.
        outputs: What it gives.
        library: The library and its version.
        graphs_refused: Why CUDA graphs are not used; None where they are, or have not been tried yet.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        backend: str | None = None,
        device: int = 0,
        cuda_graphs: bool = True,
        trt: Any = None,
    ) -> None:
        """Open an engine on a GPU.

        Args:
            path: The engine's file.
            backend: ``tensorrt`` or ``tensorrt-rtx``; read from the file if None.
            device: Which GPU.
            cuda_graphs: Record what runs twice on the same addresses, and replay it from then on.
            trt: The library's module; imported if None.

        Raises:
            BadInput: There is no such file, or it is no engine. NoGpu (a BadInput): there is no GPU.
            MissingDependency: The library is not installed.
            GraphoptError: The library refuses the engine: built by another version, for another GPU, ...
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise BadInput("no such file", where=str(self.path))
        self.context = find_driver().open(device)
        try:
            self._open = OpenEngine(self.path, self.context.device, backend=backend, trt=trt)
            self.library = f"{self._open.backend.title} {self._open.version}"
            self._trt, self._engine = self._open.trt, self._open.engine
            self._tensors = self._read_tensors()
            self._profiles = [self._read_profile(index) for index in range(self._engine.num_optimization_profiles)]
        except BaseException:
            self.context.close()
            raise
        self._own_graphs = hasattr(self._trt, "CudaGraphStrategy")  # RTX records and replays by itself
        self._cuda_graphs = cuda_graphs
        self.graphs_refused: str | None = None
        self.stream = self.context.stream()
        self._pool = _Pool(self.context, self.stream)
        self._sessions: dict[int, _Session] = {}
        # What the GPU may still read: inputs of others, each until the run that read them is over.
        self._in_use: deque[tuple[Event, Sequence[object]]] = deque()
        self.inputs = tuple(self._spec(tensor) for tensor in self._tensors if tensor.is_input)
        self.outputs = tuple(self._spec(tensor) for tensor in self._tensors if not tensor.is_input)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the engine once.

        Args:
            feeds: An array for each input: numpy, or a GPU array of any library that knows DLPack, which is not copied.

        Returns:
            An array for each output: numpy arrays; or, where an input lies on the GPU, `DeviceArray`s, which other
            libraries take without a copy (``torch.from_dlpack(result["y"])``). Those are not waited for: their
            ``numpy()`` waits, and so does the stream of the library that takes them.

        Raises:
            BadInput: An input is missing or unknown, or its dtype or shape is none that the engine takes.
            GraphoptError: The library fails.
        """
        on_gpu = any(arrays.is_on_gpu(value) for value in feeds.values())
        results = self.run_on_device(feeds)
        if on_gpu:
            return dict(results)
        fetched = {name: np.empty(array.shape, array.dtype) for name, array in results.items()}
        for name, array in results.items():
            self.stream.download(fetched[name], array.pointer)
        self.stream.synchronize()
        return fetched

    def run_on_device(self, feeds: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """As `run`, but the results stay on the GPU whatever the inputs are. Raises as `run`."""
        self.context.make_current()
        self._let_go_of_inputs()
        given, held, shapes = self._check(feeds)
        session = self._session(shapes, given)
        placed: dict[str, int] = {}
        for name, value in given.items():
            if isinstance(value, DeviceArray):
                placed[name] = value.pointer
            elif name not in session.host_values:
                memory = session.input_memory(name, value.nbytes)
                self.stream.upload(memory, value)  # read before this returns: it is no pinned memory
                placed[name] = memory.pointer
        results = session.run(placed)
        if held:
            event = self.context.event()
            event.record(self.stream)
            self._in_use.append((event, held))
        return results

    def program(self, feeds: Mapping[str, Any]) -> Program:
        """The engine on fixed inputs and outputs, ready to be put into its stream again and again: for timing.

        With CUDA graphs it is one graph, captured here, after a run that warms the library up. Raises as `run`.
        """
        self.context.make_current()
        given, held, shapes = self._check(feeds)
        session = self._session(shapes, given)
        inputs: dict[str, DeviceArray] = {}
        for name, value in given.items():
            if isinstance(value, DeviceArray):
                inputs[name] = value
            elif name not in session.host_values:
                inputs[name] = arrays.upload(self.context, value)
        addresses = {name: array.pointer for name, array in inputs.items()}
        outputs = session.run(addresses, graphs=False)
        self.stream.synchronize()
        graph, enqueue = session.repeat(addresses, outputs)
        return Program(self.context, self.stream, inputs, outputs, enqueue, is_graph=graph, held=(self, held))

    def close(self) -> None:
        """Free what the engine holds on the GPU; results that were given out go with it."""
        self._in_use.clear()
        self._sessions.clear()
        self._pool.clear()
        self._engine = self._open.engine = None
        self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the engine is --------------------------------------------------------------------------------------------

    def _read_tensors(self) -> list[_Tensor]:
        trt, engine = self._trt, self._engine
        found = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
            if kind not in _DTYPES:
                raise GraphoptError(f"'{name}' is {kind}, which no array can hold", where=str(self.path))
            if engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
                layout = engine.get_tensor_format_desc(name)
                raise GraphoptError(f"'{name}' is not stored row by row: {layout}", where=str(self.path))
            found.append(
                _Tensor(
                    name,
                    np.dtype(_DTYPES[kind]),
                    tuple(engine.get_tensor_shape(name)),
                    engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                    engine.get_tensor_location(name) == trt.TensorLocation.HOST,
                )
            )
        return found

    def _read_profile(self, index: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The smallest, the best and the largest shape of each input on the device."""
        found = {}
        for tensor in self._tensors:
            if tensor.is_input and not tensor.on_host:
                shapes = tuple(tuple(shape) for shape in self._engine.get_tensor_profile_shape(tensor.name, index))
                # Where nothing varies there is nothing to choose.
                found[tensor.name] = shapes if any(size < 0 for size in tensor.shape) else (tensor.shape,) * 3
        return found

    def _spec(self, tensor: _Tensor) -> TensorSpec:
        return TensorSpec(tensor.name, tensor.dtype, tuple(size if size >= 0 else None for size in tensor.shape))

    def shapes_to_try(self, profile: int = 0) -> Shapes:
        """For each input the shape that the engine is to be fastest at; where nothing varies, its shape."""
        return {name: shapes[1] for name, shapes in self._profiles[profile].items()}

    # -- feeds ---------------------------------------------------------------------------------------------------------

    def _check(self, feeds: Mapping[str, Any]) -> tuple[dict[str, Array | DeviceArray], list[object], Shapes]:
        """The feeds as arrays, what must be held on to, and the shapes."""
        wanted = {tensor.name: tensor for tensor in self._tensors if tensor.is_input}
        for name in feeds:
            if name not in wanted:
                near = difflib.get_close_matches(name, wanted, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"inputs: {', '.join(wanted) or 'none'}"
                raise BadInput("the engine has no such input", where=f"input '{name}'", hint=hint)
        given: dict[str, Array | DeviceArray] = {}
        held: list[object] = []
        for name, tensor in wanted.items():
            where, expected = f"input '{name}'", _describe(tensor.dtype, tensor.shape)
            if name not in feeds:
                raise BadInput("no value was given", where=where, hint=f"expected {expected}")
            value = feeds[name]
            array: Array | DeviceArray
            if not arrays.is_on_gpu(value):
                array = np.ascontiguousarray(value).reshape(np.shape(value))
            elif tensor.on_host:
                raise BadInput("it decides a shape, and is wanted on the host", where=where, hint="give a numpy array")
            else:
                array = arrays.take(self.context, value, self.stream, where)
                if array.pointer % _ALIGNMENT and array.nbytes:
                    array = self._aligned(array)
                held.append(array)
            if array.dtype != tensor.dtype:
                got = _describe(array.dtype, array.shape)
                raise BadInput(f"expected {expected}, got {got}", where=where, hint="the dtype differs")
            if len(array.shape) != len(tensor.shape):
                got = _describe(array.dtype, array.shape)
                raise BadInput(f"expected {expected}, got {got}", where=where, hint="the rank differs")
            given[name] = array
        return given, held, {name: tuple(array.shape) for name, array in given.items()}

    def _aligned(self, array: DeviceArray) -> DeviceArray:
        """A copy that begins where the library wants it: a slice of a tensor need not."""
        memory = self.context.allocate(array.nbytes)
        self.stream.copy(memory, array.pointer, array.nbytes)
        return DeviceArray(self.context, memory.pointer, array.shape, array.dtype, owner=(memory, array))

    def _session(self, shapes: Shapes, given: Mapping[str, Array | DeviceArray]) -> _Session:
        """The context of the first profile that takes the shapes, set to them."""
        index = next((index for index, profile in enumerate(self._profiles) if _fits(profile, shapes)), None)
        if index is None:
            raise self._no_profile(shapes)
        if index not in self._sessions:
            self._sessions[index] = _Session(self, index)
        session = self._sessions[index]
        session.set_shapes(shapes, given)
        return session

    def _no_profile(self, shapes: Shapes) -> BadInput:
        for name, shape in shapes.items():
            ranges = [profile[name] for profile in self._profiles if name in profile]
            if ranges and not any(_within(shape, smallest, largest) for smallest, _, largest in ranges):
                told = " or ".join(
                    dict.fromkeys(
                        _x(smallest) if smallest == largest else f"{_x(smallest)} to {_x(largest)}"
                        for smallest, _, largest in ranges
                    )
                )
                return BadInput(
                    f"the engine takes {told}, not {_x(shape)}",
                    where=f"input '{name}'",
                    hint="build it for more shapes: graphopt build --shapes",
                )
        listed = ", ".join(f"{name} {_x(shape)}" for name, shape in shapes.items())
        return BadInput(f"no profile of the engine takes these shapes together: {listed}", where=str(self.path))

    def _let_go_of_inputs(self) -> None:
        while self._in_use and self._in_use[0][0].over:
            self._in_use.popleft()


class _Session:
    """An execution context on one profile, with the shapes that it is set to."""

    def __init__(self, runner: EngineRunner, profile: int) -> None:
        self._runner = runner
        self._trt = runner._trt
        self._context = self._create_context(profile)
        self._shapes: Shapes | None = None
        self.host_values: dict[str, Array] = {}
        self._inputs: dict[str, Memory] = {}
        self._outputs: dict[str, tuple[int, ...]] = {}
        self._allocators: dict[str, Any] = {}
        self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()

    def _create_context(self, profile: int) -> Any:
        runner, engine = self._runner, self._runner._engine
        if runner._own_graphs:
            config = engine.create_runtime_config()
            strategy = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if runner._cuda_graphs else strategy.DISABLED
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise runner._open.failure("could not prepare it to run")
        if not context.set_optimization_profile_async(profile, runner.stream.handle):
            raise runner._open.failure(f"does not take profile {profile}")
        runner.stream.synchronize()
        return context

    def set_shapes(self, shapes: Shapes, given: Mapping[str, Array | DeviceArray]) -> None:
        """Set the shapes of the inputs, and the values of those that decide shapes."""
        runner = self._runner
        values = {
            tensor.name: np.array(given[tensor.name])
            for tensor in runner._tensors
            if tensor.is_input and tensor.on_host
        }
        same = all(np.array_equal(value, self.host_values[name]) for name, value in values.items() if self._shapes)
        if shapes == self._shapes and same:
            return
        runner.stream.synchronize()  # what still runs was told the old shapes
        self._shapes = None
        self._graphs.clear()  # they hold the old ones
        self._seen.clear()
        self.host_values = values
        context = self._context
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise runner._open.failure(f"does not take shape {_x(shape)} for input '{name}'")
        for name, value in values.items():
            if not context.set_tensor_address(name, value.ctypes.data):
                raise runner._open.failure(f"does not take a value for input '{name}'")
        missing = context.infer_shapes()
        if missing:
            raise runner._open.failure(f"does not know the shape of '{missing[0]}'")
        self._outputs, self._allocators = {}, {}
        for tensor in runner._tensors:
            if tensor.is_input:
                continue
            shape = tuple(context.get_tensor_shape(tensor.name))
            self._outputs[tensor.name] = shape
            if any(size < 0 for size in shape):  # known when it has run
                allocator = _make_allocator(self._trt, runner._pool)
                if not context.set_output_allocator(tensor.name, allocator):
                    raise runner._open.failure(f"does not take an allocator for output '{tensor.name}'")
                self._allocators[tensor.name] = allocator
        self._shapes = dict(shapes)

    def input_memory(self, name: str, size: int) -> Memory:
        """Device memory for an input that comes from the host."""
        if name not in self._inputs or self._inputs[name].size < size:
            self._inputs[name] = self._runner.context.allocate(size)
        return self._inputs[name]

    def run(self, inputs: Mapping[str, int], *, graphs: bool = True) -> dict[str, DeviceArray]:
        """Run once on inputs at these addresses; the outputs are not waited for."""
        runner = self._runner
        leases = {
            tensor.name: runner._pool.lend(math.prod(self._outputs[tensor.name]) * tensor.dtype.itemsize)
            for tensor in runner._tensors
            if not tensor.is_input and tensor.name not in self._allocators
        }
        addresses = {**inputs, **{name: lease.memory.pointer for name, lease in leases.items()}}
        key = tuple(sorted(addresses.items()))
        if not (graphs and self._records_graphs()):
            self._execute(addresses)
        elif key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].launch(runner.stream)
        elif key in self._seen and (graph := self._capture(addresses)) is not None:
            self._graphs[key] = graph
            if len(self._graphs) > _MOST_GRAPHS:
                runner.stream.synchronize()
                self._graphs.popitem(last=False)
            graph.launch(runner.stream)
        else:
            self._execute(addresses)
            self._seen[key] = None
            if len(self._seen) > 8 * _MOST_GRAPHS:
                self._seen.popitem(last=False)
        return {tensor.name: self._result(tensor, leases) for tensor in runner._tensors if not tensor.is_input}

    def repeat(self, inputs: Mapping[str, int], outputs: Mapping[str, DeviceArray]) -> tuple[bool, Callable[[], None]]:
        """What puts the same run, which ran once already, into the stream again, and whether it is a graph."""
        runner = self._runner
        addresses = {
            **inputs,
            **{name: array.pointer for name, array in outputs.items() if name not in self._allocators},
        }
        graph = self._capture(addresses) if self._records_graphs() else None
        if graph is not None:
            captured = graph
            return True, lambda: captured.launch(runner.stream)
        self._set_addresses(addresses)
        context, handle = self._context, runner.stream.handle

        def enqueue() -> None:
            if not context.execute_async_v3(handle):
                raise runner._open.failure("could not run it")

        return False, enqueue

    def _records_graphs(self) -> bool:
        runner = self._runner
        wanted = runner._cuda_graphs and not runner._own_graphs and runner.graphs_refused is None
        return wanted and not self._allocators

    def _result(self, tensor: _Tensor, leases: Mapping[str, _Lease]) -> DeviceArray:
        shape, lease = self._outputs[tensor.name], leases.get(tensor.name)
        if lease is None:
            allocator = self._allocators[tensor.name]
            shape, lease = allocator.shape, allocator.lease
            allocator.lease = None
        assert lease is not None
        runner = self._runner
        array = DeviceArray(
            runner.context, lease.memory.pointer, shape, tensor.dtype, owner=lease, stream=runner.stream
        )
        array.takers = lease.takers
        return array

    def _set_addresses(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._runner._open.failure(f"does not take memory for '{name}'")

    def _execute(self, addresses: Mapping[str, int]) -> None:
        self._set_addresses(addresses)
        done = self._context.execute_async_v3(self._runner.stream.handle)
        for name, allocator in self._allocators.items():
            if allocator.error is not None:
                raise GraphoptError(f"no memory for output '{name}': {allocator.error}", where=str(self._runner.path))
        if not done:
            raise self._runner._open.failure("could not run it")

    def _capture(self, addresses: Mapping[str, int]) -> Graph | None:
        """The run as a graph; None where it cannot be recorded, which is remembered."""
        runner = self._runner
        try:
            with runner.stream.capture() as captured:
                self._execute(addresses)
            return captured.graph
        except GraphoptError as error:
            runner.graphs_refused = str(error)
            return None


def _make_allocator(trt: Any, pool: _Pool) -> Any:
    """Memory for an output whose size is known only when the engine has run."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.lease: _Lease | None = None
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


def _fits(profile: Mapping[str, tuple[tuple[int, ...], ...]], shapes: Shapes) -> bool:
    return all(_within(shapes[name], smallest, largest) for name, (smallest, _, largest) in profile.items())


def _within(shape: Sequence[int], smallest: Sequence[int], largest: Sequence[int]) -> bool:
    return len(shape) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _describe(dtype: np.dtype[Any], shape: Sequence[int]) -> str:
    return f"{dtype.name}[{', '.join('?' if size < 0 else str(size) for size in shape)}]"


def load_engine(path: Path, threads: int | None = None) -> EngineRunner:
    """For `graphopt.load`. An engine runs on a GPU: ``threads`` means nothing to it."""
    return EngineRunner(path)
