"""Runs that are ended from outside: by a limit, and by a signal while they are waited for."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import BadInput, GraphoptError
from graphopt.runtime import ending
from graphopt.runtime.ending import Endless, Limit, current_limit, limit_of, run_to_end, under
from graphopt.runtime.session import create_session, run
from tests.models.endless import BARE, HEAD, IF_POSITIVE, INNER, LONG, NEVER, endless

X = {"x": np.array([-0.5, 0.25], np.float32)}


def session(text: str) -> Any:
    return create_session(endless(text).SerializeToString(), optimized=False, threads=1)


def limit(patience: float | None = 0.1, **how: Any) -> Limit:
    return Limit(["some loop"], True, patience, **how)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(("text", "named"), [(NEVER, "in loop 'spin'"), (INNER, "in loops 'outer', 'inner'")])
def test_a_run_without_an_end_is_ended_and_the_loop_named(text: str, named: str, optimized: bool) -> None:
    spinning = create_session(endless(text).SerializeToString(), optimized=optimized, threads=1)
    with pytest.raises(Endless, match=r"^no end after 0\.1 s") as error, under(limit()):
        run(spinning, X)
    assert named in error.value.what
    assert error.value.exit_code == 2
    assert "--calibration" in (error.value.hint or "")


def test_a_loop_without_a_name_is_one_of_the_networks() -> None:
    with pytest.raises(Endless, match="in loop 'some loop'"), under(limit()):
        run(session(NEVER.replace("[spin]", "")), X)


def test_the_session_runs_afterwards() -> None:
    both, bound = session(IF_POSITIVE), limit()
    with under(bound):
        with pytest.raises(Endless):
            run(both, X)
        assert run(both, {"x": np.ones(2, np.float32)})["y"].shape == (2,)
    assert bound.cut == 1
    assert bound.longest > 0
    assert current_limit() is None


def test_what_the_longest_run_took_gives_others_time() -> None:
    """A run beyond the patience that would end by itself: cut, unless others took as long."""
    long, turns = session(LONG), {**X, "n": np.array(100_000)}
    with pytest.raises(Endless), under(limit(0.001)):
        run(long, turns)
    with under(limit(0.001, longest=600.0)):
        assert run(long, turns)["y"].shape == (2,)
    with under(limit(None)):  # as for inputs of the user's
        assert run(long, turns)["y"].shape == (2,)


def test_others_who_run_the_session_are_left_alone() -> None:
    both = session(IF_POSITIVE)
    entered, results = threading.Event(), []

    def another() -> None:
        turns = {**X, "n": np.array(100_000)}
        long = session(LONG)
        entered.set()
        results.append(run(long, turns))
        results.append(run(both, {"x": np.ones(2, np.float32)}))

    thread = threading.Thread(target=another)
    thread.start()
    entered.wait(10)
    with pytest.raises(Endless), under(limit(0.05)):
        run(both, X)
    thread.join()
    assert len(results) == 2


def test_an_error_of_the_run_itself_comes_through() -> None:
    squares = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n] x, float[m] z) => (float[k] y) { y = Add (x, z) }
    """
    added = session(squares)
    with under(limit(10.0)):
        with pytest.raises(BadInput, match="no value was given"):
            run(added, {"x": np.zeros(2, np.float32)})
        with pytest.raises(GraphoptError, match="Add") as error:
            run(added, {"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)})
    assert not isinstance(error.value, Endless)


def test_a_signal_is_heard_while_a_run_has_no_end() -> None:
    """Without the command line's watch too: in a notebook, the one who waits is free to hear it."""

    class Heard(BaseException):
        pass

    def hear(number: int, frame: FrameType | None) -> None:
        raise Heard

    spinning, before = session(NEVER), threading.active_count()
    known = signal.signal(signal.SIGALRM, hear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Heard), under(limit(600.0)):
            run(spinning, X)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, known)
    for thread in threading.enumerate():
        if thread.name == "graphopt-run":
            thread.join(10)
    assert threading.active_count() == before


def test_what_a_run_is_made_of_ends_with_it() -> None:
    """A host that runs blocks: those are no runs of their own, with a time of their own."""
    quick = session(IF_POSITIVE)

    def host(options: Any) -> None:
        while True:
            run(quick, {"x": np.ones(2, np.float32)})

    bound = limit()
    with pytest.raises(Endless), under(bound):
        run_to_end(host)
    assert bound.cut == 1


def loop_of(text: str) -> ir.Node:
    (found,) = [node for node in ir.from_proto(onnx.parser.parse_model(text)).graph if node.op_type == "Loop"]
    return found


@pytest.mark.parametrize(
    ("trips", "is_open"),
    [
        ("", True),
        ("n = Constant <value = int64 {7}> ()", False),
        ("n = Constant <value = int64 {9223372036854775807}> ()", True),
        ("n = Size (x)", False),
        ("s = Shape (x) n = ReduceProd <keepdims = 0> (s)", False),
        ("f = ReduceSum <keepdims = 0> (x) n = Cast <to = 7> (f)", True),
        ("r = Shape (x) z = Cast <to = 7> (x) q = Add (r, z) n = ReduceSum <keepdims = 0> (q)", True),
    ],
)
def test_a_loop_is_open_where_only_values_end_it(trips: str, is_open: bool) -> None:
    text = f"""
    {HEAD}
    g (float[2] x) => (float[2] y) {{
        {trips}
        y = Loop ({"n" if trips else ""}, , x) <body = b (int64 i, bool go, float[2] s) => (bool more, float[2] t) {{
            t = Tanh (s)
            more = Identity (go)
        }}>
    }}
    """
    assert ending.is_open(loop_of(text)) is is_open


@pytest.mark.parametrize(
    ("text", "loops"), [(NEVER, ["spin"]), (INNER, ["inner"]), (LONG, ["count"]), (BARE, ["still"])]
)
def test_the_loops_of_a_limit_are_those_that_may_not_end(text: str, loops: list[str]) -> None:
    found = limit_of(ir.from_proto(endless(text)), made_up=True)
    assert found is not None
    assert found.loops == loops
    assert found.seconds == ending.PATIENCE


def test_inputs_of_the_users_have_all_the_time_until_the_reference_has_run() -> None:
    found = limit_of(ir.from_proto(endless(NEVER)), made_up=False)
    assert found is not None
    assert found.seconds is None
    found.longest = 1000.0
    found.compare()
    assert found.seconds == ending.SLACK * 1000.0


def test_networks_whose_loops_end_have_no_limit() -> None:
    text = LONG.replace("int64 n", "int64 unused").replace("[count]", "n = Constant <value = int64 {9}> () [count]")
    assert limit_of(ir.from_proto(endless(text)), made_up=True) is None
