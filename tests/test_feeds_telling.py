"""Feeds are chosen by what they show: magnitudes, special values, batches beside switches, sizes that differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.feeds import feeds_that_run, synthesise_feeds
from graphopt.feeds.patterns import matching
from graphopt.feeds.telling import is_finite, says_nothing
from graphopt.runtime.roles import ModelRoles
from graphopt.runtime.session import create_session, run


def model_of(text: str, opset: int = 20) -> ir.Model:
    opsets = f'"" : {opset}, "ai.onnx.ml" : 4'
    return ir.from_proto(onnx.parser.parse_model(f"<ir_version: 9, opset_import: [{opsets}]> {text}"))


def runner(model: ir.Model) -> Any:
    session = create_session(ir.to_proto(model).SerializeToString(), optimized=False)
    return lambda feeds: run(session, feeds)


def found_for(text: str, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The feeds for a model, and what it gives for them."""
    model = model_of(text)
    runs = runner(model)
    feeds = feeds_that_run(model, runs, **options)
    return feeds, [runs(case) for case in feeds]


def magnitude(feeds: Mapping[str, Any]) -> float:
    return max(float(np.abs(array).max()) for array in feeds.values())


# -- magnitudes --------------------------------------------------------------------------------------------------------


def test_one_case_has_large_magnitudes() -> None:
    feeds, results = found_for("g (float[n, 6] x) => (float[n, 6] y) { y = Softmax(x) }")
    largest = [magnitude(case) for case in feeds]
    assert len(feeds) == 3 and sum(size > 100 for size in largest) == 1
    assert all(map(is_finite, results))
    large = feeds[int(np.argmax(largest))]["x"]
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.exp(large)).all(), "without the maximum taken off it overflows"


def test_magnitudes_are_smaller_where_the_outputs_would_overflow() -> None:
    feeds, results = found_for("g (float16[n, 8] x, float16[8, n] z) => (float16[n, n] y) { y = MatMul(x, z) }")
    assert all(map(is_finite, results))
    assert 10 < max(map(magnitude, feeds)) < 250
    feeds, results = found_for("g (float[n, 8] x) => (float[n, 8] y) { e = Exp(x)  y = Exp(e) }")
    assert all(map(is_finite, results)) and max(map(magnitude, feeds)) < 10


def test_a_range_is_kept_in_every_case() -> None:
    feeds, _ = found_for("g (float[n, 8] x) => (float[n, 8] y) { y = Asin(x) }")
    assert max(map(magnitude, feeds)) < 1


def test_what_runs_but_gives_no_outputs_by_name_gets_plain_feeds() -> None:
    model = model_of("g (float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }")
    for case, plain in zip(feeds_that_run(model, lambda feeds: None), synthesise_feeds(model), strict=True):
        np.testing.assert_array_equal(case["x"], plain["x"])


# -- batches and switches ----------------------------------------------------------------------------------------------

RATES = """g (float[batch, 4] x, int64 rate) => (float[batch, 4] y) {
    high = Constant<value_int = 16000>()
    is_high = Equal(rate, high)
    y = If (is_high) <then_branch = then () => (float[batch, 4] a) { a = Relu(x) },
        else_branch = other () => (float[batch, 4] b) { b = Neg(x) }> }"""


def test_every_switch_value_is_tried_with_several_samples_and_one_is_tried_alone() -> None:
    feeds = synthesise_feeds(model_of(RATES))
    assert len(feeds) == 3, "no more cases than asked for"
    batches: dict[int, set[int]] = {}
    for case in feeds:
        batches.setdefault(int(case["rate"]), set()).add(case["x"].shape[0])
    assert len(batches) == 2
    assert all(max(sizes) > 1 for sizes in batches.values())
    assert 1 in set.union(*batches.values())


def test_the_single_sample_has_a_case_of_its_own_where_switches_take_all() -> None:
    model = model_of("""g (float[batch, 2] x, bool a, bool b) => (float[batch, 2] y) {
        t = If (a) <then_branch = p () => (float[batch, 2] u) { u = Relu(x) },
                    else_branch = q () => (float[batch, 2] v) { v = Neg(x) }>
        y = If (b) <then_branch = r () => (float[batch, 2] w) { w = Abs(t) },
                    else_branch = s () => (float[batch, 2] z) { z = Exp(t) }> }""")
    feeds = synthesise_feeds(model)
    several = {(bool(case["a"]), bool(case["b"])) for case in feeds if case["x"].shape[0] > 1}
    assert len(feeds) == 5 and len(several) == 4
    assert [case["x"].shape[0] for case in feeds].count(1) == 1


# -- sizes and bounds --------------------------------------------------------------------------------------------------

CENTRED = """g (float[10, 7, 3] x, int64[3] target) => (float[p, q, r] y) {
    two = Constant<value_ints = [2]>()  sizes = Shape(x)  wide = Max(sizes, target)
    more = Sub(wide, sizes)  before = Div(more, two)  after = Sub(more, before)
    pads = Concat<axis = 0>(before, after)  padded = Pad(x, pads)  now = Shape(padded)
    less = Sub(now, target)  start = Div(less, two)  end = Add(start, target)  y = Slice(padded, start, end) }"""


