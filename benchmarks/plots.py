"""Plots for the documentation, as SVG: the same numbers give the same bytes. matplotlib is optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, has

IMAGES = ROOT / "docs" / "images"
_COLOURS = ("#999999", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind eyes too
_MARKS = ("o", "s", "^", "D", "v", "P")


def lines(
    name: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    labels: tuple[str, str],
    reference: tuple[str, float] | None = None,
    logarithmic: bool = False,
) -> Path | None:
    """Draw ``docs/images/NAME.svg``: a line for each of ``series`` over ``x``, the largest ``x`` on the left.

    Args:
        name: Of the file.
        x: Where the points are.
        series: The points' heights, by the line's name.
        labels: Of the axes.
        reference: The name and height of a level line.
        logarithmic: Of the heights.

    Returns:
        The file; None, saying so, where matplotlib is not installed.
    """
    if not has("matplotlib"):
        print(f"{name}.svg was not drawn: matplotlib is not installed")
        return None
    import matplotlib

    # By default an SVG holds the date and names drawn at random.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure, axes = _figure()
        for (label, heights), colour, mark in zip(series.items(), _COLOURS, _MARKS, strict=False):
            axes.plot(x, heights, label=label, color=colour, marker=mark, markersize=4, linewidth=1.4)
        if reference is not None:
            axes.axhline(reference[1], label=reference[0], color="#555555", linewidth=0.8, linestyle="--")
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set(xlabel=labels[0], ylabel=labels[1], xticks=list(x))
        axes.invert_xaxis()
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False)
        IMAGES.mkdir(parents=True, exist_ok=True)
        path = IMAGES / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path.relative_to(ROOT)}")
    return path


def _figure() -> tuple[Any, Any]:
    """A figure that belongs to no window system."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()
