"""A plan and its blocks as one network again, with If, Loop and Scan.

Nodes of a block are put where it runs, and read what the plan says. Weights come to stand in the main graph, each once,
and stay in the bundle's data file until the network is saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.extracting import copy_node
from graphopt.bundles.folder import open_bundle
from graphopt.bundles.plan import Branch, Loop, Plan, Port, Run, Step, walk
from graphopt.bundles.ports import shape_of, type_of, value_of
from graphopt.bundles.split import SPLIT
from graphopt.errors import BadInput
from graphopt.files.load import load_model
from graphopt.files.placement import storage_key

_SMALL = 1024
"""Weights up to so many bytes are the same where their content is."""
_NEWEST_IR = 10
_HELD = "graphopt.bundles.merge.held"

Values = dict[str, ir.Value]


def merge_bundle(bundle: str | Path, *, runs: bool = True) -> ir.Model:
    """A bundle as one network. Its weights are read when they are asked for; its version stays as long as the network.

    Args:
        bundle: Its folder.
        runs: Whether the network is to be run. One that is only looked at, for what its inputs mean, may be of a bundle
            in which samples go their own ways.

    Raises:
        BadInput: It is no bundle, a block of it is an engine, or its plan does what no ONNX operator does.
    """
    opened = open_bundle(bundle)
    plan = opened.plan
    engines = [block.file for block in plan.blocks.values() if not block.file.endswith(".onnx")]
    if engines:
        raise BadInput(
            f"its block {engines[0]} is an engine, which cannot be made a network again",
            where=str(bundle),
            hint="merge the bundle that it was built from",
        )
    try:
        blocks = {name: load_model(opened.version / block.file) for name, block in plan.blocks.items()}
        model = merge(plan, blocks, runs=runs)
    except BadInput as refused:
        raise BadInput(refused.what, where=refused.where or str(bundle), hint=refused.hint) from refused
    model.graph.meta[_HELD] = opened  # of the graph, as what clones a model takes it along
    return model


def merge(plan: Plan, blocks: Mapping[str, ir.Model], *, runs: bool = True) -> ir.Model:
    """A plan and its blocks as one network.

    Args:
        plan: What runs when.
        blocks: Name -> static network; unchanged. Their weights are those of the network that is returned, not copies.
        runs: As for `merge_bundle`.

    Raises:
        BadInput: The plan does what no ONNX operator does.
    """
    return _Merger(plan, blocks, runs).merge()


@dataclass
class _Merger:
    plan: Plan
    blocks: Mapping[str, ir.Model]
    runs: bool
    weights: dict[object, ir.Value] = field(default_factory=dict)
    described: dict[str, Port] = field(default_factory=dict)

    def merge(self) -> ir.Model:
        turns: list[Branch | Loop] = []
        for step in walk(self.plan.steps):
            if isinstance(step, Run):
                self.describe(step)
                continue
            turns.append(step)
            if step.each and self.runs:
                name = step.branch if isinstance(step, Branch) else step.loop
                raise BadInput(
                    f"samples go their own ways at '{name}', and no ONNX operator lets them",
                    hint="merge a bundle that was made without --per-sample",
                )
        values: Values = {}
        inputs = [self.input(port, values) for port in self.plan.inputs]
        nodes: list[ir.Node] = []
        self.steps(self.plan.steps, values, nodes)
        outputs = [self.output(port, values, nodes) for port in self.plan.outputs]
        imports: dict[str, int] = {}
        for block in self.blocks.values():
            imports.update(block.opset_imports)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=[*self.weights.values()],
            opset_imports=imports or {"": 18},
            name="merged",
        )
        version = max((block.ir_version for block in self.blocks.values()), default=_NEWEST_IR)
        model = ir.Model(graph, ir_version=version, producer_name="graphopt")
        graphs.make_names_unique(model)
        _name_nodes(model, {step.branch if isinstance(step, Branch) else step.loop for step in turns})
        return model

    def describe(self, step: Run) -> None:
        """Keep what a block says about the values that it reads and makes."""
        block = self.plan.blocks[step.run]
        for ports, names in ((block.inputs, step.reads), (block.outputs, step.makes)):
            for port in ports:
                if port.name in names:
                    known = self.described.get(names[port.name])
                    if known is None or known.shape is None:
                        self.described[names[port.name]] = port

    def input(self, port: Port, values: Values) -> ir.Value:
        values[port.name] = made = value_of(port)
        return made

    def inner(self, name: str, values: Values, kind: ir.TypeProtocol | None, like: Port | None) -> ir.Value:
        """An input of a body: of the given type where nothing more is known of it."""
        known = like or self.described.get(name)
        made = ir.Value(
            name=name,
            type=kind if known is None else type_of(known.type),
            shape=None if known is None else shape_of(known),
        )
        values[name] = made
        return made

    def states(self, step: Loop, values: Values, known: Values) -> list[ir.Value]:
        return [self.inner(state.name, known, values[state.start].type, state.like) for state in step.state]

    def output(self, port: Port, values: Values, nodes: list[ir.Node]) -> ir.Value:
        """An output of the network, under its own name."""
        found = values[self.plan.gives[port.name]]
        if any(port.name == given.name for given in self.plan.inputs) and found is values[port.name]:
            return found  # an input that is an output, under one name
        asked = [*self.plan.gives.values()]
        if found.producer() is None or asked.count(self.plan.gives[port.name]) > 1:
            found = _handed_on(found, nodes)
        found.name, found.type = port.name, type_of(port.type)
        found.shape = shape_of(port) if found.shape is None else found.shape
        return found

    def steps(self, steps: Sequence[Step], values: Values, nodes: list[ir.Node]) -> None:
        """Add the nodes of some steps, and the values that they make."""
        for step in steps:
            if isinstance(step, Run):
                self.run(step, values, nodes)
            elif isinstance(step, Branch):
                if step.gives:  # else nobody asks
                    nodes.append(self.branch(step, values))
            elif step.state or step.stacks:
                nodes.append(self.scan(step, values) if step.slices else self.loop(step, values))

    def run(self, step: Run, values: Values, nodes: list[ir.Node]) -> None:
        block = self.blocks[step.run].graph
        inputs = {value: values[step.reads[value.name or ""]] for value in block.inputs}
        copies: dict[ir.Value, ir.Value] = {}

        def mirrored(value: ir.Value) -> ir.Value:
            if value in inputs:
                return inputs[value]
            if value not in copies and graphs.is_constant(value):
                return self.weight(value)
            return copies[value]

        nodes += [copy_node(node, mirrored, copies) for node in block]
        for value in block.outputs:
            name = step.makes.get(value.name or "")
            if name is not None:
                made = mirrored(value)
                if made.producer() is None:  # an input or a weight, as it is
                    made = _handed_on(made, nodes)
                made.name = name
                values[name] = made

    def weight(self, value: ir.Value) -> ir.Value:
        """A weight in the main graph."""
        tensor = graphs.constant_tensor(value)
        assert tensor is not None
        key: object = storage_key(tensor)
        if not isinstance(tensor, ir.ExternalTensor) and tensor.dtype is not ir.DataType.STRING:
            key = tensor.tobytes() if tensor.nbytes <= _SMALL else key
        whole = (key, tensor.dtype, tuple(tensor.shape.numpy()))
        if whole not in self.weights:
            taken = {weight.name for weight in self.weights.values()}
            name = value.name or "weight"
            if name in taken:
                name = next(f"{name}_{n}" for n in range(1, len(taken) + 2) if f"{name}_{n}" not in taken)
            self.weights[whole] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self.weights[whole]

    def branch(self, step: Branch, values: Values) -> ir.Node:
        bodies = []
        for inner, (name, steps) in enumerate((("then_branch", step.then), ("else_branch", step.otherwise))):
            known, nodes = dict(values), list[ir.Node]()
            self.steps(steps, known, nodes)
            wanted = [known[pair[inner]] for pair in step.gives.values()]
            bodies.append(ir.AttrGraph(name, self.body([], wanted, nodes, name)))
        first, second = (body.as_graph().outputs for body in bodies)
        outputs = [
            ir.Value(name=name, type=one.type or other.type)
            for name, one, other in zip(step.gives, first, second, strict=True)
        ]
        values.update((value.name or "", value) for value in outputs)
        node = ir.Node("", "If", [values[step.condition]], bodies, outputs=outputs, name=step.branch)
        if step.decides:
            node.metadata_props[graphs.DECIDES] = json.dumps([*step.decides.items()])
        if step.path:
            node.metadata_props[graphs.PATH] = json.dumps([*step.path.items()])
        return node

    def loop(self, step: Loop, values: Values) -> ir.Node:
        if any(stack.axis or stack.backwards for stack in step.stacks):
            raise BadInput(f"the loop '{step.loop}' stacks as no ONNX operator does")
        known, nodes = dict(values), list[ir.Node]()
        counter = _port_value(step.counter, "turn", "tensor(int64)", known)
        condition = None if step.condition is None else values[step.condition]
        goes = _port_value(step.goes, "going", "tensor(bool)", known, None if condition is None else condition.shape)
        states = self.states(step, values, known)
        self.steps(step.body, known, nodes)
        again = goes if step.again is None else known[step.again]
        results = [again, *(known[state.next] for state in step.state), *self.parts(step, known)]
        body = self.body([counter, goes, *states], results, nodes, "body")
        outputs = self.results(step, values, body.outputs[1:])
        trips = None if step.trips is None else values[step.trips]
        return ir.Node(
            "",
            "Loop",
            [trips, condition, *(values[state.start] for state in step.state)],
            [ir.AttrGraph("body", body)],
            outputs=outputs,
            name=step.loop,
        )

    def scan(self, step: Loop, values: Values) -> ir.Node:
        if step.trips or step.condition or step.counter or step.goes or step.again:
            raise BadInput(f"the loop '{step.loop}' cuts and counts at once, which no ONNX operator does")
        known, nodes = dict(values), list[ir.Node]()
        states = self.states(step, values, known)
        parts = [self.inner(part.name, known, values[part.of].type, None) for part in step.slices]
        self.steps(step.body, known, nodes)
        results = [*(known[state.next] for state in step.state), *self.parts(step, known)]
        body = self.body([*states, *parts], results, nodes, "body")
        for state, start, after in zip(states, step.state, body.outputs, strict=False):
            after.shape = after.shape or state.shape or values[start.start].shape  # a state keeps its shape
        told: list[ir.Attr] = [ir.AttrGraph("body", body), ir.AttrInt64("num_scan_inputs", len(step.slices))]
        for name, numbers in (
            ("scan_input_axes", [part.axis for part in step.slices]),
            ("scan_input_directions", [int(part.backwards) for part in step.slices]),
            ("scan_output_axes", [stack.axis for stack in step.stacks]),
            ("scan_output_directions", [int(stack.backwards) for stack in step.stacks]),
        ):
            if any(numbers):
                told.append(ir.AttrInt64s(name, numbers))
        reads = [*(values[state.start] for state in step.state), *(values[part.of] for part in step.slices)]
        outputs = self.results(step, values, body.outputs)
        return ir.Node("", "Scan", reads, told, outputs=outputs, name=step.loop)

    def parts(self, step: Loop, known: Values) -> list[ir.Value]:
        """What turns make for the stacks, with the shape that a loop without turns goes by."""
        made = []
        for stack in step.stacks:
            part = known[stack.each]
            part.type = part.type or type_of(stack.part.type)
            part.shape = part.shape or shape_of(stack.part)
            made.append(part)
        return made

    def results(self, step: Loop, values: Values, body: Sequence[ir.Value]) -> list[ir.Value]:
        """The outputs of a loop, of the types that its body gives."""
        names = [*(state.gives or f"{state.name}/last" for state in step.state), *(s.gives for s in step.stacks)]
        outputs = [ir.Value(name=name, type=inner.type) for name, inner in zip(names, body, strict=True)]
        values.update((value.name or "", value) for value in outputs)
        return outputs

    def body(
        self, inputs: Sequence[ir.Value], results: Iterable[ir.Value], nodes: list[ir.Node], name: str
    ) -> ir.Graph:
        """A body, which gives values that it makes itself, each once."""
        own = {output for node in nodes for output in node.outputs}
        outputs: list[ir.Value] = []
        for value in results:
            outputs.append(value if value in own and value not in outputs else _handed_on(value, nodes))
        return ir.Graph(inputs, outputs, nodes=nodes, name=name)


def _name_nodes(model: ir.Model, kept: set[str]) -> None:
    """Nodes of a block that runs in several places get names of their own; branches and loops have theirs."""
    taken = set(kept)
    counts: dict[str, int] = {}
    for node in graphs.all_nodes(model):
        if not node.name or (node.op_type in SPLIT and node.name in kept):
            continue
        name = base = node.name
        while name in taken:
            counts[base] = counts.get(base, 0) + 1
            name = f"{base}_{counts[base]}"
        node.name = name
        taken.add(name)


def _handed_on(value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """A value of the same content, made by a new node."""
    made = ir.Value(name=f"{value.name}/same", type=value.type, shape=value.shape)
    nodes.append(ir.Node("", "Identity", [value], outputs=[made], name=f"{made.name}/identity"))
    return made


def _port_value(port: Port | None, name: str, kind: str, known: Values, like: ir.Shape | None = None) -> ir.Value:
    """An input that every loop's body has, whether the plan asks for it or not: one element, with an axis or none."""
    made = ir.Value(
        name=name if port is None else port.name,
        type=type_of(kind),
        shape=(None if port is None else shape_of(port)) or like or ir.Shape([]),
    )
    if port is not None:
        known[port.name] = made
    return made
