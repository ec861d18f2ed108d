"""Running models: which onnxruntime is there, sessions, and runners for any backend."""

from graphopt.runtime.loading import Runner, TensorSpec, load

__all__ = ["Runner", "TensorSpec", "load"]
