"""What a self-test found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from graphopt.benchmarking import Ratio

Status = Literal["ok", "wrong", "failed", "skipped", "warning"]
"""wrong: it ran, and its numbers are not right. failed: it did not run. skipped: there was nothing to run it with."""


@dataclass(frozen=True)
class Finding:
    """One thing about the machine."""

    what: str
    status: Status
    detail: str


@dataclass(frozen=True)
class KernelResult:
    """The launches of one kernel.

    Attributes:
        plugin: Whose it is; ``kit`` for the kit's own.
        kernel: Its entry point.
        dtype: Of its first input, with that of its first output where the two differ.
        tactic: Its number.
        launches: How many samples it ran.
        worst: How far its outputs were off at most, as a part of what is allowed; None where it did not run.
        registers: Of a thread.
        local_bytes: Of a thread that did not fit into the registers.
        status: How it went.
        detail: What went wrong, and on which sample; empty where nothing did.
    """

    plugin: str
    kernel: str
    dtype: str
    tactic: int
    launches: int
    worst: float | None
    registers: int | None
    local_bytes: int | None
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class EngineResult:
    """A small engine with the plugin, and the same without it.

    Attributes:
        plugin: Whose model it is.
        library: What built and ran the engine, with its version.
        case: The form and the dtype.
        layers: How many layers of the engine run on the plugin; None where the library did not tell.
        worst: How far its output was off at most, as a part of what is allowed; None where it did not run.
        compute_ms: The median compute time of a call; None where it was not timed.
        speedup: The compute time of the engine without the plugin over this one's; None where there is only one.
        status: How it went.
        detail: What went wrong.
    """

    plugin: str
    library: str
    case: str
    layers: int | None
    worst: float | None
    compute_ms: float | None
    speedup: Ratio | None
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class SelftestReport:
    """All of it.

    Attributes:
        gpu: The GPU's name.
        capability: Its compute capability.
        memory_gb: Its memory.
        cuda: The CUDA release of its driver.
        findings: About the machine.
        kernels: One a kernel, dtype and tactic.
        engines: One a small engine.
    """

    gpu: str
    capability: tuple[int, int]
    memory_gb: float
    cuda: tuple[int, int]
    findings: list[Finding] = field(default_factory=list)
    kernels: list[KernelResult] = field(default_factory=list)
    engines: list[EngineResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and nothing failed; what was skipped is not counted, and not called passed."""
        return not any(state in ("wrong", "failed") for state in self.states)

    @property
    def states(self) -> list[Status]:
        """How each check went."""
        return [
            *(one.status for one in self.findings),
            *(one.status for one in self.kernels),
            *(one.status for one in self.engines),
        ]

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}
