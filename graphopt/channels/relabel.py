"""Relabelling a channel class: its region is cloned with changed constants, and takes the region's place at once.

The region is every node that reads or makes a value of the class, and what lies between them. Only values that the
class does not label leave it, so what is replaced must be equal, and can be verified.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.classes import ChannelClass, Slot
from graphopt.rewrite import Context
from graphopt.weights import computed, read

Array = npt.NDArray[Any]
Override = Callable[[Callable[[ir.Value], ir.Value]], tuple[Sequence[ir.Node], Mapping[ir.Value, ir.Value]]]
"""What takes the place of a node in the clone. It is given a function from a value that the node may read to the
clone's value (constants too: relabelled, made when asked for), and returns new nodes in order, and for each output of
the old node that something reads its new value, in the new labelling."""


_SAFE = 1e12
"""Factors between this and its inverse keep any float32 weight that training leaves finite and normal."""


_SUFFIX = "_relabelled"


class UnmovableError(Exception):
    """A region cannot be cloned; the message says why."""


def relabel(
    ctx: Context,
    cls: ChannelClass,
    order: npt.NDArray[np.int64],
    *,
    rule: str,
    overrides: Mapping[ir.Node, Override] | None = None,
    certain: bool = False,
    by: float = 0.0,
) -> bool:
    """Permute the channels of a free class of permutations: channel i of the result is channel order[i] of before.

    Args:
        ctx: The model being rewritten.
        cls: A free class of ``channel_classes(ctx.model, Group.PERMUTATION)``; the model is as it was then.
        order: A permutation, [cls.size].
        rule: For ``ctx.replace``.
        overrides: What takes the place of certain nodes in the clone.
        certain: For ``ctx.replace``: the target's cost profile is not asked.
        by: For ``ctx.replace``: the fraction of the time that must be saved.

    Returns:
        False where nothing was changed; why is noted as a near miss.

    Raises:
        ValueError: The class is not free, the order is no permutation, or an override leaves out a value that is read.
    """
    order = np.asarray(order, np.int64)
    if not cls.free:
        raise ValueError(f"the class is pinned: {cls.pinned[0]}")
    if not np.array_equal(np.sort(order), np.arange(cls.size)):
        raise ValueError(f"no permutation of {cls.size} channels")
    return _replace(ctx, cls, partial(_permuted, order=order), rule, overrides or {}, certain, by)


def rescale(
    ctx: Context,
    cls: ChannelClass,
    factors: npt.NDArray[np.float64],
    *,
    rule: str,
    overrides: Mapping[ir.Node, Override] | None = None,
    certain: bool = False,
) -> bool:
    """Multiply the channels of a free class of scales by positive numbers [cls.size]; else as ``relabel``.

    Raises:
        ValueError: The class is not free, the numbers are not positive and finite, or an override leaves out a value
            that is read.
    """
    factors = np.asarray(factors, np.float64)
    if not cls.free:
        raise ValueError(f"the class is pinned: {cls.pinned[0]}")
    if factors.shape != (cls.size,) or not bool((np.isfinite(factors) & (factors > 0)).all()):
        raise ValueError(f"not {cls.size} positive numbers")
    spare = {v for node in overrides or () for v in node.inputs if v is not None and _all_in(v, overrides or ())}
    for value in cls.constants():
        if value not in spare and not _in_range(value, cls, factors):
            ctx.refuse(next(iter(value.uses())).node, f"{value.name} would leave the range of its type")
            return False
    return _replace(ctx, cls, partial(_scaled, factors=factors), rule, overrides or {}, certain)


def region_of(cls: ChannelClass, also: Iterable[ir.Node] = ()) -> list[ir.Node]:
    """The nodes that are cloned to relabel a class, in the order of the graph: those that touch it, and between them.

    Raises:
        UnmovableError: One of them carries a body, or the model has changed.
    """
    if not is_current(cls):
        raise UnmovableError("the model has changed since the class was found")
    touching = dict.fromkeys(also)
    if any(node.graph is None for node in touching):
        raise UnmovableError("the model has changed: a node with an override is gone")
    for slot in cls.slots:
        producer = slot.value.producer()
        if producer is not None and not graphs.is_constant(slot.value):
            touching[producer] = None
        touching.update((use.node, None) for use in slot.value.uses())
    if not touching:
        return []
    graph = next(iter(touching)).graph
    assert isinstance(graph, ir.Graph)
    if any(node.graph is not graph for node in touching):
        raise UnmovableError("the class is read in a body")
    return _convex(graph, touching)


def is_current(cls: ChannelClass) -> bool:
    """Whether what a class labels is still in the model: a rewrite that touched its region has left old values."""
    for value in dict.fromkeys(slot.value for slot in cls.slots):
        producer = value.producer()
        if producer is None and not (value.is_graph_input() or value.is_initializer()):
            return False  # a constant that went when its last reader went
        if (producer is not None and producer.graph is None) or (graphs.is_constant(value) and not value.uses()):
            return False
    return True


# -- the clone ---------------------------------------------------------------------------------------------------------

Change = Callable[[Array, Slot], Array]
"""What a slot of a constant does to its values."""


def _replace(
    ctx: Context,
    cls: ChannelClass,
    change: Change,
    rule: str,
    overrides: Mapping[ir.Node, Override],
    certain: bool,
    by: float = 0.0,
) -> bool:
    first = next((v.producer() for v in cls.activations() if v.producer() is not None), None)
    try:
        region = region_of(cls, overrides)
    except UnmovableError as error:
        if first is not None:
            ctx.refuse(first, str(error))
        return False
    if not region:
        return False
    clone = _Clone(ctx, cls, change)
    try:
        for node in region:
            clone.add(node, overrides.get(node))
    except UnmovableError as error:
        ctx.refuse(region[0], str(error))
        for node in clone.nodes:
            graphs.detach(node)
        return False
    inside = set(region)
    labelled = {slot.value for slot in cls.slots}
    boundary = [v for n in region for v in n.outputs if _leaves(v, inside)]
    wrong = next((v for v in boundary if v in labelled), None)
    if wrong is not None:  # pragma: no cover - a free class is neither returned nor read outside
        raise ValueError(f"{wrong.name!r} leaves the region of its class")
    outputs = {value: clone.of(value) for value in boundary}
    nodes = _alive(clone.nodes, outputs.values())
    kept = set(nodes)
    for node in clone.nodes:
        if node not in kept:
            graphs.detach(node)
    if not outputs:
        return False
    anchor = _make_room(_alive(region, boundary), boundary)
    return ctx.replace(outputs, nodes, rule=rule, before=anchor, certain=certain, by=by)


class _Clone:
    """The nodes of a region once more, on changed constants."""

    def __init__(self, ctx: Context, cls: ChannelClass, change: Change) -> None:
        self.ctx = ctx
        self.change = change
        self.nodes: list[ir.Node] = []
        self._slots: dict[ir.Value, list[Slot]] = {}
        for slot in cls.slots:
            if graphs.is_constant(slot.value):
                self._slots.setdefault(slot.value, []).append(slot)
        self._new: dict[ir.Value, ir.Value] = {}
        self._missing: set[ir.Value] = set()

    def of(self, value: ir.Value) -> ir.Value:
        """The clone's value for an old value; what the region does not touch stands for itself."""
        if value in self._missing:
            raise ValueError(f"the override of {value.producer()!r} gives no value for {value.name!r}, which is read")
        producer = value.producer()
        if value not in self._new and producer is not None and producer.graph is None:
            raise UnmovableError("the model has changed: a value that an override asks for is gone")
        if value not in self._new and value in self._slots:
            self._new[value] = self._constant(value)
        return self._new.get(value, value)

    def add(self, node: ir.Node, override: Override | None) -> None:
        if override is not None:
            nodes, values = override(self.of)
            self.nodes.extend(nodes)
            self._new.update(values)
            self._missing.update(v for v in node.outputs if v not in values)
            return
        inputs = [None if value is None else self.of(value) for value in node.inputs]
        copy = self.ctx.node(node.op_type, inputs, like=list(node.outputs), domain=node.domain)
        for attribute in node.attributes.values():
            copy.attributes[attribute.name] = attribute
        if node.overload:
            copy.overload = node.overload
        copy.metadata_props.update(node.metadata_props)  # what passes noted holds for the clone
        self.nodes.append(copy)
        self._new.update(zip(node.outputs, copy.outputs, strict=True))

    def _constant(self, value: ir.Value) -> ir.Value:
        tensor = graphs.constant_tensor(value)
        assert tensor is not None
        compute = partial(_changed, tensor, tuple(self._slots[value]), self.change)
        made = computed(compute, tensor.dtype, tensor.shape.numpy())
        return self.ctx.constant(made, (value.name or "constant").removesuffix(_SUFFIX) + _SUFFIX)


