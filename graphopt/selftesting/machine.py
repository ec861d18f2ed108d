"""Do the versions on this machine fit together: the driver, the kernels' PTX, TensorRT and what it was built for."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from graphopt.engines.backends import BACKENDS, find_backend
from graphopt.engines.loading import import_library
from graphopt.engines.plugins.qdp import refuse_version
from graphopt.errors import GraphoptError, MissingDependency
from graphopt.gpu.driver import Device, Driver
from graphopt.gpu.errors import needed_driver
from graphopt.kernels.compile import PINNED_ISA, find_nvrtc
from graphopt.kernels.launch import architecture_of
from graphopt.selftesting.report import Finding

# The driver branch that came with the first release of a CUDA generation; later ones of it run on that too.
_FIRST_DRIVERS = {11: "450", 12: "525", 13: "580"}
_BUILT_FOR = re.compile(r"(tensorrt(?:[-_]rtx)?)(?:[-_](?:lean|dispatch))?[-_]cu(\d+)", re.IGNORECASE)


def look_at(driver: Driver, device: Device) -> Iterator[Finding]:
    """Findings, one after the other."""
    cuda = ".".join(map(str, driver.cuda))
    isa, pinned = (".".join(map(str, version)) for version in (driver.isa, PINNED_ISA))
    if driver.isa >= PINNED_ISA:
        yield Finding("PTX", "ok", f"the driver (CUDA {cuda}) takes ISA {isa}; the kernels are of {pinned}")
    else:
        what = f"the driver (CUDA {cuda}) takes ISA {isa}, and the kernels are of {pinned}"
        yield Finding("PTX", "failed", f"{what}: install {needed_driver(PINNED_ISA)}")
    try:
        yield Finding("kernels", "ok", f"compiled for {architecture_of(device)}")
    except GraphoptError as error:
        yield Finding("kernels", "failed", str(error))
    if find_nvrtc("nvidia-cuda-nvrtc-cu12") is None:
        yield Finding("NVRTC", "failed", "nvidia-cuda-nvrtc-cu12 is not installed: pip install '.[plugins]'")
    else:
        version = importlib.metadata.version("nvidia-cuda-nvrtc-cu12")
        yield Finding("NVRTC", "ok", f"{version}, which needs no driver")
    for name in BACKENDS:
        yield look_at_library(name, driver)


def look_at_library(name: str, driver: Driver) -> Finding:
    """Whether a library is there, takes part in plugins, and was built for what the driver runs."""
    title = BACKENDS[name].title
    try:
        version = str(import_library(find_backend(name)).__version__)
    except MissingDependency as error:  # not there, or only a part of it
        return Finding(title, "skipped", str(error))
    generation = cuda_generation(name)
    cuda = ".".join(map(str, driver.cuda))
    if generation is not None and driver.cuda[0] < generation:
        first = _FIRST_DRIVERS.get(generation)
        hint = f"install a driver for CUDA {generation}" + (f" ({first} or newer)" if first else "")
        what = f"{version} is built for CUDA {generation}, and the driver is for CUDA {cuda}: {hint}"
        return Finding(title, "failed", what)
    if name == "tensorrt":
        try:
            refuse_version(version)
        except GraphoptError as error:
            return Finding(title, "warning", f"{version}: {error}")
    built = f", built for CUDA {generation}" if generation is not None else ""
    return Finding(title, "ok", f"{version}{built}")


def cuda_generation(backend: str) -> int | None:
    """The CUDA generation that a library's wheel is built for; None where its name does not tell."""
    wanted = backend.replace("-", "_")
    found = [
        int(match[2])
        for distribution in importlib.metadata.distributions()
        if (match := _BUILT_FOR.match(distribution.name or "")) and match[1].lower().replace("-", "_") == wanted
    ]
    return max(found, default=None)
