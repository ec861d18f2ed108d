"""Values between the blocks of a bundle: on the host, on the GPU or both, and how the host gets to know one.

A value never changes. It is copied to where it is wanted when it is first wanted there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.engines.pool import Pool
from graphopt.gpu.arrays import DeviceArray
from graphopt.gpu.context import Context
from graphopt.gpu.streams import Stream

Array = npt.NDArray[Any]

_MOST_BYTES = 4096  # of a value that the host asks for; one that is larger is fetched when it is wanted
_ALIGNED = 16


class Value:
    """A value of a plan.

    Attributes:
        host: An array; a list of arrays for a sequence, None for an optional that is absent.
        known: Whether the host has it.
        device: The same on the GPU; None where it is not there.
        fetch: Where it is on its way to the host, and the place there; None where it is not.
        kept: Whether somebody else has it too, so that as a result it is copied.
        stays: Whether a copy on the GPU stays there for whoever asks next.
    """

    __slots__ = ("device", "fetch", "host", "kept", "known", "stays")

    def __init__(
        self, host: Any = None, device: DeviceArray | None = None, *, kept: bool = False, stays: bool = True
    ) -> None:
        self.host = host
        self.known = device is None
        self.device = device
        self.fetch: tuple[Fetch, int] | None = None
        self.kept = kept
        self.stays = stays

    @property
    def is_tensor(self) -> bool:
        return self.device is not None or isinstance(self.host, np.ndarray)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.device.shape) if self.device is not None else np.shape(self.host)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.device.dtype if self.device is not None else np.asarray(self.host).dtype


class _Landing:
    """Pinned memory for the values of one fetch, and the moment when they are there."""

    def __init__(self, context: Context, size: int) -> None:
        self.pinned = context.pinned((size,), np.uint8)
        self.event = context.event()
        self.size = size


class Fetcher:
    """Brings what the host asks for into pinned memory, all that one block makes together.

    Attributes:
        waits: How often the host has waited for the GPU because of them.
    """

    def __init__(self, context: Context, stream: Stream) -> None:
        self._context = context
        self.stream = stream
        self._free: list[_Landing] = []
        self.waits = 0

    def start(self, values: Sequence[Value]) -> None:
        """Start to copy small values, which the GPU has been told to make."""
        wanted = [value for value in values if value.device is not None and value.device.nbytes <= _MOST_BYTES]
        starts = [0]
        for value in wanted:
            assert value.device is not None
            starts.append(starts[-1] + -(-value.device.nbytes // _ALIGNED) * _ALIGNED)
        if not starts[-1]:
            return
        landing = next((landing for landing in self._free if landing.size >= starts[-1]), None)
        if landing is None:
            landing = _Landing(self._context, starts[-1])
        else:
            self._free.remove(landing)
        fetch = Fetch(self, landing)
        for value, start in zip(wanted, starts, strict=False):
            assert value.device is not None
            target = landing.pinned.array[start : start + value.device.nbytes]
            self.stream.download(target, value.device.pointer)
            value.fetch = fetch, start
        landing.event.record(self.stream)

    def give_back(self, landing: _Landing) -> None:
        """Later copies to this place come later in the stream: nothing that is under way can disturb them."""
        if not landing.pinned.closed:
            self._free.append(landing)

    def clear(self) -> None:
        self._free.clear()


class Fetch:
    """Values on their way."""

    def __init__(self, fetcher: Fetcher, landing: _Landing) -> None:
        self._fetcher = fetcher
        self._landing = landing
        self._there = False

    def array(self, start: int, like: DeviceArray) -> Array:
        """One of them, once all are there."""
        if not self._there:
            self._landing.event.synchronize()
            self._fetcher.waits += 1
            self._there = True
        part = self._landing.pinned.array[start : start + like.nbytes]
        return part.copy().view(like.dtype).reshape(like.shape)

    def __del__(self) -> None:
        self._fetcher.give_back(self._landing)


class Copier:
    """Copies values to where they are wanted."""

    def __init__(self, context: Context, stream: Stream, pool: Pool) -> None:
        self._context = context
        self._stream = stream
        self._pool = pool

    def array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """An array of the pool, with anything in it."""
        lease = self._pool.lend(math.prod(shape) * dtype.itemsize)
        made = DeviceArray(self._context, lease.memory.pointer, tuple(shape), dtype, owner=lease, stream=self._stream)
        made.takers = lease.takers
        return made

    def copy(self, value: Value) -> Value:
        """The same in memory of its own."""
        if value.device is None:
            return Value(value.host.copy() if value.is_tensor else value.host)
        made = self.array(value.device.shape, value.device.dtype)
        self._stream.copy(made.pointer, value.device.pointer, value.device.nbytes)
        return Value(device=made)

    def to_device(self, value: Value) -> DeviceArray:
        """The value on the GPU."""
        if value.device is not None:
            return value.device
        made = self.array(value.host.shape, value.host.dtype)
        self._stream.upload(made.pointer, np.ascontiguousarray(value.host))
        if value.stays:
            value.device = made
        return made

    def to_host(self, values: Sequence[Value]) -> list[Any]:
        """The values on the host, after one wait where any of them was not there."""
        missing = list({id(value): value for value in values if not value.known}.values())
        for value in missing:
            assert value.device is not None
            value.host = np.empty(value.device.shape, value.device.dtype)
            self._stream.download(value.host, value.device.pointer)
        if missing:
            self._stream.synchronize()
        for value in missing:
            value.known = True
            value.fetch = None
        return [value.host for value in values]

    def asked(self, value: Value) -> Array:
        """An array that the host asks for, from where it is on its way to if it is."""
        if not value.known and value.fetch is not None and value.device is not None:
            fetch, start = value.fetch
            value.host = fetch.array(start, value.device)
            value.known, value.fetch = True, None
        found: Array = np.asarray(self.to_host([value])[0])
        return found

    def copy_part(self, target: int, source: int, size: int) -> None:
        """Copy bytes on the GPU, from one address to another."""
        self._stream.copy(target, source, size)
