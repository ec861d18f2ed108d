"""Work beside what Python does meanwhile: for the runtime and numpy, which do not hold the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

from graphopt.interrupts import is_ended

P = ParamSpec("P")
T = TypeVar("T")


def in_background(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Begin to call a function; ``result()`` gives what it returned, or raises what it raised.

    One thing after the other, in the order asked for: what is needed first is not slowed down by what is needed later.
    What runs here must not wait for other work in the background.
    """

    def begin() -> T:
        if is_ended():
            raise RuntimeError("the process ends")  # it waits for what is begun, and nobody will ask for it
        return work(*args, **kwargs)

    return _thread().submit(begin)


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="graphopt")


# A child of this process has the object and not the thread: it would wait for ever.
os.register_at_fork(after_in_child=_thread.cache_clear)
