"""Moments of activations, against sums over everything that a full run returns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt import moments as api
from graphopt.errors import BadInput, GraphoptError
from graphopt.moments import (
    Channels,
    Moments,
    Pair,
    Patches,
    Relay,
    Tap,
    Tokens,
    cross_moments,
    layouts,
    moments,
    moments_in_groups,
    tap_of,
)
from graphopt.sites import Linear, linear_at
from graphopt.verification import whole
from graphopt.verification.tolerance import eps_of
from tests.models import draw_feeds, large_transformer
from tests.models.control_flow import if_on_input, loop
from tests.models.dtypes import bfloat16_compute, float16, unknown_op
from tests.models.nets import convnet, mlp, tied_embeddings, transformer_block
from tests.models.text import model_from_text

Array = np.ndarray[Any, Any]
Case = Mapping[str, Any]


def every(model: ir.Model, names: Sequence[str], feeds: Sequence[Case]) -> list[dict[str, Array]]:
    """Values of the whole model for each case."""
    found = {value.name: value for node in model.graph for value in node.outputs}
    session = whole.session_for(model, outputs=[found[name] for name in names if name in found])
    return [{**case, **whole.run_case(session, case)} for case in feeds]


def rows_of(array: Array, axis: int = -1) -> Array:
    return np.moveaxis(array.astype(np.float64), axis, -1).reshape(-1, array.shape[axis])


def assert_is(found: Moments, rows: Array, rtol: float = 1e-12) -> None:
    scale = np.abs(rows.T @ rows).max()
    np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(found.total, rows.sum(axis=0), rtol=rtol, atol=rtol * scale)
    np.testing.assert_array_equal(found.gram, found.gram.T)
    assert found.rows == len(rows)
    assert found.gram.dtype == found.total.dtype == np.float64


def of_lengths(*sizes: int) -> list[dict[str, Array]]:
    """Cases for the transformer block: 2 sequences of each length."""
    return [
        {"x": np.random.default_rng(size).standard_normal((2, size, 16)).astype(np.float32)} for size in sizes
    ]  # fmt: skip


BLOCK = [Tap("l1", Channels(16)), Tap("merged", Channels(16)), Tap("l2", Channels(16)), Tap("gelu", Channels(64))]


def test_grams_of_a_transformer_block_with_sequences_of_any_length() -> None:
    model, feeds = transformer_block(), of_lengths(5, 1, 9)
    before = [(node.op_type, *node.outputs) for node in model.graph]
    found, refused = moments(model, [*BLOCK, Tap("x", Channels(16))], feeds)
    assert refused == {}
    values = every(model, [tap.value for tap in BLOCK], feeds)
    for tap, known in found.items():
        rows = np.concatenate([rows_of(case[tap.value]) for case in values])
        assert_is(known, rows)
        np.testing.assert_allclose(known.mean, rows.mean(axis=0), atol=1e-12)
    assert [(node.op_type, *node.outputs) for node in model.graph] == before
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_several_passes_give_the_same_bits() -> None:
    model, feeds = transformer_block(), of_lengths(4, 6)
    at_once, _ = moments(model, BLOCK, feeds)
    said: list[str] = []
    one_by_one, _ = moments(model, BLOCK, feeds, limit=1, progress=said.append)
    assert said[0] == "moments, pass 1 of 4: sample 1 of 2"
    assert len(said) == 8
    for tap in BLOCK:
        np.testing.assert_array_equal(at_once[tap].gram, one_by_one[tap].gram)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 3, 4, 7)])
def test_any_rank_and_axis(shape: tuple[int, ...]) -> None:
    names = [f"d{i}" for i in range(len(shape) - 1)]
    model = model_from_text(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{",".join([*names, "7"])}] x) => (float y) '
        "{ t = Tanh(x) y = ReduceSum<keepdims = 0>(t) }"
    )
    feeds = [{"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)} for seed in range(3)]
    values = every(model, ["t"], feeds)
    taps = [Tap("t", Channels(size, axis)) for axis, size in enumerate(shape)]
    found, _ = moments(model, taps, feeds)
    for axis, tap in enumerate(taps):
        assert_is(found[tap], np.concatenate([rows_of(case["t"], axis) for case in values]))


def by_hand(
    x: Array, kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...]
) -> Array:
    """Every patch as a row, one number after the other."""
    axes = len(kernel)
    sizes = [
        (x.shape[2 + i] + pads[i] + pads[axes + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i in range(axes)
    ]
    rows = []
    for image in x:
        for place in itertools.product(*map(range, sizes)):
            row = []
            for channel, offset in itertools.product(image, itertools.product(*map(range, kernel))):
                at = [p * s - b + o * d for p, s, b, o, d in zip(place, strides, pads, offset, dilations, strict=False)]
                inside = all(0 <= i < n for i, n in zip(at, channel.shape, strict=True))
                row.append(float(channel[tuple(at)]) if inside else 0.0)
            rows.append(row)
    return np.array(rows).reshape(len(rows), x.shape[1] * int(np.prod(kernel)))


GEOMETRIES = [
    ((3,), (1,), (1, 1), (1,), (2, 3, 8)),
    ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), (2, 4, 5, 6)),
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (2, 3, 5, 6)),
    ((3, 2), (2, 3), (1, 0, 2, 1), (2, 1), (1, 3, 9, 8)),
    ((2, 1, 3), (1, 2, 1), (0, 0, 1, 1, 0, 1), (1, 1, 2), (1, 2, 3, 4, 6)),
]


@pytest.mark.parametrize(("kernel", "strides", "pads", "dilations", "shape"), GEOMETRIES)
def test_patches_of_a_convolution(
    kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...],
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layout = Patches(shape[1], kernel, strides, pads, dilations)
    expected = by_hand(x, kernel, strides, pads, dilations)
    for size in (1, 1000, 4 << 20):
        monkeypatch.setattr(layouts, "BLOCK_BYTES", size)
        found = [rows for (rows,) in layouts.blocks((layout, x))]
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_the_gram_of_a_convolution_says_what_it_gives() -> None:
    """‖W X‖² = tr(W G Wᵀ), with the weight reshaped as patches are."""
    model = convnet()
    feeds = [draw_feeds(model, size=size, seed=size) for size in (1, 3)]
    tap = Tap("image", Patches(3, (3, 3), pads=(1, 1, 1, 1)))
    found, refused = moments(model, [tap], feeds)
    assert not refused
    weight = model.graph.initializers["w1"].const_value
    assert weight is not None
    matrix = weight.numpy().reshape(8, 27).astype(np.float64)
    outputs = np.concatenate([rows_of(case["c1"], 1) for case in every(model, ["c1"], feeds)])
    assert np.trace(matrix @ found[tap].gram @ matrix.T) == pytest.approx((outputs**2).sum(), rel=1e-6)
    np.testing.assert_allclose(matrix @ found[tap].total, outputs.sum(axis=0), rtol=1e-5, atol=1e-3)


AT_SITES = [
    "c = Conv<kernel_shape = [3, 2], strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]>(x, k32)",
    'c = Conv<auto_pad = "SAME_UPPER", strides = [2, 3]>(x, k32)',
    'c = Conv<auto_pad = "SAME_LOWER", strides = [1, 2]>(x, k32)',
    'c = Conv<auto_pad = "VALID">(x, k32)',
    "c = Conv(x, k11)",
    "c = Conv<strides = [2, 2]>(x, k11)",
    "c = Conv<pads = [1, 1, 1, 1]>(x, k11)",
    "c = MatMul(x, w)",
    "c = MatMul(left, x)",
    "f = Flatten<axis = 3>(x) c = Gemm(f, w)",
    "f = Flatten<axis = 3>(x) t = Transpose(f) c = Gemm<transA = 1, transB = 1, alpha = 0.5>(t, wt)",
]


@pytest.mark.parametrize("body", AT_SITES)
def test_the_tap_of_a_site(body: str) -> None:
    """Σ y yᵀ = W G Wᵀ says that the rows are what the runtime multiplies the weight with."""
    model = model_from_text(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3, 7, 9] x) => (float y)
        <float[4, 3, 3, 2] k32, float[4, 3, 1, 1] k11, float[9, 5] w, float[5, 9] wt, float[5, 7] left>
        {{ {body} y = ReduceSum<keepdims = 0>(c) }}""")
    feeds = [draw_feeds(model)]
    (site,) = (at for node in model.graph if isinstance(at := linear_at(node), Linear))
    tap = tap_of(site)
    found, refused = moments(model, [tap], feeds)
    assert not refused
    matrix = site.matrix(17).astype(np.float64).reshape(site.outputs, -1)
    rows = rows_of(every(model, ["c"], feeds)[0]["c"], site.y_axis)
    np.testing.assert_allclose(matrix @ found[tap].gram @ matrix.T, rows.T @ rows, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(matrix @ found[tap].total, rows.sum(axis=0), rtol=1e-4, atol=1e-3)
    assert found[tap].rows == len(rows)


def test_groups_are_let_go_of() -> None:
    model, feeds = transformer_block(), of_lengths(4, 6)
    whole_, _ = moments(model, BLOCK, feeds)
    limit = 3 * 16 * 16 * 8
    groups = list(moments_in_groups(model, [*BLOCK, Tap("wo", Channels(16))][::-1], feeds, limit=limit))
    assert [list(group) for group in groups] == [BLOCK[:3], BLOCK[3:]]
    for tap in BLOCK:
        (gram,) = (group[tap].gram for group in groups if tap in group)
        np.testing.assert_array_equal(gram, whole_[tap].gram)


def test_no_place_for_a_kernel_gives_no_rows() -> None:
    assert list(layouts.blocks((Patches(2, (5, 5)), np.ones((1, 2, 4, 9), np.float32)))) == []
    assert api.patches(np.ones((1, 2, 4, 9)), (5, 5)).size == 0


def test_tokens_are_counted() -> None:
    model = tied_embeddings()
    feeds = [{"ids": np.array([[1, 1, -1]])}, {"ids": np.array([[0], [19]])}]
    words, hidden = Tap("ids", Tokens(20)), Tap("words", Channels(12))
    found, _ = moments(model, [words, hidden], feeds)
    counts = np.zeros(20)
    counts[[0, 1, 19]] = 1, 2, 2
    np.testing.assert_array_equal(found[words].gram, counts)
    assert found[words].rows == 5
    table = model.graph.initializers["table"].const_value
    assert table is not None
    exact = table.numpy().astype(np.float64)
    np.testing.assert_allclose(found[hidden].gram, exact.T @ np.diag(counts) @ exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("build", "name"), [(float16, "r1"), (float16, "again"), (bfloat16_compute, "a")])
def test_narrow_floats(build: Any, name: str) -> None:
    """They may be computed in float32: the rows differ by no more than the type rounds."""
    model = build()
    feeds = [draw_feeds(model, size=size, seed=size) for size in (4, 6)]
    size = {"r1": 32, "again": 32, "a": 8}[name]
    weights = {key: value.const_value for key, value in model.graph.initializers.items()}
    found, refused = moments(model, [Tap(name, Channels(size))], feeds)
    assert not refused
    dtype = np.float16 if build is float16 else ml_dtypes.bfloat16
    eps = eps_of(np.dtype(dtype))
    rows = []
    for case in feeds:
        x, w = case["x"].astype(dtype).astype(np.float64), weights["w1" if build is float16 else "w"]
        bias = weights["b1" if build is float16 else "b"]
        assert w is not None
        assert bias is not None
        y = x @ w.numpy().astype(np.float64) + bias.numpy().astype(np.float64)
        rows.append(np.maximum(y, 0) if build is float16 else y)
    exact = np.concatenate(rows)
    gram = found[Tap(name, Channels(size))].gram
    np.testing.assert_allclose(gram, exact.T @ exact, atol=4 * eps * float((exact**2).sum()))
    assert {key: value.const_value for key, value in model.graph.initializers.items()} == weights


def test_rows_of_narrow_floats_are_widened() -> None:
    x = np.array([[60000, 60000]], np.float16)
    (rows,) = next(layouts.blocks((Channels(2), x)))
    np.testing.assert_array_equal(rows.T @ rows, np.full((2, 2), 3.6e9))


def test_a_model_with_external_weights(tmp_path: Path) -> None:
    path = large_transformer(tmp_path / "m.onnx", layers=2, width=32, heads=2)
    model = ir.load(path)
    feeds = [{"ids": np.random.default_rng(n).integers(0, 2048, (1, n))} for n in (3, 7)]
    products = [node.inputs for node in model.graph if node.op_type == "MatMul"]
    names = [x.name or "" for x, weight in products if x is not None and weight is not None and weight.is_initializer()]
    sizes = {name: case.shape[-1] for name, case in every(model, names, feeds)[0].items()}
    taps = [Tap(name, Channels(sizes[name])) for name in dict.fromkeys(names)]
    assert len(taps) == 8
    found, _ = moments(model, taps, feeds, limit=20_000)
    values = every(model, names, feeds)
    for tap in taps:
        assert_is(found[tap], np.concatenate([rows_of(case[tap.value]) for case in values]))


def test_what_cannot_be_tapped_is_refused_with_the_reason() -> None:
    model = if_on_input()
    feeds = [{"x": np.ones((2, 8), np.float32), "flag": np.array(True), "inner_flag": np.array(False)}]
    taps = [Tap(name, Channels(8)) for name in ("e0", "it", "w", "nowhere", "h", "r")]
    found, refused = moments(model, taps, feeds)
    assert {tap.value for tap in found} == {"h", "r"}
    assert {tap.value: reason for tap, reason in refused.items()} == {
        "e0": "'e0' is inside the body of If '', whose values cannot be returned",
        "it": "'it' is inside the body of If '', whose values cannot be returned",
        "w": "'w' is a constant",
        "nowhere": "the model computes no 'nowhere'",
    }
    unknown = unknown_op()
    found, refused = moments(unknown, [Tap("a", Channels(8)), Tap("c", Channels(8))], [draw_feeds(unknown)])
    assert [tap.value for tap in found] == ["a"]
    assert list(refused.values()) == ["'c' depends on com.example.private::Mystery, which ONNX Runtime does not know"]


def test_the_result_of_a_loop_is_tapped() -> None:
    model = loop()
    feeds = [draw_feeds(model)]
    node = next(node for node in model.graph if node.op_type == "Loop")
    name = node.outputs[0].name or ""
    (values,) = every(model, [name], feeds)
    tap = Tap(name, Channels(values[name].shape[-1]))
    found, _ = moments(model, [tap], feeds)
    assert_is(found[tap], rows_of(values[name]))


def test_zeros_are_fine_and_nan_is_not() -> None:
    model = mlp()
    tap = Tap("x", Channels(16))
    found, _ = moments(model, [tap], [{"x": np.zeros((2, 16), np.float32)}])
    assert not found[tap].gram.any()
    for bad in (np.nan, np.inf, -np.inf):
        feeds = [{"x": np.ones((2, 16), np.float32)}, {"x": np.full((2, 16), bad, np.float32)}]
        for name, size in (("x", 16), ("h1", 32)):
            with pytest.raises(BadInput, match=rf"^activation '{name}', sample 1: is NaN or infinite"):
                moments(model, [Tap(name, Channels(size))], feeds)
            with pytest.raises(BadInput, match="sample 1: is NaN or infinite"):
                cross_moments(model, model, [(Tap(name, Channels(size)),) * 2], feeds)


def test_what_does_not_fit_is_told() -> None:
    model = mlp()
    with pytest.raises(BadInput, match="sample 0: input 'x'"):
        moments(model, [Tap("h1", Channels(32))], [{"x": np.zeros((2, 5), np.float32)}])
    with pytest.raises(BadInput, match="sample 0: input 'x': no value was given"):
        moments(model, [Tap("h1", Channels(32))], [{}])
    with pytest.raises(BadInput, match="sample 0: input 'x': no value was given"):
        moments(model, [Tap("x", Channels(16))], [{}])
    feeds = [{"x": np.zeros((2, 16), np.float32)}]
    with pytest.raises(ValueError, match=r"'h1', sample 0: an activation of shape \[2, 32\] has not 31 channels"):
        moments(model, [Tap("h1", Channels(31))], feeds)
    with pytest.raises(ValueError, match="cannot be paired"):
        cross_moments(model, model, [(Tap("x", Channels(16)), Tap("h1", Channels(32)))], feeds)
    with pytest.raises(ValueError, match="positions differ"):
        list(layouts.blocks((Channels(4), np.zeros((2, 4))), (Channels(4), np.zeros((3, 4)))))


class Lazy(Sequence[Case]):
    """Feeds that exist once they are asked for, and count how often."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return self.cases[index]

    def __iter__(self) -> Iterator[Case]:
        raise AssertionError("feeds are asked for one at a time")


def test_feeds_are_read_one_at_a_time() -> None:
    feeds = Lazy(of_lengths(3, 4, 5))
    moments(transformer_block(), BLOCK, feeds)
    assert feeds.asked == [0, 1, 2]


def truncate(model: ir.Model, name: str) -> None:
    """Write the weight of a MatMul as two factors of a third of its rank, by new nodes."""
    node = next(
        n for n in model.graph if n.op_type == "MatMul" and n.inputs[1] is not None and n.inputs[1].name == name
    )
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    u, s, vt = np.linalg.svd(tensor.numpy(), full_matrices=False)
    rank = len(s) // 3
    factors = [(u[:, :rank] * s[:rank]).astype(np.float32), vt[:rank].astype(np.float32)]
    first, second = (
        ir.Value(name=f"{name}_{part}", const_value=ir.tensor(array, name=f"{name}_{part}"))
        for part, array in enumerate(factors)
    )
    for value in (first, second):
        model.graph.register_initializer(value)
    middle = ir.Node("", "MatMul", [node.inputs[0], first], outputs=[ir.Value(name=f"{name}_mid")])
    end = ir.Node("", "MatMul", [middle.outputs[0], second], outputs=[ir.Value(name=f"{name}_end")])
    model.graph.insert_before(node, [middle, end])
    ir.convenience.replace_all_uses_with(node.outputs[0], end.outputs[0])
    model.graph.remove(node, safe=True)


def expected_cross(original: ir.Model, current: ir.Model, tap: Tap, feeds: Sequence[Case]) -> tuple[Array, Array]:
    """The rows of both models."""
    return tuple(  # type: ignore[return-value]
        np.concatenate([rows_of(case[tap.value]) for case in every(model, [tap.value], feeds)])
        for model in (original, current)
    )


WEIGHTS = dict(zip(BLOCK, ("wqkv", "wo", "wu", "wd"), strict=True))


def test_cross_moments_of_two_models() -> None:
    original, current, feeds = transformer_block(), transformer_block(), of_lengths(5, 3)
    for weight in WEIGHTS.values():
        truncate(current, weight)
    pairs: list[Pair] = [(tap, tap) for tap in BLOCK]
    found, refused = cross_moments(original, current, pairs, feeds)
    split, _ = cross_moments(original, current, pairs, feeds, limit=1)
    assert refused == {}
    for pair in pairs:
        before, now = expected_cross(original, current, pair[0], feeds)
        assert_is(found[pair].current, now)
        np.testing.assert_allclose(found[pair].cross, before.T @ now, rtol=1e-12, atol=1e-12 * np.abs(now).sum())
        np.testing.assert_array_equal(found[pair].cross, split[pair].cross)
    assert not np.allclose(found[pairs[3]].cross, found[pairs[3]].current.gram)


def test_cross_moments_of_refused_and_of_tokens() -> None:
    model = tied_embeddings()
    feeds = [{"ids": np.array([[1, 1, 3]])}]
    words, table = Tap("ids", Tokens(20)), Tap("table", Channels(12))
    found, refused = cross_moments(model, model, [(words, words), (table, words), (words, table)], feeds)
    np.testing.assert_array_equal(found[words, words].cross, found[words, words].current.gram)
    assert refused == {
        (table, words): "in the original, 'table' is a constant",
        (words, table): "'table' is a constant",
    }
    two = model_from_text("""
        <ir_version: 8, opset_import: ["": 17]>
        two (int64[n] a, int64[n] b) => (float[n, 4] y) <float[9, 4] t> { i = Max(a, b) y = Gather(t, i) }""")
    pair = Tap("a", Tokens(9)), Tap("b", Tokens(9))
    with pytest.raises(GraphoptError, match="other indices than in the original"):
        cross_moments(two, two, [pair], [{"a": np.array([1]), "b": np.array([2])}])


def nodes_run(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The operators of every session made from now on."""
    made: list[list[str]] = []
    create = whole.session_for

    def watched(model: ir.Model, **how: Any) -> Any:
        made.append([node.op_type for node in model.graph if node.op_type != "Constant"])
        return create(model, **how)

    monkeypatch.setattr(whole, "session_for", watched)
    return made


def test_a_relay_follows_a_model_that_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as from the feeds each time, and every node is run once."""
    original, current, feeds = transformer_block(), transformer_block(), of_lengths(5, 3, 8)
    made = nodes_run(monkeypatch)
    relayed, direct, sizes = [], [], []
    with Relay(original, current, feeds, folder=tmp_path) as relay:
        for tap, weight in WEIGHTS.items():
            made.clear()
            found, _ = relay.cross_moments([(tap, tap)])
            relayed.append(found[tap, tap])
            sizes.append([len(session) for session in made])
            found, _ = cross_moments(original, current, [(tap, tap)], feeds)
            direct.append(found[tap, tap])
            truncate(current, weight)
            assert len(list(tmp_path.rglob("*.npy"))) <= 2 * 6 * len(feeds)
    assert list(tmp_path.iterdir()) == []
    for one, other in zip(relayed, direct, strict=True):
        np.testing.assert_array_equal(one.cross, other.cross)
        np.testing.assert_array_equal(one.current.gram, other.current.gram)
    made.clear()
    cross_moments(original, original, [(BLOCK[3], BLOCK[3])], feeds)
    assert sum(before for before, _ in sizes) == len(made[0])  # of the original, whose nodes stay
    assert all(before < len(made[0]) / 2 for before, _ in sizes)


def test_a_relay_notices_that_the_past_was_changed(tmp_path: Path) -> None:
    original, current, feeds = transformer_block(), transformer_block(), of_lengths(4, 2)
    last = BLOCK[3], BLOCK[3]
    with Relay(original, current, feeds, folder=tmp_path) as relay:
        relay.cross_moments([(BLOCK[2], BLOCK[2])])
        truncate(current, "wqkv")
        found, _ = relay.cross_moments([last])
        again, _ = relay.cross_moments([last])  # what is asked for a second time is there too
        tensor = current.graph.initializers["wo"]
        assert tensor.const_value is not None
        tensor.const_value = ir.tensor(tensor.const_value.numpy() * 2)
        doubled, _ = relay.cross_moments([last])
        direct, _ = cross_moments(original, current, [last], feeds)
    before, now = expected_cross(original, current, BLOCK[3], feeds)
    np.testing.assert_allclose(doubled[last].cross, before.T @ now, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(doubled[last].cross, direct[last].cross)
    np.testing.assert_array_equal(found[last].cross, again[last].cross)
    assert not np.allclose(found[last].cross, doubled[last].cross)


def test_a_relay_carries_narrow_floats(tmp_path: Path) -> None:
    for build, names in ((float16, (("r1", 32), ("again", 32))), (bfloat16_compute, (("xb", 16), ("a", 8)))):
        model = build()
        feeds = [draw_feeds(model, size=size, seed=size) for size in (4, 6)]
        with Relay(model, model, feeds, folder=tmp_path) as relay:
            for name, size in names:
                tap = Tap(name, Channels(size))
                found, _ = relay.cross_moments([(tap, tap)])
                alone, _ = moments(model, [tap], feeds)
                np.testing.assert_allclose(found[tap, tap].cross, alone[tap].gram, rtol=1e-12, atol=1e-12)


def test_a_relay_in_several_passes_and_into_bodies(tmp_path: Path) -> None:
    original, current, feeds = transformer_block(), transformer_block(), of_lengths(5, 3)
    truncate(current, "wqkv")
    pairs: list[Pair] = [(tap, tap) for tap in BLOCK]
    direct, _ = cross_moments(original, current, pairs, feeds)
    with Relay(original, current, feeds, folder=tmp_path, limit=1) as relay:
        found, _ = relay.cross_moments(pairs[::-1])
    for pair in pairs:
        np.testing.assert_array_equal(found[pair].cross, direct[pair].cross)

    model = if_on_input()
    cases = [{**draw_feeds(model, seed=seed), "flag": np.array(bool(seed))} for seed in range(2)]
    with Relay(model, model, cases, folder=tmp_path) as relay:
        for name in ("h", "r", "y"):
            tap = Tap(name, Channels(8))
            found, _ = relay.cross_moments([(tap, tap)])
            rows = np.concatenate([rows_of(case[name]) for case in every(model, [name], cases)])
            assert_is(found[tap, tap].current, rows)
