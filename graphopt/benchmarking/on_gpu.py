"""What an engine is compared with on the same GPU and in the same stream: ONNX Runtime's CUDA provider, and torch.

Both become a `Program`: their inputs and outputs stay where they are, their work goes into a stream of ours, so that
the same events time all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.benchmarking.device import DeviceCall
from graphopt.errors import BadInput, GraphoptError, MissingDependency, install_hint
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.context import Context
from graphopt.gpu.driver import find_driver
from graphopt.gpu.program import Program
from graphopt.gpu.streams import Stream
from graphopt.runtime.ending import run_options
from graphopt.runtime.flavour import import_onnxruntime
from graphopt.runtime.loading import TensorSpec
from graphopt.runtime.session import check_feeds, numpy_dtype, reason

CUDA_PROVIDER = "CUDAExecutionProvider"


class _OnGpu:
    """What the runners here share: a context, a stream, and `run` by way of `program`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, device: int) -> None:
        self.context: Context = find_driver().open(device)
        self.stream: Stream = self.context.stream()

    def program(self, feeds: Mapping[str, Any]) -> Program:
        """The model on fixed inputs and outputs."""
        raise NotImplementedError

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once: arrays of the host in and out."""
        call = DeviceCall(self.program(feeds), feeds)
        call()
        return call.results()


class OnnxCudaRunner(_OnGpu):
    """A model on ONNX Runtime's CUDA provider, as deployed.

    Attributes:
        library: The library and its version.
    """

    def __init__(self, path: Path, *, device: int = 0) -> None:
        """Load a model.

        Raises:
            NoGpu: There is no GPU.
            MissingDependency: The onnxruntime that is installed has no CUDA provider.
            BadInput: There is no such file, or the runtime refuses the model.
        """
        if not path.is_file():
            raise BadInput("no such file", where=str(path))
        find_driver()  # no package helps where there is no GPU: told first
        ort = import_onnxruntime()
        if CUDA_PROVIDER not in ort.get_available_providers():
            raise MissingDependency("this onnxruntime has no CUDA provider", hint=install_hint("gpu"))
        super().__init__(device)
        self.path = path
        self.library = f"onnxruntime {ort.__version__}, CUDA"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        provider = {"device_id": str(device), "user_compute_stream": str(self.stream.handle)}
        try:
            self._session = ort.InferenceSession(
                str(path), sess_options=options, providers=[(CUDA_PROVIDER, provider), "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BadInput(f"onnxruntime refuses the model: {reason(error)}", where=str(path)) from error
        if CUDA_PROVIDER not in self._session.get_providers():
            # It falls back to the CPU with no more than a line in its log; that would be timed as a GPU.
            raise GraphoptError(
                "onnxruntime's CUDA provider does not start", where=str(path), hint="are its CUDA and cuDNN installed?"
            )
        self._run_options = run_options()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs = tuple(_spec(item) for item in self._session.get_inputs())
        self.outputs = tuple(_spec(item) for item in self._session.get_outputs())

    def program(self, feeds: Mapping[str, Any]) -> Program:
        """The model bound to fixed inputs and outputs. Raises BadInput for wrong feeds, or where it cannot be bound."""
        session = self._session
        check_feeds([(spec.name, spec.type, spec.shape) for spec in session.get_inputs()], feeds)
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype is None or spec.dtype.kind in "OUS":
                raise BadInput(f"'{spec.name}' is no tensor of numbers, which a GPU needs", where=str(self.path))
        inputs = {name: arrays.upload(self.context, np.asarray(value)) for name, value in feeds.items()}
        binding = session.io_binding()
        for name, array in inputs.items():
            self._bind(binding.bind_input, name, array)
        # The first run tells the sizes of the outputs.
        for spec in self.outputs:
            binding.bind_output(spec.name, "cuda", self.context.device.index)
        self._run(binding)
        self.stream.synchronize()
        shapes = [value.shape() for value in binding.get_outputs()]
        outputs = {
            spec.name: arrays.allocate(self.context, shape, np.dtype(spec.dtype))
            for spec, shape in zip(self.outputs, shapes, strict=True)
        }
        binding.clear_binding_outputs()
        for name, array in outputs.items():
            self._bind(binding.bind_output, name, array)
        self._run(binding)
        self.stream.synchronize()
        return Program(self.context, self.stream, inputs, outputs, lambda: self._run(binding), held=(self, binding))

    def _bind(self, bind: Callable[..., object], name: str, array: DeviceArray) -> None:
        kind: Any = array.dtype.type
        if array.dtype.kind == "V" or array.dtype.name == "bfloat16":  # onnxruntime knows it by ONNX's number alone
            kind = 16
        bind(name, "cuda", self.context.device.index, kind, list(array.shape), array.pointer)

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise GraphoptError(f"onnxruntime failed: {reason(error)}", where=str(self.path)) from error


def _spec(item: Any) -> TensorSpec:
    return TensorSpec(item.name, numpy_dtype(item.type), None if item.shape is None else tuple(item.shape))


def find_torch() -> Any:
    """The module torch, which can use a GPU here.

    Raises:
        MissingDependency: It is not installed, was built without CUDA, or its CUDA does not start.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("torch is not installed", hint="install a torch built for CUDA")
    import torch

    if torch.version.cuda is None:
        raise MissingDependency(f"torch {torch.__version__} has no CUDA", hint="install a torch built for CUDA")
    if not torch.cuda.is_available():
        what = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which does not start here"
        raise MissingDependency(what, hint="is the driver new enough for it?")
    return torch


