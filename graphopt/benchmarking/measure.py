"""Models against each other: the same inputs, one process, round by round in changing order.

Whatever disturbs the machine disturbs all models of a round alike; ratios are taken within rounds. Between
blocks of rounds the models are loaded anew: two loads of one file differ in speed by a per cent or so, which the
interval has to cover.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graphopt.benchmarking.device import CallTimes, DeviceCall
from graphopt.benchmarking.memory import peak_bytes
from graphopt.benchmarking.stats import Percentiles, Ratio, percentiles, ratio_interval
from graphopt.errors import BadInput
from graphopt.feeds import Feeds
from graphopt.runtime.flavour import import_onnxruntime, onnxruntime_flavour
from graphopt.runtime.loading import BACKEND_FOR_SUFFIX, OnnxRuntimeRunner, Runner, load

_SAMPLE_SECONDS = 2e-3  # a sample lasts at least this long, well above the clocks' and the scheduler's grain
_WARM_UP_SECONDS = 0.1
_FEWEST_ROUNDS = 10
_MOST_ROUNDS = 10_000
_BLOCKS = 8  # how often the models are loaded anew: where weights come to lie in memory changes the speed a little
_MOST_LOADING = 1.0  # of the timing, at most: large models are loaded anew less often

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class GpuTiming:
    """What was measured of one model on a GPU, in milliseconds a call.

    Attributes:
        library: What ran it.
        latency_ms: Upload, compute and download together, on the GPU's clock.
        compute_ms: The work alone.
        upload_ms: Inputs to the GPU.
        download_ms: Outputs to the host.
        enqueue_ms: On the host, to hand the work over; where it is more than the work takes, the host is the limit.
        compute_speedup: Compute time of the first model over this one's; None where the first is on the CPU.
        cuda_graph: Whether it was replayed from a CUDA graph of ours.
    """

    library: str
    latency_ms: Percentiles
    compute_ms: Percentiles
    upload_ms: Percentiles
    download_ms: Percentiles
    enqueue_ms: Percentiles
    compute_speedup: Ratio | None
    cuda_graph: bool


@dataclass(frozen=True)
class ModelTiming:
    """What was measured of one model.

    Attributes:
        path: The model's file.
        wall_ms: Wall time of a call, in milliseconds.
        cpu_ms: Processor time of the process for a call, in milliseconds (median over rounds).
        calls_per_second: One over the mean wall time of a call; on a GPU of calls that do not wait for each other.
        peak_bytes: The most memory of a process that loads and runs this model alone; None for one on a GPU.
        file_bytes: The size of its file, external data included.
        speedup: Wall time of the first model over this one's: above 1 is faster than the first.
        cpu_speedup: The same of processor time.
        max_abs_difference: The largest difference of its outputs from the first model's; infinite where a
            shape or a NaN differs.
        max_abs_output: The largest magnitude in the first model's outputs, to judge the difference by.
        gpu: What was measured on the GPU; None for a model on the CPU.
    """

    path: Path
    wall_ms: Percentiles
    cpu_ms: float
    calls_per_second: float
    peak_bytes: int | None
    file_bytes: int
    speedup: Ratio
    cpu_speedup: Ratio
    max_abs_difference: float
    max_abs_output: float
    gpu: GpuTiming | None = None


@dataclass(frozen=True)
class BenchResult:
    """What `bench` found.

    Attributes:
        models: In the order given; ratios are to the first.
        rounds: How often each model was sampled.
        loads: How often each model was loaded anew.
        threads: Threads within an operator.
        timed_on: Dtype and shape of each input that was timed on.
        compared_on: How many feeds the outputs were compared on.
        gpu: The GPU, with the driver's CUDA release; None where none took part.
    """

    models: list[ModelTiming]
    rounds: int
    loads: int
    threads: int
    timed_on: dict[str, str]
    compared_on: int
    environment: dict[str, str] = field(default_factory=dict)
    gpu: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, for reports."""
        from dataclasses import asdict

        plain = asdict(self)
        for model in plain["models"]:
            model["path"] = str(model["path"])
        return plain


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
        paths: The models, ONNX files and engines; the first is what the others are compared with.
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
    entries = [*_entries(paths, device, torch)]
    files = [entry.path for entry in entries]
    say(0, "loading")
    if any(entry.kind in ("onnx", "onnx-cuda") for entry in entries):
        import_onnxruntime()  # once, and not part of what loading takes
    began = time.perf_counter()
    runners = [_load_entry(entry, threads) for entry in entries]
    loading = time.perf_counter() - began
    for file, runner in zip(files[1:], runners[1:], strict=True):
        _check_same_inputs(files[0], runners[0], file, runner)
    _name_outputs(runners)
    feeds = _feeds_for(files, runners, shapes, calibration, seed)
    say(0, "comparing outputs")
    differences = _compare(files, runners, feeds)
    blocks = int(np.clip(_MOST_LOADING * seconds / loading, 1, _BLOCKS))
    samples = [_Samples() for _ in files]
    rng = np.random.default_rng(seed)
    for block in range(blocks):
        if block:
            runners = []  # before the next ones are loaded
            runners = _load_in_order(entries, threads, rng.permutation(len(files)))
            _name_outputs(runners)
        calls = [_bound(runner, _known(runner, feeds[0])) for runner in runners]
        _time_block(calls, samples, block, rng, seconds / blocks, -(-_FEWEST_ROUNDS // blocks), say, seconds)
        told = [_library(runner) for runner in runners]
        gpu = next((_describe_gpu(runner) for runner in runners if hasattr(runner, "program")), None)
        sizes = [_size(entry, runner) for entry, runner in zip(entries, runners, strict=True)]
        del calls
    runners = []  # their memory is not needed while the children load theirs
    say(0, "measuring memory")
    peaks = [peak_bytes(entry.path, feeds[0], threads) if entry.kind == "onnx" else None for entry in entries]
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
        timed_on={name: _describe(value) for name, value in feeds[0].items()},
        compared_on=len(feeds),
        environment={**_environment(entries), **_libraries(told)},
        gpu=gpu,
    )


@dataclass
class _Samples:
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

    def on_gpu(self, library: str, first: _Samples, seed: int) -> GpuTiming | None:
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


def _time_block(
    calls: Sequence[Callable[[], object]],
    samples: Sequence[_Samples],
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


def _load(path: Path, threads: int) -> Runner:
    if threads > 1 and path.suffix == ".onnx" and path.exists():
        # A thread pool that spins after a run would take the processor from the model that comes next.
        return OnnxRuntimeRunner(path, threads, config={"session.force_spinning_stop": "1"})
    return load(path, threads=threads)


@dataclass(frozen=True)
class _Entry:
    """What takes part: its path (or how torch's factory is called), and what runs it."""

    path: Path
    kind: Literal["onnx", "onnx-cuda", "engine", "torch"]


def _entries(
    paths: Sequence[str | Path], device: Literal["cpu", "cuda"] | None, torch: Sequence[str]
) -> Iterator[_Entry]:
    files = [Path(path) for path in paths]
    engines = [file for file in files if BACKEND_FOR_SUFFIX.get(file.suffix) == "tensorrt"]
    on_cuda = device == "cuda" or (device is None and bool(engines or torch))
    for file in files:
        if file in engines:
            yield _Entry(file, "engine")
        else:
            yield _Entry(file, "onnx-cuda" if on_cuda else "onnx")
    for spec in torch:
        yield _Entry(Path(spec), "torch")


def _load_entry(entry: _Entry, threads: int) -> Runner:
    if entry.kind in ("onnx", "engine"):
        return _load(entry.path, threads)
    from graphopt.benchmarking.on_gpu import OnnxCudaRunner, TorchRunner

    return OnnxCudaRunner(entry.path) if entry.kind == "onnx-cuda" else TorchRunner(str(entry.path))


def _load_in_order(entries: Sequence[_Entry], threads: int, order: np.ndarray[Any, Any]) -> list[Runner]:
    """Load in the order given; the list is in the entries' order."""
    loaded = {int(index): _load_entry(entries[index], threads) for index in order}
    return [loaded[index] for index in range(len(entries))]


def _bound(runner: Runner, feeds: Feeds) -> Callable[[], object]:
    """The model's run on one feed, without checking the feed every time where the runner can do without."""
    if hasattr(runner, "program"):
        return DeviceCall(runner.program(feeds), feeds)
    return runner.bind(feeds) if isinstance(runner, OnnxRuntimeRunner) else lambda: runner.run(feeds)


def _known(runner: Runner, feeds: Feeds) -> Feeds:
    """The feeds of the inputs that a model has: engines lack those that nothing reads."""
    names = {item.name for item in runner.inputs}
    return {name: value for name, value in feeds.items() if name in names}


def _name_outputs(runners: Sequence[Runner]) -> None:
    """A torch module's outputs have no names: they are those of the first model, in order."""
    names = [item.name for item in runners[0].outputs]
    for runner in runners:
        if hasattr(runner, "names"):
            runner.names = names or None


def _library(runner: Runner) -> str:
    return str(getattr(runner, "library", ""))


def _describe_gpu(runner: Any) -> str:
    driver = runner.context.driver
    return f"{runner.context.device.name}, driver for CUDA {driver.cuda[0]}.{driver.cuda[1]}"


def _libraries(told: Sequence[str]) -> dict[str, str]:
    """The names and versions of what ran models on the GPU."""
    return {library.partition(" ")[0]: library.partition(" ")[2] for library in told if library}


def _size(entry: _Entry, runner: Runner) -> int:
    return int(getattr(runner, "parameter_bytes", 0)) if entry.kind == "torch" else file_bytes(entry.path)


def _check_same_inputs(first_path: Path, first: Runner, path: Path, other: Runner) -> None:
    ours = {item.name: item for item in first.inputs}
    theirs = {item.name: item for item in other.inputs}
    # TensorRT drops inputs that nothing reads.
    missing = [name for name in ours if name not in theirs and not _is_engine(path)]
    missing += [name for name in theirs if name not in ours and not _is_engine(first_path)]
    if missing:
        lacking = path if missing[0] in ours else first_path
        raise BadInput(
            f"the models take different inputs: {lacking.name} has no '{missing[0]}'",
            where=str(path),
            hint=f"{first_path.name} takes {', '.join(ours)}; {path.name} takes {', '.join(theirs)}",
        )
    for name, item in ours.items():
        if name in theirs and item.dtype != theirs[name].dtype:
            raise BadInput(
                f"the models take input '{name}' as {item.dtype} and as {theirs[name].dtype}", where=str(path)
            )


def _is_engine(path: Path) -> bool:
    return BACKEND_FOR_SUFFIX.get(path.suffix) == "tensorrt"


def _feeds_for(
    files: Sequence[Path],
    runners: Sequence[Runner],
    shapes: Mapping[str, Sequence[int]] | None,
    calibration: Path | None,
    seed: int,
) -> list[Feeds]:
    """Inputs for all of them: made up from the first ONNX file, of sizes that the engines take."""
    engines = [runner for file, runner in zip(files, runners, strict=True) if _is_engine(file)]
    if not engines:
        return _feeds(files[0], runners[0], shapes, calibration, seed)
    if calibration is None:
        best: dict[str, Sequence[int]] = engines[0].shapes_to_try()  # type: ignore[attr-defined]
        shapes = {**best, **(shapes or {})}
    source = next((index for index, file in enumerate(files) if file.suffix == ".onnx"), None)
    if source is not None:
        return _feeds(files[source], runners[source], shapes, calibration, seed)
    if calibration is not None:
        raise BadInput("reading inputs of yours takes an .onnx file", hint="time the engine beside its model")
    return [_plain_feeds(runners[0], shapes or {}, seed)]


def _plain_feeds(runner: Runner, shapes: Mapping[str, Sequence[int]], seed: int) -> Feeds:
    """Where no model says what an input means: normal numbers, and zeros and ones."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for item in runner.inputs:
        known = shapes.get(item.name, item.shape or ())
        shape = tuple(size if isinstance(size, int) else 1 for size in known)
        assert item.dtype is not None
        drawn = rng.integers(0, 2, shape) if item.dtype.kind in "biu" else rng.standard_normal(shape)
        feeds[item.name] = np.asarray(drawn).astype(item.dtype)
    return feeds


def _feeds(
    path: Path, runner: Runner, shapes: Mapping[str, Sequence[int]] | None, calibration: Path | None, seed: int
) -> list[Feeds]:
    from graphopt.feeds import feeds_that_run
    from graphopt.files.load import load_model

    if path.suffix != ".onnx":
        raise BadInput("the first model must be an .onnx file: inputs are made up from it", where=str(path))
    model = load_model(path)
    if calibration is not None:
        from graphopt.calibration import read_calibration

        if shapes:
            raise BadInput("--shapes and --calibration exclude each other")
        return list(read_calibration(calibration, model.graph.inputs)[:3])
    return feeds_that_run(model, runner.run, seed=seed, shapes=shapes)


def _compare(paths: Sequence[Path], runners: Sequence[Runner], feeds: Sequence[Feeds]) -> list[tuple[float, float]]:
    """For each model, how far its outputs are from the first one's at most, and how large those are."""
    found = [(0.0, 0.0) for _ in runners]
    for feed in feeds:
        reference = runners[0].run(_known(runners[0], feed))
        largest = max((_magnitude(value) for value in reference.values()), default=0.0)
        for index, (path, runner) in enumerate(zip(paths, runners, strict=True)):
            outputs = runner.run(_known(runner, feed)) if index else reference
            if set(outputs) != set(reference):
                listed = f"{', '.join(reference)} and {', '.join(outputs)}"
                raise BadInput(f"the models give different outputs: {listed}", where=str(path))
            apart = max((_difference(reference[name], outputs[name]) for name in reference), default=0.0)
            found[index] = (max(found[index][0], apart), max(found[index][1], largest))
    return found


def _magnitude(value: Any) -> float:
    if isinstance(value, list):
        return max((_magnitude(item) for item in value), default=0.0)
    array = _numbers(value)
    if array is None or array.size == 0:
        return 0.0
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0


def _difference(one: Any, other: Any) -> float:
    """The largest absolute difference; infinite where shapes, NaNs, infinities or strings differ."""
    if isinstance(one, list) or isinstance(other, list):
        if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other)):
            return float("inf")
        return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    ours, theirs = _numbers(one), _numbers(other)
    if ours is None or theirs is None:
        return 0.0 if np.array_equal(np.asarray(one), np.asarray(other)) else float("inf")
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if bool(np.all(same)):
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(ours[~same] - theirs[~same])
    return float(apart.max()) if bool(np.all(np.isfinite(apart))) else float("inf")


def _numbers(value: Any) -> np.ndarray[Any, Any] | None:
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return None
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def file_bytes(path: Path) -> int:
    """The size of a model's file, with the files that hold its external data."""
    total = path.stat().st_size
    if path.suffix != ".onnx":
        return total
    import onnx_ir as ir

    from graphopt.files.load import load_model
    from graphopt.graphs import all_graphs

    data = {
        Path(value.const_value.path).resolve()
        for graph in all_graphs(load_model(path))
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return total + sum(file.stat().st_size for file in data)


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} x {_describe(value[0])}" if value else "an empty sequence"
    array = np.asarray(value)
    name = "string" if array.dtype.kind in "OUS" else array.dtype.name
    return f"{name}[{', '.join(map(str, array.shape))}]"


def _environment(entries: Sequence[_Entry]) -> dict[str, str]:
    import platform

    here = {"python": platform.python_version(), "machine": platform.machine()}
    if not any(entry.kind in ("onnx", "onnx-cuda") for entry in entries):
        return here
    name, version = onnxruntime_flavour()
    return {name: version, **here}
