"""A 3 GB transformer with external weights: ``safe --no-verify`` against onnx_ir's load and save.

    python -m benchmarks.large [--rounds N] [--peers]

Whole processes, interleaved; the ratio is taken within rounds, its interval is a bootstrap over them. Needs 10 GB of
disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import peers
from benchmarks.common import GRAPHOPT, CommandFailed, Usage, measure, print_table, work_folder, write_result
from graphopt.benchmarking import ratio_interval


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="the other tools that are installed, once each")
    options = parser.parse_args()
    from tests.models import large_transformer

    usages: dict[str, list[Usage]] = {"onnx_ir load+save": [], "graphopt safe --no-verify": []}
    copy, safe = usages
    nodes: dict[str, int] = {}
    failed: dict[str, str] = {}
    with work_folder() as folder:
        source = large_transformer(folder / "large.onnx")
        total = sum(file.stat().st_size for file in folder.iterdir())
        out = folder / "out.onnx"
        commands = {
            copy: peers.command("copy", source, out),
            safe: [*GRAPHOPT, "optimize", str(source), "-o", str(out), "--recipe", "safe", "--no-verify"],
        }
        for name in commands:  # what is read first is read from the disk: that round does not count
            measure(commands[name])
            _clear(folder, source)
        for round_ in range(options.rounds):
            # Each goes first as often as the other.
            for name in sorted(commands, reverse=bool(round_ % 2)):
                usages[name].append(measure(commands[name]))
                nodes[name] = _nodes(out)
                _clear(folder, source)
        for tool in peers.installed() if options.peers else []:
            try:
                usages[tool] = [measure(peers.command(tool, source, out))]
                nodes[tool] = _nodes(out)
            except CommandFailed as failure:
                failed[tool] = str(failure)
            _clear(folder, source)
    base = [usage.wall for usage in usages[copy]]
    ratio = ratio_interval([usage.wall for usage in usages[safe]], base)
    rows: list[list[object]] = []
    for name, runs in usages.items():
        wall = float(np.median([usage.wall for usage in runs]))
        peak = max(usage.peak_bytes for usage in runs)
        told = f"{wall / float(np.median(base)):.2f}"
        if name == safe:
            told = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        rows.append([name, f"{wall:.2f}", told, f"{peak / 1e6:.0f}", nodes[name]])
    rows += [[tool, None, reason, None, None] for tool, reason in failed.items()]
    columns: list[Any] = ["", *((heading, "right") for heading in ("wall s", "ratio", "peak MB", "nodes"))]
    print_table(columns, rows, f"{total / 1e9:.2f} GB of weights, {options.rounds} interleaved rounds")
    write_result(
        "large",
        {"bytes": total, "rounds": options.rounds, "runs": usages, "nodes": nodes, "ratio": ratio, "failed": failed},
    )


def _nodes(path: Path) -> int:
    return sum(1 for node in ir.load(path).graph if node.op_type != "Constant")


def _clear(folder: Path, source: Path) -> None:
    for file in folder.iterdir():
        if not file.name.startswith(source.name):
            file.unlink()


if __name__ == "__main__":
    main()
