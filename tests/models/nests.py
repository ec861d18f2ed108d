"""Random nests of If, Loop and Scan: captures at any depth, no trips, stacked outputs, sequences, names used again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 3
FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


@dataclass
class _Scope:
    """What can be read where nodes are written: names of float vectors, booleans, integers, sequences of vectors."""

    depth: int
    vectors: list[str]
    truths: list[str]
    counts: list[str]
    sequences: list[str] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    number: int = 0

    def name(self) -> str:
        """Two bodies of one depth use the same names."""
        self.number += 1
        return f"v{self.depth}_{self.number}"

    def inner(self) -> _Scope:
        return _Scope(self.depth + 1, [*self.vectors], [*self.truths], [*self.counts], [*self.sequences])


class Nest:
    """A network with one random nest.

    Args:
        seed: Decides everything.
        depth: How deep bodies are nested at most.
        sequences: Whether values may be sequences.
    """

    def __init__(self, seed: int, depth: int = 3, *, sequences: bool = True) -> None:
        self.random = random.Random(seed)
        self.depth = depth
        self.with_sequences = sequences
        scope = _Scope(0, ["x", "y"], ["flag"], ["trips"])
        self.fill(scope, 5)
        self.turn(scope)
        self.fill(scope, 3)
        outputs = [self.op(scope, "Identity", [name]) for name in self.random.sample(scope.vectors, 3)]
        graph = helper.make_graph(
            scope.nodes,
            "nest",
            [
                helper.make_tensor_value_info("x", FLOAT, [WIDTH]),
                helper.make_tensor_value_info("y", FLOAT, [WIDTH]),
                helper.make_tensor_value_info("flag", BOOL, []),
                helper.make_tensor_value_info("trips", INT, []),
            ],
            [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
            initializer=scope.initializers,
        )
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def feeds(self, count: int) -> list[dict[str, np.ndarray]]:
        """Inputs that take different ways."""
        made = []
        for turn in range(count):
            numbers = np.random.default_rng(turn)
            made.append(
                {
                    "x": numbers.standard_normal(WIDTH).astype(np.float32),
                    "y": numbers.standard_normal(WIDTH).astype(np.float32),
                    "flag": np.array(turn % 2 == 0),
                    "trips": np.array(turn % 4, np.int64),
                }
            )
        return made

    def op(self, scope: _Scope, kind: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> str:
        names = [scope.name() for _ in range(outputs)]
        scope.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    def constant(self, scope: _Scope, value: np.ndarray) -> str:
        tensor = onnx.numpy_helper.from_array(value)
        if self.random.random() < 0.5:
            return self.op(scope, "Constant", [], value=tensor)
        tensor.name = scope.name()
        scope.initializers.append(tensor)
        return tensor.name

    def vector(self, scope: _Scope) -> str:
        return self.random.choice(scope.vectors)

    def truth(self, scope: _Scope) -> str:
        kind = self.random.randrange(4)
        if kind == 0:
            return self.random.choice(scope.truths)
        if kind == 1:
            return self.constant(scope, np.array(self.random.random() < 0.5))
        total = self.op(scope, "ReduceSum", [self.vector(scope)], keepdims=self.random.randrange(2))
        limit = self.constant(scope, np.array(self.random.uniform(-1, 1), np.float32))
        return self.op(scope, "Greater", [total, limit])

    def fill(self, scope: _Scope, count: int) -> None:
        """A few nodes, of which some hold bodies."""
        for _ in range(count):
            kind = self.random.random()
            if kind < 0.25 and scope.depth < self.depth:
                self.turn(scope)
            elif kind < 0.5:
                scope.vectors.append(self.op(scope, self.random.choice(["Tanh", "Neg", "Abs"]), [self.vector(scope)]))
            elif kind < 0.6:
                numbers = np.random.default_rng(self.random.randrange(1 << 30)).standard_normal(WIDTH)
                scope.vectors.append(self.constant(scope, numbers.astype(np.float32)))
            elif kind < 0.7 and self.with_sequences:
                self.sequence(scope)
            else:
                both = [self.vector(scope), self.vector(scope)]
                product = self.op(scope, self.random.choice(["Add", "Mul", "Max"]), both)
                scope.vectors.append(self.op(scope, "Tanh", [product]))

    def sequence(self, scope: _Scope) -> None:
        if not scope.sequences or self.random.random() < 0.5:
            made = self.op(scope, "SequenceConstruct", [self.vector(scope), self.vector(scope)])
        else:
            made = self.op(scope, "SequenceInsert", [self.random.choice(scope.sequences), self.vector(scope)])
        scope.sequences.append(made)
        stacked = self.op(scope, "ConcatFromSequence", [made], axis=0, new_axis=1)
        scope.vectors.append(self.op(scope, "ReduceMax", [stacked, self.axis(scope)], keepdims=0))

    def axis(self, scope: _Scope) -> str:
        return self.constant(scope, np.array([0], np.int64))

    def turn(self, scope: _Scope) -> None:
        self.random.choice([self.branch, self.branch, self.loop, self.loop, self.scan])(scope)

    def body(self, scope: _Scope, count: int) -> list[str]:
        """Fills a body and returns names of it that it may return."""
        self.fill(scope, 3)
        return [self.op(scope, "Identity", [self.vector(scope)]) for _ in range(count)]

    def graph(
        self,
        scope: _Scope,
        name: str,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[tuple[str, int]],
        shape: list[int] | None = None,
    ) -> onnx.GraphProto:
        infos = [helper.make_tensor_value_info(output, kind, shape) for output, kind in outputs]
        return helper.make_graph(scope.nodes, name, inputs, infos, initializer=scope.initializers)

    def branch(self, scope: _Scope) -> None:
        condition = self.truth(scope)
        count = self.random.randint(1, 2)
        bodies = []
        for name in ("then", "else"):
            inner = scope.inner()
            if self.random.random() < 0.2:  # nothing but what is there already
                results = [self.op(inner, "Identity", [self.vector(inner)]) for _ in range(count)]
            else:
                results = self.body(inner, count)
            bodies.append(self.graph(inner, name, [], [(result, FLOAT) for result in results]))
        names = [scope.name() for _ in range(count)]
        scope.nodes.append(helper.make_node("If", [condition], names, then_branch=bodies[0], else_branch=bodies[1]))
        scope.vectors += names

    def loop(self, scope: _Scope) -> None:
        trips = self.random.choice(
            [self.constant(scope, np.array(self.random.randint(0, 3), np.int64)), *scope.counts, ""]
        )
        condition = self.op(scope, "Squeeze", [self.truth(scope)]) if self.random.random() < 0.4 else ""
        starts = [self.vector(scope) for _ in range(self.random.randint(1, 2))]
        inner = scope.inner()
        counter, goes = inner.name(), inner.name()
        states = [inner.name() for _ in starts]
        inner.vectors += states
        inner.truths.append(goes)
        number = self.op(inner, "Cast", [counter], to=FLOAT)
        inner.vectors.append(self.op(inner, "Add", [self.random.choice(states), number]))
        stacked = self.random.randint(0, 2)
        results = self.body(inner, len(states) + stacked)
        # Whatever else it asks, it comes to an end.
        last = self.constant(inner, np.array(self.random.randint(0, 3), np.int64))
        again = self.op(inner, "Less", [counter, last])
        if self.random.random() < 0.3:
            again = self.op(inner, "And", [again, self.op(inner, "Identity", [self.random.choice(inner.truths)])])
        if trips and self.random.random() < 0.4:
            again = self.op(inner, "Identity", [goes])
        inputs = [
            helper.make_tensor_value_info(counter, INT, []),
            helper.make_tensor_value_info(goes, BOOL, []),
            *(helper.make_tensor_value_info(state, FLOAT, [WIDTH]) for state in states),
        ]
        body = self.graph(inner, "body", inputs, [(again, BOOL), *((result, FLOAT) for result in results)])
        # What no turn has made has the shape that is declared.
        for info in body.output[1:]:
            info.type.tensor_type.shape.dim.add(dim_value=WIDTH)
        names = [scope.name() for _ in results]
        scope.nodes.append(helper.make_node("Loop", [trips, condition, *starts], names, body=body))
        scope.vectors += names[: len(states)]
        self.summed(scope, names[len(states) :])

    def scan(self, scope: _Scope) -> None:
        length = self.random.randint(1, 3)
        numbers = np.random.default_rng(self.random.randrange(1 << 30)).standard_normal((length, WIDTH))
        rows = self.op(scope, "Mul", [self.constant(scope, numbers.astype(np.float32)), self.vector(scope)])
        start = self.vector(scope)
        inner = scope.inner()
        state, row = inner.name(), inner.name()
        inner.vectors += [state, row]
        results = self.body(inner, 2)
        inputs = [helper.make_tensor_value_info(name, FLOAT, [WIDTH]) for name in (state, row)]
        body = self.graph(inner, "body", inputs, [(result, FLOAT) for result in results], [WIDTH])
        names = [scope.name() for _ in results]
        directions: dict[str, Any] = {
            "scan_input_directions": [self.random.randrange(2)],
            "scan_output_directions": [self.random.randrange(2)],
        }
        scope.nodes.append(helper.make_node("Scan", [start, rows], names, body=body, num_scan_inputs=1, **directions))
        scope.vectors.append(names[0])
        self.summed(scope, names[1:])

    def summed(self, scope: _Scope, stacked: list[str]) -> None:
        """Weighted by the row, so that their order is seen; nothing of no rows."""
        for name in stacked:
            total = self.op(scope, "CumSum", [name, self.constant(scope, np.array(0, np.int64))])
            scope.vectors.append(self.op(scope, "ReduceSum", [total, self.axis(scope)], keepdims=0))


class RepairNest(Nest):
    """A nest of what the passes for dynamic networks look for: conditions used again, growing states, unequal ranks."""

    def vector(self, scope: _Scope) -> str:
        """Rather one of the last, so that less is computed for nothing."""
        return self.random.choice(scope.vectors[-3:] if self.random.random() < 0.7 else scope.vectors)

    def truth(self, scope: _Scope) -> str:
        if self.random.random() < 0.5:
            known = self.random.choice(scope.truths)
            return self.op(scope, "Not", [known]) if self.random.random() < 0.3 else known
        made = self.op(scope, "Squeeze", [super().truth(scope)])
        scope.truths.append(made)
        return made

    def turn(self, scope: _Scope) -> None:
        self.random.choice([super().turn, self.branch, self.growing, self.unequal])(scope)

    def unequal(self, scope: _Scope) -> None:
        """An If of a row or a vector, and a vector made of it."""
        condition = self.truth(scope)
        axis = self.axis(scope)
        bodies = []
        for name, row in (("then", True), ("else", False)):
            inner = scope.inner()
            self.fill(inner, 1)
            result = self.vector(inner)
            made = self.op(inner, "Unsqueeze", [result, axis]) if row else self.op(inner, "Neg", [result])
            bodies.append(self.graph(inner, name, [], [(made, FLOAT)]))
        if self.random.random() < 0.5:
            bodies.reverse()
        value = scope.name()
        scope.nodes.append(helper.make_node("If", [condition], [value], then_branch=bodies[0], else_branch=bodies[1]))
        value = self.op(scope, "Add", [self.op(scope, "Abs", [value]), self.vector(scope)])
        scope.vectors.append(self.op(scope, "Reshape", [value, self.constant(scope, np.array([WIDTH], np.int64))]))

    def growing(self, scope: _Scope) -> None:
        """A Loop that appends a row in every turn, and may read what it has."""
        trips = self.random.choice([self.constant(scope, np.array(self.random.randint(0, 3), np.int64)), *scope.counts])
        axis = self.axis(scope)
        if self.random.random() < 0.5:
            rows = self.op(scope, "Unsqueeze", [self.vector(scope), axis])
        else:
            rows = self.constant(scope, np.zeros((0, WIDTH), np.float32))
        start = self.vector(scope)
        inner = scope.inner()
        counter, goes, state, held = (inner.name() for _ in range(4))
        inner.vectors.append(state)
        inner.truths.append(goes)
        if self.random.random() < 0.5:
            inner.vectors.append(self.op(inner, "ReduceSum", [held, axis], keepdims=0))
        (following,) = self.body(inner, 1)
        row = self.op(inner, "Unsqueeze", [self.vector(inner), axis])
        longer = self.op(inner, "Concat", [held, row], axis=self.random.choice([0, -2]))
        again = self.op(inner, "Identity", [goes])
        inputs = [
            helper.make_tensor_value_info(counter, INT, []),
            helper.make_tensor_value_info(goes, BOOL, []),
            helper.make_tensor_value_info(state, FLOAT, [WIDTH]),
            helper.make_tensor_value_info(held, FLOAT, [None, WIDTH]),
        ]
        body = self.graph(inner, "body", inputs, [(again, BOOL), (following, FLOAT), (longer, FLOAT)])
        names = [scope.name() for _ in range(2)]
        yes = self.constant(scope, np.array(True))
        scope.nodes.append(helper.make_node("Loop", [trips, yes, start, rows], names, body=body))
        scope.vectors.append(names[0])
        self.summed(scope, names[1:])
