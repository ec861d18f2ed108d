"""Whether what a model gives for some inputs can show a fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def says_nothing(results: object) -> bool:
    """Whether every output is empty, or one value throughout, or nowhere finite; False where ``results`` is no mapping.

    A scalar that is finite says something: it may differ from case to case.
    """
    if not isinstance(results, Mapping):
        return False
    arrays = [array for value in results.values() for array in _arrays(value)]
    return bool(arrays) and all(map(_is_constant, arrays))


def is_finite(results: object) -> bool:
    """Whether no float in the outputs is infinite or NaN."""
    if not isinstance(results, Mapping):
        return False
    return all(np.isfinite(wide).all() for value in results.values() for wide in map(_wide, _arrays(value)))


def _arrays(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The arrays in an output: itself, those of a sequence, none of what is absent."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _arrays(item)


def _wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats of any width, complex ones too, as what numpy can judge; whatever else, as nothing."""
    if array.dtype.kind in "biuOUSmM":
        return np.empty(0)
    return array.astype(np.complex128)


def _is_constant(array: np.ndarray[Any, Any]) -> bool:
    if array.size == 0:
        return True
    wide = _wide(array)
    if wide.size and not np.isfinite(wide).any():
        return True
    return array.size > 1 and bool(np.all(array == array.reshape(-1)[0]))
