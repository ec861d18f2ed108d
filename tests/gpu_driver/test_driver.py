"""The driver's wrapper against a stand-in that keeps the interface's rules."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import BadInput, GraphoptError
from graphopt.gpu.context import Context
from graphopt.gpu.driver import Driver, find_driver
from graphopt.gpu.errors import CudaError, NoGpu, explain_refused_ptx, isa_of_driver, needed_driver
from graphopt.gpu.library import open_library
from tests.gpu_driver.standin import StandIn

PTX = """//
.version 8.7
.target sm_80
.address_size 64
.visible .entry scale(
    .param .u64 .ptr .align 1 scale_param_0,
    .param .u32 scale_param_1,
    .param .u64 scale_param_2
)
.maxntid 128, 1, 1
{
    ret;
}
"""
# A library with the emulator's interface: y = factor x.
SCALE = r"""
#include <cstdint>
#include <cstdio>
struct Parameter { void* data; uint64_t bytes, address; const char* name; uint32_t granule, kind; };
struct Description { uint32_t grid[3], threads, shared, count; Parameter* parameters; };
struct Failure { char what[512]; int launch, block[3], thread; uint32_t line; char file[128]; };
extern "C" int emulated_launches(uint32_t, Description* d, uint32_t, uint32_t, uint64_t, Failure* failure) {
  const float* x = static_cast<float*>(d->parameters[0].data);
  int factor = *static_cast<int*>(d->parameters[1].data);
  float* y = static_cast<float*>(d->parameters[2].data);
  unsigned count = d->grid[0] * d->threads;
  if (d->parameters[0].bytes < 4 * count || d->parameters[2].bytes < 4 * count) {
    std::snprintf(failure->what, sizeof failure->what, "beyond a buffer");
    return 1;
  }
  for (unsigned i = 0; i < count; ++i) y[i] = x[i] * factor;
  return 0;
}
"""


@pytest.fixture
def scale(driver: StandIn, tmp_path: Path) -> None:
    """Launches of PTX run this."""
    code, library = tmp_path / "scale.cpp", tmp_path / "scale.so"
    code.write_text(SCALE)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(code)]
    subprocess.run(command, check=True, capture_output=True)
    driver.note(PTX, library, ["x 0 4", "factor 1 4", "y 2 4"])


@pytest.fixture
def context(driver: StandIn) -> Context:
    return find_driver().open()


def test_no_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", "libcuda-of-nowhere.so")
    with pytest.raises(NoGpu) as caught:
        find_driver()
    assert str(caught.value) == (
        "no GPU: NVIDIA's driver (libcuda-of-nowhere.so) is not installed (nvidia-smi shows whether there is one)"
    )
    assert caught.value.exit_code == 2


def test_a_library_that_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes.util

    other = ctypes.util.find_library("c")
    assert other is not None
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", other)
    with pytest.raises(NoGpu, match="the driver has no cuInit"):
        find_driver()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": 100}, "no GPU: the driver sees none (CUDA_ERROR_NO_DEVICE)"),
        ({"init": 803}, "restart the machine"),
        ({"devices": 0}, "no GPU: the driver sees none"),
    ],
)
def test_a_driver_without_a_gpu(driver: StandIn, settings: dict[str, int], message: str) -> None:
    driver.play(**settings)
    with pytest.raises(NoGpu) as caught:
        find_driver()
    assert message in str(caught.value)


def test_what_a_device_is(driver: StandIn) -> None:
    driver.play(capability=90, version=12040, devices=2)
    found = find_driver()
    assert found.cuda == (12, 4) and found.isa == (8, 4) and len(found.devices) == 2
    device = found.devices[1]
    assert (device.index, device.name, device.capability, device.architecture) == (
        1,
        "Stand-in GPU",
        (9, 0),
        "compute_90",
    )
    assert device.memory_bytes == 2**30 and device.memory_pools
    with pytest.raises(BadInput, match="there is no GPU 2; the driver sees 2"):
        found.open(2)


def test_memory_there_and_back(context: Context, driver: StandIn) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with context.upload(array.T) as memory:
        np.testing.assert_array_equal(memory.read((4, 3), np.float32), array.T)
        with pytest.raises(ValueError, match="52 bytes are wanted of 48"):
            memory.read((13,), np.float32)
        with pytest.raises(ValueError, match="56 bytes do not fit into 48"):
            memory.write(np.zeros(14, np.float32))
    assert driver.live("memory") == 0
    empty = context.upload(np.zeros((0, 4), np.float32))
    assert empty.pointer and empty.read((0, 4), np.float32).shape == (0, 4)
    assert driver.complaints == []


def test_a_stream_is_waited_for(context: Context) -> None:
    """The stand-in's queues run when they are waited for, so that this test would see a copy that is read too early."""
    stream, memory = context.stream(), context.allocate(16)
    there, back = context.pinned((4,), np.int32), context.pinned((4,), np.int32)
    there.array[:] = [1, 2, 3, 4]
    back.array[:] = 0
    stream.upload(memory, there)
    stream.download(back, memory)
    assert list(back.array) == [0, 0, 0, 0]
    stream.synchronize()
    assert list(back.array) == [1, 2, 3, 4]
    stream.fill(memory, 255)
    stream.synchronize()
    assert list(memory.read((4,), np.int32)) == [-1] * 4


