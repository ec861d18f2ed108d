"""What each input of a model is for: an index, a mask, a size, a switch, a signal that convolutions read.

The consumers of every input are followed through operators that pass values on (casts, reshapes,
concatenations), into subgraphs and function calls, to the operators that give the values a meaning. Nothing
is computed and no weight is touched, except constants of one element.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graphs import constant_array, nested_graphs, subgraphs

Scalar = int | float | bool | str

# Operators whose output holds values of this input (None: of any input).
_PASS_ON: dict[str, tuple[int, ...] | None] = {
    "Identity": (0,),
    "Cast": (0,),
    "CastLike": (0,),
    "Reshape": (0,),
    "Unsqueeze": (0,),
    "Squeeze": (0,),
    "Flatten": (0,),
    "Transpose": (0,),
    "Expand": (0,),
    "Tile": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Concat": None,
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Clip": (0,),
    "Where": (1, 2),
    "Max": None,
    "Min": None,
    "Pad": (0,),
    "Dropout": (0,),
    "Trilu": (0,),
    "ReduceMax": (0,),
    "ReduceMin": (0,),
    "Not": (0,),
    "And": None,
    "Or": None,
}

# What an input of an operator means for the values that may be fed to it.
_MEANINGS: dict[tuple[str, int], str] = {
    ("Where", 0): "condition",
    ("If", 0): "switch",
    ("Loop", 0): "trip_count",
    ("Loop", 1): "loop_condition",
    ("Compress", 1): "condition",
    ("Reshape", 1): "reshape",
    ("Expand", 1): "ones",
    ("Tile", 1): "repeats",
    ("Slice", 1): "zero",
    ("Slice", 2): "large",
    ("Slice", 3): "axes",
    ("Slice", 4): "ones",
    ("Pad", 1): "pads",
    ("Pad", 3): "axes",
    ("TopK", 1): "count",
    ("ConstantOfShape", 0): "size",
    ("Range", 0): "zero",
    ("Range", 1): "size",
    ("Range", 2): "ones",
    ("Unsqueeze", 1): "axes",
    ("Squeeze", 1): "axes",
    ("CumSum", 1): "zero",
    ("CumProd", 1): "zero",
    ("Split", 1): "split",
    ("SplitToSequence", 1): "ones",
    ("DFT", 1): "size",
    ("DFT", 2): "ones",
    ("STFT", 1): "ones",
    ("STFT", 3): "size",
    ("HannWindow", 0): "size",
    ("HammingWindow", 0): "size",
    ("BlackmanWindow", 0): "size",
    ("Col2Im", 1): "size",
    ("Col2Im", 2): "ones",
    ("AffineGrid", 1): "size",
    ("Trilu", 1): "zero",
    ("OneHot", 1): "depth",
    ("Resize", 1): "positive",
    ("Resize", 2): "scales",
    ("Upsample", 1): "scales",
    ("Resize", 3): "size",
    ("NonMaxSuppression", 2): "size",
    ("NonMaxSuppression", 3): "unit_interval",
    ("NonMaxSuppression", 4): "unit_interval",
    ("Dropout", 1): "unit_interval",
    ("Dropout", 2): "never",
    ("SequenceAt", 1): "zero",
    ("SequenceInsert", 2): "zero",
    ("SequenceErase", 1): "zero",
    ("BitShift", 1): "size",
    ("Clip", 1): "lower",
    ("Clip", 2): "upper",
    ("Div", 1): "nonzero",
    ("Mod", 1): "nonzero",
    ("Reciprocal", 0): "nonzero",
    ("Pow", 0): "positive",
    ("Log", 0): "positive",
    ("Sqrt", 0): "positive",
    ("Acosh", 0): "above_one",
    ("Asin", 0): "unit",
    ("Acos", 0): "unit",
    ("Atanh", 0): "unit",
    ("BatchNormalization", 4): "positive",
    ("QuantizeLinear", 1): "positive",
    ("DequantizeLinear", 1): "positive",
    ("Attention", 3): "additive",
    **{(f"Reduce{kind}", 1): "axes" for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare")},
    ("ReduceLogSum", 1): "axes",
    ("ReduceLogSumExp", 1): "axes",
}

# (operator, input that holds indices) -> (input that is indexed, attribute naming the axis, its default)
_INDEXERS: dict[tuple[str, int], tuple[int, str | None, int]] = {
    ("Gather", 1): (0, "axis", 0),
    ("GatherElements", 1): (0, "axis", 0),
    ("ScatterElements", 1): (0, "axis", 0),
    ("Scatter", 1): (0, "axis", 0),
    ("GatherND", 1): (0, None, 0),
    ("ScatterND", 1): (0, None, 0),
    ("RotaryEmbedding", 3): (1, None, 0),
    ("ArrayFeatureExtractor", 1): (0, None, -1),
    ("SoftmaxCrossEntropyLoss", 1): (0, None, 1),
    ("NegativeLogLikelihoodLoss", 1): (0, None, 1),
    ("com.microsoft.GatherBlockQuantized", 1): (0, "gather_axis", 0),
    ("com.microsoft.EmbedLayerNormalization", 0): (2, None, 0),
    ("com.microsoft.EmbedLayerNormalization", 1): (4, None, 0),
    ("com.microsoft.EmbedLayerNormalization", 8): (3, None, 0),
    ("com.microsoft.RotaryEmbedding", 1): (2, None, 0),
}
# (operator, input that holds lengths) -> (input that they measure, along which axis)
_LENGTHS: dict[tuple[str, int], tuple[int, int]] = {
    ("ReverseSequence", 1): (0, 0),
    ("LSTM", 4): (0, 0),
    ("GRU", 4): (0, 0),
    ("RNN", 4): (0, 0),
    ("Attention", 6): (1, -2),
}
_SCATTERS = frozenset({"ScatterElements", "Scatter", "ScatterND"})
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
}
# Operators that a signal crosses unchanged in layout on its way to a convolution.
_ELEMENTWISE = frozenset(
    [
        "Identity",
        "Cast",
        "Pad",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Clip",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Sigmoid",
        "Tanh",
        "Neg",
        "Abs",
        "Sqrt",
        "Pow",
        "Exp",
        "Log",
        "BatchNormalization",
        "InstanceNormalization",
        "QuantizeLinear",
        "DequantizeLinear",
        "Dropout",
        "Where",
        "Max",
        "Min",
    ]
)
_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})


@dataclass(frozen=True)
class Limit:
    """Indices into an axis: at least ``low``, below ``size`` (after ``index * scale + offset``).

    ``size`` is a number, the name of a symbolic size, or None where nobody knows.
    """

    size: int | str | None
    low: int = 0
    offset: int = 0
    scale: int = 1
    unique: bool = False


@dataclass
class Roles:
    """What was found out about one input."""

    limits: list[Limit] = field(default_factory=list)
    equals: list[Scalar] = field(default_factory=list)
    thresholds: list[Scalar] = field(default_factory=list)
    meanings: set[str] = field(default_factory=set)
    suggested: list[tuple[int, ...] | None] = field(default_factory=list)  # of a size input: what fits


@dataclass(frozen=True)
class _Frame:
    """A function call that is being looked into: the calling node, and the call around it."""

    node: ir.Node
    function: ir.Function
    parent: _Frame | None


@dataclass(frozen=True)
class _Step:
    """A value that holds an input's values, times ``scale`` plus ``offset``; ``part``: among others."""

    value: ir.Value
    frame: _Frame | None
    scale: int = 1
    offset: int = 0
    part: bool = False


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
        seen: set[tuple[ir.Value, _Frame | None]] = set()
        pending = [_Step(value, None)]
        while pending:
            step = pending.pop()
            if (step.value, step.frame) in seen:
                continue
            seen.add((step.value, step.frame))
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
        if value.shape is None:
            return {}
        found: dict[int, int] = {}
        start: tuple[int | None, ...] = tuple(range(len(value.shape)))
        seen: set[ir.Value] = set()
        pending: list[tuple[ir.Value, tuple[int | None, ...]]] = [(value, start)]
        while pending:
            current, axes = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            for node, index in current.uses():
                if not self._reached(node, switches):
                    continue
                for offset, width in enumerate(reversed(_window(node, index))):
                    axis = axes[-1 - offset] if offset < len(axes) else None
                    if axis is not None:
                        found[axis] = max(found.get(axis, 1), width)
                moved = _moved(node, index, axes)
                if moved is not None:
                    pending.extend((output, moved) for output in node.outputs[:1])
        return found

    def _reached(self, node: ir.Node, switches: Mapping[str, Scalar]) -> bool:
        """Whether a node runs, as far as ``switches`` decide it."""
        graph = node.graph
        while isinstance(graph, ir.Graph) and graph in self._owner:
            owner = self._owner[graph]
            if owner.op_type == "If" and owner.inputs[0] is not None:
                taken = _evaluate(owner.inputs[0], switches)
                branch = owner.attributes["then_branch"].as_graph()
                if taken is not None and bool(taken) != (graph is branch):
                    return False
            graph = owner.graph
        return True

    def _note(self, roles: Roles, step: _Step, node: ir.Node, index: int) -> None:
        key = (_qualified(node), index)
        if node.domain not in _KNOWN_DOMAINS and node.op_identifier() not in self.model.functions:
            roles.meanings.add("opaque")
        if key in _INDEXERS:
            roles.limits.append(self._limit(step, node, index))
        elif key in _LENGTHS:
            size = self._size(node.inputs[_LENGTHS[key][0]], step.frame, _LENGTHS[key][1])
            roles.limits.append(Limit(size + 1 if isinstance(size, int) else size, low=1))
        elif key == ("OneHot", 0):
            depth = constant_array(node.inputs[1], limit=1)
            roles.limits.append(Limit(None if depth is None else int(depth.reshape(()))))
        elif node.op_type in _COMPARISONS:
            constant = _scalar(self._resolved(node.inputs[1 - index], step.frame)[0])
            if (
                constant is not None
                and step.scale == 1
                and isinstance(constant, str) == (step.value.dtype == ir.DataType.STRING)
            ):
                known = roles.equals if node.op_type == "Equal" else roles.thresholds
                known.append(constant if isinstance(constant, str) else constant - step.offset)
        elif node.op_type == "Sub" and index == 1 and _scalar(node.inputs[0]) == 1:
            roles.meanings.add("complement")  # 1 - mask
        elif node.op_type == "Add":
            roles.meanings.add("added")
        if key in _MEANINGS:
            meaning = _MEANINGS[key]
            roles.meanings.add("size" if step.part and meaning in ("reshape", "ones") else meaning)
            if meaning in ("reshape", "ones", "size", "split") and not step.part:
                roles.suggested.append(_suggestion(node))

    def _onward(self, step: _Step, node: ir.Node, index: int) -> Iterator[_Step]:
        """The values that a consumer passes the step's values on to."""
        frame = step.frame
        identifier = node.op_identifier()
        if identifier in self.model.functions:
            function = self.model.functions[identifier]
            inside = _Frame(node, function, frame)
            if index < len(function.inputs) and _depth(inside) < 20:
                yield _Step(function.inputs[index], inside, step.scale, step.offset, step.part)
            return
        carried = _PASS_ON.get(node.op_type, ())
        if carried is None or index in carried:
            part = step.part or (node.op_type == "Concat" and len(node.inputs) > 1)
            yield from (_Step(output, frame, step.scale, step.offset, part) for output in node.outputs)
        elif node.op_type in ("Add", "Sub", "Mul") and _is_integer(step.value):
            constant = _scalar(node.inputs[1 - index])
            if isinstance(constant, int) and not isinstance(constant, bool):
                if node.op_type == "Add":
                    yield _Step(node.outputs[0], frame, step.scale, step.offset + constant, step.part)
                elif node.op_type == "Sub" and index == 0:
                    yield _Step(node.outputs[0], frame, step.scale, step.offset - constant, step.part)
                elif node.op_type == "Mul" and constant > 0:
                    scaled = (step.scale * constant, step.offset * constant)
                    yield _Step(node.outputs[0], frame, *scaled, step.part)
        elif node.op_type == "Loop" and index >= 2:
            yield _Step(node.attributes["body"].as_graph().inputs[index], frame, step.scale, step.offset)
        elif node.op_type == "Scan":
            inputs = node.attributes["body"].as_graph().inputs
            if index < len(inputs):
                yield _Step(inputs[index], frame, step.scale, step.offset)

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
                        yield _Step(graph.inputs[index + 1], frame, step.scale, step.offset)
                    index -= 1
                if index < len(node.outputs):
                    yield _Step(node.outputs[index], frame, step.scale, step.offset)
            elif frame is not None and graph is frame.function.graph and index < len(frame.node.outputs):
                yield _Step(frame.node.outputs[index], frame.parent, step.scale, step.offset, step.part)

    def _limit(self, step: _Step, node: ir.Node, index: int) -> Limit:
        data, attribute, axis = _INDEXERS[(_qualified(node), index)]
        if node.op_type in ("GatherND", "ScatterND"):
            shape = _static(step.value)
            batch = _integer(node, "batch_dims", 0, step.frame)
            depth = shape[-1] if shape else 1
            sizes = [self._size(node.inputs[data], step.frame, batch + k) for k in range(max(depth, 1))]
            known = [size for size in sizes if isinstance(size, int)]
            size = min(known) if len(known) == len(sizes) else sizes[0] if len(sizes) == 1 else None
        else:
            if attribute is not None:
                axis = _integer(node, attribute, axis, step.frame)
            size = self._size(node.inputs[data], step.frame, axis)
        return Limit(size, offset=step.offset, scale=step.scale, unique=node.op_type in _SCATTERS)

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


