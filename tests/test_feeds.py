from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import BadInput, GraphoptError
from graphopt.feeds import feeds_that_run, synthesise_feeds
from graphopt.runtime.session import create_session, run


def model_of(text: str, opset: int = 18) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {text}'))


def session_of(model: ir.Model) -> Any:
    return create_session(ir.to_proto(model).SerializeToString(), optimized=False)


def assert_runs(model: ir.Model, **kwargs: Any) -> list[dict[str, Any]]:
    session = session_of(model)
    feeds = synthesise_feeds(model, **kwargs)
    for feed in feeds:
        run(session, feed)
    return feeds


BERT = """encoder (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
                   int64[batch, sequence] token_type_ids, int64[1, sequence] position_ids)
    => (float[batch, sequence, 4] y)
    <float one = {1}, float lowest = {-10000}>
{
    words = ConstantOfShape<value = float[1] {0.5}>(word_shape)
    word = Gather<axis = 0>(word_table, input_ids)
    segment = Gather(segment_table, token_type_ids)
    position = Gather(position_table, position_ids)
    a = Add(word, segment)
    b = Add(a, position)
    mask = Cast<to = 1>(attention_mask)
    last = Constant<value_ints = [-1]>()
    wide = Unsqueeze(mask, last)
    inverted = Sub(one, wide)
    score = Mul(inverted, lowest)
    y = Add(b, score)
}"""


