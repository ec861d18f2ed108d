"""Passes of other libraries as passes of ours: onnx_ir's, onnxscript's rewrite rules, functions on graphsurgeon graphs.

* :func:`from_ir_pass` and :func:`apply_proto_function` change the whole model at once: one application, restored
  where they fail half way.
* :func:`from_rules` drives onnxscript's rules itself, each replacement through ``ctx.replace``: checked, priced and
  undone one by one. (onnxscript's own driver tries every rule on every node.)
* :func:`apply_graphsurgeon` hands a user's function a graph without its large weights, which stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput, MissingDependency, install_hint
from graphopt.rewrite.context import Context
from graphopt.rewrite.contract import Explanation, ForeignPass, Kind, Pass, Stage
from graphopt.verification.structure import sort_if_needed

if TYPE_CHECKING:
    import onnx
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

ASIDE_BYTES = 1024
"""Tensors above this size do not travel with a graph that another library gets."""
_ASIDE = "graphopt-aside:"

P = TypeVar("P", bound=Pass)


# --- onnx_ir passes ----------------------------------------------------------------------------------------------


def from_ir_pass(
    make: Callable[[], Any], *, name: str, kind: Kind, stage: Stage, explanation: Explanation
) -> type[ForeignPass]:
    """A pass that runs an onnx_ir pass.

    Args:
        make: The class of the onnx_ir pass, or a function that makes one (``lambda: the_pass`` for an object).
        name: Of the new pass.
        kind: What the pass does to the numbers; verification holds it to that.
        stage: When it runs.
        explanation: For ``graphopt passes``.

    Returns:
        A class to put into a recipe, or to name in the entry point group ``graphopt.passes``.
    """

    class IrPass(ForeignPass):
        def rewrite_model(self, ctx: Context) -> bool:
            before = ctx.model.clone()
            try:
                result = make()(ctx.model)
            except Exception:
                transplant(ctx.model, before)
                raise
            if result.modified and result.model is not ctx.model:
                transplant(ctx.model, result.model)
            sort_if_needed(ctx.model)
            return bool(result.modified)

    return _named(IrPass, name, kind, stage, explanation)


# --- onnxscript rules --------------------------------------------------------------------------------------------


def from_rules(
    rules: RewriteRuleSet | Sequence[RewriteRule], *, name: str, kind: Kind, stage: Stage, explanation: Explanation
) -> type[Pass]:
    """A pass that applies onnxscript rewrite rules, each replacement an application of its own.

    Rules are looked up by the operator they end in, so a node costs only the rules that can match it.

    Args:
        rules: A rule set, or rules.
        name: Of the new pass.
        kind: What the rules do to the numbers.
        stage: When it runs.
        explanation: For ``graphopt passes``.

    Raises:
        ValueError: A rule has several output nodes (its matcher tries all combinations of nodes of the graph) or
            makes a function; wrap such a rule with ``from_ir_pass``.
    """
    by_operator: dict[ir.OperatorIdentifier | None, list[RewriteRule]] = {}
    order = list(rules)
    for rule in order:
        pattern = rule._target_pattern  # the only way to tell where a pattern ends
        if not pattern.has_single_output_node or rule.as_function:
            raise ValueError(f"rule {rule.name or rule} has several output nodes or makes a function: use from_ir_pass")
        by_operator.setdefault(pattern.output_node.op_identifier(), []).append(rule)

    class RulesPass(Pass):
        def apply(self, ctx: Context) -> None:
            with _Prepared(ctx.model):
                for graph in list(ctx.graphs()):
                    _visit(order, "graph_pre_visitor")
                    for node in list(graph):
                        _apply_first(ctx, graph, node, by_operator)
                    _visit(order, "graph_post_visitor")

    return _named(RulesPass, name, kind, stage, explanation)


def _visit(rules: Sequence[RewriteRule], visitor: str) -> None:
    for rule in rules:
        call = getattr(rule, visitor)
        if call:
            call()


def _apply_first(
    ctx: Context,
    graph: ir.Graph,
    node: ir.Node,
    by_operator: dict[ir.OperatorIdentifier | None, list[RewriteRule]],
) -> None:
    for key in (node.op_identifier(), None):
        for rule in by_operator.get(key, ()):
            if node.graph is None:  # went with an earlier replacement
                return
            found = rule.try_rewrite(ctx.model, graph, node)
            if found is None:
                continue
            for new in found.new_nodes:
                # Its names are unique among themselves only; ctx gives names that are unique in the model.
                new.name = None
                for value in new.outputs:
                    value.name = None
            mapping = dict(zip(found.match.outputs, found.new_outputs, strict=True))
            for old, value in mapping.items():
                # What is known of the old value tells the target what the new one costs.
                value.shape = value.shape or old.shape
                value.type = value.type or old.type
            if ctx.replace(mapping, found.new_nodes, rule=rule.name or "rule", before=node):
                return


class _Prepared:
    """A model as onnxscript's matchers want it: constants marked, and what a caller may override not marked."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._overridable: list[tuple[ir.Value, ir.TensorProtocol]] = []
        self._imports = dict(model.opset_imports)

    def __enter__(self) -> None:
        from onnxscript.optimizer import basic_constant_propagation

        for graph in graphs.all_graphs(self._model):
            basic_constant_propagation(graph)
        for value in self._model.graph.inputs:
            if value.const_value is not None:
                self._overridable.append((value, value.const_value))
                value.const_value = None

    def __exit__(self, *_: object) -> None:
        for value, tensor in self._overridable:
            value.const_value = tensor
        added = set(self._model.opset_imports) - set(self._imports)
        used = {node.domain for node in graphs.all_nodes(self._model)} if added else set()
        for domain in added - used:  # of a replacement that was not made
            del self._model.opset_imports[domain]


