"""PivotLinear on a GPU against what it stands in for: two products by cuBLAS or torch, and one dense product.

    python -m benchmarks.gpu_pivot [--quick]

Needs a GPU with its driver and NVRTC; cuBLAS from NVIDIA's wheels (torch brings them), cuBLASLt and torch: what is not
there is left out, and said to be. Writes results/gpu_pivot.json and plugins/pivot_linear/measured.json, which
`graphopt build --plugins measured` decides by, from the fastest of the libraries.

The weights come from the GPU's memory, as they do when a network is decoded: each contender goes through copies of
them that are larger together than the L2 cache. Each is one CUDA graph; contenders take turns in changing order, and
times are the GPU's own. The two products write side by side, so that no Concat is timed, and no permutation. Their
results are compared too: a time of something else than these products says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.common import ROOT, print_table, write_result
from benchmarks.cublas import Cublas, CublasLt, Product
from benchmarks.torch_products import Torch
from graphopt.benchmarking import Ratio, ratio_interval
from graphopt.errors import GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.driver import Context, Graph, Stream, find_driver
from graphopt.kernels.launch import LoadedKernel
from graphopt.kernels.sample import Sample, off_of_sum
from graphopt.plugins.pivot_linear.function import Form
from graphopt.plugins.pivot_linear.kernels import kernels_for
from graphopt.plugins.pivot_linear.samples import sample

MEASURED = ROOT / "plugins" / "pivot_linear" / "measured.json"
WIDTHS = (4096, 8192)
ROWS = (1, 16, 256, 4096)
WANTED = 1.2  # times as fast as two products, at 1 and 16 rows
_ROUNDS = 60
_MOST_COPIES = 24
_COMPARED_ROWS = 16


class Library(Protocol):
    """What multiplies: `Cublas`, `CublasLt` or `Torch`."""

    title: str

    def prepare(self, product: Product) -> Callable[[], None]:
        """What puts a product into the stream."""


@dataclass(frozen=True)
class Case:
    """One shape."""

    form: Form
    dtype: str
    rows: int
    width: int

    @property
    def rank(self) -> int:
        return self.width // 2


@dataclass
class Contender:
    """One way to compute it: a graph that goes through all copies of the weights.

    Attributes:
        name: What the table says.
        graph: All of it.
        held: What the graph works with: modules and memory.
        worst: How far its result is off, as a part of what is allowed; None for the dense product, which computes
            something else.
        microseconds: Of one call, one a round.
    """

    name: str
    graph: Graph
    held: object
    worst: float | None = None
    microseconds: list[float] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether its result is further off than rounding allows."""
        return self.worst is not None and self.worst > 1

    def close(self) -> None:
        """Free what it works with; the times stay."""
        self.graph.close()
        self.held = None


@dataclass(frozen=True)
class Row:
    """What came out for one shape."""

    case: Case
    copies: int
    contenders: list[Contender]

    def best(self, prefix: str) -> Contender | None:
        """The fastest of those whose names begin so; a wrong one only where there is no other."""
        found = [one for one in self.contenders if one.name.startswith(prefix)]
        found = [one for one in found if not one.wrong] or found
        return min(found, key=lambda one: float(np.median(one.microseconds)), default=None)

    def ratio(self, prefix: str) -> Ratio | None:
        """The time of the fastest of those over that of our fastest tactic."""
        return self.ratio_to(self.best(prefix))

    def ratio_to(self, other: Contender | None) -> Ratio | None:
        """The time of another over that of our fastest tactic."""
        ours = self.best("tactic")
        return None if ours is None or other is None else ratio_interval(other.microseconds, ours.microseconds)

    def to_json(self) -> dict[str, Any]:
        ratios = {name: self.ratio(name) for name in ("two products", "dense")}
        return {
            "form": self.case.form,
            "dtype": self.case.dtype,
            "rows": self.case.rows,
            "width": self.case.width,
            "rank": self.case.rank,
            "copies_of_the_weights": self.copies,
            "contenders": {
                one.name: {"microseconds": interval(one.microseconds), "off": one.worst} for one in self.contenders
            },
            "speedup": {name: ratio for name, ratio in ratios.items() if ratio is not None},
        }


def interval(values: Sequence[float]) -> dict[str, float]:
    """The median with the ends of its 95 % bootstrap interval."""
    found = np.asarray(values)
    drawn = np.random.default_rng(0).integers(0, found.size, (1000, found.size))
    low, high = np.quantile(np.median(found[drawn], axis=1), [0.025, 0.975])
    median = float(np.median(found))
    return {"low": min(float(low), median), "median": median, "high": max(float(high), median)}


