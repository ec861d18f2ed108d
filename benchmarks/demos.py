"""Whether ``make demo``, ``make demo-export`` and ``make test`` work from a fresh clone, and how long they take.

    python -m benchmarks.demos [TARGET ...]     TARGET: run these only, and write no result

The checkout's last commit is cloned for each. The environment holds a PATH and an empty HOME and nothing else, so that
no setting of this machine's user helps and no download is cached; packages come from the index that the machine's pip
is set up for. Exit code 1 where a target fails or takes longer than it may.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_table, work_folder, write_result

# Seconds that each may take, installing included; None: no limit was set.
LIMITS: dict[str, int | None] = {"demo": 120, "demo-export": None, "test": 600}
PATH = "/usr/local/bin:/usr/bin:/bin"
LINES_OF_FAILURE = 15
LINES_OF_SUCCESS = 3


def run_target(target: str, folder: Path) -> dict[str, Any]:
    """Clone, run ``make TARGET``, remove the clone: seconds (without the clone), exit code, and what it wrote last."""
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
    seconds = time.perf_counter() - start
    lines = [line.rstrip().replace(str(clone), ".") for line in done.stdout.splitlines() if line.strip()]
    result = {
        "seconds": round(seconds, 1),
        "limit": LIMITS.get(target),
        "exit_code": done.returncode,
        "last_lines": lines[-(LINES_OF_FAILURE if done.returncode else LINES_OF_SUCCESS) :],
        "venv_bytes": _size(clone / ".venv"),
        "python": _python(clone),
    }
    shutil.rmtree(clone)  # gigabytes, with torch
    return result


def passed(result: dict[str, Any]) -> bool:
    """Whether the target worked, and in time."""
    return result["exit_code"] == 0 and (result["limit"] is None or result["seconds"] <= result["limit"])


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _python(clone: Path) -> str:
    command = [str(clone / ".venv" / "bin" / "python"), "-c", "import platform; print(platform.python_version())"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # it failed before there was one
    return done.stdout.strip()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Run, print, record. Exit code 1 where a target failed or took too long."""
    targets = sys.argv[1:] or list(LIMITS)
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain"):
        print(f"note: what is not committed is not in the clone, which has {commit}", file=sys.stderr)
    results = {}
    with work_folder() as folder:
        for target in targets:
            results[target] = result = run_target(target, folder)
            print(f"\nmake {target}:", *result["last_lines"], sep="\n  ", flush=True)
    rows = [
        [
            f"make {target}",
            f"{result['seconds']:.0f}",
            "" if result["limit"] is None else str(result["limit"]),
            f"{result['venv_bytes'] / 1e6:,.0f}",
            "works" if result["exit_code"] == 0 else f"exit code {result['exit_code']}",
        ]
        for target, result in results.items()
    ]
    numbers = [(name, "right") for name in ("seconds", "at most", ".venv, MB")]
    print()
    print_table(["target", *numbers, ""], rows, "From a fresh clone, nothing cached")
    if targets == list(LIMITS):
        write_result("demos", {"commit": commit, "targets": results})
    return int(not all(map(passed, results.values())))


if __name__ == "__main__":
    raise SystemExit(main())
