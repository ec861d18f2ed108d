"""Every kernel on a real GPU, launched as TensorRT launches it, against the definition and against the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.gpu.context import Context
from graphopt.kernels.compile import ARCHITECTURES, compile_ptx
from graphopt.kernels.emulate import emulate, find_compiler
from graphopt.kernels.launch import LoadedKernel, architecture_of
from graphopt.selftesting import products
from graphopt.selftesting.kernels import run_all

pytestmark = pytest.mark.gpu


def test_every_kernel_gives_the_right_numbers(context: Context) -> None:
    found = list(run_all(context, small=False, say=lambda what: None))
    assert len(found) > 40
    assert [f"{one.kernel} {one.dtype} {one.tactic}: {one.detail}" for one in found if one.status != "ok"] == []


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_the_emulator_reads_the_fragments_as_the_hardware_does(context: Context) -> None:
    """Sums of whole numbers have one value: what the emulator and the GPU make of them must agree to the bit."""
    rng = np.random.default_rng(0)
    for group in products.groups(small=True):
        kernel = group.kernels[1]
        wanted = group.samples[1]
        inputs = [
            rng.integers(-1, 2, array.shape).astype(array.dtype) if array.dtype.itemsize < 4 else np.ones_like(array)
            for array in wanted.inputs
        ]
        here = LoadedKernel(context, kernel).run(inputs, wanted.outputs)
        there = emulate(kernel, inputs, wanted.outputs)
        assert [array.tobytes() for array in here] == [array.tobytes() for array in there], group.dtype


def test_ptx_for_older_gpus_runs_too(context: Context) -> None:
    group = next(iter(products.groups(small=True)))
    newest = architecture_of(context.device)
    for architecture in ARCHITECTURES[: ARCHITECTURES.index(newest) + 1]:
        loaded = LoadedKernel(context, group.kernels[1], compile_ptx(group.kernels[1], architecture))
        for sample in group.samples:
            assert sample.worst(loaded.run(sample.inputs, sample.outputs)) <= 1


def test_launches_at_the_same_time_do_not_disturb_each_other(context: Context) -> None:
    """The pivot kernels keep a table on the GPU; two streams use it at once."""
    from graphopt.gpu import arrays
    from graphopt.plugins.pivot_linear.kernels import kernels_for
    from graphopt.plugins.pivot_linear.samples import sample

    made = sample("row", "float16", (16,), (512, 256, 768))
    loaded = LoadedKernel(context, kernels_for("row", "float16")[1])
    streams = [context.stream() for _ in range(4)]
    inputs = [arrays.upload(context, array) for array in made.inputs]
    outputs = [[arrays.allocate(context, *spec) for spec in made.outputs] for _ in streams]
    calls = [loaded.prepare(stream, inputs, own) for stream, own in zip(streams, outputs, strict=True)]
    for _ in range(200):
        for call in calls:
            call()
    context.synchronize()
    for own in outputs:
        assert made.worst([array.numpy() for array in own]) <= 1
