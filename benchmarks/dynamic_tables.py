"""The tables of dynamic networks: one function a benchmark, from what it wrote to Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.dynamic.families import FAMILIES
from benchmarks.dynamic.tables import dynamic
from docs.generate import md_table

Result = Mapping[str, Any]


def rtx_dynamic(result: Result) -> str:
    """Families by what TensorRT-RTX made of their blocks."""
    titles = {family.name: family.title for family in FAMILIES}
    rows = []
    for one in result["families"]:
        if "blocks" not in one:
            rows.append([titles[one["family"]], one["status"], "", "", "", "", ""])
            continue
        refused = "; ".join(f"{count} ({reason})" for reason, count in one["refused"].items())
        rows.append(
            [
                titles[one["family"]],
                one["blocks"],
                one["built"],
                one["handed_on"],
                refused or "0",
                f"{one['wall']:.0f}",
                f"{one['bytes'] / 1e6:.1f}",
            ]
        )
    heads = ["family", "blocks", "built", "only hand values on", "refused", "seconds", "engines, MB"]
    return f"By TensorRT-RTX {result['version']}; built, not run: no GPU here.\n\n{md_table(heads, rows, right=1)}"


def host_overhead(result: Result) -> str:
    """Cases by what a call or a turn takes by hand, by the host, and in ONNX Runtime's own Loop."""
    rows = []
    for name, case in result["cases"].items():
        times = case["cpu_us"]
        figures = (f"{times[kind]:.2f}" if kind in times else "" for kind in ("by hand", "host", "ONNX Loop"))
        rows.append([name, *figures, _interval(case["ratio"]["cpu"])])
    heads = ["µs of processor time", "bound by hand", "host", "ONNX Loop", "host / by hand (95 %)"]
    return md_table(heads, rows, right=1)


def silero(result: Result) -> str:
    """Sample rates and variants by time, and how many chunks gave the same bits."""
    rows, told = [], []
    for rate, found in result["rates"].items():
        compared = found["compared"]
        told.append(f"{compared['same_bits']:,} of {compared['chunks']:,} chunks at {rate} Hz")
        for name, one in found["timed"].items():
            ratios = (_interval(one[key]) if name != "original" else "" for key in ("speedup", "cpu_speedup"))
            rows.append([f"{int(rate) // 1000} kHz, {name}", f"{one['wall_us']:.1f}", f"{one['cpu_us']:.1f}", *ratios])
    heads = ["a chunk", "wall µs", "CPU µs", "times as fast (95 %)", "by CPU time (95 %)"]
    before, after = result["ifs_before"], result["ifs_in_blocks"]
    same = f"The same bits as the original on {' and '.join(told)}; {before} If before, {after} in the blocks."
    return f"{same}\n\n{md_table(heads, rows, right=1)}"


def split_corpus(result: Result) -> str:
    """Sets of networks by how many give the same bits, split and merged."""
    rows = []
    for title in ("node corpus", "random nests"):
        one = result[title]
        counts = one["counts"]
        same = (counts[way].get("same", 0) for way in ("split", "split, as arrays", "merged"))
        left = counts["control flow left"].get("none", 0)
        refused = len(one["not_run_by_onnxruntime"])
        rows.append([title, one["networks"], one["control_flow"], one["inputs"], *same, left, refused])
    heads = ["", "networks", "If, Loop, Scan", "inputs", "split", "as arrays", "merged", "none left", "not run"]
    return md_table(heads, rows, right=1)


def per_sample(result: Result) -> str:
    """Networks by what a batch takes whose samples leave one by one, beside the work that is needed."""
    rows = []
    for one in result["families"]:
        ms = one["ms"]
        figures = (f"{ms[kind]:.0f}" for kind in ("work", "per sample", "all or none", "one at a time"))
        ratios = (*map(_interval, one["ratio"].values()), *map(_interval, one["speedup"].values()))
        rows.append([one["family"], "+".join(map(str, one["leaving"])), *figures, *ratios])
    heads = [
        f"{result['batch']} images, ms",
        "leaving",
        "the work",
        "per sample",
        "all or none",
        "one at a time",
        "per sample / the work (95 %)",
        "by CPU time",
        "times as fast as all or none",
        "as one at a time",
    ]
    return md_table(heads, rows, right=2)


def paths(result: Result) -> str:
    """Networks by the straight lines that were tried for them, and what they brought."""
    rows = []
    for one in result["networks"]:
        where = [one["title"], "one for nine in ten" if one["usual"] else "many"]
        seconds = [f"{one['seconds'][kind]:.0f}" for kind in ("without images", "with images")]
        for trial in one["trials"]:
            found = trial["faster"]
            decisions = " and ".join(str(len(path)) for path in trial["paths"])
            sides = [f"{found[side]:.2f}" if side in found else "" for side in ("on", "off")]
            ratio = _interval(found) if found else trial["reason"]
            kept = "yes" if trial["kept"] else "no"
            rows.append([*where, decisions, f"{sum(trial['shares']):.0%}", *sides, ratio, kept, *seconds])
            where, seconds = ["", ""], ["", ""]
    heads = [
        "network",
        "paths",
        "decisions on it",
        "images on it",
        "on it",
        "on others",
        "times as fast (95 %)",
        "kept",
    ]
    return md_table([*heads, "s", "s with images"], rows, right=2)


DYNAMIC = {
    "dynamic": dynamic,
    "silero": silero,
    "split_corpus": split_corpus,
    "host_overhead": host_overhead,
    "rtx_dynamic": rtx_dynamic,
    "per_sample": per_sample,
    "paths": paths,
}


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
