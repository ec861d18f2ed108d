"""When garbage is collected: not while a graph is built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No garbage collection meanwhile: every object of a graph lives, so looking for dead ones is wasted.

    Graphs are cyclic: one that is dropped meanwhile keeps its memory until collection resumes, or ``gc.collect``.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            if not gc.get_freeze_count():
                # What was made is counted as old: to look through all of it as new would cost what was saved.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
