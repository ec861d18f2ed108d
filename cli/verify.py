"""``graphopt verify``: do two models compute the same?"""

from __future__ import annotations

import click

from graphopt.cli.output import (
    HELP,
    common_options,
    console,
    print_json,
    progress,
    tell_distance,
    tell_inputs,
    tell_ways,
)


@click.command("verify", context_settings=HELP)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--calibration", metavar="F.npz|DIR", help="Inputs of your own: an .npz, or a folder of them.")
@click.option("--custom-ops", metavar="LIB", help="Shared library of ONNX Runtime custom operators.")
@click.option("--bitwise", is_flag=True, help="Ask for the same bits (optimizations off).")
@click.option("--fail-if", multiple=True, metavar="COND", help="Use this instead of the rounding rule: 'max_abs>1e-3'.")
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    calibration: str | None,
    custom_ops: str | None,
    bitwise: bool,
    fail_if: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Compare what two models compute.

    A with the runtime's optimizations off is the reference. B counts as the same where every output is no further from
    A's float64 result than four times A is. Exit 1 where it does not.

    B, or both, may be a bundle: then every branch is forced both ways, and loops to no, one and many turns.
    """
    from graphopt.verifying import verify

    with progress("verifying", enabled=not as_json) as advance:
        report = verify(
            a,
            b,
            calibration=calibration,
            custom_ops=custom_ops,
            bitwise=bitwise,
            fail_if=fail_if,
            progress=lambda text: advance(1, text),
        )
    if as_json:
        print_json(report.to_json())
    else:
        out = console()
        found = report.verification
        out.print("same" if report.passed else f"different: {report.reason}")
        out.print(
            f"{tell_distance(found)}\non {tell_inputs(found)}; yardstick: {found.coverage['reference']}",
        )
        for line in tell_ways(found.coverage, verbose):
            out.print(line)
        if found.coverage["vacuous"]:
            out.print(f"says nothing (constant on every input tried): {', '.join(found.coverage['vacuous'])}")
        if verbose:
            for line in report.differences:
                out.print(f"  {line}")
    if not report.passed:
        ctx.exit(1)
