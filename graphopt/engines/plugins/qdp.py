"""Registers plugins with TensorRT: its quickly deployable plugins, compiled ahead of time, 10.9 to 11.x.

A build calls the functions that are made here, in this order: what the outputs are (first with shapes that only have a
rank), which element types and tactics there are, then for each tactic the PTX with its grid and scalars as
expressions of the shapes. The PTX and the expressions go into the engine, which needs no Python afterwards.

What single versions get wrong, and what is done about it:

* 10.14: plugins of this kind are known to fail when built. Before 10.9 there are none that are compiled ahead of time.
  Both are refused by name.
* 10.9 to 11.0 with numpy 2.4 and later: attributes that are one number cannot be read; every attribute is declared as
  an array.
* 10.9 to 11.0 with Python 3.13 and later: ``NDArray[...]`` in a signature is asked whether it is a subclass, and is no
  class; `array_type` is one, with what tensorrt.plugin looks for in an ``NDArray``.
* 10.9 to 10.15 with numpy 2 and later: of an attribute with several numbers the first arrives, repeated. Whether it is
  so is asked of the bindings; a node with such an attribute is refused there (PivotLinear has none).
* 10.9 and later until the middle of 10.x: the expressions of one node stay behind when the next node is asked for its
  types; no constant is made then.
* All: an engine keeps one more copy of each plugin's code on the GPU whenever a context's shapes change
  (NVIDIA/TensorRT#4849, seen on 11.1 and 11.2, open); see `LEAK` and `buckets`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import GenericAlias, ModuleType
from typing import Any

import numpy as np

from graphopt.engines.plugins import Attributes, Lowered, Plugin, Types, find_plugins, load_plugin
from graphopt.errors import BadInput, GraphoptError
from graphopt.kernels.kernel import ARCHITECTURES, Kernel

OLDEST = (10, 9)
BROKEN = {(10, 14): "this kind is known to fail in it"}
DEFAULT_ARCHITECTURE = "compute_80"
"""PTX for it runs on every GPU since Ampere."""
BUCKETS = (1, 2, 4, 8, 16)
MOST_BUCKETS = 32
LEAK = (
    "the shapes are dynamic and the engine has plugins: TensorRT keeps one more copy of each plugin's code on the GPU "
    "whenever the shapes of a context change (NVIDIA/TensorRT#4849); use static shapes, or buckets with a context each"
)
_MOST_INT32 = 2**31 - 1

# As tensorrt.plugin's autotune spells them, and as trt.DataType does.
_TUNE_NAMES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32"}
_TUNE_NAMES["int64"] = "INT64"
_DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32"}
_DATA_TYPES["int64"] = "INT64"
_NAMES = {name: dtype for dtype, name in _DATA_TYPES.items()}

_errors: list[str] = []


# -- versions ----------------------------------------------------------------------------------------------------------


def refuse_version(version: str) -> None:
    """Refuse a TensorRT whose plugins do not work.

    Args:
        version: As ``tensorrt.__version__`` says it.

    Raises:
        BadInput: It is too old, or one with a known fault.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise BadInput(f"{version!r} is no version of TensorRT")
    pair = int(found[1]), int(found[2])
    if pair < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        what = f"TensorRT {version} has no plugins that are compiled ahead of time"
        raise BadInput(what, hint=f"{oldest} or newer, or --plugins never")
    if pair in BROKEN:
        what = f"TensorRT {version} cannot build plugins: {BROKEN[pair]}"
        raise BadInput(what, hint=f"{pair[0]}.{pair[1] + 1} or newer, or --plugins never")


