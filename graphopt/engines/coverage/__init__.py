"""Which nodes a target's library refuses, told before anything is built: ``predict``.

The facts are data: one YAML file a library, measured on ONNX's node corpus where the library runs here
(``benchmarks/rtx_models.py`` compares predictions with what the library did) and read from its documentation where it
does not; each refusal says which.
"""

from graphopt.engines.coverage.facts import Facts, facts
from graphopt.engines.coverage.predict import Coverage, Refusal, predict

__all__ = ["Coverage", "Facts", "Refusal", "facts", "predict"]
