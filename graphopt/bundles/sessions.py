"""Sessions of blocks: made when they are asked for, or before that in the background."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from graphopt.background import in_background


class Sessions:
    """How the session of a block is made. What is made in the background is made one block after the other.

    Args:
        make: Makes the session of a block.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make
        self._soon: dict[str, Future[Any]] = {}
        self._asked: set[str] = set()
        self._process = os.getpid()

    def __call__(self, block: str) -> Any:
        """The session of a block. What went wrong with it in the background is raised here."""
        self._asked.add(block)
        soon = self._soon.pop(block, None)
        # One that is not begun would wait for others; one that a parent process had begun would never end.
        if soon is None or soon.cancel() or (os.getpid() != self._process and not soon.done()):
            return self._make(block)
        return soon.result()

    def prefetch(self, blocks: Sequence[str]) -> None:
        """Begin to make the sessions of some blocks, in this order.

        The next one is begun when one is done: nothing but that one keeps the process from ending.
        """
        left = [block for block in blocks if block not in self._asked]
        if not left:
            return
        block, *others = left
        try:
            soon = in_background(self._make, block)
        except RuntimeError:
            return  # the interpreter ends
        self._soon[block] = soon
        if block in self._asked and self._soon.pop(block, None) is not None:
            soon.cancel()  # it was asked for meanwhile, and is being made there
        alive = weakref.ref(self)

        def go_on(_: Future[Any]) -> None:
            sessions = alive()
            if sessions is not None:
                sessions.prefetch(others)

        soon.add_done_callback(go_on)