def architecture_for(capability: tuple[int, int] | None) -> str:
    """What to compile for: the newest architecture that a GPU runs; without a GPU one that all since Ampere run.

    Args:
        capability: The GPU's compute capability, e.g. (8, 9).

    Raises:
        BadInput: The GPU is older than any of them.
    """
    if capability is None:
        return DEFAULT_ARCHITECTURE
    number = 10 * capability[0] + capability[1]
    runs = [name for name in ARCHITECTURES if int(name.removeprefix("compute_")) <= number]
    if not runs:
        told = ".".join(map(str, capability))
        raise BadInput(f"plugins need compute capability 8.0 or newer; the GPU has {told}", hint="--plugins never")
    return max(runs, key=lambda name: int(name.removeprefix("compute_")))


def plugin_layer(trt: ModuleType) -> Any:
    """The module ``tensorrt.plugin`` of a TensorRT, imported.

    Its files import ``tensorrt``; where only the bindings are installed, that becomes another name of theirs.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_bindings``.

    Raises:
        BadInput: This TensorRT's plugins do not work, or it has none.
    """
    refuse_version(str(getattr(trt, "__version__", "")))
    sys.modules.setdefault("tensorrt", trt)
    try:
        return importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise BadInput(f"TensorRT {trt.__version__} has no plugins: {error}", hint="--plugins never") from error


# -- registration ------------------------------------------------------------------------------------------------------


def register_modules(trt: ModuleType, modules: Sequence[str], architecture: str = DEFAULT_ARCHITECTURE) -> list[str]:
    """Register the plugins that modules declare; the process can then parse and build their nodes.

    Returns:
        Their names in TensorRT's registry, e.g. ``graphopt_trt::PivotLinear``.

    Raises:
        BadInput: This TensorRT's plugins do not work, or a module declares no plugin.
    """
    return [register(load_plugin(module), trt, architecture=architecture) for module in modules]


