"""What torch's exporter would lose beside decisions: the number of steps of an LSTM, digits, what `bool(t)` asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from torch import nn  # noqa: E402

from graphopt.errors import BadInput  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.exporting.recurrent import shapes_of_recurrent_layers  # noqa: E402


class Speech(nn.Module):
    """Two layers over a dynamic number of steps, and a decision on what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
        self.second = nn.GRU(12, 3, batch_first=True)
        self.short = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Any) -> tuple[Any, Any, Any]:
        steps, (hidden, _) = self.first(x)
        steps, _ = self.second(steps)
        steps, (_, cell) = self.short(steps)
        if hidden.sum() > 0:
            steps = steps * 2
        return steps, hidden, cell


def agree(module: Any, path: Path, inputs: dict[str, Any], tolerance: float) -> None:
    with torch.no_grad():
        returned = module(**inputs)
    found = ort.InferenceSession(path).run(None, {key: value.numpy() for key, value in inputs.items()})
    for one, other in zip(found, returned if isinstance(returned, tuple) else (returned,), strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=tolerance, atol=tolerance, strict=True)


def test_steps_of_recurrent_layers_stay_dynamic_beside_a_decision(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, axes = Speech().eval(), {"x": {0: "batch", 1: "steps"}}
    export(lambda: (module, {"x": torch.randn(2, 5, 4)}, axes), tmp_path / "m.onnx")
    sums = set()
    for batch, steps in [(1, 1), (2, 5), (3, 11), (1, 30), (4, 2), (1, 1), (1, 2), (2, 1), (1, 3), (2, 2)]:
        x = torch.randn(batch, steps, 4) * 9
        agree(module, tmp_path / "m.onnx", {"x": x}, 1e-5)
        sums.add(bool(module(x)[1].sum() > 0))
    assert sums == {True, False}


def test_torch_computes_recurrent_layers_as_before_afterwards() -> None:
    operators = torch.ops.aten.lstm.input, torch.ops.aten.gru.input
    before = [dict(operator.py_kernels) for operator in operators]
    table = [torch._decomp.decomposition_table[operator] for operator in operators]
    with pytest.raises(KeyboardInterrupt), shapes_of_recurrent_layers():
        assert operators[0].py_kernels != before[0]
        raise KeyboardInterrupt
    assert [dict(operator.py_kernels) for operator in operators] == before
    assert [torch._decomp.decomposition_table[operator] for operator in operators] == table


class Solver(nn.Module):
    def forward(self, right: Any, least: Any) -> Any:
        x, residual, turn = right * 0.0, right, 0
        while residual.abs().sum() > least and turn < 60:
            x = x + 0.3 * residual
            residual = right - 1.1 * x
            turn += 1
        return x


def test_numbers_beside_float64_keep_their_digits(tmp_path: Path) -> None:
    torch.manual_seed(4)
    example = {"right": torch.randn(6).double(), "least": torch.tensor(1e-6).double()}
    export(lambda: (Solver().eval(), example, None), tmp_path / "m.onnx")
    for least in (1e3, 1e-2, 1e-9):
        inputs = {"right": torch.randn(6).double(), "least": torch.tensor(least).double()}
        agree(Solver(), tmp_path / "m.onnx", inputs, 1e-13)


class Patient(nn.Module):
    """Ends once two layers in a row agree: `bool(t)` is asked only where there is a layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Any) -> tuple[Any, Any]:
        last = None
        for number, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if last is not None and bool((x[0, 0] > last).all()):
                x = x * 2
            if x.max() > 0.8:
                return x, torch.tensor(number)
            last = x[0, 0]
        return x, torch.tensor(9)


def test_the_truth_that_bool_asks_is_answered_once(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Patient().eval()
    export(lambda: (module, {"x": torch.randn(2, 4)}, {"x": {0: "batch"}}), tmp_path / "m.onnx")
    ends = set()
    for scale in (0.1, 1, 3, 10, 30):
        for _ in range(4):
            x = torch.randn(2, 4) * scale
            agree(module, tmp_path / "m.onnx", {"x": x}, 1e-5)
            ends.add(int(module(x)[1]))
    assert len(ends) > 2


class Endless(nn.Module):
    def forward(self, x: Any) -> Any:
        while x.sum() != 12345.678:
            x = x * 0.5
        return x


def test_a_loop_that_does_not_end_on_the_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not end"):
        export(lambda: (Endless(), {"x": torch.ones(3)}, None), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
