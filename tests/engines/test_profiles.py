"""``--shapes`` and data to profiles: what is refused, and with which words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.engines import Profile, make_profiles, parse_shapes
from graphopt.engines.profiles import Seen, fix_profiles, observe, symbol_sizes
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
        (["x=1x2147483648"], "--shapes: 'x=1x2147483648' has an axis larger than 2147483647"),
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


def test_the_shape_of_one_input_serves_others_that_have_its_symbols() -> None:
    profiles = make_profiles([IDS, MASK], parse_shapes(["ids=1x1/4x64/8x128"]))
    assert profiles["mask"] == Profile((1, 1), (4, 64), (8, 128))


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
        (
            [IDS],
            ["ids=1x1/2x2/3x3", "batch=4"],
            "--shapes: 'batch' is 4/4/4 by its name and 1/2/3 in 'ids'",
        ),
        (
            [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))],
            ["x=1"],
            "input 'x': has no known number of axes (export it with a shape)",
        ),
    ],
)
def test_shapes_that_do_not_fit(inputs: list[ir.Value], options: list[str], line: str) -> None:
    with pytest.raises(BadInput) as caught:
        make_profiles(inputs, parse_shapes(options))
    assert str(caught.value) == line


def feed(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_sizes_of_data() -> None:
    """The middle one is a size that occurs, and the one that most of the data has."""
    seen = observe([IDS, MASK], [feed(ids=(1, n), mask=(2, n)) for n in (7, 128, 12, 12, 3, 12)])
    assert seen.symbols == {"batch": ((1,), (1,), (2,)), "sequence": ((3,), (12,), (128,))}
    profiles = make_profiles([IDS, MASK], {}, seen)
    expected = Profile((1, 3), (1, 12), (2, 128))
    assert profiles == {"ids": expected, "mask": expected}


def test_shapes_go_before_data_and_unnamed_axes_have_their_own_sizes() -> None:
    seen = observe([IMAGE], [feed(image=(1, 3, n)) for n in (8, 32, 16)])
    profiles = make_profiles([IMAGE], parse_shapes(["batch=1/4/8"]), seen)
    assert profiles == {"image": Profile((1, 3, 8), (4, 3, 16), (8, 3, 32))}


def test_what_neither_says() -> None:
    with pytest.raises(BadInput, match="for example --shapes sequence=1/4/8"):
        make_profiles([IDS, MASK], {}, Seen(symbols={"batch": ((1,), (1,), (1,))}))


def test_values_that_decide_shapes() -> None:
    sizes = value("sizes", 2)
    data = [{"sizes": np.array(row)} for row in ([4, 1], [2, 9], [3, 3])]
    assert observe([sizes], data, ["sizes"]).values == {"sizes": Profile((2, 1), (3, 3), (4, 9))}
    scalar = value("k")
    assert observe([scalar], [{"k": np.array(5)}], ["k"]).values == {"k": Profile((5,), (5,), (5,))}
    with pytest.raises(BadInput, match="another number of values in some samples"):
        observe([value("n", "many")], [{"n": np.arange(2)}, {"n": np.arange(3)}], ["n"])


def test_one_size_a_profile() -> None:
    profiles = make_profiles([IDS, MASK], parse_shapes(["batch=1/4/8", "sequence=1/64/128"]))
    assert symbol_sizes([IDS, MASK], profiles) == {"batch": (1, 8), "sequence": (1, 128)}
    fixed = fix_profiles([IDS, MASK], profiles, {"batch": 2, "sequence": 128})
    assert fixed == {name: Profile((2, 128), (2, 128), (2, 128)) for name in ("ids", "mask")}
    unnamed = make_profiles([IMAGE], parse_shapes(["image=1x3x8/2x3x16/2x3x32"]))
    with pytest.raises(BadInput) as caught:
        fix_profiles([IMAGE], unnamed, {"batch": 1})
    assert str(caught.value) == (
        "--buckets: an axis of the input 'image' has no name"
        " (name it when exporting, or give it one size with --shapes)"
    )
