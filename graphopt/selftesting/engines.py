"""Builds small engines with each plugin and without, runs them, compares them with the definition, and times them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from graphopt.benchmarking import bench
from graphopt.engines.backends import BACKENDS
from graphopt.engines.build import build_engine
from graphopt.engines.plugins import find_plugins
from graphopt.engines.report import BuildResult
from graphopt.engines.running import EngineRunner
from graphopt.errors import GraphoptError
from graphopt.selftesting.kernels import samples_of
from graphopt.selftesting.report import EngineResult, Status

Say = Callable[[str], None]

# Without the plugin the library chooses how it sums; it may round more often than a kernel of ours.
_LIBRARY_SLACK = 8.0


def run_all(backend: str, version: str, *, small: bool, seconds: float, say: Say) -> Iterator[EngineResult]:
    """Each plugin's examples on one library.

    Args:
        backend: ``tensorrt``, or ``tensorrt-rtx``, which takes no plugins of this kind: it runs what they mean.
        version: The library's.
        small: Very small models.
        seconds: How long each pair of engines is timed.
        say: Told what comes next.
    """
    library = f"{BACKENDS[backend].title} {version}"
    for name, plugin in find_plugins().items():
        module: Any = samples_of(name)
        if module is None:
            continue
        for types in plugin.types:
            for form in ("row", "column"):
                say(f"{library}: {name} {form} {types[0]}")
                example = module.example(types[0], form, small=small)
                yield _run(backend, library, name, f"{form}, {types[0]}", example, seconds)


def _run(backend: str, library: str, plugin: str, case: str, example: Any, seconds: float) -> EngineResult:
    with_plugin = backend == "tensorrt"
    try:
        with tempfile.TemporaryDirectory(prefix="graphopt-selftest-") as scratch:
            folder = Path(scratch)
            model = folder / "model.onnx"
            onnx.save(example.model, model)
            plain = folder / "plain.engine"
            build_engine(model, plain, backend=backend, plugins="never")
            engines = [plain]
            layers: int | None = None
            if with_plugin:
                engines.append(folder / "plugin.engine")
                built = build_engine(model, engines[1], backend=backend, plugins="always")
                layers = _plugin_layers(built)
            worst = [_worst(engine, example) for engine in engines]
            timed = bench(list(reversed(engines)), seconds=seconds)
    except GraphoptError as error:
        return EngineResult(plugin, library, case, None, None, None, None, "failed", str(error))
    first = timed.models[0].gpu
    assert first is not None
    # Ratios are the first one's time over the others': the plugin's over the library's, which is turned round.
    speedup = timed.models[1].gpu.compute_speedup if with_plugin and timed.models[1].gpu is not None else None
    turned = None if speedup is None else type(speedup)(1 / speedup.value, 1 / speedup.high, 1 / speedup.low)
    status: Status = "wrong"
    if with_plugin and layers == 0:
        status, detail = "failed", "the engine was built without the plugin"
    elif worst[-1] > (1 if with_plugin else _LIBRARY_SLACK):
        detail = f"off by {worst[-1]:.3g} times what is allowed"
    elif with_plugin and worst[0] > _LIBRARY_SLACK:
        detail = f"without the plugin it is off by {worst[0]:.3g} times what is allowed"
    else:
        status, detail = "ok", ""
    return EngineResult(plugin, library, case, layers, worst[-1], first.compute_ms.p50, turned, status, detail)


def _worst(engine: Path, example: Any) -> float:
    """How far an engine's output is off, as a part of what is allowed. Three runs: the third is replayed."""
    sample = example.sample
    with EngineRunner(engine) as runner:
        for _ in range(3):
            outputs = runner.run({"x": sample.inputs[0]})
        only_y = type(sample)(sample.label, sample.inputs, sample.dtypes[:1], sample.wanted[:1], sample.off[:1])
        return float(only_y.worst([outputs["y"]]))


def _plugin_layers(built: BuildResult) -> int | None:
    """How many layers run on a plugin; None where the library does not tell."""
    layers = built.inspection.layers
    return sum(layer.plugin for layer in layers) if layers else None
