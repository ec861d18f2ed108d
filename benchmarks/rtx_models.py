"""What TensorRT-RTX builds engines of, and whether what it refuses was known before: ONNX's node corpus, and networks.

    python -m benchmarks.rtx_models [corpus | networks | show ...]     show: print what is recorded, and measure nothing

``corpus``: every case of ONNX's node corpus as it is, and with its parameters made constants, its axes symbolic, its
floats of other types; and the forms of ``tests.models.engines``, which it lacks. Each is parsed and built by the
library in a worker process, and each answer is set beside what ``graphopt.engines.coverage`` predicted.

``networks``: through `graphopt build`, as a user would: MiniLM, the low-rank examples, a ResNet, a U-Net, LSTMs, a
decoder block with a cache for prefill and decode, and float16 of these. Built, not run: there is no GPU here.

Only a run of both writes results. Exit code 1 where a prediction was wrong or a network was not built.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks import rtx_corpus
from benchmarks.common import RESULTS, minilm, print_table, work_folder, write_result

NAME = "rtx_models"
SHOWN = 40
FORMS = "forms"


# -- the corpus -------------------------------------------------------------------------------------------------------


def measure_corpus() -> dict[str, Any]:
    """All variants of the corpus, then the forms; each with counts and with what was predicted wrongly."""
    from benchmarks.corpus import collect
    from tests.models.engines import FORMS as forms

    cases = collect()
    made: dict[str, Any] = {}
    for variant in rtx_corpus.VARIANTS:
        made[variant] = _measure(variant, rtx_corpus.items(cases, variant))
    made[FORMS] = _measure(FORMS, [rtx_corpus.Item(name, form.proto(), form.feeds) for name, form in forms.items()])
    return made


def _measure(variant: str, items: Sequence[rtx_corpus.Item | None]) -> dict[str, Any]:
    start = time.perf_counter()
    judged = list(rtx_corpus.run(items))
    refused = Counter(one.predicted.split(" ")[0] for one in judged if one.kind == "refused")
    summary = rtx_corpus.summarise(judged)
    print(f"{variant}: {summary['models']} models, {time.perf_counter() - start:.0f} s", flush=True)
    return {**summary, "most_refused": dict(refused.most_common(10)), "seconds": round(time.perf_counter() - start)}


def show_corpus(corpora: Mapping[str, Any]) -> None:
    """One row a variant, and every model of which something else was predicted than came."""
    columns = ["built", "refused", "crashed", "missed", "false", "wrong node"]
    rows = [
        [
            variant,
            found["models"],
            found["built"],
            found["refused"] - found["stages"]["crash"],
            found["stages"]["crash"],
            *(found[kind] for kind in rtx_corpus.WRONG),
        ]
        for variant, found in corpora.items()
    ]
    print_table(
        ["corpus", ("models", "right"), *((name, "right") for name in columns)],
        rows,
        "ONNX's node corpus on TensorRT-RTX: built, refused or crashed as predicted, and otherwise",
    )
    wrong = [(variant, one) for variant, found in corpora.items() for one in found["not_right"]]
    for variant, one in wrong[:SHOWN]:
        print(
            f"{one['kind']}: {variant}, {one['name']}: {one['said'][:160] or 'built'} | predicted: {one['predicted']}"
        )
    if len(wrong) > SHOWN:
        print(f"... and {len(wrong) - SHOWN} more")


# -- networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network to build, for one set of shapes.

    Attributes:
        name: In the table.
        make: Writes the model into a folder; None where what it needs is not installed.
        shapes: As `graphopt build` takes them.
    """

    name: str
    make: Callable[[Path], Path | None]
    shapes: tuple[str, ...] = ()


_TOKENS = ("batch=1/4/8", "sequence=1/64/128")


