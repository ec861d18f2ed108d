"""Small modules exported for real: what is written, what is reported, and what is not written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
import onnxruntime as ort  # noqa: E402

from graphopt.errors import BadInput, GateFailed, GraphoptError  # noqa: E402
from graphopt.exporting import export  # noqa: E402
from graphopt.exporting.compare import compare_output, draw_like  # noqa: E402

nn = torch.nn


def seeded(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def normal(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def mlp() -> Any:
    module = seeded(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    return module, {"input": normal(3, 8)}, {"input": {0: "batch"}}


def test_a_network_with_a_dynamic_batch(tmp_path: Path) -> None:
    out = tmp_path / "mlp.onnx"
    result = export(mlp, out)
    assert [(value.name, value.dtype, value.axes) for value in result.inputs] == [("input", "float32", ["batch", 8])]
    assert [(value.name, value.dtype, value.axes) for value in result.outputs] == [("output", "float32", ["batch", 4])]
    assert result.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert result.bytes == out.stat().st_size
    assert [case.sizes for case in result.comparison] == [{"batch": 3}, {"batch": 1}, {"batch": 4}]
    assert all(output.passed for case in result.comparison for output in case.outputs)
    assert list(tmp_path.iterdir()) == [out]
    module, _, _ = mlp()
    x = normal(5, 8)
    session = ort.InferenceSession(out)
    np.testing.assert_allclose(
        session.run(None, {"input": x.numpy()})[0], module(x).detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_the_same_bytes_each_time_and_no_trace_of_this_machine(tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    export(mlp, one)
    export(mlp, two)
    content = one.read_bytes()
    assert content == two.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"site-packages" not in content and b"stack_trace" not in content


class Interface(nn.Module):
    def forward(self, b: Any, unused: Any, a: Any) -> Any:
        return {"difference": a - b, "same": a, "a": b, "nested": (a * b, [a + b])}


@pytest.mark.slow
def test_names_order_unused_inputs_and_outputs_that_are_inputs(tmp_path: Path) -> None:
    inputs = {"a": normal(2, 3), "unused": normal(4), "b": normal(2, 3) + 1}
    result = export(lambda: (Interface().eval(), inputs, None), tmp_path / "m.onnx")
    assert [value.name for value in result.inputs] == ["b", "unused", "a"]
    assert [value.name for value in result.outputs] == ["difference", "same", "a_out", "nested_0", "nested_1_0"]
    assert result.notes == [
        "the output 'a' has the name of an input; it is called 'a_out'",
        "the input 'unused' has no consumer: nothing that the module returns depends on it",
    ]
    session = ort.InferenceSession(tmp_path / "m.onnx")
    found = session.run(["difference"], {name: value.numpy() for name, value in inputs.items()})[0]
    np.testing.assert_array_equal(found, (inputs["a"] - inputs["b"]).numpy())


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(6, 2))
        self.down = nn.Parameter(torch.zeros(2, 6))
        self.base = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return nn.functional.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


def test_arithmetic_on_weights_is_kept_and_reported(tmp_path: Path) -> None:
    result = export(lambda: (seeded(Factors()).eval(), {"x": normal(2, 6)}, None), tmp_path / "m.onnx")
    model = ir.load(tmp_path / "m.onnx")
    assert {"up", "down", "base.weight"} <= set(model.graph.initializers)
    assert result.notes == [
        "2 nodes compute on weights alone (Add, MatMul of base.weight, down, up): kept, since folding would"
        " erase this structure"
    ]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x: Any) -> Any:
        return x + self.table[: x.shape[1]]


def test_a_limit_that_the_module_has(tmp_path: Path) -> None:
    axes = {"x": {0: "batch", 1: "length"}}
    result = export(lambda: (seeded(Positions()), {"x": normal(2, 5, 4)}, axes), tmp_path / "m.onnx")
    assert [case.sizes for case in result.comparison] == [
        {"batch": 2, "length": 5},
        {"batch": 1, "length": 3},
        {"batch": 3, "length": 6},
        {"batch": 2, "length": 1},
    ]
    assert any(note.startswith("'length' is 1 to 6: the module does not run at other sizes") for note in result.notes)


class Reads(nn.Module):
    """Returns more than tensors, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x.sum(), None, (x * 2,)


