"""A library with TensorRT's API that builds nothing: it enforces the contract, and writes down what it was told.

What a version has is read from its real bindings (`read_api`): anything else is an AttributeError, as there; and what
the documentation asks for beyond that (order of calls, what must be kept alive, who may be called from which thread)
is a `Breach`. Failures are the real ones: None, False, -1 and a line in the log, hardly ever an exception.

It cannot show that an engine is right, fast, or built at all. It shows that the calls are ones that the library has.
"""

from __future__ import annotations

import json
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.engines.fake_backend.facts import Breach, checked, facts_of, known_anywhere, make_enum

MAGIC = b"FAKEPLAN"
CACHE = b"FAKECACHE"
_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 6: "INT32", 7: "INT64", 3: "INT8", 9: "BOOL", 2: "UINT8"}
_GPU = "fake GPU"


def make_library(version: str, *, faults: Iterable[str] = ()) -> types.ModuleType:
    """A module that plays one version, such as ``tensorrt 11.4`` or ``tensorrt-rtx 1.7``.

    Args:
        version: One of `facts.versions`.
        faults: What goes wrong: ``builder`` (there is none), ``build`` (None), ``deserialize`` (None), ``inspector``
            (the process aborts), ``capability`` (refused).
    """
    number, facts, functions = facts_of(version)
    wrong = frozenset(faults)
    rtx = version.startswith("tensorrt-rtx")
    module = types.ModuleType(version.replace(" ", "_").replace(".", "_"))
    classes: dict[str, type] = {}
    calls: list[tuple[str, tuple[Any, ...]]] = []
    module.__dict__.update({"__version__": number, "calls": calls})
    enums = {name: make_enum(name, known.members) for name, known in facts.items() if known.members}
    for name, members in enums.items():
        classes[name] = members
        if "." not in name:
            setattr(module, name, members)

    def note(what: str, *details: Any) -> None:
        calls.append((what, details))

    class Base:
        """What every object of the library does: it has what the version has, and nothing else."""

        def __getattr__(self, name: str) -> Any:
            cls = type(self).__name__
            known = facts.get(cls)
            if known is not None and (name in known.methods or name in known.properties):
                raise Breach(f"the fake does not play {cls}.{name}")
            raise AttributeError(f"{cls!r} object has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            cls = type(self).__name__
            known = facts.get(cls)
            if type(self).__module__ != __name__ or known is None or name.startswith("_"):  # a subclass's, or ours
                object.__setattr__(self, name, value)
                return
            if name not in known.properties:
                raise AttributeError(f"{cls!r} object has no attribute {name!r}")
            if not known.properties[name]:
                raise AttributeError(f"can't set attribute {name!r} of {cls!r}")
            object.__setattr__(self, name, value)

    class ILogger(Base):
        Severity = enums["ILogger.Severity"]

        def __init__(self) -> None:
            self._made = True

        def log(self, severity: Any, msg: str) -> None:
            raise Breach("ILogger.log is pure virtual")

    class IProgressMonitor(Base):
        def __init__(self) -> None:
            self._made = True

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            raise Breach("IProgressMonitor.phase_start is pure virtual")

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise Breach("IProgressMonitor.step_complete is pure virtual")

        def phase_finish(self, phase_name: str) -> None:
            raise Breach("IProgressMonitor.phase_finish is pure virtual")

    def say(logger: Any, severity: str, text: str) -> None:
        logger.log(ILogger.Severity[severity], text)

    class IHostMemory(bytes):
        nbytes = property(len)

    class ITensor(Base):
        def __init__(self, name: str, kind: int, shape: tuple[int, ...], deciding: bool) -> None:
            self._tensor = (name, kind, shape, deciding)

        name = property(lambda self: self._tensor[0])
        dtype = property(lambda self: enums["DataType"][_TYPES[self._tensor[1]]])
        shape = property(lambda self: self._tensor[2])
        is_shape_tensor = property(lambda self: self._tensor[3])

    class ParserError(Base):
        def __init__(self, node: str, operator: str, text: str) -> None:
            self._told = (node, operator, text)

        def node_name(self) -> str:
            return self._told[0]

        def node_operator(self) -> str:
            return self._told[1]

        def desc(self) -> str:
            return self._told[2]

    class INetworkDefinition(Base):
        def __init__(self, builder: Any, flags: int) -> None:
            self._builder, self._flags = builder, flags
            self._inputs: list[Any] = []
            self._outputs: list[Any] = []
            self._nodes: list[Any] = []
            self._parser: Any = None

        num_inputs = property(lambda self: len(self._inputs))
        num_outputs = property(lambda self: len(self._outputs))
        num_layers = property(lambda self: len(self._nodes))

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_output(self, index: int) -> Any:
            return self._outputs[index]

    class OnnxParser(Base):
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._logger = network, made(logger)
            self._errors: list[Any] = []
            self._used = False
            # The network's weights lie in the parser; the bindings do not keep it alive for the network.
            network._parser = weakref.ref(self)

        num_errors = property(lambda self: len(self._errors))

        def set_flag(self, flag: Any) -> None:
            note("OnnxParser.set_flag", flag.name)

        def get_error(self, index: int) -> Any:
            return self._errors[index]

        def parse_from_file(self, model: str) -> bool:
            if self._used:
                raise Breach("one parser parses once")
            self._used = True
            note("OnnxParser.parse_from_file", model)
            return self._read(Path(model).read_bytes(), Path(model).parent)

        def parse(self, model: Any, path: str | None = None) -> bool:
            if self._used:
                raise Breach("one parser parses once")
            self._used = True
            note("OnnxParser.parse", path)
            return self._read(bytes(model), Path(path or ".").parent)

        def _read(self, content: bytes, folder: Path) -> bool:
            import onnx

            graph = onnx.load_model_from_string(content).graph
            if not module.__dict__.get("allow_functions") and onnx.load_model_from_string(content).functions:
                raise Breach("the parser miscompiles legal uses of functions: inline them")
            for tensor in graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location" and not (folder / entry.value).is_file():
                        self._errors.append(ParserError("", "", f"Failed to import initializer: {tensor.name}"))
            weights = {tensor.name for tensor in graph.initializer}
            deciding = {node.input[1] for node in graph.node if node.op_type in ("Reshape", "Expand", "Tile")}
            for node in graph.node:
                if node.op_type == "Unsupported":
                    text = f"In node {len(self._errors)} with name: {node.name}: Plugin not found, are the names right?"
                    self._errors.append(ParserError(node.name, node.op_type, text))
            network = self._network
            for value in graph.input:
                if value.name not in weights:
                    network._inputs.append(ITensor(*_described(value), value.name in deciding))
            network._outputs += [ITensor(*_described(value), False) for value in graph.output]
            network._nodes += list(graph.node)
            return not self._errors

    class IOptimizationProfile(Base):
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}
            self._values: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = _ordered(input, min, opt, max)

        def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._values[input] = _ordered(input, min, opt, max)

    class ITimingCache(Base):
        def __init__(self, entries: dict[str, str], gpu: str) -> None:
            self._entries, self._gpu = entries, gpu

        def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
            _no_op(rtx)
            if input_cache._gpu != self._gpu and not ignore_mismatch:
                return False
            self._entries = {**input_cache._entries, **self._entries}
            return True

        def serialize(self) -> Any:
            _no_op(rtx)
            return IHostMemory(CACHE + json.dumps([number, self._gpu, self._entries]).encode())

    class IBuilderConfig(Base):
        def __init__(self, logger: Any) -> None:
            self._logger = logger
            self._flags: set[str] = set()
            self._pools: dict[str, int] = {}
            self._profiles: list[Any] = []
            self._cache: Any = None
            self._capabilities: list[str] = []
            self._settings: dict[str, Any] = {}

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag.name)

        def get_flag(self, flag: Any) -> bool:
            return flag.name in self._flags

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            if pool_size < 1:
                raise Breach("a pool of nothing")
            self._pools[pool.name] = pool_size

        def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
            _no_op(rtx)
            content = bytes(serialized_timing_cache)
            if not content:
                return ITimingCache({}, _GPU)
            if not content.startswith(CACHE):
                say(self._logger, "WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.")
                return ITimingCache({}, _GPU)
            made_by, gpu, entries = json.loads(content[len(CACHE) :])
            if made_by != number:
                say(self._logger, "WARNING", "The timing cache will not be used!")
                return ITimingCache({}, _GPU)
            return ITimingCache(entries, gpu)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            _no_op(rtx)
            if cache._gpu != _GPU and not ignore_mismatch:
                say(self._logger, "ERROR", "the timing cache is of another device")
                return False
            self._cache = weakref.ref(cache)  # it must not be destroyed until the engine is built
            return True

        def get_timing_cache(self) -> Any:
            _no_op(rtx)
            return None if self._cache is None else self._cache()

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
            if not 0 <= index < self._settings.get("num_compute_capabilities", 0):
                raise Breach("set_compute_capability before num_compute_capabilities")
            if "capability" in wrong:
                return False
            self._capabilities.append(compute_capability.name)
            return True

        builder_optimization_level = _setting("builder_optimization_level", int, note)
        hardware_compatibility_level = _setting(
            "hardware_compatibility_level", enums["HardwareCompatibilityLevel"], note
        )
        profiling_verbosity = _setting("profiling_verbosity", enums["ProfilingVerbosity"], note)
        num_compute_capabilities = _setting("num_compute_capabilities", int, note)
        progress_monitor = _setting("progress_monitor", IProgressMonitor, note)

    class Builder(Base):
        def __init__(self, logger: Any) -> None:
            self._logger = made(logger)
            if "builder" in wrong:
                say(logger, "ERROR", "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> Any:
            known = sum(1 << kind.value for kind in enums["NetworkDefinitionCreationFlag"])
            if flags & ~known:
                raise Breach(f"network creation flags {flags:b} that {version} does not have")
            note("Builder.create_network", flags)
            return INetworkDefinition(self, flags)

        def create_builder_config(self) -> Any:
            return IBuilderConfig(self._logger)

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            if network._parser is None or network._parser() is None:
                raise Breach("the parser must live until the engine is built: the weights are its")
            if config._cache is not None and config._cache() is None:
                raise Breach("the timing cache must live until the engine is built")
            if rtx and config._settings.get("hardware_compatibility_level") is not None:
                say(self._logger, "WARNING", "setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX.")
            if error := _unprofiled(network, config):
                say(self._logger, "ERROR", error)
                return None
            say(self._logger, "INFO", "Detected some inputs and outputs.")
            if not _run_phases(config._settings.get("progress_monitor")):
                say(self._logger, "ERROR", "the build was cancelled")
                return None
            if "build" in wrong:
                say(self._logger, "ERROR", "no tactics to implement the operation within workspace limit")
                return None
            if config._cache is not None:
                config._cache()._entries.update({node.name: "timed" for node in network._nodes})
            plan = {
                "version": number,
                "network_flags": network._flags,
                "flags": sorted(config._flags),
                "pools": config._pools,
                "settings": {name: _name_of(value) for name, value in config._settings.items()},
                "capabilities": config._capabilities,
                "profiles": [{"shapes": one._shapes, "values": one._values} for one in config._profiles],
                "layers": [[node.name or node.op_type, _layer_type(node)] for node in network._nodes],
                "io": [t.name for t in (*network._inputs, *network._outputs)],
            }
            return IHostMemory(MAGIC + json.dumps(plan).encode())

    class EngineInspector(Base):
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def get_engine_information(self, format: Any) -> str:
            if "inspector" in wrong:
                import os

                os.abort()
            if format.name != "JSON":
                raise Breach("the inspector's JSON is what is parsed")
            return _inspector_text(self._engine._plan, split=rtx or number.startswith("11"))

    class ICudaEngine(Base):
        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan = plan

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self)

    class Runtime(Base):
        def __init__(self, logger: Any) -> None:
            self._logger = made(logger)
            self._host_code = False

        def _allow(self, value: bool) -> None:
            self._host_code = bool(value)

        engine_host_code_allowed = property(lambda self: self._host_code, _allow)

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            content = bytes(serialized_engine)
            plan = json.loads(content[len(MAGIC) :]) if content.startswith(MAGIC) else None
            if plan is None or "deserialize" in wrong:
                say(self._logger, "ERROR", "cannot deserialize")
                return None
            if "VERSION_COMPATIBLE" in plan["flags"] and not self._host_code:
                say(self._logger, "ERROR", "the engine brings its runtime, and host code is not allowed")
                return None
            return ICudaEngine(plan)

    IHostMemory.__qualname__ = "IHostMemory"
    played = (
        *(ILogger, IProgressMonitor, ITensor, ParserError, INetworkDefinition, OnnxParser, IOptimizationProfile),
        *(ITimingCache, IBuilderConfig, Builder, EngineInspector, ICudaEngine, Runtime, IHostMemory),
    )
    for cls in played:
        classes[cls.__name__] = cls
        setattr(module, cls.__name__, cls)
    for cls in played:
        _restrict(cls, facts, classes, note)
    if "init_libnvinfer_plugins" in functions:
        module.__dict__["init_libnvinfer_plugins"] = lambda logger, namespace: note("init plugins", namespace)
    return module


