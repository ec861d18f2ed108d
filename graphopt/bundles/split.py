"""A network with If, Loop and Scan as static blocks and a plan that says when each runs.

The nodes between control flow become blocks. Each node goes to the first block that can have it: conditions are known
as early as they can be, those that do not wait for each other come from one block, and the fewest blocks are left.
Bodies are split likewise, with what they take from around them as further inputs of their blocks, whatever the depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.plan import Block, Branch, Loop, Plan, Port, Run, Slice, Stack, State, Step
from graphopt.editing import read_instead
from graphopt.errors import BadInput
from graphopt.shapes import infer_shapes, trusted_shape

SPLIT = frozenset({"If", "Loop", "Scan"})
_SCAN = 9
"""The first opset whose Scan has no batch axis of its own; an older one stays in a block."""
_SEQUENCE_AND_OPTIONAL = {ir.SequenceType: "seq", ir.OptionalType: "optional"}
_RUNTIME_NAMES = {"FLOAT": "float", "DOUBLE": "double"}

Keep = Callable[[ir.Node], bool]


@dataclass(frozen=True)
class Split:
    """What a network was split into.

    Attributes:
        plan: Whose blocks have files of the names below.
        blocks: Name -> static network; their constants are those of the network, not copies.
        shared: How many runs take a block that an earlier one has.
    """

    plan: Plan
    blocks: dict[str, ir.Model]
    shared: int


def split(model: ir.Model, *, keep: Keep = lambda node: False) -> Split:
    """Split a network at its control flow.

    Args:
        model: Without functions; is changed (names are made unique, types inferred).
        keep: Which If, Loop and Scan stay inside a block.

    Raises:
        BadInput: The network has functions, inputs with defaults, or a value whose type is not known.
    """
    if model.functions:
        raise BadInput("the network has functions", hint="run the pass inline-functions first")
    for value in model.graph.inputs:
        if value.is_initializer():
            raise BadInput(
                f"the input '{value.name}' has a default; a bundle's inputs have none",
                hint="take the input away, or its default",
            )
    graphs.make_names_unique(model)
    infer_shapes(model)
    return _Splitter(model, keep).split()


@dataclass
class _Splitter:
    model: ir.Model
    keep: Keep
    blocks: dict[str, ir.Model] = field(default_factory=dict)
    described: dict[str, Block] = field(default_factory=dict)
    known: dict[str, tuple[str, list[str], list[str]]] = field(default_factory=dict)
    shared: int = 0
    made: int = 0

    def split(self) -> Split:
        graph = self.model.graph
        steps, results = self.steps(graph)
        plan = Plan(
            inputs=[port(value) for value in graph.inputs],
            outputs=[_declared(value) for value in graph.outputs],
            gives={output.name or "": name for output, name in zip(graph.outputs, results, strict=True)},
            blocks=self.described,
            steps=steps,
        )
        return Split(plan, self.blocks, self.shared)

    def steps(self, graph: ir.Graph) -> tuple[list[Step], list[str]]:
        """The steps that a graph stands for, and for each of its outputs the value that it is after them."""
        nodes = [node for node in graph if not (node.op_type == "Constant" and node.domain == "")]
        turns = [node for node in nodes if self._is_split(node)]
        segments = _segments(nodes, turns, graph)
        wanted = _wanted(segments, turns, graph)
        steps: list[Step] = []
        asked = [*(value for node in turns for value in self._host_reads(node)), *graph.outputs]
        handed_on = [
            _handed_on(value)
            for value in dict.fromkeys(asked)
            if graphs.is_constant(value) and _graph_of(value) is graph
        ]
        segments[0] += handed_on
        wanted[0] += [node.outputs[0] for node in handed_on]
        for place, segment in enumerate(segments):
            if segment and wanted[place]:
                steps.append(self.run(segment, wanted[place]))
            if place < len(turns):
                steps.append(self.turn(turns[place]))
        return steps, [_named(value) for value in graph.outputs]

    def turn(self, node: ir.Node) -> Step:
        """The step that a node of control flow stands for."""
        if node.op_type == "If":
            return self.branch(node)
        return self.loop(node) if node.op_type == "Loop" else self.scan(node)

    def branch(self, node: ir.Node) -> Branch:
        then, first = self.steps(node.attributes["then_branch"].as_graph())
        otherwise, second = self.steps(node.attributes["else_branch"].as_graph())
        assert node.inputs[0] is not None
        gives = {
            output.name: (one, other)
            for output, one, other in zip(node.outputs, first, second, strict=True)
            if output.name and _is_asked(output)
        }
        return Branch.model_validate(
            {
                "branch": _name_of(node),
                "if": _named(node.inputs[0]),
                "then": then,
                "else": otherwise,
                "gives": gives,
            }
        )

    def loop(self, node: ir.Node) -> Loop:
        body = node.attributes["body"].as_graph()
        steps, results = self.steps(body)
        trips, condition, *starts = [*node.inputs, None, None][: max(2, len(node.inputs))]
        counter, goes, *carried = body.inputs
        used = {output.name: output for output in node.outputs if _is_asked(output)}
        finals = node.outputs[: len(carried)]
        state = [
            State(
                name=inner.name or "",
                start=_named(start),
                next=after,
                gives=final.name if final.name in used else None,
            )
            for inner, start, after, final in zip(carried, starts, results[1:], finals, strict=False)
            if start is not None
        ]
        rows = zip(
            body.outputs[1 + len(carried) :], results[1 + len(carried) :], node.outputs[len(carried) :], strict=True
        )
        return Loop(
            loop=_name_of(node),
            trips=None if trips is None else _named(trips),
            condition=None if condition is None else _named(condition),
            counter=port(counter) if _is_asked(counter) else None,
            goes=port(goes) if _is_asked(goes) else None,
            state=state,
            stacks=[
                Stack(each=each, gives=given.name or "", part=_declared(part))
                for part, each, given in rows
                if given.name in used
            ],
            body=steps,
            again=results[0],
        )

    def scan(self, node: ir.Node) -> Loop:
        body = node.attributes["body"].as_graph()
        steps, results = self.steps(body)
        count = node.attributes["num_scan_inputs"].as_int()
        carried = len(node.inputs) - count
        used = {output.name for output in node.outputs if _is_asked(output)}

        def ints(name: str, length: int) -> Sequence[int]:
            attribute = node.attributes.get(name)
            return attribute.as_ints() if attribute is not None else [0] * length

        starts = [value for value in node.inputs[:carried] if value is not None]
        parts = [value for value in node.inputs[carried:] if value is not None]
        stacked = len(node.outputs) - carried
        return Loop(
            loop=_name_of(node),
            state=[
                State(
                    name=inner.name or "",
                    start=_named(start),
                    next=after,
                    gives=final.name if final.name in used else None,
                )
                for inner, start, after, final in zip(body.inputs, starts, results, node.outputs, strict=False)
            ],
            slices=[
                Slice(name=inner.name or "", of=_named(whole), axis=axis, backwards=bool(direction))
                for inner, whole, axis, direction in zip(
                    body.inputs[carried:],
                    parts,
                    ints("scan_input_axes", count),
                    ints("scan_input_directions", count),
                    strict=True,
                )
            ],
            stacks=[
                Stack(each=each, gives=given.name or "", axis=axis, backwards=bool(direction), part=_declared(part))
                for part, each, given, axis, direction in zip(
                    body.outputs[carried:],
                    results[carried:],
                    node.outputs[carried:],
                    ints("scan_output_axes", stacked),
                    ints("scan_output_directions", stacked),
                    strict=True,
                )
                if given.name in used
            ],
            body=steps,
        )

    def run(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> Run:
        """The step that runs some nodes, as a new block or as one that computes the same."""
        block, reads = _extract(nodes, outputs, self.model)
        key = _content(block)
        ins = [value.name or "" for value in reads]
        outs = [value.name or "" for value in outputs]
        if key in self.known:
            self.shared += 1
            name, inner_ins, inner_outs = self.known[key]
            return Run(
                run=name, reads=dict(zip(inner_ins, ins, strict=True)), makes=dict(zip(inner_outs, outs, strict=True))
            )
        self.made += 1
        name = f"block_{self.made}"
        self.known[key] = name, ins, outs
        self.blocks[name] = block
        self.described[name] = Block(
            file=f"{name}.onnx",
            inputs=[port(value) for value in block.graph.inputs],
            outputs=[port(value) for value in block.graph.outputs],
            nodes=graphs.count_nodes(block),
        )
        return Run(run=name, reads=dict(zip(ins, ins, strict=True)), makes=dict(zip(outs, outs, strict=True)))

    def _host_reads(self, node: ir.Node) -> Iterable[ir.Value]:
        """What the host itself hands to a node of control flow, or takes from a body of it as it is."""
        yield from (value for value in node.inputs if value is not None)
        for body in graphs.subgraphs(node):
            yield from body.outputs
            for inner in body:
                if self._is_split(inner):
                    yield from self._host_reads(inner)

    def _is_split(self, node: ir.Node) -> bool:
        if node.domain != "" or node.op_type not in SPLIT or self.keep(node):
            return False
        return node.op_type != "Scan" or graphs.opset(self.model) >= _SCAN


def _named(value: ir.Value) -> str:
    """What the host calls a value: by its name, or where it is a constant by that of what hands it on."""
    return f"{value.name}:value" if graphs.is_constant(value) else value.name or ""


def port(value: ir.Value) -> Port:
    """A value as it is written in a plan.

    Raises:
        BadInput: Its type is not known.
    """
    if value.type is None:
        raise BadInput(f"the type of the value '{value.name}' is not known", hint="declare it, or run shape inference")
    shape = trusted_shape(value)
    sizes = None if shape is None else [size if isinstance(size, int) else size.value for size in shape]
    return Port(name=value.name or "", type=_type_text(value.type), shape=sizes)


def _declared(value: ir.Value) -> Port:
    """As `port`, with the shape that is declared where none is known: as told by the network, or where nothing ran."""
    made = port(value)
    if made.shape is None and value.shape is not None:
        made.shape = [size if isinstance(size, int) else size.value for size in value.shape]
    return made


def _type_text(kind: ir.TypeProtocol) -> str:
    for wrapper, word in _SEQUENCE_AND_OPTIONAL.items():
        if isinstance(kind, wrapper):
            return f"{word}({_type_text(kind.elem_type)})"
    name = kind.dtype.name
    return f"tensor({_RUNTIME_NAMES.get(name, name.lower())})"


# -- where nodes go ----------------------------------------------------------------------------------------------------


def _segments(nodes: Sequence[ir.Node], turns: Sequence[ir.Node], graph: ir.Graph) -> list[list[ir.Node]]:
    """The nodes before the first turn, between turns, and after the last, each as early as it can be."""
    segments: list[list[ir.Node]] = [[] for _ in range(len(turns) + 1)]
    place_of: dict[ir.Node, int] = {}
    turn_of = {node: index for index, node in enumerate(turns)}
    for node in nodes:
        place = 0
        for value in graphs.read_by(node):
            maker = value.producer()
            if maker is not None and maker in place_of:
                place = max(place, place_of[maker])
        if node in turn_of:
            place_of[node] = turn_of[node] + 1
        else:
            place_of[node] = place
            segments[place].append(node)
    return segments


def _wanted(segments: Sequence[Sequence[ir.Node]], turns: Sequence[ir.Node], graph: ir.Graph) -> list[list[ir.Value]]:
    """For each segment the values that others read: turns and what is in them, later segments, the graph's outputs."""
    home = {output: index for index, segment in enumerate(segments) for node in segment for output in node.outputs}
    wanted: list[dict[ir.Value, None]] = [{} for _ in segments]
    for index, segment in enumerate(segments):
        for node in segment:
            for value in graphs.read_by(node):
                if value in home and home[value] != index:
                    wanted[home[value]][value] = None
    for value in (*(value for node in turns for value in graphs.read_by(node)), *graph.outputs):
        if value in home:
            wanted[home[value]][value] = None
    return [list(values) for values in wanted]


