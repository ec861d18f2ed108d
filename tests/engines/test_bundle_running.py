"""Bundles of engines at work, with a fake runtime on the stand-in driver that runs each block's own ONNX file.

Nothing here says that the real libraries do the same; nothing of it has run on a GPU.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.bundles import BundleRunner, read_bundle, split
from graphopt.bundles.samples import for_samples
from graphopt.engines.backends import BACKENDS
from graphopt.engines.bundles.backend import asked_of
from graphopt.engines.bundles.running import EngineBundleRunner
from graphopt.errors import BadInput, GraphoptError
from graphopt.gpu import arrays
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.errors import NoGpu
from graphopt.runtime.loading import Runner
from tests.bundles.samples.nets import Net
from tests.engines import fake_runtime
from tests.engines.engine_bundles import HANDS_ON, LARGEST, play
from tests.engines.fake_runtime import IExecutionContext
from tests.gpu_driver.standin import StandIn, standing_in
from tests.models.nests import WIDTH, Nest
from tests.models.text import model_from_text

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(tmp_path, monkeypatch) as made:
        yield made
        gc.collect()
        assert made.complaints == []
        assert {made.live(what) for what in ("memory", "pinned", "streams", "events", "graphs", "contexts")} == {0}


def opened(bundle: Path, *, rtx: bool = False, **how: Any) -> EngineBundleRunner:
    return EngineBundleRunner(bundle, trt=fake_runtime.module(rtx=rtx), **how)


def same(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    assert list(wanted) == list(found)
    for name in wanted:
        assert wanted[name].dtype == found[name].dtype
        np.testing.assert_array_equal(found[name], wanted[name])


def nest_of(seed: int, *, sequences: bool) -> Nest:
    """A nest whose branches say what they give: engines want to know the ranks of what they take."""
    nest = Nest(seed, sequences=sequences)
    graphs = [nest.model.graph]
    while graphs:
        graph = graphs.pop()
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                    if node.op_type == "If":
                        for info in attribute.g.output:
                            info.type.tensor_type.shape.dim.add(dim_value=WIDTH)
    return nest


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 50))])
def test_random_nests_compute_the_same(driver: StandIn, tmp_path: Path, seed: int) -> None:
    nest = nest_of(seed, sequences=seed % 2 == 0)
    # Some blocks stay on the host between others.
    plain, engines = play(
        nest.model,
        tmp_path,
        *nest.feeds(4),
        stays=lambda name: seed % 3 == 0 and int(name[6:]) % 4 == 0,
        rtx=seed % 4 == 1,
    )
    reference = BundleRunner(plain, optimized=False)
    with opened(engines, rtx=seed % 4 == 1) as runner:
        assert isinstance(runner, Runner)
        for feeds in nest.feeds(4) * 3:  # the third time on, graphs are replayed
            same(reference.run(feeds), runner.run(feeds))
        assert runner.graphs_refused == {}
        assert any(runner.runs.values())


BRANCHES = f"""
{HEAD}
g (float[n, 4] x, float limit) => (float[n, 4] y) <float[1] one = {{1}}, float zero = {{0}}> {{
    total = ReduceSum<keepdims = 0>(x)
    a = Greater(total, limit)
    b = Less(total, zero)
    never = And(a, b)
    first = If (a) < then_branch = t () => (float[n, 4] p) {{ p = Add(x, one) }},
                     else_branch = e () => (float[n, 4] q) {{ q = Sub(x, one) }} >
    second = If (b) < then_branch = t2 () => (float[n, 4] p2) {{ p2 = Mul(first, first) }},
                      else_branch = e2 () => (float[n, 4] q2) {{ q2 = Neg(first) }} >
    y = If (never) < then_branch = t3 () => (float[n, 4] p3) {{ p3 = Identity(second) }},
                     else_branch = e3 () => (float[n, 4] q3) {{ q3 = Abs(second) }} >
}}
"""
LOOP = f"""
{HEAD}
g (float[4] x, int64 trips) => (float[4] last, float[k, 4] all, float[4] same) <float[1] rate = {{0.5}}> {{
    start = Add(x, rate)
    last, all = Loop (trips, , start) <
        body = l (int64 i, bool go, float[4] s) => (bool again, float[4] after, float[4] row) {{
        again = Identity(go)
        number = Cast<to = 1>(i)
        scaled = Mul(s, rate)
        after = Add(scaled, number)
        row = Neg(after)
    }}>
    same = Identity(x)
}}
"""
SEARCH = f"""
{HEAD}
g (float[4] x) => (float[4] y) <float limit = {{100}}, bool yes = {{1}}> {{
    y = Loop (, yes, x) <body = l (int64 i, bool go, float[4] s) => (bool again, float[4] after) {{
        after = Add(s, s)
        total = ReduceSum<keepdims = 0>(after)
        again = Less(total, limit)
    }}>
}}
"""
SCAN = f"""
{HEAD}
g (float[2, t, 3] x, float[2, 3] start) => (float[2, 3] last, float[2, 3, t] all) {{
    last, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1], scan_output_axes = [2],
        body = b (float[2, 3] s, float[2, 3] part) => (float[2, 3] next, float[2, 3] row) {{
            sum = Add(s, part)
            next = Tanh(sum)
            row = Neg(next)
        }}> (start, x)
}}
"""


def vector(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = {"x": vector(0, 4)}
FED = {
    BRANCHES: {"x": vector(0, 2, 4), "limit": np.array(0, np.float32)},
    LOOP: {**X, "trips": np.array(2, np.int64)},
    SEARCH: X,
    SCAN: {"x": vector(0, 2, 4, 3), "start": vector(9, 2, 3)},
}


def played(text: str, folder: Path, **how: Any) -> tuple[Path, Path]:
    plain, engines = play(model_from_text(text), folder, FED[text], **how)
    blocks = read_bundle(engines)[1].blocks
    assert how.get("stays") or all(block.reason in (None, HANDS_ON) for block in blocks.values())
    return plain, engines


def test_conditions_of_one_block_are_waited_for_once(driver: StandIn, tmp_path: Path) -> None:
    plain, engines = played(BRANCHES, tmp_path)
    reference = BundleRunner(plain, optimized=False)
    with opened(engines) as runner:
        for turn in range(8):
            feeds = {"x": vector(turn % 3, 2, 4), "limit": np.array(turn % 2 - 0.5, np.float32)}
            before = runner.waits
            same(reference.run(feeds), runner.run(feeds))
            assert runner.waits == before + 1  # for three conditions
        assert driver.live("pinned") == 1


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("trips", [0, 1, 2, 9])
def test_a_loop_needs_two_places_for_its_state(driver: StandIn, tmp_path: Path, trips: int, rtx: bool) -> None:
    plain, engines = played(LOOP, tmp_path, rtx=rtx)
    reference = BundleRunner(plain, optimized=False)
    with opened(engines, rtx=rtx) as runner:
        feeds = {"x": vector(0, 4), "trips": np.array(trips, np.int64)}
        found = runner.run(feeds)
        same(reference.run(feeds), found)
        assert found["all"].shape == (trips, 4)
        before = driver.live("memory")
        for seed in range(5):
            feeds["x"] = vector(seed, 4)
            same(reference.run(feeds), runner.run(feeds))
        assert driver.live("memory") == before
        assert runner.waits == 0  # a count that the host has, and a condition that is always true


def test_the_memory_of_a_loop_does_not_grow_with_its_turns(driver: StandIn, tmp_path: Path) -> None:
    plain, engines = played(SEARCH, tmp_path)
    reference = BundleRunner(plain, optimized=False)
    with opened(engines) as runner:
        few, many = (np.full(4, size, np.float32) for size in (20, 1e-3))
        runner.run({"x": few})
        before, waits = driver.live("memory"), runner.waits
        same(reference.run({"x": many}), runner.run({"x": many}))
        turns = max(reference.runs.values())
        assert driver.live("memory") <= before + 2
        assert turns > 10 and runner.waits - waits == turns
        steady = [context for context in IExecutionContext.made if context.enqueued]
        enqueued = [context.enqueued for context in steady]
        for _ in range(3):
            runner.run({"x": many})
        more = sum(context.enqueued for context in steady) - sum(enqueued)
        assert more <= 8  # all but a few turns replay what was recorded for the two places


def test_slices_and_stacks_of_any_axis(driver: StandIn, tmp_path: Path) -> None:
    plain, engines = played(SCAN, tmp_path)
    reference = BundleRunner(plain, optimized=False)
    with opened(engines) as runner:
        for length in (1, 4, 3, 4):
            feeds = {"x": vector(length, 2, length, 3), "start": vector(9, 2, 3)}
            same(reference.run(feeds), runner.run(feeds))
            on_gpu = {name: arrays.upload(runner.context, array) for name, array in feeds.items()}
            found = runner.run(on_gpu)
            same(reference.run(feeds), {name: array.numpy() for name, array in found.items()})


def test_gpu_arrays_in_and_out(driver: StandIn, tmp_path: Path) -> None:
    plain, engines = played(LOOP, tmp_path)
    reference = BundleRunner(plain, optimized=False)
    with opened(engines) as runner:
        x, trips = vector(1, 4), np.array(3, np.int64)
        given = arrays.upload(runner.context, x)
        results = [runner.run({"x": given, "trips": trips}) for _ in range(4)]
        del given
        gc.collect()
        wanted = reference.run({"x": x, "trips": trips})
        for result in results:  # all of them are still what they were
            assert all(isinstance(array, DeviceArray) for array in result.values())
            same(wanted, {name: array.numpy() for name, array in result.items()})
        assert len({result["last"].pointer for result in results}) == 4
        results.clear()
        assert len(runner._backend.in_use) > 0
        runner.run({"x": x, "trips": trips})
        runner.context.synchronize()
        runner._backend.in_use.let_go()
        assert len(runner._backend.in_use) == 0


def test_a_result_is_the_callers_alone(driver: StandIn, tmp_path: Path) -> None:
    _, engines = played(LOOP, tmp_path)
    with opened(engines) as runner:
        feeds = {"x": vector(1, 4), "trips": np.array(0, np.int64)}
        found = runner.run(feeds)
        before = found["same"].copy()
        feeds["x"][:] = 7
        np.testing.assert_array_equal(found["same"], before)
        given = arrays.upload(runner.context, vector(1, 4))
        assert runner.run({**feeds, "x": given})["same"].pointer != given.pointer


SHARED = f"""
{HEAD}
g (float[3, 4] x, float[4] start, bool c) => (float[4] last, float[k, 4] rows, float[3, 4] y, float[3, 4] z) {{
    a = Neg(x)
    last, rows = Scan<num_scan_inputs = 1, body = b (float[4] s, float[4] row) => (float[4] next, float[4] part) {{
        next = Identity(row)
        part = Abs(row)
    }}>(start, x)
    y, z = If (c) < then_branch = t () => (float[3, 4] p, float[3, 4] q) {{ p = Identity(a) q = Identity(a) }},
                    else_branch = e () => (float[3, 4] r, float[3, 4] o) {{ r = Exp(a) o = Identity(x) }} >
}}
"""


@pytest.mark.parametrize("on_gpu", [True, False])
def test_results_that_are_one_value_are_two_arrays(driver: StandIn, tmp_path: Path, on_gpu: bool) -> None:
    """A part of an input that is handed on, and one value under two names."""
    feeds = {"x": vector(1, 3, 4), "start": vector(2, 4), "c": np.array(True)}
    plain, engines = play(model_from_text(SHARED), tmp_path, feeds)
    wanted = BundleRunner(plain, optimized=False).run(feeds)
    with opened(engines) as runner:
        given = {**feeds, "x": arrays.upload(runner.context, feeds["x"])} if on_gpu else feeds
        found = runner.run(given)
        if on_gpu:
            pointers = [array.pointer for array in (given["x"], *found.values())]
            assert len(set(pointers)) == 5
            assert not given["x"].pointer <= found["last"].pointer < given["x"].pointer + feeds["x"].nbytes
        else:
            assert not any(np.shares_memory(feeds["x"], array) for array in found.values())
            assert not np.shares_memory(found["y"], found["z"])
        same(wanted, {name: array.numpy() if on_gpu else array for name, array in found.items()})


def test_blocks_on_the_host_in_between(driver: StandIn, tmp_path: Path) -> None:
    plain, engines = played(BRANCHES, tmp_path, stays=lambda name: name in ("block_1", "block_3"))
    reference = BundleRunner(plain, optimized=False)
    with opened(engines) as runner:
        for turn in range(6):
            feeds = {"x": vector(turn % 3, 2, 4), "limit": np.array(turn % 2 - 0.5, np.float32)}
            same(reference.run(feeds), runner.run(feeds))
        assert runner.waits == 0  # the host made the conditions itself


def test_an_input_that_decides_a_shape_is_brought_to_the_host(driver: StandIn, tmp_path: Path) -> None:
    text = f"""
    {HEAD}
    g (float[8, 4] x, int64[1] n, bool c) => (float[m, 4] y) <int64[1] zero = {{0}}, int64[1] one = {{1}}> {{
        k = If (c) < then_branch = t () => (int64[1] p) {{ p = Add(n, one) }},
                     else_branch = e () => (int64[1] q) {{ q = Sub(n, one) }} >
        y = Slice(x, zero, k)
    }}
    """
    plain, engines = play(model_from_text(text), tmp_path, host=["k"])
    reference = BundleRunner(plain, optimized=False)
    with opened(engines) as runner:
        for count, c in ((3, True), (5, False), (3, True), (2, True)):
            feeds = {"x": vector(0, 8, 4), "n": np.array([count], np.int64), "c": np.array(c)}
            same(reference.run(feeds), runner.run(feeds))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))])
def test_samples_that_go_their_own_ways(driver: StandIn, tmp_path: Path, seed: int) -> None:
    net = Net(random.Random(seed))
    plain, engines = play(for_samples(ir.from_proto(net.model)), tmp_path, net.feeds(4), net.feeds(3, 1))
    reference = BundleRunner(plain, optimized=False)
    assert read_bundle(plain)[1].samples
    with opened(engines) as runner:
        for turn, count in enumerate((1, 5, 3, 5)):
            feeds = net.feeds(count, turn)
            same(reference.run(feeds), runner.run(feeds))


def test_runs_can_be_sent_another_way(driver: StandIn, tmp_path: Path) -> None:
    plain, engines = played(BRANCHES, tmp_path)

    class Always:
        def branch(self, name: str, truth: bool) -> bool:
            return True

        def turn(self, name: str, number: int, truth: bool) -> bool:
            return truth

        def run(self, block: str, makes: object) -> None:
            pass

    with opened(engines, course=Always()) as runner:
        x = vector(0, 2, 4)
        found = runner.run({"x": x, "limit": np.array(1e9, np.float32)})
        np.testing.assert_array_equal(found["y"], (x + 1) * (x + 1))
    assert plain.is_dir()


def test_wrong_feeds_are_one_line(driver: StandIn, tmp_path: Path) -> None:
    _, engines = played(BRANCHES, tmp_path)
    limit = np.array(0, np.float32)
    with opened(engines) as runner:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"x": vector(0, 2, 4)}, "input 'limit': no value was given"),
            ({"x": vector(0, 2, 3), "limit": limit}, "input 'x': expected float32"),
            ({"x": vector(0, 2, 4), "limit": limit, "y": limit}, "input 'y': the model has no such input"),
            ({"x": arrays.upload(runner.context, vector(0, 2)), "limit": limit}, "the rank differs"),
            ({"x": vector(0, LARGEST + 1, 4), "limit": limit}, "block_1: input 'x': the engine takes 0x4 to 64x4"),
        ]
        for feeds, message in cases:
            with pytest.raises(BadInput, match=message) as caught:
                runner.run(feeds)
            assert "\n" not in str(caught.value)
        runner.run({"x": vector(0, 2, 4), "limit": limit})


def test_an_engine_that_fails_names_its_file(driver: StandIn, tmp_path: Path) -> None:
    _, engines = played(SEARCH, tmp_path, fails=True)
    with opened(engines) as runner, pytest.raises(GraphoptError, match=r"block_\d\.engine: TensorRT could not run it"):
        runner.run({"x": vector(0, 4)})


def test_load_opens_it_by_its_plan(driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, engines = played(SEARCH, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_runtime.module())
    monkeypatch.setattr("graphopt.engines.loading.find_backend", lambda name: BACKENDS[name])
    assert isinstance(graphopt.load(plain), BundleRunner)
    runner = graphopt.load(engines)
    assert isinstance(runner, EngineBundleRunner)
    same(graphopt.load(plain).run({"x": vector(0, 4)}), runner.run({"x": vector(0, 4)}))
    runner.close()


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engines = played(SEARCH, tmp_path)
    monkeypatch.setenv("GRAPHOPT_LIBCUDA", "libcuda-of-nowhere.so")
    with pytest.raises(NoGpu) as caught:
        graphopt.load(engines)
    said = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in said
    assert said.startswith(f"{engines}: its blocks are engines of TensorRT; no GPU")
    assert said.endswith("(without a GPU, run the bundle of ONNX files that it was built from)")


def test_what_the_host_asks_for_is_followed_through_branches_and_loops() -> None:
    text = f"""
    {HEAD}
    g (float[4] x, int64 trips, bool c) => (float[4] y) <bool yes = {{1}}> {{
        total = ReduceSum<keepdims = 0>(x)
        other = Neg(total)
        k = If (c) < then_branch = t () => (bool p) {{ p = Less(total, other) }},
                     else_branch = e () => (bool q) {{ q = Greater(total, other) }} >
        y, unused = Loop (trips, k, x, total) <body = l (int64 i, bool go, float[4] s, float h) =>
            (bool again, float[4] after, float next) {{
            after = Add(s, h)
            next = Neg(h)
            again = Less(next, other)
        }}>
    }}
    """
    parts = split(model_from_text(text))
    asked = {output for outputs in asked_of(parts.plan).values() for output in outputs}
    assert asked == {"p", "q", "again"}