def with_tables(text: str, **tables: tuple[int, ...]) -> ir.Model:
    """A model whose tables are initializers of the shapes given."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    rng = np.random.default_rng(1)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in tables.items()
    )
    return ir.from_proto(proto)


def bert() -> ir.Model:
    return with_tables(
        BERT.replace("    words = ConstantOfShape<value = float[1] {0.5}>(word_shape)\n", ""),
        word_table=(11, 4),
        segment_table=(2, 4),
        position_table=(16, 4),
    )


def test_an_encoder_gets_ids_masks_segments_and_positions() -> None:
    feeds = assert_runs(bert())
    assert [feed["input_ids"].shape[0] for feed in feeds] == [2, 1, 3]
    assert len({feed["input_ids"].shape[1] for feed in feeds}) == 3
    for feed in feeds:
        ids, mask = feed["input_ids"], feed["attention_mask"]
        assert ids.shape == mask.shape == feed["token_type_ids"].shape
        assert ids.dtype == np.int64
        assert ids.min() >= 0 and ids.max() < 11 and len(np.unique(ids)) > 1
        assert set(np.unique(feed["token_type_ids"])) <= {0, 1}
        np.testing.assert_array_equal(feed["position_ids"][0], np.arange(ids.shape[1]))
        assert set(np.unique(mask)) <= {0, 1}
        assert np.all(mask.sum(axis=1) >= 1)
        assert np.all(np.diff(mask, axis=1) <= 0), "the padding is on the right"
        assert (mask == 0).any()
    assert feeds[0]["attention_mask"][0].all(), "where there are several rows, one is full"


def test_the_same_seed_gives_the_same_feeds_and_another_others() -> None:
    one, same, other = (synthesise_feeds(bert(), seed=seed) for seed in (0, 0, 1))
    for name in one[0]:
        np.testing.assert_array_equal(one[0][name], same[0][name])
    assert not np.array_equal(one[0]["input_ids"], other[0]["input_ids"])


def test_an_input_more_changes_none_of_the_others() -> None:
    text = "g (float[n, 3] x{extra}) => (float[n, 3] y) {{ y = Relu(x) }}"
    without = synthesise_feeds(model_of(text.format(extra="")))
    more = synthesise_feeds(model_of(text.format(extra=", float[2] unused")))
    np.testing.assert_array_equal(without[0]["x"], more[0]["x"])


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("g (float[n, 3] x, int64[n] i) => (float y) { t = Relu(x)  y = Gather(t, i) }")
    before = ir.to_proto(model).SerializeToString()
    synthesise_feeds(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_symbols_bind_within_a_case_and_differ_from_each_other() -> None:
    model = model_of("g (float[batch, p, q] a, float[batch, q, p] b) => (float[batch, p, p] y) { y = MatMul(a, b) }")
    for feed in assert_runs(model):
        batch, rows, cols = feed["a"].shape
        assert feed["b"].shape == (batch, cols, rows)
        assert len({batch, rows, cols}) == 3


def test_sizes_written_as_sums_are_computed() -> None:
    model = model_of(
        "g (float[batch, past] a, float[batch, new] b) => (float[batch, total] y) { y = Concat<axis = 1>(a, b) }"
    )
    mask = ir.Value(
        name="attention_mask", shape=ir.Shape(["batch", "past + new"]), type=ir.TensorType(ir.DataType.INT64)
    )
    model.graph.inputs.append(mask)
    for feed in synthesise_feeds(model):
        assert feed["attention_mask"].shape[1] == feed["a"].shape[1] + feed["b"].shape[1]


INDIRECT = {
    "through a cast and an identity": "c = Cast<to = 7>(i)  d = Identity(c)  y = Gather(table, d)",
    "through a reshape": "s = Constant<value_ints = [-1]>()  c = Cast<to = 7>(i)  d = Reshape(c, s)"
    "  y = Gather(table, d)",
    "past an offset": "c = Cast<to = 7>(i)  two = Constant<value_int = 2>()  d = Add(c, two)  y = Gather(table, d)",
    "scaled": "c = Cast<to = 7>(i)  two = Constant<value_int = 2>()  d = Mul(c, two)  y = Gather(table, d)",
    "before one is taken off": "c = Cast<to = 7>(i)  one = Constant<value_int = 1>()  d = Sub(c, one)"
    "  zero = Constant<value_int = 0>()  e = Max(d, zero)  y = Gather(table, e)",
    "inside a branch": """t = Constant<value_int = 1>()  flag = Cast<to = 9>(t)
        y = If (flag) <then_branch = then () => (float[k, 4] u) { c = Cast<to = 7>(i)  u = Gather(table, c) },
                       else_branch = other () => (float[k, 4] w) { e = Cast<to = 7>(i)  w = Gather(table, e) }>""",
    "out of a branch": """t = Constant<value_int = 1>()  flag = Cast<to = 9>(t)
        c = If (flag) <then_branch = then () => (int64[k] u) { u = Cast<to = 7>(i) },
                       else_branch = other () => (int64[k] w) { w = Cast<to = 7>(i) }>
        y = Gather(table, c)""",
    "carried by a loop": """trips = Constant<value_int = 2>()  yes = Constant<value_int = 1>()  go = Cast<to = 9>(yes)
        c = Cast<to = 7>(i)
        y = Loop (trips, go, c) <body = loop (int64 n, bool keep, int64[k] state) => (bool on, int64[k] next)
            { on = Identity(keep)  row = Gather(table, state)  next = Identity(state) }>""",
}


@pytest.mark.parametrize("body", INDIRECT.values(), ids=INDIRECT.keys())
@pytest.mark.parametrize("dtype", ["int32", "float"])
def test_indices_stay_inside_what_they_reach(body: str, dtype: str) -> None:
    result = "int64[k]" if "Loop" in body else "float[k, 4]"
    model = with_tables(f"g ({dtype}[k] i) => ({result} y) {{ {body} }}", table=(5, 4))
    for feed in assert_runs(model, cases=6):
        assert len(np.unique(feed["i"])) > 1 or feed["i"].size < 4


def test_indices_inside_functions() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
    g (int64[k] i) => (float[k, 2] y) <float[3, 2] table = {1, 2, 3, 4, 5, 6}> { y = local.embed(table, i) }
    <domain: "local", opset_import: ["" : 18]>
    embed (weight, indices) => (rows) { same = Identity(indices)  rows = Gather(weight, same) }"""
    feeds = assert_runs(ir.from_proto(onnx.parser.parse_model(text)), cases=6)
    assert set(np.unique(np.concatenate([feed["i"] for feed in feeds]))) == {0, 1, 2}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[3, n] x, int64[2, n] i) => (float[2, n] y) { y = GatherElements<axis = 0>(x, i) }",
        "g (float[3, 4] x, int64[k, 2] i) => (float[k] y) { y = GatherND(x, i) }",
        "g (float[6, 4] x, int64[5, 1] i, float[5, 4] u) => (float[6, 4] y) { y = ScatterND(x, i, u) }",
        "g (int64[k] i, float[2] v) => (float[k, 5] y) <int64 depth = {5}> { y = OneHot(i, depth, v) }",
        "g (float[n, 4] x, int64[k] i) => (float[k, 4] y) { y = Gather(x, i) }",
        "g (float[s, b, 4] x, int64[b] lens) => (float[s, b, 4] y) { y = ReverseSequence(x, lens) }",
    ],
)
def test_other_kinds_of_indices(text: str) -> None:
    assert_runs(model_of(text), cases=6)


