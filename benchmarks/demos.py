"""How long ``make demo``, ``make demo-export`` and ``make test`` take from a fresh clone in an empty environment.

    python -m benchmarks.demos [TARGET ...]

The checkout's last commit is cloned for each; the environment holds a PATH and an empty HOME and nothing else, so
that no cache or setting of this machine's user helps. Packages come from the index that pip is set up for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, print_table, work_folder, write_result

TARGETS = ("demo", "demo-export", "test")
PATH = "/usr/local/bin:/usr/bin:/bin"
SHOWN_LINES = 15


def run_target(target: str, folder: Path) -> tuple[float, int, list[str]]:
    """Clone, run ``make TARGET``: seconds (without the clone), exit code, and the last lines that it wrote."""
    clone, home = folder / target, folder / f"{target}-home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    start = time.perf_counter()
    done = subprocess.run(
        ["env", "-i", f"PATH={PATH}", f"HOME={home}", "make", target],
        cwd=clone,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return time.perf_counter() - start, done.returncode, done.stdout.splitlines()[-SHOWN_LINES:]


def main() -> int:
    """Run, print, record. Exit code 1 where a target failed."""
    targets = sys.argv[1:] or list(TARGETS)
    rows, result, failed = [], {}, False
    with work_folder() as folder:
        for target in targets:
            seconds, code, lines = run_target(target, folder)
            rows.append([f"make {target}", f"{seconds:.0f}", "works" if code == 0 else f"exit code {code}"])
            result[target] = {"seconds": round(seconds, 1), "exit_code": code}
            if code != 0:
                failed = True
                print(f"make {target}:", *lines, sep="\n  ")
    print_table(["target", ("seconds", "right"), ""], rows, "From a fresh clone, in an empty environment")
    if targets == list(TARGETS) and not failed:
        write_result("demos", {"targets": result})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
