"""Looks at every node of a model and names those that a target's library refuses, without that library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.engines.coverage import checks as checks  # registers conditions of its own
from graphopt.engines.coverage.conditions import CONDITIONS, Looked
from graphopt.engines.coverage.facts import Facts, Rule, facts
from graphopt.engines.coverage.known import Known
from graphopt.errors import GraphoptError
from graphopt.shapes import infer_shapes
from graphopt.targets.target import type_name


@dataclass(frozen=True)
class Refusal:
    """A node, an input or a weight that the library refuses.

    Attributes:
        node: The node's name; where it has none, as the library calls it: ``node_of_`` and its first output. The
            name of an input or a weight where that is what is refused.
        op_type: Its operator; "" for an input, an output or a weight.
        domain: Of the operator.
        place: Where the node is, from the outside in: "body of loop_1"; "" in the main graph.
        reason: What is wrong, in a few words.
        hint: What to do about it.
        tried: Whether the library was seen to refuse this; else its documentation says so.
        stage: "parse", "build" or "crash": where the library would have refused, or died.
    """

    node: str
    op_type: str
    domain: str
    place: str
    reason: str
    hint: str
    tried: bool
    stage: str

    def __str__(self) -> str:
        what = f"{self.op_type or 'tensor'} {self.node!r}" + (f" in {self.place}" if self.place else "")
        return f"{what}: {self.reason}{'' if self.tried else ', by its documentation (not tried here)'} ({self.hint})"


@dataclass(frozen=True)
class Coverage:
    """What a library makes of a model.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        title: What messages call the library.
        version: The library's version that the facts are of.
        nodes: How many nodes were looked at, bodies and functions included, Constants left out.
        refused: What it refuses, inputs and weights first, then nodes in the graph's order.
        shape_inputs: Inputs whose values decide shapes: a build needs ranges for these values.
    """

    target: str
    title: str
    version: str
    nodes: int
    refused: tuple[Refusal, ...]
    shape_inputs: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is refused."""
        return not self.refused

    @property
    def certain(self) -> bool:
        """Whether something is refused that the library was seen to refuse: then a build is sure to fail."""
        return any(refusal.tried for refusal in self.refused)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "refused": [asdict(refusal) for refusal in self.refused]}

    def error(self, where: str | None = None) -> GraphoptError:
        """One line for what is refused: the first in full, the others counted by operator."""
        first, *others = self.refused
        counts = Counter(refusal.op_type or "tensors" for refusal in others)
        more = ", ".join(f"{op} {count}" if count > 1 else op for op, count in counts.most_common(5))
        rest = f"; and {len(others)} more: {more}{', ...' if len(counts) > 5 else ''}" if others else ""
        what = f"{first.op_type or 'tensor'} {first.node!r}" + (f" in {first.place}" if first.place else "")
        doubt = "" if first.tried else ", by its documentation (not tried here)"
        return GraphoptError(
            f"{self.title} {self.version} refuses {what}: {first.reason}{doubt}{rest}", where=where, hint=first.hint
        )


def predict(
    model: ir.Model,
    target: str = "tensorrt-rtx",
    *,
    plugins: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
    version: str | None = None,
) -> Coverage:
    """Which nodes of a model a target's library refuses. Linear in the nodes; reads no large weight.

    Args:
        model: As the library will be given it, functions inlined; calls that are left are followed. Types and shapes
            that ONNX can infer are filled in; nothing else changes.
        target: ``tensorrt-rtx`` or ``tensorrt``.
        plugins: Operators (their bare names) that a plugin runs in this build.
        sizes: Symbolic axes for which the profile of the build has one size; what the builder refuses may hang on it.
        version: Of the library, where it is known: operators that came later are refused.

    Raises:
        BadInput: Nothing is known of the target.
    """
    known_facts = facts(target)
    infer_shapes(model)
    known = Known(model, known_facts.types.converted)
    # The parser knows nothing of profiles.
    building = Known(model, known_facts.types.converted, sizes) if sizes else known
    look = _Look(known_facts, known, building, model, frozenset(plugins), version)
    look.interface()
    count = 0
    for node, place in _walk(model):
        count += node.op_type != "Constant"
        look.node(node, place)
    return Coverage(
        target=target,
        title=known_facts.title,
        version=known_facts.version,
        nodes=count,
        refused=tuple(look.refused),
        shape_inputs=tuple(dict.fromkeys(look.shape_inputs)),
    )


