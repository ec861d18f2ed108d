"""An ONNX file as Triton's onnxruntime backend loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import BadInput, GraphoptError, MissingDependency
from graphopt.matching import INVENTED
from graphopt.packaging.signature import Axis, Served, Tensor, refuse_odd_axes, why_not_batched

if TYPE_CHECKING:
    import onnxruntime

FILENAME = "model.onnx"
_TYPES = {
    "BOOL": "BOOL",
    **{f"{sign}INT{bits}": f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "FLOAT": "FP32",
    "DOUBLE": "FP64",
    "STRING": "STRING",
}
_SEEDS = 3
_RELATIVE = 0.02
"""Rows computed together and alone differ by rounding, of float16 too; rows that mix differ by much more."""


def served_model(path: Path, *, verify: bool, batched: bool = True) -> Served:
    """Read what a server has to know of an ONNX file.

    The sizes of the outputs are those that ONNX Runtime finds with its optimizations on: Triton compares them with the
    configuration, and refuses a model where one differs. Where no ONNX Runtime loads the file here, they are those that
    shape inference finds.

    Args:
        path: The file.
        verify: Load the model as Triton does, and run it where its shapes allow batches: a row must be the same alone
            and among others.
        batched: Whether requests may be put together; else it is not run.

    Raises:
        BadInput: The file is no valid model, or has inputs or outputs that Triton does not serve.
    """
    from graphopt.files.load import load_model
    from graphopt.shapes import infer_shapes

    model = load_model(path)
    files = {FILENAME: path, **_data_files(model, path)}
    infer_shapes(model)
    session = _session(path, verify=verify)
    seen = {} if session is None else _seen(session)
    inputs = tuple(_tensor(value, seen, path, optional=value.is_initializer()) for value in model.graph.inputs)
    outputs = tuple(_tensor(value, seen, path) for value in model.graph.outputs)
    refuse_odd_axes((*inputs, *outputs), str(path))
    reason = why_not_batched(tuple(tensor for tensor in inputs if not tensor.optional), outputs)
    if reason is None and verify and batched:
        reason = _why_rows_mix(model, session)
    return Served("onnxruntime_onnx", "onnxruntime", FILENAME, files, inputs, outputs, unbatched=reason)


def _data_files(model: ir.Model, path: Path) -> dict[str, Path]:
    """The files of external data, by their names in the model; `load_model` has found them."""
    from graphopt.files.placement import tensor_slots

    found: dict[str, Path] = {}
    for slot in tensor_slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            location = os.fspath(slot.tensor.location)
            if os.path.normpath(location) == FILENAME:
                raise BadInput(
                    f"its data file is called {FILENAME}, as the model must be in the repository",
                    where=str(path),
                    hint="save the model anew: graphopt optimize",
                )
            found[location] = path.parent / location
    return found


def _session(path: Path, *, verify: bool) -> onnxruntime.InferenceSession | None:
    """As Triton loads it; None where that cannot be tried here, or is refused and nobody asks for it.

    Raises:
        BadInput: ONNX Runtime refuses it, and with ``verify`` that counts.
    """
    from graphopt.runtime.session import create_session

    try:
        return create_session(path, optimized=True)
    except MissingDependency:
        return None
    except BadInput as refused:
        if not verify:
            return None
        hint = "--no-verify packages it for a server that has its operators"
        raise BadInput(refused.what, where=refused.where, hint=hint) from refused


def _seen(session: onnxruntime.InferenceSession) -> dict[str, Sequence[int | str | None]]:
    values = (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    return {value.name: value.shape for value in values}


def _tensor(
    value: ir.Value, seen: Mapping[str, Sequence[int | str | None]], path: Path, *, optional: bool = False
) -> Tensor:
    from graphopt.shapes import trusted_shape

    name = value.name or ""
    where = f"{path}: {'output' if value.is_graph_output() else 'input'} {name!r}"
    if not isinstance(value.type, ir.TensorType):
        kind = {"SequenceType": "a sequence", "OptionalType": "optional", "SparseTensorType": "sparse"}
        told = "of no known type" if value.type is None else kind.get(type(value.type).__name__, "no tensor")
        raise BadInput(f"is {told}: Triton serves dense tensors only", where=where)
    if value.type.dtype.name not in _TYPES:
        raise BadInput(f"is {value.type.dtype.name}, a type that Triton does not have", where=where)
    known = trusted_shape(value)
    declared = value.shape if known is None else known
    if declared is None:
        raise BadInput("has no known rank", where=where, hint="export the model with the shapes of its outputs")
    # A name that only the file gives an output says nothing: exporters invent one for each.
    shape: list[Axis] = [_axis(axis, known is not None) for axis in declared]
    for place, axis in enumerate(seen.get(name, ())):
        if place < len(shape) and (isinstance(axis, int) or isinstance(shape[place], int)):
            shape[place] = axis if isinstance(axis, int) else None
    return Tensor(name, f"TYPE_{_TYPES[value.type.dtype.name]}", tuple(shape), optional=optional)


def _axis(axis: int | ir.SymbolicDim, is_trusted: bool) -> Axis:
    if isinstance(axis, int):
        return axis
    name = axis.value
    return name if is_trusted and name and not name.startswith(INVENTED) else None


def _why_rows_mix(model: ir.Model, session: onnxruntime.InferenceSession | None) -> str | None:
    """Why rows of a batch are not independent, found by running them together and alone; None where they are."""
    from graphopt.feeds import feeds_that_run
    from graphopt.runtime.session import run

    if session is None:
        return "ONNX Runtime does not load the model here, so that nothing shows that rows do not mix"
    telling = 0
    try:
        for feeds in feeds_that_run(model, lambda feeds: run(session, feeds), cases=_SEEDS):
            rows = {len(array) for array in feeds.values() if isinstance(array, np.ndarray) and array.ndim}
            if len(rows) != 1 or rows == {1} or rows == {0}:
                continue
            together = run(session, feeds)
            alone = [run(session, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(min(rows))]
            for name, whole in together.items():
                parts = np.concatenate([outputs[name] for outputs in alone])
                if not _close(np.asarray(whole), parts):
                    return f"a row of {name!r} is another among other rows"
            telling += 1
    except GraphoptError as error:
        return f"the model does not run on made-up inputs, row by row: {error.what}"
    return None if telling else "no made-up inputs of several rows were found"


def _close(whole: np.ndarray[Any, Any], parts: np.ndarray[Any, Any]) -> bool:
    if whole.shape != parts.shape:
        return False
    if whole.dtype == object or whole.dtype.kind in "iub":
        # A rounding may tip an index or a comparison; a mixture tips many.
        return whole.size == 0 or float(np.mean(whole == parts)) > 1 - _RELATIVE
    one, other = whole.astype(np.float64), parts.astype(np.float64)
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return False
    finite = np.isfinite(one)
    scale = float(np.abs(one[finite]).max(initial=0.0))
    return bool(np.abs(one[finite] - other[finite]).max(initial=0.0) <= _RELATIVE * scale)