# --- graphs without their weights --------------------------------------------------------------------------------


class Aside:
    """A copy of a model in which large tensors are references to what stays here.

    Attributes:
        model: The copy; it serialises to some hundred kilobytes, however large the weights are.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self._tensors: list[ir.TensorProtocol] = []
        for slot in _slots(self.model):
            tensor = slot.tensor
            if tensor.dtype is not ir.DataType.STRING and tensor.nbytes > ASIDE_BYTES:
                slot.put(self._reference(tensor))

    def _reference(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        self._tensors.append(tensor)
        return ir.ExternalTensor(
            f"{_ASIDE}{len(self._tensors) - 1}",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
        )

    def tensor(self, location: str) -> ir.TensorProtocol | None:
        """The tensor that a reference stands for; None where the location is none of ours."""
        if not location.startswith(_ASIDE):
            return None
        return self._tensors[int(location.removeprefix(_ASIDE))]

    def put_back(self, model: ir.Model) -> None:
        """Replace every reference in a model, under whatever name it is now, by its tensor."""
        for slot in _slots(model):
            if isinstance(slot.tensor, ir.ExternalTensor):
                tensor = self.tensor(str(slot.tensor.location))
                if tensor is not None:
                    slot.put(tensor)


@dataclass(frozen=True)
class _Slot:
    """A place in a model that holds a tensor."""

    tensor: ir.TensorProtocol
    put: Callable[[ir.TensorProtocol], None]


def _slots(model: ir.Model) -> Iterator[_Slot]:
    for graph in graphs.all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield _Slot(value.const_value, lambda tensor, value=value: setattr(value, "const_value", tensor))  # type: ignore[misc]
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():

                    def put(tensor: ir.TensorProtocol, node: ir.Node = node, name: str = name) -> None:
                        node.attributes[name] = ir.AttrTensor(name, tensor)

                    yield _Slot(attribute.as_tensor(), put)


def transplant(model: ir.Model, new: ir.Model) -> None:
    """Give a model the graph, functions and opsets of another, in order; the other must not be used afterwards."""
    sort_if_needed(new)
    new.graph.meta.update(model.graph.meta)
    model.graph = new.graph
    model.functions.clear()
    model.functions.update(new.functions)
    model.ir_version = new.ir_version


def apply_proto_function(model: ir.Model, function: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Change a model by a function on protos that has no use for weights: it gets references to the large ones.

    Names, documentation and metadata that the function drops are restored where names tell what they belonged to;
    inputs and outputs keep the types and shapes that they were declared with.
    """
    aside = Aside(model)
    new = ir.from_proto(function(ir.to_proto(aside.model)))
    aside.put_back(new)
    for ports, declared in ((new.graph.inputs, model.graph.inputs), (new.graph.outputs, model.graph.outputs)):
        known = {value.name: value for value in declared}
        for value in ports:
            if value.name in known:
                value.type, value.shape = known[value.name].type, known[value.name].shape
    restore_metadata(new, model)
    transplant(model, new)


