"""Run every benchmark in turn, each in a process of its own: ``python -m benchmarks.run_all [NAME ...]``.

``language_model`` trains its model the first time (minutes on two cores) and keeps it in ``build/low-rank``.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.common import ROOT

PROGRAMS: dict[str, tuple[str, ...]] = {
    "help_time": (),
    "corpus": ("--peers",),
    "mutations": (),
    "speedup": (),
    "verification_cost": (),
    "scaling": (),
    "large": ("--peers",),
    "minilm_export": (),
    "rtx_build": (),
    "pivot_error": (),
    "calibration_memory": (),
    "language_model": (),
    "minilm_density": (),
    "pivot_layers": (),
    "large_lowrank": (),
    "ptx": (),
    "plugin_versions": (),
    "kernel_mutations": (),
    "rtx_models": (),
    "rtx_dynamic": (),
    "dynamic": (),
    "host_overhead": (),
    "per_sample": (),
    "paths": (),
    "silero": (),
    "split_corpus": (),
    "demos": (),
}


def main() -> int:
    """Run the programs named, or all; exit code 1 where one of them failed."""
    failed = []
    for name in sys.argv[1:] or PROGRAMS:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", *PROGRAMS.get(name, ())]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        if code != 0:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
