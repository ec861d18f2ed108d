"""What each input of a model is for: an index, a mask, a size, a switch, a signal that convolutions read.

The consumers of every input are followed through operators that pass values on (casts, reshapes,
concatenations), into subgraphs and function calls, to the operators that give the values a meaning. Nothing
is computed and no weight is touched, except constants of one element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graphs import constant_array, is_constant, nested_graphs, subgraphs
from graphopt.runtime.fitting import static_sizes, suggestion
from graphopt.runtime.role_tables import (
    ARITHMETIC,
    BOUNDS,
    COMPARISONS,
    INDEXERS,
    KNOWN_DOMAINS,
    LENGTHS,
    MEANINGS,
    PASS_ON,
    SCATTERS,
    VOCABULARIES,
)
from graphopt.runtime.scalars import Scalar, evaluate, scalar
from graphopt.runtime.windows import spatial_axes


@dataclass(frozen=True)
class Limit:
    """Indices into an axis: at least ``low``, below ``size`` (after ``index * scale + offset``).

    ``size`` is a number, the name of a symbolic size, or None where nobody knows; ``inclusive`` values may be equal
    to it.
    """

    size: int | str | None
    low: int = 0
    offset: int = 0
    scale: int = 1
    unique: bool = False
    inclusive: bool = False


@dataclass
class Roles:
    """What was found out about one input.

    Attributes:
        limits: What its values index, or which sizes they count up to.
        equals: Constants that it is compared with for equality.
        thresholds: Constants that it is compared with for order.
        meanings: What operators take its values for.
        suggested: Of a size input: what fits the declared outputs.
        current: Of a size input: the sizes of what it changes; numbers, or names of symbolic sizes.
        totals: Of an input that splits: the size of what it splits.
        known: Values that an operator treats one by one, such as the keys of a dictionary.
        patterns: Regular expressions that its strings are matched with.
    """

    limits: list[Limit] = field(default_factory=list)
    equals: list[Scalar] = field(default_factory=list)
    thresholds: list[Scalar] = field(default_factory=list)
    meanings: set[str] = field(default_factory=set)
    suggested: list[tuple[int, ...] | None] = field(default_factory=list)
    current: list[tuple[int | str | None, ...]] = field(default_factory=list)
    totals: list[int | str | None] = field(default_factory=list)
    known: list[Scalar] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Frame:
    """A function call that is being looked into: the calling node, and the call around it."""

    node: ir.Node
    function: ir.Function
    parent: _Frame | None


@dataclass(frozen=True)
class _Step:
    """A value that holds an input's values, times ``scale`` plus ``offset``; ``part``: among others.

    ``derived``: it was computed from them and from what is no constant.
    """

    value: ir.Value
    frame: _Frame | None
    scale: int = 1
    offset: int = 0
    part: bool = False
    derived: bool = False


class ModelRoles:
    """The roles of a model's inputs. Built once; takes time linear in the nodes."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._owner: dict[ir.Graph, ir.Node] = {}
        self._returned: dict[ir.Value, list[tuple[ir.Graph, int]]] = {}
        self._symbols = {
            str(size) for value in model.graph.inputs for size in value.shape or () if isinstance(size, ir.SymbolicDim)
        }
        roots = [model.graph, *(function.graph for function in model.functions.values())]
        for graph in (graph for root in roots for graph in nested_graphs(root)):
            for index, value in enumerate(graph.outputs):
                self._returned.setdefault(value, []).append((graph, index))
            for node in graph:
                if node.attributes:
                    self._owner.update((body, node) for body in subgraphs(node))

    def of(self, value: ir.Value) -> Roles:
        """What the consumers of an input do with its values."""
        roles = Roles()
        seen: set[tuple[ir.Value, _Frame | None, bool]] = set()
        pending = [_Step(value, None)]
        while pending:
            step = pending.pop()
            key = (step.value, step.frame, step.derived)
            if key in seen:
                continue
            seen.add(key)
            for node, index in step.value.uses():
                self._note(roles, step, node, index)
                pending.extend(self._onward(step, node, index))
            pending.extend(self._returns(step))
        return roles

    def spatial(self, value: ir.Value, switches: Mapping[str, Scalar]) -> dict[int, int]:
        """The axes of an input that convolutions and pools slide over, each with the widest window.

        Args:
            value: An input of the model.
            switches: Values of scalar inputs; the branches they leave out are not looked into.
        """
        return spatial_axes(value, lambda node: self._reached(node, switches))

    def _reached(self, node: ir.Node, switches: Mapping[str, Scalar]) -> bool:
        """Whether a node runs, as far as ``switches`` decide it."""
        graph = node.graph
        while isinstance(graph, ir.Graph) and graph in self._owner:
            owner = self._owner[graph]
            if owner.op_type == "If" and owner.inputs[0] is not None:
                taken = evaluate(owner.inputs[0], switches)
                branch = owner.attributes["then_branch"].as_graph()
                if taken is not None and bool(taken) != (graph is branch):
                    return False
            graph = owner.graph
        return True

    def _note(self, roles: Roles, step: _Step, node: ir.Node, index: int) -> None:
        key = (_qualified(node), index)
        if step.derived:
            if key in BOUNDS:
                roles.meanings.add("bound")
            return
        if node.domain not in KNOWN_DOMAINS and node.op_identifier() not in self.model.functions:
            roles.meanings.add("opaque")
        if key in INDEXERS:
            roles.limits.append(self._limit(step, node, index))
        elif key in LENGTHS:
            size = self._size(node.inputs[LENGTHS[key][0]], step.frame, LENGTHS[key][1])
            roles.limits.append(Limit(size + 1 if isinstance(size, int) else size, low=1))
        elif key == ("OneHot", 0):
            depth = constant_array(node.inputs[1], limit=1)
            roles.limits.append(Limit(None if depth is None else int(depth.reshape(()))))
        elif key == ("MaxUnpool", 1):
            shape = static_sizes(node.outputs[0])
            roles.limits.append(Limit(None if shape is None else math.prod(shape), unique=True))
        elif node.op_type in COMPARISONS:
            self._note_compared(roles, step, node, 1 - index)
            constant = scalar(self._resolved(node.inputs[1 - index], step.frame)[0])
            if (
                constant is not None
                and step.scale == 1
                and isinstance(constant, str) == (step.value.dtype == ir.DataType.STRING)
            ):
                known = roles.equals if node.op_type == "Equal" else roles.thresholds
                known.append(constant if isinstance(constant, str) else constant - step.offset)
        elif node.op_type == "Sub" and index == 1 and scalar(node.inputs[0]) == 1:
            roles.meanings.add("complement")  # 1 - mask
        elif node.op_type == "Add":
            roles.meanings.add("added")
        if node.op_type in ARITHMETIC and _is_integer(step.value):
            roles.current.extend(
                sizes for value in node.inputs if (sizes := self._sizes(value, step.frame)) is not None
            )
        self._note_vocabulary(roles, node, step.frame)
        if key in MEANINGS:
            meaning = MEANINGS[key]
            roles.meanings.add("size" if step.part and meaning in ("reshape", "ones", "expand") else meaning)
            if meaning in ("reshape", "ones", "expand", "size", "split") and not step.part:
                roles.suggested.append(suggestion(node, index))
            if meaning == "split":
                axis = _integer(node, "axis", 0, step.frame)
                roles.totals.append(self._size(node.inputs[0], step.frame, axis))
            elif (node.op_type, index) in BOUNDS and not step.part:
                source, _ = self._resolved(node.inputs[0], step.frame)
                if index and source is not None and source.shape is not None:
                    roles.current.append(self._named(source.shape))

    def _note_compared(self, roles: Roles, step: _Step, node: ir.Node, other: int) -> None:
        """Note what a value is compared with that is no constant: sizes to count up to, or values to share."""
        value = node.inputs[other]
        if value is None or is_constant(value):
            return
        if _is_integer(step.value) and step.scale == 1 and step.offset == 0:
            sizes = self._sizes(value, step.frame)
            if sizes and len(set(sizes)) == 1 and sizes[0] is not None:
                roles.limits.append(Limit(sizes[0], low=1, inclusive=True))
                return
        if node.op_type == "Equal":
            roles.meanings.add("matched")

    def _note_vocabulary(self, roles: Roles, node: ir.Node, frame: _Frame | None) -> None:
        if node.op_type == "RegexFullMatch" and "pattern" in node.attributes:
            roles.patterns.append(node.attributes.get_string("pattern") or "")
        for name in VOCABULARIES:
            attribute = node.attributes.get(name)
            if attribute is not None and not attribute.is_ref():
                roles.known.extend(_plain(item) for item in np.asarray(_listed(attribute)).reshape(-1))

    def _sizes(self, value: ir.Value | None, frame: _Frame | None) -> tuple[int | str | None, ...] | None:
        """The sizes that an integer tensor holds or counts up to, where it comes from a Shape; or None."""
        for _ in range(20):
            value, frame = self._resolved(value, frame)
            node = None if value is None else value.producer()
            if node is None:
                return None
            if node.op_type == "Shape":
                source, _ = self._resolved(node.inputs[0], frame)
                if source is None or source.shape is None:
                    return None
                start = node.attributes.get_int("start", 0) or 0
                return self._named(source.shape)[start : node.attributes.get_int("end", None)]
            if node.op_type == "Gather":
                data, indices = self._sizes(node.inputs[0], frame), constant_array(node.inputs[1], limit=16)
                if data is None or indices is None or any(not -len(data) <= i < len(data) for i in indices.flat):
                    return None
                return tuple(data[int(i)] for i in indices.flat)
            if node.op_type == "Range":
                value = node.inputs[1]
            elif node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape"):
                value = node.inputs[0]
            else:
                return None
        return None

    def _named(self, shape: ir.Shape) -> tuple[int | str | None, ...]:
        """A shape's sizes: numbers, symbols of the model's inputs, None for the rest."""
        return tuple(
            size if isinstance(size, int) else size.value if str(size) in self._symbols else None for size in shape
        )

    def _onward(self, step: _Step, node: ir.Node, index: int) -> Iterator[_Step]:
        """The values that a consumer passes the step's values on to."""
        frame = step.frame
        identifier = node.op_identifier()
        if identifier in self.model.functions:
            function = self.model.functions[identifier]
            inside = _Frame(node, function, frame)
            if index < len(function.inputs) and _depth(inside) < 20:
                yield dataclasses.replace(step, value=function.inputs[index], frame=inside)
            return
        carried = PASS_ON.get(node.op_type, ())
        if step.derived and node.op_type in ARITHMETIC:
            yield from (dataclasses.replace(step, value=output) for output in node.outputs)
        elif carried is None or index in carried:
            part = step.part or (node.op_type == "Concat" and len(node.inputs) > 1)
            yield from (dataclasses.replace(step, value=output, part=part) for output in node.outputs)
        elif node.op_type in ARITHMETIC and _is_integer(step.value):
            constant = scalar(node.inputs[1 - index])
            if node.op_type in ("Div", "Mod") or constant is None:
                yield _Step(node.outputs[0], frame, part=step.part, derived=True)
            elif isinstance(constant, int) and not isinstance(constant, bool):
                if node.op_type == "Add":
                    yield _Step(node.outputs[0], frame, step.scale, step.offset + constant, step.part)
                elif node.op_type == "Sub" and index == 0:
                    yield _Step(node.outputs[0], frame, step.scale, step.offset - constant, step.part)
                elif node.op_type == "Mul" and constant > 0:
                    scaled = (step.scale * constant, step.offset * constant)
                    yield _Step(node.outputs[0], frame, *scaled, step.part)
        elif node.op_type == "Loop" and index >= 2:
            yield dataclasses.replace(step, value=node.attributes["body"].as_graph().inputs[index], part=False)
        elif node.op_type == "Scan":
            inputs = node.attributes["body"].as_graph().inputs
            if index < len(inputs):
                yield dataclasses.replace(step, value=inputs[index], part=False)

    def _returns(self, step: _Step) -> Iterator[_Step]:
        """Where a value goes that a body or a function returns."""
        for graph, index in self._returned.get(step.value, ()):
            frame = step.frame
            if graph in self._owner:
                node = self._owner[graph]
                if node.op_type == "Loop":
                    if index == 0:
                        continue
                    if index - 1 < len(node.inputs) - 2:
                        yield dataclasses.replace(step, value=graph.inputs[index + 1], part=False)
                    index -= 1
                if index < len(node.outputs):
                    yield dataclasses.replace(step, value=node.outputs[index], part=False)
            elif frame is not None and graph is frame.function.graph and index < len(frame.node.outputs):
                yield dataclasses.replace(step, value=frame.node.outputs[index], frame=frame.parent)

    def _limit(self, step: _Step, node: ir.Node, index: int) -> Limit:
        data, attribute, axis = INDEXERS[(_qualified(node), index)]
        if node.op_type in ("GatherND", "ScatterND"):
            shape = static_sizes(step.value)
            batch = _integer(node, "batch_dims", 0, step.frame)
            depth = shape[-1] if shape else 1
            sizes = [self._size(node.inputs[data], step.frame, batch + k) for k in range(max(depth, 1))]
            known = [size for size in sizes if isinstance(size, int)]
            size = min(known) if len(known) == len(sizes) else sizes[0] if len(sizes) == 1 else None
        else:
            if attribute is not None:
                axis = _integer(node, attribute, axis, step.frame)
            size = self._size(node.inputs[data], step.frame, axis)
        return Limit(size, offset=step.offset, scale=step.scale, unique=node.op_type in SCATTERS)

    def _resolved(self, value: ir.Value | None, frame: _Frame | None) -> tuple[ir.Value | None, _Frame | None]:
        """What a function's input stands for at the call."""
        while value is not None and frame is not None and value in frame.function.inputs:
            position = list(frame.function.inputs).index(value)
            value = frame.node.inputs[position] if position < len(frame.node.inputs) else None
            frame = frame.parent
        return value, frame

    def _size(self, value: ir.Value | None, frame: _Frame | None, axis: int) -> int | str | None:
        """The size of an axis: a number, a symbol of the model's inputs, or None."""
        for _ in range(20):
            value, frame = self._resolved(value, frame)
            if value is None:
                return None
            shape: Any = value.shape
            if shape is None and value.const_value is not None:
                shape = value.const_value.shape
            if shape is None:
                constant = constant_array(value)
                shape = None if constant is None else constant.shape
            if shape is not None:
                if not -len(shape) <= axis < len(shape):
                    return None
                size = shape[axis]
                if isinstance(size, (int, np.integer)):
                    return int(size)
                name = size.value
                return name if isinstance(name, str) and name in self._symbols else None
            producer = value.producer()
            if producer is None or not producer.inputs:
                return None
            if producer.op_type == "Shape":
                source, _ = self._resolved(producer.inputs[0], frame)
                return None if source is None or source.shape is None else len(source.shape)
            if producer.op_type not in ("Cast", "Identity", "DequantizeLinear", "QuantizeLinear"):
                return None
            value = producer.inputs[0]
        return None


