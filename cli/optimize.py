"""``graphopt optimize``: rewrite, verify, write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import (
    HELP,
    MOST_NAMES,
    common_options,
    console,
    print_json,
    progress,
    recipe_options,
    table,
    tell_bytes,
    tell_distance,
    tell_inputs,
    tell_ways,
    to_plain,
)
from graphopt.errors import BadInput

if TYPE_CHECKING:
    from graphopt.bundles.making import BundleFacts
    from graphopt.report import Report
    from graphopt.rewrite.manager import PassRecord


MOST_NAMED = 4


@click.command("optimize", context_settings=HELP)
@click.argument("model", metavar="IN.onnx")
@click.option(
    "-o", "--out", metavar="OUT.onnx", help="Where to write. Default: IN.opt.onnx, or IN.bundle with recipe static."
)
@recipe_options
@click.option("--report", metavar="R.json", help="Write the report here, too.")
@click.option("--no-verify", is_flag=True, help="Check the structure only, not the numbers.")
@click.option("--custom-ops", metavar="LIB", help="Shared library of ONNX Runtime custom operators.")
@click.option("--evaluate", metavar="MODULE:FN", help="Your metric: FN(run) -> float, run(feeds) -> outputs.")
@click.option("--min", "minimum", type=float, metavar="X", help="Least value of that metric.")
@click.option("--fail-if", multiple=True, metavar="COND", help="Write nothing if it holds: 'cosine<0.999'; repeatable.")
@click.option("--per-sample", is_flag=True, help="In a bundle: samples that are done leave the batch.")
@click.option("--work", metavar="DIR", help="Keep long computations on weights here; an interrupted run goes on.")
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
    per_sample: bool,
    work: str | None,
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
            work=work,
            per_sample=per_sample,
            progress=lambda text: advance(1, text),
        )
    if report is not None:
        _write_report(result, report)
    if as_json:
        print_json(result.to_json())
    else:
        _show(result, verbose, _named(recipe, settings, result))


def _named(recipe: tuple[str, ...], settings: tuple[str, ...], report: Report) -> set[str]:
    """The passes of which the user wants to hear even if they did nothing.

    Those that a setting names, and those of a recipe other than the default of which no pass did anything.
    """
    from graphopt.recipes import load_recipes

    worked = {record.name for record in report.passes if record.kept or record.undone}
    named = {setting.partition("=")[0].rpartition(".")[0] for setting in settings}
    for found in load_recipes(recipe):
        passes = {step.name for step in found.passes}
        # Of a long recipe that found nothing, a list of all it has would say less than that.
        if found.name != "safe" and worked.isdisjoint(passes) and len(passes) <= MOST_NAMED:
            named |= passes
    return named


def _write_report(report: Report, path: str) -> None:
    try:
        Path(path).write_text(json.dumps(to_plain(report), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=path, hint="the model was written") from error


def _show(report: Report, verbose: bool, named: set[str]) -> None:
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
    shown = [p for p in report.passes if verbose or p.kept or p.undone or p.error or p.name in named]
    if shown:
        _show_passes(shown, named)
    if len(shown) < len(report.passes):
        left, more = len(report.passes) - len(shown), "more" if shown else "passes"
        out.print(f"{left} {more} found nothing to do (--verbose lists them)", style="dim")
    if verbose:
        for p in report.passes:
            for reason, nodes in _by_reason(p.near_misses).items():
                rest = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
                out.print(f"  {p.name} left {', '.join(nodes[:3])}{rest}: {reason}", style="dim")
    out.print()
    for p in report.passes:
        if p.kind == "lossy" and not p.kept:
            out.print(f"{p.name} was asked for and changed nothing: {p.error or p.reason or 'nothing matched'}")
    if report.bundle is not None:
        out.print("\n".join(_bundle(report.bundle, verbose)))
    out.print(_verdict(report, verbose))
    out.print(f"wrote {after.path} in {report.seconds:.1f} s")


def _show_passes(shown: Sequence[PassRecord], named: set[str]) -> None:
    console().print(
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
                    p.error or p.reason or ("" if p.kept or p.name not in named else "found nothing to do"),
                )
                for p in shown
            ],
        )
    )


def _by_reason(near_misses: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node, reason in near_misses.items():
        found.setdefault(reason, []).append(node)
    return found


def _bundle(bundle: BundleFacts, verbose: bool) -> list[str]:
    """What a bundle is made of, a line each."""
    shared = f", {bundle.shared} of them by a block that another has, too" if bundle.shared else ""
    count = "1 block" if bundle.blocks == 1 else f"{bundle.blocks} blocks"
    steps = "1 step" if bundle.steps == 1 else f"{bundle.steps} steps"
    lines = [f"bundle: {count}, {steps}{shared}, {tell_bytes(bundle.bytes)}"]
    if bundle.steps <= 1 and not bundle.kept:
        lines.append("there is no control flow to split at")
    reasons = [f"{name} stays inside a block: {reason}" for name, reason in bundle.kept.items()]
    lines += reasons if verbose else reasons[:MOST_NAMES]
    if len(lines) < len(reasons):
        lines.append(f"and {len(reasons) - MOST_NAMES} more (--verbose lists them)")
    return lines + [trial.told() for trial in bundle.trials]


def _verdict(report: Report, verbose: bool) -> str:
    found = report.verification
    if found.verdict == "skipped":
        return "not verified (--no-verify)"
    coverage = found.coverage
    lines = [
        f"verified: {found.verdict}, on {tell_inputs(found)}",
        tell_distance(found),
        (
            f"{coverage['checked_alone']} of {coverage['applications']} rewrites one by one; all together with the"
            " runtime's optimizations off and on"
            if coverage["applications"]
            else "nothing was rewritten; compared with the runtime's optimizations off and on"
        ),
    ]
    lines += tell_ways(coverage, verbose)
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