def _restrict(cls: type, facts: Any, classes: dict[str, type], note: Callable[..., None]) -> None:
    """Take from a class what the version lacks, and let the rest take only what its signatures say."""
    known = facts[cls.__name__]
    anywhere = known_anywhere(cls.__name__)
    for name, value in list(vars(cls).items()):
        if name.startswith("_") or (cls.__name__ == "ILogger" and name == "Severity"):
            continue
        if name not in anywhere:
            raise Breach(f"no version has {cls.__name__}.{name}")
        if name not in known.methods and name not in known.properties:
            delattr(cls, name)
        elif name in known.methods and known.methods[name] and cls.__name__ not in ("ILogger", "IProgressMonitor"):
            setattr(cls, name, checked(cls.__name__, name, known.methods[name], value, classes))
    if (signatures := known.methods.get("__init__")) and cls.__name__ in ("Builder", "OnnxParser", "Runtime"):
        cls.__init__ = checked(cls.__name__, "__init__", signatures, cls.__init__, classes)  # type: ignore[misc]


def made(thing: Any) -> Any:
    """A subclass whose ``__init__`` does not call the base's has no C++ object behind it."""
    if not vars(thing).get("_made"):
        raise TypeError(f"{type(thing).__name__}.__init__() must be called when overriding __init__")
    return thing


