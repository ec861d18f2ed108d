"""The nine families of networks that DyCL evaluated, as bundles, each block built by TensorRT-RTX; no GPU is needed.

    python -m benchmarks.rtx_dynamic [--small] [FAMILY ...]

Each network is exported from plain Python, split by recipe ``static`` for the target tensorrt-rtx (no If, Loop or Scan
is left in a block), and built as `graphopt build` builds a bundle: sizes from made-up inputs, blocks that these do not
reach by force. Built, not run. Only a run of all families in full size writes results.

Exit code 1 where a network was not built, or a block holds control flow.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphopt
from benchmarks.common import work_folder, write_result
from benchmarks.dynamic.families import FAMILIES, Family
from benchmarks.dynamic.models.dynamic import example
from benchmarks.dynamic_tables import rtx_dynamic
from benchmarks.rtx_corpus import TARGET
from graphopt import graphs
from graphopt.bundles import read_bundle
from graphopt.bundles.split import SPLIT
from graphopt.engines.bundles.building import HANDS_ON, build_bundle
from graphopt.errors import GraphoptError
from graphopt.files import load_model

NAME = "rtx_dynamic"


def measure(family: Family, *, small: bool = False) -> dict[str, Any]:
    """Export, split and build one family; how far it came where something refuses."""
    found: dict[str, Any] = {"family": family.name}
    with work_folder() as folder:
        source, bundle = folder / "network.onnx", folder / "network.bundle"
        try:
            graphopt.export(lambda: example(family.network(small=small)), source)
            graphopt.optimize(source, bundle, recipe=["static"], target=TARGET, verify=False)
            start = time.perf_counter()
            built = build_bundle(bundle, folder / "network.rtx.bundle", backend=TARGET)
        except GraphoptError as error:
            return {**found, "status": f"not built: {error.what}"}
        engines = [block.engine for block in built.blocks if block.engine is not None]
        stayed = [block for block in built.blocks if block.engine is None]
        return {
            **found,
            "version": built.version,
            "nodes": sum(block.nodes for block in built.blocks),
            "control_flow": _control_flow(bundle),
            "blocks": len(built.blocks),
            "built": len(engines),
            "handed_on": sum(block.reason == HANDS_ON for block in stayed),
            "refused": dict(Counter(block.reason for block in stayed if block.reason != HANDS_ON)),
            "seconds": sum(engine.seconds for engine in engines),
            "wall": time.perf_counter() - start,
            "bytes": sum(engine.bytes for engine in engines),
            "bundle_bytes": sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()),
            "status": built.status,
        }


def _control_flow(bundle: Path) -> int:
    """How many If, Loop and Scan are left in blocks."""
    version, plan = read_bundle(bundle)
    blocks = [load_model(version / block.file) for block in plan.blocks.values()]
    return sum(node.op_type in SPLIT for block in blocks for node in graphs.all_nodes(block))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="Default: all nine.")
    parser.add_argument("--small", action="store_true", help="The same code in sizes for tests.")
    options = parser.parse_args(arguments)
    chosen = [family for family in FAMILIES if not options.families or family.name in options.families]
    found = []
    for family in chosen:
        found.append(measure(family, small=options.small))
        print(f"{family.title}: {found[-1]['status']}", flush=True)
    result = {"version": next((one["version"] for one in found if "version" in one), ""), "families": found}
    print(rtx_dynamic(result))
    if len(chosen) == len(FAMILIES) and not options.small:
        write_result(NAME, result)
    return int(any("blocks" not in one or one["control_flow"] for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