def test_outputs_without_axes_or_tensors_and_a_buffer_that_changes(tmp_path: Path) -> None:
    result = export(lambda: (Reads().eval(), {"x": normal(2, 3)}, None), tmp_path / "m.onnx")
    assert [(value.name, value.axes) for value in result.outputs] == [("output_0", []), ("output_2_0", [2, 3])]
    assert result.notes == ["forward changes the buffer 'calls'; the ONNX never does"]


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, image: Any) -> Any:
        return self.layers(image)


@pytest.mark.slow
def test_a_limit_is_tried_where_torch_assumes_it_away(tmp_path: Path) -> None:
    axes = {"image": {0: "batch", 2: "height"}}
    result = export(lambda: (seeded(Pool()).eval(), {"image": normal(2, 3, 9, 8)}, axes), tmp_path / "m.onnx")
    assert result.comparison[1].sizes == {"batch": 1, "height": 3}
    assert len(result.notes) == 1 and result.notes[0].startswith("'height' is 3 or more: ")


class Halves(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.reshape(-1, 2, 4)


@pytest.mark.slow
def test_sizes_that_the_module_refuses_are_replaced_and_reported(tmp_path: Path) -> None:
    result = export(lambda: (Halves().eval(), {"x": normal(4, 4)}, {"x": {0: "n"}}), tmp_path / "m.onnx")
    assert [case.sizes for case in result.comparison] == [{"n": 4}, {"n": 2}, {"n": 8}]
    assert result.notes[0].startswith("the module does not run at n=1: RuntimeError: shape '[-1, 2, 4]' is invalid")
    assert result.notes[0].endswith("; compared at n=2 instead")


class Random(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + torch.rand(x.shape)


class Stateful(nn.Module):
    """Exported with the value that a Python number had at that time: the graph keeps the first."""

    def forward(self, x: Any) -> Any:
        return x * (2.0 if torch.compiler.is_compiling() else 2.01)


class Draws(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * random.random()


class Constant(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * 0.0


def failing(module: Any, out: Path, axes: Any = None, **inputs: Any) -> GraphoptError:
    def factory() -> Any:
        return module, inputs or {"x": normal(3, 4)}, axes

    out.write_bytes(b"what was there before")
    with pytest.raises(GraphoptError) as caught:
        export(factory, out)
    assert out.read_bytes() == b"what was there before"
    assert list(out.parent.iterdir()) == [out]
    return caught.value


NAME = "failing.<locals>.factory"


def test_a_module_that_onnx_does_not_reproduce_is_not_written(tmp_path: Path) -> None:
    error = failing(Stateful(), tmp_path / "m.onnx")
    assert isinstance(error, GateFailed) and error.exit_code == 1
    assert str(error) == (
        f"{NAME}: the ONNX does not compute what the module does: 'output': differs by 5.0e-03"
        " (tolerance 0.0001 of the largest magnitude; nothing was written)"
    )


@pytest.mark.parametrize("module", [Random(), Draws()])
def test_a_module_that_differs_from_itself(tmp_path: Path, module: Any) -> None:
    error = failing(module, tmp_path / "m.onnx")
    assert isinstance(error, GateFailed)
    assert str(error) == (
        f"{NAME}: the module gives different outputs for the same inputs, so nothing can be compared with it"
        " (it uses random numbers or keeps state between calls)"
    )


def test_a_comparison_that_cannot_fail_does_not_pass(tmp_path: Path) -> None:
    error = failing(Constant(), tmp_path / "m.onnx")
    assert isinstance(error, GateFailed)
    assert str(error) == (
        "the comparison would prove nothing: the module's outputs are NaN or one value throughout"
        " (give example inputs that it answers differently)"
    )


class Fixed(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.reshape(3, 4) * 2


class Branch(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x
        return x + 1


class Unsupported(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.linalg.qr(x)[0]


class Broken(nn.Module):
    def forward(self, x: Any) -> Any:
        return x @ x


def test_an_axis_that_the_module_fixes(tmp_path: Path) -> None:
    error = failing(Fixed(), tmp_path / "m.onnx", {"x": {0: "batch"}})
    assert isinstance(error, BadInput)
    assert str(error) == (
        f"{NAME}: the module fixes the dynamic axis 'batch' at 3, at tests/exporting/{line_of(Fixed, 'reshape')}"
        " (take 'batch' out of dynamic_axes, or remove what depends on its size from forward)"
    )


def line_of(module: type, text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {module.__name__}("))
    return f"test_export.py:{next(i for i in range(start, len(lines)) if text in lines[i]) + 1}"


@pytest.mark.slow
def test_a_branch_on_a_value_becomes_an_if(tmp_path: Path) -> None:
    result = export(lambda: (Branch().eval(), {"x": normal(3, 4)}, {"x": {0: "batch"}}), tmp_path / "m.onnx")
    assert [node.op_type for node in ir.load(tmp_path / "m.onnx").graph].count("If") == 1
    assert result.notes[-1].startswith("1 decision on values, every side compared in ")


def test_an_operator_without_onnx_form(tmp_path: Path) -> None:
    text = str(failing(Unsupported(), tmp_path / "m.onnx"))
    assert text.startswith(f"{NAME}: torch's exporter has no ONNX form of aten.linalg_qr")
    assert text.endswith("(write it with other operators in forward)")
    assert "\n" not in text


def test_a_module_that_fails_on_its_own_example(tmp_path: Path) -> None:
    text = str(failing(Broken(), tmp_path / "m.onnx"))
    assert text.startswith(f"{NAME}: forward fails on the example inputs: RuntimeError: mat1 and mat2 shapes")
    assert text.endswith(line_of(Broken, "return x @ x"))


@pytest.mark.parametrize(
    ("opset", "line"),
    [(17, "--opset: opset 17 is too old for torch's exporter (18 or newer)")],
)
def test_an_opset_out_of_range(tmp_path: Path, opset: int, line: str) -> None:
    with pytest.raises(BadInput) as caught:
        export(mlp, tmp_path / "m.onnx", opset=opset)
    assert str(caught.value) == line


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        export(mlp, tmp_path / "no" / "m.onnx")
    assert str(caught.value) == f"{tmp_path / 'no' / 'm.onnx'}: the folder '{tmp_path / 'no'}' does not exist"


class Mean(nn.Module):
    def forward(self, ids: Any, attention_mask: Any, keep: Any) -> Any:
        weight = attention_mask.to(torch.float32) * keep
        return (ids * weight).sum(1) / weight.sum(1)


def test_masks_stay_masks(tmp_path: Path) -> None:
    ids = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"ids": ids, "attention_mask": torch.ones_like(ids), "keep": torch.ones(3, 6, dtype=torch.bool)}
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    assert export(lambda: (Mean().eval(), inputs, axes), tmp_path / "m.onnx").notes == []


def test_draws_keep_what_the_example_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = draw_like(torch.tensor([[7, 30]]), "ids", [50, 4], generator)
    assert ids.dtype == torch.int64 and int(ids.min()) >= 7 and int(ids.max()) <= 30 and ids.unique().numel() > 5
    assert not draw_like(torch.zeros(2, 3, dtype=torch.int64), "token_type_ids", [4, 5], generator).any()
    right = draw_like(torch.tensor([[1, 1, 0]]), "m", [40, 5], generator)
    assert right.any(1).all() and (right.diff(dim=1) <= 0).all() and not right.all()
    left = draw_like(torch.tensor([[0, 1, 1]]), "m", [40, 5], generator)
    assert left.any(1).all() and (left.diff(dim=1) >= 0).all() and not left.all()
    holes = draw_like(torch.tensor([[True, False, True]]), "m", [40, 5], generator)
    assert holes.dtype == torch.bool and holes.any(1).all() and not holes.all()
    unit = draw_like(torch.rand(4, 9), "image", [50, 9], generator)
    assert float(unit.min()) >= 0 and float(unit.max()) <= 1 and float(unit.std()) > 0.1
    assert float(draw_like(torch.zeros(3), "x", [500], generator).std()) > 0.8


def test_comparison_of_one_output() -> None:
    expected = torch.tensor([1.0, -100.0])
    assert compare_output("y", expected, np.array([1.0, -100.005], np.float32)).passed
    worse = compare_output("y", expected, np.array([1.0, -100.02], np.float32))
    assert not worse.passed and worse.max_abs == pytest.approx(0.02, rel=1e-3)
    assert compare_output("y", expected, np.zeros((2, 1), np.float32)).reason == "shape [2, 1], eager [2]"
    assert compare_output("y", expected, np.zeros(2)).reason == "type float64, eager float32"
    nan = torch.tensor([1.0, float("nan")])
    assert compare_output("y", nan, np.array([1.0, np.nan], np.float32)).passed
    assert compare_output("y", nan, np.array([np.nan, 1.0], np.float32)).reason == "NaN or infinity in other places"
    assert compare_output("y", expected, np.array([1.0, np.inf], np.float32)).reason is not None
    assert not compare_output("y", torch.tensor([3, 4]), np.array([3, 5])).passed