class TorchStream:
    """torch at work in a stream of ours, on memory of ours.

    Attributes:
        torch: The module.
        version: Its version.
    """

    def __init__(self, context: Context, stream: Stream) -> None:
        """Raises MissingDependency as `find_torch`."""
        self.torch = find_torch()
        self.version = str(self.torch.__version__)
        self._context, self._stream = context, stream

    def tensor(self, array: DeviceArray) -> Any:
        """The array as a tensor, without a copy."""
        return self.torch.from_dlpack(array)

    def current(self) -> AbstractContextManager[Any]:
        """What torch does within goes into the stream, and nothing is kept for gradients."""
        stack = ExitStack()
        stack.enter_context(self.torch.inference_mode())
        stream = self.torch.cuda.ExternalStream(self._stream.handle, device=self._context.device.index)
        stack.enter_context(self.torch.cuda.stream(stream))
        return stack


class TorchRunner(_OnGpu):
    """A torch module on the GPU, as it is: eager, without gradients.

    Attributes:
        library: The library and its version.
        parameter_bytes: The size of its parameters and buffers.
    """

    def __init__(self, spec: str, *, device: int = 0) -> None:
        """Load what a factory returns.

        Args:
            spec: ``MODULE:FACTORY`` or ``FILE.py:FACTORY``, as `graphopt.export` takes it.
            device: Which GPU.

        Raises:
            BadInput: The factory cannot be used.
            MissingDependency: torch is not installed, was built without CUDA, or its CUDA does not start.
            NoGpu: There is no GPU.
        """
        from graphopt.exporting.factory import call_factory, load_factory, require_torch

        require_torch()
        find_torch()
        super().__init__(device)
        example = call_factory(load_factory(spec), spec)
        self.path = Path(spec)
        self._torch = TorchStream(self.context, self.stream)
        self.library = f"torch {self._torch.version}, CUDA"
        self._module: Any = example.module.to(f"cuda:{device}")
        self.parameter_bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in (*self._module.parameters(), *self._module.buffers())
        )
        self.inputs = tuple(
            TensorSpec(
                name,
                np.dtype(_numpy_name(tensor.dtype)),
                tuple(example.axes.get(name, {}).get(axis, size) for axis, size in enumerate(tensor.shape)),
            )
            for name, tensor in example.inputs.items()
        )
        self.outputs = ()
        self.names: list[str] | None = None

    def program(self, feeds: Mapping[str, Any]) -> Program:
        """The module on fixed inputs. Its outputs are copied to where they stay: it makes new ones each time."""
        names = [spec.name for spec in self.inputs]
        missing = [name for name in names if name not in feeds]
        if missing:
            raise BadInput("no value was given", where=f"input '{missing[0]}'")
        inputs = {name: arrays.upload(self.context, np.asarray(feeds[name])) for name in names}
        tensors = {name: self._torch.tensor(array) for name, array in inputs.items()}
        with self._torch.current():
            first = _flat(self._module(**tensors))
        self.stream.synchronize()
        labels = self.names if self.names is not None else [f"output_{index}" for index in range(len(first))]
        if len(labels) != len(first):
            raise BadInput(f"gives {len(first)} outputs, and the models {len(labels)}", where=str(self.path))
        outputs = {
            name: arrays.allocate(self.context, tuple(tensor.shape), _numpy_name(tensor.dtype))
            for name, tensor in zip(labels, first, strict=True)
        }
        targets = [self._torch.tensor(array) for array in outputs.values()]

        def enqueue() -> None:
            with self._torch.current():
                for target, made in zip(targets, _flat(self._module(**tensors)), strict=True):
                    target.copy_(made)

        return Program(self.context, self.stream, inputs, outputs, enqueue, held=(self, tensors, targets))


def _flat(value: Any) -> list[Any]:
    """The tensors of what a module returns, in the order that the exporter gives them."""
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _flat(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _flat(item)]
    return [] if value is None else [value]


def _numpy_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"float": "float32", "half": "float16", "long": "int64"}.get(name, name)
