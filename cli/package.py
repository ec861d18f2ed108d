"""``graphopt package``: a model or an engine for a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, tell_bytes

if TYPE_CHECKING:
    from graphopt.packaging import TritonModel


@click.command("package", context_settings=HELP)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--triton",
    "repository",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="The Triton model repository: the folder of all models.",
)
@click.option("--name", metavar="NAME", help="What clients call the model. Default: the name of the file.")
@click.option("--version", type=int, default=1, metavar="N", help="Of the model. Default: 1.")
@click.option(
    "--max-batch",
    type=int,
    metavar="N",
    help="Most requests put together; 0: none. Default: what the engine was built for; of ONNX 4, as Triton's.",
)
@click.option("--instances", type=int, default=1, metavar="N", help="How often it is loaded, on each GPU. Default: 1.")
@click.option("--device", default="auto", metavar="D", help="gpu, cpu or auto (default): a GPU where there is one.")
@click.option(
    "--no-verify", is_flag=True, help="Do not load the model here, nor see that rows of a batch are independent."
)
@click.option("--force", is_flag=True, help="Replace the version, and a config.pbtxt that differs.")
@common_options
def command(
    model: Path,
    repository: Path,
    name: str | None,
    version: int,
    max_batch: int | None,
    instances: int,
    device: str,
    no_verify: bool,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write a model or an engine as a Triton Inference Server repository.

    MODEL is an .onnx file, or an engine that `graphopt build` wrote, with its report beside it. What comes out is
    DIR/NAME/config.pbtxt and DIR/NAME/VERSION/, complete or not at all; no server is started.
    """
    from graphopt.packaging import package_triton

    with progress(f"packaging {model.name}", enabled=not as_json):
        made = package_triton(
            model,
            repository,
            name=name,
            version=version,
            max_batch=max_batch,
            instances=instances,
            device=device,
            verify=not no_verify,
            force=force,
        )
    if as_json:
        print_json(made)
    else:
        _print(made, verbose)


def _print(made: TritonModel, verbose: bool) -> None:
    out = console()
    out.print(f"{made.path}: version {made.version}, {tell_bytes(made.bytes)}, backend {made.backend}")
    if made.max_batch:
        out.print(f"batches up to {made.max_batch}: {made.why}")
    else:
        out.print(f"no batching by the server: {made.why}")
    if made.optional:
        out.print(f"without the optional inputs {', '.join(made.optional)}: a batched model has none")
    if made.needs is not None:
        out.print(f"the server needs {made.needs}")
    out.print(made.status)
    if verbose:
        out.print()
        out.print((made.path / "config.pbtxt").read_text(encoding="utf-8"), end="")
