"""``fold-scale``: a multiplication by one positive number a channel goes into the weights before or after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.channels import ChannelClass, Channels, Group, Override, channel_classes, is_current, rescale
from graphopt.rewrite import Context, Explanation, Kind, Pass, Stage
from graphopt.shapes import trusted_shape

Factors = npt.NDArray[np.float64]
_CHANNELS = 1 << 20  # a channel's numbers are small whatever the model


@dataclass(frozen=True)
class _Scaling:
    """A Mul or Div with one positive constant a channel: y = x * factors along an axis of y."""

    node: ir.Node
    x: ir.Value
    y: ir.Value
    axis: int
    factors: Factors


class FoldScale(Pass):
    """Removes a multiplication by one positive number a channel, by scaling the weights that make or read it."""

    name = "fold-scale"
    kind = Kind.ROUNDING
    stage = Stage.FACTORIZE
    explanation = Explanation(
        matches="Mul or Div by a constant of one positive number a channel, where the channels on its output or on its "
        "input may be scaled: sums of scaled things, Relu and its like, pools, and weights that make or read them",
        refuses="numbers that are zero, negative or not finite (Relu lets only positive ones pass); channels that are "
        "pinned on both sides: by a graph input or output, an activation, a normalisation that reads them, a constant "
        "added to all; weights that would leave the range of their type",
        costs="linear in the nodes, a few times; saves one pass over the data for each. Weights are scaled in float64 "
        "and rounded once, large ones while the model is saved",
        source="cross-layer equalisation (Nagel et al., Data-Free Quantization, ICCV 2019, section 4.1)",
    )

    def apply(self, ctx: Context) -> None:
        while self._round(ctx):
            pass

    def _round(self, ctx: Context) -> bool:
        """Fold what can be folded on one analysis of the model. Returns whether anything was."""
        found = [one for node in ctx.nodes("Mul", "Div") if (one := _scaling(ctx, node)) is not None]
        if not found:
            return False
        done = False
        for one in found:
            if bool((one.factors == 1).all()):
                done |= ctx.replace({one.y: one.x}, rule="one", certain=True)
        found = [one for one in found if one.node.graph is not None]
        channels = channel_classes(ctx.model, Group.SCALE)
        for one in found:
            sides = _sides(channels, one)
            if isinstance(sides, str):
                ctx.refuse(one.node, sides)
                continue
            for cls, factors in sides:
                if one.node.graph is None or one.x not in one.node.inputs or not is_current(cls):
                    break
                overrides = {one.node: _passes(one)}
                if rescale(ctx, cls, factors, rule=one.node.op_type.lower(), overrides=overrides, certain=True):
                    done = True
                    break
        return done


def _scaling(ctx: Context, node: ir.Node) -> _Scaling | None:
    """What a Mul or Div scales; None where it does something else."""
    x, constant = node.inputs
    if graphs.is_constant(x) and node.op_type == "Mul":
        x, constant = constant, x
    shape = None if x is None else trusted_shape(x)
    tensor = graphs.constant_tensor(constant)
    if x is None or shape is None or tensor is None or graphs.is_constant(x) or not 1 < tensor.size <= _CHANNELS:
        return None
    if not tensor.dtype.is_floating_point():
        return None
    sizes = [int(size) for size in tensor.shape.numpy()]
    long = [n for n, size in enumerate(sizes) if size != 1]
    axis = len(shape) - len(sizes) + long[0]
    if len(long) != 1 or len(sizes) > len(shape) or shape[axis] != tensor.size:
        return None
    factors = tensor.numpy().astype(np.float64).reshape(-1)
    if not bool((np.isfinite(factors) & (factors > 0)).all()):
        ctx.refuse(node, "not all numbers are positive")
        return None
    return _Scaling(node, x, node.outputs[0], axis, 1 / factors if node.op_type == "Div" else factors)


def _sides(channels: Channels, one: _Scaling) -> list[tuple[ChannelClass, Factors]] | str:
    """The classes that can take up a scaling, each with the factors that make it vanish; or why none can."""
    found: list[tuple[ChannelClass, Factors]] = []
    reasons: list[str] = []
    behind = {segment.cls for segment in channels.of(one.y, one.axis)}
    before = {segment.cls for segment in channels.of(one.x, one.axis)}
    if behind & before:
        return "the channels before and after it are of one class"
    for value, factors, side in ((one.y, 1 / one.factors, "after"), (one.x, one.factors, "before")):
        for segment in channels.of(value, one.axis):
            cls = segment.cls
            part = _part(factors, segment.outer, cls.size, segment.inner)
            if part is None:
                reasons.append(f"{side} it: the channels are scaled in parts")
            elif cls.free:
                found.append((cls, 1 / part if segment.inverse else part))
                break
            else:
                reasons.append(f"{side} it: {cls.pinned[0]}")
    return found or "; ".join(reasons[:2])


def _passes(one: _Scaling) -> Override:
    """At the new scale the node gives what it is given."""
    return lambda value_of: ([], {one.y: value_of(one.x)})


def _part(factors: Factors, outer: int, size: int, inner: int) -> Factors | None:
    """The factors of the middle of three axes, where the factors of all their elements are no more than that."""
    if outer * size * inner != factors.size:
        return None
    split = factors.reshape(outer, size, inner)
    part = split[0, :, 0]
    return part if bool((split == part[None, :, None]).all()) else None
