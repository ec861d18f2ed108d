"""What is open on a GPU: the primary context, and things in it with handles that are freed once."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from graphopt.gpu.library import Library

if TYPE_CHECKING:
    from graphopt.gpu.context import Context


class Primary:
    """A device's primary context, held. What is open in it keeps this alive: it is let go of last.

    Attributes:
        opened: What was opened in it, in that order.
    """

    def __init__(self, library: Library, device: int) -> None:
        self.opened: list[weakref.ref[Resource]] = []
        index, handle = ctypes.c_int(), ctypes.c_void_p()
        library.call("cuDeviceGet", ctypes.byref(index), device)
        library.call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), index)
        self.handle = handle.value or 0
        self.release = weakref.finalize(self, library.raw, "cuDevicePrimaryCtxRelease_v2", index)

    @contextmanager
    def pushed(self, library: Library) -> Iterator[None]:
        """Current for a while: what is collected as garbage is freed anywhere, and must leave no context behind."""
        library.raw("cuCtxPushCurrent_v2", self.handle)
        try:
            yield
        finally:
            library.raw("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def tidy(self) -> None:
        """Forget resources that are gone."""
        if len(self.opened) > 256:
            self.opened = [reference for reference in self.opened if reference() is not None]


class Resource:
    """Something of a context with a handle; freed once."""

    def __init__(self, context: Context, handle: int, free: Callable[[], None]) -> None:
        self.context = context
        self.handle = handle
        self._finalizer = weakref.finalize(self, free)
        context.primary.opened.append(weakref.ref(self))

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Free it now; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def freeing(context: Context, function: str, *arguments: Any) -> Callable[[], None]:
    """What frees a handle. It asks for no success: the process may be ending, and the driver gone already."""
    library, primary = context.library, context.primary
    primary.tidy()

    def free() -> None:
        with primary.pushed(library):
            library.raw(function, *arguments)

    return free
