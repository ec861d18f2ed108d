"""The tables of docs/gpu.md: one function a benchmark, from what it wrote to Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from docs.generate import md_table

Result = Mapping[str, Any]


def ptx(result: Result) -> str:
    """Sources by what their kernels compile to."""
    kernels = result["kernels"]
    rows = []
    for source in dict.fromkeys(kernel["source"] for kernel in kernels):
        own = [kernel for kernel in kernels if kernel["source"] == source]
        versions = sorted({kernel["isa"] for kernel in own})
        rows.append(
            [
                source,
                len({kernel["kernel"] for kernel in own}),
                len({kernel["architecture"] for kernel in own}),
                ", ".join(versions),
                f"{max(kernel['static_shared'] for kernel in own) / 1024:.0f}",
                f"{statistics.median(kernel['milliseconds'] for kernel in own):.0f}",
                f"{max(kernel['milliseconds'] for kernel in own):.0f}",
            ]
        )
    heads = ["source", "kernels", "architectures", "PTX", "shared KiB, most", "ms, median", "ms, most"]
    return f"By {result['compiler']}; all hold the contract.\n\n{md_table(heads, rows, right=1)}"


def plugin_versions(result: Result) -> str:
    """Bindings by what they made of the plugins."""
    rows = [
        [
            version["bindings"],
            version["registry"].split()[-1],
            version["python"],
            version.get("launches", ""),
            version["result"] if "launches" in version else f"refused: {version['refused'][0]}",
        ]
        for version in result["versions"]
    ]
    told = (
        "PivotLinear, and a toy with an attribute of several numbers. Lean registries before 10.16 are not on PyPI, so"
        " older bindings run over that one."
    )
    return f"{told}\n\n{md_table(['bindings', 'registry under them', 'Python', 'launches', 'result'], rows)}"


def kernel_mutations(result: Result) -> str:
    """Kinds of faults by how many were caught, and what was set aside."""
    rows = [
        [kind, count["places"], count["mutants"], count["killed"], count["equivalent"]]
        for kind, count in result["by_kind"].items()
    ]
    ways = ", ".join(f"{count} {way}" for way, count in result["killed_by"].items())
    survivors = result["survivors"]
    left = [f"- {s['file']}:{s['line']}: `{s['before']}` → `{s['after']}`. {s['how']}" for s in survivors]
    told = "\n\nNot caught:\n\n" + "\n".join(left) if survivors else "\n\nNo survivor."
    table = md_table(["fault", "places", "put in", "caught", "set aside: nothing computed differs"], rows, right=1)
    return f"{table}\n\nCaught by: {ways}. What was set aside is explained in benchmarks/kernel_survivors.yaml.{told}"


def rtx_models(result: Result) -> str:
    """Networks by what was built, and the corpus by what was predicted."""
    networks = [
        [
            network["network"],
            f"{network['onnx_bytes'] / 1e6:.1f}",
            f"{network['bytes'] / 1e6:.1f}",
            f"{network['seconds']:.2f}",
            f"{network['peak_rss_bytes'] / 1e6:.0f}",
            network["layers"],
        ]
        for network in result["networks"]
    ]
    corpora = [
        [
            name,
            corpus["models"],
            corpus["built"],
            corpus["refused"],
            corpus["missed"],
            corpus["false"],
            corpus["wrong node"],
            corpus["stages"]["crash"],
        ]
        for name, corpus in result["corpora"].items()
    ]
    heads = [
        "variant",
        "models",
        "built",
        "refused",
        "not foreseen",
        "refused in vain",
        "other node",
        "crashes foreseen",
    ]
    return (
        f"TensorRT-RTX {result['version']}; built, not run: no GPU here.\n\n"
        + md_table(["network", "ONNX MB", "engine MB", "s", "peak MB", "layers"], networks, right=1)
        + "\n\nONNX's node corpus, and the same networks varied: `predict` before the build against what the library"
        " then did. Its rules were written from these very runs; other networks may show what they lack.\n\n"
        + md_table(heads, corpora, right=1)
    )


GPU: dict[str, Callable[[Result], str]] = {
    "ptx": ptx,
    "plugin_versions": plugin_versions,
    "kernel_mutations": kernel_mutations,
    "rtx_models": rtx_models,
}
