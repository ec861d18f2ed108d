"""Time and memory against the number of nodes: 2,000 to 50,000 small nodes through ``safe --no-verify``.

    python -m benchmarks.scaling [--rounds N] [--no-peers]

Whole processes, interleaved with the peers that are installed. The exponent is the slope of log time over log nodes,
from the processes' times less what each tool needs for a graph of 20 nodes: starting up does not scale, and would
flatter the exponent. Its interval is a bootstrap over the rounds; it is given for wall and for processor time, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import peers
from benchmarks.common import GRAPHOPT, CommandFailed, Usage, measure, print_table, work_folder, write_result

START_UP = 20
SIZES = (2_000, 5_000, 10_000, 20_000, 50_000)
# Beyond these sizes a peer takes minutes.
LARGEST = {"onnxslim": 10_000, "onnxsim": 20_000, "onnxscript": 2_000}
TIMEOUT = 120.0

Times = dict[int, list[float]]


def exponent(times: Times, start_up: list[float], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any] | None:
    """The slope of log(median time) over log(nodes) with its 95 % interval; None for fewer than three sizes."""
    # Where a tool's time is hardly above its start-up, the difference is noise.
    sizes = [size for size in sorted(times) if np.median(times[size]) > 1.1 * np.median(start_up)]
    if len(sizes) < 3:
        return None
    rng = np.random.default_rng(seed)

    def slope(draw: bool) -> float:
        medians = []
        base = np.median(rng.choice(start_up, len(start_up)) if draw else start_up)
        for size in sizes:
            own = rng.choice(times[size], len(times[size])) if draw else times[size]
            medians.append(max(float(np.median(own) - base), 1e-3))
        return float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])

    low, high = np.quantile([slope(True) for _ in range(resamples)], [0.025, 0.975])
    return {"value": slope(False), "low": float(low), "high": float(high), "sizes": sizes}


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    from tests.models import many_small_nodes

    tools = ["graphopt", *([] if options.no_peers else peers.installed())]
    usages: dict[str, dict[int, list[Usage]]] = {tool: defaultdict(list) for tool in tools}
    nodes: dict[str, dict[int, int]] = {tool: {} for tool in tools}
    failures: dict[str, dict[int, str]] = {tool: {} for tool in tools}
    with work_folder() as folder:
        sources = {}
        for size in (START_UP, *SIZES):
            sources[size] = folder / f"{size}.onnx"
            model = many_small_nodes(size)
            sources[size].write_bytes(ir.to_proto(model).SerializeToString())
        for _ in range(options.rounds):
            for size, source in sources.items():
                for tool in tools:
                    if size > LARGEST.get(tool, size) or size in failures[tool]:
                        continue
                    out = folder / "out.onnx"
                    try:
                        usages[tool][size].append(measure(_command(tool, source, out), timeout=TIMEOUT))
                        nodes[tool][size] = sum(1 for node in ir.load(out).graph if node.op_type != "Constant")
                    except CommandFailed as failure:
                        failures[tool][size] = str(failure)
                    for left in folder.glob("out.*"):
                        left.unlink()
    rows: list[list[object]] = []
    result: dict[str, Any] = {}
    for tool in tools:
        done = {size: runs for size, runs in usages[tool].items() if runs and size in SIZES}
        slopes = {clock: _slope(done, usages[tool][START_UP], clock) for clock in ("wall", "cpu")}
        for size in SIZES:
            if size in failures[tool]:
                rows.append([tool, size, None, None, None, None, failures[tool][size]])
            elif size in done:
                wall, cpu, peak = (
                    float(np.median([getattr(usage, name) for usage in usages[tool][size]]))
                    for name in ("wall", "cpu", "peak_bytes")
                )
                rows.append([tool, size, f"{wall:.2f}", f"{cpu:.2f}", f"{peak / 1e6:.0f}", nodes[tool][size], ""])
        for clock, slope in slopes.items():
            if slope is not None:
                told = f"{clock} exponent {slope['value']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"
                rows.append([tool, "", None, None, None, None, told])
        result[tool] = {
            "start_up": usages[tool][START_UP],
            "runs": done,
            "nodes_after": {size: nodes[tool].get(size) for size in done},
            "failed": failures[tool],
            "exponent": slopes["wall"],
            "exponent_cpu": slopes["cpu"],
        }
    print_table(
        [
            "tool",
            *((heading, "right") for heading in ("nodes", "wall s", "CPU s", "peak MB", "nodes after")),
            "",
        ],
        rows,
        f"Many small nodes, median of {options.rounds} interleaved rounds",
    )
    write_result("scaling", {"rounds": options.rounds, "tools": result})


def _slope(done: dict[int, list[Usage]], start_up: list[Usage], clock: str) -> dict[str, Any] | None:
    if not start_up:
        return None
    times = {size: [float(getattr(usage, clock)) for usage in runs] for size, runs in done.items()}
    return exponent(times, [float(getattr(usage, clock)) for usage in start_up])


def _command(tool: str, source: Path, out: Path) -> list[str]:
    if tool == "graphopt":
        return [*GRAPHOPT, "optimize", str(source), "-o", str(out), "--recipe", "safe", "--no-verify"]
    return peers.command(tool, source, out)


if __name__ == "__main__":
    main()
