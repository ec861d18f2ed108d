"""``graphopt inspect``: what is in a model."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, MAX_WIDTH, common_options, console, print_json, progress, table
from graphopt.errors import BadInput

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from graphopt.bundles.contents import BundleContents
    from graphopt.bundles.drawing import Line
    from graphopt.bundles.plan import Port
    from graphopt.bundles.profile import Profile
    from graphopt.channels import ClassSummary
    from graphopt.inspection import Axes, ControlFlow, Inspection, WeightValues

# Rows of a table that has no natural end; --verbose shows them all.
TOP = 12
_ONE_BLOCK = "give one of its blocks, or `graphopt bundle merge` it"


@click.command("inspect", context_settings=HELP)
@click.argument("model", metavar="IN")
@click.option(
    "--weights",
    "scan",
    is_flag=True,
    help="Read every weight: what its values are like, or whether a bundle is as it was written.",
)
@click.option("--channels", is_flag=True, help="Say which channels can be permuted, scaled or rotated together.")
@click.option(
    "--calibration", metavar="F.npz|DIR", help="Of a bundle: run it on inputs of yours and count where they lead."
)
@common_options
def command(model: str, scan: bool, channels: bool, calibration: str | None, as_json: bool, verbose: bool) -> None:
    """Show what is in a model: ops, weights, axes, control flow, custom ops. Of a bundle: its plan.

    Weights are not read, however large, unless --weights asks for it.
    """
    from pathlib import Path

    from graphopt.files import load_model
    from graphopt.files.bundle_folder import is_bundle
    from graphopt.inspection import describe, scan_weights

    if is_bundle(Path(model)):
        if channels:
            raise BadInput("--channels is for .onnx files", where=model, hint=_ONE_BLOCK)
        _inspect_bundle(Path(model), scan, calibration, as_json=as_json, verbose=verbose)
        return
    if calibration is not None:
        raise BadInput("--calibration is for bundles", where=model)
    loaded = load_model(model)
    found = describe(loaded, Path(model))
    if scan:
        with progress("reading weights", len(found.weights), enabled=not as_json) as advance:
            values = scan_weights(loaded, lambda name: advance(1, name[-40:]))
        found = dataclasses.replace(found, values=values)
    classes = None
    if channels:
        from graphopt.channels import summarise

        classes = summarise(loaded)
    if as_json:
        print_json(found if classes is None else {**found.to_json(), "channels": classes})
        return
    _show(found, None if verbose else TOP)
    for group, summaries in (classes or {}).items():
        _show_classes(group, summaries, None if verbose else TOP)
    if classes is not None and (inner := _in_bodies(loaded)):
        where = "weight is in a body of If, Loop or Scan" if inner == 1 else "weights are in bodies of If, Loop or Scan"
        console().print(f"{inner:,} {where}, whose channels are not looked at; --recipe static makes blocks of bodies")


def _in_bodies(model: ir.Model) -> int:
    """How many weights are in bodies; indices and sizes do not count."""
    from graphopt import graphs

    bodies = (body for graph in graphs.all_graphs(model) for node in graph for body in graphs.subgraphs(node))
    tensors = [
        graphs.constant_tensor(value)
        for body in bodies
        for value in (*body.initializers.values(), *(output for node in body for output in node.outputs))
    ]
    return sum(tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1 for tensor in tensors)


def _inspect_bundle(bundle: Path, scan: bool, calibration: str | None, *, as_json: bool, verbose: bool) -> None:
    from graphopt.bundles.contents import bundle_contents

    found = bundle_contents(bundle, weights=scan)
    if calibration is not None:
        counted = _count(found, calibration, quiet=as_json)
        counted.trials = [] if found.profile is None else found.profile.trials
        found = dataclasses.replace(found, profile=counted)
    if as_json:
        print_json(found)
    else:
        _show_bundle(found, whole=verbose)


def _count(found: BundleContents, calibration: str, *, quiet: bool) -> Profile:
    """Run a bundle on the user's inputs, and count where they lead."""
    from pathlib import Path

    from graphopt.bundles.counting import count
    from graphopt.bundles.running import input_values
    from graphopt.calibration import read_calibration

    feeds = read_calibration(Path(calibration), input_values(found.plan))
    with progress("running", len(feeds), enabled=not quiet) as advance:
        return count(found.path, feeds, done=advance)


