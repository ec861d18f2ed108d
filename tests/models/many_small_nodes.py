"""Graphs of many small nodes, as exporters leave them behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

WIDTH = 8
LANE_BLOCKS = 5


def many_small_nodes(n: int, *, seed: int = 0) -> ir.Model:
    """About ``n`` small nodes that leave much to simplify, computing something well-conditioned.

    Input ``x``: float32 [N, 8]. Output ``y``: float32 [N, 8 * lanes]. The graph is a chain of lanes as deep as it
    is long. A lane starts at ``x`` plus a little of the lane before, normalises every block, and ends in its own
    eight columns of ``y``: no value grows or dies out along the chain, and a fault anywhere stays visible.
    Between the nodes that compute stand identities, repeated constants, shape arithmetic, casts and transposes
    that undo each other, repeated subexpressions, constant arithmetic and dead branches.
    """
    build = _Builder(seed)
    lanes: list[str] = []
    previous = None
    while len(build.nodes) < n - 2:
        lane = "x"
        if previous is not None:
            bounded = build.op("Tanh", previous)
            lane = build.op("Add", "x", build.op("Mul", bounded, build.constant(np.float32(0.01))))
        for _ in range(LANE_BLOCKS):
            lane = build.block(lane)
            if len(build.nodes) >= n - 2:
                break
        lanes.append(build.op("Identity", lane))
        previous = lanes[-1]
    build.nodes.append(helper.make_node("Concat", lanes, ["y"], name="concat_lanes", axis=1))
    return build.model(len(lanes) * WIDTH)


def deep_chain(n: int) -> ir.Model:
    """``n`` nodes in one line (Neg, Identity, Neg, ...): nothing here may recurse once a node.

    Input ``x`` and output ``y``: float32 [N, 8].
    """
    names = ["x", *(f"v{i}" for i in range(1, n)), "y"]
    nodes = [
        helper.make_node("Neg" if i % 2 == 0 else "Identity", [names[i]], [names[i + 1]], name=f"n{i}")
        for i in range(n)
    ]
    return ir.from_proto(_model(nodes, [], [("x", ["N", WIDTH])], [("y", ["N", WIDTH])]))


class _Builder:
    """Appends nodes as an exporter does: in order, a fresh Constant for every use of a constant."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.blocks = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, value: np.generic | np.ndarray) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value)))

    def weight(self, *shape: int) -> str:
        name = f"weight_{len(self.weights)}"
        scale = shape[0] ** -0.5 if len(shape) > 1 else 0.1
        value = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def block(self, x: str) -> str:
        """One block, with two of the six kinds of clutter in turn, and LayerNorm at its end."""
        clutter = (
            self.reshape_and_back,
            self.cast_and_back,
            self.transpose_and_back,
            self.repeated,
            self.constant_arithmetic,
            self.dead_branch,
        )
        y = clutter[2 * self.blocks % len(clutter)](x)
        y = clutter[(2 * self.blocks + 1) % len(clutter)](self.op("Identity", y))
        self.blocks += 1
        y = self.op("Identity", y)
        y = self.op("Add", self.op("MatMul", y, self.weight(WIDTH, WIDTH)), self.weight(WIDTH))
        y = self.op("Identity", self.op("Add", self.op("Relu", y), x))
        return self.layer_norm(y)

    def layer_norm(self, x: str) -> str:
        centred = self.op("Sub", x, self.op("ReduceMean", x, self.integers(-1), keepdims=1))
        square = self.op("Pow", centred, self.constant(np.float32(2)))
        variance = self.op("ReduceMean", square, self.integers(-1), keepdims=1)
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant(np.float32(1e-5))))
        return self.op("Div", centred, deviation)

    def batch_then(self, x: str, *rest: int) -> str:
        """The shape [N, *rest] as exporters spell it."""
        batch = self.op("Gather", self.op("Shape", x), self.constant(np.int64(0)), axis=0)
        dims = [batch, *(self.constant(np.int64(dim)) for dim in rest)]
        return self.op("Concat", *(self.op("Unsqueeze", dim, self.integers(0)) for dim in dims), axis=0)

    def reshape_and_back(self, x: str) -> str:
        heads = self.op("Reshape", x, self.batch_then(x, 2, WIDTH // 2))
        heads = self.op("Mul", heads, self.constant(np.float32(0.5)))
        return self.op("Reshape", heads, self.batch_then(heads, WIDTH))

    def cast_and_back(self, x: str) -> str:
        same = self.op("Cast", x, to=TensorProto.FLOAT)
        wide = self.op("Cast", same, to=TensorProto.DOUBLE)
        return self.op("Cast", wide, to=TensorProto.FLOAT)

    def transpose_and_back(self, x: str) -> str:
        turned = self.op("Transpose", self.op("Transpose", x, perm=[1, 0]), perm=[1, 0])
        return self.op("Mul", turned, self.constant(np.float32(1)))

    def repeated(self, x: str) -> str:
        halves = [self.op("Mul", self.op("Tanh", x), self.constant(np.float32(0.5))) for _ in range(3)]
        return self.op("Add", self.op("Add", halves[0], halves[1]), halves[2])

    def constant_arithmetic(self, x: str) -> str:
        scale = self.op("Div", self.constant(np.float32(1)), self.op("Sqrt", self.constant(np.float32(2))))
        row = self.op("Mul", self.constant(np.arange(WIDTH, dtype=np.float32) / WIDTH), scale)
        row = self.op("Expand", self.op("Unsqueeze", row, self.integers(0)), self.integers(1, WIDTH))
        return self.op("Add", x, row)

    def dead_branch(self, x: str) -> str:
        unused = self.op("Exp", self.op("Mul", x, self.constant(np.float32(0.1))))
        self.op("ReduceSum", unused, self.integers(-1), keepdims=0)
        return self.op("Relu", self.op("Relu", x))

    def model(self, columns: int) -> ir.Model:
        proto = _model(self.nodes, self.weights, [("x", ["N", WIDTH])], [("y", ["N", columns])])
        return ir.from_proto(proto)


def _model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    inputs: list[tuple[str, list[str | int]]],
    outputs: list[tuple[str, list[str | int]]],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "many_small_nodes",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        weights,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
