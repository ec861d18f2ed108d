"""The test networks themselves: they load, run, and their outputs say something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.models import OPAQUE, RUNNABLE, deep_chain, draw_feeds, large_transformer, many_small_nodes


def run(model: ir.Model | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def assert_outputs_say_something(outputs: list[np.ndarray]) -> None:
    for output in outputs:
        assert np.isfinite(output).all()
        assert np.abs(output).max(initial=0) < 100
        assert output.size == 0 or output.std() > 1e-3


@pytest.mark.parametrize("name", RUNNABLE)
def test_small_network_runs(name: str) -> None:
    model = RUNNABLE[name]()
    for size in (3, 5):
        outputs = run(model, draw_feeds(model, size=size))
        assert_outputs_say_something(outputs)


@pytest.mark.parametrize("name", RUNNABLE)
def test_small_network_is_the_same_every_time(name: str) -> None:
    first, second = (ir.to_proto(RUNNABLE[name]()).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_input_matters(name: str) -> None:
    """A network that ignores an input could hide a wrong rewrite."""
    model = RUNNABLE[name]()
    for changed in draw_feeds(model):
        outcomes = []
        for seed in range(8):
            feeds = draw_feeds(model)
            feeds[changed] = draw_feeds(model, seed=seed)[changed]
            outcomes.append([output.tobytes() for output in run(model, feeds)])
        assert any(outcome != outcomes[0] for outcome in outcomes), changed


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_network_is_what_ort_cannot_run(name: str) -> None:
    model = OPAQUE[name]()
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|Fatal error|INVALID_GRAPH"):
        run(model, draw_feeds(model))


@pytest.mark.parametrize("n", [200, 2000])
def test_many_small_nodes(n: int) -> None:
    model = many_small_nodes(n)
    assert n <= model.graph.num_nodes() <= n + 40
    feeds = draw_feeds(model)
    (output,) = run(model, feeds)
    assert_outputs_say_something([output])
    assert output.std(axis=0).min() > 1e-3  # every column depends on the input
    nudged = {name: feed * np.float32(1 + 1e-6) for name, feed in feeds.items()}
    assert np.abs(run(model, nudged)[0] - output).max() < 1e-4  # and rounding stays rounding


def test_deep_chain() -> None:
    model = deep_chain(3000)
    feeds = draw_feeds(model)
    (output,) = run(model, feeds)
    np.testing.assert_array_equal(output, feeds["x"])


def test_large_transformer_twin(tmp_path: Path) -> None:
    path = large_transformer(tmp_path / "twin.onnx", layers=2, width=64, heads=4)
    model = ir.load(path)
    weights = [value.const_value for value in model.graph.initializers.values() if value.shape]
    assert model.graph.num_nodes() == 240
    assert len({weight.tobytes() for weight in weights if weight is not None}) == len(weights)
    (output,) = run(path, {"ids": np.random.default_rng(0).integers(0, 2048, (2, 7))})
    assert_outputs_say_something([output])
