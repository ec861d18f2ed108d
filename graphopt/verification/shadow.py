"""T1: the original and every replacement side by side in one model.

While passes rewrite a model, the shadow keeps a copy of the original and adds to it the new nodes of each replacement,
fed with the *original's* values. One run then gives, for every replacement, the value that was replaced and the value
that took its place, from the same inputs: each replacement is judged alone, however many others it builds on, and all
of them cost one session.

Where a value takes the place of another that exists already, its readers read one value from then on and meant two.
The shadow remembers for each reader which of the two it meant, so that a wrong merge does not make right rewrites of
other readers look wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import read_instead
from graphopt.rewrite.application import Application, Checkpoint
from graphopt.rewrite.contract import Kind
from graphopt.verification.proofs import Proofs
from graphopt.verification.structure import sort_if_needed


@dataclass
class Pair:
    """A value of the original and what a replacement computes in its stead, both in the shadow."""

    application: Application
    original: ir.Value
    replacement: ir.Value
    boundary: tuple[ir.Value, ...]
    """What the replacement reads, as values of the shadow: the inputs of the replaced region."""
    merge: bool = False
    """Whether the replacement is a value that was there before."""
    doubtful: bool = False
    """Whether it builds on an earlier merge in a way that cannot be told apart, and is right only if that is."""
    random: bool = False
    """Whether the replacement draws random numbers, so that its value is never the original's."""


@dataclass
class Epoch:
    """The model at a time, with what was replaced from then on.

    Attributes:
        model: A copy, with the replacements beside.
        begins_at: How many applications were made before it.
        lossy_before: Whether a lossy pass changed the model since the epoch before began.
        bitwise_before: Whether everything since then, or since the original, promises the same bits.
        pairs: What was replaced.
    """

    model: ir.Model
    begins_at: int = 0
    lossy_before: bool = False
    bitwise_before: bool = True
    pairs: list[Pair] = field(default_factory=list)


# How far a replaced region without new nodes is followed back: what bypasses something seldom bypasses more.
_MERGE_REGION = 8
_REGION = 200
# Elements of a constant that is looked for among those that the shadow has.
_SMALL = 16
# So many nodes take the runtime long enough to load that passes had better go on meanwhile.
_LARGE = 5_000


