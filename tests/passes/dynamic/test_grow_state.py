"""What a Loop appends to: stacked and joined after it, or held in a buffer of one size."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import graphs
from graphopt.passes.dynamic.grow_state import GrowState
from tests.passes.common import applications, assert_same_bits, op_types, run_pass

RTX = "tensorrt-rtx"


def appending(
    *,
    opset: int = 18,
    dtype: str = "float",
    start: str = "[2,k]",
    part: str = "Unsqueeze(h, ax)",
    axis: int = 1,
    read: str = "",
    trips: str = "trips",
    condition: str = "yes",
    order: str = "s, p",
    extra: str = "",
    result: str = "float[2,m] grown",
) -> str:
    """A Loop that carries a vector h and appends to s."""
    return f"""
        <ir_version: 8, opset_import: ["": {opset}]>
        g ({dtype}[2] x, {dtype}{start} first, int64 trips) => ({result.replace("float", dtype)}, {dtype}[2] last)
        <bool yes = {{1}}, int64[1] ax = {{1}}, int64[1] zero = {{0}}, int64 three = {{3}}, int64 two = {{2}}> {{
            last, grown = Loop({trips}, {condition}, x, first) <
                body = step (int64 i, bool go, {dtype}[2] h, {dtype}{start} s)
                       => (bool go_on, {dtype}[2] next, {dtype}{start} more) {{
                    {extra}
                    {read or "n = Tanh(h)"}
                    next = Neg(n)
                    p = {part}
                    more = Concat<axis = {axis}>({order})
                    go_on = Identity(go)
                }}
            >
        }}"""


READS = "t = ReduceSum<keepdims = 0>(s, ax) u = Add(h, t) n = Tanh(u)"


def feeds(
    lengths: tuple[int, ...] = (0, 2), trips: tuple[int, ...] = (0, 1, 3), dtype: type[np.generic] = np.float32
) -> list[dict[str, np.ndarray]]:
    numbers = np.random.default_rng(0)
    return [
        {
            "x": np.array([-0.0, np.nan] if count == 3 else [0.5, -1], dtype),
            "first": numbers.standard_normal((2, length)).astype(dtype),
            "trips": np.array(count, np.int64),
        }
        for length in lengths
        for count in trips
    ]


def body_of(model: ir.Model) -> ir.Graph:
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    return loop.attributes["body"].as_graph()


@pytest.mark.parametrize("dtype", ["float", "float16", "int64"])
@pytest.mark.parametrize("axis", [1, -1])
def test_what_is_only_appended_is_stacked(dtype: str, axis: int) -> None:
    numpy = {"float": np.float32, "float16": np.float16, "int64": np.int64}[dtype]
    read = "n = Abs(h)" if dtype == "int64" else ""
    model = appending(dtype=dtype, axis=axis, read=read)
    result, records = run_pass(model, GrowState)
    assert applications(records) == 1
    assert "Concat" not in [node.op_type for node in body_of(result)]
    given = feeds(dtype=np.float32)
    if dtype == "int64":
        given = [{**feed, "x": np.array([1, -2])} for feed in given]
    assert_same_bits(
        model, result, *({k: v if k == "trips" else v.astype(numpy) for k, v in feed.items()} for feed in given)
    )


def test_the_loop_keeps_its_name() -> None:
    proto = onnx.parser.parse_model(appending())
    proto.graph.node[0].name = "turns"
    result, _ = run_pass(proto, GrowState)
    assert [node.name for node in result.graph if node.op_type == "Loop"] == ["turns"]


def test_a_start_of_size_zero_needs_no_join() -> None:
    model = appending(start="[2,0]", result="float[2,m] grown")
    # What is declared of the state of a body is not what it is after a turn.
    model = model.replace("float[2,0] s)", "float[2,j] s)").replace("float[2,0] more)", "float[2,l] more)")
    result, _ = run_pass(model, GrowState)
    assert op_types(result).count("Concat") == 0
    assert_same_bits(model, result, *feeds(lengths=(0,)))


def test_several_parts_and_a_part_from_outside() -> None:
    model = appending(part="Concat<axis = 1>(a, a, a)", extra="a = Unsqueeze(x, ax) b = Unsqueeze(h, ax)",
                      order="s, p, b, a")  # fmt: skip
    result, records = run_pass(model, GrowState)
    assert applications(records) == 1
    assert_same_bits(model, result, *feeds())
    outer = appending(part="Identity(h)", order="s, col").replace("last, grown", "col = Unsqueeze(x, ax) last, grown")
    result, records = run_pass(outer, GrowState)
    assert applications(records) == 1
    assert_same_bits(outer, result, *feeds())


def test_first_axis_and_other_axes_of_unknown_size() -> None:
    model = """
        <ir_version: 8, opset_import: ["": 18]>
        g (float[n] x, float[k,n] first, int64 trips) => (float[m,n] grown)
        <bool yes = {1}, int64[1] ax = {0}> {
            last, grown = Loop(trips, yes, x, first) <
                body = step (int64 i, bool go, float[n] h, float[k,n] s) => (bool c, float[n] next, float[l,n] more) {
                    next = Tanh(h)
                    p = Unsqueeze(next, ax)
                    more = Concat<axis = 0>(s, p)
                    c = Identity(go)
                }
            >
        }"""
    result, records = run_pass(model, GrowState)
    assert applications(records) == 1
    for size in (3, 0):
        for length in (0, 2):
            given = {"x": np.ones(size, np.float32), "first": np.ones((length, size), np.float32)}
            assert_same_bits(model, result, *({**given, "trips": np.array(n)} for n in (0, 1, 3)))


def test_two_of_them_in_one_loop_and_what_is_stacked_already() -> None:
    model = """
        <ir_version: 8, opset_import: ["": 18]>
        g (float[2] x, float[k,2] first, int64 trips)
            => (float[m,2] one, float[3,2,j] two, float[2] last, float[t,2] all)
        <bool yes = {1}, int64[1] ax = {0}, float[3,2,1] start = {0,1,2,3,4,5}, int64[3] sizes = {3,2,1}> {
            one, two, last, all = Loop(trips, yes, first, start, x) <
                body = step (int64 i, bool go, float[k,2] s, float[3,2,q] r, float[2] h)
                       => (bool c, float[k1,2] s1, float[3,2,q1] r1, float[2] next, float[2] row) {
                    next = Tanh(h)
                    row = Neg(h)
                    p = Unsqueeze(row, ax)
                    s1 = Concat<axis = 0>(s, p)
                    a = Unsqueeze(h, ax) b = Concat<axis = 0>(a, a, a) d = Reshape(b, sizes)
                    r1 = Concat<axis = -1>(r, d)
                    c = Identity(go)
                }
            >
        }"""
    result, records = run_pass(model, GrowState)
    assert applications(records) == 2
    assert len(body_of(result).inputs) == 3
    given = {"x": np.array([1, -2], np.float32), "first": np.ones((2, 2), np.float32)}
    assert_same_bits(model, result, *({**given, "trips": np.array(n)} for n in (0, 1, 4)))


@pytest.mark.parametrize(
    "model",
    [
        appending(order="p, s"),
        appending(opset=13),
        # One column in the first turn, two in the second.
        appending(extra="j = Add(i, one) c = Unsqueeze(j, zero) z = Concat<axis = 0>(rows, c) h2 = Unsqueeze(h, ax)",
                  part="Expand(h2, z)").replace("int64 two", "int64 one = {1}, int64[1] rows = {2}, int64 two"),
    ],
    ids=["before the state", "an old opset", "another size in every turn"],
)  # fmt: skip
def test_what_is_left_alone(model: str) -> None:
    for target in ("onnxruntime", RTX):
        result, records = run_pass(model, GrowState, target=target)
        assert applications(records) == 0
    assert_same_bits(model, result, *feeds())


def test_a_state_that_is_read_stays_where_the_target_can_grow_it() -> None:
    _, records = run_pass(appending(read=READS), GrowState)
    assert applications(records) == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_state_that_is_read_is_held_in_a_buffer(axis: int, dtype: type[np.generic]) -> None:
    start = "[2,2]"
    model = appending(
        start=start, read=READS, trips="three", axis=axis, dtype="float" if dtype is np.float32 else "float16"
    )
    model = model.replace("[2,2] s)", "[a,b] s)").replace("[2,2] more)", "[a1,b1] more)")
    if axis == 0:
        model = model.replace("int64[1] ax = {1}", "int64[1] ax = {0}").replace("[2,m] grown", "[m,2] grown")
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    body = body_of(result)
    assert "Concat" not in [node.op_type for node in body]
    assert "ScatterND" in [node.op_type for node in body]
    assert_same_bits(model, result, *feeds(lengths=(2,), dtype=dtype))


def test_a_loop_that_ends_early_gives_what_it_has() -> None:
    model = appending(start="[2,0]", read=READS, trips="three").replace("[2,0] s)", "[2,q] s)")
    model = model.replace("[2,0] more)", "[2,q1] more)").replace("go_on = Identity(go)", "go_on = Less(i, zero0)")
    model = model.replace("int64 two = {2}", "int64 two = {2}, int64 zero0 = {1}")
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    assert_same_bits(model, result, *feeds(lengths=(0,)))


def test_what_was_appended_may_be_read_too() -> None:
    model = (
        appending(start="[2,1]", trips="three").replace("[2,1] s)", "[2,q] s)").replace("[2,1] more)", "[2,q1] more)")
    )
    model = model.replace("next = Neg(n)", "").replace("go_on =", "t = ReduceMax<keepdims = 0>(more, ax) "
                                                       "next = Add(t, n) go_on =")  # fmt: skip
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    assert_same_bits(model, result, *feeds(lengths=(1,)))


def test_a_state_that_a_nested_body_reads() -> None:
    inner = (
        "c = Constant<value = bool {1}>() t = If(go) <then_branch = a () => (float[2] v) "
        "{ v = ReduceSum<keepdims = 0>(s, ax) }, else_branch = b () => (float[2] w) { w = Identity(h) }> "
        "u = Add(h, t) n = Tanh(u)"
    )
    model = appending(start="[2,1]", read=inner, trips="three")
    model = model.replace("[2,1] s)", "[2,q] s)").replace("[2,1] more)", "[2,q1] more)")
    _, records = run_pass(model, GrowState)
    assert applications(records) == 0
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    assert_same_bits(model, result, *feeds(lengths=(1,)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("read", "gathers"),
    [
        ("t0 = Gather<axis = AXIS>(s, back) t = Squeeze(t0, ax) u = Add(h, t) n = Tanh(u)", True),
        ("t0 = Gather<axis = NEGATIVE>(s, second) t = Squeeze(t0, ax) u = Add(h, t) n = Tanh(u)", True),
        ("t = Gather<axis = AXIS>(s, minus) u = Add(h, t) n = Tanh(u)", True),
        ("t0 = Slice(s, back, end, ax) t = Squeeze(t0, ax) u = Add(h, t) n = Tanh(u)", True),
        ("t0 = Slice(s, zero, one, ax) t = Squeeze(t0, ax) u = Add(h, t) n = Tanh(u)", False),
        ("t0 = Gather<axis = AXIS>(s, far) t = ReduceSum<keepdims = 0>(t0, ax) u = Add(h, t) n = Tanh(u)", False),
    ],
)
def test_what_is_read_at_fixed_places(read: str, gathers: bool, axis: int) -> None:
    """What is at a fixed place from either end needs no value of a computed length."""
    read = read.replace("AXIS", str(axis)).replace("NEGATIVE", str(axis - 2))
    model = appending(start="[2,2]", read=read, trips="three", axis=axis)
    model = model.replace("[2,2] s)", "[a,b] s)").replace("[2,2] more)", "[a1,b1] more)").replace(
        "int64 two = {2}", "int64[1] back = {-1}, int64[1] second = {1}, int64 minus = {-1}, int64[2] far = {0,-1}, "
        "int64[1] end = {9223372036854775807}, int64[1] one = {1}, int64 two = {2}"
    )  # fmt: skip
    if axis == 0:
        model = model.replace("int64[1] ax = {1}", "int64[1] ax = {0}").replace("[2,m] grown", "[m,2] grown")
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    assert ("Slice" not in [node.op_type for node in body_of(result)]) == gathers
    assert "Slice" not in [node.op_type for node in result.graph]  # it always takes three turns
    assert_same_bits(model, result, *feeds(lengths=(2,)))


def test_what_was_just_appended_is_read_at_its_place() -> None:
    model = (
        appending(start="[2,0]", trips="three").replace("[2,0] s)", "[2,q] s)").replace("[2,0] more)", "[2,q1] more)")
    )
    model = model.replace("next = Neg(n)", "").replace(
        "go_on =", "t = Gather<axis = -1>(more, minus) next = Cos(t) go_on ="
    )
    model = model.replace("int64 two = {2}", "int64 minus = {-1}, int64 two = {2}")
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    assert "Slice" not in op_types(result)
    assert_same_bits(model, result, *feeds(lengths=(0,)))


@pytest.mark.parametrize(
    "model",
    [
        appending(start="[2,2]", read=READS, trips="trips").replace("[2,2] s)", "[2,q] s)"),
        appending(start="[2,2]", read=READS, trips="").replace("[2,2] s)", "[2,q] s)"),
        appending(start="[2,k]", read=READS, trips="three"),
    ],
    ids=["the caller says how many turns", "no limit", "unknown length"],
)
def test_no_buffer_without_a_limit(model: str) -> None:
    _, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 0
    assert "buffer" in records[0].reason


def test_no_buffer_for_a_loop_that_could_go_on_for_very_long() -> None:
    model = appending(start="[2,0]", read=READS, trips="three").replace("[2,0] s)", "[2,q] s)")
    _, records = run_pass(model.replace("three = {3}", "three = {134217728}"), GrowState, target=RTX)
    assert applications(records) == 1  # 2 x 2^27 floats are one GiB
    _, records = run_pass(model.replace("three = {3}", "three = {134217729}"), GrowState, target=RTX)
    assert applications(records) == 0
    assert "buffer" in records[0].reason


@pytest.mark.parametrize(("kind", "applied"), [("float", 1), ("int8", 1), ("bfloat16", 0), ("bool", 0)])
def test_a_buffer_of_what_onnxruntime_can_pad(kind: str, applied: int) -> None:
    model = f"""<ir_version: 10, opset_import: ["": 18]>
    g ({kind}[1,2] x, {kind}[1,2] row) => ({kind}[a,2] y, int64[b,2] sizes) <int64 three = {{3}}> {{
        y, sizes = Loop(three, , x) <body = l (int64 i, bool on, {kind}[k,2] s)
            => (bool again, {kind}[k1,2] more, int64[2] size)
            {{ again = Identity(on) more = Concat<axis = 0>(s, row) size = Shape(s) }}>
    }}"""
    _, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == applied
    assert applied or "cannot pad" in records[0].reason + " ".join(records[0].near_misses.values())


# -- several states, and loops that a condition ends -------------------------------------------------------------------


def attending(
    *, keys: int = 2, values: int = 2, each: int = 1, trips: str = "", limit: int = 5, last: int = 99, states: str = ""
) -> str:
    """A Loop with a cache of keys and one of values, the values of which are computed with both."""
    return f"""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[1,4] x, float[1,{keys},4] k0, float[1,{values},4] v0)
            => (float[1,4] y, float[1,kn,4] keys, float[1,vn,4] values, int64 last)
        <bool yes = {{1}}, int64 zero = {{0}}, int64 one = {{1}}, int64 limit = {{{limit}}}, int64 most = {{{last}}},
         int64 trips = {{3}}, int64[1] ax = {{1}}, int64[3] sizes = {{1, {each}, 4}}, int64[3] rows = {{1, 1, 4}},
         float edge = {{0.2}}> {{
            y, keys, values, last = Loop({trips}, yes, x, k0, v0, zero) <
                body = step (int64 i, bool go, float[1,4] h, float[1,k,4] s, float[1,v,4] r, int64 n)
                       => (bool again, float[1,4] next, float[1,k1,4] s1, float[1,v1,4] r1, int64 n1) {{
                    q = Unsqueeze(h, ax)
                    p = Expand(q, sizes)
                    s1 = Concat<axis = 1>(s, p)
                    t = Transpose<perm = [0, 2, 1]>(s1)
                    scores = MatMul(q, t)
                    total = ReduceSum(scores)
                    mixed = Tanh(total)
                    held = ReduceMax<keepdims = 1>(r, ax)
                    part = Add(held, mixed)
                    flat = Reshape(part, rows)
                    f = Expand(flat, sizes)
                    r1 = Concat<axis = 1>(r, f)
                    next = Squeeze(flat, ax)
                    n1 = Add(n, one)
                    few = Less(n1, limit)
                    width = Shape<start = 1, end = 2>(s1)
                    long = Squeeze(width)
                    short = LessOrEqual(long, most)
                    both = And(few, short)
                    first = ReduceMax<keepdims = 0>(next)
                    small = Less(first, edge)
                    again = And(both, small)
                }}
            >
        }}"""


@settings(max_examples=25, deadline=None)
@given(
    keys=st.integers(0, 3),
    values=st.integers(1, 3),
    each=st.integers(1, 3),
    limit=st.integers(-1, 5),
    last=st.integers(0, 12),
    trips=st.sampled_from(["", "trips"]),
    scale=st.sampled_from([0.1, -1.0, -3.0]),
)
def test_all_states_are_held_in_buffers(
    keys: int, values: int, each: int, limit: int, last: int, trips: str, scale: float
) -> None:
    model = attending(keys=keys, values=values, each=each, limit=limit, last=last, trips=trips)
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 2
    kinds = [node.op_type for node in body_of(result)]
    assert "Concat" not in kinds
    assert "Shape" not in kinds
    # States of one length are counted once.
    assert len(body_of(result).inputs) == 6 + len({keys, values})
    numbers = np.random.default_rng(keys + 10 * values)
    assert_same_bits(
        model,
        result,
        {
            "x": numbers.standard_normal((1, 4)).astype(np.float32),
            "k0": numbers.standard_normal((1, keys, 4)).astype(np.float32),
            "v0": (numbers.standard_normal((1, values, 4)) * scale).astype(np.float32),
        },
    )


def test_a_while_gets_the_count_that_its_condition_says() -> None:
    for last, turns in ((99, 5), (4, 3), (2, 1)):
        result, _ = run_pass(attending(last=last), GrowState, target=RTX)
        (loop,) = (node for node in result.graph if node.op_type == "Loop")
        assert graphs.scalar_of(loop.inputs[0]) == turns
        assert loop.inputs[1] is not None
        assert [value.shape for value in body_of(result).inputs[3:5]] == [[1, 2 + turns, 4]] * 2


def test_a_loop_in_a_loop_keeps_its_own_count() -> None:
    model = """
        <ir_version: 10, opset_import: ["": 18]>
        g (float[2] x, bool on) => (float[2] y)
        <bool yes = {1}, int64 zero = {0}, int64 one = {1}, int64 three = {3}, int64[1] ax = {0},
         float[1,2] start = {1, 2}, int64 two = {2}, int64[1] size = {2}> {
            y = Loop(two, yes, x) <
                body = step (int64 i, bool go, float[2] h) => (bool again, float[2] next) {
                    again = Identity(go)
                    l, s, m = Loop(, on, h, start, zero) <
                        body = turn (int64 j, bool going, float[2] a, float[k,2] b, int64 n)
                                => (bool more, float[2] a1, float[k1,2] b1, int64 n1) {
                            u = Unsqueeze(a, ax)
                            b1 = Concat<axis = 0>(b, u)
                            t = ReduceSum<keepdims = 0>(b1, ax)
                            a1 = Tanh(t)
                            n1 = Add(n, one)
                            more = Less(n1, three)
                        }
                    >
                    r = ReduceSum<keepdims = 0>(s, ax)
                    both = Add(r, l)
                    next = Reshape(both, size)
                }
            >
        }"""
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    for on in (True, False):
        assert_same_bits(model, result, {"x": np.array([0.5, -1], np.float32), "on": np.array(on)})


@pytest.mark.parametrize(
    ("read", "shapes"),
    [
        ("size = Shape(s) f = Cast<to = 1>(size) t = ReduceSum<keepdims = 0>(f) u = Add(h, t) n = Tanh(u)", False),
        ("size = Shape<start = -1>(s) f = Cast<to = 1>(size) u = Add(h, f) n = Tanh(u)", False),
        ("size = Shape<end = 1>(s) f = Cast<to = 1>(size) u = Add(h, f) n = Tanh(u)", True),
        ("size = Shape<start = 2>(s) f = Cast<to = 1>(size) t = ReduceSum<keepdims = 0>(f) u = Add(h, t) n = Tanh(u)",
         True),
    ],
)  # fmt: skip
def test_sizes_of_a_state_are_read_from_its_length(read: str, shapes: bool) -> None:
    model = appending(start="[2,2]", read=read, trips="three")
    model = model.replace("[2,2] s)", "[a,b] s)").replace("[2,2] more)", "[a1,b1] more)")
    result, records = run_pass(model, GrowState, target=RTX)
    assert applications(records) == 1
    assert ("Shape" in [node.op_type for node in body_of(result)]) == shapes
    assert_same_bits(model, result, *feeds(lengths=(2,)))
