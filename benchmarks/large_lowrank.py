"""A 3 GB transformer whose weights were multiplied out of factors: found, pivoted, written; killed midway and resumed.

    python -m benchmarks.large_lowrank [--layers N] [--rank R]

``graphopt optimize --recipe lowrank --no-verify --work DIR`` as a process of its own: once whole; once with a fresh
folder, killed with SIGKILL when half of the first one's time is over, and run again with the same folder. Needs 8 GB of
disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks.common import GRAPHOPT, ROOT, Usage, measure, print_table, work_folder, write_result
from graphopt.passes.lowrank.hidden import FACTOR

PEAK_MB = 600  # what is asked for


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    from tests.models import large_transformer

    with work_folder() as folder:
        source, out = folder / "large.onnx", folder / "out.onnx"
        began = time.perf_counter()
        large_transformer(source, layers=options.layers, rank=options.rank)
        before = _bytes(folder)
        print(f"{before / 1e9:.2f} GB written in {time.perf_counter() - began:.0f} s", flush=True)
        _read(folder)  # what is read first is read from the disk: that is not what is measured

        whole = measure(_command(source, out, folder / "whole"))
        print(f"whole: {whole.wall:.0f} s", flush=True)
        forms = _forms(out)
        after = sum(file.stat().st_size for file in folder.glob("out.*"))
        first = _content(folder, out)
        shutil.rmtree(folder / "whole")
        _remove(folder)

        killed_at, said = _killed(_command(source, out, folder / "halves"), whole.wall / 2)
        if out.exists():
            raise SystemExit("the run that was killed had already written its result")
        resumed = measure(_command(source, out, folder / "halves"))
        if _content(folder, out) != first:
            raise SystemExit("the run that was resumed wrote other weights than the whole one")
    rows: list[list[object]] = [
        _row("whole", whole),
        ["killed", f"{killed_at:.1f}", None, None],
        _row("resumed", resumed),
    ]
    columns: list[Any] = ["run", *((heading, "right") for heading in ("wall s", "CPU s", "peak MB"))]
    title = f"{before / 1e9:.2f} GB, rank {options.rank}"
    print_table(columns, rows, title)
    peak = max(whole.peak_bytes, resumed.peak_bytes) / 1e6
    print(f"{before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after; the same bytes, whole and resumed")
    print(
        f"{forms['products']} products by pivots or coefficients, {forms['gathers']} Gathers where heads pin channels"
    )
    print(f"peak {peak:.0f} MB (asked: {PEAK_MB})")
    print(f"progress when it was killed: {said}")
    write_result(
        "large_lowrank",
        {
            "layers": options.layers,
            "rank": options.rank,
            "bytes_before": before,
            "bytes_after": after,
            "whole": whole,
            "killed_after": killed_at,
            "progress_when_killed": said,
            "resumed": resumed,
            "forms": forms,
        },
    )


def _command(source: Path, out: Path, work: Path) -> list[str]:
    words = ["optimize", str(source), "-o", str(out), "--recipe", "lowrank", "--no-verify", "--work", str(work)]
    return [*GRAPHOPT, *words]


def _killed(command: list[str], seconds: float) -> tuple[float, str]:
    """Run a command on a terminal of its own and kill it. Returns after how long, and what it showed last."""
    ours, theirs = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "100"})
    os.close(theirs)
    shown = b""
    while (left := began + seconds - time.perf_counter()) > 0 and process.poll() is None:
        if select.select([ours], [], [], min(left, 0.1))[0]:
            with contextlib.suppress(OSError):  # a terminal that nobody writes to any more
                shown = (shown + os.read(ours, 1 << 16))[-1 << 12 :]
    if process.poll() is not None:
        raise SystemExit(f"it ended before it was killed: exit code {process.returncode}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    return time.perf_counter() - began, lines[-1] if lines else ""


def _forms(path: Path) -> dict[str, int]:
    """How many products by pivots or coefficients there are, and how many Gathers put their results in order."""
    nodes = list(ir.load(path).graph)
    ours = [node for node in nodes if node.metadata_props.get(FACTOR) == "pivot"]
    return {
        "products": sum(node.op_type in ("MatMul", "Gemm") for node in ours),
        "gathers": sum(n.op_type == "Gather" and n.metadata_props.get("graphopt.rule") == "rows-gather" for n in nodes),
    }


def _content(folder: Path, out: Path) -> tuple[bytes, set[str]]:
    """The graph, and the name of its data file, which is the hash of what is in it."""
    return out.read_bytes(), {file.name for file in folder.glob("out.*.data")}


def _row(name: str, usage: Usage) -> list[object]:
    return [name, f"{usage.wall:.1f}", f"{usage.cpu:.1f}", f"{usage.peak_bytes / 1e6:.0f}"]


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _read(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _remove(folder: Path) -> None:
    for file in folder.glob("out.*"):
        file.unlink()


if __name__ == "__main__":
    main()
