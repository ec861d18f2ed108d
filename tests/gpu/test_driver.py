"""NVIDIA's own driver does what the stand-in in tests/gpu_driver does."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.errors import GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.context import Context
from graphopt.gpu.errors import CudaError

pytestmark = pytest.mark.gpu

PTX = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 x, .param .u32 factor, .param .u64 y)
.maxntid 128, 1, 1
{
    .reg .b32 %r<6>;
    .reg .b64 %rd<6>;
    .reg .f32 %f<4>;
    ld.param.u64 %rd1, [x];
    ld.param.u32 %r1, [factor];
    ld.param.u64 %rd2, [y];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r2, 128, %r3;
    mul.wide.u32 %rd3, %r4, 4;
    add.u64 %rd4, %rd1, %rd3;
    ld.global.f32 %f1, [%rd4];
    cvt.rn.f32.s32 %f2, %r1;
    mul.f32 %f3, %f1, %f2;
    add.u64 %rd5, %rd2, %rd3;
    st.global.f32 [%rd5], %f3;
    ret;
}
"""


def test_memory_streams_and_events(context: Context) -> None:
    stream, began, ended = context.stream(), context.event(), context.event()
    there, back = context.pinned((1 << 20,), np.int32), context.pinned((1 << 20,), np.int32)
    there.array[:] = np.arange(1 << 20)
    memory = context.allocate(4 << 20, stream)
    began.record(stream)
    stream.upload(memory, there)
    stream.download(back, memory)
    ended.record(stream)
    stream.synchronize()
    np.testing.assert_array_equal(back.array, there.array)
    assert ended.over and 0 < ended.since(began) < 1000


def test_a_launch_and_its_replay(context: Context) -> None:
    kernel, stream = context.load(PTX).function("scale"), context.stream()
    x, y = context.upload(np.arange(256, dtype=np.float32)), context.allocate(1024)
    arguments = [x, np.int32(3), y]
    kernel.launch(stream, (2, 1, 1), 128, arguments)
    stream.synchronize()
    np.testing.assert_array_equal(y.read((256,), np.float32), 3 * np.arange(256))
    with stream.capture() as captured:
        kernel.launch(stream, (2, 1, 1), 128, arguments)
    x.write(np.ones(256, np.float32))
    captured.graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(y.read((256,), np.float32), np.full(256, 3))


def test_a_spoilt_capture_leaves_the_stream_usable(context: Context) -> None:
    stream = context.stream()
    with pytest.raises(CudaError, match="STREAM_CAPTURE"), stream.capture():
        stream.synchronize()
    stream.synchronize()


def test_ptx_of_the_future_is_explained(context: Context) -> None:
    with pytest.raises(GraphoptError, match=r"the driver is too old: this PTX is of ISA 99\.9"):
        context.load(PTX.replace("7.0", "99.9", 1))
    with pytest.raises(GraphoptError, match="refuses the PTX"):
        context.load(PTX.replace("mul.f32", "mull.f32"))


def test_torch_takes_our_arrays_and_gives_its_own(context: Context) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    stream = context.stream()
    array = arrays.allocate(context, (4, 5), np.float16, stream)
    context.library.call("cuMemsetD8Async", array.pointer, 0, array.nbytes, stream.handle)
    tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == array.pointer and tensor.shape == (4, 5) and not tensor.any()
    tensor += 2
    taken = arrays.take(context, tensor, stream)
    stream.synchronize()
    assert taken.pointer == tensor.data_ptr()
    np.testing.assert_array_equal(taken.numpy(), np.full((4, 5), 2))
    with pytest.raises(GraphoptError, match="not in C order"):
        arrays.take(context, tensor.T, stream)
