"""``graphopt export``: a torch module to ONNX."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, table

if TYPE_CHECKING:
    from graphopt.exporting import ExportResult


@click.command("export", context_settings=HELP)
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "-o", "--out", metavar="OUT.onnx", required=True, type=click.Path(path_type=Path), help="The ONNX file to write."
)
@click.option("--opset", metavar="N", type=int, default=20, show_default=True, help="The ONNX opset to write.")
@common_options
def command(factory: str, out: Path, opset: int, as_json: bool, verbose: bool) -> None:
    """Export a torch module to ONNX and compare the two.

    MODULE is an importable name or the path of a .py file. FACTORY() returns (module, example_inputs,
    dynamic_axes): example_inputs is {input: tensor}, dynamic_axes is {input: {axis: symbol}} or None.

    Python control flow that depends on tensors or on the sizes of dynamic axes (if, while, break, return)
    becomes If and Loop. The file is written only if ONNX Runtime computes from it what the module computes,
    on three inputs or more of different values and sizes, and on every side of every such decision.
    """
    from graphopt.exporting import export

    if not as_json and sys.stderr.isatty():
        click.echo("exporting (torch takes some seconds)", err=True)
    with _keep_chatter(verbose):
        result = export(factory, out, opset=opset, verbose=verbose)
    if as_json:
        print_json(result)
    else:
        _print(result)


@contextmanager
def _keep_chatter(verbose: bool) -> Iterator[None]:
    """Keep what torch prints, from Python or C++, off the terminal; to standard error if ``verbose``."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept_out, kept_err = os.dup(1), os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(kept_err if verbose else sink.fileno(), 1)
            if not verbose:
                os.dup2(sink.fileno(), 2)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(kept_out, 1)
                os.dup2(kept_err, 2)
    finally:
        os.close(kept_out)
        os.close(kept_err)


def _print(result: ExportResult) -> None:
    out = console()
    rows = [
        (kind, value.name, value.dtype, "×".join(map(str, value.axes)) or "scalar")
        for kind, values in (("input", result.inputs), ("output", result.outputs))
        for value in values
    ]
    out.print(table(["", "name", "type", "axes"], rows))
    out.print()
    out.print(
        table(
            ["compared at", "output", ("max abs", "right"), ("max rel", "right"), ("allowed", "right")],
            [
                (
                    ", ".join(f"{symbol}={size}" for symbol, size in case.sizes.items()) or f"values {number}",
                    output.name,
                    f"{output.max_abs:.1e}",
                    f"{output.max_rel:.1e}",
                    f"{output.tolerance:g}",
                )
                for number, case in enumerate(result.comparison, 1)
                for output in case.outputs
            ],
        )
    )
    out.print()
    for note in result.notes:
        out.print(f"note: {note}")
    out.print(f"{result.path}: computes what the module does")
    out.print(
        f"{result.nodes} nodes, {result.parameters:,} parameters, {result.bytes / 1e6:.1f} MB, opset {result.opset}"
    )
