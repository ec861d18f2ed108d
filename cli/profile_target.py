"""``graphopt profile-target``: what work costs on this machine."""

from __future__ import annotations

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table


@click.command("profile-target", context_settings=HELP)
@click.option("-o", "--out", required=True, metavar="T.yaml", help="Where to write it; give it to --target.")
@click.option("--target", default="onnxruntime", show_default=True, metavar="T", help="The target to start from.")
@click.option(
    "--threads", metavar="N", type=click.IntRange(1), default=1, show_default=True, help="Threads within an operator."
)
@common_options
def command(out: str, target: str, threads: int, as_json: bool, verbose: bool) -> None:
    """Measure this machine's cost profile and write it as a target.

    `optimize` itself times nothing: it decides by the profile of its target, so the same profile gives the same file.
    """
    from pathlib import Path

    from graphopt.files.folder import check_target
    from graphopt.targets import load_target
    from graphopt.targets.profiling import measure, write_target

    check_target(Path(out))
    found = load_target(target)
    with progress("measuring", enabled=not as_json):
        profile = measure(found, threads=threads)
    write_target(found, profile, Path(out))
    if as_json:
        print_json(profile.model_dump(mode="json"))
        return
    rows = [
        ("launching an operator", f"{found.costs.node:g} us", f"{profile.node:g} us"),
        ("matrix product, multiply-adds", f"{found.costs.gigaflops:g} G/s", f"{profile.gigaflops:g} G/s"),
        ("elementwise, bytes", f"{found.costs.gigabytes:g} GB/s", f"{profile.gigabytes:g} GB/s"),
        ("single elements, bytes", f"{found.costs.scattered:g} GB/s", f"{profile.scattered:g} GB/s"),
        ("entering a branch", f"{found.costs.control_flow:g} us", f"{profile.control_flow:g} us"),
        ("running a block of a bundle", f"{found.costs.block:g} us", f"{profile.block:g} us"),
    ]
    console().print(table(["cost", ("shipped", "right"), ("here", "right")], rows))
    console().print(f"wrote {out}")
