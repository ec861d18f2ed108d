from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.benchmarking import parse_shapes
from graphopt.errors import BadInput

names = st.text(st.characters(exclude_characters=",", exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 10**6), max_size=5).map(tuple)


@given(st.dictionaries(names, shapes, min_size=1, max_size=4))
def test_what_is_written_is_read(given_shapes: dict[str, tuple[int, ...]]) -> None:
    text = ",".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in given_shapes.items())
    assert parse_shapes(text) == given_shapes


def test_an_example() -> None:
    assert parse_shapes("input_ids=2x128, scale=,x:0=3") == {"input_ids": (2, 128), "scale": (), "x:0": (3,)}


@given(st.text(max_size=20))
def test_anything_is_read_or_refused(text: str) -> None:
    try:
        parsed = parse_shapes(text)
    except BadInput as error:
        assert "--shapes" in str(error)
    else:
        assert parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--shapes: '' is not name=sizes"),
        ("x", "--shapes: 'x' is not name=sizes"),
        ("x=2x", "--shapes x: '2x' is no shape"),
        ("x=2,-3", "--shapes: '-3' is not name=sizes"),
        ("x=-2", "--shapes x: '-2' is no shape"),
        ("x=2,x=3", "--shapes: 'x' is given twice"),
    ],
)
def test_what_is_no_shape(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_shapes(text)
    assert str(caught.value).startswith(message)
