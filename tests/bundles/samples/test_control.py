"""Exits and loops by hand: who goes where, what is gathered, forced decisions, fixed sizes, no samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Branch, Loop, walk
from graphopt.bundles.rows import bucket, padded
from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime.session import create_session, run
from tests.bundles.samples.compare import Samples, close
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
EXITS = f"""{HEAD}
g (float[1, 4] x) => (float[1, 4] y, float sure) <float zero = {{0}}, float one = {{1}}> {{
    a = Sin (x)
    m = ReduceMax <keepdims = 0> (a)
    c = Less (m, zero)
    y, sure = If (c) <
        then_branch = t () => (float[1, 4] y1, float s1) {{ y1 = Identity (a) s1 = Identity (m) }},
        else_branch = e () => (float[1, 4] y2, float s2) {{
            b = Add (a, x)
            n = ReduceMax <keepdims = 0> (b)
            d = Less (n, one)
            y2, s2 = If (d) <
                then_branch = t2 () => (float[1, 4] y3, float s3) {{ y3 = Neg (b) s3 = Identity (n) }},
                else_branch = e2 () => (float[1, 4] y4, float s4) {{ y4 = Mul (b, x) s4 = Identity (one) }}>
        }}>
}}"""
TURNS = f"""{HEAD}
g (float[1, 2] x, float[1, 2] step, int64 most) => (float[1, 2] y, int64 turns)
<bool yes = {{1}}, float t = {{3}}, int64 none = {{0}}, int64 one = {{1}}> {{
    y, turns = Loop (most, yes, x, none) <body = b (int64 i, bool c, float[1, 2] s, int64 k)
        => (bool again, float[1, 2] after, int64 next) {{
        after = Add (s, step)
        m = ReduceMax <keepdims = 0> (after)
        again = Less (m, t)
        next = Add (k, one)
    }}>
}}"""
COLUMNS = (-1.0, -0.2, 0.4, 2.0)


def proto(text: str) -> Any:
    return ir.to_proto(model_from_text(text))


def some(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Rows of which some leave at each exit."""
    numbers = np.random.default_rng(seed)
    rows = numbers.choice(COLUMNS, (count, 1)) + numbers.uniform(-0.1, 0.1, (count, 4))
    return rows.astype(np.float32)


@pytest.mark.parametrize("backend", [PlainBackend, OrtBackend])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 32])
def test_exits(count: int, backend: Any) -> None:
    Samples(proto(EXITS), backend).check({"x": some(count, count)})


def test_the_plan_says_who_decides() -> None:
    plan = Samples(proto(EXITS)).plan
    assert [step.each for step in walk(plan.steps) if isinstance(step, Branch)] == [True, True]
    assert plan.samples["x"] == plan.samples["c"] == 0


