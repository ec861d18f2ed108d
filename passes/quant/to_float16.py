"""``to-float16``: the graph computes in float16; what a caller gives and gets stays float32."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from graphopt import graphs
from graphopt.numerics import half
from graphopt.passes.quant.float16_plan import EITHER, FLOAT, HALF, KEPT, Plan, signature_of
from graphopt.rewrite import Context, Explanation, Kind, Stage
from graphopt.rewrite.contract import ForeignPass
from graphopt.shapes import infer_shapes
from graphopt.weights import computed, read


class Parameters(BaseModel):
    """What stays in float32.

    Attributes:
        keep: Operators that stay in float32 besides those that always do, for example ``[Softmax]``.
    """

    model_config = ConfigDict(extra="forbid")

    keep: tuple[Annotated[str, Field(pattern=r"^[A-Z]\w*$")], ...] = ()


class ToFloat16(ForeignPass):
    """Makes the graph compute in float16; inputs and outputs stay float32.

    Types change throughout at once, since neighbours have to agree: this is one application, kept or undone as a whole.
    """

    name = "to-float16"
    kind = Kind.LOSSY
    stage = Stage.QUANTISE
    explanation = Explanation(
        matches="every float32 node of the graph and its If, Loop and Scan bodies: it computes in float16, with "
        "weights stored in float16; inputs, outputs and what bodies carry stay float32, behind Casts",
        refuses=f"these stay float32: {', '.join(sorted(KEPT))}; nodes that read a constant beyond 65504 or a scalar "
        "below 6e-5, and those that their results reach until one brings them back into range; what computes indices "
        "and angles; other domains; functions",
        costs="Casts between the two types; weights take half. Faster only where the hardware computes in float16: "
        "GPUs, few CPUs",
        source="IEEE 754 binary16; operator signatures from the ONNX schemas",
    )
    Parameters: ClassVar[type[BaseModel]] = Parameters

    def rewrite_model(self, ctx: Context) -> bool:
        assert isinstance(self.parameters, Parameters)
        model = ctx.model
        if any(value.dtype is None for node in graphs.all_nodes(model) for value in node.outputs if value.name):
            infer_shapes(model)
        plan = Plan(model, ctx.opset, self.parameters.keep, ctx.refuse)
        if not plan.halves:
            return False
        _Converter(ctx, plan).run()
        return True


class _Converter:
    """Changes types and puts Casts where float16 and float32 meet, one for each value and direction."""

    def __init__(self, ctx: Context, plan: Plan) -> None:
        self._ctx = ctx
        self._halves = plan.halves
        self._was_float: set[ir.Value] = set()
        """Values that were float32 and are float16 now."""
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._replaced: dict[ir.Value, ir.Value] = {}
        """Constants -> their float16 copies."""
        self._suspects: dict[ir.Node, None] = {}

    def run(self) -> None:
        main = self._ctx.model.graph
        for graph in list(graphs.nested_graphs(main)):
            for node in list(graph):
                self._convert(node)
        for graph in list(graphs.nested_graphs(main)):
            self._restore_outputs(graph, is_main=graph is main)
        self._clean_up()

    def _convert(self, node: ir.Node) -> None:
        if node in self._halves:
            signature = signature_of(node, self._ctx.opset)
            assert signature is not None
            for index, (value, port) in enumerate(zip(node.inputs, signature[0], strict=True)):
                if value is None:
                    continue
                if port.takes_half and (value in self._was_float or value.dtype is FLOAT):
                    node.replace_input_with(index, self._as_half(value))
                elif value in self._was_float:
                    node.replace_input_with(index, self._as_float(value))
            for value in node.outputs:
                if value.dtype is FLOAT:
                    value.type = ir.TensorType(HALF)
                    self._was_float.add(value)
            return
        if node.op_type in EITHER and node.domain == "":
            self._merge_cast(node)
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._was_float:
                node.replace_input_with(index, self._as_float(value))

    def _merge_cast(self, node: ir.Node) -> None:
        """A Cast to float16 of what is float16 now is none."""
        value, output = node.inputs[0], node.outputs[0]
        if value is None or value not in self._was_float or output.dtype is not HALF or output.is_graph_output():
            return
        for use in tuple(output.uses()):
            use.node.replace_input_with(use.idx, value)
        self._suspects[node] = None

    def _as_half(self, value: ir.Value) -> ir.Value:
        if value in self._was_float:
            return value
        if graphs.is_constant(value):
            return self._half_constant(value)
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and producer.domain == "":
            source = producer.inputs[0]
            if source is not None and source.dtype is HALF:
                self._suspects[producer] = None
                return source
            if source is not None and source.dtype is not FLOAT and source.dtype is not None:
                self._suspects[producer] = None
                return self._casted(value, HALF, source)
        return self._casted(value, HALF, value)

    def _as_float(self, value: ir.Value) -> ir.Value:
        return self._casted(value, FLOAT, value)

    def _casted(self, value: ir.Value, to: ir.DataType, source: ir.Value) -> ir.Value:
        """A Cast right behind the producer of ``value``, so that whoever sees the value sees it."""
        found = self._cast.get((value, to))
        if found is None:
            base = f"{value.name}_{'f16' if to is HALF else 'f32'}"
            found = self._cast[value, to] = self._new_value(base, to, value)
            cast = _cast_node(source, found, to)
            producer = value.producer()
            if producer is not None:
                assert isinstance(producer.graph, ir.Graph)
                producer.graph.insert_after(producer, cast)
            else:
                graph = value.graph
                assert isinstance(graph, ir.Graph)
                graph.insert_before(graph[0], cast)
        return found

    def _half_constant(self, value: ir.Value) -> ir.Value:
        found = self._replaced.get(value)
        if found is None:
            tensor = graphs.constant_tensor(value)
            assert tensor is not None
            found = self._replaced[value] = self._new_value(f"{value.name}_f16", HALF, value)
            found.const_value = computed(partial(_halved, tensor), HALF, tensor.shape.numpy())
            found.shape = ir.Shape(list(tensor.shape.numpy()))
            producer = value.producer()
            graph = value.graph if producer is None else producer.graph
            assert isinstance(graph, ir.Graph)
            graph.register_initializer(found)
        return found

    def _restore_outputs(self, graph: ir.Graph, *, is_main: bool) -> None:
        """What a graph returns is float32 again; a model's outputs keep their names."""
        for index, value in enumerate(list(graph.outputs)):
            if value not in self._was_float:
                continue
            result = self._as_float(value)
            if is_main and not result.is_graph_output():
                name, value.name = value.name, self._ctx.fresh_name(f"{value.name}_f16")
                result.name, result.shape = name, value.shape
            graph.outputs[index] = result

    def _clean_up(self) -> None:
        for value, replacement in self._replaced.items():
            producer = value.producer()
            if value.uses() or value.is_graph_output():
                continue
            if producer is not None:
                self._suspects[producer] = None
            elif value.graph is not None and value.name is not None:
                value.graph.initializers.pop(value.name)
                replacement.name = value.name
        self._ctx.remove_dead(self._suspects)

    def _new_value(self, base: str, dtype: ir.DataType, like: ir.Value) -> ir.Value:
        shape = like.shape.copy() if like.shape is not None else None
        return ir.Value(name=self._ctx.fresh_name(base), type=ir.TensorType(dtype), shape=shape)


def _cast_node(source: ir.Value, result: ir.Value, to: ir.DataType) -> ir.Node:
    attributes = [ir.AttrInt64("to", int(to))]
    return ir.Node("", "Cast", [source], attributes, outputs=[result], name=f"{result.name}/Cast")


def _halved(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(half.to_half(read(tensor)))
