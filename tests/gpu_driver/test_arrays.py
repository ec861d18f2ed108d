"""DLPack both ways: our arrays as DLPack, and DLPack as our arrays."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphopt.errors import BadInput
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray, allocate, is_on_gpu, take, upload
from graphopt.gpu.context import Context
from graphopt.gpu.driver import find_driver
from tests.gpu_driver.standin import StandIn


@pytest.fixture
def context(driver: StandIn) -> Context:
    return find_driver().open()


class Foreign:
    """Another library's tensor on the GPU: it hands over our array's capsule and remembers the stream."""

    def __init__(self, array: DeviceArray, device: tuple[int, int] = (2, 0)) -> None:
        self.array = array
        self.device = device
        self.asked: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        self.asked.append(stream)
        return self.array.__dlpack__(stream=stream)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int64, np.uint8, np.bool_, np.float64]
)
def test_there_and_back(context: Context, dtype: Any) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    foreign = Foreign(upload(context, array))
    stream = context.stream()
    taken = take(context, foreign, stream)
    assert foreign.asked == [stream.handle]
    assert taken.pointer == foreign.array.pointer and taken.shape == (2, 3, 4) and taken.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(taken.numpy(), array)
    np.testing.assert_array_equal(np.asarray(taken), array)


def test_nothing_is_freed_while_somebody_holds_it(context: Context, driver: StandIn) -> None:
    array = upload(context, np.ones(4, np.float32))
    capsule = array.__dlpack__()
    del array
    gc.collect()
    assert driver.live("memory") == 1 and len(arrays._given) == 1
    del capsule  # nobody took it
    gc.collect()
    assert driver.live("memory") == 0 and arrays._given == {}
    array = upload(context, np.ones(4, np.float32))
    taken = take(context, Foreign(array), context.stream())
    del array
    gc.collect()
    assert driver.live("memory") == 1
    del taken
    gc.collect()
    assert driver.live("memory") == 0 and arrays._given == {}


def test_the_taker_waits_for_the_writer(context: Context) -> None:
    writer, reader = context.stream(), context.stream()
    array = allocate(context, (4,), np.uint8, writer)
    context.library.call("cuMemsetD8Async", array.pointer, 9, 4, writer.handle)
    target = allocate(context, (4,), np.uint8, reader)
    taken = take(context, array, reader)
    reader.copy(target.pointer, taken.pointer, 4)
    reader.synchronize()
    assert list(target.numpy()) == [9] * 4


def test_what_cannot_be_taken(context: Context) -> None:
    stream = context.stream()
    with pytest.raises(BadInput, match=r"x: it is on GPU 1, and the engine on GPU 0"):
        take(context, Foreign(upload(context, np.ones(2)), (2, 1)), stream, "x")
    capsule = upload(context, np.ones((2, 3), np.float32)).__dlpack__()
    tensor = arrays._DLManagedTensor.from_address(arrays._get(capsule, b"dltensor")).tensor
    tensor.strides[0], tensor.strides[1] = 1, 2

    class Strided:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, *, stream: int) -> Any:
            return capsule

    with pytest.raises(BadInput, match=r"not in C order \(call \.contiguous\(\) on it first\)"):
        take(context, Strided(), stream)


def test_what_is_not_handed_over(context: Context) -> None:
    array = upload(context, np.ones(2, np.float32))
    with pytest.raises(BufferError, match="the array is on GPU 0"):
        array.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="a copy is not made"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="DLPack has no complex64"):
        upload(context, np.ones(2, np.complex64)).__dlpack__()
    with pytest.raises(ValueError, match="by a copy only"):
        np.array(array, copy=False)


def test_what_is_on_a_gpu(context: Context) -> None:
    assert is_on_gpu(upload(context, np.ones(2))) and is_on_gpu(Foreign(upload(context, np.ones(2))))
    assert not is_on_gpu(np.ones(2)) and not is_on_gpu([1.0])
    torch = pytest.importorskip("torch")
    assert not is_on_gpu(torch.ones(2))


def test_scalars_and_empty_arrays(context: Context) -> None:
    for array in (np.array(3.0, np.float32), np.zeros((0, 5), np.int32)):
        taken = take(context, Foreign(upload(context, array)), context.stream())
        assert taken.shape == array.shape
        np.testing.assert_array_equal(taken.numpy(), array)
    assert ctypes.sizeof(arrays._DLTensor) == 48 and ctypes.sizeof(arrays._DLManagedTensor) == 64
