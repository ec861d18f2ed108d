"""Factors that a module multiplies in forward: still factors in the exported file, and a chain once reassociated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from graphopt import graphs  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.files import load_model  # noqa: E402
from graphopt.passes.lowrank.reassociate import Reassociate  # noqa: E402
from tests.passes.common import run_ort, run_pass  # noqa: E402

nn = torch.nn
# Large enough that torch's own folding would have multiplied none, small, and both.
SIZES = {"small": (24, 16, 4), "large": (400, 16, 12)}
WEIGHTS = {
    "product": lambda u, s, v: u @ v,
    "diag": lambda u, s, v: u @ torch.diag(s) @ v,
    "scaled": lambda u, s, v: (u * s) @ v,
    "rows": lambda u, s, v: u @ (s[:, None] * v),
    "einsum": lambda u, s, v: torch.einsum("mk,k,kn->mn", u, s, v),
}


class Factored(nn.Module):
    """W is computed from factors in forward, in each of the ways, one output a way."""

    def __init__(self, m: int, n: int, r: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in WEIGHTS:
            for part, shape in (("u", (m, r)), ("s", (r,)), ("v", (r, n))):
                values = torch.randn(shape, generator=generator) * 0.3 + (1 if part == "s" else 0)
                self.register_parameter(f"{name}_{part}", nn.Parameter(values))

    def forward(self, x: Any) -> Any:
        parts = self.get_parameter
        return {
            name: nn.functional.linear(x, weight(parts(f"{name}_u"), parts(f"{name}_s"), parts(f"{name}_v")))
            for name, weight in WEIGHTS.items()
        }


@pytest.mark.parametrize("size", SIZES)
def test_factors_survive_export(tmp_path: Path, size: str) -> None:
    m, n, r = SIZES[size]
    x = torch.randn((2, 5, n), generator=torch.Generator().manual_seed(1))
    result = export(lambda: (Factored(m, n, r).eval(), {"x": x}, {"x": {0: "batch"}}), tmp_path / "m.onnx")
    assert any("kept, since folding would erase this structure" in note for note in result.notes)
    model = load_model(tmp_path / "m.onnx")
    stored = set(model.graph.initializers)
    assert {f"{name}_{part}" for name in WEIGHTS for part in "uv"} <= stored
    assert {f"{name}_s" for name in WEIGHTS if name != "product"} <= stored

    after, _ = run_pass(model, Reassociate)
    assert [node.op_type for node in after.graph] == ["MatMul"] * 2 * len(WEIGHTS)
    assert graphs.parameters(after)[0] == len(WEIGHTS) * r * (m + n)
    for one, other in zip(run_ort(model, {"x": x.numpy()}), run_ort(after, {"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=2e-6 * float(np.abs(one).max()))