def networks() -> Iterator[Network]:
    """The networks of the table."""
    from tests.models import blocks, engines

    yield Network("MiniLM", minilm, _TOKENS)
    yield Network("MiniLM, float16", lambda folder: _half(minilm(folder)), _TOKENS)
    plain: dict[str, tuple[Callable[[], ir.Model], tuple[str, ...]]] = {
        "ResNet": (lambda: engines.resnet(channels=(64, 128, 256, 512), size=224), ("batch=1/8/32",)),
        "U-Net": (lambda: engines.unet(width=32, levels=4, size=256), ("batch=1/2/4",)),
        "LSTM, both directions": (lambda: engines.lstm(), ("time=1/32/128", "batch=1/4/8")),
        "LSTM, state given": (lambda: engines.lstm(state=True), ("time=1/1/128", "batch=1/4/8")),
    }
    for name, (make, shapes) in plain.items():
        yield Network(name, _saved(make), shapes)
        yield Network(f"{name}, float16", _halved(make), shapes)

    def block() -> ir.Model:
        return blocks.llama_block(width=512, heads=8, kv_heads=2, hidden=1408, cache=True)

    for name, shapes in {
        "decoder block, prefill": ("batch=1", "length=1/128/512", "past=0"),
        "decoder block, decode": ("batch=1/4/8", "length=1", "past=1/128/2047"),
        "decoder block, both": ("batch=1", "length=1/128/512", "past=0/128/2048"),
    }.items():
        yield Network(name, _saved(block), shapes)
    yield Network("decoder block, both, float16", _halved(block), ("batch=1", "length=1/128/512", "past=0/128/2048"))
    for form in ("row", "column"):
        for dtype in ("float32", "float16", "bfloat16"):
            yield Network(f"pivot form, {form}, {dtype}", _pivot(form, dtype))
    for exporter, opset in (("torchscript", 17), ("dynamo", 20)):
        for optimized in (False, True):
            title = f"by {exporter}, recipe lowrank" if optimized else f"by {exporter}"
            yield Network(f"low-rank spellings, {title}", _spellings(exporter, opset, optimized=optimized), _SPELLED)
    yield Network("examples/decoder.py, two factors", lambda folder: _decoder(folder, optimized=False), _DECODER)
    yield Network("examples/decoder.py, recipe lowrank", lambda folder: _decoder(folder, optimized=True), _DECODER)


# Every axis that is not fixed is a batch or a length.
_SPELLED = ("*=1/4/8",)
_DECODER = ("batch=1", "length=1/128/512", "past=0/128/2048")


def _saved(make: Callable[[], ir.Model]) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        path = folder / "network.onnx"
        ir.save(make(), path)
        return path

    return save


def _halved(make: Callable[[], ir.Model]) -> Callable[[Path], Path | None]:
    return lambda folder: _half(_saved(make)(folder))


def _half(source: Path | None) -> Path | None:
    """A network by recipe fp16; it must compute nearly the same on one made-up input."""
    import numpy as np

    from graphopt import optimize
    from tests.models import draw_feeds

    if source is None:
        return None
    data, out = source.with_name("inputs.npz"), source.with_name("half.onnx")
    # One sample, whichever axis the batch is. Ones for integers: they may be indices into a table of two rows.
    feeds = {
        name: np.ones_like(array) if array.dtype.kind == "i" else array
        for name, array in draw_feeds(ir.load(source), size=1).items()
    }
    np.savez(data, **feeds)  # type: ignore[arg-type]
    optimize(source, out, recipe=["fp16"], target="tensorrt-rtx", calibration=data, fail_if=["cosine<0.99"])
    return out


