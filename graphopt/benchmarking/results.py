"""What `bench` finds: of a model, of a model on a GPU, of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.benchmarking.stats import Percentiles, Ratio


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
        one_by_one: Whether its outputs were compared sample by sample: in it or in the first model, samples go their
            own ways, and the other one ran on each sample alone.
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
    one_by_one: bool = False


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
