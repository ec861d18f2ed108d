"""PivotLinear's CUDA kernels, emulated, against what the op computes by definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import BadInput
from graphopt.kernels.compile import compile_ptx, find_nvrtc
from graphopt.kernels.contract import check
from graphopt.kernels.emulate import EmulatedModule, EmulationError, Work, find_compiler, numpy_dtype
from graphopt.kernels.kernel import ARCHITECTURES, Kernel
from graphopt.plugins.pivot_linear import column_form, row_form
from graphopt.plugins.pivot_linear.function import Form
from graphopt.plugins.pivot_linear.kernels import (
    DTYPES,
    FORMS,
    NAMES,
    kernel_of,
    kernels,
    kernels_for,
    positions_of,
    tactics_for,
)

Array = npt.NDArray[Any]
Order = Literal["identity", "random", "pivots last", "shifted"]
ORDERS: tuple[Order, ...] = ("identity", "random", "pivots last", "shifted")
ALL = [(form, dtype, tactic) for form in FORMS for dtype in DTYPES for tactic in tactics_for(dtype)]
# Each tactic of a 16-bit type, and each type.
FAST = [
    (form, dtype, tactic)
    for form, dtype, tactic in ALL
    if dtype == "float16" or (dtype == "bfloat16" and tactic == 1) or (dtype == "float32" and tactic in (1, 3))
]
ROWS = (1, 2, 7, 8, 9, 16, 17, 40)
# The channels that are not pivoted, the rank, and those that are.
SHAPES = (
    (1, 1, 1),
    (1, 1, 2),
    (7, 3, 5),
    (8, 8, 8),
    (8, 8, 16),
    (40, 16, 16),
    (37, 19, 41),
    (64, 24, 56),
    (97, 31, 67),
    (264, 136, 152),
    (1096, 40, 72),
    (41, 1096, 1144),
)
# Half of the distance from 1 to the next number, and half of the smallest one.
UNITS = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134), "float32": (2.0**-24, 2.0**-150)}
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
needs_nvrtc = pytest.mark.skipif(find_nvrtc("nvidia-cuda-nvrtc-cu12") is None, reason="NVRTC is not installed")


@dataclass(frozen=True)
class Case:
    """A launch of a kernel.

    Attributes:
        form: Of the op.
        x: (..., n).
        kept, coefficients, bias, positions: As the kernel takes them.
    """

    form: Form
    x: Array
    kept: Array
    coefficients: Array
    bias: Array
    positions: Array

    @property
    def dtype(self) -> str:
        return str(self.x.dtype)

    @property
    def rank(self) -> int:
        return int(self.kept.shape[0] if self.form == "row" else self.kept.shape[1])

    @property
    def inputs(self) -> list[Array]:
        return [self.x, self.kept, self.coefficients, self.bias, self.positions]

    @property
    def outputs(self) -> list[tuple[tuple[int, ...], str]]:
        return [((*self.x.shape[:-1], size), self.dtype) for size in (len(self.bias), self.rank)]

    @property
    def wide(self) -> tuple[Array, Array, Array, Array]:
        """x, kept, coefficients and bias in float64."""
        return tuple(array.astype(np.float64) for array in self.inputs[:4])  # type: ignore[return-value]

    def by_definition(self) -> Array:
        """y in float64."""
        return (row_form if self.form == "row" else column_form)(*self.wide[:3], self.positions, self.wide[3])

    def with_rounding(self) -> tuple[Array, Array]:
        """y and inner where nothing but these two is rounded, in the kernel's dtype."""
        x, kept, coefficients, bias = self.wide
        r, dtype = self.rank, numpy_dtype(self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.form == "row":
                pivots = x @ kept.T
                inner = _rounded(pivots, dtype)
                y = np.empty((*x.shape[:-1], len(bias)))
                y[..., self.positions] = np.concatenate([pivots, inner.astype(np.float64) @ coefficients.T], axis=-1)
            else:
                ordered = x[..., self.positions]
                inner = _rounded(ordered[..., :r] + ordered[..., r:] @ coefficients.T, dtype)
                y = inner.astype(np.float64) @ kept.T
            return _rounded(y + bias, dtype), inner

    def allowed(self) -> tuple[Array, Array]:
        """How far y and inner may be from their definitions: a bound, not a guess.

        With u = the dtype's rounding unit and e = 2^-23, which is twice that of float32 since tensor cores cut off what
        they add: a sum of k products is off by at most (k + 2) e times the sum of their magnitudes (products of 16-bit
        numbers are exact, those of float32 are not), and rounding it by u times its own magnitude, or by half of the
        smallest number that the dtype has. What inner is off by goes through the second product.
        """
        x, kept, coefficients, bias = (np.abs(array) for array in self.wide)
        r, e = self.rank, 2.0**-23
        u, smallest = UNITS[self.dtype]

        def off(magnitude: Array, terms: int, inherited: Array | float = 0.0) -> Array:
            summed = inherited + (terms + 2) * e * (magnitude + inherited)
            return np.asarray(summed + u * (magnitude + summed) + smallest)

        if self.form == "row":
            pivots = x @ kept.T
            inner_off = off(pivots, x.shape[-1])
            others = off(
                (pivots + inner_off) @ coefficients.T + bias[self.positions[r:]], r + 1, inner_off @ coefficients.T
            )
            y_off = np.empty((*x.shape[:-1], len(bias)))
            first = off(pivots + bias[self.positions[:r]], x.shape[-1] + 1)
            y_off[..., self.positions] = np.concatenate([first, others], axis=-1)
            return y_off, inner_off
        ordered = x[..., self.positions]
        inner = ordered[..., :r] + ordered[..., r:] @ coefficients.T
        inner_off = off(inner, x.shape[-1] - r + 1)
        return off((inner + inner_off) @ kept.T + bias, r + 1, inner_off @ kept.T), inner_off


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    # By way of float32, as the kernel: the sums of a test that asks for each bit are exact there.
    return values.astype(np.float32).astype(dtype)


def _order(kind: Order, channels: int, r: int, rng: np.random.Generator) -> Array:
    if kind == "random":
        return rng.permutation(channels)
    order = np.arange(channels)
    if kind == "pivots last":
        return np.roll(order, r)
    if kind == "shifted" and r < channels:  # the others are in order, from a place that is not a multiple of 8 on
        return np.concatenate([order[: r - 1], order[-1:], order[r - 1 : -1]])
    return order


def _case(
    form: Form,
    dtype: str,
    leading: Sequence[int],
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    order: Order = "random",
    whole: bool = True,
) -> Case:
    """Whole numbers that float32 adds up exactly in any order, or normal ones.

    Args:
        form, dtype: Of the kernel.
        leading: The leading axes of x.
        shape: Channels that are not pivoted, the rank, channels that are.
        seed: Of what is drawn.
        order: Of the pivoted channels.
        whole: Which numbers.
    """
    rng = np.random.default_rng([seed, *shape])
    plain, r, pivoted = shape

    def draw(*sizes: int, most: int = 8) -> Array:
        drawn = rng.integers(-most, most + 1, sizes) if whole else rng.standard_normal(sizes)
        return drawn.astype(np.float32).astype(numpy_dtype(dtype))

    x = draw(*leading, plain if form == "row" else pivoted)
    kept = draw(r, plain) if form == "row" else draw(plain, r, most=2)
    coefficients = draw(pivoted - r, r, most=2) if form == "row" else draw(r, pivoted - r)
    bias = draw(pivoted if form == "row" else plain, most=100)
    return Case(form, x, kept, coefficients, bias, _order(order, pivoted, r, rng).astype(np.int32))


def _launch(module: EmulatedModule, case: Case, **options: Any) -> tuple[Array, Array]:
    y, inner = module.launch(case.inputs, case.outputs, **options)
    for name in ("tickets", "finished"):
        assert not module.state[name].any(), f"{name} are left for the next launch"
    return y, inner


def _same(case: Case, found: tuple[Array, Array]) -> None:
    for name, array, wanted in zip(("y", "inner"), found, case.with_rounding(), strict=True):
        np.testing.assert_array_equal(array.astype(np.float64), wanted.astype(np.float64), err_msg=name)


def _close(case: Case, found: tuple[Array, Array]) -> None:
    inner = case.with_rounding()[1]
    for name, array, wanted, off in zip(
        ("y", "inner"), found, (case.by_definition(), inner.astype(np.float64)), case.allowed(), strict=True
    ):
        error = np.abs(array.astype(np.float64) - wanted)
        assert (error <= off).all(), f"{name}: off by {(error / off).max():.2f} times what is allowed"


# ---- numbers ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(("form", "dtype", "tactic"), FAST)
def test_each_bit_is_right(form: Form, dtype: str, tactic: int) -> None:
    """Whole numbers: every sum is exact, so only the two roundings remain, and those are known."""
    module = EmulatedModule(kernels_for(form, dtype)[tactic])
    for i, shape in enumerate(SHAPES[:-1]):
        for j in range(2):
            order = ORDERS[(i + j) % len(ORDERS)]
            case = _case(form, dtype, [ROWS[(3 * i + 5 * j + tactic) % len(ROWS)]], shape, seed=i, order=order)
            _same(case, _launch(module, case, seed=7 * i + j))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype", "tactic"), ALL)
def test_each_bit_is_right_at_every_shape(form: Form, dtype: str, tactic: int) -> None:
    module = EmulatedModule(kernels_for(form, dtype)[tactic])
    for shape in SHAPES:
        for rows in ROWS:
            for i, order in enumerate(ORDERS):
                case = _case(form, dtype, [rows], shape, seed=rows, order=order)
                _same(case, _launch(module, case, seed=rows + i, resident=(None, 1, 2, 64)[i]))


@needs_compiler
@pytest.mark.parametrize(("form", "dtype", "tactic"), [case for case in FAST if case[2] == 1])
@pytest.mark.parametrize("leading", [(1,), (16,), (2, 3)])
def test_near_the_definition(form: Form, dtype: str, tactic: int, leading: tuple[int, ...]) -> None:
    module = EmulatedModule(kernels_for(form, dtype)[tactic])
    for seed, shape in enumerate(((264, 136, 152), (97, 31, 67), (40, 16, 16))):
        case = _case(form, dtype, leading, shape, seed=seed, whole=False)
        _close(case, _launch(module, case, seed=seed))


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(FAST),
    rows=st.integers(1, 20),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 70)),
    order=st.sampled_from(ORDERS),
    whole=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    resident=st.sampled_from([None, 1, 2, 5]),
)
def test_property_any_sizes(
    kernel: tuple[Form, str, int],
    rows: int,
    sizes: tuple[int, int, int],
    order: Order,
    whole: bool,
    seed: int,
    resident: int | None,
) -> None:
    form, dtype, tactic = kernel
    plain, r, more = sizes
    module = EmulatedModule(kernels_for(form, dtype)[tactic])
    case = _case(form, dtype, [rows], (plain, r, r + more), seed=seed, order=order, whole=whole)
    (_same if whole else _close)(case, _launch(module, case, seed=seed, resident=resident))


