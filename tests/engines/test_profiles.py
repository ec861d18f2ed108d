"""``--shapes`` to profiles: what is refused, and with which words."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.engines import Profile, make_profiles, parse_shapes
from graphopt.errors import BadInput


def value(name: str, *axes: int | str | None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(ir.DataType.FLOAT))


IDS = value("ids", "batch", "sequence")
MASK = value("mask", "batch", "sequence")
IMAGE = value("image", "batch", 3, None)


def test_a_range_and_a_single_shape() -> None:
    assert parse_shapes(["x=1x16/4x64/8x128", "a=b=2"]) == {
        "x": ((1, 16), (4, 64), (8, 128)),
        "a=b": ((2,), (2,), (2,)),
    }


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["x"], "--shapes: 'x' is not NAME=MIN/OPT/MAX (for example x=1x16/4x64/8x128)"),
        (["x=1/2"], "--shapes: 'x=1/2' is not NAME=MIN/OPT/MAX (for example x=1x16/4x64/8x128)"),
        (["x=1x-2"], "--shapes: 'x=1x-2' is not NAME=MIN/OPT/MAX (for example x=1x16/4x64/8x128)"),
        (["=1"], "--shapes: '=1' is not NAME=MIN/OPT/MAX (for example x=1x16/4x64/8x128)"),
        (["x=1", "x=2"], "--shapes: 'x' is given twice"),
        (["x=1/2x2/3"], "--shapes: 'x=1/2x2/3' has shapes of different rank"),
        (["x=4/2/8"], "--shapes: 'x=4/2/8' is not in the order MIN ≤ OPT ≤ MAX"),
    ],
)
def test_malformed_options(options: list[str], line: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_shapes(options)
    assert str(caught.value) == line


def test_symbols_serve_every_input_that_has_them() -> None:
    profiles = make_profiles([IDS, MASK], parse_shapes(["batch=1/4/8", "sequence=1/64/128"]))
    expected = Profile((1, 1), (4, 64), (8, 128))
    assert profiles == {"ids": expected, "mask": expected}


def test_a_shape_of_an_input_goes_before_a_symbol_and_static_inputs_need_none() -> None:
    profiles = make_profiles([IMAGE, value("scale", 3)], parse_shapes(["image=1x3x8/2x3x16/2x3x32"]))
    assert profiles == {"image": Profile((1, 3, 8), (2, 3, 16), (2, 3, 32))}


@pytest.mark.parametrize(
    ("inputs", "options", "line"),
    [
        (
            [IDS, MASK],
            [],
            "dynamic inputs without sizes: ids [batch, sequence], mask [batch, sequence]"
            " (for example --shapes batch=1/4/8 --shapes sequence=1/4/8)",
        ),
        (
            [IDS],
            ["batch=1/4/8"],
            "dynamic inputs without sizes: ids [batch, sequence] (for example --shapes sequence=1/4/8)",
        ),
        (
            [IMAGE],
            [],
            "dynamic inputs without sizes: image [batch, 3, ?] (for example --shapes image=1x3x1/4x3x4/8x3x8)",
        ),
        (
            [IDS],
            ["bach=1/4/8"],
            "--shapes: 'bach' is neither an input nor a symbolic axis (did you mean 'batch'?)",
        ),
        ([IDS], ["batch=1x2"], "--shapes: 'batch' is an axis: give one size, not a shape"),
        ([IDS], ["ids=4"], "--shapes: 'ids' has 2 axes, not 1"),
        ([IMAGE], ["image=1x4x8"], "--shapes: axis 1 of 'image' is fixed at 3"),
        (
            [IDS, MASK],
            ["ids=1x1/2x2/3x3", "mask=1x1/2x2/4x3"],
            "--shapes: 'batch' is 1/2/3 in 'ids' and 1/2/4 in 'mask'",
        ),
    ],
)
def test_shapes_that_do_not_fit(inputs: list[ir.Value], options: list[str], line: str) -> None:
    with pytest.raises(BadInput) as caught:
        make_profiles(inputs, parse_shapes(options))
    assert str(caught.value) == line
