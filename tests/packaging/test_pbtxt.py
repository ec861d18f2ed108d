"""Protobuf text: what is written is what is read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.packaging.pbtxt import Token, quoted, write
from tests.packaging.server import parse


@pytest.mark.parametrize(
    "name",
    ['a"b', "a'b", "a\\b", "a\nb", "a\\n", "é", "名前", "\x01" + "7", "\x7f", 'x" max_batch_size: 9 name: "', ""],
)
def test_names_come_back(name: str) -> None:
    config = parse(write([("name", name), ("input", [("name", name)])]))
    assert config.name == config.input[0].name == name
    assert config.max_batch_size == 0


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_text_comes_back(text: str) -> None:
    assert parse(f"name: {quoted(text)}").name == text


def test_lists_and_messages() -> None:
    text = write(
        [
            ("input", [("dims", [-1, 3]), ("data_type", Token("TYPE_FP16")), ("optional", Token("true"))]),
            ("output", [("dims", [1]), ("reshape", [("shape", [])])]),
            ("instance_group", [("profile", ["0", "1"])]),
            ("dynamic_batching", []),
        ]
    )
    config = parse(text)
    assert list(config.input[0].dims) == [-1, 3] and config.input[0].optional
    assert config.output[0].HasField("reshape") and list(config.output[0].reshape.shape) == []
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.HasField("dynamic_batching")