def measure(
    context: Context,
    stream: Stream,
    case: Case,
    libraries: Sequence[Library],
    *,
    rounds: int = _ROUNDS,
    copies: int = 0,
) -> Row:
    """Time every contender on one shape, and compare what they computed.

    Args:
        context: The GPU.
        stream: Where.
        case: The shape.
        libraries: What multiplies the other way.
        rounds: How often each is timed.
        copies: Of the weights; as many as are needed not to fit the L2 cache if 0.

    Raises:
        GraphoptError: A kernel does not load or breaks down.
    """
    # Many rows are the same few again and again: their float64 product on the host would take minutes.
    fewer = min(case.rows, _COMPARED_ROWS)
    drawn = sample(case.form, case.dtype, (fewer,), (case.width, case.rank, case.width))
    given = [np.tile(drawn.inputs[0], (case.rows // fewer, 1)), *drawn.inputs[1:]]
    x, kept, coefficients, bias, positions = (arrays.upload(context, array) for array in given)
    weights = kept.nbytes + coefficients.nbytes
    number = copies or int(np.clip(4 * context.device.l2_bytes // weights + 1, 2, _MOST_COPIES))
    pairs = [(kept, coefficients)] + [
        (_copied(context, kept), _copied(context, coefficients)) for _ in range(number - 1)
    ]
    y = arrays.allocate(context, (case.rows, case.width), case.dtype)
    inner = arrays.allocate(context, (case.rows, case.rank), case.dtype)
    contenders = []
    for tactic, kernel in kernels_for(case.form, case.dtype).items():
        loaded = LoadedKernel(context, kernel)
        calls = [loaded.prepare(stream, (x, *pair, bias, positions), (y, inner)) for pair in pairs]
        graph = _captured(stream, calls)
        worst = _off(drawn, (y, inner), stream, graph)
        contenders.append(Contender(f"tactic {tactic}", graph, (loaded, calls), worst))
    products = _products_of(case, drawn)
    dense = [_dense_weight(context, stream, case) for _ in range(number if libraries else 0)]
    for library in libraries:
        calls = _two_products(library, case, x, pairs, y, inner)
        graph = _captured(stream, calls)
        worst = _off(products, (y,), stream, graph)
        contenders.append(Contender(f"two products, {library.title}", graph, (calls, pairs), worst))
        calls = [
            library.prepare(_product(case, case.width, case.width, x.pointer, weight.pointer, y.pointer))
            for weight in dense
        ]
        contenders.append(Contender(f"dense, {library.title}", _captured(stream, calls), (calls, dense)))
    _time(context, stream, contenders, number, rounds)
    for contender in contenders:
        contender.close()
    return Row(case, number, contenders)


def _copied(context: Context, array: DeviceArray) -> DeviceArray:
    return arrays.upload(context, array.numpy())


def _dense_weight(context: Context, stream: Stream, case: Case) -> DeviceArray:
    memory = context.allocate(case.width * case.width * (4 if case.dtype == "float32" else 2))
    stream.fill(memory, 0x2C)  # small numbers in every dtype
    return DeviceArray(context, memory.pointer, (case.width, case.width), case.dtype, owner=memory)


def _captured(stream: Stream, calls: Sequence[Callable[[], None]]) -> Graph:
    """All calls as one graph, after a run that warms up what needs it."""
    for call in calls:
        call()
    stream.synchronize()
    with stream.capture() as captured:
        for call in calls:
            call()
    return captured.graph


def _off(drawn: Sample, outputs: Sequence[DeviceArray], stream: Stream, graph: Graph) -> float:
    """The worst of all rows; they repeat those of the sample."""
    for array in outputs:  # what stood there before may be right
        stream.upload(array.pointer, np.full(array.shape, np.nan, array.dtype))
    graph.launch(stream)
    stream.synchronize()
    rows = len(drawn.inputs[0])
    got = [array.numpy() for array in outputs]
    return max(drawn.worst([array[first : first + rows] for array in got]) for first in range(0, len(got[0]), rows))


def _products_of(case: Case, drawn: Sample) -> Sample:
    """What `_two_products` gives for a sample's inputs, and how far that may be off."""
    x, kept, coefficients = (array.astype(np.float64) for array in drawn.inputs[:3])
    if case.form == "row":
        first, second = kept, coefficients
    else:
        x, first, second = x[:, case.rank :], coefficients, kept
    inner = x @ first.T
    inner_off = off_of_sum(np.abs(x) @ np.abs(first).T, x.shape[1], case.dtype)
    largest = np.abs(inner) + inner_off
    y_off = off_of_sum(largest @ np.abs(second).T, case.rank, case.dtype, inner_off @ np.abs(second).T)
    y = inner @ second.T
    if case.form == "row":
        y, y_off = np.concatenate([inner, y], axis=1), np.concatenate([inner_off, y_off], axis=1)
    return Sample(f"products of {drawn.label}", drawn.inputs, (case.dtype,), (y,), (y_off,))


def _product(
    case: Case, n: int, k: int, x: int, weight: int, y: int, *, x_stride: int = 0, y_stride: int = 0
) -> Product:
    return Product(case.dtype, case.rows, n, k, x, weight, y, x_stride or k, y_stride or n)


def _two_products(
    library: Library,
    case: Case,
    x: DeviceArray,
    pairs: Sequence[tuple[DeviceArray, DeviceArray]],
    y: DeviceArray,
    inner: DeviceArray,
) -> list[Callable[[], None]]:
    """K x and C (K x) beside each other in y; the column form's C x_np, and K of that: without its sum x_p + ..."""
    item, width, rank = y.dtype.itemsize, case.width, case.rank
    calls = []
    for kept, coefficients in pairs:
        if case.form == "row":
            first = _product(case, rank, width, x.pointer, kept.pointer, y.pointer, y_stride=width)
            second = _product(
                case,
                width - rank,
                rank,
                y.pointer,
                coefficients.pointer,
                y.pointer + rank * item,
                x_stride=width,
                y_stride=width,
            )
        else:
            others = x.pointer + rank * item
            first = _product(case, rank, width - rank, others, coefficients.pointer, inner.pointer, x_stride=width)
            second = _product(case, width, rank, inner.pointer, kept.pointer, y.pointer)
        calls += [library.prepare(first), library.prepare(second)]
    return calls


def _time(context: Context, stream: Stream, contenders: Sequence[Contender], copies: int, rounds: int) -> None:
    began, ended = context.event(), context.event()
    rng = np.random.default_rng(0)
    for contender in contenders:
        contender.graph.launch(stream)
    stream.synchronize()
    for _ in range(rounds):
        for index in rng.permutation(len(contenders)):
            began.record(stream)
            contenders[index].graph.launch(stream)
            ended.record(stream)
            ended.synchronize()
            contenders[index].microseconds.append(max(ended.since(began) * 1e3 / copies, 1e-3))


def cases(*, quick: bool) -> list[Case]:
    """All shapes: the row form at every width and number of rows, the column form where there are few."""
    widths, rows = ((512,), (1, 16)) if quick else (WIDTHS, ROWS)
    found = [Case("row", "float16", count, width) for width in widths for count in rows]
    found += [Case("column", "float16", count, width) for width in widths for count in rows if count <= 16]
    return found + [Case("row", "bfloat16", count, widths[0]) for count in rows if count <= 16]


def find_libraries(context: Context, stream: Stream) -> list[Library]:
    """cuBLAS, cuBLASLt and torch; where one is missing or does not run, says so."""
    found: list[Library] = []
    kinds: tuple[Callable[[Context, Stream], Library], ...] = (Cublas, CublasLt, Torch)
    for kind in kinds:
        try:
            found.append(kind(context, stream))
        except GraphoptError as error:
            print("\n".join(textwrap.wrap(f"left out: {error}", 100, subsequent_indent="  ")))
    return found


def show(rows: Sequence[Row]) -> None:
    """Print every row, losses too."""
    table = []
    for row in rows:
        ours, pair, dense = row.best("tactic"), row.best("two products"), row.best("dense")
        case = row.case
        table.append(
            (
                f"{case.form}, {case.dtype}",
                f"{case.width}",
                f"{case.rows}",
                ours.name if ours else "",
                *("" if one is None else f"{np.median(one.microseconds):.1f}" for one in (ours, pair, dense)),
                _told(row.ratio("two products")),
                _told(row.ratio("dense")),
                _off_told(ours),
            )
        )
    right = ("d", "rows", "fastest", "plugin us", "two us", "dense us", "two/plugin", "dense/plugin", "off")
    print_table(
        ["form", *((name, "right") for name in right)],
        table,
        "PivotLinear, r = d/2, weights from the GPU's memory; off: of what rounding allows",
    )
    _show_libraries(rows)
    for row in rows:
        ratio = row.ratio("two products")
        if ratio is not None and row.case.rows in (1, 16) and row.case.dtype == "float16" and row.case.form == "row":
            verdict = "yes" if ratio.low >= WANTED else "no"
            print(
                f"d {row.case.width}, {row.case.rows} rows: 20 % faster than two products: {verdict} ({_told(ratio)})"
            )


def _show_libraries(rows: Sequence[Row]) -> None:
    """Each library for itself."""
    table = []
    for row in rows:
        named = {one.name: one for one in row.contenders}
        for name in named:
            kind, _, title = name.partition(", ")
            if kind != "two products":
                continue
            pair, dense, case = named[name], named.get(f"dense, {title}"), row.case
            table.append(
                (
                    f"{case.form}, {case.dtype}",
                    f"{case.width}",
                    f"{case.rows}",
                    title,
                    *("" if one is None else f"{np.median(one.microseconds):.1f}" for one in (pair, dense)),
                    _told(row.ratio_to(pair)),
                    _told(row.ratio_to(dense)),
                    _off_told(pair),
                )
            )
    if table:
        right = ("d", "rows", "against", "two us", "dense us", "two/plugin", "dense/plugin", "off")
        print_table(["form", *((name, "right") for name in right)], table, "The same, each library for itself")


def _told(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _off_told(contender: Contender | None) -> str:
    return "" if contender is None or contender.worst is None else f"{contender.worst:.2f}"


def measurements(rows: Sequence[Row], gpu: str, versions: str) -> list[dict[str, Any]]:
    """What `measured.json` takes: our fastest tactic against the fastest two products; right results only."""
    found = []
    for row in rows:
        ours, other = row.best("tactic"), row.best("two products")
        if ours is None or other is None or ours.worst is None or ours.wrong or other.wrong:
            continue
        found.append(
            {
                "gpu": gpu,
                "date": datetime.date.today().isoformat(),
                "library": f"{other.name.partition(', ')[2]}, {versions}",
                "variant": row.case.form,
                "dtype": row.case.dtype,
                "rows": row.case.rows,
                "sizes": {"inputs": row.case.width, "outputs": row.case.width, "rank": row.case.rank},
                "tactic": int(ours.name.rpartition(" ")[2]),
                "plugin": interval(ours.microseconds),
                "other": interval(other.microseconds),
            }
        )
    return found


def write_measured(new: Sequence[Mapping[str, Any]], path: Path = MEASURED) -> None:
    """Put measurements into the file, in place of older ones of the same GPU."""
    from graphopt.engines.plugins.measured import Measurements

    known = json.loads(path.read_text(encoding="utf-8"))
    gpus = {one["gpu"] for one in new}
    kept = [one for one in known["measurements"] if one["gpu"] not in gpus]
    note = "Written by `make gpu`. Times in microseconds, the weights from the GPU's memory."
    content = {"format": known["format"], "note": note, "measurements": [*kept, *new]}
    Measurements.model_validate(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def is_rehearsal() -> bool:
    """Whether another driver than the GPU's own is in use: what it measures is no result."""
    return bool(os.environ.get("GRAPHOPT_LIBCUDA"))


def run(*, quick: bool = False, write: bool = True) -> list[Row]:
    """All shapes; the results are printed, and written where they are results."""
    driver = find_driver()
    with driver.open() as context:
        stream = context.stream()
        gpu, cuda = context.device.name, ".".join(map(str, driver.cuda))
        print(f"{gpu}, driver for CUDA {cuda}")
        libraries = find_libraries(context, stream)
        rows = []
        for case in cases(quick=quick):
            print(f"  {case.form} {case.dtype} d {case.width}, {case.rows} rows ...", flush=True)
            rows.append(measure(context, stream, case, libraries))
        show(rows)
        if is_rehearsal() or quick or not write:
            print("nothing was written: this was no measurement")
            return rows
        result = {
            "gpu": {
                "name": gpu,
                "capability": ".".join(map(str, context.device.capability)),
                "memory_gb": round(context.device.memory_bytes / 1e9, 1),
                "l2_mb": round(context.device.l2_bytes / 1e6, 1),
                "driver_cuda": cuda,
            },
            "against": [library.title for library in libraries] or "nothing: neither cuBLAS nor torch runs here",
            "rows": [row.to_json() for row in rows],
        }
        write_result("gpu_pivot", result)
        found = measurements(rows, gpu, f"driver for CUDA {cuda}")
        if found:
            write_measured(found)
        return rows


def main() -> int:
    """Exit code 0, or 2 where there is no GPU; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    try:
        rows = run(quick=parser.parse_args().quick)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if any(one.wrong for row in rows for one in row.contenders) else 0


if __name__ == "__main__":
    sys.exit(main())
