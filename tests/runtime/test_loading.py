from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.errors import BadInput
from graphopt.runtime import Runner, TensorSpec, load

DOUBLE = '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 2] x) => (float[n, 2] y) { y = Add(x, x) }'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(DOUBLE), tmp_path / "double.onnx")
    return tmp_path / "double.onnx"


def test_load_runs_a_model(path: Path) -> None:
    runner = load(str(path), threads=1)
    assert isinstance(runner, Runner)
    assert list(runner.inputs) == [TensorSpec("x", np.dtype(np.float32), ("n", 2))]
    assert [output.name for output in runner.outputs] == ["y"]
    np.testing.assert_array_equal(runner.run({"x": np.ones((3, 2), np.float32)})["y"], np.full((3, 2), 2))


def test_the_backend_can_be_named(path: Path) -> None:
    renamed = path.rename(path.with_suffix(".bin"))
    assert load(renamed, backend="onnxruntime").inputs[0].name == "x"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("absent.onnx", {}, "no such file"),
        ("double.onnx", {"backend": "tensorflow"}, "there is no backend 'tensorflow' (backends: onnxruntime"),
        ("double.onnx", {"threads": 0}, "threads must be at least 1, not 0"),
        ("notes.txt", {}, "no backend is known for this kind of file (backends: onnxruntime"),
    ],
)
def test_what_cannot_be_loaded(path: Path, name: str, arguments: dict[str, object], message: str) -> None:
    (path.parent / "notes.txt").touch()
    with pytest.raises(BadInput) as caught:
        load(path.parent / name, **arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
