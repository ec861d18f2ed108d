"""Kernels launched through the driver's interface, end to end: PTX, grid, order of arguments. On a stand-in, whose
launches run the same source in the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.context import Context
from graphopt.gpu.driver import find_driver
from graphopt.kernels import gemm
from graphopt.kernels.compile import find_nvrtc
from graphopt.kernels.launch import LoadedKernel, architecture_of
from tests.gpu_driver.standin import StandIn, standing_in

pytestmark = [
    pytest.mark.skipif(find_nvrtc("nvidia-cuda-nvrtc-cu12") is None, reason="NVRTC is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(tmp_path, monkeypatch) as made:
        made.compile_kernels()
        yield made


@pytest.fixture
def context(driver: StandIn) -> Context:
    return find_driver().open()


def test_a_product_on_ragged_shapes(context: Context, driver: StandIn) -> None:
    rng = np.random.default_rng(0)
    loaded = LoadedKernel(context, gemm.half_gemm("float16")[3])
    for m, n, k in ((1, 40, 24), (17, 70, 72)):
        x, weight = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (n, k)))
        bias = rng.standard_normal(n).astype(np.float16)
        (y,) = loaded.run([x, weight, bias], [((m, n), "float16")])
        wanted = x.astype(np.float64) @ weight.astype(np.float64).T + bias
        np.testing.assert_allclose(y, wanted, rtol=2e-3, atol=2e-3)
    assert loaded.ptx.architecture == "compute_89"
    assert driver.complaints == []


def test_a_launch_that_is_prepared_once_runs_again(context: Context) -> None:
    loaded = LoadedKernel(context, gemm.half_gemm("float16")[3])
    stream = context.stream()
    inputs = [arrays.upload(context, np.ones(shape, np.float16)) for shape in ((2, 16), (8, 16), (8,))]
    y = arrays.allocate(context, (2, 8), np.float16)
    call = loaded.prepare(stream, inputs, [y])
    for turn in range(3):
        inputs[2]._owner.write(np.full(8, turn, np.float16))  # type: ignore[attr-defined]
        call()
        stream.synchronize()
        np.testing.assert_array_equal(y.numpy(), np.full((2, 8), 16 + turn))
    with stream.capture() as captured:
        call()
    inputs[2]._owner.write(np.full(8, 9, np.float16))  # type: ignore[attr-defined]
    captured.graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(y.numpy(), np.full((2, 8), 25))


def test_arrays_that_do_not_fit(context: Context) -> None:
    loaded = LoadedKernel(context, gemm.half_gemm("float16")[3])
    one = np.ones((2, 16), np.float16)
    with pytest.raises(GraphoptError, match="takes 3 inputs, not 1"):
        loaded.run([one], [((2, 8), "float16")])
    with pytest.raises(GraphoptError, match="input 'weight' is float32; float16 is wanted"):
        loaded.run([one, one.astype(np.float32), one[0]], [((2, 2), "float16")])
    with pytest.raises(GraphoptError, match="output 'y' is bfloat16; float16 is wanted"):
        loaded.run([one, one, one[0]], [((2, 2), "bfloat16")])


@pytest.mark.parametrize(
    ("capability", "architecture"), [(80, "compute_80"), (86, "compute_80"), (89, "compute_89"), (120, "compute_100")]
)
def test_the_newest_architecture_that_runs(driver: StandIn, capability: int, architecture: str) -> None:
    driver.play(capability=capability)
    assert architecture_of(find_driver().devices[0]) == architecture


def test_a_gpu_that_is_too_old(driver: StandIn) -> None:
    driver.play(capability=75)
    with pytest.raises(GraphoptError) as caught:
        LoadedKernel(find_driver().open(), gemm.half_gemm("float16")[3])
    assert str(caught.value) == "Stand-in GPU has compute capability 7.5; the kernels need 8.0 or newer"