@needs_compiler
@pytest.mark.parametrize(("form", "dtype"), [(form, dtype) for form in FORMS for dtype in DTYPES])
def test_no_rows(form: Form, dtype: str) -> None:
    kernel = kernels_for(form, dtype)[1]
    module = EmulatedModule(kernel)
    case = _case(form, dtype, [0], (37, 19, 41))
    assert all(size > 0 for size in kernel.launch([array.shape for array in case.inputs]).grid)
    y, inner = _launch(module, case)
    assert (y.shape, inner.shape) == ((0, len(case.bias)), (0, case.rank))
    assert not module.state["owners"].any()


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(48, 32, 48), (37, 19, 41)])
def test_what_is_not_finite_stays_in_its_row(form: Form, dtype: str, value: float, shape: tuple[int, int, int]) -> None:
    """And there it does what it does in arithmetic: zeros that fill up vectors and tiles turn nothing into NaN."""
    module = EmulatedModule(kernels_for(form, dtype)[1])
    for place in (0, -1):
        case = _case(form, dtype, [3], shape, seed=1)
        case.x[1, place] = value
        y, inner = _launch(module, case)
        _same(case, (y, inner))
        assert np.isfinite(y[[0, 2]].astype(np.float32)).all() and not np.isfinite(y[1].astype(np.float32)).all()


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tactic", [1, 4])
def test_overflow_is_where_rounding_has_it(form: Form, tactic: int) -> None:
    """inner is infinite where it does not fit float16; what is made from it is then infinite or NaN."""
    module = EmulatedModule(kernels_for(form, "float16")[tactic])
    case = _case(form, "float16", [5], (48, 32, 56), seed=2)
    scaled = replace(case, x=case.x * np.float16(1024))
    y, inner = _launch(module, scaled)
    _same(scaled, (y, inner))
    assert not np.isfinite(y).all()
    assert not np.isfinite(inner).all() and np.isfinite(inner).any()


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_inner_is_rounded_before_it_is_multiplied_and_y_once(form: Form) -> None:
    """As in the function body: what follows from inner follows from the inner that was given out."""
    case = _case(form, "bfloat16", [4], (200, 32, 232), seed=3)
    exact = case.by_definition()
    y, inner = case.with_rounding()
    assert (inner.astype(np.float64) != _inner(case)).mean() > 0.2  # the case can tell
    assert (y != _rounded(exact, numpy_dtype("bfloat16"))).any()
    _same(case, _launch(EmulatedModule(kernels_for(form, "bfloat16")[1]), case))


