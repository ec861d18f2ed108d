"""Memory of calibration against the number of samples: Gram matrices here, ranges by ONNX Runtime's calibrators.

    python -m benchmarks.calibration_memory [--samples N ...]

Every measurement is a process of its own, on a transformer of 6 layers, width 384, with 128 tokens a sample. The
calibrators see the inputs and outputs of MatMul and are used as `quantize_static` uses them by default, one
`collect_data` for all samples; they may take 8 GiB of address space.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import CommandFailed, Usage, measure, print_table, work_folder, write_result

LAYERS, WIDTH, LENGTH = 6, 384, 128
BAR = 1.05
CEILING = 8 << 30


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "MODEL", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, model, samples = options.one
        METHODS[what](Path(model), int(samples))
        return
    from tests.models import large_transformer

    found: dict[str, dict[int, Usage | str]] = {}
    with work_folder() as folder:
        model = large_transformer(folder / "model.onnx", layers=LAYERS, width=WIDTH, heads=6)
        rng = np.random.default_rng(0)
        for samples in options.samples:
            np.savez(_data(model, samples), ids=rng.integers(0, 2048, (samples, LENGTH)))
        for what in METHODS:
            found[what] = {n: _measure(what, model, n) for n in options.samples}
    rows = [[what, *map(_told, runs.values()), _growth(runs)] for what, runs in found.items()]
    headings = (*(f"{n} samples" for n in options.samples), f"{options.samples[-1]} / {options.samples[0]}")
    print_table(["", *((heading, "right") for heading in headings)], rows, "peak resident MB (seconds of wall time)")
    constant = {what: _ratio(found[what]) for what in OURS}
    held = all(ratio is not None and ratio <= BAR for ratio in constant.values())
    print(f"constant within 5 %: {'yes' if held else 'NO'}")
    write_result(
        "calibration_memory",
        {
            "network": {"layers": LAYERS, "width": WIDTH, "tokens": LENGTH},
            "runs": found,
            "ratio": constant,
            "constant_within_5_percent": held,
        },
    )
    sys.exit(not held)


def _measure(what: str, model: Path, samples: int) -> Usage | str:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "benchmarks.calibration_memory",
        "--one",
        what,
        model,
        str(samples),
    ]
    try:
        return measure(command)
    except CommandFailed as failure:
        if what in OURS or not any(words in str(failure) for words in ("allocate", "MemoryError", "bad_alloc")):
            raise
        return f"more than {CEILING >> 30} GiB"


def _told(run: Usage | str) -> str:
    return run if isinstance(run, str) else f"{run.peak_bytes / 1e6:.0f} ({run.wall:.1f})"


def _ratio(runs: dict[int, Usage | str]) -> float | None:
    """The peak with the most samples over that with the fewest."""
    few, many = runs[min(runs)], runs[max(runs)]
    return None if isinstance(few, str) or isinstance(many, str) else many.peak_bytes / few.peak_bytes


def _growth(runs: dict[int, Usage | str]) -> str:
    ratio = _ratio(runs)
    return "-" if ratio is None else f"{ratio:.2f}"


def _data(model: Path, samples: int) -> Path:
    return model.parent / f"{samples}.npz"


def _grams(path: Path, samples: int) -> None:
    """The Gram matrix of the input of every linear layer."""
    from graphopt.calibration import read_calibration
    from graphopt.moments import moments

    model = ir.load(path)
    found, refused = moments(model, _taps(model), read_calibration(_data(path, samples), model.graph.inputs))
    assert not refused and len(found) == 4 * LAYERS


def _relay(path: Path, samples: int) -> None:
    """Those of two models, and between them, asked for layer by layer as reconstruction does."""
    from graphopt.calibration import read_calibration
    from graphopt.moments import Relay

    original, current = ir.load(path), ir.load(path)
    feeds = read_calibration(_data(path, samples), current.graph.inputs)
    taps = _taps(current)
    with Relay(original, current, feeds, folder=path.parent) as relay:
        for layer in range(LAYERS):
            relay.cross_moments([(tap, tap) for tap in taps[4 * layer : 4 * layer + 4]])


def _taps(model: ir.Model) -> list[Any]:
    from graphopt.moments import Channels, Tap

    taps: dict[ir.Value, Tap] = {}
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        x, weight = node.inputs
        if x is not None and weight is not None and weight.const_value is not None:
            taps[x] = Tap(x.name or "", Channels(weight.const_value.shape.numpy()[0]))
    return list(taps.values())


def _calibrator(method: str) -> Callable[[Path, int], None]:
    """What ONNX Runtime offers."""

    def collect(path: Path, samples: int) -> None:
        import resource

        from onnxruntime.quantization import calibrate

        resource.setrlimit(resource.RLIMIT_AS, (CEILING, CEILING))
        arrays = np.load(_data(path, samples))["ids"]

        class Reader(calibrate.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._rows = iter(arrays)

            def get_next(self) -> dict[str, Any] | None:
                row = next(self._rows, None)
                return None if row is None else {"ids": row[None]}

        calibrator = calibrate.create_calibrator(
            path,
            op_types_to_calibrate=["MatMul"],
            augmented_model_path=str(path.with_name(f"{method}.onnx")),
            calibrate_method=getattr(calibrate.CalibrationMethod, method),
        )
        calibrator.collect_data(Reader())
        assert calibrator.compute_data().data

    return collect


OURS = {"graphopt: Gram matrices": _grams, "graphopt: cross-Grams of two models": _relay}
METHODS: dict[str, Callable[[Path, int], None]] = {
    **OURS,
    "ONNX Runtime: MinMax": _calibrator("MinMax"),
    "ONNX Runtime: Entropy": _calibrator("Entropy"),
}


if __name__ == "__main__":
    main()
