"""Blocks that wait for other blocks, emulated: right ones under many schedules, and what goes wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from graphopt.kernels.emulate import EmulatedModule, EmulationError, Work, find_compiler
from graphopt.kernels.kernel import Kernel, Launch, Parameter

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler to emulate kernels with")

SOURCE = Path(__file__).parent / "sources" / "between_blocks.cu"
FAULTS = re.findall(r"^    ([A-Z_]+),", SOURCE.read_text(), re.MULTILINE)
PRODUCERS, CONSUMERS = 3, 4
X = np.arange(64 * PRODUCERS, dtype=np.float32)
OUTPUTS = [((64 * PRODUCERS,), "float32"), ((64 * CONSUMERS,), "float32")]


def _pipeline(fault: str) -> EmulatedModule:
    parameters = (
        Parameter("x", "input", "float32"),
        Parameter("fault", "scalar", "int32"),
        Parameter("producers", "scalar", "int32"),
        Parameter("middle", "output", "float32"),
        Parameter("y", "output", "float32"),
    )
    launch = Launch((PRODUCERS + CONSUMERS, 1, 1), (FAULTS.index(fault), PRODUCERS))
    return EmulatedModule(Kernel("pipeline", SOURCE, parameters, 64, lambda _: launch))


def _check(outputs: list[np.ndarray], x: np.ndarray = X) -> None:
    middle, y = outputs
    np.testing.assert_array_equal(middle, 2 * x)
    np.testing.assert_array_equal(y, np.full(64 * CONSUMERS, 2 * x.sum(), np.float32))


@pytest.mark.parametrize("way", ["RIGHT", "BY_FENCE", "BY_COPY"])
@pytest.mark.parametrize("resident", [1, 2, 3, 7, None])
def test_tickets_work_whatever_runs_at_the_same_time(way: str, resident: int | None) -> None:
    module = _pipeline(way)
    for seed in range(10):  # of one module: each launch leaves its counters as it found them
        _check(module.launch([X], OUTPUTS, seed=seed, resident=resident))
        assert not any(piece.any() for piece in module.state.values())


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("NO_BARRIER", r"race: reads element \d+ of middle, which thread \d+ of"),
        ("NO_FENCE", r"race: reads element \d+ of middle, which thread \d+ of"),
        ("NO_WAIT", r"race: reads element \d+ of middle|the output middle before anything wrote it"),
        ("NO_BARRIER_AFTER", r"race: reads element \d+ of middle|the output middle before anything wrote it"),
        ("PLAIN_LOAD", r"a plain load of element \d+ of middle, which another block wrote, may be stale"),
        ("PLAIN_FLAG", r"race: reads element 0 of done|a plain load of element 0 of done"),
    ],
)
def test_what_orders_nothing_is_found_whatever_the_schedule(fault: str, what: str) -> None:
    for seed in range(10):
        with pytest.raises(EmulationError, match=what):
            _pipeline(fault).launch([X], OUTPUTS, seed=seed)


def test_block_numbers_are_no_order() -> None:
    module, deadlocks = _pipeline("BY_BLOCK_NUMBER"), 0
    _check(module.launch([X], OUTPUTS, seed=0, resident=1))  # seed 0 starts them in their order
    for seed in range(1, 7):
        try:
            _check(module.launch([X], OUTPUTS, seed=seed, resident=1))
        except EmulationError as error:
            assert "deadlock" in str(error) and "between_blocks.cu:" in str(error)
            deadlocks += 1
            module.reset()
    assert deadlocks >= 3


def test_waiting_for_a_block_that_cannot_start_is_a_deadlock() -> None:
    with pytest.raises(EmulationError, match="deadlock: all threads of the 2 blocks that run wait"):
        _pipeline("CONSUMERS_FIRST").launch([X], OUTPUTS, resident=2)
    # With all blocks at the same time it works: on a GPU with room enough it would, too, and not on another.
    _check(_pipeline("CONSUMERS_FIRST").launch([X], OUTPUTS, resident=PRODUCERS + CONSUMERS))


def _together() -> EmulatedModule:
    parameters = (
        Parameter("x", "input", "float32"),
        Parameter("producers", "scalar", "int32"),
        Parameter("middle", "output", "float32"),
        Parameter("y", "output", "float32"),
    )
    launch = Launch((PRODUCERS + CONSUMERS, 1, 1), (PRODUCERS,))
    return EmulatedModule(Kernel("together", SOURCE, parameters, 64, lambda _: launch))


@pytest.mark.parametrize("resident", [1, 3, 8, None])
def test_launches_at_the_same_time(resident: int | None) -> None:
    module = _together()
    for seed in range(5):
        works = [Work([X + number], OUTPUTS, instance=number) for number in range(3)]
        for number, outputs in enumerate(module.launch_together(works, seed=seed, resident=resident)):
            _check(outputs, X + number)
    assert len(set(module.state["keys"].view(np.uint64))) == 4  # three rows claimed, one free


def test_launches_at_the_same_time_that_share_counters_fail() -> None:
    works = [Work([X + number], OUTPUTS, instance=number) for number in range(2)]
    failed = 0
    for seed in range(6):
        try:
            results = _pipeline("RIGHT").launch_together(works, seed=seed, resident=4)
            for number, outputs in enumerate(results):
                _check(outputs, X + number)
        except (EmulationError, AssertionError):
            failed += 1
    assert failed == 6
