"""The files of one family: exported, optimized as one network, as a bundle, and as a bundle with everything split."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import graphopt
from benchmarks.dynamic.models.dynamic import Dynamic, example
from graphopt.bundles.folder import write_bundle
from graphopt.bundles.split import split
from graphopt.files.load import load_model


@dataclass(frozen=True)
class Made:
    """What was made of a network.

    Attributes:
        unsplit: One ONNX file with If and Loop, by recipe ``safe``.
        bundle: By recipe ``static`` for ONNX Runtime, where control flow that is not worth a cut stays in a block.
        split: A bundle in which none stays.
        export_seconds: Of `graphopt.export`, its comparison with the module included.
        nodes: Of the unsplit file.
        blocks: Of the bundle.
        blocks_split: Of the one in which all is split.
        kept: How many If and Loop stay in the bundle's blocks.
        onnx_bytes, bundle_bytes: On disk.
    """

    unsplit: Path
    bundle: Path
    split: Path
    export_seconds: float
    nodes: int
    blocks: int
    blocks_split: int
    kept: int
    onnx_bytes: int
    bundle_bytes: int


def make(network: Dynamic, folder: Path, *, forced: bool = False, verify: bool = False) -> Made:
    """Export, optimize and split a network.

    Args:
        network: Eager.
        folder: Is made.
        forced: The thresholds are an input.
        verify: Also let `graphopt.optimize` verify; whoever compares all paths with eager torch can do without.
    """
    folder.mkdir()
    exported, unsplit = folder / "exported.onnx", folder / "unsplit.onnx"
    bundle, everything = folder / "net.bundle", folder / "split.bundle"
    began = time.perf_counter()
    graphopt.export(lambda: example(network, forced=forced), exported)
    took = time.perf_counter() - began
    safe = graphopt.optimize(exported, unsplit, verify=verify)
    static = graphopt.optimize(exported, bundle, recipe=["static"], verify=verify)
    parts = split(load_model(unsplit))
    write_bundle(parts, everything)
    assert safe.output is not None and static.bundle is not None
    return Made(
        unsplit=unsplit,
        bundle=bundle,
        split=everything,
        export_seconds=took,
        nodes=safe.output.nodes,
        blocks=static.bundle.blocks,
        blocks_split=len(parts.blocks),
        kept=len(static.bundle.kept),
        onnx_bytes=safe.output.bytes,
        bundle_bytes=static.bundle.bytes,
    )
