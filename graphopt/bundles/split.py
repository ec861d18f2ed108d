"""A network with If, Loop and Scan as static blocks and a plan that says when each runs.

The nodes between control flow become blocks. Each node goes to the first block that can have it: conditions are known
as early as they can be, those that do not wait for each other come from one block, and the fewest blocks are left.
Bodies are split likewise, with what they take from around them as further inputs of their blocks, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.extracting import can_be_shared, content_of, extract, hand_on, named
from graphopt.bundles.flow import begun_with, makes, reads
from graphopt.bundles.parts import Parts, part_of_stack, parts_as_told
from graphopt.bundles.plan import Block, Branch, Loop, Plan, Run, Slice, Stack, State, Step, walk
from graphopt.bundles.ports import declared, like, port
from graphopt.bundles.rows import SAMPLES
from graphopt.bundles.segments import segments_of, wanted_of
from graphopt.editing import fresh
from graphopt.errors import BadInput
from graphopt.shapes import infer_shapes

SPLIT = frozenset({"If", "Loop", "Scan"})
_SCAN = 9
"""The first opset whose Scan has no batch axis of its own; an older one stays in a block."""

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
    graphs.name_control_flow(model)
    _rename_constants(model)
    parts = parts_as_told(model)
    infer_shapes(model)
    return _Splitter(model, keep, parts).split()


@dataclass
class _Splitter:
    model: ir.Model
    keep: Keep
    parts: Parts
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
            outputs=[declared(value) for value in graph.outputs],
            gives={output.name or "": name for output, name in zip(graph.outputs, results, strict=True)},
            blocks=self.described,
            steps=steps,
        )
        plan.samples = self.samples(plan)
        return Split(plan, self.blocks, self.shared)

    def steps(
        self, graph: ir.Graph, outputs: Sequence[ir.Value] | None = None, spared: Sequence[ir.Node] = ()
    ) -> tuple[list[Step], list[str]]:
        """The steps that a graph stands for, and for each of its outputs the value that it is after them.

        Args:
            graph: Of the network, or a body of it.
            outputs: Those of its outputs that are asked for; None: all of them.
            spared: Nodes whose results nobody asks for.
        """
        outputs = graph.outputs if outputs is None else outputs
        passed = {value: source for value in outputs if (source := _passed_on(value, graph)) is not None}
        outputs = [value for value in outputs if value not in passed]
        spared = [*spared, *(maker for value in passed if (maker := value.producer()) and not value.uses())]
        nodes = [node for node in graph if not _is_constant(node) and node not in spared]
        turns = [node for node in nodes if self._is_split(node)]
        segments = segments_of(nodes, turns)
        wanted = wanted_of(segments, turns, outputs)
        steps: list[Step] = []
        asked = [*(value for node in turns for value in self._host_reads(node)), *outputs]
        handed_on = [
            hand_on(value) for value in dict.fromkeys(asked) if graphs.is_constant(value) and _graph_of(value) is graph
        ]
        segments[0] += handed_on
        wanted[0] += [node.outputs[0] for node in handed_on]
        for place, segment in enumerate(segments):
            if segment and wanted[place]:
                steps.append(self.run(segment, wanted[place]))
            if place < len(turns):
                steps.append(self.turn(turns[place]))
        return steps, [named(passed.get(value, value)) for value in graph.outputs]

    def turn(self, node: ir.Node) -> Step:
        """The step that a node of control flow stands for."""
        if node.op_type == "If":
            return self.branch(node)
        return self.loop(node) if node.op_type == "Loop" else self.scan(node)

    def branch(self, node: ir.Node) -> Branch:
        bodies = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        (then, first), (otherwise, second) = (self.steps(body, _asked(body.outputs, node.outputs)) for body in bodies)
        assert node.inputs[0] is not None
        gives = {
            output.name: (one, other)
            for output, one, other in zip(node.outputs, first, second, strict=True)
            if output.name and _is_asked(output)
        }
        return Branch.model_validate(
            {
                "branch": _name_of(node),
                "if": named(node.inputs[0]),
                "then": then,
                "else": otherwise,
                "gives": gives,
                "decides": graphs.decided_by(node),
                "path": graphs.path_of(node),
                "each": SAMPLES in node.metadata_props,
            }
        )

    def loop(self, node: ir.Node) -> Loop:
        body = node.attributes["body"].as_graph()
        spared = _always_again(body)
        trips, condition, *starts = [*node.inputs, None, None][: max(2, len(node.inputs))]
        counter, goes, *carried = body.inputs
        handed_on = body.outputs[0 if spared is None else 1 : 1 + len(carried)]
        stacked = _asked(body.outputs[1 + len(carried) :], node.outputs[len(carried) :])
        steps, results = self.steps(body, [*handed_on, *stacked], spared or ())
        used = {output.name for output in node.outputs if _is_asked(output)}
        rows = zip(
            body.outputs[1 + len(carried) :], results[1 + len(carried) :], node.outputs[len(carried) :], strict=True
        )
        return Loop(
            loop=_name_of(node),
            trips=None if trips is None else named(trips),
            condition=None if condition is None else named(condition),
            # A scalar or one axis, as the body says: nothing else tells.
            counter=declared(counter) if _is_asked(counter) else None,
            goes=declared(goes) if _is_asked(goes, spared or ()) else None,
            state=_states(carried, starts, results[1:], node.outputs),
            stacks=[
                Stack(each=each, gives=given.name or "", part=part_of_stack(part, self.parts))
                for part, each, given in rows
                if given.name in used
            ],
            body=steps,
            again=results[0] if spared is None else None,
            each=SAMPLES in node.metadata_props,
        )

    def scan(self, node: ir.Node) -> Loop:
        body = node.attributes["body"].as_graph()
        count = node.attributes["num_scan_inputs"].as_int()
        carried = len(node.inputs) - count
        parts_made = _asked(body.outputs[carried:], node.outputs[carried:])
        steps, results = self.steps(body, [*body.outputs[:carried], *parts_made])
        used = {output.name for output in node.outputs if _is_asked(output)}

        def ints(name: str, length: int) -> Sequence[int]:
            attribute = node.attributes.get(name)
            return attribute.as_ints() if attribute is not None else [0] * length

        starts = [value for value in node.inputs[:carried] if value is not None]
        parts = [value for value in node.inputs[carried:] if value is not None]
        stacked = len(node.outputs) - carried
        return Loop(
            loop=_name_of(node),
            state=_states(body.inputs, starts, results, node.outputs),
            slices=[
                Slice(name=inner.name or "", of=named(whole), axis=axis, backwards=bool(direction))
                for inner, whole, axis, direction in zip(
                    body.inputs[carried:],
                    parts,
                    ints("scan_input_axes", count),
                    ints("scan_input_directions", count),
                    strict=True,
                )
            ],
            stacks=[
                Stack(
                    each=each,
                    gives=given.name or "",
                    axis=axis,
                    backwards=bool(direction),
                    part=part_of_stack(part, self.parts),
                )
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
        block, reads = extract(nodes, outputs, self.model)
        key = content_of(block) if can_be_shared(block) else f"block_{self.made + 1}"
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
            outputs=[port(value) for value in outputs],
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
        return can_split(node, self.model) and (samples_part(node) or not self.keep(node))

    def samples(self, plan: Plan) -> dict[str, int]:
        """Of the values in a plan, those that have samples, and along which axis."""
        names = {port.name for port in plan.inputs} | set(plan.gives.values())
        for step in walk(plan.steps):
            names.update((*reads(step), *makes(step)))
            if isinstance(step, Loop):
                names.update(begun_with(step))
        found = (
            (value.name or "", value.metadata_props[SAMPLES])
            for graph in graphs.nested_graphs(self.model.graph)
            for value in (*graph.inputs, *(output for node in graph for output in node.outputs))
            if SAMPLES in value.metadata_props
        )
        return {name: int(axis) for name, axis in found if name in names}


def samples_part(node: ir.Node) -> bool:
    """Whether samples go different ways at a node, or in it: only a host can do that."""
    nodes = (inner for body in graphs.subgraphs(node) for inner in graphs.nested_nodes(body))
    return any(SAMPLES in found.metadata_props for found in (node, *nodes))


def can_split(node: ir.Node, model: ir.Model) -> bool:
    """Whether a node is control flow that a host can do."""
    if node.domain != "" or node.op_type not in SPLIT:
        return False
    return node.op_type != "Scan" or graphs.opset(model) >= _SCAN


def _asked(results: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> list[ir.Value]:
    """The results of a body that stand for outputs of its node that somebody reads."""
    return [result for result, output in zip(results, outputs, strict=True) if output.name and _is_asked(output)]


def _is_asked(value: ir.Value, spared: Sequence[ir.Node] = ()) -> bool:
    return any(use.node not in spared for use in value.uses()) or value.is_graph_output()


def _always_again(body: ir.Graph) -> list[ir.Node] | None:
    """Of a loop that goes on whenever it has begun a turn, the nodes that only say so; None where a body may end it."""
    said = body.outputs[0]
    if said in body.outputs[1:]:
        return None
    only: list[ir.Node] = []
    while said is not body.inputs[1]:
        if graphs.is_constant(said):
            tensor = graphs.constant_tensor(said)
            return only if tensor is not None and bool(tensor.numpy().all()) else None
        node = said.producer()
        if node is None or node.graph is not body or (node.domain, node.op_type) != ("", "Identity"):
            return None
        others = len(said.uses()) - bool(only) + (said.is_graph_output() and bool(only))
        if others or node.inputs[0] is None:
            return None
        only.append(node)
        said = node.inputs[0]
    return only


def _passed_on(value: ir.Value, body: ir.Graph) -> ir.Value | None:
    """What a side of an If gives as it got it from around; ONNX needs a node for that, and a host nothing."""
    if body.inputs:
        return None  # the network, or what turns
    maker = value.producer()
    source = maker.inputs[0] if maker is not None and (maker.domain, maker.op_type) == ("", "Identity") else None
    return None if source is None or graphs.is_constant(source) or _graph_of(source) is body else source


def _graph_of(value: ir.Value) -> object:
    producer = value.producer()
    return producer.graph if producer is not None else value.graph


def _states(
    inner: Sequence[ir.Value], starts: Sequence[ir.Value | None], after: Sequence[str], finals: Sequence[ir.Value]
) -> list[State]:
    """What turns hand on; as many as there are starts, which all the others begin with."""
    return [
        State(
            name=value.name or "",
            start=named(start),
            next=later,
            gives=final.name if final.name and _is_asked(final) else None,
            like=like(value),
        )
        for value, start, later, final in zip(inner, starts, after, finals, strict=False)
        if start is not None
    ]


def _rename_constants(model: ir.Model) -> None:
    """No value is called as the host calls a constant that it hands on."""
    names = graphs.value_names(model)
    for graph in graphs.nested_graphs(model.graph):
        for value in (*graph.initializers.values(), *(output for node in graph for output in node.outputs)):
            if graphs.is_constant(value) and named(value) in names and not value.is_graph_output():
                value.name = fresh(value.name or "constant", names)


def _is_constant(node: ir.Node) -> bool:
    """Whether blocks that read what a node makes have it as a constant of their own."""
    return node.op_type == "Constant" and node.domain == "" and graphs.is_constant(node.outputs[0])


def _name_of(node: ir.Node) -> str:
    return node.name or f"{node.op_type} of {node.outputs[0].name}"
