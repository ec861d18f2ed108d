"""Models and engines in the form that a server loads: Triton Inference Server's model repository."""

from __future__ import annotations

from graphopt.packaging.triton import DEFAULT_MAX_BATCH, TritonModel, package_triton

__all__ = ["DEFAULT_MAX_BATCH", "TritonModel", "package_triton"]
