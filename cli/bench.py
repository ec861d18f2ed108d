"""``graphopt bench``: time models against each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table

if TYPE_CHECKING:
    from graphopt.benchmarking import BenchResult, ModelTiming, Ratio


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
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where ONNX files run; cuda beside an engine or a torch module, else cpu.",
)
@click.option(
    "--torch", "torch", multiple=True, metavar="FILE.py:FACTORY", help="A torch module to time on the GPU; repeatable."
)
@common_options
def command(
    models: tuple[Path, ...],
    shapes: str | None,
    calibration: Path | None,
    threads: int,
    seconds: float,
    device: Literal["cpu", "cuda"] | None,
    torch: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Time models against the first one.

    ONNX files, engines and torch modules run in one process, in turns, on the same inputs, and their outputs are
    compared. The speedup is the first one's time over the other's: above 1 is faster. One is called faster only where
    the 95 % interval says so.
    """
    from graphopt.benchmarking import bench, parse_shapes

    with progress("benchmark", total=1.0, enabled=not as_json) as advance:
        result = bench(
            models,
            shapes=parse_shapes(shapes) if shapes else None,
            calibration=calibration,
            threads=threads,
            seconds=seconds,
            device=device,
            torch=torch,
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
            None if model.peak_bytes is None else _figure(model.peak_bytes / 1e6),
            _figure(model.file_bytes / 1e6),
            "" if index == 0 else _ratio(model),
            "" if index == 0 else f"{model.max_abs_difference:.1e}",
        )
        for index, (name, model) in enumerate(zip(names, result.models, strict=True))
    ]
    out = console()
    out.print(table(["model", *((number, "right") for number in numbers)], rows))
    out.print()
    _show_gpu(result, names)
    for name, model in zip(names[1:], result.models[1:], strict=True):
        out.print(_verdict(name, names[0], model))
        if model.one_by_one:
            out.print(f"The outputs of {name} and {names[0]} are compared for each sample alone (--per-sample).")
        if model.max_abs_difference > 1e-2 * max(model.max_abs_output, 1e-30):
            out.print(
                f"warning: the outputs of {name} are not those of {names[0]}: they differ by "
                f"{model.max_abs_difference:.1e} where the largest is {model.max_abs_output:.1e}"
            )
    timed = ", ".join(f"{name} {what}" for name, what in result.timed_on.items()) or "no inputs"
    loads = "1 load" if result.loads == 1 else f"{result.loads} loads"
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    peak = " Peak: in its own process." if any(model.peak_bytes is not None for model in result.models) else ""
    out.print(f"Timed on {timed}: {result.rounds} rounds, {loads}, {threads}.{peak}")
    if result.gpu is not None:
        out.print(f"GPU: {result.gpu}. Wall times are of whole calls from the host; inputs stay in the GPU's caches.")
    if verbose:
        for name, model in zip(names, result.models, strict=True):
            if model.gpu is not None:
                graph = ", replayed from a CUDA graph" if model.gpu.cuda_graph else ""
                out.print(f"{name}: {model.gpu.library}{graph}")
            cpu = model.cpu_speedup
            out.print(f"{name}: {model.path}; CPU speedup {cpu.value:.3f} ({cpu.low:.3f} to {cpu.high:.3f})")
        inputs = "1 input" if result.compared_on == 1 else f"{result.compared_on} inputs"
        versions = ", ".join(f"{name} {version}" for name, version in result.environment.items())
        out.print(f"Outputs compared on {inputs}; {versions}")


def _show_gpu(result: BenchResult, names: list[str]) -> None:
    """What the GPU's clock says of those models that ran on it."""
    on_gpu = [(name, model.gpu) for name, model in zip(names, result.models, strict=True) if model.gpu is not None]
    if not on_gpu:
        return
    rows = [
        (
            name,
            *(
                _figure(value)
                for value in (
                    gpu.latency_ms.p50,
                    gpu.latency_ms.p99,
                    gpu.upload_ms.p50,
                    gpu.compute_ms.p50,
                    gpu.compute_ms.p95,
                    gpu.compute_ms.p99,
                    gpu.download_ms.p50,
                    gpu.enqueue_ms.p50,
                )
            ),
            _interval(gpu.compute_speedup) if gpu.compute_speedup is not None and index else "",
        )
        for index, (name, gpu) in enumerate(on_gpu)
    ]
    columns = ("latency", "p99", "H2D", "compute", "p95", "p99", "D2H", "enqueue", "compute speedup")
    out = console()
    out.print(table(["on the GPU, ms", *((column, "right") for column in columns)], rows))
    out.print()
    for name, gpu in on_gpu:
        if gpu.enqueue_ms.p50 > gpu.compute_ms.p50:
            out.print(f"{name}: the host is slower at handing the work over than the GPU is at doing it.")


def _verdict(name: str, first: str, model: ModelTiming) -> str:
    ratio = model.speedup
    interval = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    if not ratio.differs:
        return f"No difference in speed is shown between {name} and {first} ({interval})."
    if ratio.value > 1:
        return f"{name} is {ratio.value:.2f}x as fast as {first} ({interval})."
    return f"{name} is slower than {first}: {ratio.value:.2f}x as fast ({interval})."


def _ratio(model: ModelTiming) -> str:
    return _interval(model.speedup)


def _interval(ratio: Ratio) -> str:
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
