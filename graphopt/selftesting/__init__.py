"""What a machine with a GPU finds out about itself: do versions fit, are the numbers of kernels and engines right."""

from graphopt.selftesting.report import EngineResult, Finding, KernelResult, SelftestReport
from graphopt.selftesting.run import selftest

__all__ = ["EngineResult", "Finding", "KernelResult", "SelftestReport", "selftest"]
