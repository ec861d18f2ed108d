"""A model run as far as the values asked for, one feed at a time.

The runtime's optimizations are off: the values are what the model says, and weights are used where they lie. Narrow
floats for which the runtime has no kernels are computed in float32. What is run is only what leads to the values.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput, GraphoptError
from graphopt.verification import runnable, whole
from graphopt.verification.structure import sort_if_needed
from graphopt.verification.tolerance import is_float

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Any]


@dataclass
class Kept:
    """A value kept on disk: a file for each sample in a folder.

    Attributes:
        folder: Of its own.
        dtype: None where nothing is kept, since it is no array of numbers.
        rank: Its number of axes.
    """

    folder: Path
    dtype: np.dtype[Any] | None = None
    rank: int = 0

    def write(self, sample: int, array: Any) -> None:
        """Keep the value of a sample."""
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            return
        self.dtype, self.rank = array.dtype, array.ndim
        np.save(self.folder / f"{sample}.npy", array)

    def read(self, sample: int) -> Array:
        """The value of a sample."""
        array: Array = np.load(self.folder / f"{sample}.npy")
        assert self.dtype is not None
        return array.view(self.dtype)  # numpy writes bfloat16 down as nameless bytes


class Segment:
    """A session that leads from feeds, and from values kept, to values asked for.

    Args:
        model: Its main graph holds them all. Operators that the runtime does not know are not on the way.
        wanted: What to return.
        keep: What to keep.
        kept: What was kept.
        twin: Whether to compute narrow floats in float32.
        custom_ops: A library of custom operators.
    """

    def __init__(
        self,
        model: ir.Model,
        wanted: Sequence[ir.Value],
        keep: Mapping[ir.Value, Kept],
        kept: Mapping[ir.Value, Kept],
        twin: bool,
        custom_ops: Path | None,
    ) -> None:
        graph = model.graph
        self._wanted = [value.name or "" for value in wanted]
        self._keep = {value.name or "": place for value, place in keep.items()}
        bounds = {*graph.inputs, *kept}
        outputs = list(dict.fromkeys(value for value in (*wanted, *keep) if value not in bounds))
        reads: set[ir.Value] = {value for value in wanted if value in bounds}
        reads.update(value for node in ancestors(outputs, bounds) for value in graphs.read_by(node) if value in bounds)
        self._kept = {value.name or "": kept[value] for value in kept if value in reads}
        self._names = [value.name or "" for value in outputs]
        self._session: Any = None
        self._preparation = runnable.Preparation(twin=twin)
        if not outputs:
            return
        inputs = [value for value in (*graph.inputs, *kept) if value in reads]
        part = ir.Model(
            ir.convenience.extract(graph, inputs, outputs),
            ir_version=model.ir_version,
            functions=[function.clone() for function in model.functions.values()],
        )
        for value in part.graph.inputs:
            place = self._kept.get(value.name or "")
            if place is not None and place.dtype is not None:
                value.shape = ir.Shape([None] * place.rank)
                if value.type is None:
                    value.type = ir.TensorType(ir.DataType.from_numpy(place.dtype))
        if twin:
            runnable.float32_twin(part)
        sort_if_needed(part)
        self._session = whole.session_for(part, custom_ops=custom_ops)
        self._dtypes = {value.name or "": value.dtype for value in part.graph.inputs if value.name in self._kept}

    def run(self, sample: int, feeds: Feeds) -> dict[str, Any]:
        """The values asked for, by name; those to be kept are written down.

        Raises:
            BadInput, GraphoptError: As `runtime.session.run`, naming the sample.
        """
        kept = {name: place.read(sample) for name, place in self._kept.items()}
        results: dict[str, Any] = {}
        if self._session is not None:
            (case,) = whole.narrow_feeds([feeds], self._preparation)
            case.update((name, _as_type(array, self._dtypes.get(name))) for name, array in kept.items())
            try:
                results = whole.run_case(self._session, case, self._names)
            except GraphoptError as error:
                where = f"sample {sample}" if error.where is None else f"sample {sample}: {error.where}"
                raise type(error)(error.what, where=where, hint=error.hint) from error
        for name, place in self._keep.items():
            place.write(sample, results[name])
        available = {**feeds, **kept, **results}
        for name in self._wanted:
            if name not in available:
                raise BadInput("no value was given", where=f"sample {sample}: input '{name}'")
        return {name: available[name] for name in self._wanted}


class Flow:
    """A model that is asked for values again and again, later ones later, and may be rewritten after each time.

    Args:
        model: Asked for values of its main graph.
        custom_ops: A library of custom operators.
        folder: Where to keep what the rest of the model reads of the part that was run, so that no node runs twice;
            None: every time begins with the feeds.
    """

    def __init__(self, model: ir.Model, *, custom_ops: Path | None = None, folder: Path | None = None) -> None:
        self.model = model
        self._custom_ops = custom_ops
        self._folder = folder
        self._kept: dict[ir.Value, Kept] = {}
        self._seen: dict[ir.Node, tuple[object, ...]] = {}
        self._finished: list[ir.Value] = []
        self._twin = False
        self._count = 0

    def segment(self, wanted: Sequence[ir.Value]) -> Segment:
        """What gives the values. It is to be run on every feed before the next one is asked for."""
        twin = runnable.needs_twin(self.model)
        if self._folder is None:
            return Segment(self.model, wanted, {}, {}, twin, self._custom_ops)
        if twin is not self._twin or self._is_outdated():
            self._drop(list(self._kept))
            self._seen.clear()
            self._twin = twin
        known = {value: place for value, place in self._kept.items() if place.dtype is not None}
        new = ancestors(wanted, {*self.model.graph.inputs, *known})
        self._seen.update((node, _state(node)) for node in new)
        live = self._live()
        keep = {value: self._place() for node in new for value in node.outputs if value in live and value not in known}
        segment = Segment(self.model, wanted, keep, known, twin, self._custom_ops)
        self._kept.update(keep)
        # Their files are read once more, by this segment.
        self._finished = [value for value in known if value not in live]
        return segment

    def finish(self) -> None:
        """Throw away what only the segment that was run read."""
        if self._folder is not None:
            self._drop(self._finished)

    def _is_outdated(self) -> bool:
        """Whether somebody rewrote what was run."""
        return any(not _same(before, _state(node)) for node, before in self._seen.items() if node.graph is not None)

    def _live(self) -> set[ir.Value]:
        """The values that depend on an input, that nodes run already give and others read."""
        owners = {
            inner: node
            for node in self.model.graph
            if graphs.has_subgraphs(node)
            for body in graphs.subgraphs(node)
            for inner in graphs.nested_nodes(body)
        }
        varying: set[ir.Value] = set(self.model.graph.inputs)
        pending = list(varying)
        while pending:
            for node in dict.fromkeys(owners.get(use.node, use.node) for use in pending.pop().uses()):
                fresh = [value for value in node.outputs if value not in varying]
                varying.update(fresh)
                pending.extend(fresh)
        return {
            value
            for node in self._seen
            for value in node.outputs
            if value in varying and any(owners.get(use.node, use.node) not in self._seen for use in value.uses())
        }

    def _place(self) -> Kept:
        assert self._folder is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir(parents=True)
        return Kept(folder)

    def _drop(self, values: Iterable[ir.Value]) -> None:
        for value in values:
            shutil.rmtree(self._kept.pop(value).folder)


def ancestors(values: Iterable[ir.Value], bounds: set[ir.Value]) -> list[ir.Node]:
    """The nodes that lead to values, going back no further than ``bounds``."""
    found: dict[ir.Node, None] = {}
    pending = [value for value in values if value not in bounds]
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            pending.extend(value for value in graphs.read_by(node) if value not in bounds)
    return list(found)


def _state(node: ir.Node) -> tuple[object, ...]:
    """What a node's result depends on, besides the values of its inputs."""
    reads = graphs.read_by(node)
    return *reads, *(value.const_value for value in reads), *node.attributes.values()


def _same(before: tuple[object, ...], now: tuple[object, ...]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _as_type(array: Array, dtype: ir.DataType | None) -> Array:
    """A value kept by a part that ran in another float type than the part that reads it."""
    wanted = None if dtype is None else dtype.numpy()
    if wanted is None or wanted == array.dtype or not is_float(array):
        return array
    return array.astype(wanted)
