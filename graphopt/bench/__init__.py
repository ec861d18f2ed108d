"""Timing models against each other, in one process and interleaved, with the uncertainty of the ratio."""

from graphopt.bench.measure import BenchResult, ModelTiming, bench
from graphopt.bench.shapes import parse_shapes
from graphopt.bench.stats import Percentiles, Ratio, percentiles, ratio_interval

__all__ = [
    "BenchResult",
    "ModelTiming",
    "Percentiles",
    "Ratio",
    "bench",
    "parse_shapes",
    "percentiles",
    "ratio_interval",
]
