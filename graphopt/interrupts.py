"""Signals that reach what Python cannot interrupt: a call of a C library holds the thread that handlers run in.

Python notes a signal at once and calls its handler when the library returns. Whoever can make a library return says so
here; a thread that waits for signals asks for it. So does work in the background, which a process waits for at its end.
Nothing heavy is imported: the command line begins with this.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_ENDINGS: list[Callable[[], object]] = []
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM})
_ENDED = threading.Event()


def on_interrupt(end: Callable[[], object]) -> None:
    """Have a function called when the process is asked to end: it may be in another thread."""
    _ENDINGS.append(end)


def is_ended() -> bool:
    """Whether the process was asked to end: what it computes in the background is not needed any more."""
    return _ENDED.is_set()


def end_all() -> None:
    """End what goes on, for good: the process ends."""
    _ENDED.set()
    for end in _ENDINGS:
        end()


def watch_signals() -> None:
    """Begin to wait for Ctrl-C and SIGTERM. Once a process, from the main thread; it must have handlers for both."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A child has the pipe and not the thread: its signals would end what its parent does.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reader,), name="graphopt-signals", daemon=True).start()


def _watch(reader: int) -> None:
    while content := os.read(reader, 64):
        if _ENDING.intersection(content):
            end_all()
