"""One block of a bundle, run: an engine, an ONNX file on ONNX Runtime's CPU, or nothing but values handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.backend import RunBlock
from graphopt.engines.bundles.values import Copier, Value
from graphopt.engines.loading import OpenEngine
from graphopt.engines.pool import Pool
from graphopt.engines.session import Session, Sessions
from graphopt.engines.tensors import Shapes, find_profile, read_profiles, read_tensors
from graphopt.errors import BadInput
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.streams import Stream

_ALIGNMENT = 256  # the libraries want addresses to be multiples of this


class EngineBlock:
    """An engine between others: what it reads and makes stays on the GPU, in the order of one stream.

    Args:
        opened: The engine.
        stream: That of all blocks.
        pool: What outputs of all blocks lie in.
        copier: Brings values to the GPU, or to the host where the engine wants one there.
        cuda_graphs: Whether runs are recorded and replayed.
    """

    def __init__(self, opened: OpenEngine, stream: Stream, pool: Pool, copier: Copier, *, cuda_graphs: bool) -> None:
        self._path = opened.path
        self._stream = stream
        self._copier = copier
        tensors = read_tensors(opened)
        self._inputs = [tensor for tensor in tensors if tensor.is_input]
        self._profiles = read_profiles(opened, tensors)
        self._sessions = Sessions(opened, tensors, stream, cuda_graphs=cuda_graphs, pool=pool)
        self._last: tuple[Shapes, Session] | None = None

    def __call__(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Put one run into the stream. Raises GraphoptError where the library fails."""
        asked: dict[str, Any] = {
            tensor.name: self._copier.to_host([given[tensor.name]])[0] for tensor in self._inputs if tensor.on_host
        }
        arrays = {
            tensor.name: self._aligned(self._copier.to_device(given[tensor.name]))
            for tensor in self._inputs
            if not tensor.on_host
        }
        shapes = {tensor.name: tuple(given[tensor.name].shape) for tensor in self._inputs}
        session = self._session(shapes, asked)
        made = session.run({name: array.pointer for name, array in arrays.items()})
        return {name: Value(device=array) for name, array in made.items()}

    @property
    def graphs_refused(self) -> str | None:
        """Why its runs are not recorded; None where they are, or it was not tried yet."""
        return self._sessions.graphs_refused

    def clear(self) -> None:
        """Let go of what it holds on the GPU."""
        self._last = None
        self._sessions.clear()
        self._sessions.opened.engine = None

    def _session(self, shapes: Shapes, asked: Mapping[str, Any]) -> Session:
        if self._last is not None and self._last[0] == shapes and not asked:
            return self._last[1]
        try:
            profile = find_profile(self._profiles, shapes, self._path)
        except BadInput as error:
            hint = "build the bundle for more sizes: graphopt build --shapes or --calibration"
            raise BadInput(error.what, where=f"{self._path.stem}: {error.where}", hint=hint) from None
        session = self._sessions.of_profile(profile)
        session.set_shapes(shapes, asked)
        self._last = shapes, session
        return session

    def _aligned(self, array: DeviceArray) -> DeviceArray:
        """A copy where it begins elsewhere than the library wants; given back at once, as what follows comes later."""
        if array.pointer % _ALIGNMENT == 0 or not array.nbytes:
            return array
        copy = self._copier.array(array.shape, array.dtype)
        self._stream.copy(copy.pointer, array.pointer, array.nbytes)
        return copy


def on_host(run: RunBlock, inputs: Sequence[str], outputs: Sequence[str], copier: Copier) -> Callable[..., Any]:
    """A block on ONNX Runtime: its inputs are fetched together; what it makes is the host's until somebody wants it."""

    def call(given: Mapping[str, Value]) -> dict[str, Value]:
        made = run(copier.to_host([given[key] for key in inputs]))
        return {key: Value(value) for key, value in zip(outputs, made, strict=True)}

    return call


def handing_on(path: Path) -> Callable[[Mapping[str, Value]], dict[str, Value]] | None:
    """How a block that does nothing but hand values on is run: by handing them on. None where it does more."""
    sources = sources_of(ir.load(path))
    if sources is None:
        return None
    constants = {name: Value(source, kept=True) for name, source in sources.items() if not isinstance(source, str)}
    return lambda given: {
        name: given[source] if isinstance(source, str) else constants[name] for name, source in sources.items()
    }


def sources_of(block: ir.Model) -> dict[str, Any] | None:
    """For each output of a block the input, by name, or the constant that it is; None where anything is computed."""
    sources: dict[str, Any] = {}
    for output in block.graph.outputs:
        value = output
        while (node := value.producer()) is not None and node.op_type == "Identity" and node.domain == "":
            assert node.inputs[0] is not None
            value = node.inputs[0]
        tensor = graphs.constant_tensor(value) if graphs.is_constant(value) else None
        if tensor is not None:
            sources[output.name or ""] = tensor.numpy()
        elif value.is_graph_input() and isinstance(value.type, ir.TensorType):
            sources[output.name or ""] = value.name or ""
        else:
            return None
    return sources
