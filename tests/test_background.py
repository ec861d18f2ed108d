"""Work in the background: in order, with what it raised, and in a forked child too."""

from __future__ import annotations

import os
import threading

import pytest

from graphopt.background import in_background


def test_one_after_the_other_in_order() -> None:
    done: list[int] = []
    gate = threading.Event()
    first = in_background(gate.wait, 10)
    rest = [in_background(done.append, number) for number in range(5)]
    assert done == []
    gate.set()
    assert first.result() is True
    for future in rest:
        future.result()
    assert done == list(range(5))


def test_what_it_raised_comes_out_where_it_is_asked_for() -> None:
    future = in_background(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        future.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_child_has_a_thread_of_its_own() -> None:
    assert in_background(int, "1").result() == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if in_background(int, "2").result(timeout=10) == 2 else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
