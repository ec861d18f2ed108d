"""fuse-attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from graphopt.passes.fuse.attention import FuseAttention
from tests.passes.common import applications, op_types, run_ort, run_pass
from tests.passes.fuse.common import DOUBLE, FLOAT16, G, assert_rounding, in_body, only, random, reasons

HEADS, SIZE, WIDTH = 2, 4, 8


def _split(g: G, x: str, how: str, perm: list[int]) -> str:
    if how == "computed":
        # What torch exports: batch and length from the shape of the input.
        sizes = g.op("Shape", x)
        batch = g.op("Gather", sizes, g.ints(0))
        length = g.op("Slice", sizes, g.ints(1), g.ints(2))
        target = g.op("Concat", batch, length, g.ints(-1), g.ints(SIZE), axis=0)
    else:
        target = g.ints(*{"zeros": (0, 0, HEADS, SIZE), "minus one": (0, -1, HEADS, SIZE)}[how])
    return g.op("Transpose", g.op("Reshape", x, target), perm=perm)


def _projected(g: G, x: str, biased: bool, seed: int) -> str:
    y = g.op("MatMul", x, g.const(random((WIDTH, WIDTH), seed=seed)))
    return g.op("Add", y, g.const(random((WIDTH,), seed=seed + 1))) if biased else y


def _attention(g: G, **options: Any) -> None:
    """softmax(q k^T / 2 + mask) v in one of its spellings."""
    batch, queries = options.get("batch", "b"), options.get("queries", "s")
    keys = options.get("keys", queries)
    how = options.get("split", "zeros")
    biases = options.get("biases", (True, True, True))
    x = g.input("x", batch, queries, WIDTH)
    y = x if keys == queries else g.input("y", options.get("key_batch", batch), keys, WIDTH)
    q = _split(g, _projected(g, x, biases[0], 10), how, [0, 2, 1, 3])
    k3, transposed = _projected(g, y, biases[1], 20), options.get("keys_by", "two")
    if transposed == "one":
        k = _split(g, k3, how, [0, 2, 3, 1])
    else:
        k = _split(g, k3, how, [0, 2, 1, 3])
        k = g.op("Transpose", k, perm=[0, 1, 3, 2]) if transposed == "two" else _by_three_axes(g, k)
    v = _split(g, _projected(g, y, biases[2], 30), how, [0, 2, 1, 3])
    scale = options.get("scale", "after")
    if scale == "both":
        q, k = g.op("Mul", q, g.const(math.sqrt(0.5))), g.op("Mul", g.const(math.sqrt(0.5)), k)
    scores = g.op("MatMul", q, k)
    if scale == "after":
        scores = g.op("Mul", scores, g.const(0.5))
    elif scale == "divided":
        scores = g.op("Div", scores, g.const(2.0))
    scores = _masked(g, scores, options.get("mask", "none"), batch, queries, keys)
    p = g.op("Softmax", scores, axis=options.get("axis", -1))
    if options.get("probabilities") == "output":
        g.output(p)
    if options.get("guard"):
        p = g.op("Where", g.op("IsNaN", p), g.const(options.get("guard_value", 0.0)), p)
    o = g.op("Transpose", g.op("MatMul", p, v), perm=options.get("merge", [0, 2, 1, 3]))
    g.output(g.op("Reshape", o, g.ints(*options.get("merged", (0, 0, WIDTH)))), batch, queries, WIDTH)


def _by_three_axes(g: G, k: str) -> str:
    """[b, h, t, d] -> [b h, t, d] -> [b h, d, t] -> [b, h, d, t], as torch exports a swap of the last axes."""
    sizes = g.op("Shape", k)
    most = g.ints(np.iinfo(np.int64).max)
    last = g.op("Slice", sizes, g.ints(-1), most)
    before = g.op("Slice", sizes, g.ints(-2), g.ints(-1))
    first = g.op("Slice", sizes, g.ints(np.iinfo(np.int64).min), g.ints(-2))
    flat = g.op("Reshape", k, g.op("Concat", g.ints(-1), before, last, axis=0))
    return g.op("Reshape", g.op("Transpose", flat, perm=[0, 2, 1]), g.op("Concat", first, last, before, axis=0))


def _masked(g: G, scores: str, mask: str, batch: Any, queries: Any, keys: Any) -> str:
    if mask == "none":
        return scores
    shape = {
        "full": (batch, 1, queries, keys),
        "keys": (batch, 1, 1, keys),
        "heads": (1, HEADS, queries, keys),
        "matrix": (queries, keys),
        "infinite": (batch, 1, queries, keys),
    }[mask]
    chosen = g.op("Greater", g.input("m", *shape), g.const(0.0))
    low = -math.inf if mask == "infinite" else float(np.finfo(np.float32).min) / 2
    added = g.op("Where", chosen, g.const(0.0), g.const(low))
    return g.op("Add", scores, added)


def _feeds(model: Any, batch: int = 2, queries: int = 3, keys: int = 5) -> dict[str, np.ndarray]:
    sizes = {"b": batch, "s": queries, "t": keys}
    feeds = {}
    for seed, value in enumerate(model.graph.input):
        dims = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = random(dims, seed=seed)
    return feeds


@settings(max_examples=40, deadline=None)
@given(
    split=st.sampled_from(["zeros", "minus one", "computed"]),
    keys_by=st.sampled_from(["one", "two", "three"]),
    scale=st.sampled_from(["none", "after", "both", "divided"]),
    mask=st.sampled_from(["none", "full", "keys", "heads", "matrix"]),
    guard=st.booleans(),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    keys=st.sampled_from(["s", "t"]),
    opset=st.sampled_from([13, 17, 21]),
)
def test_property(
    split: str, keys_by: str, scale: str, mask: str, guard: bool, biases: tuple[bool, ...], keys: str, opset: int
) -> None:
    g = G(opset)
    _attention(g, split=split, keys_by=keys_by, scale=scale, mask=mask, guard=guard, biases=biases, keys=keys)
    before = g.model()
    after, records = run_pass(before, FuseAttention)
    assert "MultiHeadAttention" in op_types(after) and "Softmax" not in op_types(after), reasons(records)
    node = only(after, "MultiHeadAttention")
    assert (node.domain, after.opset_imports["com.microsoft"]) == ("com.microsoft", 1)
    assert node.attributes.get_int("num_heads", 0) == HEADS
    assert node.attributes.get_float("scale", 0.0) == pytest.approx(1.0 if scale == "none" else 0.5)
    assert "IsNaN" not in op_types(after)
    assert_rounding(before, after, _feeds(before))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 4), (1, 7, 2), (0, 3, 5)])
def test_sizes(sizes: tuple[int, int, int]) -> None:
    g = G(17)
    _attention(g, mask="full", keys="t")
    before = g.model()
    after, _ = run_pass(before, FuseAttention)
    assert_rounding(before, after, _feeds(before, *sizes))


def test_rows_that_are_masked_out_stay_zeros() -> None:
    g = G(17)
    _attention(g, mask="infinite", guard=True)
    before = g.model()
    after, _ = run_pass(before, FuseAttention)
    assert "MultiHeadAttention" in op_types(after)
    feeds = _feeds(before)
    feeds["m"] = random((2, 1, 3, 3), seed=9)
    feeds["m"][0, 0, 1] = -1.0
    (result,) = run_ort(after, feeds)
    assert (result[0, 1] == 0).all() and (result[1] != 0).all()
    assert_rounding(before, after, feeds)


def test_static_shapes() -> None:
    g = G(17)
    _attention(g, batch=2, queries=3, mask="full")
    before = g.model()
    after, _ = run_pass(before, FuseAttention)
    assert "MultiHeadAttention" in op_types(after)
    assert_rounding(before, after, _feeds(before))


def test_several_layers_behind_each_other() -> None:
    """Sizes are traced through what was fused before."""
    from onnx import compose

    model = None
    for layer in range(3):
        g = G(17)
        _attention(g, split="computed", keys_by="three")
        one = compose.add_prefix(g.model(), f"l{layer}_")
        if model is None:
            model = one
        else:
            pairs = [(model.graph.output[0].name, one.graph.input[0].name)]
            model = compose.merge_models(model, one, pairs)
    assert model is not None
    after, records = run_pass(model, FuseAttention)
    assert op_types(after).count("MultiHeadAttention") == 3, reasons(records)
    assert_rounding(model, after, {model.graph.input[0].name: random((2, 3, WIDTH), scale=0.3)})


def test_inside_a_body() -> None:
    g = G(17)
    _attention(g, batch=2, queries=3)
    before = in_body(g.model())
    after, records = run_pass(before, FuseAttention)
    assert applications(records) == 1
    assert_rounding(before, after, {"condition": np.array(True), "x": random((2, 3, WIDTH))})


def test_computed_mask_that_a_caller_gives() -> None:
    g = G(17)
    x = g.input("x", "b", "s", WIDTH)
    parts = [_split(g, x, "zeros", perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    scores = g.op("Add", g.input("m", "b", 1, "s", "s"), g.op("MatMul", parts[0], parts[1]))
    product = g.op("MatMul", g.op("Softmax", scores, axis=-1), parts[2])
    o = g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, 0, WIDTH))
    g.output(o, "b", "s", WIDTH)
    before = g.model()
    after, _ = run_pass(before, FuseAttention)
    assert "MultiHeadAttention" in op_types(after)
    assert_rounding(before, after, _feeds(before))


REFUSED: dict[str, dict[str, Any]] = {
    "softmax over queries": {"axis": 2},
    "the probabilities are an output": {"probabilities": "output"},
    "NaN becomes one": {"guard": True, "guard_value": 1.0},
    "heads not moved back": {"merge": [0, 1, 2, 3], "batch": 2, "queries": 2, "merged": (2, 2, WIDTH)},
    "heads and sizes exchanged": {"merge": [0, 2, 3, 1]},
    "a batch of one for the keys": {"batch": 2, "queries": 3, "keys": 5, "key_batch": 1},
    "a batch of another name": {"keys": "t", "key_batch": "c"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    g = G(17)
    _attention(g, **REFUSED[name])
    model = g.model()
    after, records = run_pass(model, FuseAttention)
    assert applications(records) == 0
    assert op_types(after) == [n.op_type for n in model.graph.node]


def test_windows_are_not_heads() -> None:
    """[2, 6, 8] -> [4, 3, 2, 4]: the length is cut, so that positions attend within their window only."""
    g = G(17)
    x = g.input("x", 2, 6, WIDTH)
    windows = g.op("Reshape", x, g.ints(4, 3, HEADS, SIZE))
    parts = [g.op("Transpose", windows, perm=perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    product = g.op("MatMul", g.op("Softmax", g.op("MatMul", parts[0], parts[1]), axis=-1), parts[2])
    g.output(g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(4, 3, WIDTH)), 4, 3, WIDTH)
    _, records = run_pass(g.model(), FuseAttention)
    assert applications(records) == 0 and "left as they are" in reasons(records)


@pytest.mark.parametrize("what", ["heads", "size"])
def test_unlike_heads_of_keys(what: str) -> None:
    """Two heads of four and one head of eight broadcast: not the same as two heads."""
    g = G(17)
    x = g.input("x", 2, 3, WIDTH)
    q = _split(g, x, "zeros", [0, 2, 1, 3])
    if what == "heads":
        narrow = g.input("y", 2, 3, SIZE)
        shape = (0, 0, 1, SIZE)
    else:
        narrow, shape = x, (0, 0, HEADS, SIZE)
    k = g.op("Transpose", g.op("Reshape", narrow, g.ints(*shape)), perm=[0, 2, 3, 1])
    values = g.input("z", 2, 3, 6) if what == "size" else x
    v_shape = (0, 0, HEADS, 3) if what == "size" else (0, 0, HEADS, SIZE)
    v = g.op("Transpose", g.op("Reshape", values, g.ints(*v_shape)), perm=[0, 2, 1, 3])
    product = g.op("MatMul", g.op("Softmax", g.op("MatMul", q, k), axis=-1), v)
    width = 6 if what == "size" else WIDTH
    g.output(g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, 0, width)), 2, 3, width)
    before = g.model()
    after, records = run_pass(before, FuseAttention)
    # Values may be of another size than queries and keys; the number of heads must be one.
    assert applications(records) == (what == "size")
    feeds = {i.name: random([d.dim_value for d in i.type.tensor_type.shape.dim]) for i in before.graph.input}
    assert_rounding(before, after, feeds)


@pytest.mark.parametrize("shape", [("c", 1, "s", "s"), ("b", 1, "s", "u"), ("b", 1, "u", "s")])
def test_masks_of_other_shapes(shape: tuple[Any, ...]) -> None:
    g = G(17)
    x = g.input("x", "b", "s", WIDTH)
    parts = [_split(g, x, "zeros", perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    scores = g.op("Add", g.op("MatMul", parts[0], parts[1]), g.input("m", *shape))
    product = g.op("MatMul", g.op("Softmax", scores, axis=-1), parts[2])
    g.output(g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, 0, WIDTH)), None, None, WIDTH)
    _, records = run_pass(g.model(), FuseAttention)
    assert applications(records) == 0 and "not provably" in reasons(records)


@pytest.mark.parametrize("dtype", [FLOAT16, DOUBLE])
def test_other_floats(dtype: int) -> None:
    g = G(17, dtype)
    _attention(g)
    _, records = run_pass(g.model(), FuseAttention)
    assert applications(records) == 0 and "float32" in reasons(records)


def test_a_vector_is_no_scale() -> None:
    g = G(17)
    x = g.input("x", 2, 3, WIDTH)
    parts = [_split(g, x, "zeros", perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    scores = g.op("Mul", g.op("MatMul", parts[0], parts[1]), g.const([0.5, 1.0, 2.0]))
    product = g.op("MatMul", g.op("Softmax", scores, axis=-1), parts[2])
    g.output(g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, 0, WIDTH)), 2, 3, WIDTH)
    assert applications(run_pass(g.model(), FuseAttention)[1]) == 0


def test_a_scale_of_zero_is_left() -> None:
    """The operator takes zero for: not given."""
    g = G(17)
    x = g.input("x", 2, 3, WIDTH)
    parts = [_split(g, x, "zeros", perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    scores = g.op("Mul", g.op("MatMul", parts[0], parts[1]), g.const(0.0))
    product = g.op("MatMul", g.op("Softmax", scores, axis=-1), parts[2])
    g.output(g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, 0, WIDTH)), 2, 3, WIDTH)
    _, records = run_pass(g.model(), FuseAttention)
    assert applications(records) == 0 and "scale" in reasons(records)


def test_another_target() -> None:
    g = G(17)
    _attention(g)
    after, records = run_pass(g.model(), FuseAttention, target="onnx")
    assert applications(records) == 0 and "com.microsoft" not in after.opset_imports
    assert "does not run MultiHeadAttention" in reasons(records)


def test_a_long_way_back_is_given_up() -> None:
    """Sizes that depend on data, a thousand operators before the attention."""
    g = G(17)
    x = g.op("Compress", g.input("data", "n", "m", WIDTH), g.input("keep", "k", dtype=TensorProto.BOOL), axis=1)
    for _ in range(1000):
        x = g.op("Neg", x)
    parts = [_split(g, x, "minus one", perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    product = g.op("MatMul", g.op("Softmax", g.op("MatMul", parts[0], parts[1]), axis=-1), parts[2])
    merged = g.op("Reshape", g.op("Transpose", product, perm=[0, 2, 1, 3]), g.ints(0, 0, WIDTH))
    g.output(merged, None, None, WIDTH)
    before = g.model()
    after, _ = run_pass(before, FuseAttention)
    keep = np.array([True, False, True, True])
    assert_rounding(before, after, {"data": random((2, 4, WIDTH)), "keep": keep})
