"""How each standard operator ties the axes of what it reads and makes, for each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.tying import Axis, Group, Tying, counted
from graphopt.matching import int_attribute, permutation

Rule = Callable[[Tying, ir.Node], None]

RULES: dict[str, Rule] = {}
"""The rule of each operator of the standard domain that has one."""

_SMALL = 64  # axes, sizes, pads: never data


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return enter


# -- element by element ------------------------------------------------------------------------------------------------


def _align(t: Tying, inputs: Sequence[ir.Value], output: ir.Value) -> list[tuple[Axis, list[Axis], int]]:
    """Each axis of a broadcast output: the input axes that run along it, and how many inputs are repeated along it."""
    rank = t.rank(output)
    ranks = {value: t.rank(value) for value in inputs}
    aligned: list[tuple[Axis, list[Axis], int]] = []
    for axis in range(rank):
        running: list[Axis] = []
        for value in inputs:
            place = axis - (rank - ranks[value])
            if place >= 0 and t.size((value, place)) != 1:
                running.append((value, place))
            elif place >= 0:
                t.free((value, place))
        aligned.append(((output, axis), running, len(inputs) - len(running)))
    return aligned


def _present(node: ir.Node, start: int = 0, end: int | None = None) -> list[ir.Value]:
    return [value for value in node.inputs[start:end] if value is not None]


def _tie_all(t: Tying, axis: Axis, running: Sequence[Axis]) -> None:
    if not running:
        t.free(axis)
    for other in running:
        t.tie(axis, other)


def _same(t: Tying, one: ir.Value, other: ir.Value, *, but: Sequence[int] = ()) -> None:
    """Tie each axis of a value to that of another."""
    for axis in range(t.rank(one)):
        if axis not in but:
            t.tie((one, axis), (other, axis))


@rule(
    *("Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Reciprocal", "Erf", "Gelu", "Elu", "Selu", "Celu", "Softplus", "Swish"),
    *("Softsign", "HardSigmoid", "HardSwish", "Mish", "ThresholdedRelu", "Shrink", "Sin", "Cos", "Tan", "Sinh", "Cosh"),
    *("Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Floor", "Ceil", "Round", "Sign", "Not", "IsNaN", "IsInf"),
    *("BitwiseNot", "Softmax", "LogSoftmax"),
)
def _equivariant(t: Tying, node: ir.Node) -> None:
    """One input, one output, the same thing done at each place: only permutations pass."""
    source = node.inputs[0]
    assert source is not None
    if t.permutes:
        _same(t, source, node.outputs[0])


@rule("LpNormalization")
def _lp_normalization(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    axis, power = int_attribute(node, "axis", -1), int_attribute(node, "p", 2)
    if t.permutes:
        _same(t, source, node.outputs[0])
    elif t.group is Group.ORTHOGONAL and axis is not None and power == 2:
        axis %= t.rank(source)
        t.tie((source, axis), (node.outputs[0], axis))


@rule("Relu", "LeakyRelu", "Abs")
def _homogeneous(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    if t.permutes or t.scales:
        _same(t, source, node.outputs[0])


@rule("Identity", "Neg", "Cast", "CastLike", "Dropout")
def _linear_unary(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if node.op_type == "Dropout" and not _is_inference(node, t.opset):
        return
    if not t.permutes and node.op_type in ("Cast", "CastLike") and not _are_floats(source, output):
        return
    _same(t, source, output)
    t.free_all(*node.inputs[1:])
    if node.op_type == "Dropout":
        t.free_all(*(v for v in node.outputs[1:] if not v.uses() and not v.is_graph_output()))


def _is_inference(node: ir.Node, opset: int) -> bool:
    if opset < 12:
        return opset >= 7 or int_attribute(node, "is_test", 0) == 1
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    return mode is None or graphs.scalar_of(mode) == 0.0


def _are_floats(*values: ir.Value) -> bool:
    return all(value.dtype is not None and value.dtype.is_floating_point() for value in values)


@rule(
    *("Pow", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
    *("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
)
def _pairwise(t: Tying, node: ir.Node) -> None:
    if t.permutes:
        for axis, running, _ in _align(t, _present(node), node.outputs[0]):
            _tie_all(t, axis, running)


@rule("Add", "Sub", "Sum", "Mean", "Max", "Min")
def _sum(t: Tying, node: ir.Node) -> None:
    if node.op_type in ("Max", "Min") and not (t.permutes or t.scales):
        return
    inputs = _present(node)
    if not t.permutes:  # a number that is zero stays zero
        inputs = [value for value in inputs if graphs.scalar_of(value) != 0.0]
    for axis, running, repeated in _align(t, inputs, node.outputs[0]):
        if t.permutes or not repeated:
            _tie_all(t, axis, running)
        else:
            t.pin(f"{t.called()} adds the same to all", axis, *running)


@rule("Mul")
def _product(t: Tying, node: ir.Node) -> None:
    left, right = _present(node)
    if t.can_absorb(left, 0) and not graphs.is_constant(right):
        left, right = right, left
    for axis, running, _ in _align(t, [left, right], node.outputs[0]):
        if t.permutes or len(running) < 2:
            _tie_all(t, axis, running)
        elif t.scales:
            index = 1 if right is node.inputs[1] else 0
            if left is not right and t.can_absorb(right, index):
                t.tie(axis, running[1])
                t.absorb(right, running[1][1], running[0], inverse=True)
            else:
                t.multiply(axis, *running)


@rule("Div")
def _quotient(t: Tying, node: ir.Node) -> None:
    left, right = _present(node)
    for axis, running, _ in _align(t, [left, right], node.outputs[0]):
        if t.permutes:
            _tie_all(t, axis, running)
        elif running == [(left, axis[1] - t.rank(axis[0]) + t.rank(left))]:
            t.tie(axis, running[0])
        elif t.scales and len(running) == 1:
            t.tie(axis, running[0], inverse=True)
        elif t.scales and len(running) == 2 and left is not right:
            if t.can_absorb(right, 1):
                t.tie(axis, running[1], inverse=True)
                t.absorb(right, running[1][1], running[0], inverse=False)
            elif t.can_absorb(left, 0):
                t.tie(axis, running[0])
                t.absorb(left, running[0][1], running[1], inverse=False)
            else:
                t.multiply(running[0], axis, running[1])


@rule("PRelu")
def _prelu(t: Tying, node: ir.Node) -> None:
    source, slope = _present(node)
    for axis, running, _ in _align(t, [source, slope], node.outputs[0]):
        if t.permutes:
            _tie_all(t, axis, running)
        elif t.scales:
            t.tie(axis, (source, axis[1]))
            t.pin(f"slope of {t.called()}", *running[1:])


@rule("Clip")
def _clip(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    if t.permutes or (t.scales and _is_relu(node, t.opset)):
        _same(t, source, node.outputs[0])


def _is_relu(node: ir.Node, opset: int) -> bool:
    bounds = [*node.inputs[1:], None, None][:2]
    return opset >= 11 and bounds[1] is None and bounds[0] is not None and graphs.scalar_of(bounds[0]) == 0.0


@rule("Where")
def _where(t: Tying, node: ir.Node) -> None:
    condition, one, other = _present(node)
    for axis, running, _ in _align(t, [condition, one, other], node.outputs[0]):
        chosen = [a for a in running if a[0] is not condition]
        if t.permutes:
            _tie_all(t, axis, running)
        elif len(chosen) == 2 and (t.scales or len(running) == 2):
            _tie_all(t, axis, chosen)
            t.pin(f"condition of {t.called()}", *(a for a in running if a[0] is condition))
        else:
            t.pin(t.called(), axis, *running)


# -- products ----------------------------------------------------------------------------------------------------------


@rule("MatMul")
def _matmul(t: Tying, node: ir.Node) -> None:
    left, right = _present(node)
    output = node.outputs[0]
    a, b = t.rank(left), t.rank(right)
    t.contract((left, a - 1), (right, max(b - 2, 0)))
    rank = t.rank(output)
    if b > 1:
        t.tie((output, rank - 1), (right, b - 1))
    if a > 1:
        t.tie((output, rank - (2 if b > 1 else 1)), (left, a - 2))
    for axis in range(rank - (a > 1) - (b > 1)):
        _batch(t, (output, axis), [(left, a - 2), (right, b - 2)], rank - (a > 1) - (b > 1))


def _batch(t: Tying, axis: Axis, operands: Sequence[tuple[ir.Value, int]], batches: int) -> None:
    """An axis along which two operands are multiplied matrix by matrix."""
    running: list[Axis] = []
    for value, own in operands:
        place = axis[1] - (batches - own)
        if place >= 0 and t.size((value, place)) != 1:
            running.append((value, place))
        elif place >= 0:
            t.free((value, place))
    if t.permutes or len(running) < 2:
        _tie_all(t, axis, running)
    elif t.scales:
        t.multiply(axis, *running)
    else:
        t.pin(t.called(), axis, *running)


@rule("Gemm")
def _gemm(t: Tying, node: ir.Node) -> None:
    left, right = _present(node, 0, 2)
    output = node.outputs[0]
    across = int_attribute(node, "transA", 0), int_attribute(node, "transB", 0)
    if None in across or any(a.is_ref() for a in node.attributes.values()):
        return
    a, b = (1 if across[0] else 0), (1 if across[1] else 0)
    t.contract((left, 1 - a), (right, b))
    added = node.inputs[2] if len(node.inputs) > 2 else None
    for axis, source in ((0, (left, a)), (1, (right, 1 - b))):
        place = -1 if added is None else axis - 2 + t.rank(added)
        if added is None:
            t.tie((output, axis), source)
        elif place >= 0 and t.size((added, place)) != 1:
            t.tie((output, axis), source)
            t.tie((output, axis), (added, place))
        elif t.permutes:
            t.tie((output, axis), source)
        else:
            t.pin(f"{t.called()} adds the same to all", (output, axis), source)


@rule("Einsum")
def _einsum(t: Tying, node: ir.Node) -> None:
    equation = node.attributes["equation"]
    if equation.is_ref():
        return
    text = equation.as_string().replace(" ", "")
    if "." in text or "->" not in text:
        return
    sources, result = text.split("->")
    places: dict[str, list[Axis]] = {}
    for letters, value in zip(sources.split(","), _present(node), strict=True):
        if len(letters) != t.rank(value) or len(set(letters)) < len(letters):
            return
        for axis, letter in enumerate(letters):
            places.setdefault(letter, []).append((value, axis))
    output = node.outputs[0]
    for letter, axes in places.items():
        shared = len({t.size(axis) for axis in axes}) == 1
        found = result.find(letter)
        if not shared:
            continue
        if t.permutes:
            for other in axes[1:]:
                t.tie(axes[0], other)
            if found >= 0:
                t.tie(axes[0], (output, found))
            else:
                t.free(axes[0])
        elif found >= 0 and len(axes) == 1:
            t.tie(axes[0], (output, found))
        elif found < 0 and len(axes) == 2:
            t.contract(*axes)
        elif t.scales and found >= 0 and len(axes) == 2:
            t.multiply((output, found), *axes)


@rule("Conv", "ConvTranspose")
def _conv(t: Tying, node: ir.Node) -> None:
    source, weight = _present(node, 0, 2)
    output = node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    groups = int_attribute(node, "group", 1)
    rank = t.rank(source)
    sizes = [t.size(axis) for axis in ((source, 1), (output, 1), (weight, 0), (weight, 1))]
    t.rank(output)
    if groups is None or rank != t.rank(weight) or not all(isinstance(size, int) for size in sizes):
        return
    if t.permutes or bias is None:
        t.tie((source, 0), (output, 0))
    if bias is not None:
        t.tie((output, 1), (bias, 0))
    reads, makes = (0, 1) if node.op_type == "ConvTranspose" else (1, 0)
    if groups == 1:
        t.contract((source, 1), (weight, reads))
        t.tie((output, 1), (weight, makes))
        return
    if node.op_type == "Conv" and sizes[0] == sizes[1] == groups:
        _depthwise(t, source, weight, output)
        return
    # Channels of a group, and groups: each group reads its own channels with weights of its own.
    inner_in, inner_out = (int(size) // groups for size in sizes[:2] if isinstance(size, int))
    made, group, read = (t.labels.fresh(size) for size in (inner_out, groups, inner_in))
    if not t.permutes:
        t.labels.pin(group, f"groups of {t.called()}")
    whole = (t.labels.product([group, read]), t.labels.product([group, made]))
    if node.op_type == "Conv":
        parts = [((source, 1), whole[0]), ((output, 1), whole[1]), ((weight, 0), whole[1])]
        parts.append(((weight, 1), t.labels.inverse(read)))
    else:
        parts = [((source, 1), whole[0]), ((weight, 0), t.labels.inverse(whole[0]))]
        parts += [((output, 1), whole[1]), ((weight, 1), made)]
    for axis, label in parts:
        t.free(axis)
        known = t.label(axis)
        if known is not None:
            t.tie_labels(known, label)


def _depthwise(t: Tying, source: ir.Value, weight: ir.Value, output: ir.Value) -> None:
    if t.permutes:
        t.tie((source, 1), (output, 1))
        t.tie((weight, 0), (output, 1))
    elif t.scales and t.can_absorb(weight, 1):
        t.tie((weight, 0), (output, 1))
        t.absorb(weight, 0, (source, 1), inverse=True)
    elif t.scales:
        t.multiply((output, 1), (source, 1), (weight, 0))
    else:
        t.pin(t.called(), (output, 1), (source, 1))


# -- norms -------------------------------------------------------------------------------------------------------------


@rule("LayerNormalization", "RMSNormalization")
def _layer_norm(t: Tying, node: ir.Node) -> None:
    source, gamma = _present(node, 0, 2)
    output = node.outputs[0]
    rank = t.rank(source)
    axis = int_attribute(node, "axis", -1)
    if axis is None:
        return
    affine = [gamma, *_present(node, 2)]
    for place, running, repeated in _align(t, [output, *affine], output):
        along = [a for a in running if a[0] is not output]
        if t.permutes:
            t.tie(place, (source, place[1]))
            _tie_all(t, place, along)
        elif t.scales and place[1] >= axis % rank and not repeated:
            _tie_all(t, place, along)
            t.pin(t.called(), (source, place[1]))
        elif place[1] == rank - 1 == axis % rank and t.group is Group.ORTHOGONAL and _is_plain(node):
            t.tie(place, (source, place[1]))
    if t.permutes:
        for extra in node.outputs[1:]:
            _same(t, source, extra, but=range(axis % rank, rank))


def _is_plain(node: ir.Node) -> bool:
    """Whether a RMSNormalization multiplies by nothing but ones."""
    gamma = graphs.constant_array(node.inputs[1], limit=1 << 16)
    return node.op_type == "RMSNormalization" and gamma is not None and bool((gamma == 1).all())


@rule("BatchNormalization")
def _batch_norm(t: Tying, node: ir.Node) -> None:
    source, gamma, beta, mean, variance = _present(node)
    output = node.outputs[0]
    if int_attribute(node, "training_mode", 0) != 0 or int_attribute(node, "spatial", 1) != 1 or t.opset < 7:
        return
    if t.permutes:
        _same(t, source, output)
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
    source, gamma, beta = _present(node)
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
    _same(t, source, output)
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
        if axes is None and not _has_axes(node):
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
        _same(t, source, output, but=range(2, rank))
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
        array = graphs.constant_array(node.inputs[index], limit=_SMALL) if len(node.inputs) > index else None
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
        array = graphs.constant_array(node.inputs[1], limit=_SMALL)
        pads = None if array is None else [int(p) for p in array]
        named = node.inputs[3] if len(node.inputs) > 3 else None
        chosen = graphs.constant_array(named, limit=_SMALL) if named is not None else None
        if named is not None and chosen is None:
            return
        axes = list(range(rank)) if chosen is None else [int(a) % rank for a in chosen]
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        zero = fill is None or graphs.scalar_of(fill) == 0.0
    if pads is None or len(pads) != 2 * len(axes) or (filled and not zero and not t.permutes):
        return
    padded = {axis for n, axis in enumerate(axes) if pads[n] or pads[n + len(axes)]}
    _same(t, source, output, but=tuple(padded))


# -- movement ----------------------------------------------------------------------------------------------------------


@rule("Transpose")
def _transpose(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = t.rank(source)
    perm = permutation(node) if "perm" in node.attributes else tuple(reversed(range(rank)))
    t.rank(output)
    if perm is not None:
        for axis, origin in enumerate(perm):
            t.tie((output, axis), (source, origin))


@rule("Squeeze", "Unsqueeze")
def _squeeze(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    shorter, longer = (source, output) if node.op_type == "Unsqueeze" else (output, source)
    ranks = t.rank(shorter), t.rank(longer)
    named = axes_of(node, 1)
    if named is None and (_has_axes(node) or trusted_static(t, longer) is None):
        return
    ones = [n for n in range(ranks[1]) if t.size((longer, n)) == 1] if named is None else [n % ranks[1] for n in named]
    kept = [axis for axis in range(ranks[1]) if axis not in ones]
    if len(kept) == ranks[0]:
        for place, axis in enumerate(kept):
            t.tie((shorter, place), (longer, axis))


def trusted_static(t: Tying, value: ir.Value) -> list[int] | None:
    """The sizes of a value where all are numbers."""
    sizes = [t.size((value, axis)) for axis in range(t.rank(value))]
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(s, int) for s in sizes) else None


@rule("Reshape", "Flatten")
def _reshape(t: Tying, node: ir.Node) -> None:
    """The elements are the same in the same order: groups of axes of equal sizes are tied."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    copied = 0
    if node.op_type == "Reshape" and int_attribute(node, "allowzero", 0) == 0 and len(node.inputs) > 1:
        shape = graphs.constant_array(node.inputs[1], limit=_SMALL)
        while shape is not None and copied < min(shape.size, t.rank(source), t.rank(output)) and shape[copied] == 0:
            t.tie((source, copied), (output, copied))
            copied += 1
    a, b = (_long_axes(t, value, copied) for value in (source, output))
    # From the right: whatever is at the left, the index modulo the sizes at the right is the same.
    while a and b:
        count = _group(t, a, b)
        if count is None:
            break
        left, right = count
        t.tie_products(a[len(a) - left :], b[len(b) - right :])
        del a[len(a) - left :], b[len(b) - right :]
    while a and b and t.size(a[0]) == t.size(b[0]):
        t.tie(a.pop(0), b.pop(0))
    while a and b:
        count = _group(t, a[::-1], b[::-1])
        if count is None:
            break
        t.tie_products(a[: count[0]], b[: count[1]])
        del a[: count[0]], b[: count[1]]


