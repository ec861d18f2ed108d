"""What the engine inspector says about an engine, in one form whatever the version says it in.

TensorRT 10 lists the names of inputs and outputs under ``Bindings`` and writes type and layout of a tensor in one
string; TensorRT 11 and TensorRT-RTX describe inputs and outputs under ``I/O Tensors`` and write the two apart. With
less than detailed verbosity a layer is a bare string, its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import GraphoptError

# Nodes that one layer stands for are written one after the other, with unit or record separators between them.
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# "Row major linear FP16 format", "Half NCHW", "Float": what the older dialect calls the types.
_TYPES = (
    (r"BF16|BFloat16", "bfloat16"),
    (r"FP16|Half|Float16", "float16"),
    (r"FP8|E4M3", "float8"),
    (r"FP4|E2M1", "float4"),
    (r"FP32|Float32|Float\b", "float32"),
    (r"UInt8", "uint8"),
    (r"Int8", "int8"),
    (r"Int4", "int4"),
    (r"Int64", "int64"),
    (r"Int32", "int32"),
    (r"Bool", "bool"),
)


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine: what the library made of one node, of several, or of none.

    Attributes:
        name: As the library calls it.
        kind: The library's word for what it does, such as ``CaskConvolution``; empty where the engine was not built
            to tell.
        tactic: The name of the kernel that was chosen, or its number; empty where nothing was said.
        nodes: The nodes of the ONNX file that it came from.
        plugin: Whether it runs a plugin.
        inputs: The element types of its inputs, in order; empty strings where they depend on the shapes.
        outputs: The same of its outputs.
    """

    name: str
    kind: str = ""
    tactic: str = ""
    nodes: tuple[str, ...] = ()
    plugin: bool = False
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """An engine's layers, or why they are not known.

    Attributes:
        layers: In the order in which they run; empty where ``reason`` says why.
        tensors: The names of the engine's inputs and outputs, as the inspector lists them.
        reason: Empty where the inspector was asked; else why not.
    """

    layers: tuple[EngineLayer, ...] = ()
    tensors: tuple[str, ...] = ()
    reason: str = ""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Inspection:
        layers = tuple(
            EngineLayer(
                one["name"],
                one["kind"],
                one["tactic"],
                tuple(one["nodes"]),
                one["plugin"],
                tuple(one["inputs"]),
                tuple(one["outputs"]),
            )
            for one in plain["layers"]
        )
        return cls(layers, tuple(plain["tensors"]), plain["reason"])


def parse_inspection(text: str) -> Inspection:
    """Read what ``get_engine_information(LayerInformationFormat.JSON)`` gives, in any of its dialects.

    Raises:
        GraphoptError: It is no such JSON.
    """
    try:
        # Names are written as they are: a control character in one is no reason to fail.
        said = json.loads(text, strict=False)
        layers = tuple(_layer(entry) for entry in said["Layers"])
        tensors = tuple(_name(entry) for entry in said.get("I/O Tensors", said.get("Bindings", ())))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GraphoptError(f"what the engine inspector says cannot be read: {error}") from error
    return Inspection(layers, tensors)


def _layer(entry: str | Mapping[str, Any]) -> EngineLayer:
    if isinstance(entry, str):
        return EngineLayer(entry, nodes=_nodes(entry))
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    return EngineLayer(
        name=name,
        kind=kind,
        tactic=_tactic(entry),
        nodes=_nodes(str(entry.get("Metadata") or "")) or _nodes(name),
        plugin="plugin" in kind.lower() or "PluginType" in entry,
        inputs=_types(entry.get("Inputs", ())),
        outputs=_types(entry.get("Outputs", ())),
    )


def _tactic(entry: Mapping[str, Any]) -> str:
    value = str(entry.get("TacticValue", ""))
    # All zeros: nothing was chosen, since there was nothing to choose between.
    return str(entry.get("TacticName") or "") or ("" if not value.strip("0x") else value)


def _nodes(text: str) -> tuple[str, ...]:
    """The nodes that a text names, outermost first where one was inside a function's call: each once."""
    return tuple(dict.fromkeys(name.strip() for name in _NODE.findall(text)))


def _types(tensors: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(_type(tensor) for tensor in tensors)


def _type(tensor: Mapping[str, Any]) -> str:
    said = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "")
    return next((name for pattern, name in _TYPES if re.search(rf"\b(?:{pattern})", said, re.IGNORECASE)), "")


def _name(entry: str | Mapping[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["Name"])
