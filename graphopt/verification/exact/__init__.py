"""The float64 reference: an interpreter of ONNX graphs in numpy, every float in double precision."""

from __future__ import annotations

from graphopt.verification.exact.interpreter import evaluate, evaluate_between
from graphopt.verification.exact.operators import NotExact

__all__ = ["NotExact", "evaluate", "evaluate_between"]