def register(plugin: Plugin, trt: ModuleType, *, architecture: str = DEFAULT_ARCHITECTURE) -> str:
    """Register one plugin; once in a process.

    Args:
        plugin: What it is.
        trt: The module ``tensorrt`` or ``tensorrt_bindings``.
        architecture: What its kernels are compiled for.

    Returns:
        Its name in TensorRT's registry.

    Raises:
        BadInput: This TensorRT's plugins do not work, it has a plugin of this name, or there is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise BadInput(f"no architecture {architecture!r}", hint=f"there are {', '.join(ARCHITECTURES)}")
    layer = plugin_layer(trt)
    identity = f"{plugin.namespace}::{plugin.name}"
    callbacks = _Callbacks(plugin, trt, layer, architecture)
    tensors = [_parameter(name, layer.TensorDesc) for name in plugin.inputs]
    attributes = [_parameter(name, array_type(dtype)) for name, dtype in plugin.attributes]
    outputs = _parameter("outputs", _tuple_of(layer.TensorDesc, len(plugin.outputs)))
    tuned = GenericAlias(list, (layer.AutoTuneCombination,))
    text = str | bytes
    implemented = GenericAlias(tuple, (text, text, layer.KernelLaunchParams, layer.SymExprs))
    signatures: list[tuple[str, Callable[..., Any], list[inspect.Parameter], object]] = [
        ("register", callbacks.describe, [*tensors, *attributes], _tuple_of(layer.TensorDesc, len(plugin.outputs))),
        ("autotune", callbacks.tune, [*tensors, *attributes, outputs], tuned),
        ("aot_impl", callbacks.implement, [*tensors, *attributes, outputs, _parameter("tactic", int)], implemented),
    ]
    for kind, function, parameters, returns in signatures:
        try:
            getattr(layer, kind)(identity)(_signed(plugin, kind, function, parameters, returns))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(f"TensorRT {trt.__version__} does not register it: {reason}", where=identity) from error
    return identity


def last_error() -> str | None:
    """What went wrong last in a function of ours that TensorRT called, which it tells nobody; None: nothing did."""
    return _errors[-1] if _errors else None


def array_type(dtype: str) -> type:
    """An annotation that tensorrt.plugin takes for ``NDArray[dtype]``, and that is a class on every Python.

    Args:
        dtype: numpy's name of the element type.
    """
    arguments = (object, GenericAlias(np.dtype, (np.dtype(dtype).type,)))
    return type(f"Array_{dtype}", (), {"__origin__": np.ndarray, "__args__": arguments})


def reads_lists(trt: Any) -> bool:
    """Whether the bindings read attributes with several numbers as they are."""
    given = np.array([1, 2, 3], np.int32)
    return np.array_equal(trt.PluginField("probe", given, trt.PluginFieldType.INT32).data, given)


def _parameter(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _tuple_of(kind: type, count: int) -> object:
    return GenericAlias(tuple, (kind,) * count)


def _signed(
    plugin: Plugin, kind: str, function: Callable[..., Any], parameters: list[inspect.Parameter], returns: object
) -> Callable[..., Any]:
    """A function with the signature that tensorrt.plugin inspects, which keeps what goes wrong in it."""

    def call(*positional: Any, **named: Any) -> Any:
        try:
            return function(*positional, **named)
        except Exception as error:
            _errors.append(f"{plugin.name}: {next(iter(str(error).splitlines()), type(error).__name__)}")
            raise

    call.__name__ = call.__qualname__ = f"{plugin.name}_{kind}"
    call.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return call


class _Callbacks:
    """What TensorRT calls while it builds."""

    def __init__(self, plugin: Plugin, trt: Any, layer: Any, architecture: str) -> None:
        self.plugin = plugin
        self.trt = trt
        self.layer = layer
        self.architecture = architecture
        self.reads_lists = reads_lists(trt)

    def describe(self, *inputs: Any, **attributes: Any) -> Any:
        """Types and shapes of the outputs. It is called first of all."""
        for name, value in attributes.items():
            if len(value) > 1 and not self.reads_lists:
                version = self.trt.__version__
                what = f"TensorRT {version} reads {name!r}, an attribute of several numbers, wrong with numpy 2"
                raise GraphoptError(what, hint="10.16 or newer, or --plugins never")
        types = self.plugin.types_of([self._dtype(value) for value in inputs])
        shapes = [_sizes(value, self.layer) for value in inputs]
        found = self.plugin.results(shapes, attributes)
        if len(found) != len(self.plugin.outputs):
            raise GraphoptError(f"tells {len(found)} shapes of {len(self.plugin.outputs)} outputs")
        fake = any(size.is_fake for shape in shapes for size in shape if isinstance(size, SymbolicSize))
        outputs = []
        for shape, dtype in zip(found, types[len(inputs) :], strict=True):
            if fake:
                # Only the number of axes counts, and a constant would be made by the expressions of another node.
                expressions = self.layer.ShapeExprs(len(shape), _is_dummy=True)
            else:
                expressions = self.layer.ShapeExprs.from_tuple(tuple(_raw(size) for size in shape))
            outputs.append(self.layer.TensorDesc(expressions, getattr(self.trt.DataType, _DATA_TYPES[dtype])))
        return tuple(outputs)

    def tune(self, *arguments: Any) -> list[Any]:
        """For each combination of element types the tactics."""
        attributes = self._named(arguments[len(self.plugin.inputs) : -1])
        combinations = []
        for types in self.plugin.types:
            tactics = sorted(self.plugin.kernels(types, attributes))
            if tactics:
                names = ", ".join(_TUNE_NAMES[dtype] for dtype in types)
                combinations.append(self.layer.AutoTuneCombination(names, "LINEAR", tactics))
        return combinations

    def implement(self, *arguments: Any) -> tuple[str, str, Any, Any]:
        """The kernel of one tactic: its name, its PTX, its launch, its scalars."""
        from graphopt.kernels.compile import compile_ptx

        count = len(self.plugin.inputs)
        inputs, (*values, outputs, tactic) = arguments[:count], arguments[count:]
        types: Types = tuple(self._dtype(value) for value in (*inputs, *outputs))
        kernel = self.plugin.kernel(types, self._named(values), tactic)
        launch = kernel.launch([_sizes(value, self.layer) for value in inputs])
        _check_launch(kernel, launch.grid, launch.scalars)
        ptx = compile_ptx(kernel, self.architecture)
        parameters = self.layer.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y, parameters.grid_z = (_raw(size) for size in launch.grid)
        parameters.block_x, parameters.shared_mem = kernel.threads, kernel.shared
        scalars = self.layer.SymIntExprs(len(launch.scalars))
        for place, size in enumerate(launch.scalars):
            scalars[place] = self.layer.SymInt32(_raw(size))
        return ptx.entry, ptx.text, parameters, scalars

    def _named(self, values: Sequence[Any]) -> dict[str, Any]:
        """Attributes by name; TensorRT gives them in the order in which they were declared."""
        return {name: value for (name, _), value in zip(self.plugin.attributes, values, strict=True)}

    def _dtype(self, description: Any) -> str:
        name = str(description.dtype.name)
        if name not in _NAMES:
            raise GraphoptError(f"has no kernel for tensors of {name}")
        return _NAMES[name]


def _check_launch(kernel: Kernel, grid: Sequence[Any], scalars: Sequence[Any]) -> None:
    """What is known of a launch before run time, and can be wrong."""
    count = sum(parameter.kind == "scalar" for parameter in kernel.parameters)
    if len(scalars) != count:
        raise GraphoptError(f"{kernel.name} takes {count} scalars, and its launch gives {len(scalars)}")
    if any(isinstance(size, int) and not 0 <= size <= _MOST_INT32 for size in (*grid, *scalars)):
        raise GraphoptError(f"{kernel.name}: a size needs more than 32 bits")


# -- sizes that are known at run time ----------------------------------------------------------------------------------


class SymbolicSize:
    """A size in a launch or a shape that only run time knows: + - * // with others and with ints, on either side.

    tensorrt.plugin's own expressions do not take an int on their left, and answer comparisons with expressions, which
    a kernel's launch would take for an answer.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expression: Any, layer: Any) -> None:
        self.expression = expression
        self._layer = layer

    @property
    def is_fake(self) -> bool:
        """Whether not even TensorRT knows it yet."""
        return bool(self.expression.is_fake)

    def _with(self, operator: str, other: Any, *, turned: bool = False) -> Any:
        if not isinstance(other, int | SymbolicSize):
            return NotImplemented
        if self.is_fake:
            return self
        if isinstance(other, SymbolicSize) and other.is_fake:
            return other
        left, right = self.expression, _raw(other)
        if turned:
            left, right = self._layer.ShapeExpr(right), left
        return SymbolicSize(getattr(left, operator)(right), self._layer)

    def __add__(self, other: Any) -> Any:
        return self._with("__add__", other)

    def __radd__(self, other: Any) -> Any:
        return self._with("__add__", other)

    def __sub__(self, other: Any) -> Any:
        return self._with("__sub__", other)

    def __rsub__(self, other: Any) -> Any:
        return self._with("__sub__", other, turned=True)

    def __mul__(self, other: Any) -> Any:
        return self._with("__mul__", other)

    def __rmul__(self, other: Any) -> Any:
        return self._with("__mul__", other)

    def __floordiv__(self, other: Any) -> Any:
        return self._with("__floordiv__", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with("__floordiv__", other, turned=True)

    def _unknown(self, *_: Any) -> Any:
        raise TypeError("a size that only run time knows is compared or made a number; it knows + - * // alone")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _unknown
    __bool__ = __int__ = __index__ = __float__ = _unknown


def _sizes(description: Any, layer: Any) -> list[int | SymbolicSize]:
    """The shape of a tensor: ints where they are known, so that a launch can count with them as with any."""
    sizes: list[int | SymbolicSize] = []
    for expression in description.shape_expr:
        known = not expression.is_fake and expression.is_constant
        sizes.append(int(expression.constant_value()) if known else SymbolicSize(expression, layer))
    return sizes


def _raw(size: Any) -> Any:
    """What tensorrt.plugin calculates with."""
    return size.expression if isinstance(size, SymbolicSize) else int(size)


# -- before the build --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedKernel:
    """A kernel that a build may put into an engine, compiled and held to its contract.

    Attributes:
        plugin: Whose.
        types: Of inputs and outputs.
        tactic: By the plugin's numbers.
        entry: Its entry point.
        architecture: The oldest that it runs on.
        isa: The PTX instruction set that a driver has to know.
        compiler: With its version.
        sha256: Of the PTX.
    """

    plugin: str
    types: Types
    tactic: int
    entry: str
    architecture: str
    isa: tuple[int, int]
    compiler: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "isa": ".".join(map(str, self.isa))}


