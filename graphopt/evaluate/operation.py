"""What an operator is when it has left its graph, and how its operands are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

NARROW_FLOATS = frozenset({"float16", "bfloat16"})
"""ONNX Runtime's CPU computes these in float32 and rounds at the end of a chain, not after every operator."""


class Inexact(Exception):
    """The numpy path does not define the result to the bit, or will not make one this large."""


@dataclass(frozen=True)
class Operation:
    """An operator without its operands: what remains of a node when it has left its graph.

    Attributes:
        op_type: Of the standard domain.
        attributes: By name; no references to a function's attributes, no bodies.
        opset: The version of the standard operator set.
        outputs: How many outputs are wanted.
    """

    op_type: str
    attributes: Mapping[str, ir.Attr] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1

    @classmethod
    def of(cls, node: ir.Node, opset: int) -> Operation:
        """The operation of a node."""
        return cls(node.op_type, dict(node.attributes), opset, len(node.outputs))

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def integers(self, name: str) -> list[int] | None:
        """An attribute of integers, None where it is absent."""
        attribute = self.attributes.get(name)
        return None if attribute is None else list(attribute.as_ints())


Inputs = Sequence[Array | None]
Function = Callable[[Operation, Inputs], list[Array]]


def operand(inputs: Inputs, index: int = 0) -> Array:
    """An operand that must be there.

    Raises:
        Inexact: It is left out.
    """
    if index >= len(inputs) or (value := inputs[index]) is None:
        raise Inexact
    return value


def optional_operand(inputs: Inputs, index: int) -> Array | None:
    """An operand, or None where it is left out."""
    return inputs[index] if index < len(inputs) else None


def to_ints(array: Array) -> list[int]:
    """The elements of an array of integers, in order."""
    return [int(v) for v in array.reshape(-1)]


def normal_axis(axis: int, rank: int) -> int:
    """An axis counted from the beginning.

    Raises:
        Inexact: A tensor of this rank has no such axis.
    """
    if not -rank <= axis < rank:
        raise Inexact
    return axis % rank