def _pivot(form: Any, dtype: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        import onnx

        from graphopt.plugins.pivot_linear.samples import example

        path = folder / "pivot.onnx"
        onnx.save(example(dtype, form).model, path)
        return path

    return save


def _spellings(exporter: Any, opset: int, *, optimized: bool) -> Callable[[Path], Path | None]:
    """All low-rank spellings of the tests side by side in one file, as exported or with what was made of them."""

    def make(folder: Path) -> Path | None:
        from benchmarks.common import has

        if not has("torch"):
            return None
        from graphopt import optimize
        from tests.models.lowrank import SPELLINGS, export

        entries = [entry for entry in SPELLINGS if entry.failure(exporter) is None]
        source = export(entries, exporter, opset, folder)
        if not optimized:
            return source
        out = folder / "lowrank.onnx"
        optimize(source, out, recipe=["lowrank"], target="tensorrt-rtx")
        return out

    return make


def _decoder(folder: Path, *, optimized: bool) -> Path | None:
    from benchmarks.common import ROOT, has

    if not has("torch"):
        return None
    if (examples := str(ROOT / "examples")) not in sys.path:
        sys.path.insert(0, examples)
    import graphopt

    decoder = importlib.import_module("decoder")

    factors, out = folder / "factors.onnx", folder / "lowrank.onnx"
    graphopt.export(lambda: decoder.factory(decoder.Sizes()), factors)
    if not optimized:
        return factors
    graphopt.optimize(factors, out, recipe=[decoder.RECIPE], target="tensorrt-rtx")
    return out


def measure_networks() -> list[dict[str, Any]]:
    """Build them all, one after the other."""
    made: list[dict[str, Any]] = []
    for network in networks():
        with work_folder() as folder:
            made.append(_build(network, folder))
        print(f"{network.name}: {made[-1]['status']}", flush=True)
    return made


def _build(network: Network, folder: Path) -> dict[str, Any]:
    from graphopt.engines import build_engine
    from graphopt.errors import GraphoptError

    found: dict[str, Any] = {"network": network.name, "shapes": list(network.shapes)}
    model = network.make(folder)
    if model is None:
        return {**found, "status": "not installed"}
    start = time.perf_counter()
    shapes = _for_all_axes(model, network.shapes[0]) if network.shapes == _SPELLED else network.shapes
    try:
        built = build_engine(model, folder / "built.engine", backend=rtx_corpus.TARGET, shapes=shapes)
    except GraphoptError as error:
        return {**found, "status": f"not built: {error.what}"}
    return {
        **found,
        "version": built.version,
        "seconds": built.seconds,
        "wall": time.perf_counter() - start,
        "bytes": built.bytes,
        "onnx_bytes": sum(file.stat().st_size for file in folder.glob(f"{model.stem}.*")),
        "peak_rss_bytes": built.peak_rss_bytes,
        "layers": built.layers,
        "nodes": built.coverage["nodes"],
        "gpu": built.gpu,
        "status": built.status,
    }


def _for_all_axes(model: Path, sizes: str) -> tuple[str, ...]:
    """``*=SIZES`` for each symbolic axis by its name."""
    graph = ir.load(model).graph
    axes = {str(axis) for value in graph.inputs for axis in value.shape or () if not isinstance(axis, int)}
    return tuple(sizes.replace("*", axis) for axis in sorted(axes))


def show_networks(found: Sequence[Mapping[str, Any]]) -> None:
    """One row a network."""
    built = [one for one in found if "bytes" in one]
    rows = [
        [
            one["network"],
            " ".join(one["shapes"]) or "static",
            one["nodes"],
            one["layers"],
            f"{one['seconds']:.1f}",
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['onnx_bytes'] / 1e6:.1f}",
            "" if one["peak_rss_bytes"] is None else f"{one['peak_rss_bytes'] / 1e6:.0f}",
        ]
        for one in built
    ]
    columns = [(name, "right") for name in ("nodes", "layers", "build s", "engine MB", "ONNX MB", "peak MB")]
    print_table(["network", "shapes", *columns], rows, "Engines by TensorRT-RTX")
    print("; ".join(dict.fromkeys(one["status"] for one in built)))
    for one in found:
        if "bytes" not in one:
            print(f"{one['network']}: {one['status']}")


def main() -> int:
    """Measure, print, record."""
    parts = sys.argv[1:] or ["corpus", "networks"]
    if parts == ["show"]:
        recorded = json.loads((RESULTS / f"{NAME}.json").read_text())
        print(f"Recorded on {recorded['date']}, {recorded['machine']['cpu']}, TensorRT-RTX {recorded['version']}")
        show_corpus(recorded["corpora"])
        show_networks(recorded["networks"])
        return 0
    # The corpus first: its workers are forked, and what builds the networks may load ONNX Runtime.
    corpora = measure_corpus() if "corpus" in parts else {}
    found = measure_networks() if "networks" in parts else []
    show_corpus(corpora)
    show_networks(found)
    if corpora and found:
        version = next((one["version"] for one in found if "version" in one), "")
        write_result(NAME, {"version": version, "corpora": corpora, "networks": found})
    wrong = any(one["not_right"] for one in corpora.values())
    return int(wrong or any(one["status"].startswith("not built") for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
