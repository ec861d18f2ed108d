"""`selftest`: all of it, in order."""

from __future__ import annotations

import gc
from collections.abc import Callable

from graphopt.engines.backends import BACKENDS
from graphopt.gpu.driver import find_driver
from graphopt.selftesting import engines, kernels, machine
from graphopt.selftesting.report import SelftestReport

_SECONDS = 0.5  # each pair of engines is timed


def selftest(*, device: int = 0, small: bool = False, progress: Callable[[str], None] | None = None) -> SelftestReport:
    """Find out whether this machine's GPU runs what graphopt makes, and gives the right numbers.

    The versions of the driver, of the kernels and of TensorRT are held against each other. Every kernel of every plugin
    is compiled, launched through the driver as TensorRT would launch it, and compared with the definition. Where
    TensorRT is installed, small engines with each plugin are built, run, compared and timed against the same without.

    Args:
        device: Which GPU.
        small: Few and little samples.
        progress: Told what is going on.

    Raises:
        NoGpu: There is no GPU, or no driver.
    """
    say = progress or (lambda what: None)
    driver = find_driver()
    with driver.open(device) as context:
        found = context.device
        report = SelftestReport(found.name, found.capability, round(found.memory_bytes / 1e9, 1), driver.cuda)
        report.findings.extend(machine.look_at(driver, found))
        report.kernels.extend(kernels.run_all(context, small=small, say=say))
    gc.collect()
    for backend, library in BACKENDS.items():
        state = next(finding for finding in report.findings if finding.what == library.title)
        if state.status in ("ok", "warning"):
            version = state.detail.partition(",")[0].partition(":")[0]
            report.engines.extend(engines.run_all(backend, version, small=small, seconds=_SECONDS, say=say))
    return report
