"""ONNX Runtime sessions: as deployed, or as the reference that everything is compared with.

The reference runs with the runtime's graph optimizations off, weights not repacked and deterministic
kernels: it computes what the file says. Weights can be handed over as arrays, so that a model under
construction is never serialised whole.
"""

from __future__ import annotations

import ctypes
import difflib
import math
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.background import in_background
from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.ending import run_options, run_to_end
from graphopt.runtime.failures import innermost
from graphopt.runtime.flavour import import_onnxruntime
from graphopt.runtime.split import HANDED_OVER

if TYPE_CHECKING:
    import onnxruntime

_FATAL_ONLY = 4

# numpy has no name for these; onnxruntime takes and gives them as raw bits with the ONNX type number.
_RAW_TYPES: dict[np.dtype[Any], ir.DataType] = {
    np.dtype(ml_dtypes.bfloat16): ir.DataType.BFLOAT16,
    np.dtype(ml_dtypes.float8_e4m3fn): ir.DataType.FLOAT8E4M3FN,
    np.dtype(ml_dtypes.float8_e4m3fnuz): ir.DataType.FLOAT8E4M3FNUZ,
    np.dtype(ml_dtypes.float8_e5m2): ir.DataType.FLOAT8E5M2,
    np.dtype(ml_dtypes.float8_e5m2fnuz): ir.DataType.FLOAT8E5M2FNUZ,
}
_ORT_TYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "string": np.dtype(object),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}


