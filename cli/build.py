"""``graphopt build``: an engine from an ONNX file, or of every block of a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.output import HELP, common_options, console, print_json, progress, table, tell_bytes
from graphopt.errors import BadInput

if TYPE_CHECKING:
    from graphopt.engines import BuildResult
    from graphopt.engines.bundles.building import BuiltBlock, BundleResult
    from graphopt.engines.inspector import EngineLayer

_MOST_ROWS = 30


@click.command("build", context_settings=HELP)
@click.argument("model", metavar="IN", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="The engine or bundle to write."
)
@click.option("--backend", "--target", metavar="NAME", required=True, help="tensorrt-rtx (needs no GPU) or tensorrt.")
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME=MIN/OPT/MAX",
    help="Sizes of a dynamic input (x=1x16/4x64/8x128) or of a symbolic axis (batch=1/4/8). Repeatable.",
)
@click.option(
    "--calibration",
    metavar="F.npz|DIR",
    type=click.Path(path_type=Path),
    help="Inputs of your own: sizes that --shapes does not name are the smallest, middle and largest in there.",
)
@click.option(
    "--buckets",
    is_flag=True,
    help="Build for single sizes (1, 2, 4, 8, 16, OPT and MAX) instead of the range from MIN to MAX.",
)
@click.option(
    "--plugins",
    metavar="WHEN",
    default="measured",
    show_default=True,
    help="Run operators on graphopt's own kernels: measured (where that is faster on this GPU), always or never.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare a model that gets plugin nodes with what it was.")
@click.option("--optimization-level", metavar="N", type=int, help="0 (built fast) to 5 (searched long); usually 3.")
@click.option("--workspace", metavar="SIZE", help="The most scratch memory a layer may take, such as 2GiB.")
@click.option("--sparsity", is_flag=True, help="Use sparse kernels where weights have two zeros in every four.")
@click.option(
    "--timing-cache",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Timings that builds share; read, and written back. [tensorrt]",
)
@click.option("--strip-weights", is_flag=True, help="Leave the weights out of the engine; put in when it is loaded.")
@click.option("--refit", is_flag=True, help="Let the engine's weights be replaced by others.")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay in the host's memory when the engine runs.")
@click.option("--compute-capability", metavar="sm86,...", help="The GPUs to build for, or current. [tensorrt-rtx]")
@click.option(
    "--hardware-compatibility",
    metavar="LEVEL",
    default="none",
    show_default=True,
    help="Which GPUs run it: none but this, same-compute-capability, ampere-plus. [tensorrt]",
)
@click.option("--version-compatible", is_flag=True, help="Let newer versions of the library run it. [tensorrt]")
@common_options
def command(
    model: Path,
    out: Path,
    backend: str,
    shapes: tuple[str, ...],
    calibration: Path | None,
    buckets: bool,
    plugins: str,
    no_verify: bool,
    workspace: str | None,
    compute_capability: str | None,
    as_json: bool,
    verbose: bool,
    **switches: Any,
) -> None:
    """Build an engine, on a machine with or without a GPU.

    IN is an .onnx file, and OUT an engine; or both are bundles: then every block becomes an engine, and those that the
    library does not take stay ONNX files, each with the reason. Sizes are always those of the network's own inputs.

    Nodes that do not run in such an engine are told before anything is built, one by one. The library runs in a
    child process; a crash of it is an error here, and nothing is written. OUT.json, beside the engine, says how it
    was built, for which library and GPUs, and what became of the nodes.
    """
    from graphopt.engines import BuildOptions, build_engine
    from graphopt.engines.build import NotCovered
    from graphopt.engines.bundles.building import BundleResult, NothingBuilt, build_bundle
    from graphopt.engines.options import parse_compute_capabilities, parse_size
    from graphopt.engines.spawning import Refused
    from graphopt.files.bundle_folder import is_bundle

    options = BuildOptions(
        workspace=None if workspace is None else parse_size(workspace),
        compute_capabilities=() if compute_capability is None else parse_compute_capabilities(compute_capability),
        **switches,
    )

    def show(line: str) -> None:
        click.echo(line, err=True)

    with progress(f"building {out.name}", total=1.0, enabled=not as_json and not verbose) as advance:
        done = 0.0

        def follow(phase: str, fraction: float) -> None:
            nonlocal done
            advance(fraction - done, phase or None)
            done = fraction

        how: dict[str, Any] = {
            "backend": backend,
            "shapes": shapes,
            "calibration": calibration,
            "options": options,
            "plugins": plugins,
            "verify": not no_verify,
            "on_log": show if verbose else None,
            "on_progress": follow,
        }
        result: BuildResult | BundleResult
        try:
            if is_bundle(model):
                _refuse_buckets(buckets)
                result = build_bundle(model, out, **how)
            else:
                result = build_engine(model, out, buckets=buckets, **how)
        except NothingBuilt as refused:
            if as_json:
                print_json({"error": str(refused), "refused": {one.name: one.reason for one in refused.blocks}})
            else:
                _tell_blocks(refused.blocks)
            raise
        except NotCovered as refused:
            _tell_refused(refused, as_json=as_json)
            raise
        except Refused as refused:
            if as_json:
                print_json({"error": str(refused), "refused": refused.nodes})
            raise
    if as_json:
        print_json(result)
    elif isinstance(result, BundleResult):
        _print_bundle(result)
    else:
        _print(result, verbose=verbose)


def _refuse_buckets(buckets: bool) -> None:
    if buckets:
        what, hint = "blocks get the sizes that they are seen with", "leave it out"
        raise BadInput(what, where="--buckets", hint=hint)


def _print_bundle(result: BundleResult) -> None:
    _tell_blocks(result.blocks)
    built = [block.engine for block in result.blocks if block.engine is not None]
    console().print(
        f"{result.path}: {len(built)} of {_count(len(result.blocks), 'block')} on {result.backend} {result.version},"
        f" {tell_bytes(sum(one.bytes for one in built))}, in {result.seconds:.1f} s"
    )
    notes = Counter(note for one in built for note in one.notes)
    for note, times in notes.items():
        console().print(f"note: {note}" + (f" ({times} blocks)" if times > 1 else ""))
    for note in result.notes:
        console().print(f"note: {note}")
    console().print(result.status)


def _tell_blocks(blocks: Sequence[BuiltBlock]) -> None:
    """Each block, and the engine that it became or the reason why it became none."""
    rows = [
        (
            block.name,
            block.nodes,
            "built" if block.engine is not None else f"none: {block.reason}",
            None if block.engine is None else f"{block.engine.seconds:.1f}",
            None if block.engine is None else tell_bytes(block.engine.bytes),
        )
        for block in blocks
    ]
    console().print(table(["block", ("nodes", "right"), "engine", ("seconds", "right"), ("size", "right")], rows))
    console().print()


def _tell_refused(error: Any, *, as_json: bool) -> None:
    """Every node that does not run in such an engine, and what to do about it."""
    coverage = error.coverage
    if as_json:
        print_json({"error": str(error), "coverage": coverage})
        return
    rows = [
        (one.node, one.op_type or "tensor", " / ".join(part for part in (one.place, one.reason) if part), one.hint)
        for one in coverage.refused[:_MOST_ROWS]
    ]
    out = console()
    out.print(table(["node", "type", "why not", "what to do"], rows))
    if len(coverage.refused) > _MOST_ROWS:
        out.print(f"and {len(coverage.refused) - _MOST_ROWS} more; --json lists all")
    out.print()


def _print(result: BuildResult, *, verbose: bool) -> None:
    out = console()
    rows = [
        (f"{name}{what}", *(sign.join(map(str, sizes)) for sizes in (one.min, one.opt, one.max)))
        for profiles, what, sign in ((result.profiles, "", "×"), (result.values, ", its values", " "))
        for name, one in profiles.items()
    ]
    if rows:
        out.print(table(["input", "min", "opt", "max"], rows))
        out.print()
    if result.buckets:
        sizes = "; ".join(" ".join(f"{symbol}={size}" for symbol, size in one.items()) for one in result.buckets)
        out.print(f"Only these sizes: {sizes}.")
    for line in _tell_plugins(result.plugins, verbose=verbose):
        out.print(line)
    layers = result.inspection.layers
    if verbose and layers:
        out.print(table(["layer", "kernel", "nodes"], [_layer_row(layer) for layer in layers]))
        out.print()
    memory = "" if result.peak_rss_bytes is None else f", {result.peak_rss_bytes / 1e6:.0f} MB of memory"
    out.print(
        f"{result.path}: {tell_bytes(result.bytes)} in {result.seconds:.1f} s{memory};"
        f" {_count(result.layers, 'layer')} before fusion, {result.backend} {result.version}"
    )
    if layers:
        taken = sum(layer.plugin for layer in layers)
        listed = f"{result.path.name}.json lists them"
        out.print(f"{_count(len(layers), 'layer')} in the engine, {_count(taken, 'plugin')} among them; {listed}.")
    else:
        out.print(f"Layers of the engine: not known ({result.inspection.reason}).")
    for note in result.notes:
        out.print(f"note: {note}")
    out.print(result.status)


def _layer_row(layer: EngineLayer) -> tuple[str, str, str]:
    return layer.kind or layer.name, ("plugin " if layer.plugin else "") + layer.tactic, ", ".join(layer.nodes)


def _tell_plugins(plugins: dict[str, Any], *, verbose: bool) -> list[str]:
    """How many nodes run on plugins, and why others do not."""
    written, refused = plugins.get("written", []), plugins.get("refused", [])
    lines = []
    if written:
        count = Counter(one["plugin"] for one in written)
        listed = ", ".join(f"{number} {name}" for name, number in count.items())
        isa = sorted({str(kernel["isa"]) for kernel in plugins.get("kernels", [])})
        lines.append(f"On plugins: {listed} ({plugins['architecture']}, PTX {', '.join(isa)}).")
        lines.append(_tell_verified(plugins.get("verification", {})))
    if refused and verbose:
        lines += [f"Not on a plugin: {one['plugin']} {one['node']}: {one['reason']}" for one in refused]
    elif refused:
        reasons = Counter(one["reason"] for one in refused)
        reason, number = reasons.most_common(1)[0]
        rest = "" if number == len(refused) else f" ({number} of them; --verbose tells all)"
        lines.append(f"Not on a plugin: {_count(len(refused), 'node')}: {reason}{rest}.")
    return lines


def _tell_verified(found: dict[str, Any]) -> str:
    """Whether the plugin nodes mean what was there before; the kernels are another matter."""
    verdict = found.get("verdict", "skipped")
    if verdict == "passed":
        inputs = "made-up inputs" if found["feeds"] == "synthesised" else "inputs of yours"
        return f"The plugin nodes mean what was there: the same on {found['cases']} {inputs}, by ONNX Runtime."
    if verdict == "skipped":
        return "Not verified that the plugin nodes mean what was there (--no-verify)."
    return f"Not verified that the plugin nodes mean what was there: {found['reason']}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