def _inner(case: Case) -> Array:
    x, kept, coefficients, _ = case.wide
    if case.form == "row":
        return x @ kept.T
    ordered = x[..., case.positions]
    return np.asarray(ordered[..., : case.rank] + ordered[..., case.rank :] @ coefficients.T)


@needs_compiler
@pytest.mark.parametrize(("form", "tactic"), [("row", 1), ("column", 1), ("column", 4)])
def test_the_same_bits_whatever_runs_when(form: Form, tactic: int) -> None:
    case = _case(form, "float16", [9], (264, 136, 152), whole=False)
    module = EmulatedModule(kernels_for(form, "float16")[tactic])
    first = _launch(module, case)
    for seed in range(1, 5):
        for one, other in zip(first, _launch(module, case, seed=seed), strict=True):
            np.testing.assert_array_equal(one, other)


# ---- blocks that wait ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("resident", [1, 2, 3, 100])
def test_any_number_of_blocks_at_a_time(form: Form, resident: int) -> None:
    module = EmulatedModule(kernels_for(form, "float16")[2])
    case = _case(form, "float16", [5], (70, 70, 140))
    for seed in range(4):
        _same(case, _launch(module, case, seed=seed, resident=resident))


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_addresses_than_slots(form: Form, dtype: str) -> None:
    """Launches that find no slot compute the same, and those that have one keep it."""
    module = EmulatedModule(kernel_of(form, dtype, tactics_for(dtype)[2], slots=3))
    for number in range(14):
        shape = SHAPES[2 + number % 7]
        case = _case(form, dtype, [ROWS[number % len(ROWS)]], shape, seed=number, order=ORDERS[number % 4])
        _same(case, _launch(module, case, seed=number, instance=number % 7))
        owners = module.state["owners"].view(np.uint64)
        assert np.count_nonzero(owners) == min(number % 7 + 1 if number < 7 else 7, 3)
        assert len(set(owners.tolist())) == min(number + 2, 4) if number < 2 else len(set(owners.tolist())) == 3


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [2, 4096])
def test_launches_at_the_same_time(form: Form, slots: int) -> None:
    """Three of them, with slots for all or for two."""
    tactic = tactics_for("float16")[2]
    module = EmulatedModule(kernel_of(form, "float16", tactic, slots=slots))
    for seed in range(6):
        cases = [_case(form, "float16", [3 + i], SHAPES[4 + i], seed=seed + i) for i in range(3)]
        works = [Work(case.inputs, case.outputs, instance) for instance, case in enumerate(cases)]
        for case, (y, inner) in zip(cases, module.launch_together(works, seed=seed), strict=True):
            _same(case, (y, inner))
        assert not module.state["tickets"].any() and not module.state["finished"].any()
        assert np.count_nonzero(module.state["owners"].view(np.uint64)) == min(slots, 3)


