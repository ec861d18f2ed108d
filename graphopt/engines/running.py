"""Runs engines: inputs and outputs stay on the GPU, CUDA graphs replay what ran before, DLPack goes in and comes out.

One execution context a profile: shapes of one profile do not disturb those of another, and an engine built for a list
of sizes (one profile each) never changes the shapes of a context, which leaks memory where plugins take part
(NVIDIA/TensorRT#4849).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graphopt.engines.loading import OpenEngine
from graphopt.engines.session import Session, Sessions
from graphopt.engines.tensors import Shapes, describe, find_profile, read_profiles, read_tensors
from graphopt.errors import BadInput
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.driver import find_driver
from graphopt.gpu.program import Program

Array = npt.NDArray[Any]

_ALIGNMENT = 256  # the libraries want addresses to be multiples of this


class EngineRunner:
    """An engine on a GPU. For one thread at a time.

    Attributes:
        inputs: What `run` takes; None in a shape where the engine takes more than one size.
        outputs: What it gives.
        library: The library and its version.
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
            self._tensors = read_tensors(self._open)
            self._profiles = read_profiles(self._open, self._tensors)
        except BaseException:
            self.context.close()
            raise
        self.stream = self.context.stream()
        self._sessions = Sessions(self._open, self._tensors, self.stream, cuda_graphs=cuda_graphs)
        self.inputs = tuple(tensor.spec() for tensor in self._tensors if tensor.is_input)
        self.outputs = tuple(tensor.spec() for tensor in self._tensors if not tensor.is_input)

    @property
    def graphs_refused(self) -> str | None:
        """Why CUDA graphs are not used; None where they are, or have not been tried yet."""
        return self._sessions.graphs_refused

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
        self._sessions.in_use.let_go()
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
            self._sessions.in_use.hold(held)
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
        self._sessions.clear()
        self._open.engine = None
        self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the engine is --------------------------------------------------------------------------------------------

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
            where, expected = f"input '{name}'", describe(tensor.dtype, tensor.shape)
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
                got = describe(array.dtype, array.shape)
                raise BadInput(f"expected {expected}, got {got}", where=where, hint="the dtype differs")
            if len(array.shape) != len(tensor.shape):
                got = describe(array.dtype, array.shape)
                raise BadInput(f"expected {expected}, got {got}", where=where, hint="the rank differs")
            given[name] = array
        return given, held, {name: tuple(array.shape) for name, array in given.items()}

    def _aligned(self, array: DeviceArray) -> DeviceArray:
        """A copy that begins where the library wants it: a slice of a tensor need not."""
        memory = self.context.allocate(array.nbytes)
        self.stream.copy(memory, array.pointer, array.nbytes)
        return DeviceArray(self.context, memory.pointer, array.shape, array.dtype, owner=(memory, array))

    def _session(self, shapes: Shapes, given: Mapping[str, Array | DeviceArray]) -> Session:
        """The session on the first profile that takes the shapes, set to them."""
        session = self._sessions.of_profile(find_profile(self._profiles, shapes, self.path))
        session.set_shapes(shapes, given)
        return session


def load_engine(path: Path, threads: int | None = None) -> EngineRunner:
    """For `graphopt.load`. An engine runs on a GPU: ``threads`` means nothing to it."""
    return EngineRunner(path)
