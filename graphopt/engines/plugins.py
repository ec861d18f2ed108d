"""Operators that a TensorRT engine runs on kernels of ours: what each says of itself, and where models can use them.

An operator's folder, ``graphopt/plugins/<op>``, holds a module ``tensorrt`` with one `PLUGIN`. Nothing else names it:
plugins are found by walking the package, third parties' through the entry point group ``graphopt.plugins``, whose
entries name such modules. What is declared here is all that the TensorRT side knows of an operator: `qdp` registers
it, `plugin_nodes` writes its nodes, and `twin` writes what they mean in standard operators.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import keyword
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy.typing as npt
import onnx
import onnx_ir as ir

from graphopt import graphs
from graphopt.editing import insert_named, remove, take_place
from graphopt.errors import BadInput, GraphoptError
from graphopt.kernels.kernel import Kernel, Shape

Array = npt.NDArray[Any]
Attributes = Mapping[str, Array]
"""What a node says, by name: one-dimensional arrays of the declared type."""
Types = tuple[str, ...]
"""numpy's names of element types (and bfloat16): of the inputs, then of the outputs."""
Mode = Literal["measured", "always", "never"]

PACKAGE = "graphopt.plugins"
ENTRY_POINTS = "graphopt.plugins"
NAMESPACE = "graphopt_trt"
"""Of plugins in TensorRT's registry, and the domain of their nodes. The operators in ONNX files have another domain:
their inputs and attributes are others."""

ATTRIBUTE_TYPES = ("int32", "int64", "float32")
"""What arrives unchanged: TensorRT's parser hands on integers as int32 and numbers as float32, and spoils the rest."""
TENSOR_TYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64")
_RESERVED_NAMESPACES = frozenset({"", "trt", "tensorrt", "std"})
_RESERVED_NAMES = frozenset({"outputs", "stream", "tactic", "plugin_namespace", "plugin_version", "aot"})


@dataclass(frozen=True)
class Meaning:
    """A plugin node in standard operators.

    Attributes:
        nodes: In order, in no graph yet.
        outputs: For each output of the plugin what it is; None: scratch memory, which nothing may read.
    """

    nodes: Sequence[ir.Node]
    outputs: Sequence[ir.Value | None]


