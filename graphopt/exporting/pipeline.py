"""`export`: from a factory to a file that was compared with the module it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import BadInput, GateFailed, GraphoptError
from graphopt.exporting.branches.higher_order import NOTE, as_python
from graphopt.exporting.branches.state import preserved
from graphopt.exporting.capture import DEFAULT_OPSET, quiet
from graphopt.exporting.compare import CaseComparison, compare, run_example
from graphopt.exporting.factory import Example, call_factory, load_factory, require_torch
from graphopt.exporting.making import Made, Maker
from graphopt.exporting.scripted import is_scripted

if TYPE_CHECKING:
    import onnx_ir as ir


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
            written = _exported(Maker(name, opset, verbose), example, path)
    model = written.model
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
        comparison=written.comparison,
        notes=example.notes + written.notes,
    )


@dataclass(frozen=True)
class _Written:
    """The model in the file, how it compared, and notes."""

    model: ir.Model
    comparison: list[CaseComparison]
    notes: list[str]


def _exported(maker: Maker, example: Example, path: Path) -> _Written:
    """Export ``example`` to ``path``; torch.cond and while_loop as Python's, or, where that has no form, as torch's."""
    try:
        with as_python() as used:
            return _written(maker, example, path)
    except GraphoptError as failure:
        if not used.any:
            raise
        try:
            written = _written(maker, example, path)
        except GraphoptError:
            raise failure from None
        return replace(written, notes=[*written.notes, NOTE])


def _written(maker: Maker, example: Example, path: Path) -> _Written:
    """Make the model, compare it, and write it to ``path``.

    Where it is not what the module computes, and it has dynamic axes, it is made once more with axes of size 1 told
    apart: torch.export takes every size for 2 or more.
    """
    expected, changes = run_example(example, maker.name)
    try:
        written = _compared(maker.make(example, expected), path, maker.name)
    except GateFailed as failure:
        if not example.axes or is_scripted(example.module):
            raise
        try:
            made = maker.make_with_ones_apart(example)
        except GraphoptError:
            raise failure from None
        if made is None:
            raise
        written = _compared(made, path, maker.name)
    return replace(written, notes=changes + written.notes)


def _compared(made: Made, path: Path, name: str) -> _Written:
    """Write ``made`` to ``path``, if it computes what the module does."""
    from graphopt.files.save import stage_model

    staged = stage_model(made.model, path)
    try:
        names = [value.name or "" for value in made.model.graph.outputs]
        comparison, vacuous = compare(staged.staged_path, names, made.cases, made.forced)
        _refuse_difference(comparison, name)
        staged.commit()
    except BaseException:
        staged.discard()
        raise
    return _Written(made.model, comparison, made.notes + vacuous)


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
