"""Ending runs of ONNX Runtime, which hears no signal while it runs, and whose loops may have no end.

A flag in the options of a run, set from another thread, ends it before its next node, in every turn of a loop too. So
every run is given options that are known here: `interrupts` ends all of them.

Loops that only values end may never end on made-up inputs. Runs of such a network under a `Limit` are given so much
time, and then ended. Networks whose loops are sure to end are given all the time that they take, and so is whoever
runs a model of his own.
"""

from __future__ import annotations

import contextvars
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput
from graphopt.interrupts import is_ended, on_interrupt
from graphopt.runtime.flavour import import_onnxruntime

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds, of processor time too, that a run may take while none has ended. A loop with next to nothing in its body
takes millions of turns meanwhile, and made-up inputs are small. Who needs longer has inputs of his own."""
AFTER_A_CUT = 0.25
"""What is left of the patience after a run without an end, for other inputs."""
SLACK = 10
"""How many times the longest that ended a run may take: about what a host takes for turns with next to nothing in them,
against the runtime."""
MOST_CUT = 3
"""So many runs on made-up inputs without an end, and no further inputs are tried."""

_LOOP = re.compile(r"running Loop node\. Name:'(.*?)'")
_MOST_NAMES = 3
_HUGE = 1 << 31


class Endless(BadInput):
    """A run was ended that had not come to its end."""


@dataclass
class Limit:
    """How long runs of a network may take.

    Attributes:
        loops: The names of its loops that only values end.
        made_up: Whether it may be for made-up inputs that a run has no end.
        patience: Seconds that a run may take while none has ended; None: as long as it likes.
        longest: Seconds of the longest run that ended.
        cut: How many were ended.
    """

    loops: Sequence[str]
    made_up: bool
    patience: float | None
    longest: float = 0.0
    cut: int = 0

    @property
    def seconds(self) -> float | None:
        """How long a run may take; None: as long as it likes."""
        return None if self.patience is None else max(self.patience, SLACK * self.longest)

    def compare(self) -> None:
        """The reference has run: what is compared with it has its time to go by, and cannot blame the inputs."""
        self.patience, self.made_up = PATIENCE, False

    def error(self, inside: Sequence[str], seconds: float) -> Endless:
        """What to say of a run that was ended.

        Args:
            inside: The loops that it was in, outer before inner, as far as that is known.
            seconds: How long it ran.
        """
        names = list(dict.fromkeys(filter(None, inside))) or self.loops
        told = ", ".join(f"'{name}'" for name in names[:_MOST_NAMES])
        if len(names) > _MOST_NAMES:
            told += f" and {len(names) - _MOST_NAMES} more"
        where = f" in loop{'s' if len(names) > 1 else ''} {told}" if told else " in a loop"
        hint = "the inputs are made up, which may be why; give real ones with --calibration"
        return Endless(f"no end after {seconds:.3g} s{where}", hint=hint if self.made_up else None)


@dataclass
class _Run:
    """A run under a limit, as what it calls sees it: the options that end it, and the loops of a host it is in."""

    options: Any
    loops: dict[str, None] = field(default_factory=dict)


_STATE: contextvars.ContextVar[Limit | _Run | None] = contextvars.ContextVar("graphopt-limit", default=None)
_OPTIONS: weakref.WeakSet[Any] = weakref.WeakSet()
_CHANGING = threading.Lock()


def run_options() -> Any:
    """ONNX Runtime's options for runs, by which `end_runs` ends these."""
    options = import_onnxruntime().RunOptions()
    with _CHANGING:
        _OPTIONS.add(options)
    options.terminate = is_ended()
    return options


@cache
def _common() -> Any:
    """The options of all runs without a limit. Making some for every call would take a fifth of what it costs."""
    return run_options()


def end_runs() -> None:
    """End every run that is under way, from another thread. For good: what is run with the same options ends too."""
    with _CHANGING:
        known = list(_OPTIONS)
    for options in known:
        options.terminate = True


on_interrupt(end_runs)


def limit_of(model: ir.Model, *, made_up: bool) -> Limit | None:
    """A limit for the runs of a network; None where its loops are sure to end. Inputs of the user's have all the time.

    Args:
        model: The network.
        made_up: Whether its inputs are made up.
    """
    loops = [node.name or "" for node in graphs.all_nodes(model) if is_open(node)]
    return Limit([name for name in loops if name], made_up, PATIENCE if made_up else None) if loops else None