def _is_asked(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _graph_of(value: ir.Value) -> object:
    producer = value.producer()
    return producer.graph if producer is not None else value.graph


def _name_of(node: ir.Node) -> str:
    return node.name or f"{node.op_type} of {node.outputs[0].name}"


# -- blocks ------------------------------------------------------------------------------------------------------------


def _handed_on(value: ir.Value) -> ir.Node:
    """A constant as a value that the host has."""
    name = _named(value)
    made = ir.Value(name=name, type=value.type, shape=value.shape)
    tensor = graphs.constant_tensor(value)
    if made.type is None and tensor is not None:
        made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    return ir.Node("", "Identity", [value], outputs=[made], name=f"{name}/identity")


def _extract(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], model: ir.Model) -> tuple[ir.Model, list[ir.Value]]:
    """A network of copies of some nodes, and the values of the original that it reads, in the order of its inputs."""
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []

    def mirrored(value: ir.Value) -> ir.Value:
        if value not in copies:
            tensor = graphs.constant_tensor(value) if graphs.is_constant(value) else None
            made = ir.Value(name=value.name, type=value.type, shape=trusted_shape(value), const_value=tensor)
            if tensor is None:
                inputs.append(value)
            else:
                made.type = made.type or ir.TensorType(tensor.dtype)
                constants.append(made)
            copies[value] = made
        return copies[value]

    made = [_copy(node, mirrored, copies) for node in nodes]
    graph = ir.Graph(
        [copies[value] for value in inputs],
        [copies[value] for value in outputs],
        nodes=made,
        initializers=constants,
        opset_imports=dict(model.opset_imports),
        name="block",
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name="graphopt"), inputs


