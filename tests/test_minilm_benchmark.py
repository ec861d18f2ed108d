"""What the benchmark of the export judges: real tokens and embeddings, and nothing that is not a number."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.minilm_export import ALLOWED, Errors, compare

MASK = np.array([[True, True, False]])


def outputs() -> dict[str, np.ndarray]:
    return {"last_hidden_state": np.zeros((1, 3, 4)), "sentence_embedding": np.zeros((1, 4))}


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("last_hidden_state", (0, 1, 2), Errors(tokens=0.5)),
        ("last_hidden_state", (0, 2, 2), Errors(padding=0.5)),
        ("sentence_embedding", (0, 3), Errors(embeddings=0.5)),
    ],
)
def test_where_an_error_counts(name: str, index: tuple[int, ...], expected: Errors) -> None:
    found = outputs()
    found[name][index] = -0.5
    assert compare(found, outputs(), MASK) == expected


@pytest.mark.parametrize(("name", "index"), [("last_hidden_state", (0, 0, 0)), ("sentence_embedding", (0, 0))])
def test_nan_is_never_small_enough(name: str, index: tuple[int, ...]) -> None:
    found = outputs()
    found[name][index] = np.nan
    assert Errors().most(compare(found, outputs(), MASK)).tokens > ALLOWED


def test_the_largest_of_each() -> None:
    assert Errors(1.0, 0.0, 3.0).most(Errors(0.5, 2.0, 1.0)) == Errors(1.0, 2.0, 3.0)