@needs_compiler
def test_a_launch_that_was_cut_off_is_found_out() -> None:
    """Counters that are not zero are what `_launch` looks for: with them, blocks would wait for ever."""
    module = EmulatedModule(kernels_for("row", "float16")[2])
    case = _case("row", "float16", [1], (16, 32, 64))
    _launch(module, case)
    slot = int(np.flatnonzero(module.state["owners"].view(np.uint64))[0])
    module.state["tickets"].view(np.uint32)[slot] = 2
    with pytest.raises(EmulationError):
        module.launch(case.inputs, case.outputs)


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("garbage", [-1, -(2**31), 2**31 - 1, None])
@pytest.mark.parametrize("shape", [(48, 32, 64), (37, 19, 41)])
def test_positions_that_are_none_reach_no_memory(form: Form, garbage: int | None, shape: tuple[int, int, int]) -> None:
    """A build may time a kernel on whatever memory holds. None: the first place that is none."""
    module = EmulatedModule(kernels_for(form, "float16")[1])
    case = _case(form, "float16", [2], shape, order="identity")
    case.positions[-20:] = len(case.positions) if garbage is None else garbage
    if form == "column":
        _launch(module, case)
    else:
        with pytest.raises(EmulationError, match="output y were never written"):
            module.launch(case.inputs, case.outputs)


# ---- the launch ------------------------------------------------------------------------------------------------------


