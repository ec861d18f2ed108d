"""What makes a file a model: checked once at load, linear in nodes, no weight read.

Everything that ``onnx_ir`` reads without complaint but no runtime could run is refused here with one line. Ops of
domains other than the standard one are not looked at: they are carried through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput
from graphopt.files.external import BITWIDTH, ExternalFiles, byte_count
from graphopt.files.signatures import is_runtime_op, signature


def check_model(model: ir.Model, proto: onnx.ModelProto, files: ExternalFiles, where: str) -> bool:
    """Refuse a model that could not run; put its nodes in order where they are not.

    Args:
        model: The model as deserialised from ``proto``.
        proto: The file's content; what deserialisation dropped is looked up in it.
        files: Ties external tensors to the model's folder and checks them.
        where: How error messages call the file.

    Returns:
        Whether any tensor lies in an external file.

    Raises:
        BadInput: Saying what is wrong, where, and what to do.
    """
    return Checker(model, proto, files, where).check()


class Checker:
    """Checks one freshly deserialised model; see `check_model`."""

    def __init__(self, model: ir.Model, proto: onnx.ModelProto, files: ExternalFiles, where: str) -> None:
        self._model = model
        self._proto = proto
        self._files = files
        self._where = where
        self._functions = set(model.functions)
        self._known: set[ir.Value] = set()
        self._external = False
        self._unsorted = False

    def check(self) -> bool:
        """Check everything. Returns whether any tensor is external."""
        self._check_header()
        self._check_graph(self._model.graph, self._proto.graph, self._opset(self._model.opset_imports), "graph")
        if self._unsorted:
            self._sort(self._model.graph)
        for function in self._model.functions.values():
            self._known.clear()
            self._unsorted = False
            title = f"function {function.domain}::{function.name}"
            _require_unique((v.name or "" for v in function.inputs), "input", f"{self._where}: {title}")
            self._check_graph(function.graph, None, self._opset(function.opset_imports, title), title)
            if self._unsorted:
                self._sort(function.graph)
        self._check_recursion()
        return self._external

    def _fail(self, what: str, *, at: str | None = None, hint: str = "export the model again") -> BadInput:
        return BadInput(what, where=self._where if at is None else f"{self._where}: {at}", hint=hint)

    def _check_header(self) -> None:
        proto = self._proto
        if proto.training_info:
            raise self._fail("holds training information, which would be lost", hint="export it for inference")
        if len(proto.functions) != len(self._model.functions):
            raise self._fail("defines one function twice")
        graph = self._model.graph
        if not graph.outputs:
            what = "has no outputs" if len(graph) else "is empty: no nodes and no outputs"
            raise self._fail(what, at="graph", hint="export the model again, naming its outputs")
        for value in graph.inputs:
            if value.type is None:
                raise self._fail("has no type", at=f"graph input {value.name!r}")

    def _opset(self, imports: dict[str, int], title: str | None = None) -> int:
        """The version of the standard domain; 0 where it is not imported."""
        version = imports.get("", imports.get("ai.onnx"))
        if version is None:
            return 0
        newest = onnx.defs.onnx_opset_version()
        if version > newest:
            raise self._fail(
                f"uses opset {version}; onnx {onnx.__version__} knows up to {newest}",
                at=title,
                hint="export with a lower opset, or upgrade onnx",
            )
        if version < 1:
            raise self._fail(f"imports opset {version}, which does not exist", at=title)
        return version

    def _check_graph(self, graph: ir.Graph, proto: onnx.GraphProto | None, opset: int, title: str) -> None:
        known = self._known
        if proto is not None:
            self._check_names(graph, proto, title)
        known.update(graph.inputs)
        known.update(graph.initializers.values())
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise self._fail("has no data", at=f"tensor {name!r}")
            self._check_tensor(value.const_value, f"tensor {name!r}")
        functions = self._functions
        for index, node in enumerate(graph):
            for read in node.inputs:
                if read is not None and read not in known:
                    self._check_late(node, read)
            if node.domain == "" and not (functions and node.op_identifier() in functions):
                self._check_standard_op(node, opset)
            if node.attributes:
                self._check_attributes(node, proto, index, opset)
            known.update(node.outputs)
        for value in graph.outputs:
            if value not in known:
                raise self._unproduced_output(graph, value, title)

    def _check_names(self, graph: ir.Graph, proto: onnx.GraphProto, title: str) -> None:
        """What deserialisation drops without a word: repeated inputs and initializers, sparse ones, nameless ones."""
        at = f"{self._where}: {title}"
        _require_unique((value.name or "" for value in graph.inputs), "input", at)
        if len(proto.initializer) != len(graph.initializers):
            _require_unique((tensor.name for tensor in proto.initializer), "initializer", at)
        if proto.sparse_initializer:
            name = proto.sparse_initializer[0].values.name
            raise self._fail(
                "sparse initializers are not supported", at=f"tensor {name!r}", hint="store it as a dense tensor"
            )

    def _check_late(self, node: ir.Node, value: ir.Value) -> None:
        """An input that nothing before the node makes: fine where the nodes are only out of order."""
        if value.producer() is None:
            raise self._fail(
                f"reads {value.name!r}, which nothing produces",
                at=label(node),
            )
        self._unsorted = True

    def _unproduced_output(self, graph: ir.Graph, value: ir.Value, title: str) -> BadInput:
        outer = any(found.name == value.name for found in self._known)
        if graph is not self._model.graph and outer:
            return self._fail(
                f"returns {value.name!r}, a value of the graph around it, directly",
                at=title,
                hint="return it through an Identity node",
            )
        return self._fail(f"output {value.name!r} is not produced by any node", at=title)

    def _check_standard_op(self, node: ir.Node, opset: int) -> None:
        if opset == 0:
            raise self._fail(
                "no opset import for the standard domain (ai.onnx)",
                at=label(node),
                hint="add opset_import { version: N } with the opset that the model was made for",
            )
        expected = signature(node.op_type, opset)
        if expected is None:
            if not is_runtime_op(node.op_type):
                raise self._unknown_op(node, opset)
            return
        inputs = node.inputs
        count = len(inputs)
        for position in expected.required:
            if position >= count or inputs[position] is None:
                raise self._fail(f"its required input {position} is missing", at=label(node))
        if count > expected.max_inputs:
            raise self._fail(
                f"has {count} inputs; {node.op_type} of opset {opset} takes at most {expected.max_inputs}",
                at=label(node),
            )
        if not expected.min_outputs <= len(node.outputs) <= expected.max_outputs:
            raise self._fail(
                f"has {len(node.outputs)} outputs; {node.op_type} of opset {opset} has"
                + (" at least" if len(node.outputs) < expected.min_outputs else " at most")
                + f" {expected.min_outputs if len(node.outputs) < expected.min_outputs else expected.max_outputs}",
                at=label(node),
            )
        for name in expected.needed_attributes:
            if name not in node.attributes:
                raise self._fail(f"its required attribute {name!r} is missing", at=label(node))
        types = expected.attribute_types
        for name, attribute in node.attributes.items():
            declared = types.get(name)
            if declared is not None and attribute.type != declared and attribute.type != 0:
                raise self._fail(
                    f"attribute {name!r} is {attribute.type.name}, should be {ir.AttributeType(declared).name}",
                    at=label(node),
                )

    def _unknown_op(self, node: ir.Node, opset: int) -> BadInput:
        newest = onnx.defs.onnx_opset_version()
        if signature(node.op_type, newest) is not None:
            since = onnx.defs.get_schema(node.op_type, newest, "")
            first = min(
                s.since_version
                for s in onnx.defs.get_all_schemas_with_history()
                if s.name == since.name and s.domain == ""
            )
            return self._fail(
                f"there is no {node.op_type} in opset {opset}; it came with opset {first}",
                at=label(node),
                hint="export the model with that opset or a newer one",
            )
        return self._fail(
            f"there is no op {node.op_type} in the standard domain (opset {opset})",
            at=label(node),
            hint="an op of your own belongs in a domain of its own",
        )

    def _check_attributes(self, node: ir.Node, proto: onnx.GraphProto | None, index: int, opset: int) -> None:
        for name, attribute in node.attributes.items():
            kind = attribute.type
            if kind is ir.AttributeType.INT or attribute.is_ref():
                continue
            if kind is ir.AttributeType.UNDEFINED:
                raise self._fail(f"attribute {name!r} has no known type", at=label(node))
            if kind is ir.AttributeType.TENSOR:
                self._check_tensor(attribute.as_tensor(), f"{label(node)}: attribute {name!r}")
            elif kind is ir.AttributeType.TENSORS:
                for tensor in attribute.as_tensors():
                    self._check_tensor(tensor, f"{label(node)}: attribute {name!r}")
            elif kind in graphs.GRAPH_ATTRIBUTES:
                one = kind is ir.AttributeType.GRAPH
                bodies: Sequence[ir.Graph] = [attribute.as_graph()] if one else attribute.as_graphs()
                protos: Sequence[onnx.GraphProto | None] = [None] * len(bodies)
                if proto is not None:
                    found = next(a for a in proto.node[index].attribute if a.name == name)
                    protos = [found.g] if one else list(found.graphs)
                for body, body_proto in zip(bodies, protos, strict=True):
                    self._check_graph(body, body_proto, opset, f"{label(node)}: {name}")

    def _check_tensor(self, tensor: ir.TensorProtocol, at: str) -> None:
        if isinstance(tensor, ir.serde.TensorProtoTensor):
            if problem := tensor_problem(tensor.raw):
                raise self._fail(problem, at=at, hint="the file is damaged; export the model again")
        elif isinstance(tensor, ir.ExternalTensor):
            self._external = True
            self._files.adopt(tensor)
        elif isinstance(tensor, ir.StringTensor) and len(tensor.string_data()) != math.prod(tensor.shape.numpy()):
            raise self._fail("the number of its strings does not fit its shape", at=at)

    def _sort(self, graph: ir.Graph) -> None:
        """Put nodes in order, as the standard demands and every pass expects; runtimes take any order."""
        try:
            graph.sort()
        except ValueError:
            cycle = graphs.find_cycle(graph)
            names = " -> ".join(node.name or f"{node.op_type}" for node in cycle[:4])
            more = " -> ..." if len(cycle) > 4 else ""
            raise self._fail(f"nodes depend on each other in a circle: {names}{more}", at="graph") from None

    def _check_recursion(self) -> None:
        functions = self._model.functions
        calls: dict[ir.OperatorIdentifier, list[ir.OperatorIdentifier]] = {}
        for key, function in functions.items():
            called = {
                node.op_identifier() for body in graphs.nested_graphs(function.graph) for node in body
            } & self._functions
            calls[key] = sorted(called)
        finished: set[ir.OperatorIdentifier] = set()
        for start in calls:
            stack: list[tuple[ir.OperatorIdentifier, bool]] = [(start, False)]
            open_calls: set[ir.OperatorIdentifier] = set()
            while stack:
                key, leaving = stack.pop()
                if leaving:
                    open_calls.discard(key)
                    finished.add(key)
                elif key in open_calls:
                    raise self._fail("calls itself", at=f"function {key[0]}::{key[1]}", hint="ONNX has no recursion")
                elif key not in finished:
                    open_calls.add(key)
                    stack.append((key, True))
                    stack.extend((callee, False) for callee in calls[key])


def label(node: ir.Node) -> str:
    """How an error message calls a node."""
    if node.name:
        return f"node {node.name!r} ({node.op_type})"
    outputs = [output.name for output in node.outputs if output.name]
    return f"{node.op_type} node that makes {outputs[0]!r}" if outputs else f"{node.op_type} node"


def tensor_problem(proto: onnx.TensorProto) -> str | None:
    """What is wrong with a tensor stored in the model file itself, or None."""
    dtype = proto.data_type
    dims = list(proto.dims)
    if dims and min(dims) < 0:
        return f"has a negative size in its shape {dims}"
    elements = math.prod(dims)
    if dtype == onnx.TensorProto.STRING:
        found, expected, unit = len(proto.string_data), elements, "strings"
    elif dtype not in BITWIDTH:
        return f"has unknown data type {dtype}"
    elif proto.HasField("raw_data"):
        found, expected, unit = len(proto.raw_data), byte_count(dtype, elements), "bytes"
    else:
        expected = elements
        if proto.float_data:
            found = len(proto.float_data)
            expected *= 2 if dtype == onnx.TensorProto.COMPLEX64 else 1
        elif proto.int32_data:
            found = len(proto.int32_data)
            if BITWIDTH[dtype] in (2, 4):  # two or four of them in each number
                expected = byte_count(dtype, elements)
        elif proto.int64_data:
            found = len(proto.int64_data)
        elif proto.double_data:
            found = len(proto.double_data)
            expected *= 2 if dtype == onnx.TensorProto.COMPLEX128 else 1
        else:
            found = len(proto.uint64_data)
        unit = "values"
    if found == expected:
        return None
    return f"has {found} {unit}, but its type and shape {dims} take {expected}"


def _require_unique(names: Iterable[str], kind: str, at: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise BadInput(f"an {kind} has no name", where=at, hint="export the model again")
        if name in seen:
            raise BadInput(f"{kind} {name!r} is there twice", where=at, hint="names must be unique")
        seen.add(name)
