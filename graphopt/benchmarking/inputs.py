"""The inputs that models are timed and compared on: the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.benchmarking.entries import holds_engines, is_engine
from graphopt.bundles.folder import read_bundle
from graphopt.bundles.merge import merge_bundle
from graphopt.bundles.plan import Plan
from graphopt.bundles.running import input_values
from graphopt.calibration import read_calibration
from graphopt.errors import BadInput
from graphopt.feeds import Feeds
from graphopt.files.bundle_folder import is_bundle
from graphopt.runtime.loading import Runner


def check_same_inputs(first_path: Path, first: Runner, path: Path, other: Runner) -> None:
    """Raise BadInput where two models do not take the same inputs."""
    ours = {item.name: item for item in first.inputs}
    theirs = {item.name: item for item in other.inputs}
    # TensorRT drops inputs that nothing reads.
    missing = [name for name in ours if name not in theirs and not is_engine(path)]
    missing += [name for name in theirs if name not in ours and not is_engine(first_path)]
    if missing:
        lacking = path if missing[0] in ours else first_path
        raise BadInput(
            f"the models take different inputs: {lacking.name} has no '{missing[0]}'",
            where=str(path),
            hint=f"{first_path.name} takes {', '.join(ours)}; {path.name} takes {', '.join(theirs)}",
        )
    for name, item in ours.items():
        if name in theirs and item.dtype != theirs[name].dtype:
            raise BadInput(
                f"the models take input '{name}' as {item.dtype} and as {theirs[name].dtype}", where=str(path)
            )


def feeds_for(
    files: Sequence[Path],
    runners: Sequence[Runner],
    shapes: Mapping[str, Sequence[int]] | None,
    calibration: Path | None,
    seed: int,
) -> list[Feeds]:
    """Inputs for all of them: made up from the first network that can be read, of sizes that the engines take."""
    engines = [runner for file, runner in zip(files, runners, strict=True) if is_engine(file)]
    if engines and calibration is None:
        best: dict[str, Sequence[int]] = engines[0].shapes_to_try()  # type: ignore[attr-defined]
        shapes = {**best, **(shapes or {})}
    readable = [index for index, file in enumerate(files) if file.suffix == ".onnx" or _can_merge(file)]
    # A bundle in which samples go their own ways takes any number of them; what it is compared with may take one.
    source = next((index for index in readable if samples_plan(files[index]) is None), next(iter(readable), None))
    if not engines and not is_bundle(files[0]):
        source = 0
    if source is not None:
        return _feeds(files[source], runners[source], shapes, calibration, seed)
    if calibration is None:
        return [_plain_feeds(runners[0], shapes or {}, seed)]
    bundle = next((file for file in files if is_bundle(file)), None)
    if bundle is None:
        raise BadInput("reading inputs of yours takes an .onnx file", hint="time the engine beside its model")
    return _of_the_user(calibration, shapes, input_values(read_bundle(bundle)[1]))


def _plain_feeds(runner: Runner, shapes: Mapping[str, Sequence[int]], seed: int) -> Feeds:
    """Where no model says what an input means: normal numbers, and zeros and ones."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for item in runner.inputs:
        known = shapes.get(item.name, item.shape or ())
        shape = tuple(size if isinstance(size, int) else 1 for size in known)
        assert item.dtype is not None
        drawn = rng.integers(0, 2, shape) if item.dtype.kind in "biu" else rng.standard_normal(shape)
        feeds[item.name] = np.asarray(drawn).astype(item.dtype)
    return feeds


def _feeds(
    path: Path, runner: Runner, shapes: Mapping[str, Sequence[int]] | None, calibration: Path | None, seed: int
) -> list[Feeds]:
    from graphopt.feeds import feeds_that_run
    from graphopt.files.load import load_model

    if path.suffix != ".onnx" and not is_bundle(path):
        raise BadInput("the first model must be an .onnx file or a bundle: inputs are made up from it", where=str(path))
    model = merge_bundle(path, runs=False) if is_bundle(path) else load_model(path)
    if calibration is not None:
        return _of_the_user(calibration, shapes, model.graph.inputs)
    return feeds_that_run(model, runner.run, seed=seed, shapes=shapes)


def _of_the_user(
    calibration: Path, shapes: Mapping[str, Sequence[int]] | None, inputs: Sequence[ir.Value]
) -> list[Feeds]:
    if shapes:
        raise BadInput("--shapes and --calibration exclude each other")
    return list(read_calibration(calibration, inputs)[:3])


def samples_plan(path: Path) -> Plan | None:
    """The plan of a bundle in which samples go their own ways; None for anything else."""
    plan = read_bundle(path)[1] if is_bundle(path) else None
    return plan if plan is not None and plan.samples else None


def _can_merge(path: Path) -> bool:
    """Whether a file is a bundle that tells what its inputs mean, as one network."""
    return is_bundle(path) and not holds_engines(path)


def known_inputs(runner: Runner, feeds: Feeds) -> Feeds:
    """The feeds of the inputs that a model has: engines lack those that nothing reads."""
    names = {item.name for item in runner.inputs}
    return {name: value for name, value in feeds.items() if name in names}


def describe_value(value: Any) -> str:
    """Dtype and shape of an input."""
    if isinstance(value, list):
        return f"{len(value)} x {describe_value(value[0])}" if value else "an empty sequence"
    array = np.asarray(value)
    name = "string" if array.dtype.kind in "OUS" else array.dtype.name
    return f"{name}[{', '.join(map(str, array.shape))}]"
