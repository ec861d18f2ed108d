"""Where models use plugins: nodes are written where a choice wants them, and written back as what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import insert_named, remove, take_place
from graphopt.engines.plugins.finding import find_plugins, module_of
from graphopt.engines.plugins.plugin import Attributes, Meaning, Mode, Plugin, Types
from graphopt.errors import BadInput


@dataclass(frozen=True)
class Choice:
    """Where plugins are to be used.

    Attributes:
        mode: ``measured``: where the shipped measurements say that it is faster; ``always``: wherever it can run;
            ``never``.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        gpu: That the engine is for, as the driver names it; None where there is none.
        sizes: For each symbol of the model the smallest and the largest size over all profiles.
    """

    mode: Mode = "measured"
    backend: str = "tensorrt"
    gpu: str | None = None
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def refusal(self) -> str | None:
        """Why there can be no plugin at all, or None."""
        if self.backend == "tensorrt-rtx":
            return "TensorRT-RTX runs no plugins of this kind; the standard operators are used"
        return None

    def rows(self, shape: ir.Shape | None) -> tuple[int, int] | None:
        """The fewest and the most rows of a tensor, the product of all axes but the last; None: not known."""
        if shape is None or not len(shape):
            return None
        low = high = 1
        for size in list(shape)[:-1]:
            known = (size, size) if isinstance(size, int) else self.sizes.get(str(size.value))
            if known is None:
                return None
            low, high = low * known[0], high * known[1]
        return low, high


@dataclass(frozen=True)
class Written:
    """A plugin node that a model got.

    Attributes:
        plugin: Its name.
        node: The node's.
        types: Of inputs and outputs.
        attributes: What the node says.
        reason: Why it was taken.
    """

    plugin: str
    node: str
    types: Types
    attributes: Attributes
    reason: str

    def to_json(self) -> dict[str, Any]:
        attributes = {name: value.tolist() for name, value in self.attributes.items()}
        return {"plugin": self.plugin, "node": self.node, "attributes": attributes, "reason": self.reason}


@dataclass(frozen=True)
class Refused:
    """A place in a model where a plugin fits by its form, and is not used.

    Attributes:
        plugin: Its name.
        node: The last node of what stays there.
        reason: Why, in one line.
    """

    plugin: str
    node: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"plugin": self.plugin, "node": self.node, "reason": self.reason}


@dataclass(frozen=True)
class Lowered:
    """What became of a model: where plugins are used, where not and why."""

    written: tuple[Written, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def op_types(self) -> tuple[str, ...]:
        """The types of nodes that only a plugin runs."""
        return tuple(sorted({written.plugin for written in self.written}))

    @property
    def modules(self) -> tuple[str, ...]:
        """What a process has to register to build an engine from the model."""
        return tuple(module_of(name) for name in self.op_types)

    def to_json(self) -> dict[str, Any]:
        return {
            "written": [written.to_json() for written in self.written],
            "refused": [refused.to_json() for refused in self.refused],
        }


def lower(model: ir.Model, choice: Choice, plugins: Mapping[str, Plugin] | None = None) -> Lowered:
    """Write plugin nodes into a model, in place, where they fit and the choice wants them.

    Weights are not copied, but where a plugin wants another layout: then that is computed when it is read.

    Args:
        model: For TensorRT. Functions that no node calls any more go.
        choice: What is wanted.
        plugins: By name; all that there are where it is not given.

    Raises:
        MissingDependency: A node is to be written and onnx-graphsurgeon is not installed.
        BadInput: A plugin cannot be loaded, or the model calls a function that has a plugin's name.
    """
    if choice.mode == "never":
        return Lowered()
    wanted = find_plugins() if plugins is None else plugins
    parts = [plugin.lower(model, choice) for plugin in wanted.values()]
    lowered = Lowered(
        tuple(written for part in parts for written in part.written),
        tuple(refused for part in parts for refused in part.refused),
    )
    for name in lowered.op_types:
        _drop_functions(model, name)
    return lowered


def _drop_functions(model: ir.Model, name: str) -> None:
    """No function may have a plugin's name: the parser looks for those as well, and versions differ in what wins."""
    for key in [key for key in model.functions if key[1] == name]:
        if any(node.op_identifier() == key for node in graphs.all_nodes(model)):
            raise BadInput(
                f"the model calls a function {key[0]}::{name}, and a plugin has this name",
                hint="inline the model's functions first",
            )
        del model.functions[key]


# -- and out again -----------------------------------------------------------------------------------------------------


def twin(model: ir.Model, plugins: Mapping[str, Plugin] | None = None) -> int:
    """Write every plugin node of a model as the standard operators that it stands for, in place.

    Args:
        model: As `lower` made it.
        plugins: By name; all that there are where it is not given.

    Returns:
        How many there were.

    Raises:
        BadInput: A node lacks an attribute, or something reads an output of it that is scratch memory.
    """
    from graphopt.engines.plugins.nodes import attributes_of, is_node_of

    wanted = find_plugins() if plugins is None else plugins
    opset = graphs.opset(model)
    names = graphs.value_names(model)
    count = 0
    for graph in list(graphs.all_graphs(model)):
        for node in [node for node in graph if node.op_type in wanted and is_node_of(node, wanted[node.op_type])]:
            plugin = wanted[node.op_type]
            meaning = plugin.meaning(node, attributes_of(node, plugin), opset)
            _put(node, meaning, graph, names)
            count += 1
    left = {node.domain for node in graphs.all_nodes(model)}
    for plugin in wanted.values():
        if plugin.namespace not in left:
            model.graph.opset_imports.pop(plugin.namespace, None)
    return count


def _put(node: ir.Node, meaning: Meaning, graph: ir.Graph, names: set[str]) -> None:
    """Nodes in the place of one."""
    for old, new in zip(node.outputs, meaning.outputs, strict=True):
        if new is None and (old.uses() or old.is_graph_output()):
            raise BadInput(f"{old.name} is scratch memory of a plugin and is read", where=node.name)
    insert_named(graph, node, meaning.nodes, node.name or node.op_type, names)
    for old, new in zip(node.outputs, meaning.outputs, strict=True):
        if new is not None:
            new.type, new.shape = old.type, old.shape
            take_place(old, new, graph)
    remove(node)