def _qualified(node: ir.Node) -> str:
    """An operator's name, with its domain unless that is a standard one."""
    return node.op_type if node.domain in ("", "ai.onnx", "ai.onnx.ml") else f"{node.domain}.{node.op_type}"


def _depth(frame: _Frame | None) -> int:
    return 0 if frame is None else 1 + _depth(frame.parent)


def _integer(node: ir.Node, name: str, default: int, frame: _Frame | None) -> int:
    """An integer attribute, looked up at the call where a function refers to its caller's."""
    attribute = node.attributes.get(name)
    while attribute is not None and attribute.is_ref():
        if frame is None:
            return default
        referred = attribute.ref_attr_name
        attribute = frame.node.attributes.get(referred or "") or frame.function.attributes.get(referred or "")
        frame = frame.parent
    return default if attribute is None or attribute.value is None else attribute.as_int()


def _listed(attribute: ir.Attr) -> Any:
    return attribute.value.numpy() if attribute.type == ir.AttributeType.TENSOR else attribute.value


def _plain(item: Any) -> Scalar:
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    found = item.item() if hasattr(item, "item") else item
    return found if isinstance(found, (int, float)) else str(found)


def _is_integer(value: ir.Value) -> bool:
    # Inside functions and bodies types are often not written down; indices are what passes through Add there.
    return value.dtype is None or value.dtype.is_integer()
