"""The child process that builds one engine: ``python -P worker.py REQUEST.json``. Imports no graphopt.

The libraries can abort or segfault; nothing here may be needed by the parent afterwards but the files named
in the request: the log (one line each, flushed), the answer (JSON), the engine.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")

# On a machine without a GPU every message may be followed by the library's own failed look for one.
NOISE = ("cudaError 35", "CUDA initialization failure", "catchCudaError")


class BuildFailed(Exception):
    """The library refused. The text is one line for the user; the hint says what to do."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint


def main(request_path: str) -> int:
    """Build what the request says; returns 0, or 1 where the answer holds an error."""
    request: dict[str, Any] = json.loads(Path(request_path).read_text())
    with Path(request["log"]).open("w", buffering=1) as log:
        try:
            answer = build(import_first(request["modules"]), request, log)
        except BuildFailed as error:
            answer = {"error": str(error), "hint": error.hint}
        except OSError as error:
            answer = {"error": f"cannot write {error.filename}: {error.strerror}", "hint": None}
    Path(request["answer"]).write_text(json.dumps(answer))
    return 1 if "error" in answer else 0


def import_first(modules: list[str]) -> Any:
    """The first of ``modules`` that imports. Raises BuildFailed with the last reason."""
    reason = "not installed"
    for name in modules:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                reason = str(error)
        except Exception as error:  # a library that does not load raises OSError, RuntimeError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise BuildFailed(f"cannot load {modules[0]}: {reason}")


def build(trt: Any, request: dict[str, Any], log: IO[str]) -> dict[str, Any]:
    """Parse, build and write one engine with ``trt``: tensorrt 10.9 or newer, 11.x, or tensorrt_rtx.

    Raises:
        BuildFailed: The library refuses the model.
        OSError: The engine cannot be written.
    """
    version = str(trt.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < tuple(request["oldest"]):
        oldest = ".".join(map(str, request["oldest"]))
        raise BuildFailed(f"{request['title']} {version} is too old", f"{oldest} or newer is needed")
    logger = _make_logger(trt, log)
    started = time.perf_counter()
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the factory returned nothing
        raise BuildFailed(
            f"{request['title']} does not start: {logger.last_error or error}",
            "it needs a GPU; --backend tensorrt-rtx builds without one" if not find_gpu() else None,
        ) from error
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(kinds.STRONGLY_TYPED)  # 10.x must be told; 11 and RTX know nothing else
    if hasattr(kinds, "PREFER_AOT_PYTHON_PLUGINS"):
        flags |= 1 << int(kinds.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if hasattr(trt.OnnxParserFlag, "NATIVE_INSTANCENORM"):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    # The path given with the bytes is where external data is looked for, beside the original.
    content = Path(request["model"]).read_bytes()
    if not parser.parse(content, request["beside"]):
        raise _parse_failure(parser, request, logger)
    del content
    config = builder.create_builder_config()
    _add_profile(builder, network, config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(
            f"{request['title']} could not build the engine: {logger.last_error or 'no reason given'}",
            "--verbose shows its log",
        )
    seconds = time.perf_counter() - started
    with Path(request["engine"]).open("wb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())  # it is renamed over the target next
    return {
        "version": version,
        "seconds": seconds,
        "bytes": int(plan.nbytes),
        "layers": int(network.num_layers),
        "peak_rss_bytes": peak_rss_bytes(),
        "gpu": find_gpu(),
    }


def _make_logger(trt: Any, log: IO[str]) -> Any:
    names = {getattr(trt.ILogger.Severity, name, None): name for name in SEVERITIES}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            name = names.get(severity)
            if name is None or any(noise in message for noise in NOISE):
                return
            line = " ".join(message.split())
            if name.endswith("ERROR") and line:
                self.last_error = line
            log.write(f"{name.lower()}: {line}\n")

    return Logger()


_HINTS = {
    "MatMulInteger": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "ConvInteger": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "QLinearMatMul": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "QLinearConv": "int8 for TensorRT is written with QuantizeLinear and DequantizeLinear pairs",
    "DynamicQuantizeLinear": "TensorRT quantises with fixed scales: QuantizeLinear and DequantizeLinear pairs",
    "Non-zero zero point": "quantise symmetrically: all zero points 0",
    "same input types": "types do not mix: insert Cast",
    "int32": "MatMul takes floating-point inputs: insert Cast",
}


def _parse_failure(parser: Any, request: dict[str, Any], logger: Any) -> BuildFailed:
    title = request["title"]
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    # Parsers name a node once for each level it fails at; the first is the one with the reason.
    first_of = {(error.node_name(), error.node_operator()): error for error in reversed(errors)}
    real = [e for e in reversed(first_of.values()) if not any(noise in e.desc() for noise in NOISE)]
    if not real:
        return BuildFailed(f"{title} cannot read the model: {logger.last_error or 'no reason given'}")
    error = real[0]
    operator, name, text = error.node_operator(), error.node_name(), " ".join(error.desc().split())
    hint = next((tip for key, tip in _HINTS.items() if key in (operator, text) or key in text), None)
    if operator in request["runtime_operators"]:
        hint = f"{operator} is ONNX Runtime's own: optimize with --target {request['target']}, which uses none of those"
    if "Plugin not found" in text:
        what = f"{title} has no operator {operator!r}"
        hint = hint or "a custom operator needs a plugin, or a function body of standard operators"
    elif text in ("", "false"):
        what = f"{title} does not support {operator}"
    else:
        text = text.removeprefix("Assertion failed: ").removeprefix("In node ")
        what = f"{title} refuses {operator or 'the model'}: {text[:300]}"
    others = len(real) - 1
    more = f" (and {others} more node{'s' if others > 1 else ''})" if others else ""
    place = f"node {name!r}: " if name else ""
    return BuildFailed(f"{place}{what}{more}", hint)


def _add_profile(builder: Any, network: Any, config: Any, request: dict[str, Any]) -> None:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise BuildFailed(
                f"the input {tensor.name!r} decides a shape; {request['title']} needs its range of values",
                "make it a constant of the model, or an axis of another input",
            )
    profiles: dict[str, dict[str, list[int]]] = request["profiles"]
    if not profiles:
        return
    profile = builder.create_optimization_profile()
    parsed = {network.get_input(index).name for index in range(network.num_inputs)}
    for name, shapes in profiles.items():
        if name in parsed:  # the parser drops inputs that nothing consumes
            profile.set_shape(name, tuple(shapes["min"]), tuple(shapes["opt"]), tuple(shapes["max"]))
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailed(f"{request['title']} refuses the shapes", "--verbose shows its log")


def peak_rss_bytes() -> int | None:
    """This process's largest resident size. (getrusage would count the parent's, which vfork shares.)"""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def find_gpu() -> str | None:
    """The name of the first GPU that the driver sees, or None."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, 256, device):
        return None
    return name.value.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