def prepare(
    lowered: Lowered, architecture: str = DEFAULT_ARCHITECTURE, plugins: Mapping[str, Plugin] | None = None
) -> tuple[PreparedKernel, ...]:
    """Compile every kernel that an engine may take, before TensorRT asks for them; it takes them from what is kept.

    Args:
        lowered: What `plugins.lower` wrote.
        architecture: To compile for.
        plugins: By name; all that there are where it is not given.

    Raises:
        MissingDependency: The compiler is not installed.
        GraphoptError: A kernel does not compile, or breaks its contract.
    """
    from graphopt.kernels.compile import compile_ptx
    from graphopt.kernels.contract import check

    known = find_plugins() if plugins is None else plugins
    prepared: dict[tuple[object, ...], PreparedKernel] = {}
    for written in lowered.written:
        plugin = known[written.plugin]
        told = _frozen(written.attributes)
        for tactic in plugin.kernels(written.types, written.attributes):
            key = (written.plugin, written.types, told, tactic)
            if key in prepared:
                continue
            kernel = plugin.kernel(written.types, written.attributes, tactic)
            ptx = compile_ptx(kernel, architecture)
            check(kernel, ptx)
            digest = hashlib.sha256(ptx.text.encode()).hexdigest()
            prepared[key] = PreparedKernel(
                plugin.name, written.types, tactic, ptx.entry, architecture, ptx.isa, ptx.compiler, digest
            )
    return tuple(prepared.values())


