"""What a layer costs as two factors and as pivots with coefficients, on ONNX Runtime's CPU, one thread.

    python -m benchmarks.pivot_layers [--rounds N] [--shapes D,ROWS ...]

Two layers d -> d of rank d / 2 with a bias, a Relu behind each, and a dense head of 8 outputs: both layers can be
pivoted by rows, whose order goes into the columns of the next weight. Interleaved in one process; ratios are taken
within rounds, their intervals are a bootstrap over them.

* two factors: as an exporter writes nn.Linear pairs on [rows, d].
* pivots, folded: what ``graphopt.optimize`` makes of it with recipe ``lowrank``, verified.
* pivots, Gather: the same where the channels behind each layer are outputs too, so that nothing can be folded.
* official layer: PIFA's module as it describes itself (two linears, two index_copy_), by each of torch's exporters.
* dense: the product of the factors.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import scipy.linalg  # noqa: F401 - has a BLAS of its own, which single_threaded_blas finds only where it is loaded
from onnx_ir import tape

import graphopt
from benchmarks.common import has, print_table, work_folder, write_result
from graphopt.benchmarking import Ratio, ratio_interval
from graphopt.numerics.blas import single_threaded_blas
from graphopt.numerics.pivot import Pivoted, pivot_rows
from graphopt.runtime.loading import OnnxRuntimeRunner

SIZES = (1024, 2048, 4096)
ROWS = (1, 64, 256)
FACTORS, FOLDED, GATHER, DENSE = "two factors", "pivots, folded", "pivots, Gather", "dense"
OFFICIAL: dict[Literal["torchscript", "dynamo"], str] = {
    "torchscript": "official, torchscript",
    "dynamo": "official, dynamo",
}
BAR, FORMULA = 22.0, 25.0  # % of time: what is asked for, and what fewer multiplications alone explain
_SAMPLE_SECONDS = 4e-3
_HEAD = 8
_LOADS = 5  # a model is loaded anew so often: where weights come to lie in memory changes the speed a little


@dataclass(frozen=True)
class Layer:
    """y = left (right x) + bias.

    Attributes:
        left: (d, r).
        right: (r, d).
        bias: (d,).
    """

    left: np.ndarray
    right: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Made:
    """Two layers of one size, and the head (8, d)."""

    layers: tuple[Layer, Layer]
    head: np.ndarray

    @classmethod
    def of(cls, d: int) -> Made:
        """Random ones of size ``d`` and rank d / 2.

        Rows differ in length, as trained ones do. Where all are alike, coefficients amplify rounding the most:
        from 1024 on by more than the rounding rule allows, and the pivot form is refused.
        """
        rng, r = np.random.default_rng(d), d // 2

        def draw(*shape: int, of: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) * np.float32(of**-0.5)

        def layer() -> Layer:
            lengths = np.exp(rng.standard_normal((d, 1), np.float32))
            return Layer(draw(d, r, of=r) * lengths / 2, draw(r, d, of=d), draw(d, of=100))

        return cls((layer(), layer()), draw(_HEAD, d, of=d))


def network(path: Path, made: Made, *, dense: bool = False, pinned: bool = False) -> Path:
    """Write x -> layer -> Relu -> layer -> Relu -> head -> y; pinned: what each Relu gives is an output, too."""
    build, weights = tape.Tape(), list[ir.Value]()

    def constant(array: np.ndarray) -> ir.Value:
        value = ir.Value(name=f"weight_{len(weights)}", const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        weights.append(value)
        return value

    def linear(x: ir.Value, *parts: np.ndarray) -> ir.Value:
        return build.op("Gemm", [x, *map(constant, parts)], {"transB": 1})

    x = _declared("x", made.head.shape[1])
    value, between = x, []
    for layer in made.layers:
        if dense:
            value = linear(value, layer.left @ layer.right, layer.bias)
        else:
            value = linear(linear(value, layer.right), layer.left, layer.bias)
        value = build.op("Relu", [value])
        between.append(value)
    outputs = [linear(value, made.head), *(between if pinned else [])]
    for i, output in enumerate(outputs):
        like = _declared(f"y{i}", made.head.shape[i > 0])
        output.name, output.type, output.shape = like.name, like.type, like.shape
    graph = ir.Graph([x], outputs, nodes=build.nodes, initializers=weights, opset_imports={"": 17}, name="layers")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def _declared(name: str, channels: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", channels]))


def folded(path: Path, source: Path) -> Path:
    """The pivot form of a network, by graphopt; verified."""
    report = graphopt.optimize(source, path, recipe=["lowrank"], work=path.parent / "work")
    _require(report.verification.verdict == "passed", f"verification of {source.name}: {report.verification.verdict}")
    _require("Gather" not in _operators(path), "a Gather is left")
    return path


def with_gather(path: Path, made: Made) -> Path:
    """The pivot form with the permutation as a Gather behind each layer, by graphopt; verified."""
    source = network(path.with_suffix(".pinned.onnx"), made, pinned=True)
    report = graphopt.optimize(
        source, path, recipe=["lowrank"], settings=["pivot.gather=always"], work=path.parent / "work"
    )
    _require(report.verification.verdict == "passed", f"verification of {source.name}: {report.verification.verdict}")
    model = ir.load(path)
    del model.graph.outputs[1:]  # which pinned them
    ir.save(model, path)
    return path


def official(folder: Path, made: Made, forms: Sequence[Pivoted], exporter: Literal["torchscript", "dynamo"]) -> Path:
    """PIFA's own layer as one of torch's exporters writes it: kept rows and the others copied to their places."""
    import torch
    from torch import nn

    from tests.models.lowrank import Entry, Input, export

    class Pifa(nn.Module):  # type: ignore[misc]
        def __init__(self, layer: Layer, form: Pivoted) -> None:
            super().__init__()
            d, r = layer.left.shape
            order = torch.from_numpy(form.order)
            self.kept = nn.Linear(d, r)
            self.others = nn.Linear(r, d - r)
            kept, others = layer.bias[form.order[:r]], layer.bias[form.order[r:]]
            for linear, weight, bias in (
                (self.kept, form.kept, kept),
                (self.others, form.coefficients, others - form.coefficients @ kept),
            ):
                linear.weight = nn.Parameter(torch.from_numpy(weight))
                linear.bias = nn.Parameter(torch.from_numpy(bias))
            self.register_buffer("pivots", order[:r])
            self.register_buffer("rest", order[r:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.kept(x)
            y = torch.empty(*x.shape[:-1], len(self.pivots) + len(self.rest), dtype=x.dtype, device=x.device)
            y.index_copy_(-1, self.pivots, kept)
            y.index_copy_(-1, self.rest, self.others(kept))
            return y

    head = nn.Linear(made.head.shape[1], _HEAD, bias=False)
    head.weight = nn.Parameter(torch.from_numpy(made.head))
    module = nn.Sequential(Pifa(made.layers[0], forms[0]), nn.ReLU(), Pifa(made.layers[1], forms[1]), nn.ReLU(), head)
    entry = Entry("official", lambda: module, (Input((3, made.head.shape[1])),), "pivot")
    return export(entry, exporter, 18, folder)


@dataclass
class Timing:
    """One network's rounds: seconds a call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)


