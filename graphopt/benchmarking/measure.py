"""Models against each other: the same inputs, one process, round by round in changing order.

Whatever disturbs the machine disturbs all models of a round alike; ratios are taken within rounds. Between
blocks of rounds the models are loaded anew: two loads of one file differ in speed by a per cent or so, which the
interval has to cover.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from graphopt.benchmarking.comparing import compare
from graphopt.benchmarking.entries import (
    describe_gpu,
    entries_of,
    environment,
    libraries,
    library_of,
    load_entry,
    load_in_order,
    model_bytes,
    name_outputs,
)
from graphopt.benchmarking.inputs import check_same_inputs, describe_value, feeds_for, known_inputs, samples_plan
from graphopt.benchmarking.memory import peak_bytes
from graphopt.benchmarking.results import BenchResult, ModelTiming
from graphopt.benchmarking.stats import percentiles, ratio_interval
from graphopt.benchmarking.timing import Progress, Samples, bound, time_block
from graphopt.errors import BadInput
from graphopt.runtime.flavour import import_onnxruntime

_FEWEST_ROUNDS = 10
_BLOCKS = 8  # how often the models are loaded anew: where weights come to lie in memory changes the speed a little
_MOST_LOADING = 1.0  # of the timing, at most: large models are loaded anew less often


def bench(
    paths: Sequence[str | Path],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    calibration: Path | None = None,
    threads: int = 1,
    seconds: float = 5.0,
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
    torch: Sequence[str] = (),
    progress: Progress | None = None,
) -> BenchResult:
    """Time models against each other, and compare their outputs.

    Args:
        paths: The models: ONNX files, bundles and engines; the first is what the others are compared with.
        shapes: Sizes to use for some inputs (see `graphopt.feeds.synthesise_feeds`).
        calibration: The user's own inputs, instead of made-up ones. The first feed is timed.
        threads: Threads within an operator. With 1, processor time is the model's own.
        seconds: How long to time, all models together; at least 10 rounds are timed however long they take.
        seed: Of the inputs, of the order within rounds and of the intervals.
        device: Where ONNX files run. None: on ``cuda`` where an engine or a torch module takes part, else on ``cpu``.
        torch: torch modules to time on the GPU beside the models, as `graphopt.export` takes them: ``FILE.py:FACTORY``.
        progress: Called with the fraction done since the last call and what is going on.

    Raises:
        BadInput: A model cannot be used, or the models take different inputs.
        MissingDependency: What a model needs is not installed. NoGpu: there is no GPU for it.
        GraphoptError: A model fails while running.
    """
    if not paths:
        raise BadInput("no model was given")
    if threads < 1:
        raise BadInput(f"threads must be at least 1, not {threads}")
    if not seconds > 0:
        raise BadInput(f"seconds must be above 0, not {seconds:g}")
    say = progress or (lambda fraction, what: None)
    entries = [*entries_of(paths, device, torch)]
    files = [entry.path for entry in entries]
    say(0, "loading")
    if any(entry.kind in ("onnx", "onnx-cuda", "bundle") for entry in entries):
        import_onnxruntime()  # once, and not part of what loading takes
    began = time.perf_counter()
    runners = [load_entry(entry, threads) for entry in entries]
    loading = time.perf_counter() - began
    for file, runner in zip(files[1:], runners[1:], strict=True):
        check_same_inputs(files[0], runners[0], file, runner)
    name_outputs(runners)
    feeds = feeds_for(files, runners, shapes, calibration, seed)
    say(0, "comparing outputs")
    differences = compare(files, runners, feeds)
    blocks = int(np.clip(_MOST_LOADING * seconds / loading, 1, _BLOCKS))
    samples = [Samples() for _ in files]
    rng = np.random.default_rng(seed)
    for block in range(blocks):
        if block:
            runners = []  # before the next ones are loaded
            runners = load_in_order(entries, threads, rng.permutation(len(files)))
            name_outputs(runners)
        calls = [bound(runner, known_inputs(runner, feeds[0])) for runner in runners]
        time_block(calls, samples, block, rng, seconds / blocks, -(-_FEWEST_ROUNDS // blocks), say, seconds)
        told = [library_of(runner) for runner in runners]
        gpu = next((describe_gpu(runner) for runner in runners if hasattr(runner, "program")), None)
        sizes = [model_bytes(entry, runner) for entry, runner in zip(entries, runners, strict=True)]
        del calls
    alone = [
        entry.kind in ("onnx", "bundle") and not hasattr(runner, "context")
        for entry, runner in zip(entries, runners, strict=True)
    ]
    runners = []  # their memory is not needed while the children load theirs
    say(0, "measuring memory")
    peaks = [
        peak_bytes(entry.path, feeds[0], threads) if here else None for entry, here in zip(entries, alone, strict=True)
    ]
    first = samples[0]
    models = [
        ModelTiming(
            path=file,
            wall_ms=percentiles(np.concatenate(own.calls) * 1e3),
            cpu_ms=float(np.median(own.cpu) * 1e3),
            calls_per_second=own.calls_per_second(),
            peak_bytes=peak,
            file_bytes=size,
            speedup=ratio_interval(first.wall, own.wall, blocks=own.blocks, seed=seed),
            cpu_speedup=ratio_interval(first.cpu, own.cpu, blocks=own.blocks, seed=seed),
            max_abs_difference=difference,
            max_abs_output=largest,
            gpu=own.on_gpu(library, first, seed),
            one_by_one=(samples_plan(files[0]) is None) != (samples_plan(file) is None),
        )
        for file, own, peak, size, library, (difference, largest) in zip(
            files, samples, peaks, sizes, told, differences, strict=True
        )
    ]
    return BenchResult(
        models=models,
        rounds=len(first.wall),
        loads=blocks,
        threads=threads,
        timed_on={name: describe_value(value) for name, value in feeds[0].items()},
        compared_on=len(feeds),
        environment={**environment(entries), **libraries(told)},
        gpu=gpu,
    )
