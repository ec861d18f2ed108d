"""``fold-permutation``: a Gather that only reorders channels goes into the weights before or after it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.channels import ChannelClass, Channels, Group, Override, channel_classes, is_current, relabel
from graphopt.matching import int_attribute
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.shapes import trusted_shape

Order = npt.NDArray[np.int64]
_CHANNELS = 1 << 20  # a permutation of more elements is no permutation of channels


@dataclass(frozen=True)
class _Reordering:
    """A Gather with a constant permutation of an axis: y[i] = x[order[i]] along it."""

    node: ir.Node
    x: ir.Value
    y: ir.Value
    axis: int
    order: Order


class FoldPermutation(Pass):
    """Removes a Gather that only reorders channels, by reordering the weights that make or read them."""

    name = "fold-permutation"
    kind = Kind.ROUNDING
    stage = Stage.FACTORIZE
    explanation = Explanation(
        matches="Gather with constant indices that are a permutation of an axis, where the channels on its output or "
        "on its input may be relabelled: every operator between them and the weights that make and read them lets a "
        "permutation pass",
        refuses="channels that are pinned on both sides: by a graph input or output, an operator that does not let "
        "permutations pass, a body, a weight that a caller may override; both sides of one class (a residual stream)",
        costs="linear in the nodes, a few times; saves one pass over the data for each Gather. Weights are reordered "
        "one at a time while the model is saved",
        source="channel symmetry of networks; PIFA (Zhao et al., ICML 2025) leaves this Gather in the graph",
    )

    def apply(self, ctx: Context) -> None:
        while self._round(ctx):
            pass

    def _round(self, ctx: Context) -> bool:
        """Fold what can be folded on one analysis of the model. Returns whether anything was."""
        found = [one for node in ctx.nodes("Gather") if (one := _reordering(node)) is not None]
        if not found:
            return False
        done = False
        for one in found:
            if bool((one.order == np.arange(one.order.size)).all()):
                done |= ctx.replace({one.y: one.x}, rule="identity", certain=True)
        found = [one for one in found if one.node.graph is not None]
        channels = channel_classes(ctx.model, Group.PERMUTATION)
        wanted: dict[tuple[ChannelClass, bytes], list[_Reordering]] = defaultdict(list)
        for one in found:
            sides = _sides(channels, one)
            if isinstance(sides, str):
                ctx.refuse(one.node, sides)
                continue
            for cls, order in sides:
                wanted[cls, order.tobytes()].append(one)
        # The class and order that rid the model of most Gathers first.
        for (cls, key), gone in sorted(wanted.items(), key=lambda item: -len(item[1])):
            if is_current(cls) and all(one.node.graph is not None and one.node.inputs[0] is one.x for one in gone):
                overrides = {one.node: _passes(one) for one in gone}
                done |= relabel(
                    ctx, cls, np.frombuffer(key, np.int64), rule="gather", overrides=overrides, certain=True
                )
        return done


def _reordering(node: ir.Node) -> _Reordering | None:
    """What a Gather reorders; None where it does something else."""
    x, indices = node.inputs
    shape = None if x is None else trusted_shape(x)
    axis = int_attribute(node, "axis", 0)
    if x is None or shape is None or axis is None:
        return None
    size = shape[axis % len(shape)]
    array = graphs.constant_array(indices, limit=_CHANNELS)
    if not isinstance(size, int) or array is None or array.shape != (size,):
        return None
    order = np.where(array < 0, array + size, array).astype(np.int64)
    if not np.array_equal(np.sort(order), np.arange(size)):
        return None
    return _Reordering(node, x, node.outputs[0], axis % len(shape), order)


def _sides(channels: Channels, one: _Reordering) -> list[tuple[ChannelClass, Order]] | str:
    """The classes that can take up a reordering, each with the order that makes it vanish; or why none can."""
    found: list[tuple[ChannelClass, Order]] = []
    reasons: list[str] = []
    behind = {segment.cls for segment in channels.of(one.y, one.axis)}
    before = {segment.cls for segment in channels.of(one.x, one.axis)}
    if behind & before:
        return "the channels before and after it are of one class"
    for value, order, side in ((one.y, np.argsort(one.order), "after"), (one.x, one.order, "before")):
        segments = channels.of(value, one.axis)
        for segment in segments:
            part = _part(order, segment.outer, segment.cls.size, segment.inner)
            if part is not None and segment.cls.free:
                found.append((segment.cls, part))
                break
            if part is not None:
                reasons.append(f"{side} it: {segment.cls.pinned[0]}")
        else:
            if not any(reason.startswith(side) for reason in reasons):
                reasons.append(f"{side} it: the channels are moved in parts")
    return found or "; ".join(reasons)


def _part(order: Order, outer: int, size: int, inner: int) -> Order | None:
    """The order of the middle of three axes that an order of all their elements is; None where it is not."""
    if outer * size * inner != order.size:
        return None
    middle = order.reshape(outer, size, inner)[0, :, 0] // inner
    if not np.array_equal(np.sort(middle), np.arange(size)):
        return None
    whole = np.arange(order.size).reshape(outer, size, inner)[:, middle].reshape(-1)
    return middle if np.array_equal(whole, order) else None


def _passes(one: _Reordering) -> Override:
    """In the new order the Gather gives what it is given."""
    return lambda value_of: ([], {one.y: value_of(one.x)})
