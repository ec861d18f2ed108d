"""What the TensorRT side knows of an operator: everything is declared in one place."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import onnx
import onnx_ir as ir

from graphopt.errors import BadInput, GraphoptError
from graphopt.kernels.kernel import Kernel, Shape

if TYPE_CHECKING:
    from graphopt.engines.plugins.lowering import Choice, Lowered

Array = npt.NDArray[Any]
Attributes = Mapping[str, Array]
"""What a node says, by name: one-dimensional arrays of the declared type."""
Types = tuple[str, ...]
"""numpy's names of element types (and bfloat16): of the inputs, then of the outputs."""
Mode = Literal["measured", "always", "never"]

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