def time_all(files: Mapping[str, Path], x: np.ndarray, rounds: int) -> dict[str, Timing]:
    """Time every network ``rounds`` times, in an order drawn anew each round."""
    rng = np.random.default_rng(0)
    names = list(files)
    timings = {name: Timing() for name in names}
    per_load = -(-rounds // _LOADS)
    for load in range(_LOADS):
        calls: dict[str, Callable[[], object]] = {}
        for index in rng.permutation(len(names)):
            runner = OnnxRuntimeRunner(files[names[index]], 1)
            calls[names[index]] = runner.bind({runner.inputs[0].name: x})
        repeats = {name: _repeats(call) for name, call in calls.items()}
        gc.disable()
        for _ in range(per_load):
            for index in rng.permutation(len(names)):
                name = names[index]
                calls[name]()  # brings its weights back into the caches that the one before it filled
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats[name]):
                    calls[name]()
                timings[name].wall.append((time.perf_counter() - wall) / repeats[name])
                timings[name].cpu.append((time.process_time() - cpu) / repeats[name])
                timings[name].loads.append(load)
        gc.enable()
    return timings


@single_threaded_blas()
def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=lambda text: tuple(map(int, text.split(","))),
        default=[(d, rows) for d in SIZES for rows in ROWS],
        metavar="D,ROWS",
        help="default: all of the table",
    )
    options = parser.parse_args()
    exporters = list(OFFICIAL) if has("torch") else []
    if not exporters:
        print("torch is not installed: the official layer is left out")
    table: list[list[object]] = []
    shapes: list[dict[str, Any]] = []
    for d in sorted({d for d, _ in options.shapes}):
        with work_folder() as folder:
            began = time.perf_counter()
            made = Made.of(d)
            files = {FACTORS: network(folder / "factors.onnx", made)}
            files[FOLDED] = folded(folder / "folded.onnx", files[FACTORS])
            files[GATHER] = with_gather(folder / "gather.onnx", made)
            forms = [pivot_rows(layer.left, layer.right) for layer in made.layers] if exporters else []
            files |= {OFFICIAL[exporter]: official(folder, made, forms, exporter) for exporter in exporters}
            files[DENSE] = network(folder / "dense.onnx", made, dense=True)
            del made, forms
            held = {name: _elements(path) for name, path in files.items()}
            r = d // 2
            _require(held[FOLDED] == held[GATHER] == 2 * r * (2 * d - r), "not r (m + n - r) elements")
            print(f"d = {d}: made in {time.perf_counter() - began:.0f} s", flush=True)
            for rows in (rows for size, rows in options.shapes if size == d):
                x = np.random.default_rng(rows).standard_normal((rows, d), np.float32)
                apart = _apart(files, x)
                timings = time_all(files, x, options.rounds)
                found = _told(timings, held, apart)
                shapes.append({"d": d, "rows": rows, "networks": found})
                for name, one in found.items():
                    first = name == FACTORS
                    table.append(
                        [
                            f"{d}" if first else "",
                            f"{rows}" if first else "",
                            name,
                            f"{held[name] / 1e6:.2f}",
                            f"{one['wall_ms']:.3f}",
                            f"{one['cpu_ms']:.3f}",
                            "" if first else _percent(one["wall_ratio"]),
                            "" if first else _percent(one["cpu_ratio"]),
                        ]
                    )
                print(f"   {rows} rows: {_percent(found[FOLDED]['wall_ratio'])} % saved", flush=True)
    columns: list[Any] = [("d", "right"), ("rows", "right"), "network"]
    columns += [(heading, "right") for heading in ("M weights", "wall ms", "CPU ms", "% wall saved", "% CPU saved")]
    print_table(columns, table, f"Two layers of rank d / 2, ONNX Runtime, CPU, one thread, {options.rounds} rounds")
    saved = {}
    for name in shapes[0]["networks"]:
        each = [100 * (1 - shape["networks"][name]["wall_ratio"].value) for shape in shapes]
        saved[name] = float(np.median(each))
    print(f"{FOLDED}: median of the shapes' medians {saved[FOLDED]:.1f} % saved (asked: {BAR:.0f})")
    for shape in shapes:
        least = 100 * (1 - shape["networks"][FOLDED]["wall_ratio"].high)
        if least > FORMULA:  # more than there are fewer multiplications
            print(f"d = {shape['d']}, {shape['rows']} rows: {least:.1f} % at least: {_why_more(shape)}")
    write_result("pivot_layers", {"rounds": options.rounds, "median_saved_percent": saved, "shapes": shapes})


