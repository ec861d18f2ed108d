"""Is the result faster? MiniLM and silero against what recipe ``safe`` makes of them, on ONNX Runtime's CPU.

    python -m benchmarks.speedup [--seconds S]

One process, one thread, interleaved, as `graphopt bench` does: the ratio of wall times with its 95 % interval.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import graphopt
from benchmarks.common import minilm, print_table, silero, work_folder, write_result

# A sentence of ordinary length, and one frame of sound with its state.
SHAPES: dict[str, dict[str, list[int]]] = {
    "MiniLM": {name: [1, 32] for name in ("input_ids", "attention_mask", "token_type_ids")},
    "silero": {"input": [1, 576], "state": [2, 1, 128]},
}


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, each network")
    options = parser.parse_args()
    rows, result = [], {}
    with work_folder() as folder:
        networks: dict[str, Path] = {}
        if (encoder := minilm(folder)) is not None:
            networks["MiniLM"] = encoder
        if (detector := silero()) is not None:
            networks["silero"] = Path(shutil.copy(detector, folder / "silero.onnx"))
        for name, source in networks.items():
            out = folder / f"{name}.safe.onnx"
            report = graphopt.optimize(source, out)
            timed = graphopt.bench([source, out], shapes=SHAPES[name], seconds=options.seconds)
            before, after = timed.models
            assert report.output is not None
            rows.append(
                [
                    name,
                    f"{report.input.nodes} → {report.output.nodes}",
                    f"{before.wall_ms.p50:.3f}",
                    f"{after.wall_ms.p50:.3f}",
                    f"{after.speedup.value:.3f} [{after.speedup.low:.3f}, {after.speedup.high:.3f}]",
                    f"{after.max_abs_difference:.1e}",
                ]
            )
            result[name] = {
                "nodes_before": report.input.nodes,
                "nodes_after": report.output.nodes,
                "rounds": timed.rounds,
                "loads": timed.loads,
                "wall_ms": [model.wall_ms for model in timed.models],
                "speedup": after.speedup,
                "cpu_speedup": after.cpu_speedup,
                "max_abs_difference": after.max_abs_difference,
                "timed_on": timed.timed_on,
            }
    headings = ("nodes", "original ms", "safe ms", "times as fast", "largest difference")
    print_table(["", *((heading, "right") for heading in headings)], rows, "ONNX Runtime, CPU, one thread")
    write_result("speedup", {"seconds": options.seconds, "networks": result})


if __name__ == "__main__":
    main()
