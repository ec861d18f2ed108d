"""PTX for every kernel and every architecture, by the compiler from PyPI alone: no GPU, no CUDA toolkit.

    python -m benchmarks.ptx

Each kernel is compiled afresh and held to the contract of plugin kernels (order and sizes of the parameters, at most
48 KiB of shared memory, nothing undefined, the pinned instruction set). That says that it can be launched as
TensorRT does, not that it computes the right thing: the emulator and a GPU say that.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.common import print_table, write_result
from graphopt.errors import GraphoptError
from graphopt.kernels.catalogue import all_kernels, describe
from graphopt.kernels.compile import PACKAGES, compile_ptx
from graphopt.kernels.contract import Contract, check
from graphopt.kernels.kernel import ARCHITECTURES, Kernel


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture; ``broken`` says what was refused, and the rest is empty then."""

    kernel: str
    source: str
    architecture: str
    isa: str = ""
    static_shared: int = 0
    dynamic_shared: int = 0
    local_bytes: int = 0
    milliseconds: float = 0.0
    ptx_bytes: int = 0
    broken: str | None = None


def compile_one(kernel: Kernel, architecture: str) -> Compiled:
    """Compile a kernel afresh, and hold it to the contract."""
    name, source = describe(kernel), kernel.source.name
    try:
        ptx = compile_ptx(kernel, architecture, fresh=True)
        contract: Contract = check(kernel, ptx)
    except GraphoptError as error:
        return Compiled(name, source, architecture, broken=str(error))
    return Compiled(
        name,
        source,
        architecture,
        isa=".".join(map(str, contract.isa)),
        static_shared=contract.static_shared,
        dynamic_shared=contract.dynamic_shared,
        local_bytes=contract.local_bytes,
        milliseconds=round(ptx.seconds * 1e3, 1),
        ptx_bytes=len(ptx.text),
    )


def show(results: Sequence[Compiled]) -> None:
    """One line a kernel; the milliseconds in the order of the architectures."""
    rows = []
    for name in dict.fromkeys(result.kernel for result in results):
        own = [result for result in results if result.kernel == name]
        shared = max(result.static_shared + result.dynamic_shared for result in own)
        isas = sorted({result.isa for result in own if result.isa})
        times = ["-" if result.broken else f"{result.milliseconds:.0f}" for result in own]
        size = max(result.ptx_bytes for result in own)
        rows.append([name, " ".join(isas), f"{shared / 1024:.1f}", *times, f"{size / 1e3:.0f}"])
    milliseconds = [result.milliseconds for result in results if not result.broken]
    title = f"{len(milliseconds)} of {len(results)} compile and keep the contract"
    if milliseconds:
        title += f"; {statistics.median(milliseconds):.0f} ms each, {max(milliseconds):.0f} ms at most"
    headings: list[str | tuple[str, str]] = ["kernel, dtype, tactic", "ISA", ("shared KiB", "right")]
    headings += [(architecture.replace("compute_", "ms "), "right") for architecture in ARCHITECTURES]
    print_table([*headings, ("PTX kB", "right")], rows, title)
    for result in results:
        if result.broken:
            print(f"{result.kernel}, {result.architecture}: {result.broken}")


def main() -> int:
    """Compile, print, record. Exit code 1 where something does not compile or breaks the contract."""
    results = [compile_one(kernel, architecture) for kernel in all_kernels() for architecture in ARCHITECTURES]
    show(results)
    package = PACKAGES["nvrtc"]
    write_result(
        "ptx",
        {
            "compiler": f"{package} {importlib.metadata.version(package)}",
            "kernels": [{key: value for key, value in asdict(result).items() if value} for result in results],
        },
    )
    return int(any(result.broken for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