def _why_more(shape: Mapping[str, Any]) -> str:
    """What a shape saves more than multiplications by."""
    before, after = (4e-6 * shape["networks"][name]["weights"] for name in (FACTORS, FOLDED))
    last = _last_cache_mb()
    if last is None:
        return f"{before:.0f} and {after:.0f} MB of weights; how large the last cache is could not be found out"
    if shape["rows"] == 1 and after < last < before * 1.25:
        return f"the factors' {before:.0f} MB fill the last cache of {last:.0f} MB, the pivots' {after:.0f} MB fit"
    return f"not by a cache: {before:.0f} and {after:.0f} MB of weights, the last cache has {last:.0f} MB"


def _last_cache_mb() -> float | None:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) / 1e3 for size in sizes if size.endswith("K")), default=None)


def _told(
    timings: Mapping[str, Timing], held: Mapping[str, int], apart: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    base = timings[FACTORS]
    return {
        name: {
            "weights": held[name],
            "wall_ms": float(np.median(own.wall) * 1e3),
            "cpu_ms": float(np.median(own.cpu) * 1e3),
            "wall_ratio": ratio_interval(own.wall, base.wall, blocks=base.loads),
            "cpu_ratio": ratio_interval(own.cpu, base.cpu, blocks=base.loads),
            "largest_difference": apart[name],
        }
        for name, own in timings.items()
    }


def _percent(ratio: Ratio) -> str:
    return f"{100 * (1 - ratio.value):.1f} [{100 * (1 - ratio.high):.1f}, {100 * (1 - ratio.low):.1f}]"


def _repeats(call: Callable[[], object]) -> int:
    """How many calls make a sample long enough to time, once things have settled."""
    durations = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return max(1, int(np.ceil(_SAMPLE_SECONDS / min(durations))))


def _apart(files: Mapping[str, Path], x: np.ndarray) -> dict[str, float]:
    """The largest difference of each network's output from the first one's, over the largest output."""
    outputs = {}
    for name, path in files.items():
        runner = OnnxRuntimeRunner(path, 1)
        outputs[name] = next(iter(runner.run({runner.inputs[0].name: x}).values()))
    reference = outputs[FACTORS]
    apart = {name: float(np.abs(y - reference).max() / np.abs(reference).max()) for name, y in outputs.items()}
    worst = max(apart, key=lambda name: apart[name])
    _require(apart[worst] < 1e-3, f"{worst} computes something else: {apart[worst]:.1e}")
    return apart


def _elements(path: Path) -> int:
    """The elements of the matrices of the layers: the head's, the same in all, are left out."""
    total = 0
    for value in ir.load(path).graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            shape = tensor.shape.numpy()
            total += tensor.size if len(shape) == 2 and _HEAD not in shape else 0
    return total


def _operators(path: Path) -> set[str]:
    return {node.op_type for node in ir.load(path).graph}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
