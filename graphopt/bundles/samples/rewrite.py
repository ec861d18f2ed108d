"""A network for one sample as one for many, in which each sample goes its own way.

Every result for sample i is what the network for one sample gives for it alone. An If whose condition depends on the
sample gets a vector of conditions, one for each sample, and a Loop likewise: only a bundle's host can run these, which
takes the samples apart. A mark in their metadata says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.rows import SAMPLES
from graphopt.bundles.samples.dependence import Dependence, find_dependence
from graphopt.bundles.samples.lift import Lift, Scope
from graphopt.bundles.samples.lifted import (
    STACKED,
    Lifted,
    RankUnknownError,
    can_be,
    common_place,
    front_place,
)
from graphopt.bundles.samples.rules import REASONS, RULES
from graphopt.bundles.samples.sizes import fix_to_one_sample, sample_axes, sizes_of
from graphopt.editing import fresh, read_instead, sweep
from graphopt.errors import BadInput

OLDEST = 11
"""The first opset whose operators count axes from the end and take sizes as inputs."""


def for_samples(model: ir.Model) -> ir.Model:
    """Make of a network for one sample one for many, to be split into a bundle.

    Args:
        model: Is not changed. Its batch axis is 1, or has a name; then it is taken for a batch of 1.

    Returns:
        A network whose inputs have a symbolic axis in the place of the batch, and whose outputs have one likewise: an
        output without a batch axis gets one in front.

    Raises:
        BadInput: It has no axis of samples, functions, an operator that mixes samples or has no rule, or an opset
            before 11.
    """
    if model.functions:
        raise BadInput("the network has functions", hint="run the pass inline-functions first")
    if graphs.opset(model) < OLDEST:
        raise BadInput(
            f"opset {graphs.opset(model)} is too old for --per-sample", hint=f"export with {OLDEST} or later"
        )
    one = model.clone()
    graphs.make_names_unique(one)
    axes, batch = sample_axes(one)
    fix_to_one_sample(one, axes, batch)
    return _Writer(one, axes, batch).write()


class _Writer:
    def __init__(self, model: ir.Model, axes: dict[ir.Value, int], batch: str) -> None:
        self.model = model
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.given: dict[ir.Value, Lifted] = {}
        for value in model.graph.inputs:
            made = ir.Value(name=value.name, type=value.type, shape=value.shape)
            self.inputs.append(made)
            self.given[value] = Lifted(made, axes.get(value), sizes_of(value))
        counted = self.given[next(iter(axes))]
        self.t = Lift(model, self.initializers, counted, batch)
        for value, lifted in self.given.items():
            self.t.lifted[value] = self.t.lift(lifted.value, lifted.place, lifted.sizes) if value in axes else lifted
        self.found: Dependence = find_dependence(model, axes, self.t.values)

    def write(self) -> ir.Model:
        graph = self.model.graph
        self.nodes(graph)
        outputs = [self.output(value) for value in graph.outputs]
        made = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.t.close().nodes,
            initializers=list(self.initializers.values()),
            opset_imports=dict(self.model.opset_imports),
            name=graph.name or "network",
        )
        for inner in list(graphs.nested_graphs(made)):
            sweep(list(reversed(list(inner))))
        return ir.Model(made, ir_version=self.model.ir_version, producer_name="graphopt")

    def output(self, value: ir.Value) -> ir.Value:
        """An output of the network: with a batch axis, and under its own name."""
        given = self.t.of(value)
        place = given.place
        if place is None or (place == STACKED and can_be(given, 0)):
            place = front_place([given])
        try:
            result = self.t.at(given, place)
        except RankUnknownError as error:
            raise BadInput(f"cannot run on many samples: {error}", where=f"output '{value.name}'") from None
        if result.name != value.name or result.producer() is None or result.is_graph_output():
            if given.value.name == value.name and given.value.producer() is not None:
                given.value.name = fresh(f"{value.name}/one", self.t.names)
            (result,) = self.t.write("Identity", [result])
            result.name = value.name
        result.type = value.type
        self.t.lift(result, place, given.sizes)
        return result

    # -- nodes -----------------------------------------------------------------------------------------------------

    def nodes(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type == "Constant" and node.domain == "" and graphs.is_constant(node.outputs[0]):
                continue
            self.t.begin(node)
            try:
                made = self.node(node)
            except RankUnknownError as error:
                self.t.refuse(str(error))
            self.t.lifted.update(zip(node.outputs, made, strict=False))

    def node(self, node: ir.Node) -> Sequence[Lifted]:
        if node.domain == "" and node.op_type in ("If", "Loop", "Scan"):
            return {"If": self.branch, "Loop": self.loop, "Scan": self.scan}[node.op_type](node)
        self.refuse_random(node)
        known = [self.t.values.constant(value) for value in node.outputs]
        if all(array is not None for array in known):
            return [Lifted(self.t.of_array(array), None, array.shape) for array in known if array is not None]
        if all(self.t.of(value).place is None for value in graphs.read_by(node)):
            return self.copied(node)
        rule = None if graphs.has_subgraphs(node) else RULES.get((node.domain, node.op_type))
        if rule is None:
            self.t.refuse(REASONS.get(node.op_type, "nothing is known of what it does sample by sample"))
        return rule(self.t, node)

    def refuse_random(self, node: ir.Node) -> None:
        if node.domain != "" or node.op_type not in graphs.RANDOM:
            return
        trains = node.op_type != "Dropout" or (
            len(node.inputs) > 2
            and node.inputs[2] is not None
            and ((told := self.t.constant(node.inputs[2])) is None or bool(told.reshape(-1)[0]))
        )
        if trains:
            self.t.refuse("it draws random numbers, in another order than one sample at a time")

    def copied(self, node: ir.Node) -> Sequence[Lifted]:
        """A node that is the same for all samples."""
        bodies = {}
        for name, attribute in node.attributes.items():
            if attribute.type is ir.AttributeType.GRAPH:
                body = attribute.as_graph().clone(allow_outer_scope_values=True)
                read_instead(body, {value: self.t.of(value).value for value in graphs.captured_values(body)})
                bodies[name] = ir.AttrGraph(name, body)
        values = [None if given is None else given.value for given in self.t.inputs(node)]
        return self.t.same_results(node, values, None, **bodies)

    # -- control flow ----------------------------------------------------------------------------------------------

    def branch(self, node: ir.Node) -> Sequence[Lifted]:
        condition = self.t.of(node.inputs[0])
        decided = condition.place is not None
        truth = self.vector(condition) if decided else condition.value
        counted = Lifted(truth, 0, (1,)) if decided else self.t.counted
        sides = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        results: list[list[Lifted]] = []
        scopes: list[Scope] = []
        for side in sides:
            self.t.open(counted)
            self.nodes(side)
            results.append([self.t.of(value) for value in side.outputs])
            scopes.append(self.t.close())
        self.t.begin(node)
        places = [self.place_of_branch(pair, decided=decided) for pair in zip(*results, strict=True)]
        bodies = {}
        for name, side, given, scope in zip(("then_branch", "else_branch"), sides, results, scopes, strict=True):
            self.t.reopen(scope)
            values = [self.brought(value, place) for value, place in zip(given, places, strict=True)]
            bodies[name] = ir.AttrGraph(name, _body([], values, self.t.close(), side))
        made = self.control(node, [truth], bodies, decided=decided)
        return [
            self.t.result(node, value, place, index)
            for index, (value, place) in enumerate(zip(made, places, strict=True))
        ]

    def place_of_branch(self, pair: tuple[Lifted, ...], *, decided: bool) -> int | None:
        place = common_place(pair)
        if not decided:
            return place
        one, other = (value.sizes for value in pair)
        if one is not None and other is not None:
            differ = len(one) != len(other) or any(a != b for a, b in zip(one, other, strict=True) if a and b)
            if differ:
                self.t.refuse(f"its sides give values of other sizes, {list(one)} and {list(other)}")
        return front_place(pair) if place is None else place

    def loop(self, node: ir.Node) -> Sequence[Lifted]:
        body = node.attributes["body"].as_graph()
        decided = node in self.found.decided
        trips, condition, *starts = [*node.inputs, None, None][: max(2, len(node.inputs))]
        carried = body.inputs[2:]
        for index, value in enumerate(node.outputs[len(carried) :], len(carried)):
            if decided and (value.uses() or value.is_graph_output()):
                self.t.refuse(
                    f"its output {index} collects a value of each turn, and samples may take more turns or fewer",
                    "write into a state of fixed size instead",
                )
        limits = [None if value is None else self.limit(self.t.of(value)) for value in (trips, condition)]
        places, begun, inner = self.states(starts, carried, body.outputs[1:])
        counter, goes = (ir.Value(name=v.name, type=v.type, shape=ir.Shape(_known(v))) for v in body.inputs[:2])
        self.t.lifted[body.inputs[0]] = Lifted(counter, None, _known(body.inputs[0]))
        # A turn that is taken was told to go on.
        told = self.t.of_array(np.ones(_known(body.inputs[1]), np.bool_)) if decided else goes
        self.t.lifted[body.inputs[1]] = Lifted(told, None, _known(body.inputs[1]))
        self.t.open(next((value for value in inner if decided and value.place is not None), self.t.counted))
        self.nodes(body)
        self.t.begin(node)
        again = self.limit(self.t.of(body.outputs[0]))
        after = [self.t.of(value) for value in body.outputs[1:]]
        parts = after[len(carried) :]
        values = [self.brought(value, place) for value, place in zip(after, places, strict=False)]
        values += [part.value for part in parts]
        inputs = [counter, goes, *(value.value for value in inner)]
        made_body = _body(inputs, [again, *values], self.t.close(), body)
        made = self.control(node, [*limits, *begun], {"body": ir.AttrGraph("body", made_body)}, decided=decided)
        if decided:
            places = [STACKED if place is None else place for place in places]
        results = [
            self.t.result(node, value, place, index)
            for index, (value, place) in enumerate(zip(made, places, strict=False))
        ]
        for index, part in enumerate(parts, len(carried)):
            results.append(self.collected(node, made[index], part, index))
        return results

    def collected(self, node: ir.Node, whole: ir.Value, part: Lifted, index: int) -> Lifted:
        """What a loop has collected along a new axis in front."""
        if part.place == STACKED:
            whole.type = node.outputs[index].type
            rank = part.rank + 2
            return self.t.result(node, self.t.transpose(whole, [1, 0, *range(2, rank)]), STACKED, index)
        return self.t.result(node, whole, None if part.place is None else part.place + 1, index)

    def scan(self, node: ir.Node) -> Sequence[Lifted]:
        body = node.attributes["body"].as_graph()
        count = node.attributes["num_scan_inputs"].as_int()
        carried = len(node.inputs) - count
        places, begun, inner = self.states(node.inputs[:carried], body.inputs[:carried], body.outputs)
        wholes, axes = [], []
        for value, part, axis in zip(
            node.inputs[carried:], body.inputs[carried:], _axes(node, "scan_input_axes", count), strict=True
        ):
            given = self.t.of(value)
            axis %= given.rank
            place = given.place
            stacked = place is not None and place in (STACKED, axis)
            wholes.append(self.t.stacked(given) if stacked else given.value)
            axes.append(axis + stacked)
            inner.append(self.input(part, STACKED if stacked else place if place is None else place - (place > axis)))
        self.t.open(self.t.counted)
        self.nodes(body)
        self.t.begin(node)
        after = [self.t.of(value) for value in body.outputs]
        values = [self.brought(value, place) for value, place in zip(after, places, strict=False)]
        parts = after[carried:]
        made_body = _body(
            [value.value for value in inner], [*values, *(part.value for part in parts)], self.t.close(), body
        )
        outs = []
        for made_part, axis in zip(parts, _axes(node, "scan_output_axes", len(parts)), strict=True):
            axis %= made_part.rank + 1
            outs.append(axis + (made_part.place == STACKED))
            place = made_part.place
            places.append(place if place is None or place == STACKED else place + (axis <= place))
        attributes: dict[str, object] = {"body": ir.AttrGraph("body", made_body), "scan_input_axes": axes}
        if outs:
            attributes["scan_output_axes"] = outs
        made = self.control(node, [*begun, *wholes], attributes, decided=False)
        return [
            self.t.result(node, value, place, index)
            for index, (value, place) in enumerate(zip(made, places, strict=True))
        ]

    # -- what control flow shares -----------------------------------------------------------------------------------

    def states(
        self, starts: Sequence[ir.Value | None], carried: Sequence[ir.Value], after: Sequence[ir.Value]
    ) -> tuple[list[int | None], list[ir.Value], list[Lifted]]:
        """Where the states of a loop have the samples, what they begin with, and what they are in the body."""
        places: list[int | None] = []
        begun: list[ir.Value] = []
        inner: list[Lifted] = []
        for start, value, later in zip(starts, carried, after, strict=False):
            given = self.t.of(start)
            place: int | None = None
            if value in self.found.values:
                axis = max(given.place or 0, 0)
                all_turns = [given, *(Lifted(v, None, sizes_of(v)) for v in (value, later))]
                place = axis if all(can_be(turn, axis) for turn in all_turns) else STACKED
            places.append(place)
            begun.append(self.brought(given, place))
            inner.append(self.input(value, place))
        return places, begun, inner

    def input(self, value: ir.Value, place: int | None) -> Lifted:
        """An input of a body."""
        made = ir.Value(name=value.name, type=value.type)
        self.t.lifted[value] = self.t.lift(made, place, sizes_of(value))
        return self.t.lifted[value]

    def brought(self, given: Lifted, place: int | None) -> ir.Value:
        return given.value if place is None else self.t.at(given, place)

    def limit(self, given: Lifted) -> ir.Value:
        """What says how long a loop goes on: for each sample, or for all."""
        return given.value if given.place is None else self.vector(given)

    def vector(self, given: Lifted) -> ir.Value:
        """One element of each sample, as a vector."""
        if given.rank + (given.place == STACKED) == 1:
            return given.value
        made = self.t.one("Reshape", [given.value, self.t.numbers([-1])])
        made.type = given.value.type
        return self.t.lift(made, 0, (1,)).value

    def control(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], changed: Mapping[str, object], *, decided: bool
    ) -> list[ir.Value]:
        made = self.t.again(node, inputs, **changed)
        self.t.latest.metadata_props.update(node.metadata_props)
        if decided:
            self.t.latest.metadata_props[SAMPLES] = "each"
        return made


def _known(value: ir.Value) -> tuple[int, ...]:
    """The shape of a loop's counter or condition: of one element."""
    return (1,) * len(value.shape or ())


def _axes(node: ir.Node, name: str, count: int) -> list[int]:
    attribute = node.attributes.get(name)
    return [0] * count if attribute is None else [int(axis) for axis in attribute.as_ints()]


def _body(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], scope: Scope, old: ir.Graph) -> ir.Graph:
    """A body; its outputs are of its own making, and each another value."""
    own = {output for node in scope.nodes for output in node.outputs}
    for place, value in enumerate(outputs := list(outputs)):
        if value not in own or value in outputs[:place]:
            node = ir.node("Identity", [value])
            outputs[place] = node.outputs[0]
            outputs[place].name, outputs[place].type = f"{value.name}/{old.name}/{place}", value.type
            outputs[place].metadata_props.update(value.metadata_props)
            scope.nodes.append(node)
    return ir.Graph(inputs, outputs, nodes=scope.nodes, name=old.name or "body")
