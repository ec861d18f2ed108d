"""Perplexity of a small language model at densities of its linear weights: SVD, weighted SVD, M, M + PIFA.

    python -m benchmarks.language_model [--densities 0.7] [--methods svd m] [--work FOLDER]

The model is trained here, once, on Python's documentation: about four minutes on two cores; ``--work`` keeps it for the
next run. It is compressed with what topics set aside for calibration give and judged on topics that neither training
nor calibration saw, by ONNX Runtime. A part of the methods or densities is printed and not recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plots, text
from benchmarks.common import has, print_table, work_folder, write_result
from benchmarks.densities import (
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
from benchmarks.minilm_export import make_session

Array = np.ndarray[Any, Any]

MERGES = 512  # byte pairs
BATCH = 8  # windows in a calibration sample


def main() -> None:
    """Train or find the model, compress, measure, print, record."""
    options = arguments(__doc__).parse_args()
    if not has("torch"):
        print("torch is not installed: nothing was measured")
        return
    from benchmarks.decoder import Config, trained

    split = text.split()
    vocabulary = text.learn(split.training, MERGES)
    config = Config(len(vocabulary))
    tokens = {name: vocabulary.encode(texts) for name, texts in vars(split).items()}
    rows = text.windows(tokens["held_out"], config.context)
    bytes_a_token = float(np.mean(np.array(vocabulary.lengths)[rows[:, 1:]]))
    source = trained(config, tokens["training"], options.work)
    dense = measure(source, rows)
    baselines = count_baselines(tokens["training"], rows, len(vocabulary))
    print_table(
        ["held-out text", ("perplexity", "right"), ("bits a byte", "right")],
        [
            [name, f"{value:.2f}", f"{np.log2(value) / bytes_a_token:.3f}"]
            for name, value in {**baselines, "this model": dense}.items()
        ],
        "The model, uncompressed",
    )
    found: dict[str, dict[float, float]] = {method: {} for method in options.methods}
    measured: list[dict[str, Any]] = []
    made_all: list[Compressed] = []
    with work_folder() as folder:
        seen = np.concatenate([tokens["training"], tokens["calibration"]])
        calibration = write_calibration(folder / "calibration.npz", seen, config.context)
        for density, method, made in compress_all(source, options, calibration, folder):
            found[method][density] = measure(made.path, rows)
            made_all.append(made)
            measured.append({**made.facts(), "perplexity": found[method][density]})
            print(f"  perplexity {found[method][density]:.3f}", flush=True)
    shown = {name: {density: f"{value:.2f}" for density, value in row.items()} for name, row in found.items()}
    show("Perplexity on held-out text by density of the linear weights", shown, f"{dense:.2f}")
    changes = gains({name: {d: float(np.log(value)) for d, value in row.items()} for name, row in found.items()})
    shown = {name: {d: f"{100 * np.expm1(value):+.1f} %" for d, value in row.items()} for name, row in changes.items()}
    if shown:
        show("Change of perplexity that each stage adds; below 0 is a gain", shown)
    for row in made_all:
        row.require_density()
    if not is_whole(options):
        return
    plots.lines(
        "language_model",
        options.densities,
        {TITLES[name]: [row[density] for density in options.densities] for name, row in found.items()},
        labels=("density of the linear weights", "perplexity on held-out text"),
        reference=("uncompressed", dense),
        logarithmic=True,
    )
    model = {**vars(config), "linear_elements": linear_elements(source), "file_bytes": source.stat().st_size}
    about = {"text": split.facts(), "model": model, "bytes_a_token": bytes_a_token, "held_out_tokens": rows[:, 1:].size}
    write_result("language_model", {**about, "baselines": baselines, "perplexity": dense, "compressed": measured})


def measure(model: Path, rows: Array) -> float:
    """The perplexity of ``rows`` under an ONNX file."""
    from benchmarks.decoder import perplexity

    session = make_session(model, optimized=True)
    (name,) = (value.name for value in session.get_inputs())
    return perplexity(lambda tokens: session.run(None, {name: np.ascontiguousarray(tokens)})[0], rows)


def count_baselines(training: Array, rows: Array, size: int) -> dict[str, float]:
    """Perplexities of what knows no more than how often tokens and pairs of tokens come."""
    from benchmarks.decoder import n_gram_perplexity

    return {
        "single tokens": n_gram_perplexity(training, rows, size, (0.01, 0.99)),
        "pairs of tokens": n_gram_perplexity(training, rows, size, (0.01, 0.24, 0.75)),
    }


def write_calibration(out: Path, tokens: Array, length: int) -> Path:
    """Windows of ``tokens``, shuffled, in samples of `BATCH` windows; what is left over is dropped."""
    rows = text.windows(tokens, length)[:, :-1]
    count = len(rows) // BATCH
    np.savez(out, tokens=rows[shuffled(len(rows))[: count * BATCH]].reshape(count, BATCH, length))
    return out


if __name__ == "__main__":
    main()
