"""Files from both of torch's exporters: torch.export (dynamo) and TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.real_inputs.common import ops, optimize_and_compare

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


class ConvNet(torch.nn.Module):
    """Conv + BatchNorm, a residual connection, adaptive pooling, a view that computes its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.out = torch.nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(self.norm(self.first(x)))
        y = torch.nn.functional.adaptive_avg_pool2d(y + self.second(y), 4)
        return self.out(y.view(y.size(0), -1))


class Attention(torch.nn.Module):
    """A transformer layer written out, with LayerNorm, GELU and a mask made from the length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 16)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -1e4)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm(x))


class Recurrent(torch.nn.Module):
    """A bidirectional LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.gru = torch.nn.GRU(16, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.lstm(x)[0])[0]


NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "convnet": (ConvNet, (2, 3, 16, 16), ("batch",)),
    "attention": (Attention, (2, 5, 16), ("batch", "length")),
    "recurrent": (Recurrent, (2, 5, 6), ("batch",)),
}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported(name: str, exporter: str, tmp_path: Path) -> None:
    make, shape, axes = NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.dtype.is_floating_point:
                buffer.uniform_(0.5, 1.5)  # statistics that a BatchNorm would have after training
    path = tmp_path / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                module,
                (torch.randn(shape),),
                path,
                dynamo=True,
                verbose=False,
                dynamic_shapes=({axis: torch.export.Dim(name, min=2) for axis, name in enumerate(axes)},),
            )
        else:
            torch.onnx.export(
                module,
                (torch.randn(shape),),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": dict(enumerate(axes)), "y": dict(enumerate(axes))},
            )
    rng = np.random.default_rng(0)
    name_of_input = _input_name(path)
    cases = []
    for sizes in ((2, 5), (3, 7)):
        dims = [sizes[axis] if axis < len(axes) else size for axis, size in enumerate(shape)]
        cases.append({name_of_input: rng.standard_normal(dims).astype(np.float32)})
    report = optimize_and_compare(path, cases)
    assert report.output is not None
    assert report.output.nodes <= report.input.nodes
    if name == "convnet":
        assert "BatchNormalization" not in ops(path.with_name("convnet.opt.onnx"))


def _input_name(path: Path) -> str:
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


def test_optimum_style_bert(tmp_path: Path) -> None:
    """What optimum writes: a transformers model through TorchScript, all axes dynamic, the usual input names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]

    class Plain(torch.nn.Module):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
        ) -> object:
            return model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(batch * length)
        mask = np.ones((batch, length), np.int64)
        mask[0, length // 2 :] = 0
        return {
            "input_ids": rng.integers(0, 100, (batch, length)),
            "attention_mask": mask,
            "token_type_ids": rng.integers(0, 2, (batch, length)),
        }

    path = tmp_path / "bert.onnx"
    plain = Plain()
    plain.model = model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain.eval(),
            tuple(torch.from_numpy(array) for array in feeds(2, 8).values()),
            path,
            dynamo=False,
            opset_version=14,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "batch_size", 1: "sequence_length"} for name in [*names, "last_hidden_state"]},
        )
    report = optimize_and_compare(path, [feeds(1, 4), feeds(3, 9)])
    assert report.output is not None
    assert report.output.nodes < report.input.nodes
