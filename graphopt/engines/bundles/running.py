"""Bundles with engines, run like models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from graphopt.bundles.course import Course
from graphopt.bundles.folder import open_bundle
from graphopt.bundles.host import Program
from graphopt.bundles.ports import spec_of
from graphopt.engines.backends import BACKENDS
from graphopt.engines.bundles.backend import DeviceBackend
from graphopt.engines.bundles.values import Copier, Value
from graphopt.errors import BadInput
from graphopt.gpu import arrays
from graphopt.gpu.driver import find_driver
from graphopt.gpu.errors import NoGpu
from graphopt.runtime.session import check_feeds, create_session


class EngineBundleRunner:
    """A bundle whose blocks are engines, on a GPU. For one thread at a time.

    Attributes:
        inputs, outputs: Of the network.
        runs: How often each block has run so far.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        *,
        device: int = 0,
        cuda_graphs: bool = True,
        course: Course | None = None,
        trt: Any = None,
    ) -> None:
        """Open a bundle on a GPU.

        Args:
            path: The bundle's folder.
            threads: Of blocks that run on ONNX Runtime.
            device: Which GPU.
            cuda_graphs: Record what a block does twice on the same addresses, and replay it from then on.
            course: Sees and may change which way a run goes.
            trt: The library's module; imported if None.

        Raises:
            BadInput: It is no bundle. NoGpu (a BadInput): there is no GPU.
            MissingDependency: The library is not installed.
            GraphoptError: The library refuses the first engine.
        """
        self._opened = open_bundle(path)
        version, plan = self._opened.version, self._opened.plan
        built = {name: block.backend for name, block in plan.blocks.items() if block.backend is not None}
        if not built:
            raise BadInput("holds no engine", where=str(path), hint="build it with graphopt build")
        try:
            self.context = find_driver().open(device)
        except NoGpu as error:
            title = BACKENDS[next(iter(built.values()))].title
            what = f"its blocks are engines of {title}; {error.what}"
            hint = "without a GPU, run the bundle of ONNX files that it was built from"
            raise NoGpu(what, where=str(path), hint=hint) from None

        def session(name: str) -> Any:
            return create_session(version / plan.blocks[name].file, optimized=True, threads=threads)

        try:
            self._backend = DeviceBackend(self.context, version, plan, session, cuda_graphs=cuda_graphs, trt=trt)
            self._backend.open(next(iter(built)))  # what is wrong with one of them is wrong with all, and is told now
            self._program = Program(plan, self._backend, course)
        except BaseException:
            self.context.close()
            raise
        self.runs: Mapping[str, int] = self._backend.runs
        self._specs = [(port.name, port.type, port.shape) for port in plan.inputs]
        self.inputs = tuple(map(spec_of, plan.inputs))
        self.outputs = tuple(map(spec_of, plan.outputs))

    @property
    def waits(self) -> int:
        """How often a decision has waited for the GPU so far."""
        return self._backend.fetcher.waits

    @property
    def graphs_refused(self) -> Mapping[str, str]:
        """Block -> why its runs are not recorded as CUDA graphs."""
        return self._backend.graphs_refused

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once.

        Args:
            feeds: An array for each input: numpy, or a GPU array of any library that knows DLPack, which is not copied.

        Returns:
            An array for each output: numpy arrays; where an input lies on the GPU, `DeviceArray`s, which are not
            waited for. What is no tensor is a list of arrays, or None.

        Raises:
            BadInput: Wrong feeds.
            GraphoptError: A block failed.
        """
        return self.bind(feeds)()

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        """Check feeds once; the function returned runs the network on them, and nothing but that."""
        backend = self._backend
        self.context.make_current()
        known = {name for name, _, _ in self._specs}
        on_gpu = {
            name: arrays.take(self.context, value, backend.stream, f"input '{name}'")
            for name, value in feeds.items()
            if name in known and arrays.is_on_gpu(value)
        }
        # What lies on the GPU is checked by an array that looks like it and holds nothing.
        looks = {name: np.broadcast_to(np.empty((), one.dtype), one.shape) for name, one in on_gpu.items()}
        check_feeds(self._specs, {**feeds, **looks})
        values = {
            name: Value(device=on_gpu[name], kept=True) if name in on_gpu else Value(_as_host(value), kept=True)
            for name, value in feeds.items()
        }

        def run() -> dict[str, Any]:
            self.context.make_current()
            backend.in_use.let_go()
            found = self._program.run(values)
            found = _own(found, backend.copier)
            if not on_gpu:
                return dict(zip(found, backend.copier.to_host(list(found.values())), strict=True))
            backend.in_use.hold(list(on_gpu.values()))
            return {name: backend.copier.to_device(one) if one.is_tensor else one.host for name, one in found.items()}

        return run

    def close(self) -> None:
        """Free what is held on the GPU; results that were given out go with it."""
        self._backend.close()
        self.context.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_engine_bundle(path: Path, threads: int | None = None) -> EngineBundleRunner:
    """A bundle with engines, ready to run. Raises as `EngineBundleRunner`."""
    return EngineBundleRunner(path, threads)


def _own(found: Mapping[str, Value], copier: Copier) -> dict[str, Value]:
    """Results that change with nothing else: not the caller's own, not what later runs have, each another value."""
    given: set[Value] = set()
    made = {}
    for name, one in found.items():
        made[name] = copier.copy(one) if one.kept or one in given else one
        given.add(one)
    return made


def _as_host(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else np.asarray(value)
