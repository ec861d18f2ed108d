"""``graphopt bundle``: what is done with bundles alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, tell_bytes, tell_inputs
from graphopt.errors import BadInput, GraphoptError

if TYPE_CHECKING:
    from graphopt.verifying import VerifyReport


@click.group("bundle", context_settings=HELP)
def command() -> None:
    """What is done with bundles alone. inspect, verify, bench and build take them as they take models."""


@command.command("merge", context_settings=HELP)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--out", metavar="OUT.onnx", required=True, type=click.Path(path_type=Path), help="Where to write.")
@click.option("--no-verify", is_flag=True, help="Check the structure only, not the numbers.")
@common_options
def merge(bundle: Path, out: Path, no_verify: bool, as_json: bool, verbose: bool) -> None:
    """Write a bundle as one ONNX file, with If, Loop and Scan.

    Both are run, and sent every way that they can go: nothing is written unless they give the same bits.
    """
    from graphopt.bundles.merge import merge_bundle
    from graphopt.files import load_model, stage_model

    if out.suffix != ".onnx":
        raise BadInput("is no name of an .onnx file", where=str(out))
    with progress("merging", enabled=not as_json) as advance, stage_model(merge_bundle(bundle), out) as staged:
        load_model(staged.staged_path)
        report = None if no_verify else _verify(staged.staged_path, bundle, lambda text: advance(1, text))
        staged.commit()
    size = sum(file.stat().st_size for file in (out, *out.parent.glob(f"{out.stem}.*.data")))
    if as_json:
        print_json({"bundle": bundle, "out": out, "bytes": size, "verification": report and report.verification})
        return
    told = "not verified" if report is None else f"the same bits on {tell_inputs(report.verification)}, every way"
    console().print(f"wrote {out}: {tell_bytes(size)}, {told}")


def _verify(merged: Path, bundle: Path, say: Callable[[str], None]) -> VerifyReport:
    from graphopt.verifying import verify

    report = verify(merged, bundle, bitwise=True, progress=say)
    if not report.passed:
        raise GraphoptError(f"the network does not compute what the bundle does: {report.reason}", where=str(bundle))
    return report
