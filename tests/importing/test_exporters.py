"""Graphs as torch's exporters write them: where the names of modules are found again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")

from graphopt.importing import import_factors  # noqa: E402
from tests.importing.common import Arrays, adapter, close, op_types, pivot_state, random, run, save_state  # noqa: E402

nn = torch.nn
SHAPES = {"layers.0.up": (24, 16), "layers.0.net.2": (16, 24), "layers.1.up": (24, 16), "layers.1.net.2": (16, 24)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24, bias=False)
        self.net = nn.Sequential(nn.ReLU(), nn.Identity(), nn.Linear(24, 16))

    def forward(self, x: Any) -> Any:
        return x + self.net(self.up(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def dense(weights: Arrays) -> Any:
    net = Net().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            array = weights.get(name.removesuffix(".weight"))
            parameter.copy_(torch.tensor(random(*parameter.shape, seed=3) if array is None else array))
    return net


def write(net: Any, exporter: str, rank: int, path: Path) -> Path:
    x = torch.tensor(random(*[2, 5][: rank - 1], 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "graphopt":
            from graphopt.exporting import export

            export(lambda: (net, {"x": x}, {"x": {0: "batch"}}), path)
        elif exporter == "dynamo":
            torch.onnx.export(net, (x,), path, input_names=["x"], dynamo=True, verbose=False, external_data=False)
        else:
            torch.onnx.export(net, (x,), path, input_names=["x"], dynamo=False, opset_version=17)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("exporter", ["graphopt", "dynamo", "torchscript"])
def test_pivots_and_adapters(tmp_path: Path, exporter: str, rank: int) -> None:
    made = {name: pivot_state(f"model.{name}", *shape, 4, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    weights = {name: matrix for name, (_, matrix) in made.items()}
    model = write(dense(weights), exporter, rank, tmp_path / "m.onnx")
    state = {key: array for tensors, _ in made.values() for key, array in tensors.items()}
    report = import_factors(model, save_state(tmp_path / "s.safetensors", state), tmp_path / "o.onnx")
    assert [row.name for row in report.modules] == sorted(f"model.{name}" for name in SHAPES)
    assert {row.by for row in report.modules} <= {"weight name", "node name"}
    assert op_types(tmp_path / "o.onnx").count("Concat") == 4
    assert report.verification.verdict == "passed"

    tensors = {
        f"{name}.lora_{letter}.weight": random(*size, seed=ord(letter))
        for name, (m, n) in SHAPES.items()
        for letter, size in (("A", (2, n)), ("B", (m, 2)))
    }
    import_factors(model, adapter(tmp_path / "lora", tensors), tmp_path / "l.onnx")
    merged = {
        name: weights[name] + 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in SHAPES
    }
    x = random(*[2, 5][: rank - 1], 16)
    expected = dense(merged)(torch.tensor(x)).detach().numpy()
    assert close(run(tmp_path / "l.onnx", x), np.asarray(expected))
