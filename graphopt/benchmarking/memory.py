"""The memory one model needs: loaded and run in a process of its own, whose high-water mark is read.

Run as ``python -m graphopt.benchmarking.memory`` by `peak_bytes`; a request comes in pickled on standard input, from
the process that started it, and the answer goes out as one JSON line.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError

_RUNS = 3


def peak_bytes(path: Path, feeds: dict[str, Any], threads: int | None) -> int:
    """The most memory that a process holds which loads the model and runs it a few times (resident set).

    Args:
        path: The model.
        feeds: What to run it on.
        threads: As for `graphopt.load`.

    Raises:
        GraphoptError: The process failed, with its last line.
    """
    request = pickle.dumps((str(path), feeds, threads))
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.benchmarking.memory"], input=request, capture_output=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        what = lines[-1] if lines else f"exit code {done.returncode}"
        raise GraphoptError(f"measuring its memory failed: {what}", where=str(path))
    return int(json.loads(done.stdout.decode().splitlines()[-1])["peak_bytes"])


def high_water_mark() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process; this does not
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    from graphopt.runtime.loading import load

    path, feeds, threads = pickle.load(sys.stdin.buffer)
    runner = load(path, threads=threads)
    for _ in range(_RUNS):
        runner.run(feeds)
    print(json.dumps({"peak_bytes": high_water_mark()}))


if __name__ == "__main__":
    _main()