class _Look:
    def __init__(
        self,
        facts: Facts,
        known: Known,
        building: Known,
        model: ir.Model,
        plugins: frozenset[str],
        version: str | None,
    ) -> None:
        self.facts = facts
        self.known = known
        self.building = building
        self.model = model
        self.plugins = plugins
        self.too_old = {op for op, first in facts.since.items() if version and _numbers(version) < _numbers(first)}
        self.rules = facts.by_operator()
        # The parser looks functions up by their bare names.
        self.functions = {key[1] for key in model.functions}
        self.refused: list[Refusal] = []
        self.shape_inputs: list[str] = []

    def interface(self) -> None:
        """Refuse inputs and weights whose types the library does not have."""
        for value in self.model.graph.inputs:
            if not value.is_initializer():
                self._tensor(value, "", "input", self.facts.types.inputs)
        for value in self.model.graph.outputs:
            if not value.is_initializer() and not value.is_graph_input():
                self._tensor(value, "", "output", self.facts.types.inputs)
        for graph, place in _graphs(self.model):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    self._tensor(value, place, "weight", self.facts.types.weights)

    def _tensor(self, value: ir.Value, place: str, kind: str, allowed: frozenset[str]) -> None:
        if kind == "weight" and value.const_value is not None:
            found = type_name(value.const_value.dtype)
        elif value.type is not None and not isinstance(value.type, ir.TensorType):
            found = "a sequence" if isinstance(value.type, ir.SequenceType) else "optional"
        elif value.dtype is None or value.dtype == ir.DataType.UNDEFINED:
            return
        else:
            found = type_name(value.dtype)
        if found not in allowed:
            hint = self.facts.hint(f"type {found}" if f"type {found}" in self.facts.hints else "type")
            reason = f"{self.facts.title} has no {kind}s of type {found}" if " " not in found else f"is {found}"
            self.refused.append(Refusal(value.name or "", "", "", place, reason, hint, self.facts.tried, "parse"))

    def node(self, node: ir.Node, place: str) -> None:
        """Refuse a node, for the first reason that holds."""
        op = node.op_type
        if op in self.plugins and (node.domain != "" or op not in self.facts.operators):
            return
        if node.op_identifier() in self.model.functions or (op in self.functions and op not in self.facts.operators):
            return
        title = self.facts.title
        if op in self.facts.refused:
            reason = f"{title} does not run {op}"
            self._refuse(node, place, reason, self.facts.refused[op], "parse", self.facts.tried)
        elif op in self.too_old:
            reason = f"{title} has {op} from {self.facts.since[op]} on"
            self._refuse(node, place, reason, "newer", "parse", self.facts.tried)
        elif op not in self.facts.operators:
            custom = node.domain not in ("", "ai.onnx")
            reason = f"{title} has no operator {op}" + (f" ({node.domain})" if custom else "")
            hint = "runtime operator" if node.domain == "com.microsoft" else "custom operator" if custom else "unknown"
            self._refuse(node, place, reason, hint, "parse", self.facts.tried)
        elif node.domain not in ("", "ai.onnx") and op not in self.facts.foreign.get(node.domain, frozenset()):
            reason = f"{title} takes {node.domain}.{op} for the standard operator of that name, as it reads no domains"
            self._refuse(node, place, reason, "namesake", "parse", self.facts.tried)
        else:
            at = Looked(node, self.known)
            built = Looked(node, self.building)
            for rule in self.rules.get(op, []):
                if (findings := _findings(rule, at if rule.stage == "parse" else built)) is not None:
                    reason = rule.reason.format_map(
                        {"op": op, "title": title, "version": self.facts.version, **findings}
                    )
                    tried = self.facts.tried if rule.tried is None else rule.tried
                    self._refuse(node, place, reason, rule.hint.format_map(findings), rule.stage, tried)
                    return
            self.shape_inputs.extend(checks.shape_inputs(at))

    def _refuse(self, node: ir.Node, place: str, reason: str, hint: str, stage: str, tried: bool) -> None:
        name = node.name or f"node_of_{node.outputs[0].name if node.outputs else ''}"
        hint = self.facts.hint(hint)
        self.refused.append(Refusal(name, node.op_type, node.domain, place, reason, hint, tried, stage))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _findings(rule: Rule, at: Looked) -> dict[str, str] | None:
    """What the rule's conditions found, or None where one does not hold."""
    found: dict[str, str] = {}
    for test in rule.when:
        for name, arguments in test.items():
            result = CONDITIONS[name](at, **(arguments or {}))
            if result is None:
                return None
            found |= result
    return found


def _walk(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Every node with its place."""
    for graph, place in _graphs(model):
        for node in graph:
            yield node, place


def _graphs(model: ir.Model) -> Iterator[tuple[ir.Graph, str]]:
    """Every graph with its place: the main graph and its bodies, then those of the functions."""
    pending: list[tuple[ir.Graph, str]] = [(model.graph, "")]
    for key, function in model.functions.items():
        pending.append((function.graph, f"function {key[0]}::{key[1]}"))
    while pending:
        graph, place = pending.pop(0)
        yield graph, place
        inner: list[tuple[ir.Graph, str]] = []
        for node in graph:
            if graphs.has_subgraphs(node):
                for name, body in _bodies(node):
                    owner = node.name or (node.outputs[0].name if node.outputs else "") or node.op_type
                    inner.append((body, f"{place} / {name} of {owner}" if place else f"{name} of {owner}"))
        pending[:0] = inner


def _bodies(node: ir.Node) -> Sequence[tuple[str, ir.Graph]]:
    return [
        (name, attribute.as_graph())
        for name, attribute in node.attributes.items()
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref()
    ]
