"""Random networks for one sample, with exits and loops that depend on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
SHAPES = ((1, 3), (1, 2, 3), (3,), (), (1, 1))


class _Scope:
    """What can be read where nodes are written: values by shape, and booleans."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.values: list[tuple[str, tuple[int, ...]]] = [] if outer is None else [*outer.values]
        self.truths: list[str] = [] if outer is None else [*outer.truths]
        self.nodes: list[onnx.NodeProto] = []
        self.depth: int = 0 if outer is None else outer.depth + 1


class Net:
    """A network.

    Args:
        choices: Decides everything.
        depth: How deep bodies are nested at most.
    """

    def __init__(self, choices: random.Random, depth: int = 2) -> None:
        self.random = choices
        self.depth = depth
        self.number = 0
        self.constants: list[onnx.TensorProto] = []
        scope = _Scope()
        scope.values = [("x", (1, 3)), ("y", (1, 2, 3)), ("shared", (3,))]
        scope.truths = ["flag"]
        self.fill(scope, 4)
        self.turn(scope)
        self.fill(scope, 3)
        outputs = [
            (self.op(scope, "Identity", [name], shape), shape) for name, shape in self.random.sample(scope.values, 3)
        ]
        inputs = [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in (
                ("x", FLOAT, [1, 3]),
                ("y", FLOAT, [1, 2, 3]),
                ("shared", FLOAT, [3]),
                ("flag", BOOL, []),
            )
        ]
        infos = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs]
        graph = helper.make_graph(scope.nodes, "net", inputs, infos, self.constants)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def feeds(self, count: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs for so many samples."""
        numbers = np.random.default_rng(seed)
        return {
            "x": numbers.standard_normal((count, 3)).astype(np.float32),
            "y": numbers.standard_normal((count, 2, 3)).astype(np.float32),
            "shared": numbers.standard_normal(3).astype(np.float32),
            "flag": np.array(seed % 2 == 0),
        }

    def name(self) -> str:
        self.number += 1
        return f"v{self.number}"

    def op(
        self, scope: _Scope, kind: str, inputs: list[str], shape: tuple[int, ...] | None = None, **attributes: Any
    ) -> str:
        name = self.name()
        scope.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        if shape is not None:
            scope.values.append((name, shape))
        return name

    def constant(self, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), self.name()))
        return self.constants[-1].name

    def pick(self, scope: _Scope) -> tuple[str, tuple[int, ...]]:
        return self.random.choice(scope.values)

    def shaped(self, scope: _Scope, shape: tuple[int, ...]) -> str:
        """A value of a shape, made where there is none."""
        found = [name for name, other in scope.values if other == shape]
        if found and self.random.random() < 0.8:
            return self.random.choice(found)
        name, other = self.pick(scope)
        total = self.op(scope, "ReduceMean", [name], keepdims=0) if other else name
        return self.op(scope, "Expand", [total, self.constant(np.array(shape, np.int64))], shape)

    def truth(self, scope: _Scope) -> str:
        if self.random.random() < 0.2:
            return self.random.choice(scope.truths)
        name, shape = self.pick(scope)
        kept = self.random.randrange(2) if shape else 0
        total = self.op(scope, "ReduceSum", [name], keepdims=kept) if shape else name
        compared = self.op(scope, "Greater", [total, self.constant(np.float32(self.random.uniform(-1, 1)))])
        return self.op(scope, "Reshape", [compared, self.constant(np.array([], np.int64))]) if kept else compared

    def fill(self, scope: _Scope, count: int) -> None:
        for _ in range(count):
            kind = self.random.randrange(8)
            name, shape = self.pick(scope)
            if kind == 0 and scope.depth < self.depth:
                self.turn(scope)
            elif kind == 1:
                other, more = self.random.choice([pair for pair in scope.values if _fit(shape, pair[1])])
                made = np.broadcast_shapes(shape, more)
                self.op(scope, "Tanh", [self.op(scope, self.random.choice(["Add", "Mul", "Sub"]), [name, other])], made)
            elif kind == 2 and shape:
                axis = self.random.randrange(len(shape))
                axes = self.constant(np.array([axis], np.int64))
                self.op(
                    scope,
                    self.random.choice(["ReduceSum", "ReduceMax"]),
                    [name, axes],
                    (*shape[:axis], *shape[axis + 1 :]),
                    keepdims=0,
                )
            elif kind == 3 and shape:
                axis = self.random.randrange(len(shape))
                self.op(scope, "Softmax", [name], shape, axis=axis)
            elif kind == 4 and shape and shape[-1] == 3:
                self.op(scope, "MatMul", [name, self.constant(np.eye(3, dtype=np.float32)[::-1] * 0.7)], shape)
            elif kind == 5 and shape:
                order = self.random.sample(range(len(shape)), len(shape))
                self.op(scope, "Transpose", [name], tuple(shape[axis] for axis in order), perm=order)
            elif kind == 6 and shape:
                axis = self.random.randrange(len(shape))
                made = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
                if made.count(1) or np.prod(made) < 60:
                    self.op(scope, "Concat", [name, name], made, axis=axis)
            else:
                self.op(scope, self.random.choice(["Sin", "Neg", "Abs", "Identity"]), [name], shape)

    def turn(self, scope: _Scope) -> None:
        self.random.choice([self.branch, self.branch, self.loop, self.scan])(scope)

    def graph(
        self, scope: _Scope, inputs: list[Any], outputs: Sequence[tuple[str, int, tuple[int, ...]]]
    ) -> onnx.GraphProto:
        infos = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs]
        return helper.make_graph(scope.nodes, self.name(), inputs, infos)

    def branch(self, scope: _Scope) -> None:
        condition = self.truth(scope)
        shapes = [self.random.choice(SHAPES) for _ in range(self.random.randint(1, 2))]
        bodies = []
        for _ in range(2):
            inner = _Scope(scope)
            self.fill(inner, self.random.randrange(4))
            made = [(self.op(inner, "Identity", [self.shaped(inner, shape)]), FLOAT, shape) for shape in shapes]
            bodies.append(self.graph(inner, [], made))
        names = [self.name() for _ in shapes]
        scope.nodes.append(
            helper.make_node("If", [condition], names, self.name(), then_branch=bodies[0], else_branch=bodies[1])
        )
        scope.values += zip(names, shapes, strict=True)

    def loop(self, scope: _Scope) -> None:
        shapes = [self.random.choice(SHAPES) for _ in range(self.random.randint(1, 2))]
        starts = [self.shaped(scope, shape) for shape in shapes]
        trips = self.constant(np.array(self.random.randrange(4), np.int64))
        if self.random.random() < 0.3:
            total = self.op(scope, "ReduceMax", [self.pick(scope)[0]], keepdims=0)
            trips = self.op(scope, "Cast", [self.op(scope, "Mul", [total, self.constant(np.float32(2))])], to=INT)
        condition = self.truth(scope) if self.random.random() < 0.4 else ""
        inner = _Scope(scope)
        counter, goes = self.name(), self.name()
        states = [self.name() for _ in shapes]
        inner.values += zip(states, shapes, strict=True)
        inner.truths.append(goes)
        number = self.op(inner, "Cast", [counter], to=FLOAT)
        inner.values.append((number, ()))
        self.fill(inner, 3)
        made = [(self.op(inner, "Tanh", [self.shaped(inner, shape)]), FLOAT, shape) for shape in shapes]
        again = self.op(inner, "Identity", [self.truth(inner)])
        inputs = [helper.make_tensor_value_info(counter, INT, []), helper.make_tensor_value_info(goes, BOOL, [])]
        inputs += [
            helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in zip(states, shapes, strict=True)
        ]
        body = self.graph(inner, inputs, [(again, BOOL, ()), *made])
        names = [self.name() for _ in shapes]
        scope.nodes.append(helper.make_node("Loop", [trips, condition, *starts], names, self.name(), body=body))
        scope.values += zip(names, shapes, strict=True)

    def scan(self, scope: _Scope) -> None:
        shape = self.random.choice([shape for shape in SHAPES if shape])
        axis = self.random.randrange(len(shape))
        rest = (*shape[:axis], *shape[axis + 1 :])
        start = self.random.choice(SHAPES)
        first, whole = self.shaped(scope, start), self.shaped(scope, shape)
        inner = _Scope(scope)
        state, part = self.name(), self.name()
        inner.values += [(state, start), (part, rest)]
        self.fill(inner, 2)
        collected, made = self.pick(inner)
        inputs = [helper.make_tensor_value_info(state, FLOAT, start), helper.make_tensor_value_info(part, FLOAT, rest)]
        outputs = [
            (self.op(inner, "Tanh", [self.shaped(inner, start)]), FLOAT, start),
            (self.op(inner, "Identity", [collected]), FLOAT, made),
        ]
        body = self.graph(inner, inputs, outputs)
        names = [self.name(), self.name()]
        place = self.random.randrange(len(made) + 1)
        scope.nodes.append(
            helper.make_node(
                "Scan",
                [first, whole],
                names,
                self.name(),
                body=body,
                num_scan_inputs=1,
                scan_input_axes=[axis],
                scan_output_axes=[place],
            )
        )
        scope.values += [(names[0], start), (names[1], (*made[:place], shape[axis], *made[place:]))]


def _fit(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(1 in (a, b) or a == b for a, b in zip(one[::-1], other[::-1], strict=False))