def create_session(
    model: Path | bytes,
    *,
    optimized: bool,
    threads: int | None = None,
    custom_ops: Path | None = None,
    providers: Sequence[str] | None = None,
    initializers: Mapping[str, np.ndarray[Any, Any]] | None = None,
    config: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Create an ONNX Runtime session.

    Args:
        model: A file, or a serialised model.
        optimized: True: all of the runtime's graph optimizations, as a model is deployed. False: none,
            weights not repacked, deterministic kernels: the reference.
        threads: Threads within an operator; None leaves it to the runtime.
        custom_ops: A shared library of custom operators.
        providers: Execution providers in order of preference; the CPU alone if None.
        initializers: Values of the main graph's initializers by name, used in place of the model's own (the
            model names them as external data, see `split_weights` in `runtime.split`). Kept alive with the session; the
            reference uses them without copying.
        config: Further session configuration entries, as ONNX Runtime names them.

    Raises:
        BadInput: The runtime refuses the model, the custom operator library or a provider; with its reason.
        MissingDependency: No onnxruntime is installed.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # a failure also raises; logging it too would print it twice
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimized else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimized:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.use_deterministic_compute = True
        # Planning which buffers to reuse is quadratic in the nodes: 30 s for 20,000 of them, against 0.7 s without.
        options.enable_mem_reuse = False
    for key, setting in (config or {}).items():
        options.add_session_config_entry(key, setting)
    where = str(model) if isinstance(model, Path) else None
    if custom_ops is not None:
        _register_custom_ops(options, custom_ops)
    wanted = list(providers) if providers is not None else ["CPUExecutionProvider"]
    missing = [name for name in wanted if name not in ort.get_available_providers()]
    if missing:
        raise BadInput(
            f"execution provider {missing[0]} is not available",
            hint=f"this onnxruntime has {', '.join(ort.get_available_providers())}",
        )
    if isinstance(model, Path) and not model.is_file():
        raise BadInput("no such file", where=where)

    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        values = _hand_over(ort, options, initializers or {}, optimized=optimized)
        if isinstance(model, bytes):
            (Path(folder) / HANDED_OVER).touch()
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            session = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model, sess_options=options, providers=wanted
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BadInput(f"onnxruntime refuses the model: {reason(error)}", where=where) from error
    # Without copying, the session points into the arrays: they must live as long as it does.
    _KEPT_ALIVE[session] = (options, values)
    return session


def create_session_soon(model: Path | bytes, **how: Any) -> Future[Any]:
    """``create_session`` in the background: the runtime loads a model beside what Python does meanwhile.

    Args:
        model, how: As for ``create_session``.
    """
    return in_background(create_session, model, **how)


def import_soon() -> None:
    """Begin to import onnxruntime. Where that fails, the first session says so."""
    in_background(import_onnxruntime)


_KEPT_ALIVE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_RAW_OUTPUTS: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def reason(error: BaseException) -> str:
    """The first line of what ONNX Runtime says of a failure, without its prefix ``[ONNXRuntimeError] : 1 : FAIL :``."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return innermost(text).rstrip(" .")


def run(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run a session once.

    Args:
        session: From `create_session`.
        feeds: One array an input, by name; a list of arrays for a sequence, None for an absent optional.
        outputs: The outputs wanted; None for all of them.

    Returns:
        The outputs by name: arrays (lists of arrays for sequences).

    Raises:
        BadInput: A feed is missing, unknown, or of the wrong dtype, rank or size.
        Endless: It took longer than the limit that runs are under here (`runtime.ending`).
        GraphoptError: The runtime failed while running; with its reason.
    """
    specs = session.get_inputs()
    check_feeds([(spec.name, spec.type, spec.shape) for spec in specs], feeds)
    wanted = list(outputs) if outputs is not None else [output.name for output in session.get_outputs()]
    raw_outputs = not _raw_outputs(session).isdisjoint(wanted)
    arrays = {spec.name: _as_array(feeds[spec.name]) for spec in specs}

    def call(options: Any) -> dict[str, Any]:
        if raw_outputs or any(_is_raw(array) for array in arrays.values()):
            return _run_raw(session, arrays, wanted, options)
        return dict(zip(wanted, session.run(wanted, arrays, options), strict=True))

    try:
        return run_to_end(call)
    except GraphoptError:
        raise
    except Exception as error:
        raise GraphoptError(f"onnxruntime failed: {reason(error)}") from error


def _raw_outputs(session: onnxruntime.InferenceSession) -> frozenset[str]:
    """The outputs of a type that numpy cannot name. Asked at every run, of sessions with thousands of outputs."""
    if session not in _RAW_OUTPUTS:
        _RAW_OUTPUTS[session] = frozenset(o.name for o in session.get_outputs() if _raw_type(o.type))
    return _RAW_OUTPUTS[session]


def bind(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> Callable[[], object]:
    """Check feeds once, and return a function that runs the session on them: for timing.

    Raises:
        BadInput: A feed is missing, unknown, or of the wrong dtype, rank or size.
    """
    check_feeds([(spec.name, spec.type, spec.shape) for spec in session.get_inputs()], feeds)
    wanted = [output.name for output in session.get_outputs()]
    options = run_options()
    if any(_is_raw(array) for array in feeds.values()) or any(_raw_type(o.type) for o in session.get_outputs()):
        values = {name: to_ort_value(array) for name, array in feeds.items()}
        return lambda: session.run_with_ort_values(wanted, values, options)
    arrays = {name: _as_array(value) for name, value in feeds.items()}
    return lambda: session.run(wanted, arrays, options)


def check_feeds(specs: Sequence[tuple[str, str, Sequence[int | str | None] | None]], feeds: Mapping[str, Any]) -> None:
    """Check feeds against what a model takes.

    Args:
        specs: Name, ONNX Runtime type (``tensor(float)``) and shape (static sizes are integers) of each.
        feeds: What the user gave.

    Raises:
        BadInput: Naming the input, what was expected and what was given.
    """
    names = [name for name, _, _ in specs]
    for given in feeds:
        if given not in names:
            near = difflib.get_close_matches(given, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"inputs: {', '.join(names) or 'none'}"
            raise BadInput("the model has no such input", where=f"input '{given}'", hint=hint)
    for name, kind, shape in specs:
        where = f"input '{name}'"
        if name not in feeds:
            raise BadInput("no value was given", where=where, hint=f"expected {describe(kind, shape)}")
        dtype = numpy_dtype(kind)
        if dtype is None:  # sequences, maps, optionals: left to the runtime
            continue
        value = np.asarray(feeds[name])
        given_text = f"{_dtype_name(value.dtype)}{_shape_text(value.shape)}"
        if value.dtype != dtype and not (dtype == np.dtype(object) and value.dtype.kind in "OUS"):
            raise BadInput(f"expected {describe(kind, shape)}, got {given_text}", where=where, hint="the dtype differs")
        if not shape:  # ONNX Runtime tells an input of unknown rank as one without axes, and takes any rank for both
            continue
        if len(shape) != value.ndim:
            raise BadInput(f"expected {describe(kind, shape)}, got {given_text}", where=where, hint="the rank differs")
        for axis, (want, got) in enumerate(zip(shape, value.shape, strict=True)):
            if isinstance(want, int) and want >= 0 and want != got:
                raise BadInput(
                    f"expected {describe(kind, shape)}, got {given_text}",
                    where=where,
                    hint=f"axis {axis} differs",
                )


def numpy_dtype(kind: str) -> np.dtype[Any] | None:
    """The numpy dtype of a type such as ``tensor(float)``; None for what is not a plain tensor."""
    if not (kind.startswith("tensor(") and kind.endswith(")")):
        return None
    return _ORT_TYPES.get(kind[len("tensor(") : -1])


def describe(kind: str, shape: Sequence[int | str | None] | None) -> str:
    """An input's type as the errors print it: ``float32[batch, 3, ?]``."""
    dtype = numpy_dtype(kind)
    name = kind if dtype is None else _dtype_name(dtype)
    return name if shape is None else f"{name}{_shape_text(shape)}"


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind in "OUS" else dtype.name


def _shape_text(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _register_custom_ops(options: Any, library: Path) -> None:
    if not library.is_file():
        raise BadInput("no such file", where=str(library), hint="--custom-ops takes a shared library")
    try:
        options.register_custom_ops_library(str(library.resolve()))
    except Exception as error:
        raise BadInput(f"onnxruntime cannot load this library: {reason(error)}", where=str(library)) from error


def _hand_over(
    ort: Any, options: Any, arrays: Mapping[str, np.ndarray[Any, Any]], *, optimized: bool
) -> list[tuple[Any, np.ndarray[Any, Any]]]:
    """Give the arrays to the session options. Returns what must stay alive as long as the session."""
    if not arrays:
        return []
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    values = {name: to_ort_value(array) for name, array in contiguous.items()}
    if optimized:
        # The optimizer folds constants, and looks at values only where they are part of the graph: one copy.
        options.add_external_initializers(list(values), list(values.values()))
    else:
        for name, value in values.items():
            options.add_initializer(name, value)
    return [(values[name], contiguous[name]) for name in values]


def to_ort_value(value: Any) -> Any:
    """An array as ONNX Runtime's value, of any type; it points into the array, which has to live as long."""
    ort = import_onnxruntime()
    array = np.asarray(value)
    raw = _RAW_TYPES.get(array.dtype)
    if raw is None:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits.reshape(array.shape), int(raw))


def _as_array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, np.generic) else value


def _is_raw(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in _RAW_TYPES


def _raw_type(kind: str) -> np.dtype[Any] | None:
    dtype = numpy_dtype(kind)
    return dtype if dtype in _RAW_TYPES else None


def _run_raw(session: Any, arrays: Mapping[str, Any], wanted: list[str], options: Any) -> dict[str, Any]:
    """Run with types that numpy cannot name on the way in or out."""
    values = {name: to_ort_value(array) for name, array in arrays.items()}
    results = session.run_with_ort_values(wanted, values, options)
    return {name: from_ort_value(result) for name, result in zip(wanted, results, strict=True)}


def from_ort_value(value: Any) -> Any:
    """What ONNX Runtime's value holds: an array of any type, or what the runtime gives for a sequence."""
    if not value.is_tensor():
        return value.numpy() if hasattr(value, "numpy") else value
    dtype = _raw_type(value.data_type())
    if dtype is None:
        return value.numpy()
    shape = tuple(value.shape())
    size = math.prod(shape)
    if size == 0:
        return np.empty(shape, dtype)
    raw = ctypes.string_at(value.data_ptr(), size * dtype.itemsize)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)
