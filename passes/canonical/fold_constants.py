"""Computes once what every run would compute alike: constants of constants, and what follows from known shapes."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import mmap
from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt import evaluate, graphs
from graphopt.evaluate import Job, Operation
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.shape_values import ShapeValues, reshape_target
from graphopt.shapes import infer_shapes, is_known, trusted_shape

_FREE_BYTES = 64 << 10
"""A result up to this size is stored without asking whether the file grows."""
_LATER_BYTES = 1 << 20
"""A larger result is computed when the model is saved, one at a time."""
_READ_BYTES = 16 << 20
"""Weights above this are not read to compute something small from them."""

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}
)
_QUANTISATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_NEVER = _RANDOM | _QUANTISATION | {"Constant"}
_SHAPE_OPS = frozenset({"Shape", "Size"})
_PARTIAL_READS = frozenset({"Gather", "Slice", "Split"})
_NOT_FOLDED = frozenset({ir.DataType.STRING, ir.DataType.UNDEFINED})
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_SHAPED = frozenset(
    {
        *("Reshape", "Pad", "Expand", "Slice", "Tile", "ConstantOfShape", "Resize", "Upsample", "Range", "Squeeze"),
        *(
            "Unsqueeze",
            "Split",
            "TopK",
            "OneHot",
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "CenterCropPad",
            "If",
            "Loop",
        ),
    }
)
_UNBOUNDED = frozenset({"Resize", "Upsample", "OneHot", "EyeLike", "ConstantOfShape", "Range", "Expand", "Tile", "Pad"})


class FoldConstants(Pass):
    """Replaces nodes whose result is the same in every run by that result.

    Constant nodes become initializers. Nodes that read only constants are computed: exactly defined ones with numpy,
    all others in one ONNX Runtime session with its optimizations off, so that the bits are those of the runtime.
    Results over 1 MB are computed when the model is saved. Values that follow from known axes become constants, and a
    Reshape whose computed target only copies axes of its input gets a constant target.
    """

    name = "fold-constants"
    kind = Kind.BITWISE
    stage = Stage.ELIMINATE
    explanation = Explanation(
        matches="Constant nodes; standard nodes that read constants only; integers computed from shapes, element by "
        "element, with axes known by number or by name; Reshape to a shape computed from its input's axes",
        refuses="random operators; Quantize- and DequantizeLinear; nodes with bodies, calls of functions, operators of "
        "other domains; results over 64 KB that make the file larger; float16 arithmetic that rounds, which ONNX "
        "Runtime does only at the end of a chain; without onnxruntime, what numpy does not define to the bit",
        costs="one look at each node, one runtime session for all that numpy does not compute; saves the nodes and "
        "may make the file larger, by up to 64 KB for each result",
        source="ONNX operator specification",
    )

    def apply(self, ctx: Context) -> None:
        ctx.near_misses.pop(self.name, None)  # each round looks at every node: what stopped an earlier one may be gone
        self._lift_constants(ctx)
        values = ShapeValues(ctx.opset)
        folding = _Folding(ctx, values)
        functions = [function.graph for function in ctx.model.functions.values()]
        in_function = {id(inner) for graph in functions for inner in graphs.nested_graphs(graph)}
        for graph in ctx.graphs():
            folding.look_at(graph, small_only=id(graph) in in_function)
        folding.run_jobs()
        folding.replace()
        self._fix_targets(ctx, values)
        if folding.tells_shapes:
            infer_shapes(ctx.model)

    def _lift_constants(self, ctx: Context) -> None:
        """Constant nodes become initializers, those of a graph at once. Functions hold no initializers."""
        for graph in list(graphs.nested_graphs(ctx.model.graph)):
            mapping: dict[ir.Value, ir.Value] = {}
            for node in graph:
                if node.op_type != "Constant" or node.domain != "" or node.outputs[0].is_graph_output():
                    continue
                value = node.outputs[0]
                tensor = graphs.constant_tensor(value)
                if tensor is not None and value.uses():
                    mapping[value] = ctx.constant(tensor, value.name or "constant")
            if mapping:
                ctx.replace(mapping, rule="constant-node")

    def _fix_targets(self, ctx: Context, values: ShapeValues) -> None:
        """Computed targets of Reshape that say no more than a constant could."""
        wanted: dict[ir.Value, list[tuple[ir.Node, list[int]]]] = {}
        for node in ctx.nodes("Reshape"):
            if len(node.inputs) > 1 and node.inputs[1] is not None and not graphs.is_constant(node.inputs[1]):
                target = reshape_target(node, values)
                if target is not None:
                    wanted.setdefault(node.inputs[1], []).append((node, target))
        for computed, readers in wanted.items():
            if computed.is_graph_output() or len(readers) < len(computed.uses()):
                ctx.refuse(readers[0][0], f"others read its computed shape {computed.name} too")
                continue
            for node, target in readers:
                operand = ctx.constant(np.array(target, np.int64), f"{node.outputs[0].name}/shape")
                made = ctx.node("Reshape", [node.inputs[0], operand], like=node.outputs[0])
                ctx.replace({node.outputs[0]: made.outputs[0]}, [made], rule="reshape-target", certain=True)


class _Folding:
    """One round: what is known of values, and which nodes make them. The graph changes at the end only."""

    def __init__(self, ctx: Context, values: ShapeValues) -> None:
        self.ctx = ctx
        self.values = values
        self.known: dict[ir.Value, ir.TensorProtocol] = {}
        self.folded: list[tuple[ir.Node, str]] = []
        self.jobs: list[Job] = []
        self.pending: set[ir.Value] = set()
        self.tells_shapes = False
        self.has_runtime = importlib.util.find_spec("onnxruntime") is not None

    # -- finding ---------------------------------------------------------------------------------------------------

    def look_at(self, graph: ir.Graph, *, small_only: bool) -> None:
        for node in graph:
            if node.domain != "" or node.op_type in _NEVER or not node.inputs:
                continue
            if node.attributes and (graphs.has_subgraphs(node) or any(a.is_ref() for a in node.attributes.values())):
                continue
            if self._constant_inputs(node) and self._fold(node, small_only=small_only):
                continue
            if len(node.outputs) == 1 and node.outputs[0].dtype in _SHAPE_DTYPES:
                array = self.values.constant(node.outputs[0])
                if array is not None:
                    self._learn(node, [ir.Tensor(array)], "shape")

    def _constant_inputs(self, node: ir.Node) -> bool:
        return all(
            value is None or value in self.known or value in self.pending or graphs.is_constant(value)
            for value in node.inputs
        )

    def _tensor(self, value: ir.Value) -> ir.TensorProtocol | None:
        return self.known[value] if value in self.known else graphs.constant_tensor(value)

    def _learn(self, node: ir.Node, tensors: Sequence[ir.TensorProtocol], rule: str) -> None:
        for output, tensor in zip(node.outputs, tensors, strict=True):
            self.known[output] = tensor
            if tensor.dtype in _SHAPE_DTYPES and tensor.size <= 64:
                self.values.learn(output, tensor.numpy())
        self.folded.append((node, rule))

    def _fold(self, node: ir.Node, *, small_only: bool) -> bool:
        if any(value in self.pending for value in node.inputs if value is not None):
            return self._schedule(node, 0)
        tensors = [None if value is None else self._tensor(value) for value in node.inputs]
        if any(t is not None and t.dtype in _NOT_FOLDED for t in tensors):
            return False
        read = sum(t.nbytes for t in tensors if t is not None)
        if node.op_type in _SHAPE_OPS:
            return False  # the shape alone decides: nothing needs to be read
        operation = Operation.of(node, self.ctx.opset)
        if read > _LATER_BYTES and not small_only and self._fold_later(node, operation, tensors):
            return True
        if read > _READ_BYTES and node.op_type not in _PARTIAL_READS:
            self.ctx.refuse(node, f"would read {read / 1e6:.0f} MB of weights")
            return False
        # The limit is in elements: an element has a byte at least.
        arrays = [None if t is None else t.numpy() for t in tensors]
        results = evaluate.evaluate(operation, arrays, limit=max(_FREE_BYTES, 2 * read))
        if results is None:
            return self._schedule(node, read)
        made = sum(result.nbytes for result in results)
        if made > _FREE_BYTES and (made > 2 * read or small_only):
            self.ctx.refuse(node, f"the result has {made} bytes, what it is made of {read}")
            return False
        self._learn(node, [_tensor(result) for result in results], "constant")
        return True

    def _fold_later(self, node: ir.Node, operation: Operation, tensors: Sequence[ir.TensorProtocol | None]) -> bool:
        """Describe a large result without reading what it is made of."""
        first = tensors[0]
        result = node.outputs[0].dtype
        if node.op_type == "Cast" and "to" in node.attributes:
            result = ir.DataType(node.attributes["to"].as_int())
        if first is None or result is None or not evaluate.is_value_independent(node.op_type, first.dtype, result):
            return False
        shapes = evaluate.result_shapes(operation, tensors)
        if shapes is None:
            return False
        nbytes = [math.ceil(math.prod(shape) * result.bitwidth / 8) for shape in shapes]
        if max(nbytes) <= _LATER_BYTES:
            return False
        if sum(nbytes) > 2 * sum(t.nbytes for t in tensors if t is not None):
            self.ctx.refuse(node, f"the result has {sum(nbytes)} bytes, twice what it is made of")
            return False
        kept = list(tensors)
        self._learn(
            node,
            [
                ir.LazyTensor(
                    partial(_compute, operation, kept, index, result), dtype=result, shape=ir.Shape(shape), cache=False
                )
                for index, shape in enumerate(shapes)
            ],
            "weight",
        )
        return True

    def _schedule(self, node: ir.Node, read: int) -> bool:
        """Leave a node to the runtime, where that computes it to the same bits and its result is not large."""
        if not self.has_runtime:
            return False
        if read > _READ_BYTES:
            self.ctx.refuse(node, f"would read {read / 1e6:.0f} MB of weights")
            return False
        dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.name != ""}
        if None in dtypes or any(d in _NOT_FOLDED or d not in _FED for d in dtypes):
            return False
        if dtypes & _NARROW:
            self.ctx.refuse(node, "ONNX Runtime rounds float16 at the end of a chain, not after each node")
            return False
        for output in node.outputs:
            if not isinstance(output.type, ir.TensorType):
                return False
            shape = graphs.static_shape(output)
            if shape is None and output.name != "" and node.op_type in _UNBOUNDED:
                self.ctx.refuse(node, "the size of its result is not known")
                return False
            if shape is not None and output.dtype is not None:
                made = math.prod(shape) * output.dtype.itemsize
                if made > max(_FREE_BYTES, 2 * read):
                    self.ctx.refuse(node, f"the result has {made:.0f} bytes, what it is made of {read}")
                    return False
        inputs: list[np.ndarray | ir.Value | None] = []
        for value in node.inputs:
            tensor = None if value is None or value in self.pending else self._tensor(value)
            inputs.append(value if value in self.pending else None if tensor is None else tensor.numpy())
        self.jobs.append(Job(node, inputs))
        self.pending.update(output for output in node.outputs if output.name != "")
        return True

    def run_jobs(self) -> None:
        """Compute what numpy does not, all at once."""
        results = evaluate.run_jobs(self.jobs, self.ctx.opset)
        for job in self.jobs:
            outputs = [output for output in job.node.outputs if output.name != ""]
            if outputs and all(output in results for output in outputs):
                for output in outputs:
                    if results[output].nbytes <= _FREE_BYTES or graphs.static_shape(output) is not None:
                        self.known[output] = ir.Tensor(results[output])
                self.folded.append((job.node, "constant"))

    # -- replacing -------------------------------------------------------------------------------------------------

    def replace(self) -> None:
        """Put constants where folded values are read, last ones first: what only they read goes with them."""
        # Jobs stand last: they read from what numpy computed, never the other way round.
        for node, rule in reversed(self.folded):
            if node.graph is None:
                continue
            outputs = [o for o in node.outputs if o in self.known and (o.uses() or o.is_graph_output())]
            large = sum(self.known[o].nbytes for o in outputs)
            if large > _FREE_BYTES and (freed := _freed(node)) < large:
                self.ctx.refuse(node, f"would store {large} bytes beside what others read ({freed} bytes go)")
                continue
            self._replace_outputs(node, outputs, rule)

    def _replace_outputs(self, node: ir.Node, outputs: Sequence[ir.Value], rule: str) -> None:
        mapping: dict[ir.Value, ir.Value] = {}
        copies: list[ir.Node] = []
        for output in outputs:
            if output.is_graph_output() and node.op_type == "Identity":
                continue  # a constant that is returned has this form
            constant = self.ctx.constant(self.known[output], output.name or "constant")
            if output.is_graph_output():
                copies.append(self.ctx.node("Identity", [constant], like=output))
                constant = copies[-1].outputs[0]
            mapping[output] = constant
        tells = any(_tells_shape(use.node) for output in mapping for use in output.uses())
        if mapping and self.ctx.replace(mapping, copies, rule=rule, certain=True):
            self.tells_shapes = self.tells_shapes or tells


_SHAPE_DTYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
_FED = frozenset(
    {
        *(ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL, ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
        *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
        *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
    }
)


def _tells_shape(reader: ir.Node) -> bool:
    """Whether a constant operand may tell the shape of an output that is not known yet."""
    return reader.op_type in _SHAPED and not all(is_known(trusted_shape(o)) for o in reader.outputs)


def _freed(node: ir.Node) -> int:
    """The bytes of the constants that go when a node goes: those that only it, and what only it reads, reads."""
    gone = {node}
    pending = [node]
    freed = 0
    seen: set[ir.Value] = set()
    while pending:
        for value in pending.pop().inputs:
            if value is None or value in seen or value.is_graph_output():
                continue
            if not all(use.node in gone for use in value.uses()):
                continue
            seen.add(value)
            producer = value.producer()
            if producer is None:
                tensor = graphs.constant_tensor(value)
                freed += 0 if tensor is None else tensor.nbytes
            elif producer not in gone and all(
                o in seen or (not o.uses() and not o.is_graph_output()) for o in producer.outputs
            ):
                gone.add(producer)
                pending.append(producer)
    return freed


def _tensor(array: np.ndarray) -> ir.TensorProtocol:
    """A tensor of its own: not a view that keeps a larger array, or a file, alive."""
    owned = array if array.flags.owndata and array.flags.c_contiguous else np.array(array, order="C", copy=True)
    return ir.Tensor(owned)


def _compute(
    operation: Operation, tensors: Sequence[ir.TensorProtocol | None], index: int, dtype: ir.DataType
) -> ir.TensorProtocol:
    """One output of an operation on large tensors; what is read from files is let go of again."""
    views = [_own_view(tensor) for tensor in tensors]
    arrays = [None if view is None else view.numpy() for view in views]
    results = evaluate.evaluate(operation, arrays)
    assert results is not None, f"{operation.op_type} was computable when it was folded"
    result = results[index]
    owned = result if result.flags.owndata and result.flags.c_contiguous else np.array(result, order="C", copy=True)
    del arrays, results, result
    for view, tensor in zip(views, tensors, strict=True):
        if view is not tensor and isinstance(view, ir.ExternalTensor):
            with contextlib.suppress(Exception):  # pages stay until the system wants them: slower, not wrong
                if view.raw is not None:
                    view.raw.madvise(mmap.MADV_DONTNEED)
                view.release()
    return ir.Tensor(owned, dtype=dtype)


def _own_view(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """A tensor that shares no file mapping with others, since mappings are closed after use."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=tensor.base_dir,
    )
