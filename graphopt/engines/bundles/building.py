"""`build_bundle`: every block of a bundle as an engine, where the library takes it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.folder import check_bundle_target, open_bundle, write_bundle
from graphopt.bundles.plan import Block, Plan, Run, walk
from graphopt.bundles.split import SPLIT, Split
from graphopt.engines.backends import Backend, find_backend
from graphopt.engines.build import build_seen, check_how
from graphopt.engines.bundles.blocks import sources_of
from graphopt.engines.bundles.feeding import feeds_for
from graphopt.engines.bundles.watching import Calls, watch_blocks
from graphopt.engines.options import BuildOptions
from graphopt.engines.profiles import Seen
from graphopt.engines.report import BuildResult, report_path
from graphopt.engines.spawning import OnLog, OnProgress
from graphopt.engines.tensors import TYPES
from graphopt.errors import BadInput, GraphoptError, MissingDependency
from graphopt.files.bundle_folder import PLAN
from graphopt.files.load import load_model
from graphopt.runtime.session import create_session, numpy_dtype

HANDS_ON = "it only hands values on, and the host does that"
"""Why a block without a computation has no engine."""


@dataclass(frozen=True)
class BuiltBlock:
    """What became of one block.

    Attributes:
        name: Of the block.
        nodes: How many operators it has.
        engine: What is known of its engine; None where it has none.
        reason: Why it has none; empty where it has one.
        control_flow: The If, Loop and Scan that it holds.
    """

    name: str
    nodes: int
    engine: BuildResult | None
    reason: str = ""
    control_flow: tuple[str, ...] = ()


@dataclass(frozen=True)
class BundleResult:
    """A bundle whose blocks were built.

    Attributes:
        path: The bundle.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: The library's version.
        blocks: What became of each block.
        seconds: All of it, the runs that sizes are seen in and the starts of the child processes included.
        status: What was done with the engines, said honestly.
        notes: What to know about them, and what to do about it.
    """

    path: Path
    backend: str
    version: str
    blocks: tuple[BuiltBlock, ...]
    seconds: float
    status: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "backend": self.backend,
            "version": self.version,
            "seconds": self.seconds,
            "status": self.status,
            "notes": list(self.notes),
            "blocks": {
                block.name: {
                    "nodes": block.nodes,
                    "engine": None if block.engine is None else block.engine.to_json(),
                    "reason": block.reason,
                    "control_flow": list(block.control_flow),
                }
                for block in self.blocks
            },
        }


class NothingBuilt(BadInput):
    """Not one block runs on such an engine; nothing was written.

    Attributes:
        blocks: Each with the reason.
    """

    def __init__(self, blocks: Sequence[BuiltBlock], library: Backend, where: str) -> None:
        first = blocks[0].reason if blocks else "it has no blocks"
        held = next((block.control_flow[0] for block in blocks if block.control_flow), None)
        hint = "it runs on ONNX Runtime" if held is None else f"it holds {held}: {_to_split(library)}"
        super().__init__(f"{library.title} takes none of its blocks: {first}", where=where, hint=hint)
        self.blocks = tuple(blocks)


def build_bundle(
    bundle: str | Path,
    out: str | Path,
    *,
    backend: str,
    shapes: Iterable[str] = (),
    calibration: str | Path | None = None,
    options: BuildOptions | None = None,
    plugins: str = "measured",
    verify: bool = True,
    on_log: OnLog | None = None,
    on_progress: OnProgress | None = None,
) -> BundleResult:
    """Build every block of a bundle as an engine; those that the library does not take stay ONNX files.

    The bundle runs on ONNX Runtime first, to see the sizes that each block gets: the smallest, the one that comes most
    often, and the largest. Blocks that the inputs do not lead to are reached by force.

    Args:
        bundle: A bundle of ONNX files.
        out: The bundle to write.
        backend: ``tensorrt`` (10.9 or newer) or ``tensorrt-rtx``.
        shapes: Sizes of the network's inputs, as for `graphopt.build`; made-up inputs have each of the three.
        calibration: Inputs of the user's, as for ``optimize``.
        options: How to build each engine.
        plugins, verify, on_log, on_progress: As for `graphopt.build`.

    Raises:
        BadInput: The bundle, ``out``, the sizes or the options cannot be used, or no block runs on such an engine
            (`NothingBuilt`).
        MissingDependency: The library is not installed.
        GraphoptError: The bundle does not run on ONNX Runtime, or cannot be written.
    """
    start = time.perf_counter()
    library, options = find_backend(backend), options or BuildOptions()
    check_how(options, plugins, library)
    source, target = Path(bundle), Path(out)
    opened = open_bundle(source)  # which stays there as long as this takes
    version, plan = opened.version, opened.plan
    _refuse(source, target, plan, options)

    def session(name: str) -> Any:
        return create_session(version / plan.blocks[name].file, optimized=True)

    progress = on_progress or (lambda what, done: None)
    build = partial(build_seen, backend=backend, options=options, plugins=plugins, verify=verify, on_log=on_log)
    progress("watching the blocks", 0)
    calls = watch_blocks(plan, session, feeds_for(plan, session, tuple(shapes), calibration, source))
    with tempfile.TemporaryDirectory(prefix=".graphopt-build-", dir=target.absolute().parent) as scratch:
        made: list[BuiltBlock] = []
        for index, (name, block) in enumerate(plan.blocks.items()):

            def follow(phase: str, fraction: float, name: str = name, index: int = index) -> None:
                progress(f"{name}: {phase}", (index + fraction) / len(plan.blocks))

            follow("", 0)
            file, engine = version / block.file, Path(scratch) / f"{name}.engine"
            seen = calls[name].seen(block.inputs, _samples_of(plan, name)) if name in calls else Seen()
            how = partial(build, seen=seen, on_progress=follow)
            found = _build(file, engine, block, calls.get(name), library, how)
            made.append(BuiltBlock(name, block.nodes, *found, _control_flow(file)))
        engines = {block.name: block.engine for block in made if block.engine is not None}
        if not engines:
            raise NothingBuilt(made, library, str(source))
        placed = _write(version, plan, made, target, library)
    first = next(iter(engines.values()))
    return BundleResult(
        path=target,
        backend=library.name,
        version=first.version,
        blocks=tuple(
            block
            if block.engine is None
            else replace(block, engine=replace(block.engine, path=placed / block.engine.path.name))
            for block in made
        ),
        seconds=time.perf_counter() - start,
        status=first.status,
        notes=tuple(_notes(made, library)),
    )


def _control_flow(block: Path) -> tuple[str, ...]:
    return tuple(node.name or node.op_type for node in graphs.all_nodes(load_model(block)) if node.op_type in SPLIT)


def _notes(blocks: Sequence[BuiltBlock], library: Backend) -> Iterator[str]:
    for block in blocks:
        if block.control_flow and block.engine is not None:
            more = f" and {len(block.control_flow) - 1} more" if len(block.control_flow) > 1 else ""
            yield (
                f"{block.name} holds {block.control_flow[0]}{more}, and {library.title} runs both sides of an If and"
                f" cannot replay a Loop from a CUDA graph: {_to_split(library)}"
            )


def _to_split(library: Backend) -> str:
    """What to do about blocks that hold control flow."""
    return f"graphopt optimize IN.onnx --recipe static --target {library.name} makes a bundle whose blocks hold none"


def _refuse(source: Path, target: Path, plan: Plan, options: BuildOptions) -> None:
    """What is wrong before anything is built, which may take hours."""
    if any(block.backend is not None for block in plan.blocks.values()):
        raise BadInput("its blocks are engines already", where=str(source), hint="give the bundle of ONNX files")
    check_bundle_target(target)
    if target.exists() and target.samefile(source):
        raise BadInput("is the bundle itself", where=str(target), hint="give another name with -o")
    if options.strip_weights:
        what = "weights are put back from the ONNX file of an engine, and a bundle has none of blocks that were built"
        raise BadInput(what, where="--strip-weights", hint="leave it out")


def _samples_of(plan: Plan, name: str) -> dict[str, int]:
    """Of a block's inputs those that have samples, and along which axis."""
    return {
        port: plan.samples[value]
        for step in walk(plan.steps)
        if isinstance(step, Run) and step.run == name
        for port, value in step.reads.items()
        if value in plan.samples
    }


