"""The table of docs/dynamic.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from docs.generate import md_table

HEADINGS = ("network", "paths", "error", "shares", "× eager", "DyCL", "× unsplit", "blocks", "MB")


def row(found: Mapping[str, Any]) -> list[str]:
    """One family: strings for the headings."""
    cpu = found["cpu"]
    return [
        found["title"],
        str(found["paths"]),
        f"{worst_difference(found):.0e}",
        f"{min(found['shares']):.0%}+",
        _interval(cpu["bundle_over_eager"], 1),
        "; ".join(f"{times:.1f}" for times in found["dycl"]),
        _interval(cpu["bundle_over_unsplit"], 2),
        f"{found['blocks']} of {found['blocks_split']}",
        f"{found['bundle_bytes'] / 1e6:.0f}",
    ]


def worst_difference(found: Mapping[str, Any]) -> float:
    """The largest to eager torch, of forced paths and of those that the images take."""
    return float(np.max([*found["differences"].values(), *found["own_differences"].values()]))


def _interval(ratio: Mapping[str, float], digits: int) -> str:
    value, low, high = (f"{ratio[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def dynamic(result: Mapping[str, Any]) -> str:
    """Families by what was compared and timed."""
    families = result["families"].values()
    rounds = [found["rounds"] for found in families]
    told = (
        f"Ratios of processor time, one thread, {min(rounds)} rounds or more, with 95 % intervals."
        f" Errors: largest absolute difference to eager torch, allowed {result['allowed']:.0e}."
    )
    return f"{told}\n\n{md_table(HEADINGS, [row(found) for found in families], right=1)}"
