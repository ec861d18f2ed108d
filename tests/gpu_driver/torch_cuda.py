"""torch's CUDA on the stand-in driver: its CPU build, put into the stand-in's streams."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest

from graphopt.benchmarking import on_gpu
from graphopt.gpu.library import LEGACY_STREAM

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class TorchOnTheStandIn:
    """What `TorchStream` and its users need of torch's CUDA.

    A module runs when it is called. A product waits its turn in the stream, and is recorded where that records.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self._multiply = torch.mm
        self._kept: list[Any] = []
        self._streams: list[int] = []
        self.products = 0
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: handle)
        monkeypatch.setattr(torch.cuda, "stream", self._current)
        monkeypatch.setattr(torch, "mm", self._mm)
        monkeypatch.setattr(on_gpu.TorchStream, "tensor", self._tensor)

    @contextlib.contextmanager
    def _current(self, stream: int) -> Iterator[None]:
        self._streams.append(stream)
        yield
        self._streams.pop()

    def _mm(self, x: Any, weight: Any, *, out: Any) -> Any:
        def work(_: Any) -> None:
            self.products += 1
            self._multiply(x, weight, out=out)

        function = _HOST_FUNCTION(work)
        self._kept.append(function)
        cuda = ctypes.CDLL(os.environ["GRAPHOPT_LIBCUDA"])
        assert cuda.cuLaunchHostFunc(ctypes.c_void_p(self._streams[-1]), function, None) == 0
        return out

    @staticmethod
    def _tensor(runner: Any, array: Any) -> Any:
        import torch

        assert array.__dlpack_device__() == (2, 0) and array.__dlpack__(stream=LEGACY_STREAM)  # as torch asks for it
        runner._stream.synchronize()
        raw = (ctypes.c_ubyte * array.nbytes).from_address(array.pointer)
        return torch.frombuffer(raw, dtype=getattr(torch, array.dtype.name)).reshape(array.shape)
