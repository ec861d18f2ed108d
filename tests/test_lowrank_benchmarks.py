"""The benchmarks of low-rank networks measure what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import large_lowrank, pivot_layers
from graphopt.numerics.low_rank import find_rank
from graphopt.numerics.pivot import pivot_rows
from tests.models import large_transformer


def test_networks_of_pivot_layers(tmp_path: Path) -> None:
    """All compute the same, hold what their form holds, and are timed in pairs."""
    made = pivot_layers.Made.of(256)
    factors = pivot_layers.network(tmp_path / "factors.onnx", made)
    files = {
        pivot_layers.FACTORS: factors,
        pivot_layers.FOLDED: pivot_layers.folded(tmp_path / "folded.onnx", factors),
        pivot_layers.GATHER: pivot_layers.with_gather(tmp_path / "gather.onnx", made),
        pivot_layers.DENSE: pivot_layers.network(tmp_path / "dense.onnx", made, dense=True),
    }
    held = {name: pivot_layers._elements(path) for name, path in files.items()}
    assert list(held.values()) == [2 * 256 * 256, 3 * 128 * 256, 3 * 128 * 256, 2 * 256 * 256]
    operators = {name: [node.op_type for node in ir.load(path).graph] for name, path in files.items()}
    assert "Gather" not in operators[pivot_layers.FOLDED]
    assert operators[pivot_layers.GATHER].count("Gather") == 2
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    assert max(pivot_layers._apart(files, x).values()) < 1e-5
    timings = pivot_layers.time_all(files, x, 5)
    assert {len(one.wall) for one in timings.values()} == {len(one.cpu) for one in timings.values()} == {5}
    with pytest.raises(SystemExit, match="computes something else"):
        other = pivot_layers.Made((made.layers[1], made.layers[0]), made.head)
        files["other"] = pivot_layers.network(tmp_path / "other.onnx", other)
        pivot_layers._apart(files, x)


@pytest.mark.parametrize("exporter", pivot_layers.OFFICIAL)
def test_official_layer_of_pivot_layers(exporter: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = pivot_layers.Made.of(128)
    forms = [pivot_rows(layer.left, layer.right) for layer in made.layers]
    files = {
        pivot_layers.FACTORS: pivot_layers.network(tmp_path / "factors.onnx", made),
        "official": pivot_layers.official(tmp_path, made, forms, exporter),  # type: ignore[arg-type]
    }
    x = np.random.default_rng(0).standard_normal((3, 128), np.float32)
    assert pivot_layers._apart(files, x)["official"] < 1e-5
    assert pivot_layers._elements(files["official"]) == 3 * 64 * 128


def test_weights_of_a_large_transformer_of_low_rank(tmp_path: Path) -> None:
    path = large_transformer(tmp_path / "model.onnx", layers=1, width=128, heads=2, rank=16)
    weights = ir.load(path).graph.initializers
    ranks = {}
    for name, value in weights.items():
        if name.endswith(".weight") and value.shape is not None and len(value.shape) == 2:
            assert value.const_value is not None
            found = find_rank(value.const_value.numpy(), 100)
            ranks[name] = None if found is None else found.rank
    assert len(ranks) == 6
    assert set(ranks.values()) == {16}


def test_what_is_killed_tells_how_far_it_was() -> None:
    command = ["sh", "-c", "printf '\\033[2mstep 1\\033[0m\\r\\nstep 2'; exec sleep 60"]
    seconds, said = large_lowrank._killed(command, 0.3)
    assert 0.3 <= seconds < 30
    assert said == "step 2"
    with pytest.raises(SystemExit, match="ended before"):
        large_lowrank._killed(["sh", "-c", "echo done"], 5)
