"""numpy's results against ONNX Runtime's, bit for bit, on seeded random operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.evaluate import Inexact, Job, Operation, cast, evaluate, reshape_dims, run_jobs, slice_bounds
from tests.passes.common import assert_same_array

FLOATS = ["float32", "float64"]
INTS = ["int32", "int64"]


def both(
    op_type: str, inputs: list[np.ndarray | None], opset: int = 18, outputs: int = 1, **attributes: Any
) -> tuple[list[np.ndarray] | None, list[np.ndarray] | None]:
    """What numpy and what ONNX Runtime make of an operator; None where one makes nothing."""
    values = [None if x is None else ir.Value(name=f"v{i}") for i, x in enumerate(inputs)]
    node = ir.node(op_type, values, attributes, num_outputs=outputs)
    for i, output in enumerate(node.outputs):
        output.name = f"y{i}"
    ours = evaluate(Operation.of(node, opset), inputs)
    made = run_jobs([Job(node, list(inputs))], opset)
    return ours, [made[o] for o in node.outputs] if made else None


def check(op_type: str, inputs: list[np.ndarray | None], opset: int = 18, outputs: int = 1, **attributes: Any) -> bool:
    """Whether both computed it (the runtime lacks some types); fails where the bits differ."""
    ours, theirs = both(op_type, inputs, opset, outputs, **attributes)
    if ours is None or theirs is None:
        return False
    for one, other in zip(ours, theirs, strict=True):
        assert_same_array(other, np.ascontiguousarray(one).reshape(one.shape))
    return True


def operand(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype.startswith("float"):
        special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-310, 1e38, -1.5, 0.5])
        values = np.where(rng.random(shape) < 0.4, rng.choice(special, shape), rng.standard_normal(shape))
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype)
    low = 0 if dtype.startswith("u") else -9
    return np.asarray(rng.integers(low, 10, shape), dtype)


SHAPES = st.sampled_from([((), ()), ((3,), (3,)), ((2, 3), (3,)), ((2, 1), (1, 4)), ((0, 2), (2,)), ((1,), ())])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Equal", "Less", "GreaterOrEqual"]),
    SHAPES,
    st.sampled_from([*FLOATS, *INTS]),
    st.integers(0, 10**6),
)
def test_binary(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: str, seed: int) -> None:
    a, b = operand(seed, shapes[0], dtype), operand(seed + 1, shapes[1], dtype)
    check(op, [a, b])
    if op == "Mod":
        check(op, [a, b], fmod=1)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["Neg", "Abs", "Sqrt", "Ceil", "Floor", "Round", "Sign", "Not", "NonZero"]),
    st.sampled_from([*FLOATS, *INTS, "bool"]),
    st.sampled_from([(), (3,), (2, 3), (0, 2)]),
    st.integers(0, 10**6),
)
def test_unary(op: str, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    if (op == "Not") == (dtype == "bool"):
        check(op, [operand(seed, shape, dtype)])


def test_integer_division_truncates_and_never_guesses() -> None:
    a, b = np.array([7, -7, 7, -7], np.int64), np.array([2, 2, -2, -2], np.int64)
    assert check("Div", [a, b])
    assert evaluate(Operation("Div"), [a, b])[0].tolist() == [3, -3, -3, 3]  # type: ignore[index]
    assert evaluate(Operation("Div"), [a, np.zeros(4, np.int64)]) is None
    lowest = np.array([np.iinfo(np.int32).min], np.int32)
    assert evaluate(Operation("Div"), [lowest, np.array([-1], np.int32)]) is None
    assert evaluate(Operation("Mod"), [a, np.zeros(4, np.int64)]) is None


def test_float16_arithmetic_is_left_to_nobody() -> None:
    a = np.ones(2, np.float16)
    assert evaluate(Operation("Add"), [a, a]) is None


_KINDS = ["float32", "float64", "int8", "uint8", "int32", "int64", "bool", "float16"]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(_KINDS), st.sampled_from(_KINDS), st.integers(0, 10**6))
def test_cast(source: str, target: str, seed: int) -> None:
    with np.errstate(over="ignore"):
        x = operand(seed, (7,), "float64" if source == "float16" else source).astype(source)
    check("Cast", [x], to=int(ir.DataType.from_numpy(np.dtype(target))))


def test_cast_refuses_what_is_not_defined() -> None:
    for bad in (np.inf, np.nan, 3e9, -3e9):
        with pytest.raises(Inexact):
            cast(np.array([bad]), ir.DataType.INT32)
    assert cast(np.array([2147483647.9]), ir.DataType.INT32).tolist() == [2147483647]
    with pytest.raises(Inexact):
        cast(np.array([2.0**63]), ir.DataType.INT64)
    with pytest.raises(Inexact):
        cast(np.array([0.1], np.float32), ir.DataType.FLOAT16)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(-7, 7),
    st.integers(-7, 7),
    st.sampled_from([-3, -2, -1, 1, 2, 3]),
    st.integers(-2, 1),
    st.integers(0, 4),
)
def test_slice(start: int, stop: int, step: int, axis: int, size: int) -> None:
    x = np.arange(size * 3, dtype=np.float32).reshape(size, 3)
    operands = [np.array([v], np.int64) for v in (start, stop, axis, step)]
    assert check("Slice", [x, *operands])
    if step == 1:
        assert check("Slice", [x], opset=9, starts=[start], ends=[stop], axes=[axis % 2])


def test_slice_to_the_ends_of_the_integers() -> None:
    x = np.arange(5, dtype=np.int64)
    for start, stop, step in ((-1, -(2**63), -1), (0, 2**63 - 1, 2), (2**31 - 1, -(2**31), -1), (9, -9, -2)):
        assert check("Slice", [x, *(np.array([v], np.int64) for v in (start, stop, 0, step))])
    with pytest.raises(Inexact):
        slice_bounds(0, 1, 0, 5)


@pytest.mark.parametrize("indices", [[0, 1], [-1, -2], [[0], [1]], 1, []])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather(indices: Any, axis: int) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert check("Gather", [x, np.array(indices, np.int64)], axis=axis)
    assert evaluate(Operation.of(ir.node("Gather", [], {"axis": axis}), 18), [x, np.array([9])]) is None


def test_moving_elements() -> None:
    x = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    assert check("Transpose", [x])
    assert check("Transpose", [x], perm=[2, 0, 1])
    assert check("Flatten", [x], axis=0)
    assert check("Flatten", [x], axis=-1)
    assert check("Flatten", [x], axis=3)
    assert check("Reshape", [x, np.array([0, -1])])
    assert check("Reshape", [x[:0], np.array([0, 0, 2])])
    assert check("Reshape", [x[:0], np.array([0, 5])], allowzero=1)
    assert check("Concat", [x, x, x[:0]], axis=0)
    assert check("Concat", [x, x], axis=-1)
    assert check("Split", [x], outputs=2, axis=2, num_outputs=2)
    assert check("Split", [x], outputs=2, axis=1, num_outputs=2)
    assert check("Split", [x, np.array([1, 0, 3])], outputs=3, axis=-1)
    assert check("Split", [x], opset=11, outputs=3, axis=1)
    assert check("Split", [x], opset=11, outputs=2, axis=1, split=[1, 2])
    assert check("Squeeze", [x[:1]])
    assert check("Squeeze", [x[:1], np.array([-3])])
    assert check("Squeeze", [x[:1]], opset=11, axes=[0])
    assert check("Unsqueeze", [x, np.array([0, -1])])
    assert check("Unsqueeze", [x], opset=11, axes=[1, 3])
    assert check("Expand", [x[:, :1], np.array([5, 1, 3, 1])])
    assert check("Tile", [x, np.array([1, 2, 0])])
    assert check("Where", [x > 3, x, -x[0]])
    assert check("Pad", [x, np.array([0, 1, 0, 2, 0, 1]), np.array(7)])
    assert check("Pad", [x, np.array([1, 2]), None, np.array([-1])])
    assert check("GatherElements", [x, np.array([[[0, -1]]])], axis=2)
    assert check("ScatterND", [x, np.array([[0, 1], [1, -1]]), x[:, 0]])
    assert check("ScatterElements", [x, np.array([[[1, -1]]]), np.array([[[50, 60]]])], axis=-1)
    assert evaluate(Operation("ScatterND"), [x, np.array([[0], [0]]), x]) is None  # the order is not defined


def test_making_elements() -> None:
    assert check("Shape", [np.zeros((2, 3, 4))], start=-2)
    assert check("Shape", [np.zeros((2, 3, 4))], start=1, end=-1)
    assert check("Shape", [np.zeros((2, 3, 4))], start=5)
    assert check("Size", [np.zeros((2, 3))])
    assert check("ConstantOfShape", [np.array([2, 0])], value=ir.tensor(np.array([3], np.int32)))
    assert check("ConstantOfShape", [np.array([], np.int64)])
    for start, stop, step in ((0, 5, 2), (5, 0, -2), (3, 3, 1), (0, -5, 1)):
        assert check("Range", [np.array(v) for v in (start, stop, step)])
    assert evaluate(Operation("Range"), [np.array(v, np.float32) for v in (0, 1, 0.1)]) is None


def test_size_limit_is_asked_before_anything_is_made() -> None:
    huge = np.array([10**6, 10**6])
    assert evaluate(Operation("ConstantOfShape"), [huge], limit=100) is None
    assert evaluate(Operation("Expand"), [np.zeros(1), huge], limit=100) is None
    assert evaluate(Operation("Range"), [np.array(v) for v in (0, 10**12, 1)], limit=100) is None


def test_reshape_dims() -> None:
    assert reshape_dims((2, 3), [0, -1]) == [2, 3]
    assert reshape_dims((0, 3), [3, 0], allow_zero=True) == [3, 0]
    for target in ([4, -1], [-1, -1], [-2, 3], [5]):
        with pytest.raises(Inexact):
            reshape_dims((2, 3), target)


def test_jobs_feed_each_other_and_failures_stay_alone() -> None:
    a = ir.node("Exp", [ir.Value(name="i")], name="a")
    bad = ir.node("NoSuchOperator", [ir.Value(name="j")])
    after = ir.node("Neg", [bad.outputs[0]])
    last = ir.node("Log", [a.outputs[0]])
    for index, node in enumerate((a, bad, after, last)):
        node.outputs[0].name = f"o{index}"
    x = np.ones(2, np.float32)
    jobs = [Job(a, [x]), Job(bad, [x]), Job(after, [bad.outputs[0]]), Job(last, [a.outputs[0]])]
    results = run_jobs(jobs, 18)
    assert set(results) == {a.outputs[0], last.outputs[0]}
    np.testing.assert_allclose(results[last.outputs[0]], x)
    assert run_jobs([], 18) == {}
