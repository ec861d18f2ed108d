"""``graphopt optimize``: rewrite, verify, write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table, to_plain
from graphopt.errors import BadInput

if TYPE_CHECKING:
    from graphopt.report import Report


@click.command("optimize", context_settings=HELP)
@click.argument("model", metavar="IN.onnx")
@click.option("-o", "--out", metavar="OUT.onnx", help="Where to write. Default: IN.opt.onnx.")
@click.option(
    "--recipe", "-r", multiple=True, metavar="R", help="safe (default), fp16, int8, int4 or a YAML file; repeatable."
)
@click.option("--set", "settings", multiple=True, metavar="P.K=V", help="Set a parameter of a pass; P.enabled=false.")
@click.option("--calibration", metavar="F.npz|DIR", help="Inputs of your own: an .npz, or a folder of them.")
@click.option("--target", default="onnxruntime", show_default=True, metavar="T", help="What the result runs on.")
@click.option("--report", metavar="R.json", help="Write the report here, too.")
@click.option("--no-verify", is_flag=True, help="Check the structure only, not the numbers.")
@click.option("--custom-ops", metavar="LIB", help="Shared library of ONNX Runtime custom operators.")
@click.option("--evaluate", metavar="MODULE:FN", help="Your metric: FN(run) -> float, run(feeds) -> outputs.")
@click.option("--min", "minimum", type=float, metavar="X", help="Least value of that metric.")
@click.option("--fail-if", multiple=True, metavar="COND", help="Write nothing if it holds: 'cosine<0.999'; repeatable.")
@common_options
def command(
    model: str,
    out: str | None,
    recipe: tuple[str, ...],
    settings: tuple[str, ...],
    calibration: str | None,
    target: str,
    report: str | None,
    no_verify: bool,
    custom_ops: str | None,
    evaluate: str | None,
    minimum: float | None,
    fail_if: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Rewrite a model, verify it, write it.

    The rewrites are checked against the original, on inputs of your own (--calibration) or on made-up ones of several
    sizes. One that computes something else is undone, and the report says so.
    """
    from graphopt.optimizing import optimize

    if report is not None and not Path(report).parent.is_dir():
        raise BadInput(
            "no such folder", where=str(Path(report).parent), hint="--report takes a path that can be written"
        )
    with progress("optimizing", enabled=not as_json) as advance:
        result = optimize(
            model,
            out,
            recipe=recipe or ("safe",),
            settings=settings,
            calibration=calibration,
            target=target,
            verify=not no_verify,
            custom_ops=custom_ops,
            evaluate=evaluate,
            minimum=minimum,
            fail_if=fail_if,
            progress=lambda text: advance(1, text),
        )
    if report is not None:
        _write_report(result, report)
    if as_json:
        print_json(result.to_json())
    else:
        _show(result, verbose)


def _write_report(report: Report, path: str) -> None:
    try:
        Path(path).write_text(json.dumps(to_plain(report), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=path, hint="the model was written") from error


def _show(report: Report, verbose: bool) -> None:
    out = console()
    assert report.output is not None
    before, after = report.input, report.output
    out.print(
        table(
            ["", ("nodes", "right"), ("parameters", "right"), ("MB", "right")],
            [
                ("before", f"{before.nodes:,}", f"{before.parameters:,}", f"{before.bytes / 1e6:.2f}"),
                ("after", f"{after.nodes:,}", f"{after.parameters:,}", f"{after.bytes / 1e6:.2f}"),
            ],
        )
    )
    out.print()
    shown = [p for p in report.passes if verbose or p.kept or p.undone or p.error]
    out.print(
        table(
            ["pass", "kind", ("kept", "right"), ("undone", "right"), ("nodes", "right"), ("s", "right"), "note"],
            [
                (
                    p.name,
                    p.kind,
                    p.kept,
                    p.undone,
                    f"{p.nodes_after - p.nodes_before:+,}" if p.nodes_after != p.nodes_before else "",
                    f"{p.seconds:.2f}",
                    p.error or p.reason,
                )
                for p in shown
            ],
        )
    )
    if len(shown) < len(report.passes):
        out.print(f"{len(report.passes) - len(shown)} more found nothing to do (--verbose lists them)", style="dim")
    if verbose:
        for p in report.passes:
            for node, reason in p.near_misses.items():
                out.print(f"  {p.name} left {node}: {reason}", style="dim")
    out.print()
    out.print(_verdict(report))
    out.print(f"wrote {after.path} in {report.seconds:.1f} s")


def _verdict(report: Report) -> str:
    found = report.verification
    if found.verdict == "skipped":
        return "not verified (--no-verify)"
    coverage = found.coverage
    lines = [
        f"verified: {found.verdict}; largest difference {found.max_abs:.2g} (relative {found.max_rel:.2g}),"
        f" cosine {found.cosine_min:.7f}, {found.cases} {coverage['feeds']} cases",
        f"checked one by one: {coverage['checked_alone']} of {coverage['applications']} rewrites;"
        f" the rest, and all together, as a whole with and without the runtime's optimizations",
    ]
    if coverage["vacuous"]:
        lines.append(f"says nothing (constant on every input tried): {', '.join(coverage['vacuous'][:4])}")
    if coverage["opaque"]:
        lines.append(
            f"carried through unchecked: {', '.join(coverage['opaque'][:4])} (unknown to ONNX Runtime),"
            f" and {len(coverage['unchecked'])} nodes behind them"
        )
    if coverage["twin"]:
        lines.append("narrow floats that ONNX Runtime's CPU cannot run were checked in float32, not as deployed")
    if coverage["random"]:
        lines.append("the model draws random numbers: only types and shapes were compared")
    for name, value in found.metric.items():
        lines.append(f"your metric {name}: {value:.6g}")
    return "\n".join(lines)
