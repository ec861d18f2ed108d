"""``graphopt import``: the factors of a state dict into the graph of the same network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table, tell_distance, tell_inputs

if TYPE_CHECKING:
    from graphopt.importing import ImportReport


@click.command("import", context_settings=HELP)
@click.argument("model", metavar="MODEL.onnx")
@click.argument("state", metavar="STATE")
@click.option("-o", "--out", metavar="OUT.onnx", required=True, help="The ONNX file to write.")
@click.option("--replace", is_flag=True, help="The graph is the uncompressed network's: replace its weights.")
@common_options
def command(model: str, state: str, out: str, replace: bool, as_json: bool, verbose: bool) -> None:
    """Write the factors of a checkpoint into the graph of its network.

    STATE is a .safetensors file, a torch file that holds a state dict (no code of it is run), or a folder of either:
    PIFA, SVD-LLM, ASVD, WeLore, SST, pairs U and V, or a LoRA adapter with its adapter_config.json.

    The graph is the network exported dense. Each weight that STATE holds as factors must be their product; the factors
    take its place, and the result is compared with MODEL. An adapter is added beside its layer.
    """
    from graphopt.importing import import_factors

    with progress("importing", enabled=not as_json) as advance:
        report = import_factors(model, state, out, replace=replace, progress=lambda text: advance(1, text))
    if as_json:
        print_json(report.to_json())
    else:
        _show(report, verbose)


def _show(report: ImportReport, verbose: bool) -> None:
    out = console()
    out.print(
        table(
            [
                "module",
                "form",
                ("size", "right"),
                ("rank", "right"),
                ("before", "right"),
                ("after", "right"),
                ("differs by", "right"),
            ],
            [
                (
                    row.name,
                    row.form,
                    f"{row.outputs}x{row.inputs}",
                    row.rank,
                    f"{row.before:,}",
                    f"{row.after:,}",
                    "" if row.difference is None else f"{row.difference:.1e}",
                )
                for row in report.modules
            ],
        )
    )
    out.print()
    if verbose:
        for row in report.modules:
            products = f"{row.products} products" if row.products != 1 else "1 product"
            out.print(f"  {row.name}: found by {row.by}, {products}", style="dim")
    for note in report.notes:
        out.print(f"note: {note}")
    found = report.verification
    before, after = (sum(getattr(row, key) for row in report.modules) for key in ("before", "after"))
    out.print(f"{before:,} elements became {after:,}; {report.unread} other tensors of the state dict were not read")
    judged = "verified: " if found.verdict == "passed" else "not judged, since the meaning may change: "
    out.print(f"{judged}{tell_distance(found)}, on {tell_inputs(found)}")
    out.print(f"wrote {report.path}")
