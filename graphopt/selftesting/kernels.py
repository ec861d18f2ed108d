"""Launches every kernel through the driver, as TensorRT would, and compares with the definition."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from graphopt.engines.plugins import Plugin, find_plugins, module_of
from graphopt.errors import GraphoptError
from graphopt.gpu.context import Context
from graphopt.kernels.compile import compile_ptx
from graphopt.kernels.contract import check
from graphopt.kernels.kernel import Kernel
from graphopt.kernels.launch import LoadedKernel, architecture_of
from graphopt.kernels.sample import Sample
from graphopt.selftesting import products
from graphopt.selftesting.report import KernelResult

Say = Callable[[str], None]


def samples_of(plugin: str) -> ModuleType | None:
    """The module ``samples`` beside the one that declares a plugin; None where there is none."""
    name = f"{module_of(plugin).rpartition('.')[0]}.samples"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def run_all(context: Context, *, small: bool, say: Say) -> Iterator[KernelResult]:
    """Every dtype and tactic of the kit's products and of each plugin.

    Args:
        context: The GPU.
        small: Few and little samples.
        say: Told what comes next.
    """
    for group in products.groups(small=small):
        yield from _group(context, "kit", group.dtype, group.kernels, group.samples, say)
    for name, plugin in find_plugins().items():
        yield from _plugin(context, name, plugin, small=small, say=say)


def _plugin(context: Context, name: str, plugin: Plugin, *, small: bool, say: Say) -> Iterator[KernelResult]:
    module: Any = samples_of(name)
    if module is None:
        detail = f"no samples: {module_of(name).rpartition('.')[0]}.samples is not there"
        yield KernelResult(name, "", "", 0, 0, None, None, None, "skipped", detail)
        return
    for types in plugin.types:
        by_attributes: dict[tuple[Any, ...], list[Sample]] = {}
        for sample in module.samples(types, small=small):
            key = tuple((name, *array.tolist()) for name, array in sorted(sample.attributes.items()))
            by_attributes.setdefault(key, []).append(sample)
        for samples in by_attributes.values():
            kernels = plugin.kernels(types, samples[0].attributes)
            yield from _group(context, name, types[0], kernels, samples, say)


def _group(
    context: Context, plugin: str, dtype: str, kernels: Mapping[int, Kernel], samples: Sequence[Sample], say: Say
) -> Iterator[KernelResult]:
    for tactic, kernel in kernels.items():
        say(f"{kernel.name} {dtype}, tactic {tactic}")
        yield run_kernel(context, plugin, dtype, tactic, kernel, samples)


def run_kernel(
    context: Context, plugin: str, dtype: str, tactic: int, kernel: Kernel, samples: Sequence[Sample]
) -> KernelResult:
    """Compile, hold to the contract, load, and launch on each sample."""
    names = (plugin, kernel.name, dtype, tactic)
    try:
        ptx = compile_ptx(kernel, architecture_of(context.device))
        check(kernel, ptx)
        loaded = LoadedKernel(context, kernel)
    except GraphoptError as error:
        return KernelResult(*names, 0, None, None, None, "failed", str(error))
    resources = loaded.function.registers, loaded.function.local_bytes
    worst, launches, wrong = 0.0, 0, ""
    for sample in samples:
        try:
            off = sample.worst(loaded.run(sample.inputs, sample.outputs))
        except GraphoptError as error:
            return KernelResult(*names, launches, None, *resources, "failed", f"{sample.label}: {error}")
        launches += 1
        if off > 1 and not wrong:
            wrong = f"{sample.label}: off by {off:.3g} times what is allowed"
        worst = max(worst, off)
    return KernelResult(*names, launches, worst, *resources, "wrong" if wrong else "ok", wrong)