class Shadow:
    """Watches replacements in a model and mirrors them beside a copy of the original.

    A new copy, an epoch, begins where the model and the original part: after a pass that changed the model behind the
    context's back, and before and after a lossy one, so that what follows is judged by what it was given.

    Args:
        model: The model before any replacement. It is cloned; tensors are shared.
        closed: Told of each epoch when nothing more will be added to it.

    Attributes:
        epochs: The first one holds the original.
        proved: Keys of applications that need not be run to see that they change nothing.
        unknown: Keys of applications on values that the shadow does not have.
    """

    def __init__(self, model: ir.Model, closed: Callable[[Epoch], None] | None = None) -> None:
        self.epochs: list[Epoch] = []
        self.proved: dict[str, None] = {}
        self.unknown: dict[str, None] = {}
        self._closed = closed or (lambda epoch: None)
        self._contents: dict[int, tuple[ir.TensorProtocol, object | None]] = {}
        self._count = 0
        self._applications = 0
        self._bitwise = True
        self._begin(model)

    def _begin(self, model: ir.Model, *, lossy: bool = False) -> None:
        self._source = model
        self._values: dict[ir.Value, ir.Value] = {}
        self._graphs: dict[ir.Graph, ir.Graph] = {}
        self._outer: dict[ir.Graph, ir.Graph] = {}
        # Reader of a value that took the place of another -> the value that it meant; and the values with such readers.
        self._meant: dict[tuple[ir.Node, int], ir.Value] = {}
        self._merged: set[ir.Value] = set()
        self._constants: dict[tuple[ir.Graph, object], ir.Value] = {}
        self._proofs = Proofs()
        # Function bodies cannot be looked into, so they are cloned the library's way and not mirrored.
        copy = ir.Model(
            self._clone(model.graph),
            ir_version=model.ir_version,
            functions=[function.clone() for function in model.functions.values()],
        )
        self.epochs.append(Epoch(copy, self._applications, lossy_before=lossy, bitwise_before=self._bitwise))
        self._nodes = sum(len(copied) for copied in self._graphs.values())

    def _begin_anew(self, model: ir.Model, *, lossy: bool = False) -> None:
        self._close()
        self._bitwise = self._bitwise or lossy
        self._begin(model, lossy=lossy)

    def rewritten(self, model: ir.Model) -> None:
        """A foreign pass changed the model: what it did is judged with the whole model, what follows one by one."""
        self._applications += 1
        self._bitwise = False
        self._begin_anew(model)

    def checkpoint(self, model: ir.Model, reached: Checkpoint) -> None:
        """Begin a new epoch where that is called for (see ``graphopt.rewrite.application.Observer``)."""
        current = self.epochs[-1]
        lossy = reached is Checkpoint.AFTER_LOSSY
        if self._applications == current.begins_at:
            if lossy:  # a foreign pass, which has begun an epoch already
                current.lossy_before = current.bitwise_before = self._bitwise = True
        elif lossy or reached is Checkpoint.BEFORE_LOSSY or self._is_worth_it(model):
            self._begin_anew(model, lossy=lossy)

    def _is_worth_it(self, model: ir.Model) -> bool:
        """Whether so much of a large model is done that the runtime may load that part while passes go on."""
        return len(self.epochs) == 1 and self._nodes >= _LARGE and 4 * graphs.count_nodes(model) <= 3 * self._nodes

    def replacing(
        self, application: Application, outputs: Mapping[ir.Value, ir.Value], nodes: Sequence[ir.Node]
    ) -> None:
        """Mirror a replacement (see ``graphopt.rewrite.application.Observer``)."""
        self._applications += 1
        self._bitwise = self._bitwise and application.kind is Kind.BITWISE
        if not outputs or application.kind is Kind.LOSSY:  # what is lossy is for the user's budget to judge
            return
        first = next(iter(outputs))
        producer = first.producer()
        owner = producer.graph if producer is not None else first.graph
        graph = self._graphs.get(owner) if owner is not None else None
        if graph is None:
            return
        if not nodes and self._are_proved(outputs):
            self.proved[application.key] = None
            return
        reads = {value for node in nodes for value in graphs.read_by(node)}
        old_values = [*outputs, *reads.difference(v for n in nodes for v in n.outputs), *outputs.values()]
        if any(v not in self._values and v.const_value is None for v in old_values if v.producer() not in nodes):
            self.unknown[application.key] = None
            return
        meant, doubtful = self._meanings(outputs, reads, graph)
        made: set[ir.Value] = set()
        boundary: dict[ir.Value, None] = {}
        beside = self._values[first].producer()
        if beside is not None and beside.graph is not graph:
            beside = None
        for node in nodes:
            for value in graphs.read_by(node):
                if value not in made and value.const_value is None:
                    boundary[self._mirror(value, graph, meant)] = None
            copy = self._copy(node, graph, meant)
            # Next to what it replaces: its inputs are at hand there, and the runtime sorts slowly where nodes wait.
            if beside is None:
                graph.append(copy)
            else:
                graph.insert_after(beside, copy)
            beside = copy
            made.update(node.outputs)
        random = any(n.op_type in graphs.RANDOM for node in nodes for n in _with_nested(node))
        for old, new in outputs.items():
            merge = new not in made and new in self._values
            original = self._values[old]
            replacement = self._mirror(new, graph, meant)
            if self._proofs.are_same(original, replacement):
                self.proved[application.key] = None
                continue
            pair = Pair(application, original, replacement, tuple(boundary), merge, doubtful, random)
            self.epochs[-1].pairs.append(pair)
            if merge:
                for use in old.uses():
                    self._meant.setdefault((use.node, use.idx), original)
                self._merged.add(new)
            elif new in made:
                # Whoever reads the replacement from here on is fed with the original's value.
                self._values[new] = original

    def _are_proved(self, outputs: Mapping[ir.Value, ir.Value]) -> bool:
        """Whether every value gives way to one that was there before and is proved to be the same."""
        values = self._values
        return all(
            new in values and old in values and self._proofs.are_same(values[old], values[new])
            for old, new in outputs.items()
        )

    def _meanings(
        self, outputs: Mapping[ir.Value, ir.Value], reads: set[ir.Value], graph: ir.Graph
    ) -> tuple[dict[ir.Value, ir.Value], bool]:
        """What the replaced region meant by the merged values that the replacement reads.

        Returns:
            Merged value -> the value meant, and whether the region meant something else in a way that this cannot say.
        """
        ends = reads.union(outputs.values())
        merging = not ends.isdisjoint(self._merged) if reads else bool(self._merged)
        if not merging:
            return {}, False
        meant: dict[ir.Value, ir.Value] = {}
        doubtful = False
        seen: set[ir.Node] = set()
        pending = [producer for old in outputs if (producer := old.producer()) is not None]
        limit = _REGION if reads else _MERGE_REGION
        while pending and len(seen) < limit:
            node = pending.pop(0)
            if node in seen:
                continue
            seen.add(node)
            for inner in _with_nested(node):
                for index, value in enumerate(inner.inputs):
                    if value is None:
                        continue
                    if value in self._merged and value in self._values:
                        found = self._meant.get((inner, index), self._values[value])
                        visible = self._is_visible(found, graph)
                        if value in ends and visible and meant.setdefault(value, found) is found:
                            continue
                        doubtful = doubtful or found is not self._values[value] or value in ends
                    if value not in ends and (producer := value.producer()) is not None:
                        pending.append(producer)
        return meant, doubtful

    def _is_visible(self, value: ir.Value, graph: ir.Graph) -> bool:
        """Whether nodes of a graph of the shadow can read a value of the shadow."""
        home = value.graph
        current: ir.Graph | None = graph
        while current is not None:
            if current is home:
                return True
            current = self._outer.get(current)
        return False

    def finish(self) -> None:
        """Close the last epoch. Call once, after the last replacement."""
        self._close()

    def _close(self) -> None:
        epoch = self.epochs[-1]
        for domain, version in self._source.opset_imports.items():
            epoch.model.opset_imports.setdefault(domain, version)
        sort_if_needed(epoch.model)
        self._closed(epoch)

    def _clone(self, graph: ir.Graph) -> ir.Graph:
        """A copy of a graph, remembering what each value became. (``Model.clone`` takes four times as long.)"""
        values = self._values
        for value in (*graph.inputs, *graph.initializers.values()):
            if value not in values:
                values[value] = ir.Value(
                    name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
                )
        nodes: list[ir.Node] = []
        bearers: list[ir.Node] = []
        constants: dict[object, ir.Value] = {}
        for node in graph:
            if node.op_type == "Constant" and (value := node.outputs[0]).name and not value.is_graph_output():
                tensor = graphs.constant_tensor(value)
                if tensor is not None:  # an initializer is the same, and there are so many of them
                    key = self._content(tensor) or value
                    if key not in constants:
                        constants[key] = ir.Value(
                            name=value.name, type=value.type, shape=value.shape, const_value=tensor
                        )
                    values[value] = constants[key]
                    continue
            outputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in node.outputs]
            attributes: list[ir.Attr] = list(node.attributes.values()) if node.attributes else []
            bears = graphs.has_subgraphs(node)
            if bears:
                attributes = [self._clone_attribute(attribute) for attribute in attributes]
            inputs = [None if value is None else values[value] for value in node.inputs]
            nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    attributes,
                    overload=node.overload,
                    outputs=outputs,
                    name=node.name,
                )
            )
            if bears:
                bearers.append(nodes[-1])
            values.update(zip(node.outputs, outputs, strict=True))
        copy = ir.Graph(
            [values[value] for value in graph.inputs],
            [values[value] for value in graph.outputs],
            nodes=nodes,
            initializers=[*(values[value] for value in graph.initializers.values()), *constants.values()],
            opset_imports=dict(graph.opset_imports),
            name=graph.name,
        )
        self._constants.update(((copy, key), value) for key, value in constants.items())
        self._graphs[graph] = copy
        self._outer.update((body, copy) for node in bearers for body in graphs.subgraphs(node))
        return copy

    def _nest(self, graph: ir.Graph) -> None:
        for node in graph:
            if graphs.has_subgraphs(node):
                self._outer.update((body, graph) for body in graphs.subgraphs(node))

    def _clone_attribute(self, attribute: ir.Attr) -> ir.Attr:
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
            return ir.AttrGraph(attribute.name, self._clone(attribute.as_graph()))
        if attribute.type is ir.AttributeType.GRAPHS and not attribute.is_ref():
            return ir.AttrGraphs(attribute.name, [self._clone(body) for body in attribute.as_graphs()])
        return attribute

    def _mirror(self, value: ir.Value, graph: ir.Graph, meant: Mapping[ir.Value, ir.Value]) -> ir.Value:
        found = meant.get(value) or self._values.get(value)
        if found is None:
            # A constant that came with the replacement.
            assert value.const_value is not None, f"{value.name} is not known to the shadow"
            found = self._values[value] = self._constant(value, value.const_value, graph)
        return found

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, graph: ir.Graph) -> ir.Value:
        """A constant of the shadow. Small ones come by the thousand and are mostly alike: one stands for all."""
        content = self._content(tensor)
        if content is not None and (graph, content) in self._constants:
            return self._constants[graph, content]
        made = ir.Value(name=self._name(), type=value.type, shape=value.shape, const_value=tensor)
        graph.register_initializer(made)
        if content is not None:
            self._constants[graph, content] = made
        return made

    def _content(self, tensor: ir.TensorProtocol) -> object | None:
        """What a small constant holds, to compare by; None for others."""
        if id(tensor) not in self._contents:
            content: object | None = None
            if tensor.size <= _SMALL and tensor.dtype != ir.DataType.STRING:
                content = tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
            self._contents[id(tensor)] = tensor, content  # the tensor is kept, or its number would be given away
        return self._contents[id(tensor)][1]

    def _copy(self, node: ir.Node, graph: ir.Graph, meant: Mapping[ir.Value, ir.Value]) -> ir.Node:
        inputs = [None if value is None else self._mirror(value, graph, meant) for value in node.inputs]
        attributes = []
        for name, attribute in node.attributes.items():
            if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
                attributes.append(ir.AttrGraph(name, self._copy_body(attribute.as_graph(), graph, meant)))
            else:
                attributes.append(attribute)
        outputs = [ir.Value(name=self._name(), type=v.type, shape=v.shape) for v in node.outputs]
        self._values.update(zip(node.outputs, outputs, strict=True))
        return ir.Node(
            node.domain, node.op_type, inputs, attributes, overload=node.overload, outputs=outputs,
            name=f"shadow/{self._count}",
        )  # fmt: skip

    def _copy_body(self, body: ir.Graph, graph: ir.Graph, meant: Mapping[ir.Value, ir.Value]) -> ir.Graph:
        copy = body.clone(allow_outer_scope_values=True)
        captured = graphs.captured_values(copy)
        self._map_graph(body, copy)
        mirrored = {value: self._mirror(value, graph, meant) for value in captured}
        self._outer[copy] = graph
        read_instead(copy, mirrored)
        return copy

    def _name(self) -> str:
        self._count += 1
        return f"shadow:{self._count}"

    def _map_graph(self, ours: ir.Graph, theirs: ir.Graph) -> None:
        self._graphs[ours] = theirs
        values = self._values
        values.update(zip(ours.inputs, theirs.inputs, strict=True))
        values.update((value, theirs.initializers[name]) for name, value in ours.initializers.items())
        self._nest(theirs)
        for node, copy in zip(ours, theirs, strict=True):
            values.update(zip(node.outputs, copy.outputs, strict=True))
            if graphs.has_subgraphs(node):
                for body, mirrored in zip(graphs.subgraphs(node), graphs.subgraphs(copy), strict=True):
                    self._map_graph(body, mirrored)


