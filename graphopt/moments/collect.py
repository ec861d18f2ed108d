"""Moments of a model's activations over calibration data, streamed: memory does not grow with the samples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.background import in_background
from graphopt.calibration import failing_on
from graphopt.errors import BadInput
from graphopt.moments.flow import Feeds, Flow, ancestors
from graphopt.moments.layouts import Layout
from graphopt.moments.sums import CrossMoments, CrossSum, Moments, MomentSum, NotFinite, bytes_of
from graphopt.numerics.blas import single_threaded_blas
from graphopt.verification import runnable

LIMIT_BYTES = 1 << 30

T = TypeVar("T")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tap:
    """An activation, and how its rows are read.

    Attributes:
        value: Its name in the main graph.
        layout: What its rows are.
    """

    value: str
    layout: Layout


Pair = tuple[Tap, Tap]


def moments(
    model: ir.Model,
    taps: Sequence[Tap],
    feeds: Sequence[Feeds],
    *,
    limit: int = LIMIT_BYTES,
    custom_ops: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[Tap, Moments], dict[Tap, str]]:
    """Second moments of activations, all of them at once; `moments_in_groups` holds only some.

    The model is run with the runtime's optimizations off and on one thread, as is the arithmetic, so that the same data
    give the same bits.

    Args:
        model: In memory, perhaps amid a rewrite; it is left as it is and never serialised whole.
        taps: What to look at. Where their sums take more than ``limit`` bytes, the data are gone through several times,
            with some of them each time.
        feeds: The samples; each is read when it is needed.
        limit: In bytes.
        custom_ops: A library of custom operators.
        progress: Told in words what is being done.

    Returns:
        The moments of the taps that can be had, and for each other tap the reason.

    Raises:
        BadInput: An activation is NaN or infinite, named with the sample; a sample does not fit the model.
        ValueError: An activation is not as its layout says.
    """
    refused = refusals(model, taps, custom_ops=custom_ops)
    wanted = [tap for tap in taps if tap not in refused]
    found: dict[Tap, Moments] = {}
    for group in moments_in_groups(model, wanted, feeds, limit=limit, custom_ops=custom_ops, progress=progress):
        found.update(group)
    return found, refused


def refusals(model: ir.Model, taps: Sequence[Tap], *, custom_ops: Path | None = None) -> dict[Tap, str]:
    """Why taps cannot be had; nothing is run, and what can be had is left out."""
    return _resolve(model, taps, custom_ops)[1]


def moments_in_groups(
    model: ir.Model,
    taps: Sequence[Tap],
    feeds: Sequence[Feeds],
    *,
    limit: int = LIMIT_BYTES,
    custom_ops: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[Tap, Moments]]:
    """`moments`, some taps at a time: no more than ``limit`` bytes are held where each group is let go of.

    Args:
        model: As for `moments`; it stays as it is until the last group.
        taps, feeds, limit, custom_ops, progress: As for `moments`. Taps that are refused are left out.

    Yields:
        The moments of a group, in the order in which the model computes them.
    """
    values, _ = _resolve(model, taps, custom_ops)
    flow = Flow(model, custom_ops=custom_ops)
    order = _in_order(model, values)
    groups = list(_within(order, {tap: bytes_of(tap.layout) for tap in order}, limit))
    for number, group in enumerate(groups):
        sums = {tap: MomentSum(tap.layout) for tap in group}
        segment = flow.segment(list(dict.fromkeys(values[tap] for tap in group)))
        with single_threaded_blas():
            for sample, results in enumerate(_ahead(segment.run, feeds)):
                for tap, total in sums.items():
                    with _naming(tap.value, sample):
                        total.add(_array(results[tap.value]))
                _tell(progress, sample, len(feeds), number, len(groups))
        found = {tap: sums.pop(tap).result() for tap in group}
        yield found
        del found


def cross_moments(
    original: ir.Model,
    current: ir.Model,
    pairs: Sequence[Pair],
    feeds: Sequence[Feeds],
    *,
    limit: int = LIMIT_BYTES,
    custom_ops: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[Pair, CrossMoments], dict[Pair, str]]:
    """Second moments of activations of a model, and between them and those of the model that it came from.

    To ask again and again while ``current`` is rewritten from its inputs to its outputs, use a `Relay`.

    Args:
        original: As ``current``, before anything was changed.
        current: As the model of `moments`.
        pairs: Taps of the original and of the current model whose rows belong together.
        feeds, limit, custom_ops, progress: As for `moments`.

    Returns:
        As `moments`.

    Raises:
        BadInput, ValueError: As `moments`; two layouts do not fit each other.
        GraphoptError: Indices of an embedding differ between the models.
    """
    flows = Flow(original, custom_ops=custom_ops), Flow(current, custom_ops=custom_ops)
    return _cross(flows, pairs, feeds, limit, custom_ops, progress)


class Relay:
    """Cross moments of a model that is compressed from its inputs to its outputs, while it is.

    What the rest of a model reads of the part that was run is kept on disk for every sample, so that no node runs twice
    for a sample: the time is linear in the nodes, and memory does not grow with the samples. The disk holds, for both
    models, a sample's live activations (the residual stream, a mask) for each sample.

    Values are best asked for in the order in which the model computes them. Where what was run is changed afterwards,
    that is noticed, and the samples start again from the feeds. The files go at the end of the ``with`` statement.

    Args:
        original, current, feeds, limit, custom_ops, progress: As for `cross_moments`.
        folder: Where the files are made; the system's temporary folder, which may be memory, if None.
    """

    def __init__(
        self,
        original: ir.Model,
        current: ir.Model,
        feeds: Sequence[Feeds],
        *,
        folder: Path | None = None,
        limit: int = LIMIT_BYTES,
        custom_ops: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._stack = ExitStack()
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-", dir=folder)))
        self._flows = (
            Flow(original, custom_ops=custom_ops, folder=place / "original"),
            Flow(current, custom_ops=custom_ops, folder=place / "current"),
        )
        self._feeds = feeds
        self._limit = limit
        self._custom_ops = custom_ops
        self._progress = progress

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def cross_moments(self, pairs: Sequence[Pair]) -> tuple[dict[Pair, CrossMoments], dict[Pair, str]]:
        """What the function of that name returns, for the models as they are now."""
        return _cross(self._flows, pairs, self._feeds, self._limit, self._custom_ops, self._progress)


def _cross(
    flows: tuple[Flow, Flow],
    pairs: Sequence[Pair],
    feeds: Sequence[Feeds],
    limit: int,
    custom_ops: Path | None,
    progress: Progress | None,
) -> tuple[dict[Pair, CrossMoments], dict[Pair, str]]:
    sides = [_resolve(flow.model, [pair[i] for pair in pairs], custom_ops) for i, flow in enumerate(flows)]
    (originals, not_original), (currents, not_current) = sides
    refused: dict[Pair, str] = {}
    for pair in pairs:
        if pair[0] in not_original:
            refused[pair] = f"in the original, {not_original[pair[0]]}"
        elif pair[1] in not_current:
            refused[pair] = not_current[pair[1]]
    order = _in_order(flows[1].model, {pair: currents[pair[1]] for pair in dict.fromkeys(pairs) if pair not in refused})
    groups = list(_within(order, {pair: 2 * bytes_of(pair[1].layout) for pair in order}, limit))
    found: dict[Pair, CrossMoments] = {}
    for number, group in enumerate(groups):
        sums = {pair: CrossSum(pair[0].layout, pair[1].layout) for pair in group}
        before = flows[0].segment(list(dict.fromkeys(originals[pair[0]] for pair in group)))
        now = flows[1].segment(list(dict.fromkeys(currents[pair[1]] for pair in group)))

        def both(sample: int, case: Feeds, before: Any = before, now: Any = now) -> tuple[Any, Any]:
            return before.run(sample, case), now.run(sample, case)

        with single_threaded_blas():
            for sample, (theirs, ours) in enumerate(_ahead(both, feeds)):
                for (original, current), total in sums.items():
                    with _naming(current.value, sample):
                        total.add(_array(theirs[original.value]), _array(ours[current.value]))
                _tell(progress, sample, len(feeds), number, len(groups))
        for flow in flows:
            flow.finish()
        found.update((pair, total.result()) for pair, total in sums.items())
    return found, refused


def _resolve(
    model: ir.Model, taps: Sequence[Tap], custom_ops: Path | None
) -> tuple[dict[Tap, ir.Value], dict[Tap, str]]:
    """The values of taps, and why others have none that can be looked at."""
    values = {value.name: value for value in model.graph.inputs}
    values.update((value.name, value) for node in model.graph for value in node.outputs)
    unknown: set[ir.Node] = set()
    if custom_ops is None:
        unknown = {
            node
            for node in model.graph
            if not runnable.is_known(node, model)
            or (
                graphs.has_subgraphs(node)
                and any(
                    not runnable.is_known(n, model)
                    for body in graphs.subgraphs(node)
                    for n in graphs.nested_nodes(body)
                )
            )
        }
    found: dict[Tap, ir.Value] = {}
    refused: dict[Tap, str] = {}
    for tap in taps:
        value = values.get(tap.value)
        reason = _whereabouts(model, tap.value) if value is None else _why_not(value, unknown)
        if reason is not None:
            refused[tap] = reason
        elif value is not None:
            found[tap] = value
    return found, refused


def _why_not(value: ir.Value, unknown: set[ir.Node]) -> str | None:
    name = f"'{value.name}'"
    if value.is_initializer() or graphs.is_constant(value):
        return f"{name} is a constant"
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return f"{name} is no tensor"
    if value.dtype is ir.DataType.STRING:
        return f"{name} holds text"
    for node in ancestors([value], set()) if unknown else ():
        if node in unknown:
            return f"{name} depends on {node.domain}::{node.op_type}, which ONNX Runtime does not know"
    return None


def _whereabouts(model: ir.Model, name: str) -> str:
    """Why a value is not in the main graph."""
    if name in model.graph.initializers:
        return f"'{name}' is a constant"
    for node in model.graph:
        for body in graphs.subgraphs(node):
            for inner in graphs.nested_graphs(body):
                own = [*inner.inputs, *(value for n in inner for value in n.outputs)]
                if any(value.name == name for value in own):
                    return (
                        f"'{name}' is inside the body of {node.op_type} '{node.name}', whose values cannot be returned"
                    )
    return f"the model computes no '{name}'"


def _in_order(model: ir.Model, values: Mapping[T, ir.Value]) -> list[T]:
    """Keys in the order in which the model computes their values, so that a group leads no further than it must."""
    position = {node: index for index, node in enumerate(model.graph)}

    def place(key: T) -> int:
        producer = values[key].producer()
        return -1 if producer is None else position[producer]

    return sorted(values, key=place)


def _within(keys: Sequence[T], sizes: Mapping[T, int], limit: int) -> Iterator[list[T]]:
    """Cut keys into groups whose sizes come to no more than ``limit``; one that is larger goes alone."""
    group: list[T] = []
    taken = 0
    for key in keys:
        if group and taken + sizes[key] > limit:
            yield group
            group, taken = [], 0
        group.append(key)
        taken += sizes[key]
    if group:
        yield group


def _ahead(run: Callable[[int, Feeds], T], feeds: Sequence[Feeds]) -> Iterator[T]:
    """Run every sample; the runtime computes the next one while the one before is added up."""

    def produce(sample: int) -> T:
        feed = feeds[sample]
        with failing_on(feed):
            return run(sample, feed)

    count = len(feeds)
    pending = in_background(produce, 0) if count else None
    sample = 0
    try:
        while pending is not None:
            result = pending.result()
            sample += 1
            pending = in_background(produce, sample) if sample < count else None
            yield result
            del result
    finally:
        # Whoever stopped early may take away what the sample reads.
        if pending is not None and not pending.cancel():
            pending.exception()


@contextmanager
def _naming(value: str, sample: int) -> Iterator[None]:
    """Say of which value and sample it is that an activation cannot be used."""
    where = f"activation '{value}', sample {sample}"
    try:
        yield
    except NotFinite as error:
        raise BadInput("is NaN or infinite", where=where, hint="look at the calibration data") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _array(result: Any) -> np.ndarray[Any, Any]:
    if not isinstance(result, np.ndarray):
        raise ValueError("an activation is no array")
    return result


def _tell(progress: Progress | None, sample: int, samples: int, pass_: int, passes: int) -> None:
    if progress is not None:
        which = f", pass {pass_ + 1} of {passes}" if passes > 1 else ""
        progress(f"moments{which}: sample {sample + 1} of {samples}")
