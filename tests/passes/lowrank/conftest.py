"""What the tests of low-rank passes share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target on which multiplications cost time and nothing else does: small models gain there too."""
    path = tmp_path_factory.mktemp("target") / "arithmetic.yaml"
    costs = "costs: {node: 0.0, gigaflops: 0.001, gigabytes: 1.0e+12}"
    path.write_text(f"name: arithmetic\nbackend: onnxruntime\nversion: '1'\nopset: 24\nir_version: 12\n{costs}\n")
    return str(path)


@pytest.fixture(autouse=True)
def _any_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models gain little, and are pivoted all the same."""
    monkeypatch.setattr("graphopt.passes.lowrank.pivot.LEAST_GAIN", 0.0)