def _show_bundle(found: BundleContents, *, whole: bool) -> None:
    from graphopt.bundles.drawing import draw, shortened

    out = console()
    top = None if whole else 3 * TOP
    scanned, changed = found.changed is not None, found.changed or ()
    shared = f", {_size(found.shared_bytes)} of them read by several blocks" if found.shared_bytes else ""
    out.print(
        table(
            ("bundle", str(found.path)),
            [
                ("version", found.version),
                ("blocks", f"{len(found.blocks):,}, {sum(one.block.nodes for one in found.blocks):,} nodes"),
                ("size", _size(found.bytes) + shared),
                *((("as written", ", ".join(changed) + " changed" if changed else "yes"),) if scanned else ()),
            ],
        )
    )
    out.print()
    lines = draw(found.plan, found.profile, whole=whole)
    width = MAX_WIDTH - (0 if found.profile is None else 2 + max(len(line.ran) for line in lines))
    drawn = [(_hanging(line, width), *((line.ran,) if found.profile else ())) for line in lines]
    out.print(table(("plan", *((("ran", "right"),) if found.profile else ())), _cut(drawn, top, "lines")))
    for trial in found.profile.trials if found.profile else ():
        out.print(trial.told())
    out.print()
    engines = any(one.block.backend for one in found.blocks)
    held = any(one.control_flow for one in found.blocks)
    ports = (port.name for one in found.blocks for port in (*one.block.inputs, *one.block.outputs))
    names = None if whole else shortened(ports, 24)
    rows = [
        (
            one.name,
            f"{one.block.nodes:,}",
            _size(one.bytes),
            f"{one.used:,}",
            _port_names(one.block.inputs, names),
            _port_names(one.block.outputs, names),
            *((_pairs(one.control_flow),) if held else ()),
            *((one.block.backend or one.block.reason or "onnxruntime",) if engines else ()),
        )
        for one in found.blocks
    ]
    told = (*(("holds",) if held else ()), *(("runs on",) if engines else ()))
    columns = ("block", ("nodes", "right"), ("size", "right"), ("used", "right"), "inputs", "outputs", *told)
    out.print(table(columns, _cut(rows, top, "blocks")))


def _hanging(line: Line, width: int) -> str:
    """A line of a drawing, its continuations further in than itself."""
    indent = "  " * line.depth
    return "\n".join(
        textwrap.wrap(
            line.text, width, initial_indent=indent, subsequent_indent=f"{indent}      ", break_on_hyphens=False
        )
    )


def _port_names(ports: Sequence[Port], shorter: Mapping[str, str] | None) -> str:
    """The names of ports, shortened; None: all of them, as they are."""
    shown = ports if shorter is None or len(ports) <= 4 else ports[:3]
    names = [port.name if shorter is None else shorter.get(port.name, port.name) for port in shown]
    more = len(ports) - len(shown)
    return " ".join([*names, f"and {more} more"] if more else names)


def _show(found: Inspection, top: int | None) -> None:
    out = console()
    constants = found.ops.get("Constant", 0)  # `optimize` does not count them
    out.print(
        table(
            ("model", found.path),
            [
                ("written by", found.producer or "unknown"),
                ("format", f"IR version {found.ir_version}, opsets {_pairs(found.opsets)}"),
                (
                    "size",
                    _size(found.bytes) + "".join(f" + {_size(f.bytes)} in {f.location}" for f in found.data_files),
                ),
                ("nodes", f"{found.nodes:,}" + (f", {constants:,} of them Constant" if constants else "")),
                ("weights", f"{found.parameters:,} in {len(found.weights):,} tensors, {_size(found.weight_bytes)}"),
                *((("functions", _pairs(found.functions)),) if found.functions else ()),
                *((("metadata", ", ".join(found.metadata)),) if found.metadata else ()),
            ],
        )
    )
    ports = [("input", value) for value in found.inputs] + [("output", value) for value in found.outputs]
    out.print()
    out.print(
        table(
            ("", "name", "type", "axes"),
            _cut(
                [
                    (side, value.name, value.type, _axes(value) + (" (has a default)" if value.has_default else ""))
                    for side, value in ports
                ],
                None if top is None else 3 * top,
                "ports",
            ),
        )
    )
    out.print()
    ops = list(found.ops.items())
    out.print(table(("op", ("nodes", "right")), _cut([(op, f"{count:,}") for op, count in ops], top, "ops")))
    if found.custom_ops:
        out.print()
        out.print(
            table(
                ("custom op", "version", ("nodes", "right"), "meaning"),
                [
                    (
                        f"{op.domain or 'ai.onnx'}::{op.op}",
                        "not imported" if op.version is None else op.version,
                        f"{op.count:,}",
                        "function in the model" if op.has_function else "known to its runtime only",
                    )
                    for op in found.custom_ops
                ],
            )
        )
    if found.control_flow:
        out.print()
        lines = [(line,) for line in _tree(found.control_flow, 0)]
        out.print(table(("control flow",), _cut(lines, None if top is None else 3 * top, "lines")))
    if found.weights:
        out.print()
        out.print(
            table(
                ("weights of type", ("tensors", "right"), ("elements", "right"), ("size", "right")),
                [
                    (dtype, f"{total.tensors:,}", f"{total.elements:,}", _size(total.bytes))
                    for dtype, total in found.weights_by_dtype.items()
                ],
            )
        )
        if found.values is None:
            out.print()
            rows = [
                (_elide(weight.name, 50), weight.dtype, _shape(weight.shape), _size(weight.bytes), weight.file or "")
                for weight in found.weights
            ]
            out.print(table(("weight", "type", "shape", ("size", "right"), "file"), _cut(rows, top, "weights")))
    if found.values is not None:
        out.print()
        _show_values(found.values, top)


