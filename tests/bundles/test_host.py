"""How the host runs: programs on the runtime's own values, from several threads, and what it does not ask for."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.bundles import BundleRunner, split, write_bundle
from graphopt.bundles.flow import shared_outputs
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Loop, Port, Run, walk
from graphopt.bundles.split import Split
from graphopt.errors import GraphoptError
from graphopt.runtime.session import create_session, run
from tests.bundles.test_split import HEAD, check, run_fast, session_of
from tests.models.text import model_from_text


def loop_of(parts: Split) -> Loop:
    return next(step for step in walk(parts.plan.steps) if isinstance(step, Loop))


@pytest.mark.parametrize(
    ("says", "asked"),
    [
        ("more = Identity (on)", False),
        ("kept = Identity (on) more = Identity (kept)", False),
        ("more = Identity (yes)", False),
        ("more = Identity (no)", True),
        ("more = Not (no)", True),
        ("more = Less (i, two)", True),
    ],
)
@pytest.mark.parametrize("trips", [0, 1, 4])
def test_a_loop_that_always_goes_on_is_not_asked(says: str, asked: bool, trips: int) -> None:
    text = f"""{HEAD} g (float[2] x, int64 n) => (float[2] y)
    <bool yes = {{1}}, bool no = {{0}}, int64 two = {{2}}> {{
        y = Loop (n, , x) <body = b (int64 i, bool on, float[2] s) => (bool more, float[2] t) {{
            {says} t = Sin (s)
        }}>
    }}"""
    parts = check(ir.to_proto(model_from_text(text)), {"x": np.array([1, 2], np.float32), "n": np.array(trips)})
    assert (loop_of(parts).again is not None) == asked
    if not asked:
        (step,) = loop_of(parts).body
        assert isinstance(step, Run) and len(step.makes) == 1 and len(step.reads) == 1


def test_what_a_loop_hears_about_going_on_may_be_read_beside() -> None:
    """Handed on, stacked, and read: nothing of that is lost where the loop is not asked."""
    text = f"""{HEAD} g (float[2] x, int64 n) => (float[2] y, bool[k] all) {{
        y, all = Loop (n, , x) <body = b (int64 i, bool on, float[2] s) => (bool more, float[2] t, bool[] heard) {{
            more = Identity (on)
            heard = Identity (on)
            number = Cast <to = 1> (on)
            t = Add (s, number)
        }}>
    }}"""
    check(ir.to_proto(model_from_text(text)), {"x": np.array([1, 2], np.float32), "n": np.array(3)})


SWAP = f"""{HEAD} g (float[2] x, float[2] z, int64 n) => (float[2] y, float[2] w) {{
    y, w = Loop (n, , x, z) <body = b (int64 i, bool on, float[2] s, float[2] t)
        => (bool more, float[2] u, float[2] v) {{ more = Identity (on) u = Identity (t) v = Identity (s) }}>
}}"""


@pytest.mark.parametrize("trips", [0, 1, 2, 5])
def test_states_that_change_places(trips: int) -> None:
    feeds = {"x": np.array([1, 2], np.float32), "z": np.array([3, 4], np.float32), "n": np.array(trips)}
    check(ir.to_proto(model_from_text(SWAP)), feeds)


def test_states_that_change_places_without_a_block() -> None:
    """The host moves them all at once: one must not be overwritten before it is read."""
    parts = split(model_from_text(SWAP))
    loop = loop_of(parts)
    loop.body.clear()
    first, second = loop.state
    first.next, second.next = second.name, first.name
    x, z = np.array([1, 2], np.float32), np.array([3, 4], np.float32)
    found = run_fast(parts, {"x": x, "z": z, "n": np.array(3)})[0]
    np.testing.assert_array_equal(found["y"], z)
    np.testing.assert_array_equal(found["w"], x)


NUMBERS = f"""{HEAD} g (float[2] x, int64 n) => (int64[k] numbers) {{
    y, numbers = Loop (n, , x) <body = b (int64 i, bool on, float[2] s) => (bool more, float[2] t, int64[] j) {{
        more = Identity (on) j = Identity (i) t = Identity (s)
    }}>
}}"""


def test_more_turns_than_are_counted_ahead() -> None:
    """The first numbers of turns are made once, later ones anew: a second run takes the same."""
    feeds = {"x": np.zeros(2, np.float32), "n": np.array(1500)}
    for found in run_fast(split(model_from_text(NUMBERS)), feeds, feeds):
        np.testing.assert_array_equal(found["numbers"], np.arange(1500))


def test_an_output_that_is_the_hosts_own_number_is_a_copy(tmp_path: Path) -> None:
    parts = split(model_from_text(NUMBERS))
    loop = loop_of(parts)
    assert loop.counter is not None
    parts.plan.gives["numbers"] = "last"
    loop.stacks.clear()
    loop.state[0].start, loop.state[0].next, loop.state[0].gives = "n", loop.counter.name, "last"
    loop.body.clear()
    loop.state[0].like = None
    parts.plan.outputs[0] = Port(name="numbers", type="tensor(int64)", shape=[])
    assert shared_outputs(parts.plan) == ["numbers"]
    write_bundle(parts, tmp_path / "net")
    runner = BundleRunner(tmp_path / "net")
    feeds = {"x": np.zeros(2, np.float32), "n": np.array(3)}
    for _ in range(2):
        found = runner.run(feeds)["numbers"]
        assert found == 2
        found[...] = 77
    assert feeds["n"] == 3


MANY = f"""{HEAD} g (float[n, 16] x, int64 turns) => (float[n, 16] y) <float[16, 16] w> {{
    y = Loop (turns, , x) <body = b (int64 i, bool on, float[n, 16] s) => (bool more, float[n, 16] t) {{
        more = Identity (on) m = MatMul (s, w) t = Tanh (m)
    }}>
}}"""


def test_several_threads_at_once(tmp_path: Path) -> None:
    write_bundle(split(model_from_text(MANY)), tmp_path / "net")
    runner = BundleRunner(tmp_path / "net", threads=1)

    def feeds(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1 + seed % 5, 16)).astype(np.float32)
        return {"x": x, "turns": np.array(seed % 7)}

    wanted = [runner.run(feeds(seed))["y"] for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(lambda seed: runner.run(feeds(seed))["y"], range(40))]
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.int64)[::3],
        np.float32(3.5),
        np.array(True),
        np.zeros((0, 3), np.uint8),
        np.arange(6).astype(ml_dtypes.bfloat16),
        np.arange(4096.0).reshape(64, 64).astype(ml_dtypes.bfloat16).T,
        np.arange(6).astype(np.float16),
    ],
    ids=lambda array: f"{np.asarray(array).dtype}{np.shape(array)}",
)
def test_arrays_become_values_and_come_back(array: Any) -> None:
    backend = OrtBackend(lambda name: None)
    held = np.asarray(array)
    value = backend.value(held)
    others = [np.full_like(held, 1) for _ in range(50)]  # where memory that is nobody's would be taken
    back = backend.array(value)
    assert len(others) == 50
    assert back.dtype == held.dtype and back.shape == held.shape
    np.testing.assert_array_equal(back, held)


def test_blocks_that_are_called_the_same_way_from_python(tmp_path: Path) -> None:
    """`block`, which other hosts call, and the written program run the same session, made once."""
    parts = split(model_from_text(MANY))
    made: list[str] = []

    def session(name: str) -> Any:
        made.append(name)
        return session_of(parts, name)

    backend = OrtBackend(session)
    (name,) = parts.blocks
    block = parts.plan.blocks[name]
    call = backend.block(name, [port.name for port in block.inputs], [port.name for port in block.outputs])
    x = np.ones((2, 16), np.float32)
    (once,) = call([backend.value(x)])
    program = Program(parts.plan, backend)
    again = program.run({"x": backend.value(x), "turns": backend.value(np.array(1))})
    np.testing.assert_array_equal(backend.array(once), backend.array(again["y"]))
    assert made == [name] and backend.runs == {name: 2}


def test_what_goes_wrong_with_a_session_is_told_as_it_is() -> None:
    parts = split(model_from_text(MANY))

    def session(name: str) -> Any:
        raise GraphoptError("no memory is left", where=name)

    backend = OrtBackend(session)
    x = np.ones((2, 16), np.float32)
    turns = np.array(1)
    with pytest.raises(GraphoptError, match=r"block_1: no memory is left"):
        Program(parts.plan, backend).run({"x": backend.value(x), "turns": backend.value(turns)})


def test_networks_of_strings_take_the_plain_way(tmp_path: Path) -> None:
    text = f"""{HEAD} g (string[n] x, bool c) => (string[n] y) {{
        y = If (c) <
            then_branch = t () => (string[n] p) {{ p = Concat <axis = 0> (x) }},
            else_branch = e () => (string[n] q) {{ q = Identity (x) }}>
    }}"""
    model = model_from_text(text)
    reference = create_session(ir.to_proto(model).SerializeToString(), optimized=False)
    write_bundle(split(model), tmp_path / "net")
    for c in (True, False):
        feeds = {"x": np.array(["a", "bc"], object), "c": np.array(c)}
        found = BundleRunner(tmp_path / "net").run(feeds)["y"]
        assert found.tolist() == run(reference, feeds)["y"].tolist() == ["a", "bc"]


def test_both_backends_give_the_same() -> None:
    parts = split(model_from_text(MANY))
    feeds = {"x": np.ones((2, 16), np.float32), "turns": np.array(3)}
    plain = Program(parts.plan, PlainBackend(lambda name: session_of(parts, name))).run(feeds)
    np.testing.assert_array_equal(plain["y"], run_fast(parts, feeds)[0]["y"])


SAME_TWICE = f"""{HEAD} g (KIND[2] x, bool c) => (KIND[2] y, KIND[2] z, KIND[2] w) {{
    a = Concat <axis = 0> (x)
    y, z, w = If (c) <
        then_branch = t () => (KIND[2] p, KIND[2] q, KIND[2] r) {{
            p = Identity (a) q = Identity (a) r = Concat <axis = 0> (x)
        }},
        else_branch = e () => (KIND[2] p2, KIND[2] q2, KIND[2] r2) {{
            p2 = Identity (x) q2 = Identity (a) r2 = Identity (x)
        }}>
}}"""


@pytest.mark.parametrize(
    ("kind", "x"), [("float", np.array([1, 2], np.float32)), ("string", np.array(["a", "bc"], object))]
)
@pytest.mark.parametrize("c", [True, False])
def test_no_output_changes_with_an_input_or_another_output(tmp_path: Path, kind: str, x: Any, c: bool) -> None:
    parts = split(model_from_text(SAME_TWICE.replace("KIND", kind)))
    assert shared_outputs(parts.plan) == ["y", "z", "w"]
    write_bundle(parts, tmp_path / "net")
    feeds = {"x": x, "c": np.array(c)}
    found = BundleRunner(tmp_path / "net").run(feeds)
    for one, other in itertools.combinations([x, *found.values()], 2):
        assert one.tolist() == other.tolist() and not np.shares_memory(one, other)


def test_outputs_of_blocks_alone_are_not_copied() -> None:
    assert shared_outputs(split(model_from_text(MANY)).plan) == ["y"]  # it may be x, after no turn
    text = f"{HEAD} g (float[2] x) => (float[2] y, float[2] z) {{ y = Neg (x) z = Identity (y) }}"
    assert shared_outputs(split(model_from_text(text)).plan) == []


STRINGS_INSIDE = f"""{HEAD} g (float[3] x, int64 n) => (float[3] y, int64[2] sizes) {{
    words = Cast <to = 8> (x)
    again = Scan <num_scan_inputs = 1, body = b (string word) => (string same) {{ same = Identity (word) }}> (words)
    last, all = Loop (n, , again) <body = b2 (int64 i, bool on, string[3] s)
        => (bool more, string[3] t, string[3] part) {{ more = Identity (on) t = Identity (s) part = Identity (s) }}>
    y = Cast <to = 1> (last)
    sizes = Shape (all)
}}"""


@pytest.mark.parametrize("trips", [0, 2])
def test_strings_between_blocks_are_cut_and_stacked(tmp_path: Path, trips: int) -> None:
    """Inputs and outputs are numbers, and the runtime makes no strings of what the host would cut."""
    model = model_from_text(STRINGS_INSIDE)
    reference = create_session(ir.to_proto(model).SerializeToString(), optimized=False)
    write_bundle(split(model), tmp_path / "net")
    feeds = {"x": np.array([1.5, -20, 300], np.float32), "n": np.array(trips)}
    wanted = run(reference, feeds)
    for name, array in BundleRunner(tmp_path / "net").run(feeds).items():
        np.testing.assert_array_equal(array, wanted[name])


FAILING = f"""{HEAD} g (float[n] x, int64[k] index, int64 turns) => (float[n] y) {{
    y = Loop (turns, , x) <body = b (int64 i, bool on, float[n] s) => (bool more, float[n] t) {{
        more = Identity (on) part = Gather (s, index) sum = ReduceSum <keepdims = 0> (part) t = Add (s, sum)
    }}>
}}"""


def test_a_run_that_fails_leaves_the_next_one_alone(tmp_path: Path) -> None:
    write_bundle(split(model_from_text(FAILING)), tmp_path / "net")
    runner = BundleRunner(tmp_path / "net")
    x = np.arange(3, dtype=np.float32)
    good = {"x": x, "index": np.array([0, 2]), "turns": np.array(2)}
    wanted = runner.run(good)["y"]
    for _ in range(2):
        with pytest.raises(GraphoptError, match="block_1"):
            runner.run({**good, "index": np.array([7])})
        np.testing.assert_array_equal(runner.run(good)["y"], wanted)


@pytest.mark.parametrize("kind", ["fast", "plain"])
def test_the_numbers_of_turns_in_several_threads(kind: str) -> None:
    parts = split(model_from_text(NUMBERS))
    make = OrtBackend if kind == "fast" else PlainBackend
    backend = make(lambda name: session_of(parts, name))
    program = Program(parts.plan, backend)
    given = backend.value if isinstance(backend, OrtBackend) else np.asarray

    def numbers(turns: int) -> Any:
        found = program.run({"x": given(np.zeros(2, np.float32)), "n": given(np.array(turns))})["numbers"]
        return backend.array(found) if isinstance(backend, OrtBackend) else found

    with ThreadPoolExecutor(4) as threads:
        for turns, found in zip(range(200, 240), threads.map(numbers, range(200, 240)), strict=True):
            np.testing.assert_array_equal(found, np.arange(turns))
