"""Engines at work, with a fake runtime on the stand-in driver: real numbers flow, and breaking a rule fails.

Nothing here says that the real libraries do the same; what has run on a GPU is in docs/gpu.md.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.engines.inspector import Inspection
from graphopt.engines.options import BuildOptions
from graphopt.engines.report import BuildResult, hash_file, report_path, write_report
from graphopt.engines.running import EngineRunner
from graphopt.errors import BadInput, GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.errors import NoGpu
from graphopt.runtime.loading import Runner, TensorSpec, load
from tests.engines import fake_runtime
from tests.engines.fake_runtime import CLASSES, IExecutionContext, write_engine
from tests.gpu_driver.standin import StandIn, standing_in
from tests.gpu_driver.test_arrays import Foreign

DOUBLE: dict[str, Any] = {
    "function": "double",
    "inputs": {"x": ("FLOAT", [-1, 4])},
    "outputs": {"y": ("FLOAT", ["x.0", 4])},
    "profiles": [{"x": [[1, 4], [2, 4], [8, 4]]}],
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(tmp_path, monkeypatch) as made:
        yield made
        gc.collect()
        assert made.complaints == []


def opened(folder: Path, *, rtx: bool = False, cuda_graphs: bool = True, **plan: Any) -> EngineRunner:
    path = write_engine(folder / "m.engine", magic="vtrt" if rtx else "ftrt", **{**DOUBLE, **plan})
    return EngineRunner(path, trt=fake_runtime.module(rtx=rtx), cuda_graphs=cuda_graphs)


def rows(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + 4 * count, dtype=np.float32).reshape(count, 4)


@pytest.mark.parametrize("rtx", [False, True])
def test_numpy_in_and_out(driver: StandIn, tmp_path: Path, rtx: bool) -> None:
    with opened(tmp_path, rtx=rtx) as runner:
        assert isinstance(runner, Runner)
        assert runner.inputs == (TensorSpec("x", np.dtype(np.float32), (None, 4)),)
        assert [(spec.name, spec.shape) for spec in runner.outputs] == [("y", (None, 4))]
        for turn in range(5):  # the third and later ones are replayed
            given = rows(2, turn)
            result = runner.run({"x": given})["y"]
            assert isinstance(result, np.ndarray)
            np.testing.assert_array_equal(result, 2 * given)
        assert runner.library == ("TensorRT-RTX 1.7.1.116" if rtx else "TensorRT 10.13.3.9")
        assert runner.shapes_to_try() == {"x": (2, 4)}
    assert {driver.live(what) for what in ("memory", "streams", "graphs", "contexts")} == {0}


def test_the_second_run_is_captured_and_later_ones_are_replayed(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        for _ in range(6):
            runner.run({"x": rows(2)})
        (context,) = IExecutionContext.made
        assert (context.enqueued, context.captured) == (2, 1)
        assert driver.live("graphs") == 1
        runner.run({"x": rows(3)})  # other shapes: the graph is of no use any more
        assert driver.live("graphs") == 0 and context.enqueued == 3
        for _ in range(3):
            np.testing.assert_array_equal(runner.run({"x": rows(3)})["y"], 2 * rows(3))
        assert (context.enqueued, context.captured) == (4, 2)
        assert runner.graphs_refused is None


def test_rtx_replays_by_itself(driver: StandIn, tmp_path: Path) -> None:
    for wanted, strategy in ((True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")):
        with opened(tmp_path, rtx=True, cuda_graphs=wanted) as runner:
            for _ in range(3):
                runner.run({"x": rows(1)})
            (context,) = IExecutionContext.made
            assert context._config is not None and context._config.cuda_graph_strategy.name == strategy
            assert (context.enqueued, context.captured) == (3, 0)


def test_what_cannot_be_captured_runs_without_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(tmp_path, monkeypatch) as driver:
        with opened(tmp_path, uncapturable=True) as runner:
            for _ in range(4):
                np.testing.assert_array_equal(runner.run({"x": rows(2)})["y"], 2 * rows(2))
            assert runner.graphs_refused is not None and "not ready to be captured" in runner.graphs_refused
        assert all("during a capture" in line or "spoilt" in line for line in driver.complaints)


def test_gpu_arrays_are_not_copied(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        foreign = Foreign(arrays.upload(runner.context, rows(2)))
        results = [runner.run({"x": foreign})["y"] for _ in range(4)]
        assert all(isinstance(result, DeviceArray) for result in results)
        assert foreign.asked == [runner.stream.handle] * 4  # its library waits for nothing: our stream does
        (context,) = IExecutionContext.made
        assert context._addresses["x"] == foreign.array.pointer
        for result in results:
            np.testing.assert_array_equal(result.numpy(), 2 * rows(2))
        assert len({result.pointer for result in results}) == 4  # all of them are still held


def test_results_are_reused_only_when_nobody_holds_them(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        x = arrays.upload(runner.context, rows(2))
        first = runner.run({"x": x})["y"]
        address = first.pointer
        second = runner.run({"x": x})["y"]
        assert second.pointer != address
        capsule = first.__dlpack__(stream=1)
        del first
        gc.collect()
        third = runner.run({"x": x})["y"]
        assert third.pointer != address  # another library has it
        del capsule
        gc.collect()
        fourth = runner.run({"x": x})["y"]
        assert fourth.pointer == address
        np.testing.assert_array_equal(fourth.numpy(), 2 * rows(2))


def test_memory_is_not_written_while_another_library_still_reads_it(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        result = runner.run({"x": arrays.upload(runner.context, rows(2))})["y"]
        address, reader = result.pointer, runner.context.stream()
        kept = runner.context.allocate(result.nbytes)
        capsule = result.__dlpack__(stream=reader.handle)
        reader.copy(kept, address, result.nbytes)  # put into its stream; not done yet
        del capsule, result
        gc.collect()
        again = runner.run({"x": arrays.upload(runner.context, rows(2, 50))})["y"]
        assert again.pointer == address
        np.testing.assert_array_equal(again.numpy(), 2 * rows(2, 50))
        reader.synchronize()
        np.testing.assert_array_equal(kept.read((2, 4), np.float32), 2 * rows(2))


def test_inputs_are_held_until_they_have_been_read(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        theirs = runner.context.stream()
        given = arrays.allocate(runner.context, (2, 4), np.float32, theirs)
        given._owner.write(rows(2))  # type: ignore[attr-defined]
        result = runner.run({"x": Foreign(given)})["y"]
        del given
        gc.collect()
        theirs.synchronize()  # it would be freed now, before our stream has read it
        np.testing.assert_array_equal(result.numpy(), 2 * rows(2))
        runner.run({"x": rows(1)})
        assert len(runner._sessions.in_use) == 0


def test_a_steady_loop_replays_two_graphs(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        x = arrays.upload(runner.context, rows(2))
        result = None
        for _ in range(10):
            result = runner.run({"x": x})["y"]  # the one before is let go of only now
        assert result is not None
        np.testing.assert_array_equal(result.numpy(), 2 * rows(2))
        (context,) = IExecutionContext.made
        assert context.captured == 2 and context.enqueued == 4


def test_addresses_that_always_change_end_the_recording(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        given = [arrays.upload(runner.context, rows(2, start)) for start in range(12)]
        for _ in range(8):
            for start, x in enumerate(given):  # more than are kept, each seen again when it is gone
                np.testing.assert_array_equal(runner.run({"x": x})["y"].numpy(), 2 * rows(2, start))
        (context,) = IExecutionContext.made
        assert runner.graphs_refused == "the addresses of inputs and outputs change too often"
        assert context.captured < 48 and driver.live("graphs") <= 8


def test_what_grows_takes_few_sizes_of_memory(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path, profiles=[{"x": [[1, 4], [2, 4], [4096, 4]]}]) as runner:
        for size in range(1, 4096, 16):
            np.testing.assert_array_equal(runner.run({"x": rows(size)})["y"], 2 * rows(size))
        assert len({memory.size for memory, _ in runner._sessions.pool._free}) <= 8 * 8


def test_a_slice_that_is_not_aligned_is_copied(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path) as runner:
        whole = arrays.upload(runner.context, rows(3))
        part = DeviceArray(runner.context, whole.pointer + 16, (2, 4), np.float32, owner=whole)
        np.testing.assert_array_equal(runner.run({"x": part})["y"].numpy(), 2 * rows(3)[1:])


def test_profiles_are_chosen_by_shape_and_each_has_its_context(driver: StandIn, tmp_path: Path) -> None:
    buckets = [{"x": [[size, 4]] * 3} for size in (1, 2, 4)]
    with opened(tmp_path, profiles=buckets) as runner:
        for size in (1, 2, 4, 2, 1, 4):
            np.testing.assert_array_equal(runner.run({"x": rows(size)})["y"], 2 * rows(size))
        assert [context.shape_changes for context in IExecutionContext.made] == [1, 1, 1]
        with pytest.raises(BadInput) as caught:
            runner.run({"x": rows(3)})
        assert str(caught.value) == (
            "input 'x': the engine takes 1x4 or 2x4 or 4x4, not 3x4 (build it for more shapes: graphopt build --shapes)"
        )


def test_shapes_that_only_fit_different_profiles(driver: StandIn, tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "function": "add_and_sum",
        "inputs": {"x": ("FLOAT", [-1, 4]), "y": ("FLOAT", [-1, 4])},
        "outputs": {"z": ("FLOAT", ["x.0", 4]), "s": ("FLOAT", ["x.0", 1])},
        "profiles": [{"x": [[n, 4]] * 3, "y": [[n, 4]] * 3} for n in (1, 2)],
    }
    with opened(tmp_path, **plan) as runner:
        result = runner.run({"x": rows(2), "y": rows(2, 5)})
        np.testing.assert_array_equal(result["s"], np.sum(rows(2) + rows(2, 5), axis=-1, keepdims=True))
        with pytest.raises(BadInput, match="no profile of the engine takes these shapes together: x 1x4, y 2x4"):
            runner.run({"x": rows(1), "y": rows(2)})


def test_an_output_whose_size_depends_on_the_data(driver: StandIn, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"function": "nonzero", "outputs": {"y": ("INT64", [-1, 2])}}
    with opened(tmp_path, **plan) as runner:
        for given in (np.eye(4, dtype=np.float32), np.ones((8, 4), np.float32), np.zeros((2, 4), np.float32)):
            found = runner.run({"x": given})["y"]
            np.testing.assert_array_equal(found, np.argwhere(given))
        kept = runner.run({"x": arrays.upload(runner.context, np.eye(4, dtype=np.float32))})["y"]
        runner.run({"x": np.ones((4, 4), np.float32)})
        np.testing.assert_array_equal(kept.numpy(), np.argwhere(np.eye(4)))


def test_an_input_that_decides_a_shape_stays_on_the_host(driver: StandIn, tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "function": "take",
        "inputs": {"x": ("FLOAT", [8, 4]), "count": ("INT64", [1])},
        "outputs": {"y": ("FLOAT", [-1, 4])},
        "profiles": [{}],
        "host": ["count"],
    }
    with opened(tmp_path, **plan) as runner:
        for count in (3, 5, 3):
            result = runner.run({"x": rows(8), "count": np.array([count], np.int64)})["y"]
            np.testing.assert_array_equal(result, rows(8)[:count])
        on_gpu = arrays.upload(runner.context, np.array([3], np.int64))
        with pytest.raises(BadInput, match="it decides a shape, and is wanted on the host"):
            runner.run({"x": rows(8), "count": on_gpu})


def test_wrong_feeds(driver: StandIn, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "input 'x': no value was given (expected float32[?, 4])"),
        ({"x": rows(1), "xx": 1}, "input 'xx': the engine has no such input (did you mean 'x'?)"),
        (
            {"x": rows(1).astype(np.float64)},
            "input 'x': expected float32[?, 4], got float64[1, 4] (the dtype differs)",
        ),
        ({"x": rows(1)[0]}, "input 'x': expected float32[?, 4], got float32[4] (the rank differs)"),
        (
            {"x": rows(9)},
            "input 'x': the engine takes 1x4 to 8x4, not 9x4 (build it for more shapes: graphopt build --shapes)",
        ),
    ]
    with opened(tmp_path) as runner:
        for feeds, message in cases:
            with pytest.raises(BadInput) as caught:
                runner.run(feeds)
            assert str(caught.value) == message
        runner.run({"x": np.asfortranarray(rows(2))})


def test_a_layer_that_fails(driver: StandIn, tmp_path: Path) -> None:
    with opened(tmp_path, fails=True) as runner, pytest.raises(GraphoptError) as caught:
        runner.run({"x": rows(1)})
    assert str(caught.value) == (
        f"{tmp_path / 'm.engine'}: TensorRT could not run it: IExecutionContext: a layer failed"
    )


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_program_repeats_one_run(driver: StandIn, tmp_path: Path, cuda_graphs: bool) -> None:
    with opened(tmp_path, cuda_graphs=cuda_graphs) as runner:
        program = runner.program({"x": rows(2)})
        program.inputs["x"]._owner.write(rows(2, 7))  # type: ignore[attr-defined]
        for _ in range(3):
            program.enqueue()
        np.testing.assert_array_equal(program.outputs["y"].numpy(), 2 * rows(2, 7))
        assert IExecutionContext.made[0].captured == int(cuda_graphs)


@pytest.mark.parametrize(
    ("says", "meaning"),
    [
        (
            "The engine plan file is generated on an incompatible device, expecting compute 8.9 got compute 8.6,"
            " please rebuild.",
            "the engine was built for another GPU: compute capability 8.6, and this GPU has 8.9",
        ),
        (
            "The engine plan file is not compatible with this version of TensorRT, expecting library version"
            " 10.13.3.9 got 10.9.0.34, please rebuild.",
            "the engine was built by version 10.9.0.34 of the library, and here is 10.13.3.9",
        ),
        ("Serialization assertion stdVersionRead == kV failed.Version tag does not match.", "by another version"),
        ("Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)", "driver is too old"),
        ("cudaError 35", "install a newer driver; graphopt selftest says which"),
        ("Error Code 2: OutOfMemory", "close what else uses the GPU, or build with --weight-streaming"),
        ("Something else went wrong", "TensorRT does not load it: Something else went wrong"),
    ],
)
def test_refusals_in_plain_words(driver: StandIn, tmp_path: Path, says: str, meaning: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        opened(tmp_path, says=says)
    assert meaning in str(caught.value) and "TensorRT 10.13.3.9, Stand-in GPU" in str(caught.value)
    assert "\n" not in str(caught.value)
    gc.collect()
    assert driver.live("contexts") == 0


def test_files_that_are_no_engines(driver: StandIn, tmp_path: Path) -> None:
    other = tmp_path / "other.engine"
    for content in (b"", b"xy", b"not an engine"):
        other.write_bytes(content)
        with pytest.raises(BadInput, match="is no engine of TensorRT"):
            load(other)
    with pytest.raises(BadInput, match="no such file"):
        EngineRunner(tmp_path / "absent.engine")
    write_engine(other, magic="vtrt", **DOUBLE)
    with pytest.raises(BadInput, match="is an engine of TensorRT-RTX, not of TensorRT"):
        EngineRunner(other, backend="tensorrt", trt=fake_runtime.module())


def test_packed_tensors_are_refused(driver: StandIn, tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="'y' is not stored row by row: channels packed by 8"):
        opened(tmp_path, packed=["y"])


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", "libcuda-of-nowhere.so")
    with pytest.raises(NoGpu, match="no GPU"):
        load(write_engine(tmp_path / "m.engine", **DOUBLE))


def test_load_opens_engines(driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", fake_runtime.module())
    monkeypatch.setattr("graphopt.engines.loading.find_backend", lambda name: fake_backend())
    runner = load(write_engine(tmp_path / "m.plan", **DOUBLE))
    np.testing.assert_array_equal(runner.run({"x": rows(1)})["y"], 2 * rows(1))


# -- with the report of its build beside it ----------------------------------------------------------------------------


def reported(folder: Path, *, options: dict[str, Any] | None = None, **known: Any) -> Path:
    """An engine with its report, as `graphopt build` leaves the two."""
    path = write_engine(folder / "m.engine", **{**DOUBLE, **known.pop("plan", {})})
    model = folder / "m.onnx"
    model.write_bytes(b"weights")
    plain: dict[str, Any] = {
        "backend": "tensorrt",
        "version": "10.13.3.9",
        "hash": hash_file(path),
        "bytes": path.stat().st_size,
        "model": {"name": model.name, "sha256": hashlib.sha256(b"weights").hexdigest(), "data_files": []},
        "gpu": "Stand-in GPU",
        "compute_capability": "8.9",
        **known,
    }
    fields = {field.name: plain.get(field.name) for field in dataclasses.fields(BuildResult)}
    empty: dict[str, Any] = {"inputs": (), "outputs": (), "profiles": {}, "values": {}, "buckets": (), "notes": ()}
    result = BuildResult(
        **{
            **fields,
            **empty,
            "path": path,
            "options": BuildOptions(**(options or {})),
            "inspection": Inspection((), (), "not asked"),
        }
    )
    write_report(result, report_path(path))
    return path


def test_an_engine_of_another_version_is_refused_before_the_library_is_asked(driver: StandIn, tmp_path: Path) -> None:
    with pytest.raises(GraphoptError) as caught:
        EngineRunner(reported(tmp_path, version="10.9.0.34"), trt=fake_runtime.module())
    assert "the engine was built by tensorrt 10.9.0.34, and here is 10.13.3.9" in str(caught.value)


def test_an_engine_of_another_gpu_is_refused(driver: StandIn, tmp_path: Path) -> None:
    path = reported(tmp_path, gpu="GPU X", compute_capability="8.6")
    with pytest.raises(GraphoptError, match=r"built on GPU X \(compute capability 8\.6\), and Stand-in GPU has 8\.9"):
        EngineRunner(path, trt=fake_runtime.module())


def test_the_report_of_another_engine_is_refused(driver: StandIn, tmp_path: Path) -> None:
    path = reported(tmp_path)
    write_engine(path, **DOUBLE, more=1)
    with pytest.raises(BadInput, match="is the report of another engine"):
        EngineRunner(path, trt=fake_runtime.module())


def test_an_engine_with_its_own_runtime_may_use_it(driver: StandIn, tmp_path: Path) -> None:
    path = reported(tmp_path, plan={"needs_host_code": True}, options={"version_compatible": True})
    with EngineRunner(path, trt=fake_runtime.module()) as runner:
        np.testing.assert_array_equal(runner.run({"x": rows(1)})["y"], 2 * rows(1))
    write_engine(tmp_path / "alone.engine", **DOUBLE, needs_host_code=True)
    with pytest.raises(GraphoptError, match="holds a runtime of its own, which was not allowed to run"):
        EngineRunner(tmp_path / "alone.engine", trt=fake_runtime.module())


def test_weights_that_were_stripped_come_from_the_model(driver: StandIn, tmp_path: Path) -> None:
    path = reported(tmp_path, plan={"stripped": True}, options={"strip_weights": True})
    with EngineRunner(path, trt=fake_runtime.module()) as runner:
        np.testing.assert_array_equal(runner.run({"x": rows(1)})["y"], 2 * rows(1))
    (tmp_path / "m.onnx").write_bytes(b"other weights")
    with pytest.raises(BadInput, match=r"m\.onnx: is not the model that the engine was built from"):
        EngineRunner(path, trt=fake_runtime.module())
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(BadInput, match=r"the engine holds no weights; they are in m\.onnx, which is not beside it"):
        EngineRunner(path, trt=fake_runtime.module())


def test_weights_that_the_library_does_not_take(driver: StandIn, tmp_path: Path) -> None:
    path = reported(
        tmp_path,
        plan={"stripped": True},
        options={"strip_weights": True},
        model={"name": "m.onnx", "sha256": hashlib.sha256(b"other names").hexdigest(), "data_files": []},
    )
    (tmp_path / "m.onnx").write_bytes(b"other names")
    with pytest.raises(GraphoptError, match=r"does not take the weights of m\.onnx: no such weights"):
        EngineRunner(path, trt=fake_runtime.module())


def test_weights_are_streamed_where_the_engine_was_built_for_it(driver: StandIn, tmp_path: Path) -> None:
    path = reported(tmp_path, plan={"streams": True}, options={"weight_streaming": True})
    with EngineRunner(path, trt=fake_runtime.module()) as runner:
        assert runner._open.engine.weight_streaming_budget_v2 == 600


def fake_backend() -> Any:
    from graphopt.engines.backends import BACKENDS

    return BACKENDS["tensorrt"]


def test_the_fake_has_nothing_that_the_real_ones_lack() -> None:
    api = json.loads((Path(fake_runtime.__file__).parent / "fake_backend" / "api.json").read_text())["classes"]
    for kind in CLASSES:
        real = {name.partition("(")[0].partition(":")[0].partition(" ")[0] for name in api[kind.__name__]}
        used = {name for name in vars(kind) if not name.startswith("_")} - {"made"}
        assert used <= real, kind
