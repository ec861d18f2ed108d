"""Writes the tables of README.md and of low-rank.md, gpu.md and dynamic.md in docs from ``results/*.json``.

    python -m benchmarks.readme_tables [--check]

What stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is written anew. A benchmark without a result leaves
"not measured yet".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT
from benchmarks.dynamic_tables import DYNAMIC
from benchmarks.gpu_tables import GPU
from benchmarks.lowrank_tables import LOW_RANK
from docs.generate import fill, md_table

PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("low-rank", "gpu", "dynamic", "per-sample")))
NOT_YET = "not measured yet"
MOST_SURVIVORS = 20
SETTINGS = ("optimizations off", "optimizations on")  # of ONNX Runtime

Result = Mapping[str, Any]


def render(page: str, results: Path = RESULTS) -> str:
    """A page's text with the tables that the results in a folder give."""
    return fill(page, {name: _section(name, results) for name in TABLES}, marker="table")


def _section(name: str, results: Path) -> Callable[[], str]:
    def write() -> str:
        path = results / f"{name}.json"
        if not path.exists():
            return NOT_YET
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{TABLES[name](result)}\n\n{_measured(result)}"

    return write


def _measured(result: Result) -> str:
    machine = result["machine"]
    versions = [f"{name} {machine[name]}" for name in ("onnxruntime", "onnx", "torch") if name in machine]
    cores = f"{machine['cores']} cores, {machine['memory_gb']:.0f} GB"
    return f"*{result['date']}, {machine['cpu']}, {cores}, Python {machine['python']}, {', '.join(versions)}*"


# -- one function a benchmark ------------------------------------------------------------------------------------------


def corpus(result: Result) -> str:
    """Tools by outcomes; outcomes that no tool had are left out, except those that the reader looks for."""
    always = ("ok", "wrong", "interface", "exception", "crash", "false alarm")
    kinds = dict.fromkeys(kind for counts in result["tools"].values() for kind in counts)
    shown = [kind for kind in kinds if kind in always or any(counts[kind] for counts in result["tools"].values())]
    rows = [[tool, *(counts[kind] for kind in shown)] for tool, counts in result["tools"].items()]
    told = f"{result['cases']:,} cases that ONNX Runtime runs correctly."
    return f"{told}\n\n{md_table(['tool', *shown], rows, right=1)}"


def mutations(result: Result) -> str:
    """Kinds of faults by how many were caught, then every survivor."""
    rows = [
        [kind, count["killed"], count["mutants"], _percent(count["killed"], count["mutants"]), count["equivalent"]]
        for kind, count in result["by_kind"].items()
    ]
    table = md_table(["fault", "caught", "of", "rate", "set aside: same bits"], rows, right=1)
    survivors = result["survivors"]
    if not survivors:
        return f"{table}\n\nNo survivor."
    lines = [f"- {s['kind']}, {s['network']}: {s['fault']}; {s['how']}" for s in survivors[:MOST_SURVIVORS]]
    if len(survivors) > MOST_SURVIVORS:
        lines.append(f"- and {len(survivors) - MOST_SURVIVORS} more, in benchmarks/results/mutations.json")
    return f"{table}\n\nNot caught:\n\n" + "\n".join(lines)


def scaling(result: Result) -> str:
    """Tools by sizes: median wall seconds, and the exponent."""
    sizes = sorted({int(size) for tool in result["tools"].values() for size in (*tool["runs"], *tool["failed"])})
    rows = []
    for name, tool in result["tools"].items():
        cells = []
        for size in sizes:
            if str(size) in tool["failed"]:
                cells.append("failed")
            elif tool["runs"].get(str(size)):
                cells.append(f"{_median(tool['runs'][str(size)], 'wall'):.2f}")
            else:
                cells.append("")
        slope = tool["exponent"]
        rows.append([name, *cells, "" if slope is None else _interval(slope)])
    headings = ["wall seconds at nodes", *(f"{size:,}" for size in sizes), "exponent (95 %)"]
    return f"{md_table(headings, rows, right=1)}\n\nSeconds: {_rounds(result)}. Empty: not run, it takes minutes."


def large(result: Result) -> str:
    """Tools by wall time, ratio to onnx_ir's load and save, peak memory."""
    base = next(iter(result["runs"]))
    median = _median(result["runs"][base], "wall")
    rows = []
    for name, runs in result["runs"].items():
        wall = _median(runs, "wall")
        ratio = _interval(result["ratio"]) if name == "graphopt safe --no-verify" else f"{wall / median:.2f}"
        peak = max(run["peak_bytes"] for run in runs)
        rows.append([name, f"{wall:.1f}", ratio, f"{peak / 1e6:.0f}", f"{result['nodes'][name]:,}"])
    rows += [[name, "failed", "", "", ""] for name in result["failed"]]
    told = f"{result['bytes'] / 1e9:.1f} GB of weights in an external file; {_rounds(result)}."
    return f"{told}\n\n" + md_table(["", "wall s", "ratio (95 %)", "peak MB", "nodes after"], rows, right=1)