def _setting(name: str, kind: type, note: Callable[..., None]) -> property:
    def put(self: Any, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: {value!r}")
        if name == "progress_monitor":
            made(value)
        note(f"IBuilderConfig.{name} =", _name_of(value))
        self._settings[name] = value

    return property(lambda self: self._settings.get(name), put)


def _no_op(rtx: bool) -> None:
    if rtx:
        warnings.warn("Timing cache operations are no-ops in TensorRT-RTX.", DeprecationWarning, stacklevel=3)


def _name_of(value: Any) -> Any:
    return getattr(value, "name", value if isinstance(value, (int, str)) else type(value).__name__)


def _layer_type(node: Any) -> str:
    named = any(attribute.name == "plugin_namespace" for attribute in node.attribute)
    return "PluginV3" if named else str(node.op_type)


def _described(value: Any) -> tuple[str, int, tuple[int, ...]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, tuple(d.dim_value if d.dim_value else -1 for d in tensor.shape.dim)


def _ordered(name: str, low: Any, best: Any, high: Any) -> list[list[int]]:
    rows = [list(low), list(best), list(high)]
    if not len(rows[0]) == len(rows[1]) == len(rows[2]) or any(not a <= b <= c for a, b, c in zip(*rows, strict=True)):
        raise ValueError(f"inconsistent dimensions of {name}")
    return rows


def _unprofiled(network: Any, config: Any) -> str:
    """Why the profiles do not serve the network; nothing where they do."""
    for tensor in network._inputs:
        dynamic = -1 in tensor.shape
        if (dynamic or tensor.is_shape_tensor) and not config._profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        for profile in config._profiles:
            if tensor.is_shape_tensor and tensor.name not in profile._values:
                return f"the profile lacks the values of {tensor.name}"
            if not dynamic:
                continue
            shapes = profile._shapes.get(tensor.name)
            if shapes is None or any(len(shape) != len(tensor.shape) for shape in shapes):
                return f"the profile lacks shapes of {tensor.name}"
            if any(size not in (-1, n) for shape in shapes for size, n in zip(tensor.shape, shape, strict=True)):
                return f"the profile contradicts the shape of {tensor.name}"
    unknown = {name for profile in config._profiles for name in profile._shapes} - {t.name for t in network._inputs}
    return f"the profile names no input: {unknown}" if unknown else ""


def _run_phases(monitor: Any) -> bool:
    """Tell a monitor what the real ones are told, from another thread, as the documentation warns."""
    if monitor is None:
        return True
    answers: list[bool] = []

    def run() -> None:
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Optimizing", "Building engine", 2)
        answers.extend(monitor.step_complete("Optimizing", step) for step in range(2))
        monitor.phase_finish("Optimizing")
        answers.extend(monitor.step_complete("Building engine", step) for step in range(2))
        monitor.phase_finish("Building engine")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if len(answers) != 4 or not all(isinstance(answer, bool) for answer in answers):
        raise Breach("IProgressMonitor.step_complete answers whether to go on")
    return all(answers)


def _inspector_text(plan: dict[str, Any], *, split: bool) -> str:
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [2, 3]}
    kind = {"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"} if split else {}
    kind = kind or {"Format/Datatype": "Row major linear FP32 format"}
    layers: list[Any] = [
        {
            "Name": name,
            "LayerType": operator,
            "Inputs": [{**tensor, **kind}],
            "Outputs": [{**tensor, **kind}],
            "TacticName": "fake_tactic",
            "TacticValue": "0x1",
            "Metadata": f"[ONNX Layer: {name}]",
        }
        for name, operator in plan["layers"]
    ]
    if plan["settings"].get("profiling_verbosity") != "DETAILED":
        layers = [name for name, _ in plan["layers"]]
    listed = {"I/O Tensors": [{"Name": name} for name in plan["io"]]} if split else {"Bindings": plan["io"]}
    return json.dumps({"Layers": layers, **listed})
