"""The inputs that a bundle runs on to show the sizes of its blocks: the user's, or made up in sizes that are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.bundles.host import Program
from graphopt.bundles.merge import merge_bundle
from graphopt.bundles.plain import PlainBackend
from graphopt.bundles.plan import Plan
from graphopt.calibration import read_calibration
from graphopt.engines.profiles import Profile, Seen, make_profiles, observe, parse_shapes
from graphopt.errors import GraphoptError
from graphopt.feeds import feeds_that_run
from graphopt.runtime.ending import run_to_end


def feeds_for(
    plan: Plan,
    session: Callable[[str], Any],
    shapes: tuple[str, ...],
    calibration: str | Path | None,
    source: Path,
) -> Iterator[Mapping[str, Any]]:
    """Inputs of all the sizes that the blocks shall be built for.

    Args:
        plan: Of the bundle.
        session: Makes the session of a block.
        shapes: ``NAME=MIN/OPT/MAX``.
        calibration: The user's inputs; None: they are made up.
        source: The bundle, which errors name.

    Raises:
        BadInput: Something is wrong with these, or an axis has no size.
        GraphoptError: No made-up inputs were found that the bundle runs on.
    """
    network = merge_bundle(source, runs=False)
    inputs = list(network.graph.inputs)
    if any(not isinstance(value.type, ir.TensorType) for value in inputs):
        return iter(())  # nobody can give them; blocks of one size need none
    data = None if calibration is None else read_calibration(Path(calibration), inputs)
    seen = Seen() if data is None else observe(inputs, data)
    profiles = make_profiles(inputs, parse_shapes(shapes), seen)
    given: Iterator[Mapping[str, Any]] = iter(()) if data is None else iter(data)
    if data is not None and not shapes:
        return given
    program = Program(plan, PlainBackend(session))

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return run_to_end(lambda options: program.run(feeds))

    try:
        made = [feeds for sizes in _levels(profiles) for feeds in feeds_that_run(network, run, cases=1, shapes=sizes)]
    except GraphoptError as error:
        raise type(error)(error.what, where=str(source), hint=error.hint) from error
    return chain(given, made)


def _levels(profiles: Mapping[str, Profile]) -> list[dict[str, tuple[int, ...]]]:
    """The best sizes first, then the smallest and the largest, each once."""
    found = []
    for level in ("opt", "min", "max"):
        sizes = {name: getattr(profile, level) for name, profile in profiles.items()}
        if sizes not in found:
            found.append(sizes)
    return found