def test_sizes_that_pads_and_slices_are_computed_from_lie_around_those_that_are_there() -> None:
    model = model_of(CENTRED)
    roles = ModelRoles(model).of(model.graph.inputs[1])
    assert "bound" in roles.meanings and (10, 7, 3) in roles.current
    feeds, results = found_for(CENTRED)
    for case, result in zip(feeds, results, strict=True):
        target = case["target"]
        assert result["y"].shape == tuple(target)
        assert (target != (10, 7, 3)).all() and len(set(target.tolist())) > 1
        assert (target > (10, 7, 3)).any() and (target >= 1).all()
    assert any((case["target"] < (10, 7, 3)).any() for case in feeds)
    assert len({tuple(case["target"]) for case in feeds}) == len(feeds)


def test_a_size_that_is_computed_inside_a_function_is_still_a_size() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
    g (float[n, 3] x, int64[2] target) => (float[p, q] y) { y = local.cut(x, target) }
    <domain: "local", opset_import: ["" : 18]>
    cut (data, to) => (rows) {
        sizes = Shape(data)  less = Min(sizes, to)  zero = Sub(less, less)  rows = Slice(data, zero, less) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert "bound" in ModelRoles(model).of(model.graph.inputs[1]).meanings
    runs = runner(model)
    assert all(runs(case)["y"].size for case in feeds_that_run(model, runs))


def test_what_is_sliced_loses_an_element_at_either_end() -> None:
    _, results = found_for("g (float[6, 5] x, int64[2] s, int64[2] e) => (float[a, b] y) { y = Slice(x, s, e) }")
    shapes = {result["y"].shape for result in results}
    assert len(shapes) > 1 and all(0 < size <= 6 for shape in shapes for size in shape)


def test_axes_of_size_one_are_expanded() -> None:
    feeds, results = found_for("g (float[4, 1] x, int64[2] t) => (float[a, b] y) { y = Expand(x, t) }")
    assert all(result["y"].shape[0] == 4 and result["y"].shape[1] > 1 for result in results)
    assert len({case["t"].tobytes() for case in feeds}) > 1


def test_a_reshape_puts_the_sizes_in_another_order() -> None:
    _, results = found_for("g (float[2, 6, 5] x, int64[3] t) => (float[a, b, c] y) { y = Reshape(x, t) }")
    assert any(result["y"].shape != (2, 6, 5) for result in results)


@pytest.mark.parametrize("size", ["3", "n"])
def test_the_parts_of_a_split_add_up(size: str) -> None:
    text = f"g (float[{size}, 6] x, int64[2] s) => (seq(float[p, 6]) y) {{ y = SplitToSequence<axis = 0>(x, s) }}"
    feeds, _ = found_for(text)
    assert len(feeds) == 3
    assert all(case["s"].sum() == case["x"].shape[0] for case in feeds)


@pytest.mark.parametrize(
    ("columns", "image", "attributes"),
    [((1, 5, 5), "1, 1, 5, 5", ""), ((1, 5, 15), "1, 1, 5, 5", "<pads = [0, 1, 0, 1]>")],
)
def test_blocks_of_columns_fit_the_image(columns: tuple[int, ...], image: str, attributes: str) -> None:
    sizes = ", ".join(map(str, columns))
    text = f"g (float[{sizes}] x, int64[2] i, int64[2] b) => (float[{image}] y) {{ y = Col2Im{attributes}(x, i, b) }}"
    _, results = found_for(text)
    assert len(results) == 3 and not any(map(says_nothing, results))


def test_places_to_unpool_to_lie_in_the_output() -> None:
    text = """g (float[1, 1, 2, 2] x, int64[1, 1, 2, 2] i, int64[4] s) => (float[1, 1, 5, 5] y)
        { y = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(x, i, s) }"""
    feeds, _ = found_for(text)
    assert all(len(np.unique(case["i"])) == 4 and case["i"].max() < 25 for case in feeds)
    assert all(case["s"].tolist() == [1, 1, 5, 5] for case in feeds)


def test_lengths_that_are_compared_with_positions_stay_within_them() -> None:
    text = """g (float[n, t] x, int64[n, 1] lengths) => (float[n, t] y) {
        zero = Constant<value_int = 0>()  one = Constant<value_int = 1>()
        sizes = Shape<start = 1, end = 2>(x)  axis = Constant<value_ints = [0]>()
        count = Squeeze(sizes, axis)  places = Range(zero, count, one)
        kept = Less(places, lengths)  nothing = Constant<value_float = 0.0>()  y = Where(kept, x, nothing) }"""
    feeds, _ = found_for(text)
    for case in feeds:
        assert case["lengths"].min() >= 1 and case["lengths"].max() <= case["x"].shape[1]


def test_parameters_fall_back_to_what_runs() -> None:
    # One row less, and the product has no partner.
    text = """g (float[4, 5] x, int64[2] s, int64[2] e, float[5, 3] w) => (float[4, 3] y) {
        cut = Slice(x, s, e)  y = MatMul(cut, w) }"""
    feeds, results = found_for(text)
    assert len(feeds) == 3 and all(result["y"].shape[1] == 3 for result in results)


# -- values that say something -----------------------------------------------------------------------------------------


def test_values_that_are_compared_with_each_other_are_sometimes_equal() -> None:
    for kind in ("uint8", "int8", "int64", "float", "string"):
        _, results = found_for(f"g ({kind}[3, 4, 5] a, {kind}[5] b) => (bool[3, 4, 5] y) {{ y = Equal(a, b) }}")
        values = np.concatenate([result["y"].ravel() for result in results])
        assert values.any() and not values.all(), kind


@pytest.mark.parametrize("op", ["IsNaN", "IsInf"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_special_values_where_they_are_asked_for(op: str, kind: str) -> None:
    _, results = found_for(f"g ({kind}[2, 6] x) => (bool[2, 6] y) {{ y = {op}(x) }}", cases=2)
    assert any(result["y"].any() and not result["y"].all() for result in results)


def test_other_values_are_drawn_where_every_output_is_constant() -> None:
    text = "g (float[5] x) => (float[5] y) { y = ThresholdedRelu<alpha = 6.0>(x) }"
    model = model_of(text)
    runs = runner(model)
    assert all(says_nothing(runs(case)) for case in synthesise_feeds(model)), "the first draw says nothing"
    _, results = found_for(text)
    assert not all(map(says_nothing, results))


def test_where_no_values_help_few_are_tried() -> None:
    calls: list[object] = []

    def silent(feeds: object) -> dict[str, Any]:
        calls.append(feeds)
        return {"y": np.zeros(3)}

    model = model_of("g (float[n, 6] x) => (float[n, 6] y) { y = Relu(x) }")
    assert len(feeds_that_run(model, silent, cases=8)) == 8
    assert len(calls) <= 8 + 2 * 5 + 2


@pytest.mark.parametrize("kind", ["string", "int64"])
def test_values_that_a_dictionary_knows_are_looked_up(kind: str) -> None:
    keys = '["here", "there"]' if kind == "string" else "[1007, 2008]"
    attributes = f"keys_{kind}s = {keys}, values_floats = [1.0, 2.0], default_float = -1.0"
    _, results = found_for(f"g ({kind}[9] x) => (float[9] y) {{ y = ai.onnx.ml.LabelEncoder<{attributes}>(x) }}")
    assert set(np.unique([result["y"] for result in results])) == {-1.0, 1.0, 2.0}


def test_strings_match_the_patterns_that_they_are_matched_with() -> None:
    text = r'g (string[8] x) => (bool[8] y) { y = RegexFullMatch<pattern = "www\\.[\\w.-]+\\.\\bcom\\b">(x) }'
    _, results = found_for(text.replace("<pattern", "<pattern: string"), cases=3)
    values = np.concatenate([result["y"] for result in results])
    assert values.any() and not values.all()


@pytest.mark.parametrize(
    "pattern",
    [
        r"www\.[\w.-]+\.\bcom\b",
        r"(\W|^)[\w.\-]{0,25}@(yahoo|gmail)\.com(\W|$)",
        r"a{3}b{2,}c{1,2}d*e+f?",
        r"(?:ab|cd(e|f)g)+?",
        r"[^a-y]\d\D\s\S",
        r"[]x-]+",
        r".\t\\",
    ],
)
def test_strings_drawn_from_a_pattern_match_it(pattern: str) -> None:
    drawn = matching(pattern, np.random.default_rng(0), count=20)
    assert drawn and all(re.fullmatch(pattern, text) for text in drawn)


@pytest.mark.parametrize("pattern", ["(?=ahead)", "(", "[", "a{2"])
def test_what_is_not_understood_gives_no_string(pattern: str) -> None:
    assert all(re.fullmatch(pattern, text) for text in matching(pattern, np.random.default_rng(0)))


def optional_sequence() -> ir.Model:
    sequence = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, [5]))
    optional = onnx.helper.make_optional_type_proto(sequence)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("OptionalHasElement", ["x"], ["y"])],
        "g",
        [onnx.helper.make_value_info("x", optional)],
        [onnx.helper.make_tensor_value_info("y", 9, [])],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9))


def test_optional_inputs_are_there_in_some_cases_and_absent_in_others() -> None:
    model = optional_sequence()
    runs = runner(model)
    assert {bool(runs(case)["y"]) for case in feeds_that_run(model, runs)} == {False, True}


def test_what_says_nothing() -> None:
    assert says_nothing({"y": np.zeros((2, 3))}) and says_nothing({"y": np.full(1, np.nan)})
    assert says_nothing({"y": [np.ones(3), np.zeros(2)]}) and says_nothing({"y": np.empty((0, 4))})
    assert not says_nothing({"y": np.zeros(3), "z": np.arange(2)})
    assert not says_nothing({"y": np.float32(0).reshape(())}), "a scalar may differ from case to case"
    assert not says_nothing({}) and not says_nothing(None)
    assert is_finite({"y": np.array(["a"], object), "z": None, "i": np.arange(3)})
    assert not is_finite({"y": np.array([1, np.inf], np.float16)}) and not is_finite(None)