def _build(
    file: Path,
    engine: Path,
    block: Block,
    calls: Calls | None,
    library: Backend,
    build: Callable[..., BuildResult],
) -> tuple[BuildResult | None, str]:
    """An engine of a block, or the reason why there is none."""
    reason = _why_not(file, block, calls, library)
    if reason:
        return None, reason
    try:
        result = build(file, engine)
    except MissingDependency:
        raise
    except GraphoptError as error:
        return None, error.what
    types = {port.name: numpy_dtype(port.type) for port in (*block.inputs, *block.outputs)}
    for tensor in (*result.inputs, *result.outputs):
        wanted = types.get(tensor.name)
        if wanted is None or wanted.name != tensor.dtype:
            return None, f"the engine has {tensor.name!r} as {tensor.dtype}, the network as {wanted}"
        if tensor.shape is None:
            return None, f"the engine does not know how many axes {tensor.name!r} has"
    return result, ""


def _why_not(file: Path, block: Block, calls: Calls | None, library: Backend) -> str:
    """What keeps a block from being an engine, as far as the plan tells; empty where nothing does."""
    for port in (*block.inputs, *block.outputs):
        dtype = numpy_dtype(port.type)
        if dtype is None or dtype not in TYPES:
            return f"{port.name!r} is a {port.type}, which is no type of {library.title}"
    if sources_of(load_model(file)) is not None:
        return HANDS_ON
    static = all(port.shape is not None and all(isinstance(size, int) for size in port.shape) for port in block.inputs)
    if calls is None:
        return "" if static else "nothing led to it, by itself or by force: its sizes are not known"
    for index, port in enumerate(block.inputs):
        if port.shape is None and calls.rank(index) is None:
            return f"{port.name!r} has another number of axes in some runs"
    return ""


def _write(version: Path, plan: Plan, made: Sequence[BuiltBlock], target: Path, library: Backend) -> Path:
    """Write the bundle. Returns the folder that its files lie in."""
    changed = plan.model_copy(deep=True)
    kept: dict[str, ir.Model] = {}
    files: list[Path] = []
    for block in made:
        described = changed.blocks[block.name]
        if block.engine is None:
            described.reason = block.reason
            kept[block.name] = load_model(version / described.file)
        else:
            described.file, described.backend = block.engine.path.name, library.name
            files += [block.engine.path, report_path(block.engine.path)]
    files += [file for file in version.glob("*.json") if file.name != PLAN]  # what else is known of the network
    return write_bundle(Split(changed, kept, 0), target, files=files)
