"""What takes part in a benchmark: files, bundles, engines, torch modules; loaded, and what ran them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graphopt.bundles.contents import bundle_bytes
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.running import BundleRunner
from graphopt.files.bundle_folder import is_bundle
from graphopt.runtime.flavour import onnxruntime_flavour
from graphopt.runtime.loading import BACKEND_FOR_SUFFIX, OnnxRuntimeRunner, Runner, load


@dataclass(frozen=True)
class Entry:
    """What takes part: its path (or how torch's factory is called), and what runs it."""

    path: Path
    kind: Literal["onnx", "onnx-cuda", "bundle", "engine", "torch"]


def entries_of(
    paths: Sequence[str | Path], device: Literal["cpu", "cuda"] | None, torch: Sequence[str]
) -> Iterator[Entry]:
    """What `bench` is given, in its order: files, then torch modules."""
    files = [Path(path) for path in paths]
    engines = [file for file in files if is_engine(file)]
    on_cuda = device == "cuda" or (device is None and bool(engines or torch))
    for file in files:
        if file in engines:
            yield Entry(file, "engine")
        elif is_bundle(file):
            yield Entry(file, "bundle")
        else:
            yield Entry(file, "onnx-cuda" if on_cuda else "onnx")
    for spec in torch:
        yield Entry(Path(spec), "torch")


def is_engine(path: Path) -> bool:
    """Whether a file is TensorRT's, as its name says."""
    return BACKEND_FOR_SUFFIX.get(path.suffix) == "tensorrt"


def holds_engines(bundle: Path) -> bool:
    """Whether blocks of a bundle are engines. Raises BadInput where it is no bundle."""
    return any(block.backend is not None for block in read_bundle(bundle)[1].blocks.values())


def load_entry(entry: Entry, threads: int) -> Runner:
    """Load what takes part with what runs it."""
    if entry.kind in ("onnx", "bundle", "engine"):
        return _load(entry.path, threads)
    from graphopt.benchmarking.on_gpu import OnnxCudaRunner, TorchRunner

    return OnnxCudaRunner(entry.path) if entry.kind == "onnx-cuda" else TorchRunner(str(entry.path))


def _load(path: Path, threads: int) -> Runner:
    if threads == 1 or not path.exists():
        return load(path, threads=threads)
    # A thread pool that spins after a run would take the processor from the model that comes next.
    config = {"session.force_spinning_stop": "1"}
    if path.suffix == ".onnx":
        return OnnxRuntimeRunner(path, threads, config=config)
    if is_bundle(path) and not holds_engines(path):
        return BundleRunner(path, threads, config=config)
    return load(path, threads=threads)


def load_in_order(entries: Sequence[Entry], threads: int, order: np.ndarray[Any, Any]) -> list[Runner]:
    """Load in the order given; the list is in the entries' order."""
    loaded = {int(index): load_entry(entries[index], threads) for index in order}
    return [loaded[index] for index in range(len(entries))]


def name_outputs(runners: Sequence[Runner]) -> None:
    """A torch module's outputs have no names: they are those of the first model, in order."""
    names = [item.name for item in runners[0].outputs]
    for runner in runners:
        if hasattr(runner, "names"):
            runner.names = names or None


def model_bytes(entry: Entry, runner: Runner) -> int:
    """The size of its file; of a torch module the size of its parameters."""
    return int(getattr(runner, "parameter_bytes", 0)) if entry.kind == "torch" else file_bytes(entry.path)


def file_bytes(path: Path) -> int:
    """The size of a model's file, with the files that hold its external data; of a bundle's version, all its files."""
    if is_bundle(path):
        return bundle_bytes(path)
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


def library_of(runner: Runner) -> str:
    """What ran a model on the GPU, with its version; empty for one on the CPU."""
    return str(getattr(runner, "library", ""))


def describe_gpu(runner: Any) -> str:
    """The GPU that a model ran on, with the driver's CUDA release."""
    driver = runner.context.driver
    return f"{runner.context.device.name}, driver for CUDA {driver.cuda[0]}.{driver.cuda[1]}"


def libraries(told: Sequence[str]) -> dict[str, str]:
    """The names and versions of what ran models on the GPU."""
    return {library.partition(" ")[0]: library.partition(" ")[2] for library in told if library}


def environment(entries: Sequence[Entry]) -> dict[str, str]:
    """The versions of Python and, where it took part, of ONNX Runtime, and the kind of machine."""
    import platform

    here = {"python": platform.python_version(), "machine": platform.machine()}
    if not any(entry.kind in ("onnx", "onnx-cuda", "bundle") for entry in entries):
        return here
    name, version = onnxruntime_flavour()
    return {name: version, **here}
