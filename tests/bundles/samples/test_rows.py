"""Rows of values of every type, taken apart and put together."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.bundles.backend import Part
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.errors import GraphoptError

KINDS = [np.float32, np.float16, np.float64, np.int64, np.int32, np.uint8, np.bool_, ml_dtypes.bfloat16, object]


def backends() -> list[Any]:
    return [PlainBackend(lambda name: None), OrtBackend(lambda name: None)]


def there(backend: Any, array: np.ndarray[Any, Any]) -> Any:
    return backend.value(array) if isinstance(backend, OrtBackend) else array


def back(backend: Any, value: Any) -> Any:
    return backend.array(value) if isinstance(backend, OrtBackend) else value


def numbers(shape: tuple[int, ...], kind: Any) -> np.ndarray[Any, Any]:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    return np.array([str(n) for n in array.flat], object).reshape(shape) if kind is object else array.astype(kind)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 2))
def test_what_is_taken_apart_is_put_together(data: st.DataObject, kind: Any, count: int, axis: int) -> None:
    shape = [2, 3, 2]
    shape[axis] = count
    array = numbers(tuple(shape), kind)
    truths = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    more = data.draw(st.integers(0, 3))
    for backend in backends()[: 1 if kind is object else 2]:  # the runtime's own values of text cannot be read
        parts = []
        for rows in (np.flatnonzero(truths), np.flatnonzero(~truths)):
            if len(rows):
                taken = backend.take(there(backend, array), axis, rows)
                np.testing.assert_array_equal(back(backend, taken), np.take(array, rows, axis))
                parts.append(Part(taken, None, rows))
        whole = back(backend, backend.merge(parts, axis, count + more))
        assert whole.dtype == array.dtype
        np.testing.assert_array_equal(whole, np.take(array, np.minimum(np.arange(count + more), count - 1), axis))


def test_rows_of_a_value_that_was_not_taken_apart() -> None:
    array = numbers((4, 2), np.float32)
    rows, rest = np.array([2, 0]), np.array([1, 3])
    for backend in backends():
        parts = [Part(there(backend, array), rows, rows), Part(there(backend, -array[rest]), None, rest)]
        made = back(backend, backend.merge(parts, 0, 4))
        np.testing.assert_array_equal(made, array * np.array([[1], [-1], [1], [-1]]))


def test_repeated() -> None:
    for backend in backends():
        value = there(backend, numbers((2,), np.int64))
        np.testing.assert_array_equal(back(backend, backend.repeat(value, 3)), [[0, 1]] * 3)


def test_parts_that_do_not_fit() -> None:
    for backend in backends():
        parts = [Part(there(backend, numbers((1, n), np.float32)), None, np.array([n - 1])) for n in (1, 2)]
        with pytest.raises(GraphoptError, match=r"other sizes, \[1\] and \[2\]"):
            backend.merge(parts, 0, 2)