def _copy(node: ir.Node, mirrored: Callable[[ir.Value], ir.Value], copies: dict[ir.Value, ir.Value]) -> ir.Node:
    reads = [None if value is None else mirrored(value) for value in node.inputs]
    attributes = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            attributes.append(ir.AttrGraph(attribute.name, _copy_body(attribute.as_graph(), mirrored)))
        else:
            attributes.append(attribute)
    made = [ir.Value(name=value.name, type=value.type, shape=trusted_shape(value)) for value in node.outputs]
    copies.update(zip(node.outputs, made, strict=True))
    return ir.Node(node.domain, node.op_type, reads, attributes, overload=node.overload, outputs=made, name=node.name)


def _copy_body(body: ir.Graph, mirrored: Callable[[ir.Value], ir.Value]) -> ir.Graph:
    copy = body.clone(allow_outer_scope_values=True)
    read_instead(copy, {value: mirrored(value) for value in graphs.captured_values(copy)})
    return copy


def _content(block: ir.Model) -> str:
    """What a block computes, whatever its values are called: the same for blocks that may stand for each other."""
    digest = hashlib.sha256()
    numbers: dict[ir.Value, int] = {}

    def number(value: ir.Value | None) -> int:
        return -1 if value is None else numbers.setdefault(value, len(numbers))

    def tell(*what: object) -> None:
        digest.update(repr(what).encode())

    def graph(inner: ir.Graph) -> None:
        for value in inner.inputs:
            tell("in", number(value), str(value.type), str(value.shape))
        for value in inner.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            tell("constant", number(value), str(tensor.dtype), tensor.shape.numpy())
            digest.update(_bytes_of(tensor))
        for node in inner:
            tell(node.domain, node.op_type, node.overload, [number(value) for value in node.inputs])
            for name in sorted(node.attributes):
                attribute = node.attributes[name]
                if attribute.type is ir.AttributeType.GRAPH:
                    tell(name)
                    graph(attribute.as_graph())
                else:
                    digest.update(ir.serde.serialize_attribute(attribute).SerializeToString(deterministic=True))
            tell([number(value) for value in node.outputs])
        tell("out", [number(value) for value in inner.outputs])

    graph(block.graph)
    return digest.hexdigest()


def _bytes_of(tensor: ir.TensorProtocol) -> bytes:
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    return tensor.tobytes()