def _frozen(attributes: Attributes) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value.tobytes()) for name, value in sorted(attributes.items()))


# -- shapes ------------------------------------------------------------------------------------------------------------


def buckets(
    axes: Mapping[str, tuple[int, int]], sizes: Sequence[int] = BUCKETS, *, also: Mapping[str, int] | None = None
) -> list[dict[str, int]]:
    """Split dynamic axes into static sizes, each combination for an optimization profile with min = opt = max.

    An engine with plugins leaks GPU memory when the shapes of a context change (`LEAK`). Where each profile is one
    static shape, and each profile has an execution context of its own whose shapes are set once, none ever changes.
    What is between two sizes does not run; whether rows may be padded is for who calls the engine to know.

    Args:
        axes: For each symbol the smallest and the largest size.
        sizes: Candidates; those within an axis' range are taken, and the ends of the range.
        also: One more size of some symbols: what the engine shall be fastest at.

    Returns:
        Symbol → size, for each profile; in ascending order, the last axis fastest.

    Raises:
        BadInput: A range is empty, or there would be more than `MOST_BUCKETS`.
    """
    choices: list[list[int]] = []
    also = also or {}
    for name, (low, high) in axes.items():
        if not 0 < low <= high:
            raise BadInput(f"the sizes {low} to {high} of {name!r} are no range")
        choices.append(sorted({low, high, also.get(name, low), *(size for size in sizes if low < size < high)}))
    count = math.prod(map(len, choices))
    if count > MOST_BUCKETS:
        told = ", ".join(f"{len(found)} of {name}" for name, found in zip(axes, choices, strict=True))
        hint = "narrow the ranges, or make an axis static"
        raise BadInput(f"{count} shapes ({told}) are more than {MOST_BUCKETS} profiles", hint=hint)
    return [dict(zip(axes, found, strict=True)) for found in itertools.product(*choices)]
