"""The structure of a state dict written into a graph, in standard operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import weights
from graphopt.importing.formats import Form
from graphopt.importing.places import Match
from graphopt.importing.states import State
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.sites import Linear, Spelling, linear_at, weight_of

Array = npt.NDArray[Any]


class ImportFactors(Pass):
    """Puts the factors of a state dict in the place of the dense weights that they are factors of."""

    name = "import"
    kind = Kind.LOSSY  # an adapter changes the meaning, and that is what it is for
    stage = Stage.IMPORT
    explanation = Explanation(
        matches="products whose weight a state dict holds as factors, in pivot form or with an adapter",
        refuses="nothing: what does not fit is an error",
        costs="two products a module; pivot form also a Concat and a Gather",
        source="the state dict",
    )

    def __init__(self, state: State, matches: Sequence[Match]) -> None:
        super().__init__()
        self._state = state
        self._matches = matches

    def apply(self, ctx: Context) -> None:
        for match in self._matches:
            writer = _Writer(ctx, self._state, match)
            for found in match.place.linears:
                linear = linear_at(found.node)  # what it reads may have been replaced since it was found
                assert isinstance(linear, Linear)
                made, nodes = writer.write(linear)
                ctx.replace({linear.y: made}, nodes, rule=match.module.form.value.replace(" ", "-"), certain=True)


class _Writer:
    """One module, for each product with its weight: those in one graph share the new constants."""

    def __init__(self, ctx: Context, state: State, match: Match) -> None:
        self._ctx = ctx
        self._state = state
        self._module = match.module
        self._layout = match.layout
        self._constants: dict[tuple[object, str, Spelling], ir.Value] = {}
        self._graph: object = None

    def write(self, linear: Linear) -> tuple[ir.Value, list[ir.Node]]:
        """The nodes that stand for a product, and what takes the place of its result."""
        self._graph = linear.node.graph
        if self._module.form is Form.ADAPTER:
            return self._adapter(linear)
        if self._module.form is Form.PIVOT:
            return self._pivot(linear)
        first = self._first(linear)
        second = self._second(linear, first.outputs[0], self._layout.outputs, linear.bias)
        return second.outputs[0], [first, second]

    def _adapter(self, linear: Linear) -> tuple[ir.Value, list[ir.Node]]:
        node = linear.node
        base = self._ctx.node(node.op_type, node.inputs, node.attributes, like=linear.y, domain=node.domain)
        first = self._first(linear)
        second = self._second(linear, first.outputs[0], self._layout.outputs, None)
        total = self._ctx.node("Add", [base.outputs[0], second.outputs[0]], like=linear.y)
        return total.outputs[0], [base, first, second, total]

    def _pivot(self, linear: Linear) -> tuple[ir.Value, list[ir.Node]]:
        kept, rest = self._module.positions(self._state, self._layout)
        first = self._first(linear)
        second = self._second(linear, first.outputs[0], len(rest), None)
        axis = linear.y_axis
        nodes = [first, second]
        nodes.append(self._ctx.node("Concat", [first.outputs[0], second.outputs[0]], {"axis": axis}, like=linear.y))
        order = np.argsort(np.concatenate([kept, rest]))
        if not np.array_equal(order, np.arange(len(order))):
            indices = self._constant("order", Spelling.GATHER, lambda: self._ctx.constant(order, self._key("kept")))
            nodes.append(self._ctx.node("Gather", [nodes[-1].outputs[0], indices], {"axis": axis}, like=linear.y))
        if linear.bias is not None:
            nodes.append(self._ctx.node("Add", [nodes[-1].outputs[0], self._bias(linear)], like=linear.y))
        return nodes[-1].outputs[0], nodes

    def _bias(self, linear: Linear) -> ir.Value:
        assert linear.bias is not None
        if linear.spelling is not Spelling.CONV:
            return linear.bias
        found = weight_of(linear.bias)
        assert found is not None  # linear_at takes no other
        array = found.read(self._ctx.opset).reshape(-1, *[1] * len(linear.kernel))
        return self._constant("bias", Spelling.CONV, lambda: self._ctx.constant(array, f"{self._module.name}.bias"))

    # -- factors -------------------------------------------------------------------------------------------------------

    def _first(self, linear: Linear) -> ir.Node:
        shape = (self._layout.rank, linear.inputs, *linear.kernel)

        def numbers() -> Array:
            array = self._module.first(self._state, self._layout)
            return self._scaled(array, linear, rows=True).reshape(shape)

        constant = self._constant(
            "first", linear.spelling, lambda: linear.constant(self._ctx, self._key("first"), shape, numbers)
        )
        return linear.apply(self._ctx, linear.x, constant, outputs=self._layout.rank)

    def _second(self, linear: Linear, between: ir.Value, outputs: int, bias: ir.Value | None) -> ir.Node:
        places = [1] * len(linear.kernel)
        left = linear.spelling in (Spelling.LEFT, Spelling.GEMM, Spelling.CONV)
        shape = (outputs, self._layout.rank, *places) if left else (self._layout.rank, outputs)

        def compute() -> ir.TensorProtocol:
            array = self._module.second(self._state, self._layout)
            array = self._scaled(array, linear, rows=False)
            return ir.tensor(np.ascontiguousarray(array if left else array.T).reshape(shape))

        constant = self._constant(
            "second",
            linear.spelling,
            lambda: self._ctx.constant(weights.computed(compute, linear.weight.dtype, shape), self._key("second")),
        )
        like = ir.Value(type=linear.y.type, shape=linear.y.shape if outputs == linear.outputs else None)
        biases = [] if bias is None else [bias]
        if linear.spelling is Spelling.LEFT:
            return self._ctx.node("MatMul", [constant, between], like=like)
        if linear.spelling is Spelling.GEMM:
            return self._ctx.node("Gemm", [between, constant, *biases], {"transB": 1}, like=like)
        if linear.spelling is Spelling.CONV:
            return self._ctx.node("Conv", [between, constant, *biases], like=like)
        return self._ctx.node("MatMul", [between, constant], like=like)

    def _scaled(self, array: Array, linear: Linear, *, rows: bool) -> Array:
        """A factor in the graph's dtype, with what stands between the factors in the one that has fewer elements."""
        dtype = linear.weight.dtype.numpy()
        scale = self._module.scale(self._state)
        if scale is not None and rows == (self._layout.inputs * int(np.prod(linear.kernel)) < self._layout.outputs):
            array = array.astype(np.float64) * (scale[:, None] if rows else scale[None, :])
        if self._module.factor != 1.0 and not rows:
            array = array.astype(np.float64) * self._module.factor
        return np.ascontiguousarray(array.astype(dtype))

    def _key(self, role: str) -> str:
        return self._module.keys[role]

    def _constant(self, role: str, spelling: Spelling, make: Callable[[], ir.Value]) -> ir.Value:
        key = (self._graph, role, spelling)
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]
