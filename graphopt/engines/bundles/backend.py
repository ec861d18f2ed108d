"""Blocks of a bundle on a GPU: values stay there between blocks, and the host fetches what it has to ask.

All blocks run in one stream and take their memory from one pool, so nothing has to be waited for between them, and
what one turn of a loop is over with is where the next turn writes: two places for a state, however many turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.bundles.arrays import number_as, stack_of_none
from graphopt.bundles.backend import Part, Rows, RunBlock, Truths
from graphopt.bundles.flow import asked_by_host
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Plan, Port, Run, walk
from graphopt.engines.bundles import axes
from graphopt.engines.bundles.blocks import EngineBlock, handing_on, on_host
from graphopt.engines.bundles.values import Copier, Fetcher, Value
from graphopt.engines.loading import OpenEngine
from graphopt.engines.pool import InUse, Pool
from graphopt.gpu.context import Context

Call = Callable[[Mapping[str, Value]], dict[str, Value]]


class DeviceBackend:
    """Runs blocks that are engines on the GPU, and the others on the host, which copies their values to it and back.

    A block is opened when it is run for the first time.

    Args:
        context: Of the GPU.
        version: The folder that the blocks lie in.
        plan: The bundle's.
        session: How the session of a block that is an ONNX file is made.
        cuda_graphs: Whether runs of engines are recorded and replayed.
        trt: The library's module; imported if None.
    """

    def __init__(
        self,
        context: Context,
        version: Path,
        plan: Plan,
        session: Callable[[str], Any],
        *,
        cuda_graphs: bool = True,
        trt: Any = None,
    ) -> None:
        self._context = context
        self._version = version
        self._plan = plan
        self._trt = trt
        self._cuda_graphs = cuda_graphs
        self._plain = PlainBackend(session)
        self._engines: dict[str, EngineBlock] = {}
        self._asked = asked_of(plan)
        self._truths = {truth: Value(np.array(truth), kept=True) for truth in (False, True)}
        self.stream = context.stream()
        self.pool = Pool(context, self.stream)
        self.in_use = InUse(self.stream)
        self.copier = Copier(context, self.stream, self.pool)
        self.fetcher = Fetcher(context, self.stream)
        self.runs: dict[str, int] = {}

    @property
    def graphs_refused(self) -> dict[str, str]:
        """Block -> why its runs are not recorded."""
        return {name: block.graphs_refused for name, block in self._engines.items() if block.graphs_refused}

    def open(self, name: str) -> EngineBlock:
        """The engine of a block. Raises what opening one raises."""
        if name not in self._engines:
            block = self._plan.blocks[name]
            path = self._version / block.file
            opened = OpenEngine(path, self._context.device, backend=block.backend, trt=self._trt)
            self._engines[name] = EngineBlock(
                opened, self.stream, self.pool, self.copier, cuda_graphs=self._cuda_graphs
            )
        return self._engines[name]

    def close(self) -> None:
        """Let go of all that is held on the GPU."""
        for engine in self._engines.values():
            engine.clear()
        self.in_use.clear()
        self.fetcher.clear()
        self.pool.clear()

    # -- what the host asks for ----------------------------------------------------------------------------------------

    def block(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> RunBlock:
        self.runs[name] = 0
        asked = [output for output in outputs if output in self._asked.get(name, ())]
        call: Call | None = None

        def run(values: Sequence[Any]) -> Sequence[Any]:
            nonlocal call
            if call is None:
                call = self._call(name, inputs, outputs)
            self.runs[name] += 1
            made = call(dict(zip(inputs, values, strict=True)))
            if asked:
                self.fetcher.start([made[output] for output in asked])
            return [made[output] for output in outputs]

        return run

    def _call(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Call:
        block = self._plan.blocks[name]
        if block.backend is not None:
            return self.open(name)
        handed_on = handing_on(self._version / block.file)
        if handed_on is not None:
            return handed_on
        return on_host(self._plain.block(name, inputs, outputs), inputs, outputs, self.copier)

    def truth(self, value: Value) -> bool:
        return bool(self.copier.asked(value).flat[0])

    def number(self, value: Value) -> int:
        return int(self.copier.asked(value).flat[0])

    def scalar(self, value: int | bool, port: Port) -> Value:
        if port.type == "tensor(bool)" and not port.shape:
            return self._truths[bool(value)]
        # The numbers of turns, one after the other in the same place: graphs are recorded for addresses.
        return Value(number_as(value, port), kept=True, stays=False)

    def length(self, value: Value, axis: int) -> int:
        return value.shape[axis]

    def part(self, value: Value, axis: int, index: int) -> Value:
        return axes.part(self.copier, value, axis, index)

    def stack(self, parts: Sequence[Value], axis: int, like: Port) -> Value:
        return axes.stack(self.copier, parts, axis) if parts else Value(stack_of_none(axis, like))

    # -- samples that go their own ways --------------------------------------------------------------------------------

    def rows(self, count: int) -> int:
        return count

    def truths(self, value: Value) -> Truths:
        return self.copier.asked(value).reshape(-1).astype(np.bool_)

    def integers(self, value: Value) -> Rows:
        return self.copier.asked(value).reshape(-1).astype(np.int64)

    def take(self, value: Value, axis: int, rows: Rows) -> Value:
        return axes.take(self.copier, value, axis, rows)

    def merge(self, parts: Sequence[Part], axis: int, count: int) -> Value:
        return axes.merge(self.copier, parts, axis, count)

    def repeat(self, value: Value, count: int) -> Value:
        return axes.stack(self.copier, [value] * count, 0)


def asked_of(plan: Plan) -> dict[str, frozenset[str]]:
    """For each block the outputs that the host asks the GPU for: conditions and counts, wherever they go through."""
    asked = asked_by_host(plan)
    found: dict[str, set[str]] = defaultdict(set)
    for step in walk(plan.steps):
        if isinstance(step, Run):
            found[step.run].update(output for output, name in step.makes.items() if name in asked)
    return {name: frozenset(outputs) for name, outputs in found.items()}
