"""`export`: from a factory to a file that was compared with the module it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import BadInput, GateFailed
from graphopt.exporting.branches.deciding import strip
from graphopt.exporting.branches.sinking import sink
from graphopt.exporting.branches.state import preserved
from graphopt.exporting.capture import DEFAULT_OPSET, Captured, capture, quiet
from graphopt.exporting.compare import Case, CaseComparison, compare, make_cases, run_eager, run_example
from graphopt.exporting.factory import Example, call_factory, load_factory, require_torch
from graphopt.exporting.scripted import NOTE, capture_scripted, is_scripted
from graphopt.exporting.tidy import tidy

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


@dataclass(frozen=True)
class AxisReport:
    """One input or output of the exported model: its name, type and axes (a size, or a symbol's name)."""

    name: str
    dtype: str
    axes: list[int | str]


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, and how it compared.

    Attributes:
        path: The ONNX file.
        opset: Its opset.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        nodes: Nodes, those of subgraphs included.
        parameters: Elements of all weights.
        bytes: Size on disk, external data included.
        comparison: One entry for each case compared with the eager module.
        notes: What was changed or is worth knowing, one sentence each.
    """

    path: Path
    opset: int
    inputs: list[AxisReport]
    outputs: list[AxisReport]
    nodes: int
    parameters: int
    bytes: int
    comparison: list[CaseComparison]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {**asdict(self), "path": str(self.path)}


def export(
    factory: str | Callable[[], Any], out: str | Path, *, opset: int = DEFAULT_OPSET, verbose: bool = False
) -> ExportResult:
    """Export a torch module to ONNX, compare the two, and write the file if they agree.

    Args:
        factory: ``MODULE:FACTORY`` (MODULE importable, or the path of a .py file), or the function itself.
            Called without arguments, it returns ``(module, example_inputs, dynamic_axes or None)``:
            example_inputs maps the names of ``forward``'s parameters to tensors, dynamic_axes maps an input's
            name to ``{axis: symbol}``; axes of one symbol have one size.
        out: Where the ONNX file goes; its folder must exist.
        opset: The opset to write, 18 or newer.
        verbose: Let torch's warnings and log through.

    Raises:
        MissingDependency: torch or onnxscript is not installed.
        BadInput: The factory, what it returns, or ``out`` cannot be used.
        GraphoptError: torch cannot export the module.
        GateFailed: The ONNX does not compute what the module does; nothing was written.
    """
    from graphopt.files.save import stage_model

    require_torch()
    path = Path(out)
    if not path.parent.is_dir():
        raise BadInput(f"the folder {str(path.parent)!r} does not exist", where=str(path))
    if path.is_dir():
        raise BadInput("is a folder", where=str(path), hint="give the name of the file to write")
    name = factory if isinstance(factory, str) else getattr(factory, "__qualname__", "factory")
    with quiet(not verbose):
        example = call_factory(load_factory(factory) if isinstance(factory, str) else factory, name)
        with preserved(example.module):
            expected, changes = run_example(example, name)
            captured, made, cases, forced = _exported(example, expected, name, opset=opset, verbose=verbose)
    notes = (
        example.notes
        + changes
        + made
        + [
            f"{symbol!r} is {low} {'or more' if high is None else f'to {high}'}: the module does not run at other"
            " sizes, or decides something else there, which the ONNX does not"
            for symbol, (low, high) in captured.bounds.items()
            if high is not None or low > 1
        ]
    )
    model = captured.model
    staged = stage_model(model, path)
    try:
        names = [value.name or "" for value in model.graph.outputs]
        comparison, vacuous = compare(staged.staged_path, names, cases, forced)
        _refuse_difference(comparison, name)
        staged.commit()
    except BaseException:
        staged.discard()
        raise
    return ExportResult(
        path=path,
        opset=model.opset_imports[""],
        inputs=[_axis_report(value) for value in model.graph.inputs],
        outputs=[_axis_report(value) for value in model.graph.outputs],
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=sum(
            value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None
        ),
        bytes=_bytes_on_disk(path),
        comparison=comparison,
        notes=notes + vacuous,
    )


Made = tuple["Captured", list[str], list["Case"], list[list["torch.Tensor"]]]
"""What was captured; notes; the cases; what the module gave on paths that were forced."""


def _exported(example: Example, expected: list[torch.Tensor], name: str, *, opset: int, verbose: bool) -> Made:
    """Capture ``example``'s module and make a file of it; where it branches on values, every side compared."""
    from graphopt.exporting.paths import Uncompared

    scripted = is_scripted(example.module)
    captured = (capture_scripted if scripted else capture)(example, name, opset=opset, verbose=verbose)
    if captured.traced is None:
        notes = tidy(captured.model, list(example.inputs), captured.outputs, example.axes)
        notes += [NOTE] if scripted else []
        cases, more = make_cases(example, expected, captured.bounds, name)
        return captured, notes + more, cases, []
    try:
        return _checked(example, captured, name)
    except Uncompared:  # perhaps since Python numbers are tensors in the trace: once more without that
        captured = capture(example, name, opset=opset, verbose=verbose, promote=False)
        return _checked(example, captured, name)


def _checked(example: Example, captured: Captured, name: str) -> Made:
    """If and Loop made of the markers of ``captured``, and compared on every side."""
    from graphopt.exporting.branches.following import Bounded
    from graphopt.exporting.paths import compare_paths

    assert captured.traced is not None
    notes = tidy(captured.model, list(example.inputs), captured.outputs, example.axes)
    sink(captured.model, captured.traced.places)
    expected = run_eager(example, example.inputs, captured.leaves)
    with Bounded():
        cases, more = make_cases(example, expected, captured.bounds, name, leaves=captured.leaves)
    note, forced = compare_paths(example, captured, cases, name)
    strip(captured.model)
    return captured, [*notes, *more, note], cases, forced


def _refuse_difference(comparison: list[CaseComparison], name: str) -> None:
    for case in comparison:
        for output in case.outputs:
            if not output.passed:
                sizes = ", ".join(f"{symbol}={size}" for symbol, size in case.sizes.items())
                raise GateFailed(
                    f"the ONNX does not compute what the module does: {output.name!r}"
                    f"{f' at {sizes}' if sizes else ''}: {output.reason}",
                    where=name,
                    hint=f"tolerance {output.tolerance:g} of the largest magnitude; nothing was written",
                )


def _axis_report(value: ir.Value) -> AxisReport:
    import onnx_ir as ir

    shape = value.shape or ir.Shape([])
    axes = [size if isinstance(size, int) else str(size.value or "?") for size in shape]
    dtype = value.dtype.numpy().name if value.dtype is not None else "?"
    return AxisReport(value.name or "", dtype, axes)


def _bytes_on_disk(path: Path) -> int:
    import onnx_ir as ir

    files = {path}
    for value in ir.load(path).graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            files.add(path.parent / value.const_value.location)
    return sum(file.stat().st_size for file in files)
