from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.bench import bench
from graphopt.bench.measure import _difference, file_bytes
from graphopt.cli.output import to_plain
from graphopt.errors import BadInput

ADD = '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 64] x) => (float[n, 64] y) { y = Add(x, x) }'


def chain(path: Path, length: int) -> Path:
    """A model that multiplies by 1 over and over, and then doubles."""
    body = "".join(f"t{i + 1} = MatMul(t{i}, w) " for i in range(length))
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 64] x) => (float[n, 64] y)'
        f" {{ t0 = Identity(x) {body} y = Add(t{length}, t{length}) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    onnx.save(proto, path)
    return path


def saved(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_a_model_that_does_far_more_is_slower(tmp_path: Path) -> None:
    paths = [chain(tmp_path / "long.onnx", 200), chain(tmp_path / "short.onnx", 1)]
    said: list[str] = []
    result = bench(paths, shapes={"x": (16, 64)}, seconds=0.2, progress=lambda fraction, what: said.append(what))
    long, short = result.models
    assert long.speedup.value == long.speedup.low == long.speedup.high == 1
    assert short.speedup.low > 2 and short.cpu_speedup.low > 2 and short.speedup.differs
    assert long.wall_ms.p50 <= long.wall_ms.p90 <= long.wall_ms.p99
    assert short.calls_per_second > long.calls_per_second
    assert short.max_abs_difference == 0
    assert short.max_abs_output > 0
    assert result.rounds >= 10 and result.loads >= 1
    assert result.timed_on == {"x": "float32[16, 64]"}
    assert long.file_bytes == paths[0].stat().st_size
    assert 20e6 < short.peak_bytes < 2e9
    assert "loading" in said
    plain = json.loads(json.dumps(to_plain(result)))
    assert plain["models"][1]["path"].endswith("short.onnx")


def test_models_that_compute_something_else_show_it(tmp_path: Path) -> None:
    one = saved(tmp_path / "a.onnx", ADD)
    other = saved(tmp_path / "b.onnx", ADD.replace("Add(x, x)", "Mul(x, x)"))
    assert bench([one, other], seconds=0.05).models[1].max_abs_difference > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ADD.replace(" x)", " z)").replace("x, x", "z, z"), "the models take different inputs: b.onnx has no 'x'"),
        (
            ADD.replace("float[n, 64] x", "double[n, 64] x").replace("float[n, 64] y", "double[n, 64] y"),
            "the models take input 'x' as float32 and as float64",
        ),
        (ADD.replace("64] y", "64] z").replace("y =", "z ="), "the models give different outputs: y and z"),
    ],
)
def test_models_that_cannot_be_compared(tmp_path: Path, text: str, message: str) -> None:
    paths = [saved(tmp_path / "a.onnx", ADD), saved(tmp_path / "b.onnx", text)]
    with pytest.raises(BadInput) as caught:
        bench(paths, seconds=0.05)
    assert str(caught.value).startswith(f"{paths[1]}: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": []}, "no model was given"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"seconds": 0}, "seconds must be above 0, not 0"),
        ({"shapes": {"x": (2, 3)}}, "input 'x': the shape is nx64, not 2x3"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    given = {"paths": [saved(tmp_path / "a.onnx", ADD)], "seconds": 0.05} | arguments
    with pytest.raises(BadInput) as caught:
        bench(**given)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_the_users_own_inputs_are_timed(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=np.ones((2, 5, 64), np.float32))
    result = bench([saved(tmp_path / "a.onnx", ADD)], calibration=tmp_path / "c.npz", seconds=0.05)
    assert result.timed_on == {"x": "float32[5, 64]"}
    assert result.compared_on == 2


def test_the_size_counts_external_data(tmp_path: Path) -> None:
    path = chain(tmp_path / "whole.onnx", 2)
    onnx.save(
        onnx.load(path), tmp_path / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=0
    )
    sizes = sum((tmp_path / name).stat().st_size for name in ("split.onnx", "split.data"))
    assert file_bytes(tmp_path / "split.onnx") == sizes > 64 * 64 * 4


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (np.array([1.0, 2.0]), np.array([1.0, 2.5]), 0.5),
        (np.array([np.nan, np.inf, 1]), np.array([np.nan, np.inf, 1]), 0),
        (np.array([np.nan]), np.array([1.0]), np.inf),
        (np.array([np.inf]), np.array([-np.inf]), np.inf),
        (np.zeros((2, 1)), np.zeros((1, 2)), np.inf),
        (np.array(["a"], object), np.array(["a"], object), 0),
        (np.array(["a"], object), np.array(["b"], object), np.inf),
        ([np.zeros(2)], [np.ones(2)], 1),
        ([np.zeros(2)], [], np.inf),
        (np.array([True]), np.array([False]), 1),
        (np.array([1 + 1j]), np.array([1.0 + 0j]), 1),
    ],
)
def test_differences(one: object, other: object, difference: float) -> None:
    assert _difference(one, other) == difference
