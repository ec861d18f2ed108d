"""The kit's primitives, emulated, against numpy and against the layouts that the PTX documentation gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from graphopt.kernels.emulate import EmulatedModule, emulate, find_compiler
from graphopt.kernels.kernel import Kernel, Launch, Parameter

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler to emulate kernels with")

Array = npt.NDArray[Any]
SOURCES = Path(__file__).parent / "sources"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _kernel(
    name: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    *,
    threads: int = 32,
    blocks: int = 1,
    scalars: dict[str, int] | None = None,
) -> Kernel:
    scalars = scalars or {}
    parameters = (
        *(Parameter(key, "input", dtype) for key, dtype in inputs.items()),
        *(Parameter(key, "scalar", "int32") for key in scalars),
        *(Parameter(key, "output", dtype) for key, dtype in outputs.items()),
    )
    launch = Launch((blocks, 1, 1), tuple(scalars.values()))
    return Kernel(name, SOURCES / "primitives.cu", parameters, threads, lambda _: launch)


def test_every_half_and_bfloat16_becomes_the_float_it_is() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    kernel = _kernel(
        "halves_to_floats",
        {"x": "float16", "z": "bfloat16"},
        {"from_half": "float32", "from_bfloat16": "float32"},
        threads=128,
        blocks=512,
    )
    halves, bfloats = bits.view(np.float16), bits.view(BFLOAT16)
    from_half, from_bfloat16 = emulate(kernel, [halves, bfloats], [((65536,), "float32")] * 2)
    np.testing.assert_array_equal(from_half, halves.astype(np.float32))
    np.testing.assert_array_equal(from_bfloat16, bfloats.astype(np.float32))
    assert np.signbit(from_half[0x8000]) and np.signbit(from_bfloat16[0x8000])


def _floats_to_convert() -> Array:
    """All halves and bfloat16 values, the ties between neighbours, what lies next to each, and the extremes."""
    bits = np.arange(65536, dtype=np.uint16)
    values = []
    for exact in (bits.view(np.float16).astype(np.float32), bits.view(BFLOAT16).astype(np.float32)):
        finite = exact[np.isfinite(exact)]
        with np.errstate(over="ignore"):
            ties = (finite[1:] / 2 + finite[:-1] / 2).astype(np.float32)
        values += [finite[::7], ties[::5], np.nextafter(ties, np.float32(np.inf))[::11], -np.nextafter(ties, 0)[::13]]
    extremes = [
        np.inf,
        -np.inf,
        65504,
        65519.996,
        65520,
        -65520,
        3.4e38,
        1e-45,
        2**-25,
        2**-24,
        1.5 * 2**-24,
        0.5,
        -2.5,
    ]
    return np.concatenate([*values, np.array(extremes, np.float32), np.arange(-300, 300, 0.25).astype(np.float32)])


def test_floats_round_to_the_nearest_even() -> None:
    x = _floats_to_convert()
    names = {"halves": "float16", "bfloats": "bfloat16", "bytes": "int8"}
    kernel = _kernel(
        "floats_to_less", {"x": "float32"}, names, threads=128, blocks=-(-x.size // 128), scalars={"count": x.size}
    )
    halves, bfloats, eights = emulate(kernel, [x], [(x.shape, dtype) for dtype in names.values()])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(halves.view(np.uint16), x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(bfloats.view(np.uint16), x.astype(BFLOAT16).view(np.uint16))
    np.testing.assert_array_equal(eights, np.clip(np.rint(x), -128, 127).astype(np.int8))


def test_no_number_stays_no_number() -> None:
    x = np.array([np.nan, -np.nan], np.float32)
    names = {"halves": "float16", "bfloats": "bfloat16", "bytes": "int8"}
    kernel = _kernel("floats_to_less", {"x": "float32"}, names, threads=128, scalars={"count": 2})
    halves, bfloats, eights = emulate(kernel, [x], [((2,), dtype) for dtype in names.values()])
    assert np.isnan(halves).all() and np.isnan(bfloats.astype(np.float32)).all() and not eights.any()


# PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... m16n8k32": element i of a lane's fragment.
def _a_place(lane: int, i: int, width: int) -> tuple[int, int]:
    """Row and column of A; width elements fill a register."""
    group, within = lane // 4, lane % 4
    row = group + 8 * (i // width % 2)
    return row, within * width + i % width + 4 * width * (i // (2 * width))


def _b_place(lane: int, i: int, width: int) -> tuple[int, int]:
    """Row (along the sum) and column of B."""
    return lane % 4 * width + i % width + 4 * width * (i // width), lane // 4


def _c_place(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2


def _fragments(matrix: Array, place: Any, elements: int, *width: int) -> Array:
    lanes = [[matrix[place(lane, i, *width)] for i in range(elements)] for lane in range(32)]
    return np.array(lanes, matrix.dtype)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_mma_of_16_bit_floats(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    kernel = _kernel(
        "fragments",
        {"a": "int32", "b": "int32", "c0": "float32"},
        {"c": "float32"},
        scalars={"brain": int(dtype == BFLOAT16)},
    )
    words = [_fragments(a, _a_place, 8, 2).view(np.int32), _fragments(b, _b_place, 4, 2).view(np.int32)]
    (result,) = emulate(kernel, [*words, _fragments(c, _c_place, 4)], [((32, 4), "float32")])
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(result, _fragments(expected, _c_place, 4), rtol=1e-6, atol=1e-6)


def test_mma_of_int8_is_exact_and_wraps() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (32, 8)).astype(np.int8)
    c = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    kernel = _kernel("fragments_s8", {"a": "int32", "b": "int32", "c0": "int32"}, {"c": "int32"})
    words = [_fragments(a, _a_place, 16, 4).view(np.int32), _fragments(b, _b_place, 8, 4).view(np.int32)]
    (result,) = emulate(kernel, [*words, _fragments(c, _c_place, 4)], [((32, 4), "int32")])
    expected = (a.astype(np.int64) @ b.astype(np.int64) + c).astype(np.int32)
    np.testing.assert_array_equal(result, _fragments(expected, _c_place, 4))


@pytest.mark.parametrize("seed", range(4))
def test_product_by_load_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-9, 9, (16, 16)).astype(np.float16), rng.integers(-9, 9, (8, 16)).astype(np.float16)
    kernel = _kernel(
        "tiny_product", {"x": "float16", "w": "float16", "transposed": "float16"}, {"y": "float32", "again": "float32"}
    )
    y, again = emulate(kernel, [x, w, np.ascontiguousarray(w.T)], [((16, 8), "float32")] * 2, seed=seed)
    expected = x.astype(np.float32) @ w.astype(np.float32).T
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("valid", [0, 2, 14, 16])
def test_shuffles_partial_copies_and_words(valid: int) -> None:
    x = np.arange(64, dtype=np.float16)
    kernel = _kernel(
        "small_things",
        {"x": "float16"},
        {"sum": "float32", "copied": "float16", "swapped": "float16"},
        scalars={"valid": valid},
    )
    total, copied, swapped = emulate(kernel, [x], [((32,), "float32"), ((8,), "float16"), ((64,), "float16")])
    np.testing.assert_array_equal(total, np.full(32, x[:32].sum(), np.float32))
    np.testing.assert_array_equal(copied, np.where(np.arange(8) < valid // 2, x[:8], 0))
    np.testing.assert_array_equal(swapped, x.reshape(32, 2)[:, ::-1].ravel())


def test_memory_of_the_module_is_kept_until_reset() -> None:
    kernel = _kernel("remembers", {"x": "float16"}, {"y": "int32"}, blocks=7)
    module, inputs = EmulatedModule(kernel), [np.zeros(1, np.float16)]
    counts = [int(module.launch(inputs, [((1,), "int32")], seed=seed)[0][0]) for seed in range(3)]
    assert counts == [1, 2, 3]
    assert module.state["launches"].view(np.int32)[0] == 3
    module.state["launches"].view(np.int32)[0] = 41
    assert module.launch(inputs, [((1,), "int32")])[0][0] == 42
    module.reset()
    assert module.launch(inputs, [((1,), "int32")])[0][0] == 1
    # Another module of the same kernel has memory of its own.
    assert emulate(kernel, inputs, [((1,), "int32")])[0][0] == 1
    assert module.launch(inputs, [((1,), "int32")])[0][0] == 2