def test_scattered_places_are_named_once() -> None:
    model = model_of("g (float[9, 2] x, int64[4, 1] i, float[4, 2] u) => (float[9, 2] y) { y = ScatterND(x, i, u) }")
    for feed in synthesise_feeds(model, cases=5):
        assert len(np.unique(feed["i"])) == 4


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n, m] x, int64[2] shape) => (float[a, b] y) { y = Reshape(x, shape) }",
        "g (float[2, 6] x, int64[3] shape) => (float[3, 2, 2] y) { y = Reshape(x, shape) }",
        "g (float[n, 1] x, int64[2] shape) => (float[a, b] y) { y = Expand(x, shape) }",
        "g (float[n, m] x, int64[2] s, int64[2] e) => (float[a, b] y) { y = Slice(x, s, e) }",
        "g (float[n, m] x, int64[1] k) => (float[n, t] y, int64[n, t] i) { y, i = TopK(x, k) }",
        "g (float[n, m] x, int64[2] r) => (float[a, b] y) { y = Tile(x, r) }",
        "g (float[n, m] x, int64[4] p) => (float[a, b] y) { y = Pad(x, p) }",
        "g (float[6, 2] x, int64[2] s) => (float[4, 2] y, float[2, 2] z) { y, z = Split<axis = 0>(x, s) }",
        "g (int64 n) => (int64[k] y) { zero = Constant<value_int = 0>() one = Constant<value_int = 1>()"
        " y = Range(zero, n, one) }",
    ],
)
def test_sizes_are_ones_that_fit(text: str) -> None:
    for feed in assert_runs(model_of(text)):
        assert all(array.dtype == np.int64 for name, array in feed.items() if name != "x")


def test_a_trip_count_is_small_and_changes() -> None:
    model = model_of("""g (int64 trips, float[2] x) => (float[2] y) {
        yes = Constant<value_int = 1>()  go = Cast<to = 9>(yes)
        y = Loop (trips, go, x) <body = loop (int64 n, bool keep, float[2] state) => (bool on, float[2] next)
            { on = Identity(keep)  next = Add(state, state) }> }""")
    trips = [int(feed["trips"]) for feed in assert_runs(model, cases=5)]
    assert set(trips) <= set(range(6)) and len(set(trips)) == 5


SWITCHED = """g (float[n, 2] x, int64 rate) => (float[n, 2] y) {
    high = Constant<value_int = 16000>()  low = Constant<value_int = 8000>()
    is_high = Equal(rate, high)
    y = If (is_high) <then_branch = then () => (float[n, 2] a) { a = Relu(x) },
        else_branch = other () => (float[n, 2] b) {
            is_low = Equal(rate, low)
            b = If (is_low) <then_branch = t () => (float[n, 2] c) { c = Neg(x) },
                             else_branch = e () => (float[n, 2] d) { d = Abs(x) }> }> }"""


def test_a_switch_takes_every_value_it_is_compared_with_and_one_more() -> None:
    feeds = assert_runs(model_of(SWITCHED), cases=2)
    values = [int(feed["rate"]) for feed in feeds]
    assert {16000, 8000} < set(values) and len(set(values)) == 3
    assert all(feed["rate"].shape == () and feed["rate"].dtype == np.int64 for feed in feeds)


def test_two_switches_take_all_combinations() -> None:
    model = model_of("""g (float[n] x, bool a, bool b) => (float[n] y) {
        t = If (a) <then_branch = p () => (float[n] u) { u = Relu(x) },
                    else_branch = q () => (float[n] v) { v = Neg(x) }>
        y = If (b) <then_branch = r () => (float[n] w) { w = Abs(t) },
                    else_branch = s () => (float[n] z) { z = Exp(t) }>
        }""")
    assert len({(bool(feed["a"]), bool(feed["b"])) for feed in synthesise_feeds(model)}) == 4


