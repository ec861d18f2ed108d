"""One build from beginning to end, with the library passed in: tensorrt 10.9 or newer, 11.x, tensorrt_rtx.

Runs in the child; `graphopt.engines.child.worker` is its entry.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from graphopt.engines.child.configuring import TimingCache, add_options, add_profiles, check_version
from graphopt.engines.child.parsing import NOISE, parse
from graphopt.engines.child.requests import BuildFailed, Request
from graphopt.engines.child.worker import describe_gpu, peak_rss_bytes, write_answer
from graphopt.engines.options import BuildOptions
from graphopt.errors import BadInput, GraphoptError

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
# The library's names of element types, where they are not numpy's in capitals.
_TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "float8e4m3fn", "fp4": "float4e2m1"}


def build(trt: Any, request: Request, log: IO[str]) -> dict[str, Any]:
    """Parse, build and write one engine with ``trt``; asked about its layers where there is a GPU.

    Raises:
        BuildFailed: The library refuses the model or an option.
        OSError: The engine cannot be written.
    """
    version = check_version(trt, request)
    options = BuildOptions.from_json(request.options)
    gpu = describe_gpu()
    logger = make_logger(trt, log)
    started = time.perf_counter()
    trt.init_libnvinfer_plugins(logger, "")
    _register(trt, request)
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the factory returned nothing
        raise BuildFailed(
            f"{request.title} does not start: {logger.last_error or error}",
            "it needs a GPU; --backend tensorrt-rtx builds without one" if gpu is None else None,
        ) from error
    # Options first: a wrong one is told before a large model is read.
    config = builder.create_builder_config()
    add_options(trt, config, options, request, None if gpu is None else gpu[0])
    cache = None if options.timing_cache is None else TimingCache(config, logger, options.timing_cache)
    network = builder.create_network(_network_flags(trt, request))
    parser = _telling(lambda: parse(trt, network, logger, request), request)
    add_profiles(builder, network, config, request)
    with Path(request.progress).open("w", buffering=1) as progress:
        # Kept by name: the library calls it from its own threads while it builds.
        monitor = make_monitor(trt, progress) if hasattr(config, "progress_monitor") else None
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        _telling(lambda: _refuse(request, logger, options), request)
    del parser, monitor  # only now: the network's weights are the parser's
    seconds = time.perf_counter() - started
    with Path(request.engine).open("wb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())  # it is renamed over the target next
    if cache is not None:
        cache.save()
    answer = {
        "version": version,
        "seconds": seconds,
        "bytes": int(plan.nbytes),
        "layers": int(network.num_layers),
        "inputs": _describe(network.get_input, network.num_inputs),
        "outputs": _describe(network.get_output, network.num_outputs),
        "peak_rss_bytes": peak_rss_bytes(),
        "gpu": None if gpu is None else gpu[0],
        "compute_capability": None if gpu is None else f"{gpu[1][0]}.{gpu[1][1]}",
        "notes": [cache.note] if cache is not None and cache.note else [],
        "inspection": None,
        "not_inspected": "the library crashed when it was asked about the engine's layers",
    }
    # Written before the engine is opened: should that crash, there is an engine all the same.
    write_answer(request.answer, answer)
    return {**answer, **_inspect(trt, plan, logger, options, gpu is not None)}


def _register(trt: Any, request: Request) -> None:
    """Make the library know the ops of the plugin nodes in the model."""
    if not request.plugins:
        return
    from graphopt.engines.plugins.qdp import register_modules

    try:
        register_modules(trt, request.plugins["modules"], request.plugins["architecture"])
    except GraphoptError as error:
        raise BuildFailed(error.what, error.hint, bad_input=isinstance(error, BadInput)) from error


def _telling(step: Callable[[], Any], request: Request) -> Any:
    """Do a step; where it fails, an exception inside one of our plugin callbacks is the reason to tell."""
    try:
        return step()
    except BuildFailed as error:
        if request.plugins:
            from graphopt.engines.plugins.qdp import last_error

            if reason := last_error():
                raise BuildFailed(reason, "a fault of graphopt's plugin; --plugins never builds without") from error
        raise


def _network_flags(trt: Any, request: Request) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(kinds.STRONGLY_TYPED)  # 10.x must be told; 11 and RTX know nothing else
    if request.plugins and hasattr(kinds, "PREFER_AOT_PYTHON_PLUGINS"):
        flags |= 1 << int(kinds.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def _refuse(request: Request, logger: Any, options: BuildOptions) -> None:
    reason = logger.last_error or "no reason given"
    hint = "--verbose shows its log"
    if "workspace" in reason.lower() and options.workspace is not None:
        hint = "give more --workspace"
    raise BuildFailed(f"{request.title} could not build the engine: {reason}", hint)


def _describe(get: Any, count: int) -> list[dict[str, Any]]:
    """The network's inputs or outputs: name, element type, shape (-1 where it varies)."""
    tensors = [get(index) for index in range(count)]
    return [
        {
            "name": tensor.name,
            "dtype": _TYPES.get(tensor.dtype.name.lower(), tensor.dtype.name.lower()),
            "shape": _axes(tensor),
        }
        for tensor in tensors
    ]


def _axes(tensor: Any) -> list[int] | None:
    try:
        return [int(size) for size in tensor.shape]
    except ValueError:  # the rank of an output can depend on values
        return None


def _inspect(trt: Any, plan: Any, logger: Any, options: BuildOptions, has_gpu: bool) -> dict[str, Any]:
    """What the engine inspector says, as it says it, or why it was not asked."""
    if not has_gpu:
        return {"not_inspected": "an engine is opened on a GPU only, and there is none here"}
    runtime = trt.Runtime(logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # our own engine, which brings its runtime
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return {"not_inspected": f"the engine does not open here: {logger.last_error or 'no reason given'}"}
    inspector = engine.create_engine_inspector()
    told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return {"inspection": told, "not_inspected": ""}


def make_logger(trt: Any, log: IO[str]) -> Any:
    """An ``ILogger`` that writes a line each, without what is only the failed look for a GPU."""
    names = {getattr(trt.ILogger.Severity, name, None): name for name in SEVERITIES}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""
            self.warnings = 0

        def log(self, severity: Any, message: str) -> None:
            name = names.get(severity)
            if name is None or any(noise in message for noise in NOISE):
                return
            line = " ".join(message.split())
            if name.endswith("ERROR") and line:
                self.last_error = line
            self.warnings += name != "INFO"
            log.write(f"{name.lower()}: {line}\n")

    return Logger()


def make_monitor(trt: Any, file: IO[str]) -> Any:
    """An ``IProgressMonitor`` that writes what happens, a JSON object a line; several threads may call it.

    It stops the build when the parent is gone: nobody would look at the engine.
    """
    parent = os.getppid()
    lock = threading.Lock()

    def write(**said: Any) -> None:
        with lock:
            file.write(json.dumps(said) + "\n")

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            write(start=phase_name, within=parent_phase or "", steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            write(step=step, of=phase_name)
            return os.getppid() == parent

        def phase_finish(self, phase_name: str) -> None:
            write(finish=phase_name)

    return Monitor()
