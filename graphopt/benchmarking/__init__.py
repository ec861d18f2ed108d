"""Timing models against each other, in one process and interleaved, with the uncertainty of the ratio."""

from graphopt.benchmarking.measure import bench
from graphopt.benchmarking.results import BenchResult, GpuTiming, ModelTiming
from graphopt.benchmarking.shapes import parse_shapes
from graphopt.benchmarking.stats import Percentiles, Ratio, percentiles, ratio_interval

__all__ = [
    "BenchResult",
    "GpuTiming",
    "ModelTiming",
    "Percentiles",
    "Ratio",
    "bench",
    "parse_shapes",
    "percentiles",
    "ratio_interval",
]
