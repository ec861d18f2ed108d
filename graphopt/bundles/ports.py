"""Values of a graph as a plan writes them down, and back: types as ONNX Runtime spells them, sizes as they are."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.bundles.plan import Port, Size
from graphopt.errors import BadInput
from graphopt.runtime.loading import TensorSpec
from graphopt.runtime.session import numpy_dtype
from graphopt.shapes import trusted_shape

_WRAPPERS: dict[str, type[ir.SequenceType] | type[ir.OptionalType]] = {
    "seq": ir.SequenceType,
    "optional": ir.OptionalType,
}
_RUNTIME_NAMES = {"FLOAT": "float", "DOUBLE": "double"}
_TYPES = {word: ir.DataType[name] for name, word in _RUNTIME_NAMES.items()}


def port(value: ir.Value) -> Port:
    """A value as it is written in a plan.

    Raises:
        BadInput: Its type is not known.
    """
    if value.type is None:
        raise BadInput(f"the type of the value '{value.name}' is not known", hint="declare it, or run shape inference")
    shape = trusted_shape(value)
    return Port(name=value.name or "", type=type_text(value.type), shape=sizes_of(shape))


def declared(value: ir.Value) -> Port:
    """As `port`, with the shape that is declared where none is known: as told by the network, or where nothing ran."""
    made = port(value)
    if made.shape is None and value.shape is not None:
        made.shape = sizes_of(value.shape)
    return made


def like(value: ir.Value) -> Port | None:
    """What is declared of an input of a body, where that says something of its shape."""
    return declared(value) if value.type is not None and value.shape is not None else None


def value_of(port: Port) -> ir.Value:
    """A value of a graph, as a plan says."""
    return ir.Value(name=port.name, type=type_of(port.type), shape=shape_of(port))


def spec_of(port: Port) -> TensorSpec:
    """An input or output of a network, as who runs it is told."""
    return TensorSpec(port.name, numpy_dtype(port.type), None if port.shape is None else tuple(port.shape))


def shape_of(port: Port) -> ir.Shape | None:
    """The shape that a plan writes down."""
    return None if port.shape is None else ir.Shape(port.shape)


def type_text(kind: ir.TypeProtocol) -> str:
    """A type as ONNX Runtime spells it."""
    for word, wrapper in _WRAPPERS.items():
        if isinstance(kind, wrapper):
            return f"{word}({type_text(kind.elem_type)})"
    name = kind.dtype.name
    return f"tensor({_RUNTIME_NAMES.get(name, name.lower())})"


def type_of(text: str) -> ir.TypeProtocol:
    """The type that ONNX Runtime spells so."""
    word, _, inner = text.removesuffix(")").partition("(")
    if word in _WRAPPERS:
        return _WRAPPERS[word](type_of(inner))
    return ir.TensorType(_TYPES.get(inner) or ir.DataType[inner.upper()])


def sizes_of(shape: ir.Shape | None) -> list[Size] | None:
    """The sizes that a plan writes down."""
    return None if shape is None else [size if isinstance(size, int) else size.value for size in shape]
