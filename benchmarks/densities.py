"""What the two accuracy benchmarks of low-rank compression share: methods by densities, done by `graphopt optimize`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from benchmarks.common import ROOT, print_table

# Each stage adds to the one before. PIFA changes no number: it stores the same product in fewer elements, so that the
# same density has room for a higher rank. Every weight has the same density, as in the papers, but for the last row.
_FACTORS = ("factorize.form=factors", "pivot.enabled=false", "factorize.ranks=uniform")
_PIVOTS = ("factorize.form=pivot", "pivot.gather=always")
METHODS: dict[str, tuple[str, ...]] = {
    "svd": ("factorize.method=svd", *_FACTORS),
    "weighted": ("factorize.method=weighted", *_FACTORS),
    "m": ("factorize.method=m", *_FACTORS),
    "m-pifa": ("factorize.method=m", *_PIVOTS, "factorize.ranks=uniform"),
    "ranks": ("factorize.method=m", *_PIVOTS),
}
TITLES = {
    "svd": "plain SVD",
    "weighted": "weighted SVD",
    "m": "M",
    "m-pifa": "M + PIFA",
    "ranks": "M + PIFA, measured ranks",
}
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5)
SAFE, LOWRANK = ("safe",), ("safe", "lowrank")
_SEED = 0
_MARGIN = 0.03  # ranks are whole, permutations that stay count as weights, and pivots may need some to spare


@dataclass(frozen=True)
class Compressed:
    """A model that was compressed: ``density`` is what is left of its linear weights, by count of elements."""

    method: str
    asked: float
    path: Path
    density: float
    parameters: int
    bytes: int
    seconds: float

    def require_density(self) -> None:
        """Exit where more or fewer elements are left than were asked for: unlike sizes are no comparison."""
        if abs(self.density - self.asked) > _MARGIN:
            sys.exit(f"{TITLES[self.method]}: density {self.density:.4f} where {self.asked:g} was asked for")

    def facts(self) -> dict[str, Any]:
        """For the result file."""
        return {name: value for name, value in vars(self).items() if name != "path"}


def arguments(text: str | None) -> argparse.ArgumentParser:
    """The options of both programs; ``text`` is the program's docstring."""
    parser = argparse.ArgumentParser(description=str(text).splitlines()[0])
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), metavar="D")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "low-rank", help="where models are kept")
    return parser


def is_whole(options: argparse.Namespace) -> bool:
    """Whether everything is measured: only then is a result written."""
    return set(options.methods) == set(METHODS) and set(options.densities) == set(DENSITIES)


def compress_all(
    source: Path, options: argparse.Namespace, calibration: Path, folder: Path
) -> Iterator[tuple[float, str, Compressed]]:
    """Compress ``source`` by each method at each density, one after the other, saying what is done."""
    # Apart from what is compressed, the recipe drops a few weights, which would pass for compression.
    dense = graphopt.optimize(source, folder / f"{source.stem}.dense.onnx", recipe=LOWRANK).output
    assert dense is not None
    linear = linear_elements(source)
    for density, method in product(options.densities, options.methods):
        out = folder / f"{source.stem}.{method}.{density:g}.onnx"
        made = compress(source, method, density, calibration, out, linear=linear, others=dense.parameters - linear)
        print(f"{TITLES[method]} at {density:g}: density {made.density:.4f}, {made.seconds:.0f} s", flush=True)
        yield density, method, made


def compress(
    source: Path, method: str, density: float, calibration: Path, out: Path, *, linear: int, others: int
) -> Compressed:
    """One model compressed by one method: what `graphopt optimize` does with the settings of `METHODS`.

    ``linear`` and ``others`` are the elements of the original's linear weights, and of all else that the recipe leaves.
    """
    start = time.perf_counter()
    report = graphopt.optimize(
        source,
        out,
        recipe=LOWRANK,
        settings=[f"factorize.density={density:g}", *METHODS[method]],
        calibration=calibration,
        fail_if=["cosine<-1"],  # a limit is asked for; here the loss is what is measured
        work=out.parent / "work",  # methods and densities share their decompositions
    )
    seconds = time.perf_counter() - start
    assert report.output is not None
    left = report.output.parameters - others
    return Compressed(method, density, out, left / linear, report.output.parameters, report.output.bytes, seconds)


def linear_elements(model: Path) -> int:
    """Elements of the matrices that MatMul and Gemm multiply by, each counted once; not those of embeddings."""
    import onnx_ir as ir

    found: dict[str, int] = {}
    for node in ir.load(model).graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        while weight is not None and (maker := weight.producer()) is not None and maker.op_type == "Transpose":
            weight = maker.inputs[0]
        if weight is not None and weight.const_value is not None and weight.const_value.shape.rank() == 2:
            found[weight.name or ""] = weight.const_value.size
    return sum(found.values())


def show(title: str, rows: Mapping[str, Mapping[float, str]], dense: str | None = None) -> None:
    """Print a table: a row a method, a column a density; ``dense`` is what the model has before anything is done."""
    densities = list(next(iter(rows.values())))
    columns = [*([] if dense is None else [("1", "right")]), *((f"{density:g}", "right") for density in densities)]
    first = [] if dense is None else [dense]
    table = [[TITLES[name], *first, *(row[density] for density in densities)] for name, row in rows.items()]
    print_table(["density", *columns], table, title)


def gains(values: Mapping[str, Mapping[float, float]]) -> dict[str, dict[float, float]]:
    """What each stage adds to the one before it: differences of ``values`` by method and density."""
    names = [name for name in METHODS if name in values]
    return {
        name: {density: value - values[before][density] for density, value in values[name].items()}
        for before, name in pairwise(names)
    }


def shuffled(count: int) -> np.ndarray[Any, Any]:
    """A fixed order of ``count`` things."""
    return np.random.default_rng(_SEED).permutation(count)