def restore_metadata(new: ir.Model, old: ir.Model) -> None:
    """Put back documentation and metadata that another library dropped: graph, nodes and values, found by name."""
    new.graph.doc_string = new.graph.doc_string or old.graph.doc_string
    new.graph.name = new.graph.name or old.graph.name
    _merge(new.graph.metadata_props, old.graph.metadata_props)
    nodes: dict[tuple[str, str, str], ir.Node] = {}
    values: dict[str, ir.Value] = {}
    for graph in graphs.nested_graphs(old.graph):
        values.update((value.name, value) for value in (*graph.inputs, *graph.initializers.values()) if value.name)
        for node in graph:
            values.update((value.name, value) for value in node.outputs if value.name)
            nodes.setdefault(_key(node), node)
    for graph in graphs.nested_graphs(new.graph):
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            known = values.get(value.name or "")
            if known is not None:
                value.doc_string = value.doc_string or known.doc_string
                _merge(value.metadata_props, known.metadata_props)
        for node in graph:
            same = nodes.get(_key(node))
            if same is not None:
                node.doc_string = node.doc_string or same.doc_string
                _merge(node.metadata_props, same.metadata_props)
    for identifier, function in new.functions.items():
        original = old.functions.get(identifier)
        if original is not None:
            function.doc_string = function.doc_string or original.doc_string
            _merge(function.metadata_props, original.metadata_props)


def _key(node: ir.Node) -> tuple[str, str, str]:
    first = next((value.name for value in node.outputs if value.name), "")
    return node.domain, node.op_type, node.name or f"output {first}"


def _merge(new: Any, old: Any) -> None:
    for key, text in old.items():
        new.setdefault(key, text)


# --- graphsurgeon ------------------------------------------------------------------------------------------------


def apply_graphsurgeon(model: ir.Model, function: Callable[[Any], Any], label: str) -> bool:
    """Let a function on onnx-graphsurgeon graphs change a model.

    The function gets the graph without its large weights; one whose ``values`` it reads is loaded then, and written
    back only if so. What graphsurgeon would drop or spoil is guarded: metadata is restored, overridable inputs stay
    inputs, constants given as numbers get the type that the standard says, data types it cannot write are refused.

    Args:
        model: Changed in place.
        function: FN(graph) -> graph, or None where it changed the graph that it got.
        label: How the function is called in messages.

    Returns:
        Whether the model changed.

    Raises:
        MissingDependency: onnx-graphsurgeon is not installed.
        BadInput: The model holds what graphsurgeon cannot carry, or the function failed or returned something else.
    """
    try:
        import onnx_graphsurgeon as gs
    except ImportError as error:
        raise MissingDependency("needs onnx-graphsurgeon", where=label, hint=install_hint("graphsurgeon")) from error

    _refuse_what_graphsurgeon_spoils(model, label)
    aside = Aside(model)
    _spell_out_constants(aside.model)
    graph = _attempt(label, lambda: gs.import_onnx(ir.to_proto(aside.model)))
    _load_on_demand(graph, aside, gs)
    untouched = _exported(graph, label, gs)
    result = _attempt(label, lambda: function(graph))
    if result is not None and not isinstance(result, gs.Graph):
        raise BadInput(f"returned a {type(result).__name__}, not a graph or None", where=label)
    proto = _exported(graph if result is None else result, label, gs)
    if proto.SerializeToString(deterministic=True) == untouched.SerializeToString(deterministic=True):
        return False
    proto.ir_version = model.ir_version
    new = ir.from_proto(proto)
    aside.put_back(new)
    _restore_inputs(new, model)
    restore_metadata(new, model)
    transplant(model, new)
    return True


