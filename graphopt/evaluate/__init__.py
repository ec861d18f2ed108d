"""Computes single operators on known values, with the bits that ONNX Runtime gives with its optimizations off.

Two ways: numpy for operators whose result is exactly defined (data movement, integers, comparisons, IEEE
arithmetic), and ONNX Runtime itself for every other deterministic one. What has neither stays uncomputed.
"""

from __future__ import annotations

from graphopt.evaluate.arithmetic import cast
from graphopt.evaluate.by_numpy import evaluate, is_value_independent, result_shapes
from graphopt.evaluate.by_runtime import Job, run_jobs
from graphopt.evaluate.making import shape_slice
from graphopt.evaluate.movement import reshape_dims, slice_bounds
from graphopt.evaluate.operation import Inexact, Operation

__all__ = [
    "Inexact",
    "Job",
    "Operation",
    "cast",
    "evaluate",
    "is_value_independent",
    "reshape_dims",
    "result_shapes",
    "run_jobs",
    "shape_slice",
    "slice_bounds",
]
