"""Networks run on many samples, and the same networks run on one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.bundles.course import Course
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Plan
from graphopt.bundles.samples import for_samples
from graphopt.bundles.split import Split, split
from graphopt.runtime.session import create_session, run


class Samples:
    """A network for one sample, and what is made of it for many.

    Args:
        model: For one sample.
        backend: What runs the blocks, given how their sessions are made.
    """

    def __init__(self, model: onnx.ModelProto, backend: Any = PlainBackend, course: Course | None = None) -> None:
        self.one = create_session(model.SerializeToString(), optimized=False)
        self.parts: Split = split(for_samples(ir.from_proto(model)))
        self.plan: Plan = Plan.model_validate_json(self.parts.plan.to_json())
        self.backend = backend(self._session)
        self.program = Program(self.plan, self.backend, course)
        self._sessions: dict[str, Any] = {}

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            content = ir.to_proto(self.parts.blocks[name]).SerializeToString()
            self._sessions[name] = create_session(content, optimized=False)
        return self._sessions[name]

    def many(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on all samples."""
        backend = self.backend
        if not isinstance(backend, OrtBackend):
            return self.program.run(feeds)
        made = self.program.run({name: backend.value(array) for name, array in feeds.items()})
        return {name: backend.array(value) for name, value in made.items()}

    def sample(self, feeds: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The inputs of one sample."""
        axes = self.plan.samples
        return {
            name: np.take(array, [index], axes[name]) if name in axes else np.asarray(array)
            for name, array in feeds.items()
        }

    def check(self, feeds: Mapping[str, Any], *, exact: bool = False) -> None:
        """Every result for a sample is that of the network run on it alone."""
        got = self.many(feeds)
        count = next(array.shape[self.plan.samples[name]] for name, array in feeds.items() if name in self.plan.samples)
        for name, array in got.items():
            assert array.shape[self.plan.samples[self.plan.gives[name]]] == count
        for index in range(count):
            want = run(self.one, self.sample(feeds, index))
            assert list(want) == list(got)
            for name, array in want.items():
                mine = np.take(got[name], index, self.plan.samples[self.plan.gives[name]])
                assert mine.dtype == array.dtype
                assert mine.size == array.size
                close(mine.reshape(array.shape), array, exact=exact)


def close(mine: Any, theirs: Any, *, exact: bool = False) -> None:
    """Equal; numbers up to what another order of sums rounds differently."""
    if exact or theirs.dtype.kind != "f":
        np.testing.assert_array_equal(mine, theirs)
    else:
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


def uniform(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Numbers between -2 and 2."""
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)
