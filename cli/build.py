"""``graphopt build``: an engine from an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table

if TYPE_CHECKING:
    from graphopt.engines import BuildResult


@click.command("build", context_settings=HELP)
@click.argument("model", metavar="IN.onnx", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", metavar="ENGINE", required=True, type=click.Path(path_type=Path), help="The engine to write."
)
@click.option("--backend", metavar="NAME", required=True, help="tensorrt-rtx (needs no GPU) or tensorrt.")
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME=MIN/OPT/MAX",
    help="Sizes of a dynamic input (x=1x16/4x64/8x128) or of a symbolic axis (batch=1/4/8). Repeatable.",
)
@common_options
def command(model: Path, out: Path, backend: str, shapes: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Build an engine, on a machine with or without a GPU.

    The library runs in a child process; a crash of it is an error here, and nothing is written.
    """
    from graphopt.engines import build_engine

    def show(line: str) -> None:
        click.echo(line, err=True)

    with progress(f"building {out.name}", enabled=not as_json and not verbose):
        result = build_engine(model, out, backend=backend, shapes=shapes, on_log=show if verbose else None)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: BuildResult) -> None:
    out = console()
    if result.profiles:
        rows = [
            (name, *("×".join(map(str, shape)) for shape in (profile.min, profile.opt, profile.max)))
            for name, profile in result.profiles.items()
        ]
        out.print(table(["input", "min", "opt", "max"], rows))
        out.print()
    memory = "" if result.peak_rss_bytes is None else f", {result.peak_rss_bytes / 1e6:.0f} MB of memory"
    out.print(
        f"{result.path}: {result.bytes / 1e6:.1f} MB in {result.seconds:.1f} s{memory};"
        f" {result.layers} layers, {result.backend} {result.version}"
    )
    out.print(result.status)