class Counting(PlainBackend):
    """Counts what is taken and put together."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.taken: list[tuple[int, ...]] = []
        self.merged = 0

    def take(self, value: Any, axis: int, rows: Any) -> Any:
        self.taken.append(np.shape(value))
        return super().take(value, axis, rows)

    def merge(self, parts: Any, axis: int, count: int) -> Any:
        self.merged += 1
        return super().merge(parts, axis, count)


@pytest.mark.parametrize("level", COLUMNS)
def test_nothing_is_gathered_where_all_go_one_way(level: float) -> None:
    samples = Samples(proto(EXITS), Counting)
    samples.check({"x": np.full((5, 4), level, np.float32)})
    assert samples.backend.taken == []
    assert samples.backend.merged == 0


def test_rows_are_taken_once_for_each_exit() -> None:
    """Of what a side reads, and nothing of what it gives as it got it. Where a constant is given, a condition."""
    samples = Samples(proto(EXITS), Counting)
    samples.check({"x": np.repeat(np.array(COLUMNS, np.float32)[:, None], 4, 1)})
    assert samples.backend.taken == [(4, 4), (4, 4), (2, 4), (2, 4), (2, 4), (2,)]
    assert samples.backend.merged == 4


def test_a_turn_for_each_sample() -> None:
    samples = Samples(proto(TURNS), OrtBackend)
    (loop,) = (step for step in walk(samples.plan.steps) if isinstance(step, Loop))
    assert loop.each
    feeds = {
        "x": np.array([[0, 0], [2.9, 0], [5, 5], [1, 1], [-9, 0]], np.float32),
        "step": np.array([[1, 0], [0, 1], [1, 1], [0.5, 0.5], [2, 0]], np.float32),
        "most": np.array(6),
    }
    samples.check(feeds, exact=True)
    assert samples.many(feeds)["turns"].tolist() == [3, 3, 1, 4, 6]
    samples.check({**feeds, "most": np.array(0)}, exact=True)


class Sent:
    """Sends each sample where a table says."""

    def __init__(self, table: np.ndarray[Any, Any], names: Sequence[str]) -> None:
        self.table, self.names = table, list(names)

    def branch(self, name: str, truth: bool) -> bool:
        raise AssertionError("asked without the sample")

    def branch_of(self, name: str, sample: int, truth: bool) -> bool:
        return bool(self.table[sample, self.names.index(name)])

    def turn(self, name: str, number: int, truth: bool) -> bool:
        raise AssertionError("asked without the sample")

    def turn_of(self, name: str, sample: int, number: int, truth: bool) -> bool:
        return number < int(self.table[sample, 0])

    def run(self, block: str, makes: Sequence[str]) -> None: ...


FORCED_EXITS = EXITS.replace("g (float[1, 4] x)", "g (float[1, 4] x, bool[1] p, bool[1] q)").replace("If (c)", "If (p)")
FORCED_EXITS = FORCED_EXITS.replace("If (d)", "If (q)")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), st.integers(0, 99))
def test_each_sample_sent_its_own_way(ways: list[tuple[bool, bool]], seed: int) -> None:
    """Against the network whose conditions are inputs."""
    table = np.array(ways)
    samples = _cached()
    names = [step.branch for step in walk(samples.plan.steps) if isinstance(step, Branch)]
    program = Program(samples.plan, samples.backend, Sent(table, names))
    x = some(len(ways), seed)
    got = program.run({"x": x})
    for index, (first, second) in enumerate(ways):
        feeds = {"x": x[index : index + 1], "p": np.array([first]), "q": np.array([second])}
        for name, array in run(_forced(), feeds).items():
            close(got[name][index].reshape(array.shape), array)


_MADE: dict[str, Any] = {}


def _cached() -> Samples:
    if "samples" not in _MADE:
        _MADE["samples"] = Samples(proto(EXITS))
    made: Samples = _MADE["samples"]
    return made


def _forced() -> Any:
    if "forced" not in _MADE:
        _MADE["forced"] = create_session(proto(FORCED_EXITS).SerializeToString(), optimized=False)
    return _MADE["forced"]


def test_turns_sent_by_sample() -> None:
    turns = np.array([[3], [0], [5], [1], [3]])
    samples = Samples(proto(TURNS), course=Sent(turns, []))
    x, step = np.zeros((5, 2), np.float32), np.ones((5, 2), np.float32)
    got = samples.many({"x": x, "step": step, "most": np.array(1)})
    assert got["turns"].tolist() == turns[:, 0].tolist()
    np.testing.assert_array_equal(got["y"], np.repeat(turns, 2, 1).astype(np.float32))


class OneOf(PlainBackend):
    """Stands for engines that are built for some sizes only: anything else is refused."""

    sizes = (1, 4, 16)

    def rows(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def block(self, name: str, inputs: Any, outputs: Any) -> Any:
        call = super().block(name, inputs, outputs)

        def checked(values: Any) -> Any:
            assert all(len(value) in self.sizes for value in values), [np.shape(value) for value in values]
            return call(values)

        return checked


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 15, 16])
def test_sizes_that_blocks_are_built_for(count: int) -> None:
    Samples(proto(EXITS), OneOf).check({"x": some(count, 3)})


@pytest.mark.parametrize("count", [1, 3, 6])
def test_loops_on_sizes_that_blocks_are_built_for(count: int) -> None:
    class Padded(PlainBackend):
        def rows(self, count: int) -> int:
            return bucket(count)

    feeds = {"x": some(count, 1)[:, :2], "step": np.abs(some(count, 2)[:, :2]), "most": np.array(9)}
    Samples(proto(TURNS), Padded).check(feeds)


def test_buckets() -> None:
    assert [bucket(count) for count in (0, 1, 2, 3, 4, 5, 31, 32, 33)] == [1, 1, 2, 4, 4, 8, 32, 32, 64]
    assert padded(np.array([4, 7]), 4).tolist() == [4, 7, 7, 7]


def test_inputs_of_different_numbers_of_samples() -> None:
    samples = Samples(proto(TURNS))
    feeds = {"x": np.ones((2, 2), np.float32), "step": np.ones((3, 2), np.float32), "most": np.array(1)}
    with pytest.raises(GraphoptError, match="'x' has 2, 'step' has 3"):
        samples.many(feeds)


def test_a_backend_that_cannot_take_rows() -> None:
    backend: Any = object()
    with pytest.raises(BadInput, match="cannot take samples apart"):
        Program(Samples(proto(EXITS)).plan, backend)


GROWING = f"""{HEAD}
g (float[1, n] x) => (float[1, m] y) <bool yes = {{1}}, float t = {{3}}, int64 most = {{5}}> {{
    y = Loop (most, yes, x) <body = b (int64 i, bool c, float[1, k] s) => (bool again, float[1, k2] after) {{
        after = Concat <axis = 1> (s, x)
        m = ReduceSum <keepdims = 0> (after)
        again = Less (m, t)
    }}>
}}"""


def test_samples_that_grow_differently() -> None:
    """Known only when it runs: one line, and what to do."""
    samples = Samples(proto(GROWING))
    samples.check({"x": np.ones((3, 1), np.float32)})
    with pytest.raises(GraphoptError, match="samples give values of other sizes"):
        samples.many({"x": np.array([[1], [3]], np.float32)})