@dataclass(frozen=True)
class Plugin:
    """An operator of TensorRT engines. Everything is said here once.

    Attributes:
        name: In TensorRT's registry, and the type of its nodes; no ONNX operator may be called so.
        inputs: Names. A node gives all of them.
        outputs: Names. The kernel writes all of them; a node may leave some unread.
        types: The combinations of element types that there are kernels for.
        results: From the shapes of the inputs and the attributes the shapes of the outputs. Sizes may be symbolic:
            they know + - * // and nothing else.
        kernels: From types and attributes the kernels that compute this, by tactic: 1, 2, ...; TensorRT measures them
            while it builds and keeps the fastest. Parameters of each: inputs, int32 scalars, outputs.
        lower: Writes nodes of this plugin into a model, in place, where it fits and the choice wants it.
        meaning: What a node of it means: from the node, its attributes and the opset of the model.
        attributes: Names and types (`ATTRIBUTE_TYPES`). A node writes all of them.
        namespace: In TensorRT's registry.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: tuple[Types, ...]
    results: Callable[[Sequence[Shape], Attributes], Sequence[Shape]]
    kernels: Callable[[Types, Attributes], Mapping[int, Kernel]]
    lower: Callable[[ir.Model, Choice], Lowered]
    meaning: Callable[[ir.Node, Attributes, int], Meaning]
    attributes: tuple[tuple[str, str], ...] = ()
    namespace: str = NAMESPACE

    def __post_init__(self) -> None:
        for reason in self._faults():
            raise BadInput(reason, where=f"plugin {self.namespace}::{self.name}")

    def _faults(self) -> list[str]:
        names = [*self.inputs, *(name for name, _ in self.attributes), *self.outputs]
        faults = [
            f"{name!r} is no name that TensorRT takes"
            for name in names
            if not name.isidentifier() or keyword.iskeyword(name) or name in _RESERVED_NAMES
        ]
        if not self.name.isidentifier() or not self.namespace.isidentifier() or self.namespace in _RESERVED_NAMESPACES:
            faults.append("its name or namespace is none that TensorRT takes")
        if _is_standard(self.name):
            faults.append("an ONNX operator has this name, and TensorRT's parser would take that")
        if len(set(names)) != len(names):
            faults.append("a name is used twice")
        if not self.inputs or not self.outputs or not self.types:
            faults.append("it has no inputs, no outputs or no types")
        faults += [
            f"the attribute {name!r} is {dtype}; only {', '.join(ATTRIBUTE_TYPES)} arrive unchanged"
            for name, dtype in self.attributes
            if dtype not in ATTRIBUTE_TYPES
        ]
        for types in self.types:
            if len(types) != len(self.inputs) + len(self.outputs) or not set(types) <= set(TENSOR_TYPES):
                faults.append(f"{', '.join(types)} are not {len(self.inputs)} + {len(self.outputs)} types of tensors")
        if len({types[: len(self.inputs)] for types in self.types}) != len(self.types):
            faults.append("two combinations of types have the same inputs")
        return faults

    def types_of(self, inputs: Sequence[str]) -> Types:
        """The combination that starts with these types of inputs.

        Raises:
            GraphoptError: There is none.
        """
        for types in self.types:
            if types[: len(self.inputs)] == tuple(inputs):
                return types
        raise GraphoptError(f"has no kernel for inputs of types {', '.join(inputs)}", where=f"plugin {self.name}")

    def kernel(self, types: Types, attributes: Attributes, tactic: int) -> Kernel:
        """The kernel of one tactic, held against what the plugin declares.

        TensorRT gives the kernel pointers and scalars in a fixed order and checks nothing, so that is done here.

        Raises:
            GraphoptError: There is no such tactic, or its kernel has other parameters than the plugin.
        """
        kernels = self.kernels(types, attributes)
        where = f"plugin {self.name}, tactic {tactic}"
        if tactic not in kernels:
            told = ", ".join(map(str, kernels)) or "none"
            raise GraphoptError(f"there is no such tactic for {', '.join(types)}: {told}", where=where)
        kernel = kernels[tactic]
        wanted = [*(("input", dtype) for dtype in types[: len(self.inputs)])]
        wanted += [("output", dtype) for dtype in types[len(self.inputs) :]]
        found = [(parameter.kind, parameter.dtype) for parameter in kernel.parameters if parameter.kind != "scalar"]
        kinds = [parameter.kind for parameter in kernel.parameters]
        if found != wanted or kinds != sorted(kinds, key=("input", "scalar", "output").index):
            raise GraphoptError(
                f"{kernel.name} takes {_told(found)}; it has to take {_told(wanted)}, scalars in between", where=where
            )
        return kernel


def _told(parameters: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {dtype}" for kind, dtype in parameters)


@cache
def _standard_names() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas_with_history())


def _is_standard(name: str) -> bool:
    return name in _standard_names()


# -- finding them ------------------------------------------------------------------------------------------------------


def find_plugins() -> dict[str, Plugin]:
    """Every plugin by its name, sorted.

    Raises:
        BadInput: A third party's module cannot be imported or has no PLUGIN, or two plugins have one name.
    """
    return {name: plugin for name, (_, plugin) in _found().items()}


def module_of(name: str) -> str:
    """The module that declares a plugin: what a process imports that registers it.

    Raises:
        BadInput: There is no such plugin.
    """
    if name not in _found():
        raise BadInput(f"no plugin {name!r}", hint=f"there are {', '.join(_found()) or 'none'}")
    return _found()[name][0]


@cache
def _found() -> dict[str, tuple[str, Plugin]]:
    found: dict[str, tuple[str, Plugin]] = {}
    package = importlib.import_module(PACKAGE)
    modules = [
        (f"{PACKAGE}.{info.name}.tensorrt", f"folder {info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if info.ispkg and importlib.util.find_spec(f"{PACKAGE}.{info.name}.tensorrt") is not None
    ]
    modules += [
        (entry.value, f"entry point {entry.name}") for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)
    ]
    for module, where in modules:
        plugin = load_plugin(module, where=where)
        if plugin.name in found and found[plugin.name][1] is not plugin:
            raise BadInput(f"a plugin called {plugin.name!r} exists already", where=where)
        found[plugin.name] = (module, plugin)
    return dict(sorted(found.items()))


def load_plugin(module: str, *, where: str | None = None) -> Plugin:
    """The plugin that a module declares.

    Raises:
        BadInput: The module cannot be imported, or has no PLUGIN.
    """
    place = where or module
    try:
        plugin = getattr(importlib.import_module(module), "PLUGIN", None)
    except GraphoptError:
        raise
    except Exception as error:
        raise BadInput(f"the plugin cannot be imported: {error}", where=place) from error
    if not isinstance(plugin, Plugin):
        raise BadInput(f"{module} has no PLUGIN", where=place)
    return plugin


# -- into a model ------------------------------------------------------------------------------------------------------


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
    from graphopt.engines.plugin_nodes import attributes_of, is_node_of

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
