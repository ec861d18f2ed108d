from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.benchmarking import bench, entries, measure, timing
from graphopt.benchmarking.comparing import difference as difference_of
from graphopt.benchmarking.entries import file_bytes
from graphopt.benchmarking.memory import peak_bytes
from graphopt.cli.output import to_plain
from graphopt.errors import BadInput, GraphoptError

ADD = '<ir_version: 9, opset_import: ["" : 18]> g (float[n, 64] x) => (float[n, 64] y) { y = Add(x, x) }'


def saved(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


class Clock:
    """Stands in for the module ``time``: only the models' runs take any, each what its file's name says (ms)."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def process_time(self) -> float:
        return self.now / 2

    def bound(self, runner: object, feeds: object) -> Callable[[], object]:
        cost = float(runner.cost) / 1e3  # type: ignore[attr-defined]
        return lambda: setattr(self, "now", self.now + cost)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    load = entries._load

    def loaded(path: Path, threads: int) -> object:
        runner = load(path, threads)
        runner.cost = path.stem.rpartition("-")[2]  # type: ignore[attr-defined]
        return runner

    for module in (measure, timing):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(entries, "_load", loaded)
    monkeypatch.setattr(measure, "bound", clock.bound)
    monkeypatch.setattr(measure, "peak_bytes", lambda path, feeds, threads: 100)
    return clock


def test_what_is_measured_is_what_the_clock_says(tmp_path: Path, clock: Clock) -> None:
    paths = [saved(tmp_path / f"model-{cost}.onnx", ADD) for cost in ("4", "2", "0.5")]
    said: list[str] = []
    result = bench(paths, shapes={"x": (16, 64)}, seconds=5, progress=lambda fraction, what: said.append(what))
    slow, half, eighth = result.models
    assert (slow.speedup.value, slow.speedup.low, slow.speedup.high) == (1, 1, 1)
    assert half.speedup.value == pytest.approx(2, rel=1e-2) and half.speedup.differs
    assert eighth.speedup.value == pytest.approx(8, rel=1e-2)
    assert eighth.cpu_speedup.value == pytest.approx(8, rel=1e-2)
    assert slow.wall_ms.p50 == pytest.approx(4, rel=1e-2) == slow.wall_ms.p99
    assert slow.cpu_ms == pytest.approx(2, rel=1e-2)
    assert eighth.calls_per_second == pytest.approx(2000, rel=1e-2)
    assert result.rounds >= 10 and result.loads == 8
    assert result.timed_on == {"x": "float32[16, 64]"}
    assert slow.file_bytes == paths[0].stat().st_size
    assert "timing" in said
    plain = json.loads(json.dumps(to_plain(result)))
    assert plain["models"][1]["path"].endswith("model-2.onnx")


def test_the_order_changes_from_round_to_round(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    bound = clock.bound

    def noting(runner: object, feeds: object) -> Callable[[], object]:
        call = bound(runner, feeds)
        name = str(runner.cost)  # type: ignore[attr-defined]
        return lambda: (taken.append(name), call())

    monkeypatch.setattr(measure, "bound", noting)
    bench([saved(tmp_path / f"model-{cost}.onnx", ADD) for cost in ("20", "30")], seconds=5)
    runs = [name for name, following in zip(taken, [*taken[1:], ""], strict=True) if name != following]
    pairs = {tuple(runs[at : at + 2]) for at in range(len(runs) - 1)}
    assert pairs == {("20", "30"), ("30", "20")}
    assert 2 < len(runs) < len(taken), "in turns, and several calls each"


def test_a_slow_model_is_still_timed_in_ten_rounds(tmp_path: Path, clock: Clock) -> None:
    result = bench([saved(tmp_path / "model-9000.onnx", ADD)], seconds=0.01)
    assert result.rounds >= 10


def test_the_memory_of_a_model_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    small = saved(tmp_path / "small.onnx", ADD)
    large = tmp_path / "large.onnx"
    proto = onnx.load(small)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1000, 64000), np.float32), "w"))
    proto.graph.node.append(onnx.helper.make_node("ReduceSum", ["w"], ["total"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("total", 1, None))
    onnx.save(proto, large)
    feeds = {"x": np.ones((2, 64), np.float32)}
    base = peak_bytes(small, feeds, 1)
    assert base > 10e6
    assert peak_bytes(large, feeds, 1) > base + 200e6


def test_a_process_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match=r"measuring its memory failed: .*no value was given"):
        peak_bytes(saved(tmp_path / "a.onnx", ADD), {}, 1)


def test_models_that_compute_something_else_show_it(tmp_path: Path, clock: Clock) -> None:
    one = saved(tmp_path / "a-1.onnx", ADD)
    other = saved(tmp_path / "b-1.onnx", ADD.replace("Add(x, x)", "Mul(x, x)"))
    assert bench([one, other], seconds=0.05).models[1].max_abs_difference > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ADD.replace("64] x", "64] z").replace("x, x", "z, z"), "the models take different inputs: b.onnx has no 'x'"),
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


def test_the_users_own_inputs_are_timed(tmp_path: Path, clock: Clock) -> None:
    np.savez(tmp_path / "c.npz", x=np.ones((2, 5, 64), np.float32))
    result = bench([saved(tmp_path / "a-1.onnx", ADD)], calibration=tmp_path / "c.npz", seconds=0.05)
    assert result.timed_on == {"x": "float32[5, 64]"}
    assert result.compared_on == 2


def test_the_size_counts_external_data(tmp_path: Path) -> None:
    proto = onnx.load(saved(tmp_path / "whole.onnx", ADD))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    proto.graph.node[0].input[1] = "row"
    proto.graph.node.insert(0, onnx.helper.make_node("ReduceSum", ["w"], ["row"]))
    onnx.save(proto, tmp_path / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=0)
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
    assert difference_of(one, other) == difference
