"""What there is to tell people of the channel classes of a model."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.channels.classes import ChannelClass, channel_classes
from graphopt.channels.tying import Group
from graphopt.shapes import infer_shapes


@dataclass(frozen=True)
class ClassSummary:
    """A channel class in words.

    Attributes:
        size: The number of channels.
        weights: Where it is in weights: ``name[axis]``, in the order of the graph.
        values: How many computed values have it.
        pinned: Why nothing but the identity is allowed; empty where the class is free.
    """

    size: int
    weights: tuple[str, ...]
    values: int
    pinned: tuple[str, ...]


def summarise(model: ir.Model) -> dict[str, list[ClassSummary]]:
    """The channel classes of a model for each group: free ones first, of the pinned ones those that weights have.

    Args:
        model: Its shapes are inferred; else it is left as it is.
    """
    infer_shapes(model)
    told: dict[str, list[ClassSummary]] = {}
    for group in Group:
        found = [_summary(cls) for cls in channel_classes(model, group).classes]
        told[group.value] = [one for one in found if one.weights]
    return told


def _summary(cls: ChannelClass) -> ClassSummary:
    weights = {value for value in cls.constants() if value.dtype is not None and not _is_index(value)}
    places = dict.fromkeys(f"{s.value.name}[{s.axis}]" for s in cls.slots if s.value in weights and s.axis is not None)
    return ClassSummary(cls.size, tuple(places), len(cls.activations()), cls.pinned)


def _is_index(value: ir.Value) -> bool:
    """Whether a constant holds sizes, axes or indices, not weights."""
    return value.dtype in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING)
