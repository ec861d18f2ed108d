"""Calls of programs on a GPU, as a host makes them: inputs up, work, outputs down, each part timed by events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.gpu.program import Program


@dataclass
class CallTimes:
    """What each call took, in milliseconds.

    Attributes:
        enqueue: On the host, to put the work into the stream.
        upload: Inputs to the GPU.
        compute: The work itself.
        download: Outputs to the host.
    """

    enqueue: list[float] = field(default_factory=list)
    upload: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    download: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.compute)

    def extend(self, other: CallTimes, start: int = 0) -> None:
        """Add the calls of another, from one on."""
        for name in ("enqueue", "upload", "compute", "download"):
            getattr(self, name).extend(getattr(other, name)[start:])


class DeviceCall:
    """A program with its inputs in pinned host memory; a call returns when the outputs are there too.

    Attributes:
        times: Of every call so far.
    """

    def __init__(self, program: Program, feeds: Mapping[str, Any]) -> None:
        self.program = program
        context = program.context
        self.times = CallTimes()
        self._inputs = []
        for name, array in program.inputs.items():
            pinned = context.pinned(array.shape, array.dtype)
            pinned.array[...] = np.asarray(feeds[name])
            self._inputs.append((array, pinned))
        self._outputs = [
            (name, array, context.pinned(array.shape, array.dtype)) for name, array in program.outputs.items()
        ]
        self._events = [context.event() for _ in range(4)]

    def __call__(self) -> None:
        stream, (began, uploaded, computed, downloaded) = self.program.stream, self._events
        began.record(stream)
        self._upload()
        uploaded.record(stream)
        start = time.perf_counter()
        self.program.enqueue()
        enqueued = time.perf_counter() - start
        computed.record(stream)
        self._download()
        downloaded.record(stream)
        stream.synchronize()
        times = self.times
        times.enqueue.append(enqueued * 1e3)
        times.upload.append(uploaded.since(began))
        times.compute.append(computed.since(uploaded))
        times.download.append(downloaded.since(computed))

    def pipelined(self, calls: int) -> float:
        """Seconds a call takes where the next one is put into the stream before the one before it is over."""
        start = time.perf_counter()
        for _ in range(calls):
            self._upload()
            self.program.enqueue()
            self._download()
        self.program.stream.synchronize()
        return (time.perf_counter() - start) / calls

    def results(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of the outputs of the last call."""
        return {name: pinned.array.copy() for name, _, pinned in self._outputs}

    def _upload(self) -> None:
        for array, pinned in self._inputs:
            if array.nbytes:
                self.program.stream.upload(array.pointer, pinned)

    def _download(self) -> None:
        for _, array, pinned in self._outputs:
            if array.nbytes:
                self.program.stream.download(pinned, array.pointer)