def is_open(node: ir.Node) -> bool:
    """Whether a node is a Loop that only values end: neither a constant nor shapes limit its turns."""
    if node.domain != "" or node.op_type != "Loop":
        return False
    trips = node.inputs[0] if node.inputs else None
    if trips is None:
        return True
    seen: set[ir.Value] = set()
    waiting = [trips]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if graphs.is_constant(value):
            known = graphs.scalar_of(value)
            if known is not None and known >= _HUGE:
                return True  # how exporters write that there is no limit
            continue
        maker = value.producer()
        if maker is None or graphs.has_subgraphs(maker):
            return True
        if maker.op_type not in ("Shape", "Size"):
            waiting.extend(read for read in maker.inputs if read is not None)
    return False


def current_limit() -> Limit | None:
    """The limit that runs are under here."""
    state = _STATE.get()
    return state if isinstance(state, Limit) else None


@contextmanager
def under(limit: Limit | None) -> Iterator[None]:
    """Put runs under a limit; None: leave them as they are."""
    if limit is None:
        yield
        return
    token = _STATE.set(limit)
    try:
        yield
    finally:
        _STATE.reset(token)


def run_to_end(call: Callable[[Any], T], options: Any = None) -> T:
    """Run something on ONNX Runtime; under a limit, no longer than that.

    Under a limit another thread runs it, while this one waits: so it hears signals as well.

    Args:
        call: Runs it, given ONNX Runtime's options to run with.
        options: These; default: some of its own, or those of the run that it is a part of.

    Raises:
        Endless: It was ended.
    """
    state = _STATE.get()
    if state is None:
        return call(_common() if options is None else options)
    if isinstance(state, _Run):
        if state.options.terminate:
            raise Endless("the run was ended")
        return call(state.options)
    return _run_apart(call, run_options() if options is None else options, state)


def go_on() -> None:
    """A host goes on, maybe without running anything.

    Raises:
        Endless: The run that it is was ended.
    """
    state = _STATE.get()
    if isinstance(state, _Run) and state.options.terminate:
        raise Endless("the run was ended")


def turn(name: str, *, goes: bool) -> None:
    """A loop of a host takes a turn, or ends: what is said of a run that is ended. Raises as `go_on`."""
    state = _STATE.get()
    if isinstance(state, _Run):
        if goes:
            state.loops.setdefault(name)
        else:
            state.loops.pop(name, None)
    go_on()


def _run_apart(call: Callable[[Any], T], options: Any, limit: Limit) -> T:
    run = _Run(options)
    made: list[T] = []
    raised: list[BaseException] = []
    # Not the thread itself, which counts as ended when a signal comes while it is joined.
    over = threading.Lock()
    over.acquire()

    def work() -> None:
        _STATE.set(run)
        try:
            made.append(call(options))
        except BaseException as error:  # raised again where it is waited for
            raised.append(error)
        finally:
            over.release()

    # Not of a pool, which a process waits for at its end.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="graphopt-run", daemon=True)
    began = time.perf_counter()
    seconds = limit.seconds
    try:
        thread.start()
        is_over = _wait(over, seconds)
    finally:
        if not (made or raised):
            _end(options, thread, over)
    if made:
        limit.longest = max(limit.longest, time.perf_counter() - began)
        return made[0]
    if is_over:
        raise raised[0]
    assert seconds is not None
    limit.cut += 1
    limit.patience = PATIENCE * AFTER_A_CUT
    raise limit.error([*run.loops, *_loops_in(raised[0])], seconds) from None


def _end(options: Any, thread: threading.Thread, over: threading.Lock) -> None:
    """End a run, and wait for that: a process that ended meanwhile would take it down in the runtime's code."""
    options.terminate = True
    while not over.acquire(timeout=1.0):
        if thread.ident is None:
            return  # a signal came before it was started
    options.terminate = is_ended()


def _wait(over: threading.Lock, seconds: float | None) -> bool:
    """Wait until a run is over, but no longer than that. Returns whether it is.

    Both clocks must say so: the one on the wall goes on where others have the processor, and that of the process goes
    faster with more threads.
    """
    if seconds is None:
        return over.acquire()
    began, used = time.perf_counter(), time.process_time()
    while (left := seconds - min(time.perf_counter() - began, time.process_time() - used)) > 0:
        if over.acquire(timeout=left):
            return True
    return over.acquire(blocking=False)


def _loops_in(error: BaseException | None) -> list[str]:
    """The loops that ONNX Runtime was in, outer before inner, by what it says of a run that was ended."""
    while error is not None:
        found: list[str] = _LOOP.findall(str(error))
        if found:
            return found
        error = error.__cause__
    return []