def test_a_threshold_is_tried_on_both_sides() -> None:
    model = model_of("""g (float[n] x, int64 level) => (float[n] y) {
        limit = Constant<value_int = 7>()  above = Greater(level, limit)
        y = If (above) <then_branch = p () => (float[n] u) { u = Relu(x) },
                        else_branch = q () => (float[n] v) { v = Neg(x) }> }""")
    levels = {int(feed["level"]) for feed in synthesise_feeds(model)}
    assert min(levels) < 7 < max(levels) and 7 in levels


def test_a_size_compared_with_minus_one_is_still_a_size() -> None:
    model = model_of("""g (float[n, 2] x, int64[2] shape) => (float[a, b] y) {
        minus = Constant<value_ints = [-1]>()  one = Constant<value_ints = [1]>()
        unset = Equal(shape, minus)  sizes = Where(unset, one, shape)  y = Expand(x, sizes) }""")
    assert_runs(model)


@pytest.mark.parametrize("dtype", ["bool", "int64", "float"])
def test_a_condition_holds_both_values(dtype: str) -> None:
    text = "c = Cast<to = 9>(m)  y = Where(c, x, z)"
    model = model_of(f"g ({dtype}[n, k] m, float[n, k] x, float[n, k] z) => (float[n, k] y) {{ {text} }}")
    for feed in assert_runs(model):
        rows = feed["m"].astype(bool)
        assert rows.any(axis=1).all() and not rows.all()


def test_a_mask_that_is_added_is_zero_or_very_low() -> None:
    model = model_of("g (float[b, 1, s, s] attention_mask, float[b, h, s, s] x) => (float[b, h, s, s] y)"
                     " { y = Add(x, attention_mask) }")  # fmt: skip
    values = np.concatenate([feed["attention_mask"].ravel() for feed in synthesise_feeds(model)])
    assert set(np.unique(values)) == {-1e4, 0.0}


@pytest.mark.parametrize(
    "dtype",
    [
        "float",
        "float16",
        "bfloat16",
        "double",
        "float8e4m3fn",
        "float8e5m2",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
    ],
)
def test_every_type_has_its_own_dtype_and_more_than_one_value(dtype: str) -> None:
    model = model_of(f"g ({dtype}[4, 5] x) => ({dtype}[4, 5] y) {{ y = Identity(x) }}", opset=19)
    array = synthesise_feeds(model)[0]["x"]
    value = model.graph.inputs[0]
    assert value.dtype is not None
    assert array.dtype == value.dtype.numpy()
    assert len(np.unique(array.astype(np.complex128))) > 1


def test_strings_and_sequences() -> None:
    text = "g (string[n] s, seq(float[n]) q) => (string[n] t, int64 size) { t = Identity(s)  size = SequenceLength(q) }"
    for feed in assert_runs(model_of(text)):
        assert feed["s"].dtype == object and all(isinstance(word, str) for word in feed["s"])
        assert isinstance(feed["q"], list) and len(feed["q"]) >= 2


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Acosh", "Asin", "Acos", "Atanh", "Reciprocal"])
def test_values_lie_where_the_function_is_defined(op: str) -> None:
    model = model_of(f"g (float[n, 7] x) => (float[n, 7] y) {{ y = {op}(x) }}")
    session = session_of(model)
    for feed in synthesise_feeds(model):
        assert np.isfinite(run(session, feed)["y"]).all()


def test_scalars_are_arrays_without_axes() -> None:
    model = model_of("g (float a, float16 b, float[n] x) => (float[n] y) { y = Mul(x, a) }")
    for feed in synthesise_feeds(model):
        assert isinstance(feed["a"], np.ndarray) and feed["a"].shape == ()


def test_weights_among_the_inputs_are_not_fed() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) <float two = {2}> { y = Mul(x, two) }'
    )
    proto.graph.input.append(onnx.helper.make_tensor_value_info("two", 1, []))
    assert list(synthesise_feeds(ir.from_proto(proto))[0]) == ["x"]