def _suggestion(node: ir.Node) -> tuple[int, ...] | None:
    """The sizes that a node's declared outputs imply for its size input, or None."""
    if node.op_type not in ("Split", "SplitToSequence"):
        return _static(node.outputs[0])
    axis = node.attributes.get_int("axis", 0)
    shapes = [_static(output) for output in node.outputs]
    return tuple(shape[axis or 0] for shape in shapes if shape)


def _static(value: ir.Value) -> tuple[int, ...] | None:
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else None


def _is_integer(value: ir.Value) -> bool:
    # Inside functions and bodies types are often not written down; indices are what passes through Add there.
    return value.dtype is None or value.dtype.is_integer()


def _scalar(value: ir.Value | None) -> Scalar | None:
    """The value of a constant of one element, as a Python scalar."""
    array = constant_array(value, limit=1)
    if array is None or array.size != 1:
        return None
    item = array.reshape(-1)[0]
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    found = item.item() if hasattr(item, "item") else item
    return found if isinstance(found, (bool, int, float, str)) else float(found)


def _evaluate(value: ir.Value, switches: Mapping[str, Scalar], depth: int = 20) -> Scalar | None:
    """The value of a scalar that follows from ``switches`` and constants alone, or None."""
    if value.is_graph_input() and value.name is not None and value.name in switches:
        return switches[value.name]
    constant = _scalar(value)
    if constant is not None:
        return constant
    node = value.producer()
    if node is None or depth == 0 or not node.inputs or any(item is None for item in node.inputs):
        return None
    if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Not"):
        first = node.inputs[0]
        inner = None if first is None else _evaluate(first, switches, depth - 1)
        if inner is None:
            return None
        if node.op_type == "Not":
            return not inner
        return bool(inner) if value.dtype == ir.DataType.BOOL and not isinstance(inner, str) else inner
    if node.op_type in _COMPARISONS or node.op_type in ("And", "Or"):
        operands = [_evaluate(item, switches, depth - 1) for item in node.inputs if item is not None]
        if len(operands) != 2 or operands[0] is None or operands[1] is None:
            return None
        if node.op_type == "And":
            return bool(operands[0]) and bool(operands[1])
        if node.op_type == "Or":
            return bool(operands[0]) or bool(operands[1])
        return bool(_COMPARISONS[node.op_type](operands[0], operands[1]))
    return None