def _changed(tensor: ir.TensorProtocol, slots: Sequence[Slot], change: Change) -> ir.TensorProtocol:
    array: Array = read(tensor)
    # Numbers that are indices move after they were renumbered, or before: it is the same.
    for slot in slots:
        array = change(array, slot)
    return ir.tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=tensor.dtype)


def _permuted(array: Array, slot: Slot, *, order: npt.NDArray[np.int64]) -> Array:
    if slot.axis is None:
        assert slot.into is not None
        places = np.empty(slot.into, np.int64)
        places[_moved(slot.into, slot, order)] = np.arange(slot.into)
        renumbered: Array = places[array].astype(array.dtype)  # negative ones count from the end here too
        return renumbered
    taken: Array = np.take(array, _moved(array.shape[slot.axis], slot, order), axis=slot.axis)
    return taken


def _moved(size: int, slot: Slot, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which element of an axis comes to each place."""
    index = np.arange(size)
    end = slot.offset + slot.outer * order.size * slot.inner
    part = index[slot.offset : end].reshape(slot.outer, order.size, slot.inner)
    index[slot.offset : end] = part[:, order].reshape(-1)
    return index


def _scaled(array: Array, slot: Slot, *, factors: npt.NDArray[np.float64]) -> Array:
    assert slot.axis is not None
    numbers = np.ones(array.shape[slot.axis])
    end = slot.offset + slot.outer * factors.size * slot.inner
    part = numbers[slot.offset : end].reshape(slot.outer, factors.size, slot.inner)
    part *= (1 / factors if slot.inverse else factors)[None, :, None]
    shape = [-1 if axis == slot.axis else 1 for axis in range(array.ndim)]
    with np.errstate(all="ignore"):
        scaled: Array = (array.astype(np.float64) * numbers.reshape(shape)).astype(array.dtype)
    return scaled


def _all_in(value: ir.Value, nodes: Iterable[ir.Node]) -> bool:
    return all(use.node in nodes for use in value.uses())


def _in_range(value: ir.Value, cls: ChannelClass, factors: npt.NDArray[np.float64]) -> bool:
    """Whether a constant stays finite, and stays normal where it was, when it is scaled."""
    tensor = graphs.constant_tensor(value)
    assert tensor is not None
    slots = [slot for slot in cls.slots if slot.value is value]
    spread = max(factors.max(), 1 / factors.min()) ** len(slots)
    if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and spread <= _SAFE:
        return True
    array = read(tensor)
    scaled = array
    for slot in slots:
        scaled = _scaled(scaled, slot, factors=factors)
    least = float(ml_dtypes.finfo(array.dtype).smallest_normal)  # type: ignore[no-untyped-call]
    before, after = np.abs(array.astype(np.float64)), np.abs(scaled.astype(np.float64))
    return bool(np.isfinite(after).all()) and not bool(((after < least) & (before >= least)).any())


# -- where it goes -----------------------------------------------------------------------------------------------------


def _predecessors(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    captured = [graphs.captured_values(body) for body in graphs.subgraphs(node)]
    for value in itertools.chain(node.inputs, *captured):
        producer = None if value is None else value.producer()
        if producer is not None and producer.graph is graph:
            yield producer


def _parents(graph: ir.Graph) -> dict[ir.Graph, ir.Node]:
    """The node that carries each body below a graph."""
    found: dict[ir.Graph, ir.Node] = {}
    pending = [graph]
    while pending:
        for node in pending.pop():
            for body in graphs.subgraphs(node):
                found[body] = node
                pending.append(body)
    return found


def _convex(graph: ir.Graph, touching: Mapping[ir.Node, None]) -> list[ir.Node]:
    """The nodes and all that lies between them, in the order of the graph."""
    below: set[ir.Node] = set(touching)  # what depends on them
    above: set[ir.Node] = set(touching)  # what they depend on
    order = list(graph)
    first = next(n for n, node in enumerate(order) if node in below)
    last = len(order) - next(n for n, node in enumerate(reversed(order)) if node in above)
    span = order[first:last]
    for node in span:
        if node not in below and any(p in below for p in _predecessors(node, graph)):
            below.add(node)
    for node in reversed(span):
        if node in above:
            above.update(_predecessors(node, graph))
    region = [node for node in span if node in below and node in above]
    carrier = next((node for node in region if graphs.has_subgraphs(node)), None)
    if carrier is not None:
        raise UnmovableError(f"{carrier.op_type} {carrier.name!r} stands between the nodes of the class")
    return region


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _make_room(region: Sequence[ir.Node], boundary: Sequence[ir.Value]) -> ir.Node:
    """The node before which the clone can stand: what it reads is before it, what reads it is not.

    Nodes that the region reads and that stand further down are moved up; they depend on nothing that it makes. What
    nobody needs is not in the region: it stays, and reads what the clone makes.
    """
    inside = set(region)
    graph = region[0].graph
    assert isinstance(graph, ir.Graph)
    order = list(graph)
    position = {node: n for n, node in enumerate(order)}
    readers = {use.node for value in boundary for use in value.uses()} - inside
    if any(reader.graph is not graph for reader in readers):
        parents = _parents(graph)
        readers = {_carrier(reader, parents, graph) for reader in readers}
    anchor = min(readers, key=position.__getitem__, default=region[-1])
    place = position[anchor]
    late: set[ir.Node] = set()
    pending = list(region)
    while pending:
        for source in _predecessors(pending.pop(), graph):
            if source not in inside and source not in late and position[source] > place:
                late.add(source)
                pending.append(source)
    for node in sorted(late, key=position.__getitem__):
        graph.remove(node)
        graph.insert_before(anchor, node)
    return anchor


def _carrier(node: ir.Node, parents: Mapping[ir.Graph, ir.Node], graph: ir.Graph) -> ir.Node:
    while node.graph is not graph:
        assert isinstance(node.graph, ir.Graph)
        node = parents[node.graph]
    return node


def _alive(nodes: Sequence[ir.Node], wanted: Iterable[ir.Value]) -> list[ir.Node]:
    """Those of some nodes in order that the wanted values need."""
    read_values = set(wanted)
    kept: list[ir.Node] = []
    for node in reversed(nodes):
        if any(value in read_values for value in node.outputs):
            read_values.update(value for value in node.inputs if value is not None)
            kept.append(node)
    return kept[::-1]
