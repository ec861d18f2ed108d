"""Operators that compute each row of a batch by itself: convolutions, pools, norms of maps."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.bundles.samples.lift import Lift
from graphopt.bundles.samples.lifted import Lifted
from graphopt.bundles.samples.rules.shared import integer, operand, others
from graphopt.bundles.samples.rules.table import rule


@rule(
    *("AveragePool", "Conv", "ConvInteger", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalLpPool"),
    *("GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "LRN", "LpPool", "QLinearConv", "SpaceToDepth"),
)
def _rows(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    return t.same_results(node, [t.along(operand(t, node, 0), 0), *others(t, node)], 0)


@rule("MaxPool")
def _max_pool(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        t.refuse("the indices that it gives count through the batch")
    return t.same_results(node, [t.along(operand(t, node, 0), 0)], 0)


@rule("BatchNormalization")
def _batch_norm(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    if integer(t, node, "training_mode", 0) or len(node.outputs) > 1:
        t.refuse("it trains: its mean is that of the batch", "export the network for inference (model.eval())")
    return _rows(t, node)


@rule("GridSample")
@rule("MultiHeadAttention", domain="com.microsoft")
def _rows_of_all(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    """Each of some inputs has the batch in front."""
    batched = {"GridSample": {0, 1}, "MultiHeadAttention": {0, 1, 2}}[node.op_type]
    values: list[ir.Value | None] = []
    for index, given in enumerate(t.inputs(node)):
        if given is not None and index in batched:
            values.append(t.along(given, 0))
        elif given is not None and given.place is not None:
            t.refuse(f"its input {index} differs by sample")
        else:
            values.append(None if given is None else given.value)
    return t.same_results(node, values, 0)


@rule("Resize")
def _resize(t: Lift, node: ir.Node) -> Sequence[Lifted]:
    first = t.along(operand(t, node, 0), 0)
    roi, scales, sizes = [*others(t, node), None, None, None][:3]
    if "axes" in node.attributes:
        if 0 in [axis % operand(t, node, 0).rank for axis in node.attributes["axes"].as_ints()]:
            t.refuse("it resizes the batch axis")
        return t.same_results(node, [first, *others(t, node)], 0)
    if sizes is not None:
        rest = t.one("Slice", [sizes, t.numbers([1]), t.numbers([1 << 20])])
        return t.same_results(node, [first, roi, scales, t.one("Concat", [t.count(), rest], axis=0)], 0)
    factors = t.constant(node.inputs[2] if len(node.inputs) > 2 else None)
    if factors is None or factors.reshape(-1)[:1] != 1:
        t.refuse("it is not known not to resize the batch axis")
    return t.same_results(node, [first, roi, scales], 0)
