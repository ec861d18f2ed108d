"""What the tests of fusions share: a short way to write graphs, and the tolerance of ``Kind.ROUNDING``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.reference
import onnx.reference.op_run
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from tests.passes.common import AnyModel, run_ort

FLOAT, FLOAT16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
NUMPY = {FLOAT: np.float32, FLOAT16: np.float16, DOUBLE: np.float64}


class G:
    """A graph under construction: every method that adds something returns the name of the value."""

    def __init__(self, opset: int, dtype: int = FLOAT) -> None:
        self.opset, self.dtype = opset, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, name: str, *shape: int | str | None, dtype: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, list(shape)))
        return name

    def const(self, value: object, dtype: int | None = None) -> str:
        """A constant: numbers in the graph's dtype, integer arrays as they are."""
        array = np.asarray(value)
        if array.dtype.kind != "i" or dtype is not None:
            array = array.astype(NUMPY[dtype or self.dtype])
        name = self._fresh("c")
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def overridable(self, value: object) -> str:
        """An initializer that is a graph input too: a caller may replace it."""
        name = self.const(value)
        tensor = self.initializers[-1]
        self.inputs.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = self._fresh(op_type.lower())
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def output(self, name: str, *shape: int | str | None, dtype: int | None = None, rank: int | None = None) -> str:
        """An output; without a shape it takes the one that onnx infers."""
        dims = list(shape) if shape or rank is None else [None] * rank
        kept = dims if shape or rank is not None else None
        self.outputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, kept))
        return name

    def declare(self, name: str, *shape: int | str | None) -> str:
        self.infos.append(helper.make_tensor_value_info(name, self.dtype, list(shape)))
        return name

    def model(self, functions: Sequence[onnx.FunctionProto] = ()) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.initializers, value_info=self.infos)
        domains = {function.domain for function in functions}
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        for declared, found in zip(model.graph.output, inferred.graph.output, strict=True):
            if not declared.type.tensor_type.HasField("shape"):
                declared.CopyFrom(found)
        onnx.checker.check_model(model)
        return model

    def _fresh(self, base: str) -> str:
        self._count += 1
        return f"{base}_{self._count}"


def in_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same computation inside the then-branch of an If, with the inputs taken from outside."""
    graph = model.graph
    shapes = [helper.make_tensor_value_info(o.name, o.type.tensor_type.elem_type, None) for o in graph.output]
    body = helper.make_graph(graph.node, "then", [], shapes, graph.initializer)
    zeros = [
        helper.make_node("CastLike", [f"zero_{o.name}", graph.input[0].name], [f"else_{o.name}"]) for o in graph.output
    ]
    made = [helper.make_node("Constant", [], [f"zero_{o.name}"], value_float=0.0) for o in graph.output]
    others = [helper.make_tensor_value_info(f"else_{o.name}", o.type.tensor_type.elem_type, None) for o in graph.output]
    otherwise = helper.make_graph([*made, *zeros], "else", [], others)
    names = [o.name + "_result" for o in graph.output]
    node = helper.make_node("If", ["condition"], names, then_branch=body, else_branch=otherwise)
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    outputs = [
        helper.make_tensor_value_info(n, o.type.tensor_type.elem_type, None)
        for n, o in zip(names, graph.output, strict=True)
    ]
    outer = helper.make_graph([node], "outer", [condition, *graph.input], outputs)
    return helper.make_model(outer, opset_imports=model.opset_import, ir_version=10)


def random(shape: Sequence[int], dtype: int = FLOAT, *, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(NUMPY[dtype])


def in_float64(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The exact result: the same graph, with every float widened to float64, in numpy."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen(wide.graph)
    wider = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in feeds.items()}
    results: list[np.ndarray] = onnx.reference.ReferenceEvaluator(wide, new_ops=[ConvTranspose]).run(None, wider)
    return results


class ConvTranspose(onnx.reference.op_run.OpRun):
    """By its definition, for strides and dilations of one and no padding: onnx's own fails with groups."""

    def _run(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, **attributes: object) -> tuple:
        groups = attributes.get("group") or 1
        assert isinstance(groups, int)
        inputs, per_group = weight.shape[0] // groups, weight.shape[1]
        kernel = weight.shape[2:]
        sizes = [n + k - 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
        y = np.zeros((x.shape[0], per_group * groups, *sizes))
        for group in range(groups):
            channels = slice(group * per_group, (group + 1) * per_group)
            rows = slice(group * inputs, (group + 1) * inputs)
            for offset in np.ndindex(*kernel):
                place = tuple(slice(o, o + n) for o, n in zip(offset, x.shape[2:], strict=True))
                part = np.einsum("ni...,io->no...", x[:, rows], weight[(rows, slice(None), *offset)])
                y[(slice(None), channels, *place)] += part
        return (y if bias is None else y + bias.reshape(-1, *(1,) * len(kernel)),)


def _widen(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_type in NUMPY:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in NUMPY:
            value.type.tensor_type.elem_type = DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _widen(attribute.g)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in NUMPY:
                attribute.i = DOUBLE
            elif node.op_type == "Constant" and attribute.name == "value_float":
                number = numpy_helper.from_array(np.array(attribute.f, np.float64))
                attribute.CopyFrom(helper.make_attribute("value", number))
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in NUMPY:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float64)))


def assert_rounding(before: onnx.ModelProto, after: AnyModel, *feeds: Mapping[str, np.ndarray]) -> None:
    """No further from the float64 result than four times the original is, plus one eps of the dtype."""
    assert feeds, "nothing to compare"
    for feed in feeds:
        exact = in_float64(before, feed)
        for ideal, old, new in zip(exact, run_ort(before, feed), run_ort(after, feed), strict=True):
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            if not old.size:
                continue
            assert np.isfinite(ideal).all(), "a vacuous comparison"
            eps = float(np.finfo(old.dtype).eps) * float(np.abs(ideal).max())
            distance = float(np.abs(old.astype(np.float64) - ideal).max())
            assert float(np.abs(new.astype(np.float64) - ideal).max()) <= 4 * distance + eps


def reasons(records: Sequence[object]) -> str:
    """Why patterns nearly matched and did not, in one string."""
    return "; ".join(reason for record in records for reason in record.near_misses.values())  # type: ignore[attr-defined]


def only(model: ir.Model, op_type: str) -> ir.Node:
    """The one node of a type in the main graph."""
    (node,) = [n for n in model.graph if n.op_type == op_type]
    return node