def test_streams_wait_for_each_other(context: Context) -> None:
    one, two = context.stream(), context.stream()
    a, b = context.upload(np.zeros(4, np.int32)), context.upload(np.zeros(4, np.int32))
    one.fill(a, 1)
    event = context.event()
    event.record(one)
    two.wait(event)
    two.copy(b, a, 16)
    two.synchronize()
    assert list(b.read((4,), np.int8)) == [1] * 4


def test_events_take_time(context: Context) -> None:
    stream, first, last = context.stream(), context.event(), context.event()
    first.record(stream)
    last.record(stream)
    with pytest.raises(CudaError, match="CUDA_ERROR_NOT_READY"):
        last.since(first)
    last.synchronize()
    assert last.since(first) >= 0


def test_a_kernel_is_launched_with_its_arguments_in_order(context: Context, scale: None) -> None:
    kernel = context.load(PTX).function("scale")
    x, y, stream = context.upload(np.arange(256, dtype=np.float32)), context.allocate(1024), context.stream()
    kernel.launch(stream, (2, 1, 1), 128, [x, np.int32(3), y])
    stream.synchronize()
    np.testing.assert_array_equal(y.read((256,), np.float32), 3 * np.arange(256))
    for grid, threads, error in (
        ((0, 1, 1), 128, "INVALID_VALUE"),
        ((1, 65536, 1), 128, "INVALID_VALUE"),
        ((1, 1, 1), 256, "LAUNCH_OUT_OF_RESOURCES"),
    ):
        with pytest.raises(CudaError, match=error):
            kernel.launch(stream, grid, threads, [x, np.int32(3), y])
    with pytest.raises(CudaError, match="CUDA_ERROR_NOT_FOUND"):
        context.load(PTX).function("stretch")


def test_a_kernel_that_breaks_down_breaks_the_context(context: Context, driver: StandIn, scale: None) -> None:
    kernel = context.load(PTX).function("scale")
    x, y, stream = context.allocate(512), context.allocate(4), context.stream()
    kernel.launch(stream, (1, 1, 1), 128, [x, np.int32(3), y])
    with pytest.raises(CudaError, match=r"LAUNCH_FAILED.*compute-sanitizer"):
        stream.synchronize()
    with pytest.raises(CudaError):
        context.allocate(4)
    assert driver.complaints == ["719 beyond a buffer (line 0)"]


def test_a_graph_replays_what_was_captured(context: Context, driver: StandIn) -> None:
    stream, memory = context.stream(), context.upload(np.zeros(4, np.int32))
    there = context.pinned((4,), np.int32)
    there.array[:] = 7
    with stream.capture() as captured:
        stream.upload(memory, there)
    stream.synchronize()
    assert list(memory.read((4,), np.int32)) == [0] * 4
    graph = captured.graph
    graph.launch(stream)
    there.array[:] = 8
    stream.synchronize()
    assert list(memory.read((4,), np.int32)) == [8] * 4
    graph.close()
    assert driver.live("graphs") == 0 and driver.complaints == []


def test_a_spoilt_capture_is_an_error_and_leaves_the_stream_usable(context: Context, driver: StandIn) -> None:
    stream = context.stream()
    with pytest.raises(CudaError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), stream.capture():
        context.allocate(16)
    stream.synchronize()
    with pytest.raises(RuntimeError, match="mine"), stream.capture():
        raise RuntimeError("mine")
    stream.synchronize()
    assert driver.live("graphs") == 0