def _long_axes(t: Tying, value: ir.Value, start: int) -> list[Axis]:
    """The axes of a value, but for those of one element, which matter to nobody."""
    axes = counted(value, range(start, t.rank(value)))
    return [axis for axis in axes if t.size(axis) != 1]


def _group(t: Tying, a: Sequence[Axis], b: Sequence[Axis]) -> tuple[int, int] | None:
    """How many axes at the right ends make the same number of elements, at least; None where that is not known."""
    left, right = t.size(a[-1]), t.size(b[-1])
    counts = [1, 1]
    while isinstance(left, int) and isinstance(right, int) and left > 0 and right > 0:
        if left == right:
            return counts[0], counts[1]
        side = 0 if left < right else 1
        axes = (a, b)[side]
        counts[side] += 1
        if counts[side] > len(axes):
            return None
        more = t.size(axes[-counts[side]])
        if not isinstance(more, int):
            return None
        if side == 0:
            left *= more
        else:
            right *= more
    return None


@rule("Concat")
def _concat(t: Tying, node: ir.Node) -> None:
    output = node.outputs[0]
    rank = t.rank(output)
    axis = int_attribute(node, "axis", 0)
    if axis is None:
        return
    axis %= rank
    for value in _present(node):
        _same(t, value, output, but=(axis,))
    _tie_sum(t, (output, axis), [(value, axis) for value in _present(node)])