def convolutional(kernel: str, channels: int, axes: str) -> ir.Model:
    return with_tables(
        f"g (float[batch, {channels}, {axes}] x) => (float y) {{ y = Conv(x, w) }}",
        w=(2, channels, *(int(size) for size in kernel.split("x"))),
    )


def test_axes_that_windows_slide_over_hold_two_windows() -> None:
    for feed in assert_runs(convolutional("11x5", 3, "height, width")):
        height, width = feed["x"].shape[2:]
        assert height >= 22 and width >= 10 and height != width
        assert height % 32 == 0 and width % 32 == 0
    for feed in assert_runs(convolutional("256", 1, "length")):
        assert 256 < feed["x"].shape[2] < 1024


def test_unnamed_axes_get_sizes_too() -> None:
    model = model_of("g (float[?, ?] a, float[?, ?] b) => (float y) { y = Add(a, b) }".replace("?", "p"))
    for value in model.graph.inputs:
        value.shape = ir.Shape([None, None])
    for feed in assert_runs(model):
        assert feed["a"].shape == feed["b"].shape


def test_given_shapes_bind_the_symbols_of_other_inputs() -> None:
    for feed in assert_runs(bert(), shapes={"input_ids": (4, 9)}):
        assert feed["attention_mask"].shape == (4, 9)
        assert feed["position_ids"].shape == (1, 9)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"ids": (2, 3)}, "input 'ids': the model has no such input (inputs: input_ids"),
        ({"input_ids": (2,)}, "input 'input_ids': the shape is batchxsequence, not 2"),
        ({"position_ids": (2, 3)}, "input 'position_ids': the shape is 1xsequence, not 2x3"),
        (
            {"input_ids": (2, 3), "attention_mask": (2, 4)},
            "input 'attention_mask': axis 'sequence' cannot be 4 here and 3 elsewhere",
        ),
    ],
)
def test_given_shapes_that_contradict_the_model(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        synthesise_feeds(bert(), shapes=shapes)
    assert str(caught.value).startswith(message)


def test_sizes_grow_until_the_model_runs() -> None:
    # The reshape needs a multiple of 128 whose name does not say so.
    model = model_of("""g (float[batch, length] x) => (float[a, 128] y) <int64[2] shape = {-1, 128}>
        { y = Reshape(x, shape) }""")
    session = session_of(model)
    feeds = feeds_that_run(model, lambda feed: run(session, feed))
    assert len(feeds) == 3
    assert all(feed["x"].size % 128 == 0 for feed in feeds)


def test_names_that_lie_about_sizes_are_seen_through() -> None:
    model = model_of("g (float[j, p] a, float[m, q] b) => (float y) { y = Add(a, b) }")
    session = session_of(model)
    for feed in feeds_that_run(model, lambda feed: run(session, feed)):
        assert feed["a"].shape == feed["b"].shape


def test_nothing_that_runs_names_the_runtimes_reason() -> None:
    def refuse(feeds: object) -> None:
        raise ValueError("there is a hole in the bucket\nsecond line")

    with pytest.raises(GraphoptError, match=r"there is a hole in the bucket \(give real ones with --calibration\)"):
        feeds_that_run(bert(), refuse)


SILERO = find_spec("silero_vad")


@pytest.mark.skipif(SILERO is None, reason="silero-vad is not installed")
def test_silero_runs_at_every_rate() -> None:
    assert SILERO is not None and SILERO.origin is not None
    path = Path(SILERO.origin).parent / "data" / "silero_vad.onnx"
    session = create_session(path, optimized=False)
    model = ir.load(path)
    feeds = synthesise_feeds(model)
    assert {int(feed["sr"]) for feed in feeds} == {8000, 16000}
    assert any(feed["input"].shape[0] > 1 for feed in feeds)
    for feed in feeds:
        assert feed["state"].shape == (2, feed["input"].shape[0], 128)
        run(session, feed)
    assert len(feeds_that_run(model, lambda feed: run(session, feed))) == len(feeds)


def test_bfloat16_is_ml_dtypes() -> None:
    model = model_of("g (bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }")
    assert synthesise_feeds(model)[0]["x"].dtype == ml_dtypes.bfloat16
