"""A TensorRT engine as Triton's tensorrt backend loads it, from the report that ``graphopt build`` wrote beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import BadInput
from graphopt.packaging.signature import Axis, Served, Tensor, refuse_odd_axes, why_not_batched

if TYPE_CHECKING:
    from graphopt.engines.report import BuildResult, EngineTensor

FILENAME = "model.plan"
_RTX_MAGIC = b"vtrt"
_TYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "bool": "BOOL",
    "int8": "INT8",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
}


def served_engine(path: Path) -> Served:
    """Read what a server has to know of an engine.

    Args:
        path: The engine, with its report beside it.

    Raises:
        BadInput: There is no report, it is of another engine, or Triton cannot serve such an engine.
    """
    from graphopt.engines.report import read_report

    if is_rtx(path):
        raise _not_for_triton(path)
    report = read_report(path)
    if report.backend != "tensorrt":
        raise _not_for_triton(path)
    if report.options.strip_weights:
        raise BadInput(
            "holds no weights, and Triton puts none in", where=str(path), hint="build it without --strip-weights"
        )
    inputs = tuple(_tensor(value, path, is_shape=value.name in report.values) for value in report.inputs)
    outputs = tuple(_tensor(value, path) for value in report.outputs)
    refuse_odd_axes((*inputs, *outputs), str(path))
    for tensor in (*inputs, *outputs):
        if not tensor.shape and not tensor.is_shape:
            raise BadInput(
                f"{tensor.name!r} has no axes, and Triton's tensorrt backend takes no such tensors",
                where=str(path),
                hint="give it an axis of size 1 in the model, or package the .onnx file",
            )
    reason = why_not_batched(inputs, outputs)
    sizes = None if reason is not None else _batches(report, inputs)
    if sizes is not None and report.buckets:
        # The server may put any number of requests together.
        reason = "the engine was built for single sizes (--buckets)"
    elif sizes is not None and sizes[0] > 1:
        reason = f"the engine takes {sizes[0]} rows or more, and a request may have one"
    batched = None if reason is not None else sizes
    return Served(
        "tensorrt_plan",
        "tensorrt",
        FILENAME,
        {FILENAME: path},
        inputs,
        outputs,
        needs=_needs(report),
        most=None if batched is None else batched[2],
        # Of one size alone the server thinks by itself: the largest.
        preferred=() if batched is None else tuple(sorted(set(batched[1:]))),
        profiles=len(report.buckets) or 1,
        unbatched=reason,
    )


def is_rtx(path: Path) -> bool:
    """Whether a file begins as an engine of TensorRT-RTX does."""
    with path.open("rb") as stream:
        return stream.read(len(_RTX_MAGIC)) == _RTX_MAGIC


def _not_for_triton(path: Path) -> BadInput:
    return BadInput(
        "is an engine of tensorrt-rtx, and Triton has no backend for those",
        where=str(path),
        hint="build it with --backend tensorrt, or package the .onnx file",
    )


def _tensor(value: EngineTensor, path: Path, *, is_shape: bool = False) -> Tensor:
    where = f"{path}: {value.name!r}"
    if value.dtype not in _TYPES:
        raise BadInput(f"is {value.dtype}, a type that Triton does not serve from engines", where=where)
    if value.shape is None:
        raise BadInput("has no fixed number of axes", where=where)
    shape: tuple[Axis, ...] = tuple(size if size >= 0 else None for size in value.shape)
    return Tensor(value.name, f"TYPE_{_TYPES[value.dtype]}", shape, is_shape=is_shape)


def _batches(report: BuildResult, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """The smallest, best and largest first axis that every input has; all of them have dynamic ones."""
    profiles = [report.profiles[tensor.name] for tensor in inputs]
    return max(p.min[0] for p in profiles), min(p.opt[0] for p in profiles), min(p.max[0] for p in profiles)


def _needs(report: BuildResult) -> str:
    """What the server's machine must have: engines are bound to both."""
    library = f"TensorRT {report.version}" + (" or newer" if report.options.version_compatible else "")
    if report.compute_capability is None:
        return library
    level = report.options.hardware_compatibility
    if level == "ampere-plus":
        return f"{library}, a GPU of compute capability 8.0 or higher"
    return f"{library}, a GPU of compute capability {report.compute_capability}"
