"""What every test of a real file does: optimize it, and compare the result without using graphopt's own comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from graphopt import optimize
from graphopt.report import Report

Feeds = Mapping[str, np.ndarray]


def run(path: Path, feeds: Feeds, *, optimized: bool) -> list[Any]:
    """All outputs of a file on ONNX Runtime's CPU."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def interface(path: Path) -> list[list[tuple[str, bytes]]]:
    """Names, in order, and types with dims of the inputs (weights left out) and of the outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    return [[(v.name, v.type.SerializeToString(deterministic=True)) for v in vs] for vs in (inputs, graph.output)]


def ops(path: Path) -> list[str]:
    """The op types in a file's main graph."""
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def optimize_and_compare(
    source: Path, cases: Sequence[Feeds], *, rtol: float = 1e-5, deployed_rtol: float | None = None
) -> Report:
    """Optimize ``source`` with recipe ``safe`` into ``NAME.opt.onnx``; it must stay what it was.

    Every output is compared on every case with the original run without the runtime's optimizations: floats
    within ``rtol`` of the output's largest magnitude (``deployed_rtol`` with the optimizations on), the rest exactly.
    """
    report = optimize(source)
    assert report.verification.verdict == "passed"
    assert report.verification.cases > 0
    assert not report.undone, report.undone
    out = source.with_name(f"{source.stem}.opt.onnx")
    onnx.checker.check_model(str(out))
    assert interface(out) == interface(source)
    for feeds in cases:
        expected = run(source, feeds, optimized=False)
        for optimized, tolerance in ((False, rtol), (True, deployed_rtol or rtol)):
            for found, wanted in zip(run(out, feeds, optimized=optimized), expected, strict=True):
                assert_close(found, wanted, tolerance)
    return report


def assert_close(found: Any, wanted: Any, rtol: float) -> None:
    """Floats within ``rtol`` of the largest magnitude, anything else exactly equal; and it must say something."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if wanted.dtype.kind != "f":
        np.testing.assert_array_equal(found, wanted)
        return
    assert np.isfinite(wanted).all()
    scale = np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(
        found.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=rtol * max(scale, 1e-30)
    )
