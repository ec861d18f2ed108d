"""The conditions that rules are written with. Each looks at one node and gives its findings, or None."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.engines.coverage.known import Known
from graphopt.targets.target import type_name

Findings = Mapping[str, str]
"""What goes into the braces of a rule's reason."""
Condition = Callable[..., Findings | None]

CONDITIONS: dict[str, Condition] = {}


@dataclass(frozen=True)
class Looked:
    """A node and what is known around it."""

    node: ir.Node
    known: Known

    def input(self, index: int) -> ir.Value | None:
        inputs = self.node.inputs
        return inputs[index] if index < len(inputs) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, tensors and graphs left as they are; ``default`` where there is none."""
        attribute = self.node.attributes.get(name)
        if attribute is None or attribute.is_ref():
            return default
        value = attribute.value
        if attribute.type is ir.AttributeType.STRING and isinstance(value, bytes):
            return value.decode(errors="replace")
        return list(value) if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS) else value


def condition(function: Condition) -> Condition:
    """Make a function a condition of its name."""
    CONDITIONS[function.__name__.rstrip("_")] = function
    return function


@condition
def attribute(at: Looked, name: str, default: Any = None, **tests: Any) -> Findings | None:
    """An attribute has a value ``among`` those given, or ``not_among``; or one of its elements is ``other_than``."""
    value = at.attribute(name, default)
    if value is None or not _holds(value, **tests):
        return None
    return {name: str(value), "value": str(value)}


@condition
def type_attribute(at: Looked, name: str, not_among: Sequence[str]) -> Findings | None:
    """An attribute that is an element type's number names one that is not among those given."""
    value = at.attribute(name)
    if not value:
        return None
    found = type_name(ir.DataType(value))
    return {"type": found} if found not in not_among else None


@condition
def computed(at: Looked, input: int) -> Findings | None:
    """An input is there and differs from run to run."""
    value = at.input(input)
    return None if at.known.fixed(value) else {"value": (value and value.name) or ""}


@condition
def no_weight(at: Looked, input: int) -> Findings | None:
    """An input is there and the parser has no constant for it, though it may be the same in every run."""
    value = at.input(input)
    return None if at.known.is_weight(value) else {"value": (value and value.name) or ""}


@condition
def type_(
    at: Looked,
    input: int | str | None = None,
    output: int | None = None,
    among: Sequence[str] | None = None,
    not_among: Sequence[str] | None = None,
) -> Findings | None:
    """The element type of an input (or "any") or of an output is among those given, or is not."""
    values: Sequence[ir.Value | None]
    if output is not None:
        values = at.node.outputs[output : output + 1]
    else:
        values = at.node.inputs if input == "any" else [at.input(int(input or 0))]
    for value in values:
        found = at.known.dtype(value)
        if found is not None and _holds(found, among=among, not_among=not_among):
            return {"type": found}
    return None


@condition
def differ(at: Looked, inputs: Sequence[int]) -> Findings | None:
    """Inputs are of different types."""
    found = [at.known.dtype(at.input(index)) for index in inputs]
    kinds = list(dict.fromkeys(name for name in found if name is not None))
    return {"types": " and ".join(kinds)} if len(kinds) > 1 else None


@condition
def rank(at: Looked, input: int, **tests: Any) -> Findings | None:
    """The number of axes of an input."""
    found = at.known.rank(at.input(input))
    return {"rank": str(found)} if found is not None and _holds(found, **tests) else None


@condition
def dynamic(at: Looked, input: int, axes: Sequence[int] | None = None) -> Findings | None:
    """One of the axes of an input, or of those named, differs from run to run."""
    shape = at.known.shape(at.input(input))
    if shape is None:
        return None
    chosen = range(len(shape)) if axes is None else [a % len(shape) for a in axes if -len(shape) <= a < len(shape)]
    left = [axis for axis in chosen if shape[axis] is None]
    return {"axis": str(left[0])} if left else None


@condition
def outputs(at: Looked, over: int) -> Findings | None:
    """A node has more outputs."""
    count = len(at.node.outputs)
    return {"outputs": str(count)} if count > over else None


@condition
def given(at: Looked, input: int) -> Findings | None:
    """An input is there."""
    return {} if at.input(input) is not None else None


@condition
def absent(at: Looked, input: int) -> Findings | None:
    """An input is not there."""
    return {} if at.input(input) is None else None


@condition
def fixed(at: Looked, input: int) -> Findings | None:
    """An input is there and the same in every run."""
    value = at.input(input)
    return {} if value is not None and at.known.fixed(value) else None


@condition
def nonzero(at: Looked, input: int) -> Findings | None:
    """A constant has elements other than 0."""
    array = at.known.array(at.input(input))
    return {} if array is not None and bool(np.any(array.astype(np.float64) != 0)) else None


def _holds(
    value: Any,
    among: Sequence[Any] | None = None,
    not_among: Sequence[Any] | None = None,
    other_than: Any = None,
    above: float | None = None,
    below: float | None = None,
) -> bool:
    elements = value if isinstance(value, list) else [value]
    tests = [
        among is None or value in among,
        not_among is None or value not in not_among,
        other_than is None or any(element != other_than for element in elements),
        above is None or any(element > above for element in elements),
        below is None or any(element < below for element in elements),
    ]
    return all(tests)
