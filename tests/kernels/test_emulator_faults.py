"""Each fault that the emulator promises to find, in a kernel that has it; and kernels without, that it lets pass."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import BadInput, GraphoptError, MissingDependency
from graphopt.kernels import host_compiler
from graphopt.kernels.emulate import STEPS, EmulatedModule, EmulationError, Work, emulate, find_compiler
from graphopt.kernels.kernel import Kernel, Launch, Parameter

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler to emulate kernels with")

SOURCE = Path(__file__).parent / "sources" / "faults.cu"
FAULTS = re.findall(r"^    ([A-Z0-9_]+),", SOURCE.read_text(), re.MULTILINE)
X = np.arange(128, dtype=np.float16)
OUTPUTS = [((128,), "float16"), ((128,), "int32")]
PARAMETERS = (
    Parameter("x", "input", "float16"),
    Parameter("fault", "scalar", "int32"),
    Parameter("one", "scalar", "int32"),
    Parameter("y", "output", "float16"),
    Parameter("counts", "output", "int32"),
)

MESSAGES = {
    "READS_BEFORE_BARRIER": r"race: reads element \d+ of tile, .*no barrier|shared tile, which nothing wrote",
    "WRITES_WHAT_IS_READ": r"race: (writes element \d+ of tile, which thread \d+.* may still read|reads element)",
    "WARP_SYNC_FOR_BARRIER": r"race: reads element \d+ of tile|shared tile, which nothing wrote",
    "TWO_WRITERS_SHARED": r"race: writes element \d+ of tile, which thread \d+ of the same block wrote",
    "UNINITIALISED_SHARED": r"reads element 63 of shared tile, which nothing wrote",
    "HALF_OF_A_BLOCK_AT_BARRIER": r"divergent: waits at sync_block, but thread \d+ has returned",
    "TWO_BARRIERS": r"divergent: waits at sync_block, but thread \d+ at sync_block of line \d+",
    "RETURNED_BEFORE_BARRIER": r"divergent: waits at sync_block, but thread 63 has returned",
    "HALF_OF_A_WARP_SHUFFLES": r"divergent: waits at shuffle_xor, but thread \d+ has returned",
    "TWO_SHUFFLES": r"divergent: waits at shuffle_xor, but thread \d+ at shuffle_xor of line \d+",
    "TWO_MASKS": r"divergent: shuffle_xor by 1, but thread \d+ by 2",
    "READ_PAST_END": r"block \(1, 0, 0\), thread 63: reads element 128 of x, which has 128",
    "READ_BEFORE_START": r"block \(0, 0, 0\), thread 0: reads element -1 of x, which has 128",
    "WRITE_PAST_END": r"block \(1, 0, 0\), thread 63: writes element 128 of y, which has 128|race",
    "SHARED_READ_PAST_END": r"thread 63: reads element 64 of tile, which has 64",
    "SHARED_WRITE_BEFORE_START": r"thread 0: writes element -1 of tile, which has 64|race",
    "LOAD16_PAST_END": r"reads bytes 256 to 271 of x, which has 256",
    "STORE16_PAST_END": r"writes bytes 256 to 271 of y, which has 256",
    "COPY_PAST_END": r"thread 1: reads element 128 of x, which has 128",
    "COPY_PAST_SHARED": r"writes bytes 128 to 143 of tile, which has 128",
    "MATRIX_PAST_END": r"thread \d+: reads bytes 1024 to 1039 of rows, which has 1024",
    "PREFETCH_PAST_END": r"prefetches element 128 of x",
    "THROUGH_L2_PAST_END": r"reads element 128 of x, which has 128",
    "MISALIGNED_LOAD16": r"misaligned: byte 2 of x is no multiple of 16",
    "MISALIGNED_STORE16": r"misaligned: byte 2 of y is no multiple of 16",
    "MISALIGNED_VIEW": r"misaligned: byte 2 of x is no multiple of 4",
    "MISALIGNED_COPY": r"misaligned: byte 2 of x is no multiple of 16",
    "MISALIGNED_COPY_TO": r"misaligned: byte 2 of rows is no multiple of 16",
    "MISALIGNED_MATRIX": r"misaligned: byte \d+ of rows is no multiple of 16",
    "COPY_OF_17_BYTES": r"async_copy of 17 bytes: 0 to 16 can be valid",
    "COPY_NOT_WAITED_FOR": r"reads element \d+ of rows, which an async_copy that was not waited for",
    "COPY_NOT_COMMITTED": r"reads element \d+ of rows, which an async_copy that was not waited for",
    "COPY_WAITED_FOR_TOO_FEW": r"reads element \d+ of rows, which an async_copy that was not waited for",
    "COPY_READ_BY_OTHERS": r"race: reads element \d+ of rows|which nothing wrote",
    "COPY_OVER_WHAT_IS_READ": r"(async_copy writes element \d+ of rows.* may still read|reads element \d+ of rows)",
    "OUTPUT_NOT_WRITTEN": r"1 of the 128 elements of the output y were never written, the first is element 77",
    "OUTPUT_READ_FIRST": r"reads element \d+ of the output y before anything wrote it",
    "TWO_WRITERS_IN_BLOCK": r"race: writes element \d+ of counts, which thread \d+ of the same block wrote",
    "TWO_WRITERS": r"race: writes element \d+ of counts, which thread \d+ of (a )?block .* nothing orders the two",
    "SUM_OVERFLOWS": r"an integer sum overflows",
    "PRODUCT_OVERFLOWS": r"an integer product overflows",
    "DIVISION_BY_ZERO": r"an integer division by zero",
    "SHIFT_TOO_FAR": r"a shift by more bits than there are",
    "LOCAL_ARRAY_PAST_END": r"an index outside of its array",
    "FLOAT_TOO_LARGE": r"a float does not fit the integer",
    "NEVER_COMES": r"deadlock: all threads of the \d blocks that run wait for others",
    "ENDLESS_WITH_BARRIERS": r"no end in sight after \d+ switches",
    "ENDLESS_WITH_READS": r"no end in sight after \d+ steps",
    "ENDLESS_WITH_NOTHING": r"no end in sight after \d+ steps",
    "TOO_MUCH_SHARED": r"more than 49152 bytes of shared memory",
}
RIGHT = ["RIGHT", "WARP_SYNC_WITHIN_WARPS"]


def _kernel(fault: str, source: Path = SOURCE) -> Kernel:
    launch = Launch((2, 1, 1), (FAULTS.index(fault), 1))
    return Kernel("faults", source, PARAMETERS, 64, lambda _: launch)


def _run(fault: str, seed: int, resident: int | None = None) -> list[np.ndarray]:
    steps = 200_000 if fault.startswith("ENDLESS") else STEPS
    module = EmulatedModule(_kernel(fault))
    return module.launch_together([Work([X], OUTPUTS)], seed=seed, resident=resident, steps=steps)[0]


def test_every_fault_of_the_source_is_tried() -> None:
    assert set(FAULTS) == set(MESSAGES) | set(RIGHT)


@pytest.mark.parametrize("fault", MESSAGES)
def test_fault_is_found_whatever_the_schedule(fault: str) -> None:
    seeds = range(2) if fault.startswith(("ENDLESS", "NEVER")) else range(10)
    for seed in seeds:
        with pytest.raises(EmulationError, match=MESSAGES[fault]) as raised:
            _run(fault, seed)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith("faults.cu")


@pytest.mark.parametrize("fault", RIGHT)
def test_right_kernels_pass_whatever_the_schedule(fault: str) -> None:
    for seed in range(20):
        y, counts = _run(fault, seed)
        if fault == "RIGHT":
            np.testing.assert_array_equal(y, X.reshape(2, 64)[:, ::-1].ravel())
        else:
            np.testing.assert_array_equal(y, X.reshape(4, 32)[:, ::-1].ravel())
        assert (counts == FAULTS.index(fault)).all()


def test_error_names_source_line_block_and_thread() -> None:
    with pytest.raises(EmulationError) as raised:
        _run("READ_PAST_END", 0)
    error, lines = raised.value, SOURCE.read_text().splitlines()
    assert (error.block, error.thread) == ((1, 0, 0), 63)
    assert error.line is not None and "x[i + one]" in lines[error.line - 1]
    assert str(error).startswith(f"faults.cu:{error.line}, block (1, 0, 0), thread 63: ")
    assert error.exit_code == 1
    for fault, text in (("SUM_OVERFLOWS", "2147483647"), ("UNINITIALISED_SHARED", "tile[thread()]")):
        with pytest.raises(EmulationError) as raised:
            _run(fault, 0)
        assert raised.value.line is not None and text in lines[raised.value.line - 1]


def test_same_seed_same_fate() -> None:
    def message(seed: int) -> str:
        with pytest.raises(EmulationError) as raised:
            _run("TWO_WRITERS_SHARED", seed)
        return str(raised.value)

    assert len({message(5) for _ in range(3)}) == 1
    assert len({message(seed) for seed in range(12)}) > 3  # seeds differ


def test_a_failed_launch_leaves_nothing_behind() -> None:
    module = EmulatedModule(_kernel("RIGHT"))
    expected = module.launch([X], OUTPUTS, seed=3)[0]
    with pytest.raises(EmulationError):
        _run("TWO_BARRIERS", 3)
    np.testing.assert_array_equal(module.launch([X], OUTPUTS, seed=3)[0], expected)


def test_source_may_be_any_changed_copy(tmp_path: Path) -> None:
    text = SOURCE.read_text()
    broken = text.replace(
        "value = tile[63 - thread()];\n                sync_block();", "value = tile[63 - thread()];", 1
    )
    assert broken != text
    copy = tmp_path / "changed.cu"
    copy.write_text(broken)
    for seed in range(10):
        with pytest.raises(EmulationError, match=r"changed.cu:\d+.*race"):
            emulate(_kernel("RIGHT", copy), [X], OUTPUTS, seed=seed)


def test_what_does_not_compile_is_one_line(tmp_path: Path) -> None:
    copy = tmp_path / "wrong.cu"
    copy.write_text(SOURCE.read_text().replace("half value = x[i];", "half value = z[i];"))
    with pytest.raises(
        GraphoptError, match=r"wrong.cu: does not compile .* wrong.cu:\d+: ‘?'?z.* not declared"
    ) as raised:
        EmulatedModule(_kernel("RIGHT", copy))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("GLOBAL(const half) x", "GLOBAL(half) x", "convert"),  # inputs are const
        ("y[i] = value;\n    counts[i] = fault;", "x[i] = value;", "discards qualifiers"),
        ("int one, GLOBAL(half) y", "int one, GLOBAL(bfloat16) y", "."),  # not the Kernel's dtype
        ("half value = x[i];", "half unset;\n    half value = one ? unset : x[i];", "uninitialized"),
        (
            "half value = x[i];",
            "int large[20000];\n    for (int& one : large) one = x[i].bits;\n    half value = x[large[fault]];",
            "frame size",
        ),
    ],
)
def test_what_the_compiler_finds(old: str, new: str, what: str, tmp_path: Path) -> None:
    copy = tmp_path / "wrong.cu"
    text = SOURCE.read_text()
    assert old in text
    copy.write_text(text.replace(old, new))
    with pytest.raises(GraphoptError, match=what):
        EmulatedModule(_kernel("RIGHT", copy))


def test_arrays_have_to_fit_the_parameters() -> None:
    kernel = _kernel("RIGHT")
    with pytest.raises(BadInput, match="kernel faults: x is float32, but has to be float16"):
        emulate(kernel, [X.astype(np.float32)], OUTPUTS)
    with pytest.raises(BadInput, match="2 inputs for the 1"):
        emulate(kernel, [X, X], OUTPUTS)
    with pytest.raises(BadInput, match="1 outputs for the 2"):
        emulate(kernel, [X], OUTPUTS[:1])
    with pytest.raises(BadInput, match="counts is int8, but has to be int32"):
        emulate(kernel, [X], [OUTPUTS[0], ((128,), "int8")])
    wrong = Kernel("faults", SOURCE, PARAMETERS, 64, lambda _: Launch((2, 1, 1), (0,)))
    with pytest.raises(BadInput, match="1 scalars of its launch for the 2"):
        emulate(wrong, [X], OUTPUTS)


@pytest.mark.parametrize(("threads", "grid", "what"), [(48, (2, 1, 1), "48 threads"), (64, (0, 1, 1), "a grid of 0")])
def test_launches_that_no_gpu_takes(threads: int, grid: tuple[int, int, int], what: str) -> None:
    kernel = Kernel("faults", SOURCE, PARAMETERS, threads, lambda _: Launch(grid, (0, 1)))
    with pytest.raises(EmulationError, match=what):
        emulate(kernel, [X], OUTPUTS)


def test_no_compiler_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(MissingDependency, match="needs a C\\+\\+ compiler"):
        EmulatedModule(_kernel("RIGHT"))


def test_cache_is_kept_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EmulatedModule(_kernel("RIGHT"))
    compiled = list(host_compiler.library_folder().glob("*.o"))  # the emulator itself, which takes longest
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(host_compiler, "_MOST_KEPT", 4)
    folder = host_compiler.library_folder()
    assert folder.is_relative_to(tmp_path)
    for path in compiled:
        shutil.copy(path, folder)
    emulate(_kernel("RIGHT"), [X], OUTPUTS)
    (library,) = folder.glob("*.so")
    emulate(_kernel("RIGHT"), [X], OUTPUTS)
    assert [library] == list(folder.glob("*.so"))
    assert not [path for path in folder.iterdir() if path.suffix not in (".so", ".o")]
    for number in range(6):
        (folder / f"old{number}.so").touch()
    copy = tmp_path / "copy.cu"
    copy.write_text(SOURCE.read_text())
    emulate(_kernel("RIGHT", copy), [X], OUTPUTS)
    assert len(list(folder.glob("*.so"))) <= 4


def test_dynamic_shared_memory_is_as_large_as_the_kernel_says(tmp_path: Path) -> None:
    source = tmp_path / "dynamic.cu"
    source.write_text(
        """#include "kit.h"
        KERNEL(64) void faults(GLOBAL(const half) x, int fault, int one, GLOBAL(half) y, GLOBAL(int) counts) {
            SHARED_DYNAMIC(half, tile);
            tile[thread()] = x[block_x() * 64 + thread()];
            sync_block();
            y[block_x() * 64 + thread()] = tile[63 - thread()];
            counts[block_x() * 64 + thread()] = 0;
        }"""
    )
    kernel = _kernel("RIGHT", source)
    for seed in range(3):
        y, _ = emulate(replace(kernel, shared=128), [X], OUTPUTS, seed=seed)
        np.testing.assert_array_equal(y, X.reshape(2, 64)[:, ::-1].ravel())
    with pytest.raises(EmulationError, match="writes element 63 of the dynamic shared memory, which has 63"):
        emulate(replace(kernel, shared=126), [X], OUTPUTS)
    with pytest.raises(EmulationError, match="more than 49152 bytes of shared memory"):
        emulate(replace(kernel, shared=49153), [X], OUTPUTS)


def test_headers_beside_the_source_count(tmp_path: Path) -> None:
    source, header = tmp_path / "with.cu", tmp_path / "beside.h"
    source.write_text(
        SOURCE.read_text().replace('"kit.h"', '"kit.h"\n#include "beside.h"').replace("= fault;", "= FOUND;")
    )
    for found in (3, 4):
        header.write_text(f"#define FOUND {found}\n")
        _, counts = emulate(_kernel("RIGHT", source), [X], OUTPUTS)
        assert (counts == found).all()