def _window(node: ir.Node, index: int) -> list[int]:
    """The extents of the window that a node slides over the last axes of its input ``index``; [] if none."""
    if index != 0:
        return []
    kernel = list(node.attributes.get_ints("kernel_shape", ()) or ())
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv", "FusedConv"):
        weight = node.inputs[3 if node.op_type == "QLinearConv" else 1]
        if not kernel and weight is not None and weight.shape is not None and weight.shape.is_static():
            kernel = list(weight.shape.numpy()[2:])
        if not kernel and weight is not None and weight.const_value is not None:
            kernel = list(weight.const_value.shape.numpy()[2:])
    elif node.op_type not in _POOLS:
        return []
    dilations = list(node.attributes.get_ints("dilations", ()) or ()) or [1] * len(kernel)
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=False)]


def _moved(node: ir.Node, index: int, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    """Where a signal's axes are after a node, or None where it ends."""
    if node.op_type in _ELEMENTWISE:
        return axes
    if index != 0:
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(axes))))
        return tuple(axes[axis] for axis in perm) if len(perm) == len(axes) else None
    if node.op_type in ("Unsqueeze", "Squeeze"):
        where = constant_array(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
        if where is None:
            return None
        positions = [int(axis) for axis in np.asarray(where).reshape(-1)]
        rank = len(axes) + len(positions) if node.op_type == "Unsqueeze" else len(axes)
        marked = {position % rank for position in positions}
        if node.op_type == "Squeeze":
            return tuple(axis for position, axis in enumerate(axes) if position not in marked)
        kept = iter(axes)
        return tuple(None if position in marked else next(kept) for position in range(rank))
    return None