@pytest.mark.parametrize("pools", [0, 1])
def test_garbage_is_not_collected_in_a_capture(driver: StandIn, pools: int) -> None:
    driver.play(pools=pools)
    context = find_driver().open()
    stream = context.stream()
    cycle: list[object] = [context.allocate(64)]
    cycle.append(cycle)
    with stream.capture():
        del cycle
        _ = [[] for _ in range(20_000)]  # that many new objects have garbage looked for
    gc.collect()
    assert driver.live("memory") == 0 and driver.complaints == []
    stream.close()
    context.close()


@pytest.mark.parametrize("pools", [0, 1])
def test_everything_is_freed(driver: StandIn, pools: int) -> None:
    driver.play(pools=pools)
    context = find_driver().open()
    stream = context.stream()
    kept = context.allocate(64, stream)
    context.allocate(64, stream)  # nobody holds it: gone at once, or once the stream has come that far
    stream.synchronize()
    assert driver.live("memory") == 1
    context.pinned((4,), np.int8), context.event(), context.load(PTX)
    assert driver.live("pinned") == driver.live("events") == driver.live("modules") == 0
    stream.close()
    kept.close()
    assert driver.live("memory") == 0
    left = [context.allocate(4), context.event(), context.stream(), context.load(PTX)]
    context.close()
    context.close()
    assert all(item.closed for item in left)
    assert {driver.live(what) for what in ("memory", "events", "streams", "modules", "contexts")} == {0}
    assert driver.complaints == []


def test_without_with_nothing_is_left_either(driver: StandIn) -> None:
    def use() -> None:
        context = find_driver().open()
        memory, stream = context.allocate(4), context.stream()
        assert memory.pointer and stream.handle

    use()
    gc.collect()
    assert {driver.live(what) for what in ("memory", "streams", "contexts")} == {0}


def test_too_much_memory_says_so(context: Context) -> None:
    with pytest.raises(CudaError) as caught:
        context.allocate(2**40)
    assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY" and caught.value.code == 2
    assert "the GPU's memory is full" in str(caught.value)
    assert context.free_bytes() == 2**30


def test_ptx_that_the_driver_is_too_old_for(driver: StandIn) -> None:
    driver.play(version=12040, isa=804)
    context = find_driver().open()
    with pytest.raises(GraphoptError) as caught:
        context.load(PTX)
    assert str(caught.value) == (
        "the driver is too old: this PTX is of ISA 8.7, and the driver (CUDA 12.4) takes up to 8.4"
        " (install a driver for CUDA 12.8 or newer (570 on Linux))"
    )


def test_ptx_for_a_newer_gpu(driver: StandIn) -> None:
    driver.play(capability=75)
    with pytest.raises(GraphoptError) as caught:
        find_driver().open().load(PTX)
    assert str(caught.value) == (
        "this PTX is for sm_80, and Stand-in GPU has compute capability 7.5 (compile it for this GPU)"
    )


def test_ptx_that_is_wrong(context: Context) -> None:
    with pytest.raises(
        GraphoptError, match=r"refuses the PTX: .*Missing \.version directive \(CUDA_ERROR_INVALID_PTX\)"
    ):
        context.load("int main() {}")


def test_what_drivers_take() -> None:
    assert isa_of_driver((12, 8)) == (8, 7) and isa_of_driver((12, 6)) == (8, 5) and isa_of_driver((13, 5)) == (9, 5)
    assert isa_of_driver((11, 8)) == (7, 8) and isa_of_driver((10, 2)) == (0, 0)
    assert needed_driver((8, 7)) == "a driver for CUDA 12.8 or newer (570 on Linux)"
    assert needed_driver((9, 5)) == "a driver for CUDA 13.5 or newer"


def test_architecture_specific_ptx_is_explained() -> None:
    what, hint = explain_refused_ptx("X", 209, "", ".version 8.7\n.target sm_90a\n", (12, 8), "L40S", (8, 9))
    assert what == "this PTX is for sm_90a, and L40S has compute capability 8.9" and hint is not None
    what, _ = explain_refused_ptx("X", 209, "", ".version 8.7\n.target sm_90a\n", (12, 8), "B200", (10, 0))
    assert what.startswith("this PTX is for sm_90a")


def test_calls_before_the_start_fail(driver: StandIn) -> None:
    """The stand-in itself: what it enforces is enforced."""
    import ctypes

    raw = ctypes.CDLL(str(driver.path))
    count = ctypes.c_int()
    assert raw.cuDeviceGetCount(ctypes.byref(count)) == 3
    assert isinstance(Driver(open_library(str(driver.path))), Driver)
