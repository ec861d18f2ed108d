"""``graphopt selftest``: what this machine's GPU says of our kernels and engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table

if TYPE_CHECKING:
    from graphopt.selftesting import EngineResult, KernelResult, SelftestReport


@click.command("selftest", context_settings=HELP)
@click.option(
    "--gpu", "device", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Which GPU."
)
@click.option("--small", is_flag=True, help="Few and little samples: done in seconds.")
@common_options
def command(device: int, small: bool, as_json: bool, verbose: bool) -> int:
    """Build, run and compare every plugin on this machine's GPU.

    Every kernel is launched through the driver, as TensorRT would launch it, and compared with the definition; where
    TensorRT is installed, so are small engines. Exit code 2 without a GPU, 1 where something is wrong.
    """
    from graphopt.selftesting import selftest

    with progress("self-test", enabled=not as_json) as advance:
        report = selftest(device=device, small=small, progress=lambda what: advance(1, what))
    if as_json:
        print_json(report)
    else:
        show(report, verbose=verbose)
    return 0 if report.ok else 1


def show(report: SelftestReport, *, verbose: bool) -> None:
    """Print the tables of a report."""
    out = console()
    capability, cuda = (".".join(map(str, version)) for version in (report.capability, report.cuda))
    out.print(f"{report.gpu}: compute capability {capability}, {report.memory_gb:g} GB; the driver is for CUDA {cuda}")
    out.print()
    out.print(table(["what", "state", "detail"], [(one.what, one.status, one.detail) for one in report.findings]))
    out.print()
    columns: list[str | tuple[str, str]] = [
        "kernels",
        "dtype",
        ("tactics", "right"),
        ("launches", "right"),
        ("worst", "right"),
        "state",
    ]
    out.print(table(columns, _kernel_rows(report.kernels, verbose=verbose)))
    out.print("worst: how far the outputs are off at most, as a part of what rounding allows; above 1 is wrong.")
    out.print()
    if report.engines:
        columns = [
            "engine",
            "case",
            ("plugin layers", "right"),
            ("worst", "right"),
            ("GPU ms", "right"),
            ("speedup (95 %)", "right"),
            "state",
        ]
        out.print(table(columns, [_engine_row(one) for one in report.engines]))
        out.print("speedup: the time of the same engine without the plugin over this one's.")
    else:
        out.print("No engine was built: no TensorRT that runs here is installed.")
    out.print()
    for kernel in report.kernels:
        if kernel.detail:
            out.print(f"{kernel.plugin} {kernel.kernel} {kernel.dtype}, tactic {kernel.tactic}: {kernel.detail}")
    for engine in report.engines:
        if engine.detail:
            out.print(f"{engine.library}, {engine.case}: {engine.detail}")
    out.print(_verdict(report))


def _kernel_rows(results: Sequence[KernelResult], *, verbose: bool) -> list[tuple[str, ...]]:
    """One row a kernel and dtype; with ``verbose`` one a tactic."""
    groups: dict[tuple[str, str, int], list[KernelResult]] = {}
    for one in results:
        groups.setdefault((one.kernel or one.plugin, one.dtype, one.tactic if verbose else 0), []).append(one)
    rows: list[tuple[str, ...]] = []
    for (kernel, dtype, tactic), ones in groups.items():
        worst = max((one.worst for one in ones if one.worst is not None), default=None)
        states = {one.status for one in ones}
        state = next(status for status in ("wrong", "failed", "skipped", "warning", "ok") if status in states)
        rows.append(
            (
                kernel,
                dtype,
                str(tactic) if verbose else str(len(ones)),
                str(sum(one.launches for one in ones)),
                "" if worst is None else f"{worst:.2f}",
                state,
            )
        )
    return rows


def _engine_row(one: EngineResult) -> tuple[str, ...]:
    ratio = one.speedup
    return (
        one.library,
        one.case,
        "" if one.layers is None else str(one.layers),
        "" if one.worst is None else f"{one.worst:.2f}",
        "" if one.compute_ms is None else f"{one.compute_ms:.4f}",
        "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
        one.status,
    )


def _verdict(report: SelftestReport) -> str:
    launched = sum(one.launches for one in report.kernels)
    states = report.states
    bad = sum(state in ("wrong", "failed") for state in states)
    skipped = states.count("skipped")
    left = f"; {skipped} skipped" if skipped else ""
    if bad:
        return f"{bad} of {len(states)} checks did not pass{left}."
    return f"All is well: {launched} launches and {len(report.engines)} engines gave the right numbers{left}."
