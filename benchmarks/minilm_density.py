"""MiniLM at densities of its linear weights: SVD, weighted SVD, M, M + PIFA; cosine, size and latency.

    python -m benchmarks.minilm_density [--densities 0.7] [--methods svd m] [--work FOLDER] [--seconds S]

Judged are the embeddings of sentences from topics that calibration did not see, against those of the model as exported.
Latency is that after recipe ``safe`` over that after recipe ``lowrank``, which does the same besides, so that it is
what compression gives: one thread, models of one density interleaved. A part of the methods or densities is printed and
not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from benchmarks import plots, text
from benchmarks.common import minilm, work_folder, write_result
from benchmarks.densities import (
    SAFE,
    TITLES,
    Compressed,
    arguments,
    compress_all,
    gains,
    is_whole,
    linear_elements,
    show,
    shuffled,
)
from benchmarks.minilm_export import example, make_session

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]

SENTENCES = 768  # for calibration: about 15,000 tokens
BATCH = 16
SHAPE = (4, 64)  # sentences × tokens that are timed
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def main() -> None:
    """Export, compress, measure, print, record."""
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, each density")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = exported(options.work)
    if source is None:
        print("MiniLM, torch or transformers is not installed: nothing was measured")
        return
    split = text.split()
    held_out = list(batches(text.sentences(split.held_out)))
    expected = embeddings(source, held_out)
    cosines: dict[str, dict[float, Array]] = {method: {} for method in options.methods}
    made: dict[str, dict[float, Compressed]] = {method: {} for method in options.methods}
    latency: dict[str, dict[float, Any]] = {method: {} for method in options.methods}
    base_latency: dict[float, Any] = {}
    with work_folder() as folder:
        calibration = write_calibration(folder / "calibration", (*split.training, *split.calibration))
        safe = folder / "safe.onnx"
        graphopt.optimize(source, safe, recipe=SAFE)
        for density, method, one in compress_all(source, options, calibration, folder):
            made[method][density] = one
            cosines[method][density] = cosine(embeddings(one.path, held_out), expected)
            print(f"  cosine {_mean_and_low(cosines[method][density])}", flush=True)
        for density in options.densities:
            paths = [safe, *(made[method][density].path for method in options.methods)]
            timed = graphopt.bench(paths, shapes=dict.fromkeys(INPUTS, SHAPE), seconds=options.seconds)
            base_latency[density] = timed.models[0].wall_ms
            latency |= {
                method: {**latency[method], density: model}
                for method, model in zip(options.methods, timed.models[1:], strict=True)
            }
    report(cosines, made, latency, source.stat().st_size)
    for row in made.values():
        for one in row.values():
            one.require_density()
    if not is_whole(options):
        return
    for name, label, pick in (
        ("minilm_cosine_mean", "mean cosine to the uncompressed embedding", np.mean),
        ("minilm_cosine_low", "5th percentile of the cosine", _low),
    ):
        series = {TITLES[m]: [float(pick(row[d])) for d in options.densities] for m, row in cosines.items()}
        plots.lines(name, options.densities, series, labels=("density of the linear weights", label))
    measured = [
        {
            **made[method][density].facts(),
            "cosine_mean": float(cosines[method][density].mean()),
            "cosine_p5": _low(cosines[method][density]),
            "wall_ms": latency[method][density].wall_ms,
            "speedup": latency[method][density].speedup,
        }
        for density in options.densities
        for method in options.methods
    ]
    model = {"linear_elements": linear_elements(source), "file_bytes": source.stat().st_size}
    about = {"text": split.facts(), "model": model, "held_out_sentences": len(expected), "timed_on": SHAPE}
    write_result("minilm_density", {**about, "safe_wall_ms": base_latency, "compressed": measured})


def report(
    cosines: Mapping[str, Mapping[float, Array]],
    made: Mapping[str, Mapping[float, Compressed]],
    latency: Mapping[str, Mapping[float, Any]],
    size: int,
) -> None:
    """Print one table a quantity: methods by densities."""

    def cells(values: Mapping[str, Mapping[float, Any]], write: Callable[[Any], str]) -> dict[str, dict[float, str]]:
        return {method: {density: write(value) for density, value in row.items()} for method, row in values.items()}

    show("Cosine to the uncompressed embedding: mean / 5th percentile", cells(cosines, _mean_and_low), "1")
    means = {method: {density: float(row[density].mean()) for density in row} for method, row in cosines.items()}
    if added := gains(means):
        show("Change of the mean cosine that each stage adds", cells(added, "{:+.5f}".format))
    show("File, MB", cells(made, lambda one: f"{one.bytes / 1e6:.1f}"), f"{size / 1e6:.1f}")
    written = cells(latency, lambda model: "{value:.2f} [{low:.2f}, {high:.2f}]".format(**vars(model.speedup)))
    show(f"Times as fast as recipe safe, {SHAPE[0]} × {SHAPE[1]} tokens, one thread, 95 % interval", written)


def exported(folder: Path) -> Path | None:
    """MiniLM in ``folder``, where a run before this one may have left it; None where it is not installed."""
    out = folder / "minilm.onnx"
    return out if out.exists() else minilm(folder)


def batches(sentences: Iterable[str]) -> Iterator[Feed]:
    """Feeds of up to `BATCH` sentences that have the same number of tokens, so that there is no padding."""
    tokenizer = example().tokenizer()
    rows = sorted((row.ids for row in tokenizer.encode_batch(list(sentences))), key=len)
    for _, same in groupby(rows, key=len):
        ids = np.array(list(same), np.int64)
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            yield dict(zip(INPUTS, (part, np.ones_like(part), np.zeros_like(part)), strict=True))


def embeddings(model: Path, feeds: Iterable[Feed]) -> Array:
    """float32 [sentences, 384]: what ONNX Runtime computes for each."""
    session = make_session(model, optimized=True)
    return np.concatenate([session.run(["sentence_embedding"], dict(feed))[0] for feed in feeds])


def cosine(found: Array, expected: Array) -> Array:
    """[sentences]: of each row with its counterpart."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    products: Array = (found * expected).sum(axis=1) / lengths
    return products


def write_calibration(folder: Path, texts: Iterable[str]) -> Path:
    """A folder of feeds: `SENTENCES` sentences of ``texts``, shuffled before they are cut off."""
    folder.mkdir()
    sentences = text.sentences(texts)
    chosen = [sentences[index] for index in shuffled(len(sentences))[:SENTENCES]]
    for number, feed in enumerate(batches(chosen)):
        np.savez(folder / f"{number:04d}.npz", allow_pickle=False, **feed)
    return folder


def _low(cosines: Array) -> float:
    return float(np.percentile(cosines, 5))


def _mean_and_low(cosines: Array) -> str:
    return f"{cosines.mean():.4f} / {_low(cosines):.4f}"


if __name__ == "__main__":
    main()
