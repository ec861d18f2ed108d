"""Timing calls: warmed up, a sample of each in a round, in an order drawn anew each round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.benchmarking.device import CallTimes, DeviceCall
from graphopt.benchmarking.results import GpuTiming
from graphopt.benchmarking.stats import percentiles, ratio_interval
from graphopt.bundles.running import BundleRunner
from graphopt.feeds import Feeds
from graphopt.runtime.loading import OnnxRuntimeRunner, Runner

_SAMPLE_SECONDS = 2e-3  # a sample lasts at least this long, well above the clocks' and the scheduler's grain
_WARM_UP_SECONDS = 0.1
_MOST_ROUNDS = 10_000

Progress = Callable[[float, str], None]


def bound(runner: Runner, feeds: Feeds) -> Callable[[], object]:
    """The model's run on one feed, without checking the feed every time where the runner can do without."""
    if hasattr(runner, "program"):
        return DeviceCall(runner.program(feeds), feeds)
    if isinstance(runner, OnnxRuntimeRunner | BundleRunner):
        return runner.bind(feeds)
    return lambda: runner.run(feeds)


def time_block(
    calls: Sequence[Callable[[], object]],
    samples: Sequence[Samples],
    block: int,
    rng: np.random.Generator,
    seconds: float,
    fewest: int,
    say: Progress,
    total: float,
) -> None:
    """Time rounds of all models, in an order drawn anew each round, until ``seconds`` are over."""
    repeats = [_warm_up(call) for call in calls]
    collected = gc.isenabled()
    gc.disable()
    try:
        began = shown = time.perf_counter()
        for rounds in range(_MOST_ROUNDS):
            now = time.perf_counter()
            if rounds >= fewest and now - began >= seconds:
                break
            if now - shown > 0.2:
                say((now - shown) / total, "timing")
                shown = now
            for index in rng.permutation(len(calls)):
                samples[index].take(calls[index], repeats[index], block)
    finally:
        if collected:
            gc.enable()


def _warm_up(call: Callable[[], object]) -> int:
    """Run until things settle. Returns how many calls make a sample long enough to time."""
    durations: list[float] = []
    began = time.perf_counter()
    while len(durations) < 3 or time.perf_counter() - began < _WARM_UP_SECONDS:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return max(1, int(np.ceil(_SAMPLE_SECONDS / max(float(np.median(durations)), 1e-9))))


@dataclass
class Samples:
    """One model's timings in seconds: every call, and for each round the median call and the processor time."""

    calls: list[np.ndarray[Any, Any]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    on_device: CallTimes = field(default_factory=CallTimes)
    compute: list[float] = field(default_factory=list)
    pipelined: list[float] = field(default_factory=list)
    cuda_graph: bool = False

    def take(self, call: Callable[[], object], repeats: int, block: int) -> None:
        """Time one round's calls."""
        walls = np.empty(repeats)
        clock = time.perf_counter
        call()  # brings this model's weights back into the caches that the one before it filled
        known = len(call.times) if isinstance(call, DeviceCall) else 0
        cpu_began = time.process_time()
        for repeat in range(repeats):
            began = clock()
            call()
            walls[repeat] = clock() - began
        cpu = (time.process_time() - cpu_began) / repeats
        self.calls.append(walls)
        self.wall.append(float(np.median(walls)))
        self.cpu.append(max(cpu, 1e-9))
        self.blocks.append(block)
        if isinstance(call, DeviceCall):
            self.on_device.extend(call.times, known)
            # Events have a grain of half a microsecond; a ratio needs something above nothing.
            self.compute.append(max(float(np.median(call.times.compute[known:])), 1e-6))
            self.pipelined.append(call.pipelined(repeats))
            self.cuda_graph = call.program.is_graph

    def calls_per_second(self) -> float:
        """Of calls one after the other; on a GPU of calls that do not wait for the one before."""
        seconds = np.asarray(self.pipelined) if self.pipelined else np.concatenate(self.calls)
        return float(1 / np.mean(seconds))

    def on_gpu(self, library: str, first: Samples, seed: int) -> GpuTiming | None:
        """The GPU's own figures; None for a model on the CPU."""
        times = self.on_device
        if not len(times):
            return None
        parts = (np.asarray(part) for part in (times.upload, times.compute, times.download))
        return GpuTiming(
            library=library,
            latency_ms=percentiles(sum(parts, start=np.zeros(len(times)))),
            compute_ms=percentiles(times.compute),
            upload_ms=percentiles(times.upload),
            download_ms=percentiles(times.download),
            enqueue_ms=percentiles(times.enqueue),
            compute_speedup=ratio_interval(first.compute, self.compute, blocks=self.blocks, seed=seed)
            if first.compute
            else None,
            cuda_graph=self.cuda_graph,
        )
