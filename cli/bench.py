"""``graphopt bench``: time models against each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table

if TYPE_CHECKING:
    from graphopt.benchmarking import BenchResult, ModelTiming


@click.command("bench", context_settings=HELP)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A [B ...]")
@click.option("--shapes", metavar="NAME=2x128,...", help="Sizes of inputs; made up where not given.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="F.npz|DIR",
    help="Your own inputs; the first is timed.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads within an operator.",
)
@click.option(
    "--seconds", metavar="S", type=float, default=5.0, show_default=True, help="How long to time, all models together."
)
@common_options
def command(
    models: tuple[Path, ...],
    shapes: str | None,
    calibration: Path | None,
    threads: int,
    seconds: float,
    as_json: bool,
    verbose: bool,
) -> None:
    """Time models against the first one.

    All run in one process, in turns, on the same inputs, and their outputs are compared. The speedup is the
    first model's time over the other's: above 1 is faster. One is called faster only where the 95 % interval
    says so.
    """
    from graphopt.benchmarking import bench, parse_shapes

    with progress("benchmark", total=1.0, enabled=not as_json) as advance:
        result = bench(
            models,
            shapes=parse_shapes(shapes) if shapes else None,
            calibration=calibration,
            threads=threads,
            seconds=seconds,
            progress=advance,
        )
    if as_json:
        print_json(result)
    else:
        _show(result, verbose=verbose)


def _show(result: BenchResult, *, verbose: bool) -> None:
    names = _short_names([model.path for model in result.models])
    numbers = ("p50 ms", "p90 ms", "p99 ms", "CPU ms", "calls/s", "peak MB", "size MB", "speedup (95 %)", "max diff")
    rows = [
        (
            name,
            *(_figure(value) for value in (model.wall_ms.p50, model.wall_ms.p90, model.wall_ms.p99, model.cpu_ms)),
            _figure(model.calls_per_second),
            _figure(model.peak_bytes / 1e6),
            _figure(model.file_bytes / 1e6),
            "" if index == 0 else _ratio(model),
            "" if index == 0 else f"{model.max_abs_difference:.1e}",
        )
        for index, (name, model) in enumerate(zip(names, result.models, strict=True))
    ]
    out = console()
    out.print(table(["model", *((number, "right") for number in numbers)], rows))
    out.print()
    for name, model in zip(names[1:], result.models[1:], strict=True):
        out.print(_verdict(name, names[0], model))
        if model.max_abs_difference > 1e-2 * max(model.max_abs_output, 1e-30):
            out.print(
                f"warning: the outputs of {name} are not those of {names[0]}: they differ by "
                f"{model.max_abs_difference:.1e} where the largest is {model.max_abs_output:.1e}"
            )
    timed = ", ".join(f"{name} {what}" for name, what in result.timed_on.items()) or "no inputs"
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    out.print(f"Timed on {timed}: {result.rounds} rounds, {result.loads} loads, {threads}. Peak: in its own process.")
    if verbose:
        for name, model in zip(names, result.models, strict=True):
            cpu = model.cpu_speedup
            out.print(f"{name}: {model.path}; CPU speedup {cpu.value:.3f} ({cpu.low:.3f} to {cpu.high:.3f})")
        out.print(f"Outputs compared on {result.compared_on} feeds; {result.environment}")


def _verdict(name: str, first: str, model: ModelTiming) -> str:
    ratio = model.speedup
    interval = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    if not ratio.differs:
        return f"No difference in speed is shown between {name} and {first} ({interval})."
    if ratio.value > 1:
        return f"{name} is {ratio.value:.2f}x as fast as {first} ({interval})."
    return f"{name} is slower than {first}: {ratio.value:.2f}x as fast ({interval})."


def _ratio(model: ModelTiming) -> str:
    ratio = model.speedup
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _short_names(paths: list[Path]) -> list[str]:
    """File names; with the folders in which they differ, or a number, where two are alike."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names) and len(set(paths)) == len(paths):
        shared = Path(os.path.commonpath([path.absolute() for path in paths]))
        names = [str(path.absolute().relative_to(shared)) for path in paths]
    for index, name in enumerate(names):
        if name in names[:index]:
            names[index] = f"{name} ({names[:index].count(name) + 1})"
    return names
