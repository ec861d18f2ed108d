"""``graphopt bisect``: which rewrite breaks a tolerance."""

from __future__ import annotations

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, recipe_options, table


@click.command("bisect", context_settings=HELP)
@click.argument("model", metavar="IN.onnx")
@recipe_options
@click.option("--custom-ops", metavar="LIB", help="Shared library of ONNX Runtime custom operators.")
@click.option("--fail-if", multiple=True, metavar="COND", help="The tolerance: 'max_abs>1e-5'. Default: rounding.")
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    recipe: tuple[str, ...],
    settings: tuple[str, ...],
    calibration: str | None,
    target: str,
    custom_ops: str | None,
    fail_if: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Find the rewrite that breaks a tolerance, and the first tensor that differs.

    Nothing is undone on the way and nothing is written. Models are run with the runtime's optimizations off and on;
    where the optimizations alone break the tolerance, off only. Exit 1 where a culprit was found.
    """
    from graphopt.bisecting import bisect

    with progress("bisecting", enabled=not as_json) as advance:
        culprit = bisect(
            model,
            recipe=recipe or ("safe",),
            settings=settings,
            calibration=calibration,
            target=target,
            custom_ops=custom_ops,
            fail_if=fail_if,
            progress=lambda text: advance(1, text),
        )
    if as_json:
        print_json({"culprit": None if culprit is None else culprit.to_json()})
    elif culprit is None:
        console().print("no rewrite breaks the tolerance")
    else:
        application = culprit.application
        rows = [
            ("pass", f"{application.pass_name}, rule {application.rule}"),
            ("application", f"{culprit.number} of {culprit.applications}: {application.key}"),
            ("nodes", ", ".join(application.sources) or "none removed"),
            ("result", culprit.reason),
            (
                "first tensor",
                f"{culprit.tensor} (differs by {culprit.tensor_max_abs:.3g})" if culprit.tensor else "none",
            ),
            ("leave it out", f"--set {application.pass_name}.enabled=false"),
        ]
        console().print(table(["", ""], rows, title="the culprit"))
    if culprit is not None:
        ctx.exit(1)
