"""Matrix products and convolutions, quantised weights among them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.channels.rules.shared import present, same, tie_all
from graphopt.channels.rules.table import rule
from graphopt.channels.tying import Axis, Tying
from graphopt.matching import int_attribute


@rule("MatMul")
def _matmul(t: Tying, node: ir.Node) -> None:
    left, right = present(node)
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
        tie_all(t, axis, running)
    elif t.scales:
        t.multiply(axis, *running)
    else:
        t.pin(t.called(), axis, *running)


@rule("Gemm")
def _gemm(t: Tying, node: ir.Node) -> None:
    left, right = present(node, 0, 2)
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
    for letters, value in zip(sources.split(","), present(node), strict=True):
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
    source, weight = present(node, 0, 2)
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


@rule("DequantizeLinear", "QuantizeLinear")
def _linear_quantised(t: Tying, node: ir.Node) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    axis, block = int_attribute(node, "axis", 1), int_attribute(node, "block_size", 0)
    rank = t.rank(source)
    t.rank(output)
    if axis is None or block is None:
        return
    parameters = present(node, 1)
    ranks = [t.rank(value) for value in parameters]
    dequantises = node.op_type == "DequantizeLinear"
    if not t.permutes and not (dequantises and t.scales):
        return
    if all(r == 0 or t.size((v, 0)) == 1 for r, v in zip(ranks, parameters, strict=True)) and block == 0:
        if t.permutes:
            same(t, source, output)
        return
    axis = axis % rank
    if block == 0:
        if t.permutes:
            same(t, source, output)
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
    same(t, source, output)
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