class _Symbol:
    """A size that is known at run time only, as TensorRT has them: an int on the left of an operator is an error."""

    def __init__(self, value: int) -> None:
        self.value = value

    @staticmethod
    def _of(other: _Symbol | int) -> int:
        return other.value if isinstance(other, _Symbol) else other

    def __add__(self, other: _Symbol | int) -> _Symbol:
        return _Symbol(self.value + self._of(other))

    def __sub__(self, other: _Symbol | int) -> _Symbol:
        return _Symbol(self.value - self._of(other))

    def __mul__(self, other: _Symbol | int) -> _Symbol:
        return _Symbol(self.value * self._of(other))

    def __floordiv__(self, other: _Symbol | int) -> _Symbol:
        return _Symbol(self.value // self._of(other))


@pytest.mark.parametrize(("form", "dtype", "tactic"), ALL)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_launch(form: Form, dtype: str, tactic: int, leading: tuple[int, ...]) -> None:
    kernel = kernels_for(form, dtype)[tactic]
    plain, r, pivoted = 37, 19, 61
    case = _case(form, dtype, leading, (plain, r, pivoted))
    n, m = (plain, pivoted) if form == "row" else (pivoted, plain)
    tile = tactics_for(dtype)[tactic].tile
    others = pivoted - r if form == "row" else m
    grid = (-(-r // tile) + -(-others // tile), 1, 1)
    scalars = (int(np.prod(leading)), n, r, m)
    shapes = [array.shape for array in case.inputs]
    launch = kernel.launch(shapes)
    assert (launch.grid, launch.scalars) == (grid, scalars)
    symbolic = kernel.launch([[_Symbol(size) for size in shape] for shape in shapes])
    values = [size.value if isinstance(size, _Symbol) else size for size in (*symbolic.grid, *symbolic.scalars)]
    assert values == [*grid, *scalars]


def test_kernels() -> None:
    found = kernels()
    assert len(found) == len(ALL) == len({kernel.defines for kernel in found})
    for dtype in ("float16", "bfloat16"):
        assert len(tactics_for(dtype)) >= 3
    assert {kernel.name for kernel in found} == set(NAMES.values())
    with pytest.raises(BadInput, match="no kernel for float64"):
        kernels_for("row", "float64")
    with pytest.raises(BadInput, match="no form 'both'"):
        kernels_for("both", "float16")  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 20), seed=st.integers(0, 1000))
def test_property_positions(m: int, seed: int) -> None:
    """A node's y is Gather of [K; C K] x by its order (row); its Gather of x by it has the pivots first (column)."""
    rng = np.random.default_rng(seed)
    r, n, order = int(rng.integers(1, m + 1)), 3, rng.permutation(m)
    kept, coefficients, x = rng.normal(size=(r, n)), rng.normal(size=(m - r, r)), rng.normal(size=(2, n))
    stacked = x @ np.concatenate([kept, coefficients @ kept]).T
    y = row_form(x, kept, coefficients, positions_of(order, "row", m))
    np.testing.assert_allclose(y, np.take(stacked, order, axis=-1), atol=1e-12)
    z = rng.normal(size=(2, m))
    ordered = np.take(z, order, axis=-1)
    wanted = (ordered[:, :r] + ordered[:, r:] @ coefficients) @ kept
    found = column_form(z, kept.T, coefficients.T, positions_of(order, "column", m))
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_positions(form: Form) -> None:
    assert positions_of(None, form, 3).tolist() == [0, 1, 2]
    assert positions_of([2, 0, 1], form, 3).dtype == np.int32
    for order in ([0, 1], [0, 1, 1], [1, 2, 3], [[0, 1, 2]]):
        with pytest.raises(BadInput, match="not a permutation of 3 channels"):
            positions_of(order, form, 3)


# ---- PTX -------------------------------------------------------------------------------------------------------------


def _check_ptx(kernel: Kernel, architecture: str) -> None:
    contract = check(kernel, compile_ptx(kernel, architecture))
    assert contract.parameters == tuple(parameter.name for parameter in kernel.parameters)
    assert contract.local_bytes == 0  # arrays in registers, all of them


@needs_nvrtc
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_to_the_contract(form: Form, dtype: str) -> None:
    _check_ptx(kernels_for(form, dtype)[1], "compute_80")


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("form", "dtype", "tactic"), ALL)
def test_keeps_to_the_contract_everywhere(form: Form, dtype: str, tactic: int, architecture: str) -> None:
    _check_ptx(kernels_for(form, dtype)[tactic], architecture)