def speedup(result: Result) -> str:
    """Networks by time before and after, and the ratio."""
    rows = [
        [
            name,
            f"{one['nodes_before']} → {one['nodes_after']}",
            *(f"{timing['p50']:.3f}" for timing in one["wall_ms"]),
            _interval(one["speedup"], digits=3),
            f"{one['max_abs_difference']:.1e}",
        ]
        for name, one in result["networks"].items()
    ]
    headings = ["network", "nodes", "before, ms", "after, ms", "times as fast (95 %)", "largest difference"]
    return md_table(headings, rows, right=1)


def verification_cost(result: Result) -> str:
    """Networks by time without and with verification."""
    rows = [
        [
            name,
            f"{_median(one['unverified'], 'wall'):.2f}",
            f"{_median(one['verified'], 'wall'):.2f}",
            _interval(one["ratio"]),
        ]
        for name, one in result["networks"].items()
    ]
    table = md_table(["", "unverified, s", "verified, s", "ratio (95 %)"], rows, right=1)
    return f"{table}\n\nSeconds: {_rounds(result)}."


def minilm_export(result: Result) -> str:
    """Models by their largest errors over all cases, the runtime's optimizations off and on; then torch's own."""
    errors = [(f"{name}, {setting}", one[setting]) for name, one in result["models"].items() for setting in SETTINGS]
    errors.append(("torch itself, in float32", result["torch_float32"]))
    rows = [[name, *(f"{one[key]:.1e}" for key in ("tokens", "embeddings", "padding"))] for name, one in errors]
    table = md_table(["", "real tokens", "embeddings", "at padding"], rows, right=1)
    allowed = f"Allowed: {result['allowed']:.0e} for real tokens and embeddings; {len(result['cases'])} batches."
    return f"{table}\n\n{allowed} At padding, where no caller reads, the network magnifies rounding; not judged."


def rtx_build(result: Result) -> str:
    """Builds by size, time and memory."""
    rows = [
        [
            build["model"],
            f"`{' '.join(build['shapes'])}`",
            f"{build['bytes'] / 1e6:.1f}",
            f"{statistics.median(build['seconds']):.1f}",
            f"{statistics.median(build['wall']):.1f}",
            "" if build["peak_rss_bytes"] is None else f"{build['peak_rss_bytes'] / 1e6:.0f}",
        ]
        for build in result["builds"]
    ]
    statuses = "; ".join(dict.fromkeys(build["status"] for build in result["builds"]))
    table = md_table(["model", "shapes", "engine MB", "library s", "whole call s", "peak MB"], rows, right=2)
    told = f"TensorRT-RTX {result['builds'][0]['version']}; engines {statuses}; median of {result['rounds']} builds."
    return f"{told}\n\n{table}"


def demos(result: Result) -> str:
    """Make targets by seconds from a fresh clone, and the size of what they install."""
    rows = [
        [
            f"`make {name}`",
            f"{one['seconds']:.0f}",
            f"{one['venv_bytes'] / 1e9:.1f}",
            "works" if one["exit_code"] == 0 else "fails",
        ]
        for name, one in result["targets"].items()
    ]
    table = md_table(["", "seconds, install included", "installed, GB", ""], rows)
    pythons = ", ".join(dict.fromkeys(one["python"] for one in result["targets"].values()))
    told = f"From a fresh clone, in an empty environment, Python {pythons}, nothing cached; a slow line adds to it."
    return f"{table}\n\n{told}"


def help_time(result: Result) -> str:
    """One line."""
    return (
        f"`graphopt --help`: {result['median']:.3f} s (median of {len(result['wall'])} processes),"
        f" {result['lines']} lines, {result['columns']} columns."
    )


TABLES: dict[str, Callable[[Result], str]] = {
    "corpus": corpus,
    "mutations": mutations,
    "scaling": scaling,
    "large": large,
    "speedup": speedup,
    "verification_cost": verification_cost,
    "minilm_export": minilm_export,
    "rtx_build": rtx_build,
    "demos": demos,
    "help_time": help_time,
    **LOW_RANK,
    **GPU,
    **DYNAMIC,
}


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _interval(ratio: Mapping[str, float], *, digits: int = 2) -> str:
    value, low, high = (f"{ratio[key]:.{digits}f}" for key in ("value", "low", "high"))
    # One round says nothing of the spread: an interval of no width would look exact.
    return value if ratio["low"] == ratio["high"] else f"{value} ({low} to {high})"


def _rounds(result: Result) -> str:
    return f"median of {result['rounds']} interleaved rounds" if result["rounds"] > 1 else "one round, so no interval"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def main() -> int:
    """Rewrite the pages; with ``--check`` only say which is out of date (exit code 1)."""
    parser = argparse.ArgumentParser(description="Write the tables of the pages from the committed results.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which page is out of date")
    check = parser.parse_args().check
    stale = False
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if check:
            stale = stale or before != after
            print(f"{page.name} is {'up to date' if before == after else 'out of date'}")
        else:
            page.write_text(after, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
