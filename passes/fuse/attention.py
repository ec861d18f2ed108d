"""Scaled dot-product attention over several heads, written out by exporters, as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import (
    import_domain,
    int_attribute,
    made_by,
    permutation,
    scalar_beside,
    split_scalar,
)
from graphopt.rewrite import Context, Explanation, Kind, RulePass, Stage
from graphopt.shape_values import Element
from graphopt.sizes import Sizes, reshape_of

_BIAS = 1 << 20


class _No(Exception):
    """The pattern is not there. The text says what is missing, where it is nearly there; else it is empty."""


@dataclass(frozen=True)
class _Scores:
    """softmax(scale q k^T + mask).

    Attributes:
        queries: [batch, heads, queries, size].
        keys: [batch, heads, keys, size], or [batch, heads, size, keys] where ``keys_transposed``.
        mask: Added to the scores, or None.
    """

    queries: ir.Value
    keys: ir.Value
    keys_transposed: bool
    scale: float
    mask: ir.Value | None


@dataclass(frozen=True)
class _Heads:
    """[batch, length, heads * size] split into heads: ``source`` before, the number and size of heads after."""

    source: ir.Value
    batch: Element
    length: Element
    heads: int
    size: int


class FuseAttention(RulePass):
    """Turns softmax(q k^T scale + mask) v over heads into MultiHeadAttention of com.microsoft."""

    name = "fuse-attention"
    kind = Kind.ROUNDING
    stage = Stage.FUSE
    explanation = Explanation(
        matches="q, k and v split into heads by Reshape and Transpose, the product of q and k scaled before or after,"
        " an added mask or none, Softmax over the keys (with PyTorch's guard against rows of NaN or without),"
        " the product with v, and the heads merged by Transpose and Reshape; constant biases of q, k and v go"
        " along",
        refuses="heads that are not provably split and merged the same way; a mask that broadcasts in other ways than"
        " over batch, heads and queries; dtypes other than float32; a target without com.microsoft's "
        "MultiHeadAttention; probabilities that are an output",
        costs="linear in the nodes; saves the transposes, the scaling and the guard of each layer",
        source="Vaswani et al., Attention Is All You Need, arXiv 1706.03762; com.microsoft MultiHeadAttention",
    )
    roots = ("Softmax",)

    def apply(self, ctx: Context) -> None:
        self._sizes = Sizes(ctx.opset)
        super().apply(ctx)

    def rewrite(self, node: ir.Node, ctx: Context) -> bool:
        try:
            return self._rewrite(node, ctx)
        except _No as reason:
            if str(reason):
                ctx.refuse(node, str(reason))
            return False

    def _rewrite(self, node: ir.Node, ctx: Context) -> bool:
        sizes = self._sizes
        product, values, guarded = _weighted(node, sizes)
        scores = _scores(node, sizes)
        merged, together = _merged(product, sizes)
        if merged.dtype is not ir.DataType.FLOAT:
            raise _No("attention in another dtype than float32")
        q = _heads(scores.queries, False, sizes)
        k = _heads(scores.keys, scores.keys_transposed, sizes)
        v = _heads(values, False, sizes)
        if not q.heads == k.heads == v.heads or not q.batch == k.batch == v.batch:
            raise _No("q, k and v do not have the same batch and heads")
        if k.length != v.length or q.size != k.size:
            raise _No("k and v are not of one length, or q and k not of one size")
        if together != (q.batch, q.length, q.heads * v.size):
            raise _No("the heads are not provably merged into [batch, queries, heads * size]")
        if scores.scale == 0 or not np.isfinite(scores.scale):
            raise _No(f"a scale of {scores.scale}")
        nodes: list[ir.Node] = []
        mask = None
        guarded = guarded and scores.mask is not None
        if scores.mask is not None:
            guarded = guarded and not _finite(scores.mask)
            mask = _mask(scores.mask, q, k, nodes, sizes, ctx)
        sources, bias = _biases((q, k, v), sizes, ctx)
        attention = ctx.node(
            "MultiHeadAttention",
            [*sources, bias, None, mask] if mask is not None else [*sources, bias] if bias is not None else sources,
            {"num_heads": q.heads, "scale": scores.scale},
            like=merged,
            domain="com.microsoft",
        )
        nodes.append(attention)
        if guarded:
            # A row of the mask that is infinite all through makes a row of NaN, here as before.
            nan = ctx.node("IsNaN", [attention.outputs[0]])
            zero = ctx.constant(np.zeros((), np.float32), "zero")
            nodes += (nan, ctx.node("Where", [nan.outputs[0], zero, attention.outputs[0]], like=merged))
        owner = node.graph
        if not ctx.replace({merged: nodes[-1].outputs[0]}, nodes, rule="multi-head-attention"):
            return False
        import_domain(ctx.model, owner, "com.microsoft")
        return True


def _sole(value: ir.Value, op_type: str) -> ir.Node:
    """The one node that reads a value, besides those that ask for its shape.

    If those outlive the pattern, the old nodes stay and the cost check refuses.
    """
    readers = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    if len(readers) != 1 or value.is_graph_output() or readers[0].domain != "" or readers[0].op_type != op_type:
        raise _No
    return readers[0]


def _weighted(softmax: ir.Node, sizes: Sizes) -> tuple[ir.Value, ir.Value, bool]:
    """What the probabilities are multiplied with: the product, the values, and whether NaN is replaced by 0 before."""
    known = sizes.rank(softmax.outputs[0])
    # Before opset 13 Softmax flattened all axes from the given one on; with the last axis both mean the same.
    axis = int_attribute(softmax, "axis", -1)
    if known not in (None, 4) or axis is None or (axis != -1 and (known is None or axis != known - 1)):
        raise _No
    probabilities = softmax.outputs[0]
    if probabilities.is_graph_output():
        raise _No("the probabilities are an output")
    guarded = False
    readers = [use.node for use in probabilities.uses()]
    if len(readers) == 2:
        where = next((r for r in readers if r.op_type == "Where" and r.domain == ""), None)
        nan = made_by(where.inputs[0], "IsNaN") if where is not None else None
        if where is None or nan is None or nan.inputs[0] is not probabilities or nan not in readers:
            raise _No
        if where.inputs[2] is not probabilities or scalar_beside(where.inputs[1], probabilities) != 0:
            raise _No
        probabilities, guarded = where.outputs[0], True
    product = _sole(probabilities, "MatMul")
    values = product.inputs[1]
    if product.inputs[0] is not probabilities or values is None or product.graph is not softmax.graph:
        raise _No
    return product.outputs[0], values, guarded


def _scores(softmax: ir.Node, sizes: Sizes) -> _Scores:
    current = softmax.inputs[0]
    mask = None
    added = made_by(current, "Add")
    if added is not None:
        choices = [(a, b) for a, b in (added.inputs, added.inputs[::-1]) if _is_product(a)]
        if len(choices) != 1:
            raise _No
        current, mask = choices[0]
    current, scale = _unscaled(current)
    product = made_by(current, "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        raise _No
    queries, by_queries = _unscaled(product.inputs[0])
    keys, by_keys = _unscaled(product.inputs[1])
    scale *= by_queries * by_keys
    assert queries is not None and keys is not None
    swapped = _swapped(keys, sizes)
    if swapped is not None:
        keys, again = _unscaled(swapped)
        assert keys is not None
        return _Scores(queries, keys, False, scale * again, mask)
    return _Scores(queries, keys, True, scale, mask)


def _is_product(value: ir.Value | None) -> bool:
    source, _ = _unscaled(value)
    return made_by(source, "MatMul") is not None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value without the number that it is multiplied with or divided by."""
    node = made_by(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    split = split_scalar(node)
    if split is None:
        return value, 1.0
    if node.op_type == "Mul":
        return split
    if split[0] is not node.inputs[0] or split[1] == 0:
        return value, 1.0
    return split[0], 1.0 / split[1]


def _swapped(value: ir.Value, sizes: Sizes) -> ir.Value | None:
    """The value whose last two axes are swapped here, by one Transpose or by way of three axes; None: neither."""
    swap = made_by(value, "Transpose")
    if swap is not None:
        return swap.inputs[0] if permutation(swap) == (0, 1, 3, 2) else None
    outer = reshape_of(sizes, value)
    swap = made_by(outer[0], "Transpose") if outer is not None else None
    if outer is None or swap is None or permutation(swap) != (0, 2, 1):
        return None
    inner = reshape_of(sizes, swap.inputs[0])
    source = inner[0] if inner is not None else None
    axes = sizes.all(source)
    if inner is None or axes is None or len(axes) != 4:
        return None
    # [a, b, c, d] -> [a b, c, d] -> [a b, d, c] -> [a, b, d, c]
    return source if len(inner[1]) == 3 and inner[1][1:] == axes[2:] and outer[1] == _last_swapped(axes) else None


def _last_swapped(axes: tuple[Element, ...]) -> tuple[Element, ...]:
    return (*axes[:-2], axes[-1], axes[-2])


def _past_idle_reshape(value: ir.Value, sizes: Sizes) -> ir.Value:
    """The value after a Reshape to the shape that the value has already, where that reads it; else the value."""
    readers = [use.node for use in value.uses() if use.node.op_type == "Reshape" and use.idx == 0]
    if len(readers) != 1:
        return value
    reshape = _sole(value, "Reshape")
    result = sizes.reshaped(reshape)
    return reshape.outputs[0] if result is not None and result == sizes.all(value) else value


def _merged(product: ir.Value, sizes: Sizes) -> tuple[ir.Value, tuple[Element, ...]]:
    """The value in which the heads stand side by side again, and its sizes."""
    product = _past_idle_reshape(product, sizes)
    transpose = _sole(product, "Transpose")
    if permutation(transpose) != (0, 2, 1, 3):
        raise _No
    reshape = _sole(transpose.outputs[0], "Reshape")
    if reshape.inputs[0] is not transpose.outputs[0] or reshape.graph is not product.graph:
        raise _No
    found = reshape_of(sizes, reshape.outputs[0])
    if found is None:
        raise _No("the heads are merged into a shape that is not known")
    return reshape.outputs[0], found[1]


def _heads(value: ir.Value, transposed: bool, sizes: Sizes) -> _Heads:
    transpose = made_by(value, "Transpose")
    if transpose is None or permutation(transpose) != ((0, 2, 3, 1) if transposed else (0, 2, 1, 3)):
        raise _No
    found = reshape_of(sizes, transpose.inputs[0])
    if found is None:
        raise _No("the heads are split into a shape that is not known")
    source, split = found
    before = sizes.all(source)
    if before is None or len(before) != 3 or len(split) != 4:
        raise _No("the heads are not split from [batch, length, heads * size]")
    heads, size = split[2], split[3]
    if not isinstance(heads, int) or not isinstance(size, int) or heads * size == 0 or before[2] != heads * size:
        raise _No("the number and size of heads do not provably make the width")
    # With the width accounted for, one equal axis makes the other equal too.
    if split[0] != before[0] and split[1] != before[1]:
        raise _No("batch and length are not provably left as they are")
    return _Heads(source, split[0], split[1], heads, size)


def _finite(mask: ir.Value) -> bool:
    """Whether a mask chooses between finite numbers."""
    node = made_by(mask, "Where")
    while node is None:
        view = made_by(mask, "Expand", "Unsqueeze", "Cast")
        if view is None or view.inputs[0] is None:
            return False
        mask = view.inputs[0]
        node = made_by(mask, "Where")
    numbers = [graphs.scalar_of(value) for value in node.inputs[1:]]
    return all(number is not None and np.isfinite(number) for number in numbers)


def _mask(mask: ir.Value, q: _Heads, k: _Heads, nodes: list[ir.Node], sizes: Sizes, ctx: Context) -> ir.Value:
    """The mask with four axes, and with one row for each query, as the operator wants it."""
    axes = sizes.all(mask)
    if mask.dtype is not ir.DataType.FLOAT or axes is None or not 2 <= len(axes) <= 4:
        raise _No("a mask whose type or rank is not known")
    missing = 4 - len(axes)
    axes = (1,) * missing + axes
    if axes[0] not in (1, q.batch) or axes[1] not in (1, q.heads) or axes[3] != k.length:
        raise _No("the mask is not provably one number for each query and key")
    if axes[2] not in (1, q.length):
        raise _No("the mask does not provably have one row for each query, or one for all")
    if missing:
        if ctx.opset < 13:
            raise _No("a mask of fewer than four axes before opset 13")
        places = ctx.constant(np.arange(missing, dtype=np.int64), "axes")
        nodes.append(ctx.node("Unsqueeze", [mask, places]))
        mask = nodes[-1].outputs[0]
        mask.type = ir.TensorType(ir.DataType.FLOAT)
    if axes[2] == 1 and q.length != 1:
        shape = ctx.node("Shape", [q.source])
        length = ctx.node("Gather", [shape.outputs[0], ctx.constant(np.array([1], np.int64), "queries_axis")])
        one = ctx.constant(np.array([1], np.int64), "one")
        wanted = ctx.node("Concat", [one, one, length.outputs[0], one], {"axis": 0})
        rows = ctx.node("Expand", [mask, wanted.outputs[0]])
        rows.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes.extend((shape, length, wanted, rows))
        mask = rows.outputs[0]
    return mask


def _biases(parts: tuple[_Heads, _Heads, _Heads], sizes: Sizes, ctx: Context) -> tuple[list[ir.Value], ir.Value | None]:
    """q, k and v without the constant biases that are added to them, and those biases one after the other."""
    sources: list[ir.Value] = []
    biases: list[np.ndarray] = []
    for part in parts:
        width = part.heads * part.size
        source, bias = part.source, np.zeros(width, np.float32)
        node = made_by(source, "Add")
        for value, constant in (node.inputs, node.inputs[::-1]) if node is not None else ():
            array = graphs.constant_array(constant, limit=_BIAS)
            if value is not None and array is not None and array.shape == (width,) and sizes.rank(value) == 3:
                source, bias = value, array
                break
        sources.append(source)
        biases.append(bias)
    if all(source is part.source for source, part in zip(sources, parts, strict=True)):
        return sources, None
    return sources, ctx.constant(np.concatenate(biases), "attention_bias")
