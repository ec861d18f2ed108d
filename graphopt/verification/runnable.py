"""Makes a model run on ONNX Runtime's CPU where it does not: a float32 twin, unknown operators cut out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import GraphoptError

NARROW = frozenset(
    {
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
    }
)
OPAQUE = "opaque:"
"""What the inputs and outputs that stand for a node cut out are called, at the beginning."""
# Attributes that hold a data type, by operator.
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype"}


@dataclass
class Preparation:
    """What had to be done to a model so that it runs.

    Attributes:
        twin: Whether narrow floats became float32.
        opaque: Names of nodes that the runtime does not know; each was cut out: what it reads became an output, what
            it gives became an input.
        dropped: Names of nodes that could not be checked, since nothing is known of what an opaque node gives them.
    """

    twin: bool = False
    opaque: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def needed(self) -> bool:
        """Whether anything had to be done."""
        return self.twin or bool(self.opaque)


def prepare(model: ir.Model, *, has_custom_ops: bool = False) -> Preparation:
    """Make a model runnable on ONNX Runtime's CPU, in place. What runs as it is stays as it is.

    Args:
        model: Changed in place.
        has_custom_ops: Whether the user gave a library of custom operators: then nothing counts as opaque.
    """
    done = Preparation()
    if not has_custom_ops:
        _cut_opaque(model, done)
    if needs_twin(model):
        float32_twin(model)
        done.twin = True
    return done


@cache
def _kernels() -> dict[tuple[str, str], frozenset[str]]:
    """(domain, operator) -> the tensor types that some CPU kernel of ONNX Runtime takes."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    found: dict[tuple[str, str], set[str]] = {}
    for kernel in get_all_opkernel_def():
        if kernel.provider not in ("CPUExecutionProvider", ""):
            continue
        types = found.setdefault(
            (kernel.domain.replace("ai.onnx.ml", "ml").replace("ai.onnx", ""), kernel.op_name), set()
        )
        for accepted in kernel.type_constraints.values():
            types.update(accepted)
    return {key: frozenset(types) for key, types in found.items()}


@cache
def _schemas() -> frozenset[str]:
    import onnx.defs

    return frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "")


def is_known(node: ir.Node, model: ir.Model) -> bool:
    """Whether ONNX Runtime can run an operator: it has a kernel, a standard definition, or a function body."""
    if (node.domain, node.op_type, node.overload) in model.functions:
        return True
    if node.domain == "":
        return node.op_type in _schemas() or ("", node.op_type) in _kernels()
    domain = node.domain.replace("ai.onnx.ml", "ml")
    return (domain, node.op_type) in _kernels()


def needs_twin(model: ir.Model) -> bool:
    """Whether some node takes or gives a narrow float for which its operator has no CPU kernel."""
    for node in graphs.all_nodes(model):
        if node.domain:
            continue
        for value in (*node.inputs, *node.outputs):
            kind = None if value is None else value.type
            if kind is not None and kind.dtype in NARROW:
                types = _kernels().get(("", node.op_type))
                if types and f"tensor({_ort_name(kind.dtype)})" not in types:
                    return True
    return False


def _ort_name(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def float32_twin(model: ir.Model) -> None:
    """Turn every narrow float of a model into float32, in place: weights, types, and what Casts ask for."""
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype in NARROW:
                value.const_value = _widened(tensor)
                value.type = ir.TensorType(ir.DataType.FLOAT)
        for value in graph.inputs:
            _widen_type(value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype in NARROW:
                    node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
                elif (
                    name in _TYPE_ATTRIBUTES
                    and attribute.type is ir.AttributeType.INT
                    and ir.DataType(attribute.as_int()) in NARROW
                ):
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            for value in node.outputs:
                _widen_type(value)


def _widen_type(value: ir.Value) -> None:
    if value.dtype in NARROW and isinstance(value.type, ir.TensorType):
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _cut_opaque(model: ir.Model, done: Preparation) -> None:
    graph = model.graph
    nodes = list(graphs.all_nodes(model))
    kinds = {(node.domain, node.op_type, node.overload): node for node in nodes}
    if all(is_known(node, model) for node in kinds.values()):
        return
    everywhere = [node for node in nodes if not is_known(node, model)]
    unknown = [node for node in graph if not is_known(node, model)]
    if len(unknown) < len(everywhere):
        raise GraphoptError(
            "an operator that ONNX Runtime does not know stands inside a body or function, which cannot be checked",
            hint="give its library with --custom-ops, or skip the check with --no-verify",
        )
    lost: set[ir.Value] = set()
    labels: Counter[str] = Counter()
    for node in unknown:
        # Inputs and outputs are named after the opaque node, which no rewrite touches, so that they are called the same
        # in every version of the model; the values that it reads and makes may change their names.
        label = node.name or node.op_type
        labels[label] += 1
        label = label if labels[label] == 1 else f"{label}#{labels[label]}"
        done.opaque.append(label)
        for index, value in enumerate(node.inputs):
            if value is not None and value not in lost and value.dtype is not None:
                shown = ir.Value(name=f"{OPAQUE}{label}:{index}", type=value.type, shape=value.shape)
                graph.insert_before(node, ir.Node("", "Identity", [value], outputs=[shown]))
                graph.outputs.append(shown)
        if not all(value.dtype is not None and value.shape is not None for value in node.outputs):
            lost.update(node.outputs)
            continue
        for index, value in enumerate(node.outputs):
            source = ir.Value(name=f"{OPAQUE}{label}:out{index}", type=value.type, shape=value.shape)
            graph.inputs.append(source)
            if value.is_graph_output():
                copy = ir.Node("", "Identity", [source], outputs=[ir.Value(name=value.name, type=value.type)])
                graph.insert_after(node, copy)
                source_for_output = copy.outputs[0]
                value.name = None
                for place, output in enumerate(graph.outputs):
                    if output is value:
                        graph.outputs[place] = source_for_output
            for use in tuple(value.uses()):
                use.node.replace_input_with(use.idx, source)
        _detach(graph, node)
    for node in list(graph):
        if any(value in lost for value in graphs.read_by(node)) or any(value in lost for value in node.outputs):
            lost.update(node.outputs)
            if node not in unknown:
                done.dropped.append(node.name or node.op_type)
    outputs = [value for value in graph.outputs if value not in lost]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    for node in reversed(list(graph)):
        if any(value in lost for value in node.outputs):
            _detach(graph, node)
    if not outputs:
        raise GraphoptError(
            f"nothing can be checked: every output depends on {done.opaque[0]}, which ONNX Runtime does not know",
            hint="give its library with --custom-ops, or skip the check with --no-verify",
        )


def _detach(graph: ir.Graph, node: ir.Node) -> None:
    graphs.detach(node)
    graph.remove(node)