@rule("Split")
def _split(t: Tying, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    axis = int_attribute(node, "axis", 0)
    rank = t.rank(source)
    if axis is None:
        return
    axis %= rank
    for value in node.outputs:
        _same(t, source, value, but=(axis,))
    _tie_sum(t, (source, axis), [(value, axis) for value in node.outputs])


def _tie_sum(t: Tying, whole: Axis, parts: Sequence[Axis], before: int = 0, after: int = 0) -> None:
    sizes = [t.size(part) for part in parts]
    label = t.label(whole)
    if label is None or not all(isinstance(size, int) for size in sizes):
        t.pin(f"size not known at {t.called()}", whole, *parts)
        return
    t.free(whole, *parts)
    labels = [t.labels.fresh(before)] if before else []
    for part, size in zip(parts, sizes, strict=True):
        found = t.label(part)
        if found is not None:
            labels.append(found)
        elif size == 1:
            labels.append(t.labels.fresh(1))
    if after:
        labels.append(t.labels.fresh(after))
    t.tie_labels(label, tuple(term for found in labels for term in found))


@rule("Slice")
def _slice(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = t.rank(source)
    t.rank(output)
    if t.opset < 10:
        return
    numbers = [graphs.constant_array(value, limit=_SMALL) for value in node.inputs[1:5]]
    given = [value is not None for value in node.inputs[1:5]]
    named = numbers[2] if len(given) > 2 and given[2] else None
    if len(given) > 2 and given[2] and named is None:
        return
    if named is not None:
        axes = [int(a) % rank for a in named]
    else:
        shape = node.inputs[1].shape if node.inputs[1] is not None else None
        if shape is None or not shape.is_static() or len(shape) != 1:
            return
        axes = list(range(shape.numpy()[0]))
    _same(t, source, output, but=axes)
    for place, axis in enumerate(axes):
        size, kept = t.size((source, axis)), t.size((output, axis))
        if not isinstance(size, int) or not isinstance(kept, int) or numbers[0] is None or numbers[1] is None:
            continue
        steps = numbers[3] if len(numbers) > 3 else None
        if len(given) > 3 and given[3] and (steps is None or int(steps[place]) != 1):
            continue
        start, end, _ = slice(int(numbers[0][place]), int(numbers[1][place])).indices(size)
        if end - start == kept:
            _tie_sum(t, (source, axis), [(output, axis)], start, size - end)


@rule("Expand")
def _expand(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    for axis, running, _ in _align(t, [source], output):
        if running:
            t.tie(axis, running[0])
        elif t.permutes:
            t.free(axis)  # all elements along it are equal


@rule("ConstantOfShape")
def _fill(t: Tying, node: ir.Node) -> None:
    if t.permutes:
        t.free_all(*node.outputs)


@rule("Tile")
def _tile(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    repeats = graphs.constant_array(node.inputs[1], limit=_SMALL)
    if repeats is None or t.rank(source) != t.rank(output) or repeats.size != t.rank(source):
        return
    for axis, repeat in enumerate(int(r) for r in repeats):
        label, made = t.label((source, axis)), t.label((output, axis))
        if repeat == 1:
            t.tie((source, axis), (output, axis))
        elif made is not None and t.permutes and isinstance(t.size((source, axis)), int):
            t.free((source, axis), (output, axis))
            if label is not None:
                t.tie_labels(made, t.labels.product([t.labels.fresh(repeat), label]))


@rule("Gather")
def _gather(t: Tying, node: ir.Node) -> None:
    source, indices = _present(node)
    output = node.outputs[0]
    rank, count = t.rank(source), t.rank(indices)
    t.rank(output)
    axis = int_attribute(node, "axis", 0)
    if axis is None:
        return
    axis %= rank
    for place in range(rank):
        if place < axis:
            t.tie((source, place), (output, place))
        elif place > axis:
            t.tie((source, place), (output, place - 1 + count))
    if t.permutes:
        for place in range(count):
            t.tie((indices, place), (output, axis + place))
        if t.can_absorb(indices, 1) and source is not indices:
            # Its numbers are renumbered with the axis; what comes out is relabelled by moving them about.
            t.absorb(indices, None, (source, axis), inverse=False)
        else:
            t.pin(f"computed indices of {t.called()}", (source, axis))


@rule("Shape", "Size")
def _shape(t: Tying, node: ir.Node) -> None:
    t.free_all(*node.inputs)


# -- quantised ---------------------------------------------------------------------------------------------------------


@rule("DequantizeLinear", "QuantizeLinear")
def _linear_quantised(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    axis, block = int_attribute(node, "axis", 1), int_attribute(node, "block_size", 0)
    rank = t.rank(source)
    t.rank(output)
    if axis is None or block is None:
        return
    parameters = _present(node, 1)
    ranks = [t.rank(value) for value in parameters]
    dequantises = node.op_type == "DequantizeLinear"
    if not t.permutes and not (dequantises and t.scales):
        return
    if all(r == 0 or t.size((v, 0)) == 1 for r, v in zip(ranks, parameters, strict=True)) and block == 0:
        if t.permutes:
            _same(t, source, output)
        return
    axis = axis % rank
    if block == 0:
        if t.permutes:
            _same(t, source, output)
        if all(r == 1 for r in ranks):
            t.tie((output, axis), (parameters[0], 0))
            for value in parameters[1:]:
                if t.permutes:
                    t.tie((output, axis), (value, 0))
        else:
            t.pin(t.called(), (output, axis))
        return
    if not t.permutes or any(r != rank for r in ranks):
        return
    _same(t, source, output)
    size, blocks = t.size((source, axis)), t.size((parameters[0], axis))
    for place in range(rank):
        if place != axis:
            for value in parameters:
                t.tie((output, place), (value, place))
    known = t.label((source, axis))
    if not isinstance(size, int) or not isinstance(blocks, int) or blocks * block != size or known is None:
        t.pin(f"blocks of {t.called()}", (output, axis), *((v, axis) for v in parameters))
        return
    outer = t.labels.fresh(blocks)
    t.tie_labels(known, t.labels.product([outer, t.labels.fresh(block)]))
    for value in parameters:
        label = t.label((value, axis))
        t.free((value, axis))
        if label is not None:
            t.tie_labels(outer, label)


# -- small questions ---------------------------------------------------------------------------------------------------


def _has_axes(node: ir.Node) -> bool:
    return "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)


def axes_of(node: ir.Node, index: int) -> list[int] | None:
    """The axes in a node's attribute, or in the constant at an input; None where there are none or they vary."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else [int(a) for a in attribute.as_ints()]
    array = graphs.constant_array(node.inputs[index], limit=_SMALL) if len(node.inputs) > index else None
    return None if array is None else [int(a) for a in array.reshape(-1)]
