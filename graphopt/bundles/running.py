"""Bundles run like models."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.bundles.course import Course
from graphopt.bundles.flow import shared_outputs
from graphopt.bundles.folder import open_bundle, read_bundle
from graphopt.bundles.host import Program
from graphopt.bundles.ort import OrtBackend
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Plan
from graphopt.bundles.ports import spec_of, value_of
from graphopt.bundles.profile import likely_blocks, read_profile
from graphopt.bundles.sessions import Sessions
from graphopt.runtime.ending import current_limit, run_to_end
from graphopt.runtime.loading import Runner
from graphopt.runtime.session import check_feeds, create_session


class BundleRunner:
    """A bundle on ONNX Runtime's CPU.

    The blocks that an input is likely to need, by the counts in the bundle's profile, are loaded in the background;
    without a profile, those that every input needs. Others are loaded when they are run for the first time.
    Several threads may run it at once; a course sees the steps of all of them.

    Attributes:
        inputs, outputs: Of the network.
        runs: How often each block has run so far.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        *,
        optimized: bool = True,
        custom_ops: Path | None = None,
        config: Mapping[str, str] | None = None,
        course: Course | None = None,
    ) -> None:
        """Read the plan; raises BadInput where it is no bundle.

        Args:
            path: The bundle.
            threads: Threads within an operator; None leaves it to the runtime.
            optimized, custom_ops, config: As for `create_session`.
            course: Sees and may change which way runs go.
        """
        self._opened = open_bundle(path)
        version, plan = self._opened.version, self._opened.plan

        def session(name: str) -> Any:
            file = version / plan.blocks[name].file
            return create_session(file, optimized=optimized, threads=threads, custom_ops=custom_ops, config=config)

        self._sessions = Sessions(session)
        self._specs = [(port.name, port.type, port.shape) for port in plan.inputs]
        self.inputs = tuple(map(spec_of, plan.inputs))
        self.outputs = tuple(map(spec_of, plan.outputs))
        backend = backend_for(plan, self._sessions)
        self._fast = backend if isinstance(backend, OrtBackend) else None
        types = {port.name: port.type for port in plan.outputs}
        self._readers = [] if self._fast is None else [(name, self._fast.reader(types[name])) for name in plan.gives]
        self._shared = shared_outputs(plan)  # they must not change with what is not theirs
        self.runs: Mapping[str, int] = backend.runs
        self._program = Program(plan, backend, course)
        self._sessions.prefetch(likely_blocks(plan, read_profile(version)))

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once: arrays by input name in, arrays by output name out.

        Raises:
            BadInput: Wrong feeds.
            Endless: It took longer than the limit that runs are under here (`runtime.ending`).
            GraphoptError: A block failed; with its name.
        """
        call = self.bind(feeds)
        if current_limit() is None:
            return call()
        return run_to_end(lambda options: call(), None if self._fast is None else self._fast.options)

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        """Check feeds once; the function returned runs the network on them, and nothing but that."""
        check_feeds(self._specs, feeds)
        follow, readers, shared = self._program.run, self._readers, self._shared
        tensors = {name for name, kind, _ in self._specs if kind.startswith("tensor(")}
        arrays = {name: np.asarray(value) if name in tensors else value for name, value in feeds.items()}
        # Values lie in the arrays, and blocks that are still to be loaded in the version: both live as long as what is
        # returned. (Not by the sessions: what the collector has to find would hold the version for long.)
        held = arrays, self._opened
        if self._fast is None:

            def run_plain(held: object = held) -> dict[str, Any]:
                outputs = follow(arrays)
                return {name: copy.deepcopy(value) if name in shared else value for name, value in outputs.items()}

            return run_plain
        values = {name: self._fast.value(array) for name, array in arrays.items()}

        def run(held: object = held) -> dict[str, Any]:
            found = follow(values)
            outputs = {name: read(found[name]) for name, read in readers}
            for name in shared:
                outputs[name] = np.array(outputs[name])
            return outputs

        return run


def load_bundle(path: Path, threads: int | None = None) -> Runner:
    """A bundle, ready to run: on ONNX Runtime, or on a GPU where its blocks are engines.

    Raises:
        BadInput: It is no bundle.
    """
    _, plan = read_bundle(path)
    if all(block.backend is None for block in plan.blocks.values()):
        return BundleRunner(path, threads)
    # A layer above this one.
    runner: Runner = importlib.import_module("graphopt.engines.bundles.running").load_engine_bundle(path, threads)
    return runner


def backend_for(plan: Plan, session: Callable[[str], Any]) -> OrtBackend | PlainBackend:
    """What runs a plan's blocks in sessions that are made when they are asked for."""
    # Sequences go in and out as Python's; those between blocks stay the runtime's own. It makes neither strings nor
    # absent optionals of what Python has, so a host that cuts, stacks or hands on cannot have these as its values.
    between = [port.type for block in plan.blocks.values() for port in (*block.inputs, *block.outputs)]
    around = [port.type for port in (*plan.inputs, *plan.outputs)]
    plain = any("optional" in kind or "string" in kind for kind in (*between, *around))
    fast = not plain and all(kind.startswith("tensor(") for kind in around)
    return OrtBackend(session) if fast else PlainBackend(session)


def input_values(plan: Plan) -> list[ir.Value]:
    """The inputs of a plan's network as the values of a graph: what reads a user's inputs asks for."""
    return [value_of(port) for port in plan.inputs]
