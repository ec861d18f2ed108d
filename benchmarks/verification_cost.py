"""What verification costs: recipe ``safe`` verified against unverified, on MiniLM and on 20,000 small nodes.

    python -m benchmarks.verification_cost [--rounds N]

Whole processes, interleaved; the ratio is taken within rounds, its interval is a bootstrap over them.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import GRAPHOPT, Usage, measure, minilm, print_table, work_folder, write_result
from graphopt.benchmarking import ratio_interval


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    from tests.models import many_small_nodes

    rows, result = [], {}
    with work_folder() as folder:
        networks = {"20,000 small nodes": folder / "small.onnx"}
        ir.save(many_small_nodes(20_000), networks["20,000 small nodes"])
        if (encoder := minilm(folder)) is not None:
            networks["MiniLM"] = encoder
        for name, source in networks.items():
            command = [*GRAPHOPT, "optimize", str(source), "-o", str(folder / "out.onnx"), "--recipe", "safe"]
            verified: list[Usage] = []
            unverified: list[Usage] = []
            for _ in range(options.rounds):
                unverified.append(measure([*command, "--no-verify"]))
                verified.append(measure(command))
            ratio = ratio_interval([usage.wall for usage in verified], [usage.wall for usage in unverified])
            told = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            rows.append([name, *(f"{_wall(runs):.2f}" for runs in (unverified, verified)), told])
            result[name] = {"unverified": unverified, "verified": verified, "ratio": ratio}
    columns: list[Any] = ["", ("unverified s", "right"), ("verified s", "right"), ("ratio", "right")]
    print_table(columns, rows, f"Recipe safe, median of {options.rounds} interleaved rounds")
    write_result("verification_cost", {"rounds": options.rounds, "networks": result})


def _wall(runs: list[Usage]) -> float:
    return float(np.median([usage.wall for usage in runs]))


if __name__ == "__main__":
    main()
