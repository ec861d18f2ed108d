"""Norms, reductions, pools and resizing: what looks at many elements for one."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.rules.shared import SMALL, align, axes_of, has_axes, present, same, tie_all
from graphopt.channels.rules.table import rule
from graphopt.channels.tying import Group, Tying, counted
from graphopt.matching import int_attribute


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(t: Tying, node: ir.Node) -> None:
    source, gamma = present(node, 0, 2)
    output = node.outputs[0]
    rank = t.rank(source)
    axis = int_attribute(node, "axis", -1)
    if axis is None:
        return
    affine = [gamma, *present(node, 2)]
    for place, running, repeated in align(t, [output, *affine], output):
        along = [a for a in running if a[0] is not output]
        if t.permutes:
            t.tie(place, (source, place[1]))
            tie_all(t, place, along)
        elif t.scales and place[1] >= axis % rank and not repeated:
            tie_all(t, place, along)
            t.pin(t.called(), (source, place[1]))
        elif place[1] == rank - 1 == axis % rank and t.group is Group.ORTHOGONAL and _is_plain(node):
            t.tie(place, (source, place[1]))
    if t.permutes:
        for extra in node.outputs[1:]:
            same(t, source, extra, but=range(axis % rank, rank))


def _is_plain(node: ir.Node) -> bool:
    """Whether a RMSNormalization multiplies by nothing but ones."""
    gamma = graphs.constant_array(node.inputs[1], limit=1 << 16)
    return node.op_type == "RMSNormalization" and gamma is not None and bool((gamma == 1).all())


@rule("BatchNormalization")
def _batch_norm(t: Tying, node: ir.Node) -> None:
    source, gamma, beta, mean, variance = present(node)
    output = node.outputs[0]
    if int_attribute(node, "training_mode", 0) != 0 or int_attribute(node, "spatial", 1) != 1 or t.opset < 7:
        return
    if t.permutes:
        same(t, source, output)
        for vector in (gamma, beta, mean, variance):
            t.tie((output, 1), (vector, 0))
    elif t.scales:
        t.tie((output, 1), (gamma, 0))
        t.tie((output, 1), (beta, 0))
        if t.can_absorb(gamma, 1):
            # (s x - s m) / sqrt(v) * (g / s): the variance stays, so that epsilon means what it meant.
            t.tie((source, 1), (mean, 0))
            t.absorb(gamma, 0, (source, 1), inverse=True)


@rule("InstanceNormalization", "GroupNormalization")
def _group_norm(t: Tying, node: ir.Node) -> None:
    source, gamma, beta = present(node)
    output = node.outputs[0]
    groups = int_attribute(node, "num_groups", 1)
    vectors = ((gamma, 0), (beta, 0))
    channels = t.size((source, 1))
    t.rank(output)
    if groups is None or not isinstance(channels, int) or channels % groups:
        return
    if node.op_type == "InstanceNormalization":
        groups = channels
    whole = t.size((gamma, 0)) == channels == t.size((beta, 0))
    if whole and (t.permutes or t.scales):
        for vector in vectors:
            t.tie((output, 1), vector)
    if not t.permutes or not (whole or t.size((gamma, 0)) == groups == t.size((beta, 0))):
        return
    same(t, source, output)
    group = t.labels.fresh(groups)
    known = t.label((source, 1))
    if known is not None:
        t.tie_labels(known, t.labels.product([group, t.labels.fresh(channels // groups)]))
    if not whole:
        for vector in vectors:
            t.free(vector)
            label = t.label(vector)
            if label is not None:
                t.tie_labels(group, label)


# -- reductions and pools ----------------------------------------------------------------------------------------------


@rule(
    *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin"),
)
def _reduce(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    rank = t.rank(source)
    t.rank(node.outputs[0])
    if node.op_type in ("ArgMax", "ArgMin"):
        axis = int_attribute(node, "axis", 0)
        axes: list[int] | None = None if axis is None else [axis]
    else:
        axes = axes_of(node, 1)
        if axes is None and not has_axes(node):
            nothing = int_attribute(node, "noop_with_empty_axes", 0)
            axes = None if nothing != 0 else list(range(rank))
    keeps = int_attribute(node, "keepdims", 1)
    if axes is None or keeps is None:
        return
    if not axes and node.op_type not in ("ArgMax", "ArgMin") and int_attribute(node, "noop_with_empty_axes", 0) == 0:
        axes = list(range(rank))
    reduced = {axis % rank for axis in axes}
    passes = (
        t.permutes
        or node.op_type in ("ReduceSum", "ReduceMean")
        or (t.scales and node.op_type in ("ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"))
    )
    if not passes:
        return
    place = 0
    for axis in range(rank):
        if axis in reduced:
            if t.permutes and not node.op_type.startswith("Arg"):
                t.free((source, axis))
            place += keeps
            continue
        t.tie((source, axis), (node.outputs[0], place))
        place += 1


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _pool(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = t.rank(source)
    t.rank(output)
    if t.permutes or t.scales or "Average" in node.op_type:
        same(t, source, output, but=range(2, rank))
    if t.permutes and node.op_type.startswith("Global"):
        t.free(*counted(source, range(2, rank)))
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        t.pin_all(f"indices of {t.called()}", source, *node.outputs)


@rule("Resize", "Upsample")
def _resize(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    mode = node.attributes.get("coordinate_transformation_mode")
    rank = t.rank(source)
    t.rank(output)
    if mode is not None and (mode.is_ref() or mode.as_string() == "tf_crop_and_resize"):
        return
    named = axes_of(node, len(node.inputs))
    resized = list(range(rank)) if named is None else [axis % rank for axis in named]
    scales = None
    if "scales" in node.attributes and not node.attributes["scales"].is_ref():
        scales = [float(s) for s in node.attributes["scales"].as_floats()]
    else:
        index = 1 if node.op_type == "Upsample" or t.opset < 11 else 2
        array = graphs.constant_array(node.inputs[index], limit=SMALL) if len(node.inputs) > index else None
        scales = None if array is None or array.size == 0 else [float(s) for s in array]
    sized = len(node.inputs) > 3 and node.inputs[3] is not None
    policy = node.attributes.get("keep_aspect_ratio_policy")
    stretches = policy is None or (not policy.is_ref() and policy.as_string() == "stretch")
    for axis in range(min(2, rank)):
        if axis not in resized:
            same = True
        elif scales is not None:
            same = scales[resized.index(axis)] == 1.0
        else:
            size = t.size((source, axis))
            same = sized and stretches and isinstance(size, int) and size == t.size((output, axis))
        if same:
            t.tie((source, axis), (output, axis))


@rule("Pad")
def _pad(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = t.rank(source)
    t.rank(output)
    mode = node.attributes.get("mode")
    if mode is not None and mode.is_ref():
        return
    filled = mode is None or mode.as_string() == "constant"
    if "pads" in node.attributes:
        pads: list[int] | None = [int(p) for p in node.attributes["pads"].as_ints()]
        axes, value = list(range(rank)), node.attributes.get("value")
        zero = value is None or (not value.is_ref() and value.as_float() == 0.0)
    else:
        array = graphs.constant_array(node.inputs[1], limit=SMALL)
        pads = None if array is None else [int(p) for p in array]
        named = node.inputs[3] if len(node.inputs) > 3 else None
        chosen = graphs.constant_array(named, limit=SMALL) if named is not None else None
        if named is not None and chosen is None:
            return
        axes = list(range(rank)) if chosen is None else [int(a) % rank for a in chosen]
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        zero = fill is None or graphs.scalar_of(fill) == 0.0
    if pads is None or len(pads) != 2 * len(axes) or (filled and not zero and not t.permutes):
        return
    padded = {axis for n, axis in enumerate(axes) if pads[n] or pads[n + len(axes)]}
    same(t, source, output, but=tuple(padded))
