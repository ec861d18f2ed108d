"""Models of one module, each for some sizes of its inputs, made one: an If on the sizes picks.

Weights are stored once. Nodes that all models begin with stand before the If.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.exporting.branches.places import Place
from graphopt.exporting.sizes.guards import Guard

Axes = Mapping[str, Mapping[int, str]]  # input → axis → symbol

_RELATIONS = {
    "Equality": "Equal",
    "StrictGreaterThan": "Greater",
    "GreaterThan": "GreaterOrEqual",
    "StrictLessThan": "Less",
    "LessThan": "LessOrEqual",
}
_BITS = {"BitwiseFn_bitwise_and": "BitwiseAnd", "BitwiseFn_bitwise_or": "BitwiseOr"}
_CONNECTIVES = {"And": "And", "Or": "Or", "Not": "Not"}
_DIVISIONS = ("IntTrueDiv", "FloatTrueDiv")
_FOLDS = {"Add": "Add", "Mul": "Mul", "Max": "Max", "Min": "Min"}


def unite(models: Sequence[ir.Model], conditions: Sequence[Sequence[Guard]], axes: Axes) -> ir.Model:
    """One model that computes what the first of ``models`` does whose conditions hold, or the last.

    Args:
        models: With the same inputs and outputs, named alike. They are taken apart.
        conditions: For each but the last: what all must hold.
        axes: The dynamic axes of the inputs.

    Raises:
        GraphoptError: A condition has no form in ONNX, or the models give different types.
    """
    return _Union(models, axes).made(conditions)


class _Union:
    def __init__(self, models: Sequence[ir.Model], axes: Axes) -> None:
        self.models, self.axes = models, axes
        first = models[0]
        self.inputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in first.graph.inputs]
        self.outputs = [value.name or "" for value in first.graph.outputs]
        self.graph = ir.Graph(self.inputs, [], nodes=[], opset_imports=dict(first.opset_imports), name=first.graph.name)
        self.taken = {*(value.name or "" for value in self.inputs), *self.outputs}
        self.nodes: set[str] = set()
        self.stored: dict[tuple[Any, ...], ir.Value] = {}

    def made(self, conditions: Sequence[Sequence[Guard]]) -> ir.Model:
        for model in self.models:
            self.adopt(model)
        sides = self.shared([list(model.graph) for model in self.models])
        results = [list(model.graph.outputs) for model in self.models]
        for model in self.models:
            model.graph.outputs.clear()
        for model, nodes in zip(self.models, sides, strict=True):
            model.graph.remove(list(model.graph))
            for node in nodes:
                self.rename(node)
        writer = _Conditions(self.graph, self.inputs, self.axes, self.fresh)
        truths = [writer.all_of(guards) for guards in conditions]
        whole = self.branch(sides[-1], results[-1], "sizes_else")
        for index in reversed(range(len(truths))):
            name = self.node_name(_name(conditions[index]))
            node = ir.Node(
                "",
                "If",
                [truths[index]],
                [
                    ir.AttrGraph("then_branch", self.branch(sides[index], results[index], f"{name}_then")),
                    ir.AttrGraph("else_branch", whole),
                ],
                num_outputs=len(self.outputs),
                name=name,
            )
            for output, one, other in zip(node.outputs, results[index], whole.outputs, strict=True):
                output.name, output.type, output.shape = self.fresh(f"{one.name}"), one.type, _common(one, other)
            if index:
                whole = ir.Graph([], list(node.outputs), nodes=[node], name=f"{name}_{index}")
                continue
            self.graph.append(node)
            for output, wanted in zip(node.outputs, self.outputs, strict=True):
                output.name = wanted
                self.graph.outputs.append(output)
        first = self.models[0]
        return ir.Model(
            self.graph,
            ir_version=first.ir_version,
            producer_name=first.producer_name,
            producer_version=first.producer_version,
        )

    def adopt(self, model: ir.Model) -> None:
        """Make ``model`` read the union's inputs and weights."""
        graph = model.graph
        if [v.name for v in graph.outputs] != self.outputs or [v.dtype for v in graph.outputs] != [
            v.dtype for v in self.models[0].graph.outputs
        ]:
            raise GraphoptError("the module returns other outputs, or other types of them, at other sizes")
        for own, value in zip(self.inputs, list(graph.inputs), strict=True):
            value.replace_all_uses_with(own)
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            assert tensor is not None
            key = (str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
            if key not in self.stored:
                kept = ir.Value(name=self.fresh(value.name or "weight"), type=value.type, shape=value.shape)
                kept.const_value = tensor
                tensor.name = kept.name
                self.graph.register_initializer(kept)
                self.stored[key] = kept
            value.replace_all_uses_with(self.stored[key])

    def shared(self, sides: list[list[ir.Node]]) -> list[list[ir.Node]]:
        """Move what all ``sides`` begin with before the If; what remains of each."""
        identities: dict[Any, int] = {}
        made: list[dict[int, ir.Node]] = []
        for nodes in sides:
            known: dict[ir.Value, Any] = {}
            found: dict[int, ir.Node] = {}
            for node in nodes:
                key = _key(node, known)
                number = len(identities) if key is None else identities.setdefault(key, len(identities))
                if key is None:
                    identities[object()] = number
                for index, value in enumerate(node.outputs):
                    known[value] = (number, index)
                if key is not None:
                    found.setdefault(number, node)
            made.append(found)
        common = set(made[0]).intersection(*made[1:])
        moved = {
            node
            for number, node in made[0].items()
            if number in common and not any(v.is_graph_output() for found in made for v in found[number].outputs)
        }
        numbers = {number for number, node in made[0].items() if node in moved}
        remaining = []
        for nodes, found in zip(sides, made, strict=True):
            ours = {found[number]: number for number in numbers}
            remaining.append([node for node in nodes if node not in ours])
            for node, number in ours.items():
                for value, kept in zip(node.outputs, made[0][number].outputs, strict=True):
                    if value is not kept:
                        value.replace_all_uses_with(kept)
        for node in sides[0]:
            if node in moved:
                assert node.graph is not None
                node.graph.remove(node)
                self.rename(node)
                self.graph.append(node)
        return remaining

    def branch(self, nodes: list[ir.Node], outputs: list[ir.Value], name: str) -> ir.Graph:
        return ir.Graph([], outputs, nodes=nodes, name=name)

    # Names: each once in the whole model.

    def fresh(self, name: str) -> str:
        return _unique(name, self.taken)

    def node_name(self, name: str) -> str:
        return _unique(name, self.nodes)

    def rename(self, node: ir.Node) -> None:
        for inner in _with_inner(node):
            inner.name = self.node_name(inner.name or inner.op_type)
            for value in inner.outputs:
                value.name = self.fresh(value.name or "value")
            for attribute in inner.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    for value in attribute.as_graph().inputs:
                        value.name = self.fresh(value.name or "value")


def _unique(name: str, taken: set[str]) -> str:
    """``name``, or the first of ``name_2``, ``name_3``, … that is not in ``taken``; in it afterwards."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def _key(node: ir.Node, known: Mapping[ir.Value, Any]) -> Any:
    """The same for nodes that compute the same; None for one with a body."""
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return None
    attributes = tuple(sorted((key, _plain(attribute)) for key, attribute in node.attributes.items()))
    inputs = tuple(known.get(value, id(value)) if value is not None else None for value in node.inputs)
    return node.domain, node.op_type, node.overload, attributes, inputs, len(node.outputs)


def _plain(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype} {tensor.shape} {tensor.tobytes().hex()}"
    return repr(attribute.value)


def _common(one: ir.Value, other: ir.Value) -> ir.Shape | None:
    """The shape of a value that is either, of one rank."""
    if one.shape is None or other.shape is None:
        return None
    return ir.Shape([a if a == b else None for a, b in zip(one.shape, other.shape, strict=True)])


def _name(guards: Sequence[Guard]) -> str:
    place: Place | None = next((guard.place for guard in guards if guard.place is not None), None)
    return place.node_name("If") if place is not None else "If_sizes"


class _Conditions:
    """Truths about sizes as nodes."""

    def __init__(self, graph: ir.Graph, inputs: Sequence[ir.Value], axes: Axes, fresh: Any) -> None:
        self.graph, self.fresh = graph, fresh
        named = {value.name: value for value in inputs}
        self.axes = {symbol: (named[key], axis) for key, own in axes.items() for axis, symbol in own.items()}
        self.values: dict[Any, ir.Value] = {}

    def all_of(self, guards: Sequence[Guard]) -> ir.Value:
        truth: ir.Value | None = None
        for guard in guards:
            try:
                value = self.of(guard.expression)
            except _NoForm as error:
                where = f", at {guard.place}" if guard.place is not None else ""
                raise GraphoptError(f"a decision on sizes has no form in ONNX: {error}{where}") from error
            truth = value if truth is None else self.node("And", truth, value, dtype=ir.DataType.BOOL)
        return truth if truth is not None else self.constant(True)

    def of(self, expression: Any) -> ir.Value:
        if expression not in self.values:
            self.values[expression] = self.written(expression)
        return self.values[expression]

    def written(self, expression: Any) -> ir.Value:
        kind = type(expression).__name__
        if expression.is_Symbol:
            return self.size(expression.name)
        if expression.is_Integer:
            return self.constant(int(expression))
        if expression.is_Float or expression.is_Rational:
            return self.constant(float(expression))
        if expression.is_Boolean and not expression.args:
            return self.constant(bool(expression))
        values = [self.of(part) for part in expression.args]
        if kind in _CONNECTIVES or kind in _RELATIONS or kind == "Unequality":
            return self.truth(kind, values)
        if kind in _DIVISIONS:
            return self.node("Div", *(self.cast(value, ir.DataType.DOUBLE) for value in values))
        if kind == "ToFloat":
            return self.cast(values[0], ir.DataType.DOUBLE)
        if kind in _FOLDS:
            value, *others = values
            for other in others:
                value = self.node(_FOLDS[kind], value, other)
            return value
        if any(value.dtype != ir.DataType.INT64 for value in values):
            raise _NoForm(str(expression))
        if kind in _BITS:
            return self.node(_BITS[kind], *values)
        if kind in ("Mod", "PythonMod"):  # ONNX's Mod has the sign of the divisor, as Python's
            return self.node("Mod", *values)
        if kind in ("FloorDiv", "CleanDiv"):
            rest = self.node("Mod", *values)
            return self.node("Div", self.node("Sub", values[0], rest), values[1])
        if kind in ("Pow", "PowByNatural") and expression.args[1].is_Integer and expression.args[1] > 0:
            value = values[0]
            for _ in range(int(expression.args[1]) - 1):
                value = self.node("Mul", value, values[0])
            return value
        raise _NoForm(str(expression))

    def truth(self, kind: str, values: Sequence[ir.Value]) -> ir.Value:
        """What ``kind`` says of ``values``."""
        if kind == "Not":
            return self.node("Not", *values, dtype=ir.DataType.BOOL)
        if kind == "Unequality":
            return self.node("Not", self.truth("Equality", values), dtype=ir.DataType.BOOL)
        operator = _RELATIONS.get(kind) or _CONNECTIVES[kind]
        value, *others = values
        for other in others:
            value = self.node(operator, value, other, dtype=ir.DataType.BOOL)
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        return self.added(ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))]), dtype, [])

    def size(self, symbol: str) -> ir.Value:
        value, axis = self.axes[symbol]
        node = ir.Node("", "Shape", [value], [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)])
        vector = self.added(node, ir.DataType.INT64, [1])
        return self.added(ir.Node("", "Squeeze", [vector]), ir.DataType.INT64, [])

    def node(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        """A node on scalars, of the widest type among them; of ``dtype`` where it gives another."""
        if any(value.dtype == ir.DataType.DOUBLE for value in inputs):
            inputs = tuple(self.cast(value, ir.DataType.DOUBLE) for value in inputs)
        given = inputs[0].dtype if dtype is None else dtype
        assert given is not None
        return self.added(ir.Node("", op_type, inputs), given, [])

    def added(self, node: ir.Node, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        output = node.outputs[0]
        node.name = output.name = self.fresh(f"sizes_{node.op_type.lower()}")
        output.type, output.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.graph.append(node)
        return output

    def constant(self, value: float | bool) -> ir.Value:
        kinds: dict[type, Any] = {bool: np.bool_, int: np.int64, float: np.float64}
        array: Any = np.asarray(value, dtype=kinds[type(value)])
        name = self.fresh("sizes_constant")
        made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        made.type, made.shape = ir.TensorType(ir.DataType(made.const_value.dtype)), ir.Shape([])  # type: ignore[union-attr]
        self.graph.register_initializer(made)
        return made


class _NoForm(Exception):
    """An expression that cannot be written in ONNX."""