def _attempt(label: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except BadInput:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise BadInput(f"{type(error).__name__}: {first}", where=label) from error


def _exported(graph: Any, label: str, gs: Any) -> onnx.ModelProto:
    proto: onnx.ModelProto = _attempt(label, lambda: gs.export_onnx(graph, do_type_check=False))
    return proto


_WRITABLE_ATTRIBUTES = frozenset(
    {
        ir.AttributeType.FLOAT,
        ir.AttributeType.INT,
        ir.AttributeType.STRING,
        ir.AttributeType.TENSOR,
        ir.AttributeType.GRAPH,
        ir.AttributeType.FLOATS,
        ir.AttributeType.INTS,
        ir.AttributeType.STRINGS,
    }
)


def _refuse_what_graphsurgeon_spoils(model: ir.Model, label: str) -> None:
    def refuse(what: str) -> BadInput:
        return BadInput(f"onnx-graphsurgeon cannot carry {what}", where=label, hint="leave this pass out")

    for identifier in model.functions:
        if identifier[2]:
            raise refuse(f"overloads of functions ({identifier[1]})")
    for value in model.graph.inputs:
        if isinstance(value.type, ir.OptionalType):
            raise refuse(f"optional inputs ({value.name})")
    for graph in graphs.all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            if _is_spoiled(value.dtype):
                raise refuse(f"{value.dtype} ({value.name})")
        for node in graph:
            for value in node.outputs:
                if _is_spoiled(value.dtype):
                    raise refuse(f"{value.dtype} ({value.name})")
            for attribute in node.attributes.values():
                if attribute.type not in _WRITABLE_ATTRIBUTES:
                    raise refuse(f"attributes of type {attribute.type} ({node.name or node.op_type}.{attribute.name})")
                if (
                    attribute.type is ir.AttributeType.TENSOR
                    and not attribute.is_ref()
                    and _is_spoiled(attribute.as_tensor().dtype)
                ):
                    raise refuse(f"{attribute.as_tensor().dtype} ({node.name or node.op_type}.{attribute.name})")


def _is_spoiled(dtype: ir.DataType | None) -> bool:
    """Types of less than a byte, and the one that graphsurgeon writes as another."""
    if dtype is None or dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return False
    return dtype.bitwidth < 8 or dtype is ir.DataType.FLOAT8E4M3FNUZ


def _spell_out_constants(model: ir.Model) -> None:
    """Give constants that are written as numbers a tensor: graphsurgeon would fold 1.0 to a double."""
    for node in graphs.all_nodes(model):
        if node.op_type != "Constant" or node.domain != "" or "value" in node.attributes:
            continue
        tensor = graphs.constant_tensor(node.outputs[0])
        if tensor is not None:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)


def _load_on_demand(graph: Any, aside: Aside, gs: Any) -> None:
    """Make constants whose values are set aside load them when the user's function asks for them."""
    from onnx_graphsurgeon.ir.tensor import LazyValues

    def loader(values: Any) -> Callable[[], np.ndarray[Any, Any]] | None:
        locations = [entry.value for entry in values.tensor.external_data if entry.key == "location"]
        tensor = aside.tensor(locations[0]) if locations else None
        return None if tensor is None else lambda: np.array(tensor.numpy())

    for constant in _constants(graph, gs):
        values = constant._values
        if isinstance(values, LazyValues) and hasattr(values.tensor, "external_data"):
            load = loader(values)
            if load is not None:
                values.load = load
                # Else values that were loaded would be written as a reference to a file.
                constant.data_location = None


def _constants(graph: Any, gs: Any) -> Iterator[Any]:
    """Every constant of a graphsurgeon graph, its bodies and functions, each at least once."""
    for part in (graph, *graph.subgraphs(recursive=True), *getattr(graph, "functions", ())):
        yield from (tensor for tensor in part.tensors().values() if isinstance(tensor, gs.Constant))
        for node in part.nodes:
            yield from (value for value in node.attrs.values() if isinstance(value, gs.Constant))
            yield from (value for value in node.inputs if isinstance(value, gs.Constant))


def _restore_inputs(new: ir.Model, old: ir.Model) -> None:
    """Initializers that a caller may override are inputs again; graphsurgeon makes them constants."""
    present = {value.name for value in new.graph.inputs}
    added = [v for v in old.graph.inputs if v.name not in present and v.name in new.graph.initializers]
    if not added:
        return
    by_name = {value.name: value for value in new.graph.inputs}
    by_name.update((value.name, new.graph.initializers[value.name or ""]) for value in added)
    rest = [value for value in new.graph.inputs if value.name not in {v.name for v in old.graph.inputs}]
    ordered = [by_name[value.name] for value in old.graph.inputs if value.name in by_name]
    new.graph.inputs.clear()
    new.graph.inputs.extend([*ordered, *rest])


def _named(cls: type[P], name: str, kind: Kind, stage: Stage, explanation: Explanation) -> type[P]:
    cls.name, cls.kind, cls.stage, cls.explanation = name, kind, stage, explanation
    cls.__name__ = cls.__qualname__ = "".join(part.capitalize() for part in name.split("-"))
    return cls
