"""Bundles run like models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.bundles.folder import read_bundle
from graphopt.bundles.host import PlainBackend, Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plan import Port
from graphopt.runtime.loading import TensorSpec
from graphopt.runtime.session import check_feeds, create_session, numpy_dtype


class BundleRunner:
    """A bundle on ONNX Runtime's CPU. Blocks are loaded when they are run for the first time.

    Attributes:
        inputs, outputs: Of the network.
        runs: How often each block has run so far.
    """

    def __init__(self, path: str | Path, threads: int | None = None, *, optimized: bool = True) -> None:
        """Read the plan; raises BadInput where it is no bundle."""
        version, plan = read_bundle(path)

        def session(name: str) -> Any:
            return create_session(version / plan.blocks[name].file, optimized=optimized, threads=threads)

        self._specs = [(port.name, port.type, port.shape) for port in plan.inputs]
        self.inputs = tuple(map(_spec, plan.inputs))
        self.outputs = tuple(map(_spec, plan.outputs))
        # Values that are no tensors go in and out as Python's; those between blocks stay the runtime's own.
        tensors = all(port.type.startswith("tensor(") for port in (*plan.inputs, *plan.outputs))
        self._fast = OrtBackend(session) if tensors and not _has_optionals(plan.blocks.values()) else None
        backend = self._fast or PlainBackend(session)
        self.runs: Mapping[str, int] = backend.runs
        self._program = Program(plan, backend)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once: arrays by input name in, arrays by output name out.

        Raises:
            BadInput: Wrong feeds.
            GraphoptError: A block failed; with its name.
        """
        return self.bind(feeds)()

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        """Check feeds once; the function returned runs the network on them, and nothing but that."""
        check_feeds(self._specs, feeds)
        program, fast = self._program, self._fast
        if fast is None:
            return lambda: program.run(feeds)
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        values = {name: fast.value(array) for name, array in arrays.items()}

        def run() -> dict[str, Any]:
            outputs = {name: fast.array(value) for name, value in program.run(values).items()}
            # An output that is an input as it came must not change when the caller's array does.
            return {
                name: output.copy() if any(np.may_share_memory(output, array) for array in arrays.values()) else output
                for name, output in outputs.items()
            }

        return run


def load_bundle(path: Path, threads: int | None = None) -> BundleRunner:
    """A bundle, ready to run. Raises BadInput where it is none."""
    return BundleRunner(path, threads)


def _spec(port: Port) -> TensorSpec:
    return TensorSpec(port.name, numpy_dtype(port.type), None if port.shape is None else tuple(port.shape))


def _has_optionals(blocks: Any) -> bool:
    return any("optional" in port.type for block in blocks for port in (*block.inputs, *block.outputs))
