"""What a run of ``optimize`` did, for people and for machines."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.making import BundleFacts
from graphopt.rewrite.manager import PassRecord

LIBRARIES = ("graphopt", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "torch")


@dataclass
class ModelFacts:
    """Size of a model: nodes (bodies included, Constants not), weight elements, bytes on disk with external data."""

    path: str
    nodes: int
    parameters: int
    bytes: int


@dataclass
class Verification:
    """What was checked, and how close the result is.

    Attributes:
        verdict: ``passed``, ``within budget`` (lossy), or ``skipped``.
        max_abs: Largest absolute difference of an output, optimizations off and as deployed.
        max_rel: The same relative to the largest magnitude of that output.
        cosine_min: Smallest cosine of an output.
        cases: How many feeds were run.
        coverage: ``applications`` and how many were ``checked_alone``; ``outputs`` and the ``vacuous`` among them;
            ``opaque`` nodes and nodes ``unchecked`` behind them; ``reference``: what rounding was measured against;
            ``twin``: whether narrow floats were checked through float32; ``feeds``: calibration or synthesised;
            ``endless``: how many made-up inputs were left out, on which a loop had no end;
            ``ways``, of a bundle: where its decisions went by the feeds and where they were sent
            (`graphopt.bundles.sending.Ways`).
        metric: The user's own metric, before and after, where there is one.
    """

    verdict: str = "skipped"
    max_abs: float = 0.0
    max_rel: float = 0.0
    cosine_min: float = 1.0
    cases: int = 0
    coverage: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, max_abs: float, max_rel: float, cosine_min: float) -> None:
        """Count further distances."""
        self.max_abs = max(self.max_abs, max_abs)
        self.max_rel = max(self.max_rel, max_rel)
        self.cosine_min = min(self.cosine_min, cosine_min)


@dataclass
class Report:
    """The result of ``optimize``; ``bundle`` where it is one."""

    input: ModelFacts
    output: ModelFacts | None
    passes: list[PassRecord]
    verification: Verification
    environment: dict[str, str]
    recipe: list[str]
    target: str
    undone: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    bundle: BundleFacts | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for ``json.dumps``."""
        return dataclasses.asdict(self)


def facts(model: ir.Model, path: Path) -> ModelFacts:
    """Facts of a model that lies at ``path``."""
    return ModelFacts(str(path), graphs.count_nodes(model), graphs.parameters(model)[0], bytes_on_disk(model, path))


def bytes_on_disk(model: ir.Model, path: Path) -> int:
    """The size of a model's file and of the external data files that it refers to."""
    files = {path}
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                files.add(Path(value.const_value.path))
    return sum(file.stat().st_size for file in files if file.exists())


def environment() -> dict[str, str]:
    """Versions of what took part. No host name, no path."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["byteorder"] = sys.byteorder
    return found