def _with_nested(node: ir.Node) -> Iterator[ir.Node]:
    """A node and every node in its bodies."""
    yield node
    if graphs.has_subgraphs(node):
        for body in graphs.subgraphs(node):
            for inner in graphs.nested_graphs(body):
                yield from inner


class Surface:
    """Brings values out of If branches so that a session can return them.

    A branch that is not taken returns an empty tensor in their place. Values in bodies of Loop and Scan, and in
    functions, cannot be brought out this way; they are judged with the whole model.
    """

    def __init__(self, model: ir.Model) -> None:
        self._main = model.graph
        self._owners: dict[ir.Graph, ir.Node] = {
            body: node
            for node in graphs.all_nodes(model)
            if graphs.has_subgraphs(node)
            for body in graphs.subgraphs(node)
        }
        self._found: dict[ir.Value, ir.Value | None] = {}
        self._count = 0
        self.added: set[ir.Value] = set()

    def bring_out(self, value: ir.Value) -> ir.Value | None:
        """The value of the main graph that shows ``value``, or None where there is no way."""
        if value not in self._found:
            self._found[value] = self._bring_out(value)
        return self._found[value]

    def _bring_out(self, value: ir.Value) -> ir.Value | None:
        producer = value.producer()
        graph = producer.graph if producer is not None else value.graph
        if graph is self._main:
            return value
        owner = self._owners.get(graph) if isinstance(graph, ir.Graph) else None
        dtype = value.dtype
        if owner is None or owner.op_type != "If" or producer is None or dtype is None:
            return None
        if not isinstance(value.type, ir.TensorType) or not isinstance(graph, ir.Graph):
            return None
        if value.is_graph_output():
            # The branch's own output also shows the other branch's value; this one must show nothing when not taken.
            self._count += 1
            copy = ir.Node("", "Identity", [value], name=f"copy/{self._count}")
            copy.outputs[0].name = f"copy:{self._count}"
            copy.outputs[0].type = value.type
            graph.append(copy)
            value = copy.outputs[0]
        for body in graphs.subgraphs(owner):
            body.outputs.append(value if body is graph else self._nothing(body, dtype))
        self._count += 1
        owner.resize_outputs(len(owner.outputs) + 1)
        shown = owner.outputs[-1]
        shown.name = f"surface:{self._count}"
        shown.type = value.type
        self.added.add(shown)
        return self.bring_out(shown)

    def _nothing(self, body: ir.Graph, dtype: ir.DataType) -> ir.Value:
        self._count += 1
        empty = ir.tensor(np.zeros((0,), dtype.numpy()), dtype=dtype)
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", empty)], name=f"nothing/{self._count}")
        node.outputs[0].name = f"nothing:{self._count}"
        node.outputs[0].type = ir.TensorType(dtype)
        body.append(node)
        return node.outputs[0]
