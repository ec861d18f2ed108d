"""Run many small tasks in worker processes, so that one that crashes or hangs costs only itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Task = Callable[[int, Path], Result]


@dataclass(frozen=True)
class Died:
    """A task that has no result: its worker crashed, hung, or raised."""

    kind: str  # "crash", "timeout" or "exception"
    detail: str


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: int | None = None
    since: float = field(default_factory=time.monotonic)


class Pool(Generic[Result]):
    """Runs ``task(index, folder)`` for every index below ``count``; the folder is empty and goes away afterwards.

    Args:
        task: Runs in a forked worker, which sees what its parent held when the pool was made: nothing that is
            slow to make need be made again. The parent must not have loaded ONNX Runtime.
        count: How many tasks.
        workers: How many at a time.
        timeout: Seconds after which a task's worker is killed.
    """

    def __init__(self, task: Task[Result], count: int, *, workers: int = 2, timeout: float = 120.0) -> None:
        self.task = task
        self.timeout = timeout
        self.todo = iter(range(count))
        self.context = multiprocessing.get_context("fork")
        self.workers = [self._start() for _ in range(workers)]

    def results(self) -> Iterator[tuple[int, Result | Died]]:
        """The results with their indices, as they come."""
        while any(worker.task is not None for worker in self.workers):
            busy = [worker for worker in self.workers if worker.task is not None]
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                assert worker.task is not None
                if worker.pipe in ready:
                    index = worker.task
                    try:
                        result = worker.pipe.recv()
                    except EOFError:
                        worker.process.join()
                        result = Died("crash", f"exit code {worker.process.exitcode}")
                        self._replace(worker)
                    else:
                        self._give(worker)
                    yield index, result
                elif time.monotonic() - worker.since > self.timeout:
                    index = worker.task
                    worker.process.kill()
                    self._replace(worker)
                    yield index, Died("timeout", f"longer than {self.timeout:.0f} s")

    def _start(self) -> _Worker:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, mine, self.task), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, mine)
        self._give(worker)
        return worker

    def _replace(self, worker: _Worker) -> None:
        self.workers[self.workers.index(worker)] = self._start()

    def _give(self, worker: _Worker) -> None:
        worker.task = next(self.todo, None)
        worker.since = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            worker.pipe.send(worker.task)


def _serve(pipe: Connection, other_end: Connection, task: Task[Any]) -> None:
    other_end.close()
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what the libraries print on their own
        os.dup2(quiet, stream)
    while (index := pipe.recv()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = task(index, Path(folder))
            except Exception as error:
                result = Died("exception", f"{type(error).__name__}: {first_line(error)}")
        pipe.send(result)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 300 characters of it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
