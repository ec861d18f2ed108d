"""What a pass may do to a model: one way to replace values, which checks, records and tags every change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.rewrite.application import Application, Checkpoint, Observer
from graphopt.rewrite.contract import Pass, Saves
from graphopt.shapes import inherit_trust
from graphopt.store import Store
from graphopt.targets import Target

NEAR_MISSES_KEPT = 50


class Context:
    """A model being rewritten, the target it is for, and a record of what was done.

    Args:
        model: Changed in place.
        target: What the result runs on.
        skip: Keys of applications not to make: those that a check has refused. ``pass:`` stands for all of a pass.
        observers: Told of every replacement before it happens.
        feeds: Calibration data for passes that need some; None where the user gave none.
        store: For results of long computations on weights.
        say: Told in words how far a long computation is.
    """

    def __init__(
        self,
        model: ir.Model,
        target: Target,
        *,
        skip: Collection[str] = (),
        observers: Sequence[Observer] = (),
        limit: int | None = None,
        feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
        store: Store | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.target = target
        self.feeds = feeds
        self.store = Store() if store is None else store
        self.say: Callable[[str], None] = say or (lambda text: None)
        self.skip = frozenset(skip)
        self.limit = limit
        self.observers = list(observers)
        self.applications: list[Application] = []
        self.not_cheaper: Counter[str] = Counter()
        self.near_misses: dict[str, dict[str, str]] = {}
        self.passes: frozenset[str] = frozenset()
        self._current: Pass | None = None
        self._keys: Counter[str] = Counter()
        self._names: set[str] | None = None
        self._suffixes: dict[str, int] = {}
        self._node_names: set[str] | None = None
        self._node_suffixes: dict[str, int] = {}
        self._pinned = frozenset(model.graph.inputs) | frozenset(model.graph.outputs)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        """The version of the standard operator set that the model imports."""
        return graphs.opset(self.model)

    def runs(self, name: str) -> bool:
        """Whether a pass of this name is among those that run, and was not taken back as a whole."""
        return name in self.passes and f"{name}:" not in self.skip

    def graphs(self) -> Iterator[ir.Graph]:
        """Every graph of the model, outer before inner."""
        return graphs.all_graphs(self.model)

    def nodes(self, *op_types: str) -> list[ir.Node]:
        """Every standard node of the given types (all nodes without one), in topological order within its graph."""
        wanted = frozenset(op_types)
        if not wanted:
            return list(graphs.all_nodes(self.model))
        return [node for node in graphs.all_nodes(self.model) if node.op_type in wanted and node.domain == ""]

    # -- making nodes ----------------------------------------------------------------------------------------------

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        like: ir.Value | Sequence[ir.Value] | None = None,
        domain: str = "",
    ) -> ir.Node:
        """A new node in no graph yet. Its outputs take type and shape of ``like``, one value an output."""
        models = [like] if isinstance(like, ir.Value) else list(like or [None])  # type: ignore[list-item]
        outputs = [
            ir.Value(type=m.type, shape=m.shape.copy() if m.shape is not None else None)
            if m is not None
            else ir.Value()
            for m in models
        ]
        for output, m in zip(outputs, models, strict=True):
            if m is not None:
                inherit_trust(output, m)
        made = [] if attributes is None else ir.convenience.convert_attributes(dict(attributes))  # type: ignore[arg-type]
        return ir.Node(domain, op_type, inputs, made, outputs=outputs)

    def constant(self, array: np.ndarray | ir.TensorProtocol, name: str) -> ir.Value:
        """A new constant in no graph yet; ``replace`` puts it into the graph of the nodes that use it."""
        # Not ascontiguousarray, which gives a scalar an axis.
        tensor = ir.tensor(np.asarray(array, order="C")) if isinstance(array, np.ndarray) else array
        return ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )

    # -- changing --------------------------------------------------------------------------------------------------

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Note that a node nearly matched, and why it did not."""
        assert self._current is not None
        kept = self.near_misses.setdefault(self._current.name, {})
        if len(kept) < NEAR_MISSES_KEPT:
            kept[node.name or f"{node.op_type} of {node.outputs[0].name}"] = reason

    def replace(
        self,
        outputs: Mapping[ir.Value, ir.Value],
        nodes: Sequence[ir.Node] = (),
        *,
        rule: str,
        before: ir.Node | None = None,
        certain: bool = False,
        by: float = 0.0,
    ) -> bool:
        """Let new values take the place of old ones.

        Every use of an old value, in bodies too, reads its replacement afterwards; a graph output keeps its name,
        type and place. Nodes that nobody reads any more are removed, constants likewise. The new nodes are tagged
        with pass, rule and source nodes.

        Args:
            outputs: Old value -> replacement: an output of one of ``nodes``, or a value that is visible wherever the
                old one is read.
            nodes: New nodes in topological order, in no graph yet.
            rule: Which rule of the pass this is.
            before: Where the new nodes go; default: before the node that produces the first old value.
            certain: The rule knows that the result is never dearer, and nobody is asked (the cost profile takes both
                branches of an If for taken half of the time, and sees no gain until the last reader is gone).
            by: The fraction of the time that must be saved at least, where a rule gives up something for it.

        Returns:
            False where nothing was changed: the application is on the skip list, the target does not run a new node,
            or nothing is gained. What is to be gained the pass says (``Pass.saves``): time by the target's cost
            profile, or bytes of constants.
        """
        assert self._current is not None, "replace() works inside a pass only"
        old_values = list(outputs)
        anchor = before if before is not None else old_values[0].producer()
        assert anchor is not None and anchor.graph is not None
        graph = anchor.graph
        assert isinstance(graph, ir.Graph)

        key = self._key(rule, old_values[0].name)
        if (
            key in self.skip
            or f"{self._current.name}:" in self.skip
            or (self.limit is not None and len(self.applications) >= self.limit)
        ):
            return self._drop(nodes)
        unsupported = next(filter(None, (self.target.refuses(node, self.opset) for node in nodes)), None)
        if unsupported is not None:
            self.refuse(anchor, unsupported)
            return self._drop(nodes)

        mapping, nodes = self._keep_output_names(outputs, nodes)
        dying = self._dying(mapping)
        if nodes and not certain and (loss := self._gains_nothing(nodes, dying, by)) is not None:
            self.refuse(anchor, loss)
            return self._drop(nodes)

        application = Application(
            key=key,
            pass_name=self._current.name,
            rule=rule,
            kind=self._current.kind,
            sources=[node.name or node.op_type for node in dying],
            graph=graph.name or "",
        )
        self._name_new_values(graph, mapping, nodes)
        application.outputs = [(old.name or "", new.name or "") for old, new in mapping.items()]
        for observer in self.observers:
            observer.replacing(application, mapping, nodes)
        self._commit(graph, anchor, mapping, nodes, application)
        self._keys[key.partition("#")[0]] += 1
        self.applications.append(application)
        return True

    def replace_with_constant(self, value: ir.Value, array: np.ndarray | ir.TensorProtocol, *, rule: str) -> bool:
        """Let a constant take the place of a value. A graph output keeps a node that produces it."""
        constant = self.constant(array, value.name or "constant")
        if value.is_graph_output():
            node = self.node("Identity", [constant], like=value)
            return self.replace({value: node.outputs[0]}, [node], rule=rule)
        if constant.shape is not None and value.type is not None:
            constant.type = value.type if value.dtype == constant.dtype else constant.type
        return self.replace({value: constant}, rule=rule)

    def remove(self, name: str, delete: Callable[[], object], *, rule: str, sources: Sequence[str] = ()) -> bool:
        """Delete something that nobody reads: dead nodes, constants, functions.

        Args:
            name: What it is called, for the application's key.
            delete: Deletes it.
            sources: Names of the nodes that go.

        Returns:
            False where nothing was changed: the application is on the skip list.
        """
        assert self._current is not None, "remove() works inside a pass only"
        key = self._key(rule, name)
        if (
            key in self.skip
            or f"{self._current.name}:" in self.skip
            or (self.limit is not None and len(self.applications) >= self.limit)
        ):
            return False
        application = Application(key, self._current.name, rule, self._current.kind, list(sources))
        for observer in self.observers:
            observer.replacing(application, {}, [])
        delete()
        self._keys[key.partition("#")[0]] += 1
        self.applications.append(application)
        return True

    def remove_dead(self, nodes: Iterable[ir.Node]) -> int:
        """Remove those of the given nodes that nobody reads, and what only they read. Returns how many nodes went."""
        return self._sweep(list(nodes))

    # -- foreign passes --------------------------------------------------------------------------------------------

    def allows_foreign(self, name: str) -> bool:
        """Whether a foreign pass may run: it is not on the skip list and the limit is not reached."""
        return f"{name}:foreign@model" not in self.skip and (self.limit is None or len(self.applications) < self.limit)

    def record_foreign(self, name: str) -> None:
        """Record that a foreign pass changed the model."""
        assert self._current is not None
        self.applications.append(Application(f"{name}:foreign@model", name, "foreign", self._current.kind))
        self._names = self._node_names = None
        self._pinned = frozenset(self.model.graph.inputs) | frozenset(self.model.graph.outputs)
        for observer in self.observers:
            observer.rewritten(self.model)

    def checkpoint(self, reached: Checkpoint) -> None:
        """Called by the manager: tell the observers how far the passes have got."""
        for observer in self.observers:
            observer.checkpoint(self.model, reached)

    def running(self, current: Pass | None) -> None:
        """Called by the manager: which pass the next replacements belong to."""
        self._current = current

    # -- how it is done --------------------------------------------------------------------------------------------

    def _key(self, rule: str, name: str | None) -> str:
        assert self._current is not None
        base = f"{self._current.name}:{rule}@{name}"
        # Only what was done counts: a rule that was refused somewhere keeps its key when it tries again.
        count = self._keys[base]
        return base if count == 0 else f"{base}#{count + 1}"

    def _gains_nothing(self, new: Sequence[ir.Node], old: Sequence[ir.Node], by: float) -> str | None:
        """Why new nodes are no gain over the old ones in what the pass saves; None where they are."""
        assert self._current is not None
        if self._current.saves is Saves.BYTES:
            # A constant that both read, a bias for one, counts on both sides.
            after, before = _constant_bytes(new), _constant_bytes(old)
            return None if after < before else f"its constants would take {after:,} bytes, they take {before:,}"
        if self.target.cheaper(new, old, by=by):
            return None
        self.not_cheaper[self._current.name] += 1
        return f"not cheaper on {self.target.name}" + (f" by {by:.0%}" if by else "")

    def _drop(self, nodes: Sequence[ir.Node]) -> bool:
        for node in nodes:
            graphs.detach(node)
        return False

    def _keep_output_names(
        self, outputs: Mapping[ir.Value, ir.Value], nodes: Sequence[ir.Node]
    ) -> tuple[dict[ir.Value, ir.Value], Sequence[ir.Node]]:
        """Give each graph output that is replaced a node of its own, so that its name and place survive."""
        fresh = {value for node in nodes for value in node.outputs}
        mapping: dict[ir.Value, ir.Value] = {}
        taken: set[ir.Value] = set()
        extra: list[ir.Node] = []
        for old, new in outputs.items():
            if old.is_graph_output() and (new in taken or not (new in fresh or _may_become_output(old, new))):
                copy = self.node("Identity", [new], like=old)
                extra.append(copy)
                new = copy.outputs[0]
            taken.add(new)
            mapping[old] = new
        return mapping, [*nodes, *extra] if extra else nodes

    def _dying(self, mapping: Mapping[ir.Value, ir.Value]) -> list[ir.Node]:
        """The nodes that nobody would read after the replacement, sources before their sources."""
        gone: set[ir.Value] = set(mapping)
        kept = set(mapping.values())
        dying: dict[ir.Node, None] = {}
        pending = [p for p in (value.producer() for value in mapping) if p is not None]
        while pending:
            node = pending.pop()
            if node in dying:
                continue
            if all(
                value in gone
                or (
                    value not in kept and not value.is_graph_output() and all(use.node in dying for use in value.uses())
                )
                for value in node.outputs
            ):
                dying[node] = None
                for value in node.inputs:
                    producer = None if value is None or value in kept else value.producer()
                    if producer is not None:
                        pending.append(producer)
        return list(dying)

    def fresh_name(self, base: str) -> str:
        """A value name that nothing in the model has yet, and that is taken from now on."""
        if self._names is None:
            self._names = graphs.value_names(self.model)
        name, count = base, self._suffixes.get(base, 0)
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        # Where the search ended is where the next one starts: many values may ask for the same base.
        self._suffixes[base] = count
        self._names.add(name)
        return name

    def fresh_node_name(self, base: str) -> str:
        """A node name that nothing in the model has yet, and that is taken from now on: ONNX Runtime wants that."""
        if self._node_names is None:
            self._node_names = {node.name for node in graphs.all_nodes(self.model) if node.name}
        name, count = base, self._node_suffixes.get(base, 0)
        while name in self._node_names:
            count += 1
            name = f"{base}_{count}"
        self._node_suffixes[base] = count
        self._node_names.add(name)
        return name

    def _name_new_values(self, graph: ir.Graph, mapping: Mapping[ir.Value, ir.Value], nodes: Sequence[ir.Node]) -> None:
        # A replacement by a new node takes the old value's name where the old value leaves, so that names keep their
        # meaning through any number of rewrites; everything else gets a fresh one.
        heirs = {new: old for old, new in mapping.items()}
        for node in nodes:
            heir = next((heirs[v] for v in node.outputs if v in heirs), None)
            base = (heir.name if heir is not None else None) or (mapping and next(iter(mapping)).name) or "value"
            node.name = self.fresh_node_name(node.name or f"{base}/{node.op_type}")
            for value in node.outputs:
                if value not in heirs and not value.name:
                    value.name = self.fresh_name(f"{base}/{node.op_type}")
            for body in graphs.subgraphs(node):
                self._rename_clashes(body)
        for value in _new_constants(mapping, nodes):
            value.name = self.fresh_name(value.name or "constant")

    def _rename_clashes(self, body: ir.Graph) -> None:
        """Names in a body that came along with a new node are registered as taken."""
        for inner in graphs.nested_graphs(body):
            if self._names is None:
                self._names = graphs.value_names(self.model)
            self._names.update(v.name for n in inner for v in n.outputs if v.name)

    def _commit(
        self,
        graph: ir.Graph,
        anchor: ir.Node,
        mapping: Mapping[ir.Value, ir.Value],
        nodes: Sequence[ir.Node],
        application: Application,
    ) -> None:
        self._install_constants(graph, anchor, mapping, nodes)
        if nodes:
            tag = {"graphopt.pass": application.pass_name, "graphopt.rule": application.rule}
            if application.sources:
                tag["graphopt.from"] = " ".join(application.sources[:8])
            for node in nodes:
                node.metadata_props.update(tag)
            graph.insert_before(anchor, nodes)
        fresh = {value for node in nodes for value in node.outputs}
        for old, new in mapping.items():
            self._redirect(old, new, inherits=new in fresh)
        self._sweep([p for p in (old.producer() for old in mapping) if p is not None])
        for old in mapping:
            producer = old.producer()
            if old.name is None and producer is not None and producer.graph is not None:
                old.name = self.fresh_name(f"{producer.name}/unused")

    def _install_constants(
        self,
        graph: ir.Graph,
        anchor: ir.Node,
        mapping: Mapping[ir.Value, ir.Value],
        nodes: Sequence[ir.Node],
    ) -> None:
        for value in _new_constants(mapping, nodes):
            if self._is_function_body(graph) and value.const_value is not None:
                # A function body holds no initializers.
                node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], outputs=[value])
                graph.insert_before(anchor, node)
            else:
                graph.register_initializer(value)

    def _is_function_body(self, graph: ir.Graph) -> bool:
        if not self.model.functions:
            return False
        return any(
            graph is inner
            for function in self.model.functions.values()
            for inner in graphs.nested_graphs(function.graph)
        )

    def _redirect(self, old: ir.Value, new: ir.Value, *, inherits: bool) -> None:
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, new)
        if old.is_graph_output():
            owner = old.graph
            assert owner is not None
            # The declared type and shape of an output are part of the interface; what is known of it stays known.
            inherit_trust(new, new)
            new.type, new.shape = old.type, old.shape
            for index, output in enumerate(owner.outputs):
                if output is old:
                    owner.outputs[index] = new
            inherits = True
        elif new.shape is None and not new.is_initializer() and not new.is_graph_output():
            new.shape = old.shape
            inherit_trust(new, old)
        if inherits:
            if new.dtype is None:
                new.type = old.type
            new.name, old.name = old.name, None

    def _sweep(self, pending: list[ir.Node]) -> int:
        removed = 0
        while pending:
            node = pending.pop()
            graph = node.graph
            if graph is None or graphs.is_used(node):
                continue
            released = graphs.detach(node)
            graph.remove(node)
            removed += 1
            for value in released:
                producer = value.producer()
                if producer is not None:
                    pending.append(producer)
                elif value.is_initializer() and not value.uses() and value not in self._pinned:
                    owner = value.graph
                    if owner is not None and not value.is_graph_output() and value.name is not None:
                        owner.initializers.pop(value.name)
        return removed


def _may_become_output(old: ir.Value, new: ir.Value) -> bool:
    """Whether an existing value can take over the name and place of a graph output: a node of that graph makes it."""
    producer = new.producer()
    return producer is not None and producer.graph is old.graph and not new.is_graph_output()


def _read_values(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """What nodes read, their bodies too."""
    return [value for node in nodes for value in graphs.read_by(node)]


def _constant_bytes(nodes: Sequence[ir.Node]) -> int:
    """The bytes of the constants that nodes read, each counted once; no value is read."""
    tensors = {value: value.const_value or graphs.constant_tensor(value) for value in _read_values(nodes)}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


def _new_constants(mapping: Mapping[ir.Value, ir.Value], nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The constants that a replacement brings along: values with a tensor that no graph holds and no node makes."""
    candidates = [*_read_values(nodes), *mapping.values()]
    found: dict[ir.Value, None] = {}
    for value in candidates:
        if value.const_value is not None and value.producer() is None and value.graph is None:
            found[value] = None
    return list(found)
