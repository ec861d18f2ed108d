"""Norms, reductions and what else looks along axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import STACKED, Lifted
from graphopt.bundles.samples.rules.shared import axes_of, integer, one_axis, operand, others
from graphopt.bundles.samples.rules.table import rule

_SOFTMAX_ALONG_ONE, _SUM_BY_INPUT, _REDUCE_BY_INPUT = 13, 13, 18


@rule(
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)
def _reduce(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    keep = bool(integer(t, node, "keepdims", 1))
    axes = axes_of(t, node, max(given.rank, 1))
    if not axes:
        if integer(t, node, "noop_with_empty_axes", 0):
            return t.same_results(node, [given.value, *others(t, node)], given.place)
        axes = list(range(given.rank))
    place = given.place
    if place is not None and place != STACKED and place not in axes:
        fewer = 0 if keep else sum(axis < place for axis in axes)
        return t.same_results(node, [given.value, *others(t, node)], place - fewer)
    if not axes:  # one number: over an axis made for it
        return _reduced(t, node, t.stacked(given, 1), [1], 0)
    return _reduced(t, node, t.stacked(given), [axis + 1 for axis in axes], int(keep))


def _reduced(t: Lift, node: ir.Node, value: ir.Value, axes: Sequence[int], keep: int) -> Sequence[Lifted]:
    by_input = t.opset >= (_SUM_BY_INPUT if node.op_type == "ReduceSum" else _REDUCE_BY_INPUT)
    if by_input:
        return t.same_results(node, [value, t.numbers(axes)], STACKED, keepdims=keep, noop_with_empty_axes=0)
    return t.same_results(node, [value], STACKED, keepdims=keep, axes=list(axes))


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    along_one = t.opset >= _SOFTMAX_ALONG_ONE
    return one_axis(t, node, integer(t, node, "axis", -1 if along_one else 1), before=not along_one)


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return one_axis(t, node, integer(t, node, "axis", -1), before=True)


@rule("LpNormalization", "TopK")
def _last_axis(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return one_axis(t, node, integer(t, node, "axis", -1))


@rule("MeanVarianceNormalization")
def _mean_variance(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    axes = axes_of(t, node, given.rank) or [0, 2, 3]
    if given.place not in (STACKED, *axes):
        return t.same_results(node, [given.value], given.place)
    return t.same_results(node, [t.stacked(given)], STACKED, axes=[axis + 1 for axis in axes])


@rule("ArgMax", "ArgMin")
def _arg(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return one_axis(t, node, integer(t, node, "axis", 0), kept=bool(integer(t, node, "keepdims", 1)))


@rule("CumSum")
def _running(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    given = operand(t, node, 0)
    found = t.constant(node.inputs[1])
    if found is None:
        t.refuse("its axis is not constant")
    axis = int(found.reshape(-1)[0]) % given.rank
    if given.place not in (STACKED, axis):
        return t.same_results(node, [given.value, *others(t, node)], given.place)
    return t.same_results(node, [t.stacked(given), t.of_array(np.array(axis + 1))], STACKED)
