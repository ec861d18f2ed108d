"""`make gpu`: all that needs a GPU, in one go; says so where there is none.

The tests marked ``gpu``; the self-test (every kernel through the driver, engines of every library that is installed,
TensorRT-RTX's among them); the kernels under compute-sanitizer, where that is on the PATH; PivotLinear against cuBLAS,
cuBLASLt and torch (`benchmarks.gpu_pivot`). What comes out goes to results/gpu.json and results/gpu_pivot.json with the
machine and the date, losses and failures too.

Exit code: 0; 1 where something is wrong; 2 where there is no GPU, since nothing was run and nothing was shown.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks import gpu_pivot
from benchmarks.common import write_result
from graphopt.errors import GraphoptError
from graphopt.gpu.driver import find_driver
from graphopt.gpu.errors import NoGpu
from graphopt.selftesting import SelftestReport, selftest

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SANITIZER_SECONDS = 3600
_FOUND = re.compile("Invalid|Uninitialized|Barrier error|Misaligned|hazard|leaked", re.IGNORECASE)
_ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY:.*?(\d+) (?:errors?|hazards?)")


def main() -> int:
    """Run all of it."""
    try:
        driver = find_driver()
    except NoGpu as error:
        print(f"{error}: nothing was run")
        return 2
    gpu = driver.devices[0]
    print(f"GPU: {gpu.name}, driver for CUDA {'.'.join(map(str, driver.cuda))}", flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-v"], check=False).returncode
    print("self-test ...", flush=True)
    report = selftest()
    show(report)
    sanitized = sanitize()
    for tool, said in sanitized.items():
        print(f"compute-sanitizer {tool}: {said}")
    failed = tests != 0 or not report.ok or any(said not in ("clean", NOT_THERE) for said in sanitized.values())
    try:
        rows = gpu_pivot.run()
        failed |= any(one.wrong for row in rows for one in row.contenders)
    except GraphoptError as error:
        print(f"timing stopped: {error}")
        failed = True
    if gpu_pivot.is_rehearsal():
        print("nothing was written: a stand-in for the driver is in use")
    else:
        write_result("gpu", {"gpu": gpu.name, "tests": tests, "sanitizer": sanitized, **summary(report)})
    return 1 if failed else 0


def show(report: SelftestReport) -> None:
    """The self-test's tables, as the command prints them."""
    from graphopt.cli.selftest import show as show_report

    show_report(report, verbose=True)


def summary(report: SelftestReport) -> dict[str, Any]:
    """What is kept of the self-test, and in words whether RTX's engines run here."""
    rtx = [one for one in report.engines if one.library.startswith("TensorRT-RTX")]
    if not rtx:
        runs = "not found out: TensorRT-RTX is not installed, or does not start"
    elif all(one.status == "ok" for one in rtx):
        runs = f"yes: {len(rtx)} engines gave the right numbers"
    else:
        first = next(one for one in rtx if one.status != "ok")
        runs = f"no: {first.case}: {first.detail}"
    return {"selftest": report.to_json(), "rtx_engines_run_here": runs}


NOT_THERE = "not run: compute-sanitizer is not on the PATH"


def sanitize() -> dict[str, str]:
    """Every kernel under each of compute-sanitizer's tools: ``clean``, or what it said."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"all": NOT_THERE}
    found = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_kernels"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SANITIZER_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            found[tool] = f"longer than {_SANITIZER_SECONDS} s"
            continue
        found[tool] = read_sanitizer(done.stdout + done.stderr, done.returncode)
    return found


def read_sanitizer(said: str, code: int) -> str:
    """``clean`` where the tool says that it found nothing and the program ended well; else what was found."""
    summaries = [int(count) for count in _ERRORS.findall(said)]
    if summaries and not any(summaries) and code == 0:
        return "clean"
    first = next((line.strip("= ") for line in said.splitlines() if _FOUND.search(line)), "")
    if any(summaries):
        return f"{sum(summaries)} errors: {first or 'see its output'}"
    return f"exit code {code}, and no summary" if not summaries else f"exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
