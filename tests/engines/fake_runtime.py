"""A runtime with TensorRT's Python interface that runs numpy functions on the stand-in driver's memory and streams.

It keeps the real one's rules and breaks down where they are broken: an input has a shape of the profile, each tensor
an address of its kind, a stream that is captured was warmed up on these shapes, addresses are what they were when the
work was put into the stream.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

ILogger_Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4", start=0)
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST", start=0)
TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW2 HWC8", start=0)
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE", start=0)
_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "INT8": np.int8,
    "BF16": ml_dtypes.bfloat16,
}
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# What engines compute, by name: arrays of the inputs in, arrays of the outputs out.
Function = Callable[..., Sequence[np.ndarray]]
FUNCTIONS: dict[str, Function] = {
    "double": lambda x: [(x + x).astype(x.dtype)],
    "add_and_sum": lambda x, y: [x + y, np.sum(x + y, axis=-1, keepdims=True)],
    "nonzero": lambda x: [np.stack(np.nonzero(x), axis=1).astype(np.int64)],
    "take": lambda x, count: [x[: int(count[0])]],
}


def write_engine(
    path: Path,
    function: str,
    inputs: Mapping[str, tuple[str, Sequence[int]]],
    outputs: Mapping[str, tuple[str, Sequence[Any]]],
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = ({},),
    **more: Any,
) -> Path:
    """Write a file that the fake runtime takes for an engine.

    Args:
        path: Where.
        function: One of `FUNCTIONS`.
        inputs: Name -> (member of DataType, shape with -1 where it varies).
        outputs: The same; a size may name an input and an axis it follows ("x.0"), or be -1: known when it has run.
        profiles: For each the smallest, best and largest shape of the inputs that vary.
        more: ``magic`` (ftrt), ``version`` (10.13.0), ``host`` (inputs that live on the host), ``capability``,
            ``uncapturable``, ``fails``, ``stripped``, ``streams``.
    """
    plan = {"function": function, "inputs": inputs, "outputs": outputs, "profiles": profiles, **more}
    path.write_bytes(str(more.get("magic", "ftrt")).encode() + json.dumps(plan).encode())
    return path


class ILogger:
    Severity = ILogger_Severity

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IOutputAllocator:
    def __init__(self) -> None:
        self.ready = True


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert getattr(logger, "ready", False), "ILogger.__init__ was not called"
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        plan = json.loads(content[4:])
        if plan.get("says"):
            self.logger.log(ILogger.Severity.ERROR, plan["says"])
            return None
        if plan.get("needs_host_code") and not self.engine_host_code_allowed:
            self.logger.log(ILogger.Severity.ERROR, "engine_host_code_allowed is off")
            return None
        return ICudaEngine(plan, self.logger)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._logger, self._given = engine, logger, False

    def refit_cuda_engine(self) -> bool:
        self._engine._plan["stripped"] = not self._given
        return self._given


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, path: str) -> bool:
        if b"other names" in Path(path).read_bytes():
            self._logger.log(ILogger.Severity.ERROR, "no such weights")
            return False
        self._refitter._given = True
        return True


class ICudaEngine:
    def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
        self._plan, self._logger = plan, logger
        self.streamable_weights_size = 1000 if plan.get("streams") else 0
        self.weight_streaming_budget_v2 = 0
        self._tensors = {**plan["inputs"], **plan["outputs"]}
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name][1])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._plan.get("host", ()) else TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> TensorFormat:
        return TensorFormat.HWC8 if name in self._plan.get("packed", ()) else TensorFormat.LINEAR

    def get_tensor_format_desc(self, name: str) -> str:
        return "channels packed by 8"

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name not in self._plan.get("host", ()), "a shape tensor has values, not shapes"
        given = self._plan["profiles"][profile_index].get(name)
        return [tuple(shape) for shape in (given or [self._plan["inputs"][name][1]] * 3)]

    def get_weight_streaming_automatic_budget(self) -> int:
        return 600

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig | None = None) -> IExecutionContext:
        return IExecutionContext(self, config)


class IExecutionContext:
    made: list[IExecutionContext] = []  # noqa: RUF012  (the tests look at what was done)

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._engine, self._plan, self._config = engine, engine._plan, config
        self._profile: int | None = 0 if len(self._plan["profiles"]) == 1 else None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._warm = False
        self._kept: list[Any] = []
        self.enqueued = self.captured = self.shape_changes = 0
        self._cuda = ctypes.CDLL(os.environ["GRAPHOPT_LIBCUDA"])
        IExecutionContext.made.append(self)

    def _refuse(self, message: str) -> bool:
        self._engine._logger.log(ILogger.Severity.ERROR, f"IExecutionContext: {message}")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._plan["profiles"]):
            return self._refuse("no such profile")
        self._profile, self._shapes, self._warm = profile_index, {}, False
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if self._profile is None:
            return self._refuse("no profile is set")
        if name not in self._plan["inputs"]:
            return self._refuse(f"{name} is no input")
        if self._engine.get_tensor_location(name) is TensorLocation.DEVICE:
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return self._refuse(f"{name} {tuple(shape)} is outside the profile")
        if self._shapes.get(name) != tuple(shape):
            self._warm = False
            self.shape_changes += 1
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [
            name
            for name in self._plan["inputs"]
            if name not in self._shapes or (name in self._plan.get("host", ()) and name not in self._addresses)
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return tuple(self._size(size) for size in self._plan["outputs"][name][1])

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        name, _, axis = size.partition(".")
        return self._shapes[name][int(axis)]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        on_host = self._engine.get_tensor_location(name) is TensorLocation.HOST
        if not on_host and memory % 256:
            return self._refuse(f"the address of {name} is not aligned")
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        assert output_allocator.ready, "IOutputAllocator.__init__ was not called"
        self._allocators[name] = output_allocator
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if stream_handle == 0:
            return self._refuse("the default stream")
        if self.infer_shapes():
            return self._refuse("shapes are missing")
        missing = [
            name
            for name in (*self._plan["inputs"], *self._plan["outputs"])
            if name not in self._addresses and name not in self._allocators
        ]
        if missing:
            return self._refuse(f"no address for {missing[0]}")
        if self._plan.get("stripped"):
            return self._refuse("the weights are missing")
        if self._plan.get("fails"):
            return self._refuse("a layer failed")
        capturing = ctypes.c_int()
        assert self._cuda.cuStreamIsCapturing(ctypes.c_void_p(stream_handle), ctypes.byref(capturing)) == 0
        if capturing.value and (not self._warm or self._plan.get("uncapturable")):
            self._cuda.cuCtxSynchronize()  # what has to be set up first spoils the capture
            return self._refuse("not ready to be captured")
        self.captured += capturing.value
        self.enqueued += 1
        self._warm = True
        inputs = [self._view(name) for name in self._plan["inputs"]]
        function = FUNCTIONS[self._plan["function"]]
        if self._allocators:
            return self._run_to_know_the_shapes(function, inputs, stream_handle)
        outputs = [self._view(name) for name in self._plan["outputs"]]
        self._enqueue(lambda: self._compute(function, inputs, outputs), stream_handle)
        return True

    def _run_to_know_the_shapes(self, function: Function, inputs: list[np.ndarray], stream: int) -> bool:
        assert self._cuda.cuStreamSynchronize(ctypes.c_void_p(stream)) == 0
        for name, value in zip(self._plan["outputs"], function(*inputs), strict=True):
            if name not in self._allocators:
                known = self._view(name)
                self._enqueue(lambda known=known, value=value: known.__setitem__(..., value), stream)
                continue
            allocator = self._allocators[name]
            address = allocator.reallocate_output_async(name, 0, max(value.nbytes, 1), 256, stream)
            if not address:
                return self._refuse(f"no memory for {name}")
            allocator.notify_shape(name, value.shape)
            target = _view(address, value.shape, value.dtype)
            self._enqueue(lambda target=target, value=value: target.__setitem__(..., value), stream)
        return True

    @staticmethod
    def _compute(function: Function, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
        for target, value in zip(outputs, function(*inputs), strict=True):
            target[...] = value

    def _view(self, name: str) -> np.ndarray:
        kind = self._engine.get_tensor_dtype(name).name
        return _view(self._addresses[name], self.get_tensor_shape(name), np.dtype(_NUMPY[kind]))

    def _enqueue(self, work: Callable[[], Any], stream: int) -> None:
        function = _HOST_FUNCTION(lambda _: work())
        self._kept.append(function)
        assert self._cuda.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None) == 0


def _view(address: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    raw = (ctypes.c_ubyte * size).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


def module(*, rtx: bool = False, version: str | None = None) -> Any:
    """The module: TensorRT's, or TensorRT-RTX's."""
    IExecutionContext.made.clear()
    plain = {
        "__version__": version or ("1.7.1.116" if rtx else "10.13.3.9"),
        "ILogger": ILogger,
        "IOutputAllocator": IOutputAllocator,
        "Runtime": Runtime,
        "Refitter": Refitter,
        "OnnxParserRefitter": OnnxParserRefitter,
        "DataType": DataType,
        "TensorIOMode": TensorIOMode,
        "TensorLocation": TensorLocation,
        "TensorFormat": TensorFormat,
    }
    if rtx:
        return SimpleNamespace(**plain, CudaGraphStrategy=CudaGraphStrategy)
    return SimpleNamespace(**plain, init_libnvinfer_plugins=lambda logger, namespace: True)


CLASSES = (Runtime, Refitter, OnnxParserRefitter, ICudaEngine, IExecutionContext, IRuntimeConfig)
