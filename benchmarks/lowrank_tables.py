"""The tables of docs/low-rank.md: one function a benchmark, from what it wrote to Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.densities import TITLES
from docs.generate import md_table

Result = Mapping[str, Any]


def pivot_error(result: Result) -> str:
    """Forms of one weight by dtype: the relative error of the output, means over seeds."""
    dtypes = list(result["means"])
    forms = list(result["means"][dtypes[0]])
    rows = [[form, *(f"{result['means'][dtype][form]:.2e}" for dtype in dtypes)] for form in forms]
    told = f"{result['size']} × {result['size']}, rank {result['rank']}: relative error of the output against float64."
    return f"{told}\n\n{md_table(['', *dtypes], rows, right=1)}"


def calibration_memory(result: Result) -> str:
    """Calibrators by numbers of samples: peak memory."""
    counts = sorted({count for runs in result["runs"].values() for count in runs}, key=int)

    def peak(run: Any) -> str:
        return run if isinstance(run, str) else f"{run['peak_bytes'] / 1e6:.0f}"

    rows = [[name, *(peak(runs.get(count, "")) for count in counts)] for name, runs in result["runs"].items()]
    return f"Peak MB by samples.\n\n{md_table(['', *counts], rows, right=1)}"


def pivot_layers(result: Result) -> str:
    """Shapes by forms: the share of wall time saved against two factors."""
    forms = [name for name in result["shapes"][0]["networks"] if name != "two factors"]

    def cell(network: Mapping[str, Any]) -> str:
        ratio = network["wall_ratio"]
        value, low, high = (100 * (1 - ratio[key]) for key in ("value", "high", "low"))
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    rows: list[list[object]] = []
    for shape in result["shapes"]:
        networks = shape["networks"]
        factors = networks["two factors"]
        rows.append([shape["d"], shape["rows"], f"{factors['wall_ms']:.2f}", *(cell(networks[name]) for name in forms)])
    median = result["median_saved_percent"]
    rows.append(["median", "", "", *(f"{median[name]:.1f}" for name in forms)])
    told = (
        "Two layers of d inputs and outputs with a Relu behind each. Per cent of wall time saved against two factors "
        f"(95 %), {result['rounds']} interleaved rounds; official: the paper's layer as torch exports it."
    )
    return f"{told}\n\n{md_table(['d', 'rows', 'two factors, ms', *forms], rows, right=0)}"


def large_lowrank(result: Result) -> str:
    """Runs by what they took."""
    rows = [
        [name, f"{run['wall']:.0f}", f"{run['peak_bytes'] / 1e6:.0f}"]
        for name, run in (("whole", result["whole"]), ("resumed", result["resumed"]))
    ]
    rows.insert(1, ["killed", f"{result['killed_after']:.0f}", ""])
    told = (
        f"{result['bytes_before'] / 1e9:.2f} GB of dense weights of hidden rank {result['rank']}, {result['layers']} "
        f"layers; {result['bytes_after'] / 1e9:.2f} GB after. The resumed run writes the same bytes."
    )
    return f"{told}\n\n{md_table(['run', 'wall s', 'peak MB'], rows, right=1)}"


def language_model(result: Result) -> str:
    """Methods by densities: perplexity on held-out text."""
    told = (
        f"Perplexity on held-out text of a small decoder trained on other text of the same kind: "
        f"{result['perplexity']:.2f} uncompressed; single tokens {result['baselines']['single tokens']:.0f}, "
        f"pairs of tokens {result['baselines']['pairs of tokens']:.1f}."
    )
    table = _by_density(result["compressed"], lambda row: format(row["perplexity"], ".2f"))
    return f"{told}\n\n{table}"


def minilm_density(result: Result) -> str:
    """Methods by densities: cosine, size, speedup."""
    rows = result["compressed"]
    parts = [
        ("Cosine to the uncompressed embeddings, mean (5th percentile).", lambda row: _cosine(row)),
        ("Size, MB.", lambda row: f"{row['bytes'] / 1e6:.1f}"),
        ("Speedup over the uncompressed model after `safe`, one thread (95 % interval).", lambda row: _speedup(row)),
    ]
    return "\n\n".join(f"{told}\n\n{_by_density(rows, write)}" for told, write in parts)


def _cosine(row: Mapping[str, Any]) -> str:
    return f"{row['cosine_mean']:.3f} ({row['cosine_p5']:.3f})"


def _speedup(row: Mapping[str, Any]) -> str:
    ratio = row["speedup"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _by_density(rows: Sequence[Mapping[str, Any]], write: Callable[[Mapping[str, Any]], str]) -> str:
    densities = sorted({row["asked"] for row in rows}, reverse=True)
    methods = dict.fromkeys(row["method"] for row in rows)
    cells = {(row["method"], row["asked"]): write(row) for row in rows}
    table = [[TITLES[m], *(cells.get((m, d), "") for d in densities)] for m in methods]
    return md_table(["density", *(f"{d:g}" for d in densities)], table, right=1)


LOW_RANK: dict[str, Callable[[Result], str]] = {
    "pivot_error": pivot_error,
    "pivot_layers": pivot_layers,
    "large_lowrank": large_lowrank,
    "calibration_memory": calibration_memory,
    "minilm_density": minilm_density,
    "language_model": language_model,
}
