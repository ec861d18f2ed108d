"""How long ``graphopt --help`` takes and how long it is: median of 15 processes.

python -m benchmarks.help_time
"""

from __future__ import annotations

import subprocess

import numpy as np

from benchmarks.common import GRAPHOPT, ROOT, measure, print_table, write_result

RUNS = 15


def main() -> None:
    """Run, print, record."""
    said = subprocess.run([*GRAPHOPT, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = said.splitlines()
    walls = [measure([*GRAPHOPT, "--help"]).wall for _ in range(RUNS)]
    width = max(map(len, lines))
    print_table(
        [("wall s", "right"), ("lines", "right"), ("columns", "right")],
        [[f"{np.median(walls):.3f}", len(lines), width]],
        f"graphopt --help, median of {RUNS}",
    )
    write_result("help_time", {"wall": walls, "median": float(np.median(walls)), "lines": len(lines), "columns": width})


if __name__ == "__main__":
    main()