def _show_values(values: Sequence[WeightValues], top: int | None) -> None:
    """The weights worth a look first: those with NaN or infinite values, out of float16's range, dead channels."""

    def concern(value: WeightValues) -> tuple[bool, bool, bool, int]:
        size = 1
        for axis in value.shape:
            size *= axis
        constant = value.constant_first + value.constant_last
        return (not (value.nan or value.inf), not value.over_float16, not constant, -size)

    rows = [
        (
            _elide(value.name, 28),
            value.dtype,
            _shape(value.shape),
            "" if value.min is None else f"{value.min:.3g}",
            "" if value.max is None else f"{value.max:.3g}",
            f"{value.zeros:.1%}",
            ", ".join(_remarks(value)),
        )
        for value in sorted(values, key=concern)
    ]
    columns = ("weight", "type", "shape", ("min", "right"), ("max", "right"), ("zeros", "right"), "remarks")
    console().print(table(columns, _cut(rows, top, "weights")))


def _show_classes(group: str, classes: Sequence[ClassSummary], top: int | None) -> None:
    """The channel classes of a group, those that many weights have first among the free and among the pinned."""
    rows = [
        (
            " ".join(_elide(name, 30) for name in (one.weights[0], *one.weights[1:][-1:])),
            f"{one.size:,}",
            f"{len(one.weights):,}",
            f"{one.values:,}",
            "; ".join(_elide(reason, 60) for reason in one.pinned[:2]) or "free",
        )
        for one in sorted(classes, key=lambda one: (bool(one.pinned), -len(one.weights)))
    ]
    columns = ("first and last weight", ("channels", "right"), ("weights", "right"), ("values", "right"), "pinned by")
    out = console()
    out.print()
    if not rows:
        out.print(f"channel classes: {group}: none")
        return
    out.print(table(columns, _cut(rows, top, "classes"), title=f"channel classes: {group}"))


def _remarks(value: WeightValues) -> Iterator[str]:
    if value.nan:
        yield f"{value.nan:,} NaN"
    if value.inf:
        yield f"{value.inf:,} infinite"
    if value.over_float16:
        yield f"{value.over_float16:,} beyond float16"
    if value.constant_first:
        yield f"{value.constant_first:,}/{value.shape[0]:,} constant along axis 0"
    if value.constant_last:
        yield f"{value.constant_last:,}/{value.shape[-1]:,} constant along axis {len(value.shape) - 1}"


def _tree(nodes: Sequence[ControlFlow], depth: int) -> Iterator[str]:
    for node in nodes:
        yield "  " * depth + (f"{node.op} {node.name}" if node.name else node.op)
        for body in node.bodies:
            yield "  " * (depth + 1) + f"{body.attribute}: {body.nodes:,} {'node' if body.nodes == 1 else 'nodes'}"
            yield from _tree(body.children, depth + 2)


def _cut(rows: Sequence[tuple[str, ...]], top: int | None, what: str) -> Sequence[tuple[str, ...]]:
    if top is None or len(rows) <= top + 1:
        return rows
    blank = ("",) * (len(rows[0]) - 1)
    return [*rows[:top], (f"... {len(rows) - top:,} more {what} (--verbose)", *blank)]


def _elide(name: str, width: int) -> str:
    """The end of a name, which tells weights apart better than its beginning."""
    return name if len(name) <= width else "..." + name[3 - width :]


def _pairs(items: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in items.items())


def _axes(value: Axes) -> str:
    return "of unknown rank" if value.shape is None else _shape(value.shape)


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if axis is None else str(axis) for axis in shape) + "]"


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
