"""PivotLinear recognised in a graph of standard operators, as ``nodes`` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import graphs
from graphopt.matching import float_attribute, int_attribute, made_by, rank_of
from graphopt.plugins.pivot_linear.function import (
    Form,
)
from graphopt.shapes import trusted_shape
from graphopt.sites import Linear, Spelling, Weight, is_channel_vector, linear_at, weight_of

Array = npt.NDArray[Any]

_MOST_INDICES = 1 << 22
_MOST_BEHIND = 3
"""How many nodes behind the form may add a bias or bring its result into order."""


@dataclass(frozen=True)
class PivotSite:
    """A pivot form in standard operators.

    Attributes:
        form: "row" or "column".
        nodes: All of it, in the order of the data; what makes its constants is not in it.
        x: What is multiplied; for a table the indices.
        y: The result, bias added and in order.
        first: The product that reads x.
        second: The product behind it.
        axis: Of the channels: -1, -2, or 1 of a convolution.
        rank: r.
        order: Row form: by what its result is gathered; column form: by what x is; None: neither.
        added: Constants that are added behind, each with whether that is before the result is gathered.
    """

    form: Form
    nodes: tuple[ir.Node, ...]
    x: ir.Value
    y: ir.Value
    first: Linear
    second: Linear
    axis: int
    rank: int
    order: Array | None
    added: tuple[tuple[Weight, bool], ...]

    @property
    def kept(self) -> Linear:
        """The product by the pivots."""
        return self.first if self.form == "row" else self.second

    @property
    def coefficients(self) -> Linear:
        """The product by what makes the others of the pivots."""
        return self.second if self.form == "row" else self.first

    @property
    def inputs(self) -> int:
        """Channels of x."""
        return self.first.inputs + (self.rank if self.form == "column" else 0)

    @property
    def outputs(self) -> int:
        """Channels of y."""
        return self.second.outputs + (self.rank if self.form == "row" else 0)

    @property
    def biased(self) -> bool:
        """Whether anything is added."""
        return bool(self.added) or self.first.bias is not None or self.second.bias is not None

    def bias(self, opset: int) -> Array | None:
        """What is added in all, in the order of y: float64 (outputs,); None where nothing is.

        Args:
            opset: Of the model.
        """
        if not self.biased:
            return None
        total = np.zeros(self.outputs)
        first, second = (_vector(product, opset) for product in (self.first, self.second))
        if self.form == "column":
            total += second
        else:
            coefficients = self.second.matrix(opset).astype(np.float64).reshape(self.second.outputs, self.rank)
            total[: self.rank] += first
            total[self.rank :] += coefficients @ first + second
        gathered = [weight.read(opset).reshape(-1).astype(np.float64) for weight, before in self.added if not before]
        for weight, before in self.added:
            if before:
                total += weight.read(opset).reshape(-1).astype(np.float64)
        if self.form == "row" and self.order is not None:
            total = total[self.order]
        return sum(gathered, total)


def pivot_at(node: ir.Node) -> PivotSite | str:
    """The pivot form whose last node this is, or why it is none ("" where it does not look like one).

    Recognised is what ``row_nodes`` and ``column_nodes`` write, with a Gather behind or before it, also where Gemm adds
    what was added by a node of its own. It need not be the largest form: what adds a bias to it may follow.
    """
    if node.domain != "" or not node.outputs:
        return ""
    behind: list[ir.Node] = []
    core = node
    while core.op_type in ("Add", "Gather") and len(behind) <= _MOST_BEHIND:
        inner = _before(core)
        if inner is None:
            break
        behind.append(core)
        core = inner
    found: PivotSite | str = _row(core) if core.op_type == "Concat" else _column(core)
    return found if isinstance(found, str) else _with(found, behind[::-1])


def _before(node: ir.Node) -> ir.Node | None:
    """The node whose result one adds a constant to, or gathers."""
    if node.op_type == "Gather":
        return None if node.inputs[0] is None else node.inputs[0].producer()
    for value, other in (node.inputs, node.inputs[::-1]):
        if weight_of(other) is not None and value is not None:
            return value.producer()
    return None


def _with(site: PivotSite, behind: Sequence[ir.Node]) -> PivotSite | str:
    """A form and the nodes behind it that add its bias and bring it into order."""
    added: list[tuple[Weight, bool]] = []
    order, y, nodes = site.order, site.y, list(site.nodes)
    rank = rank_of(y)
    # Of a convolution the number of axes is known.
    far = site.axis if site.axis < 0 else -len(site.first.kernel) - 1
    for node in behind:
        if not _alone(y, node):
            return "the result is read before its bias is added, or before it is in order"
        if node.op_type == "Gather":
            if site.form == "column" or order is not None:
                return "a Gather of the result of the column form, or a second one"
            if not _same_axis(int_attribute(node, "axis", 0), site.axis, rank):
                return "the Gather is along another axis"
            order = _permutation(node.inputs[1], site.outputs)
            if order is None:
                return "the Gather takes no permutation of the channels"
        else:
            other = node.inputs[1] if node.inputs[0] is y else node.inputs[0]
            weight = weight_of(other)
            assert weight is not None  # _before
            if not is_channel_vector(other, site.outputs, far):
                return "what is added is no number for each channel"
            if len(weight.shape) > max(-far, rank or 0):
                return "what is added may have more axes than the result"
            added.append((weight, order is None))
        y = node.outputs[0]
        nodes.append(node)
    return PivotSite(
        site.form, tuple(nodes), site.x, y, site.first, site.second, site.axis, site.rank, order, tuple(added)
    )


def _row(node: ir.Node) -> PivotSite | str:
    """Concat of t and a product of t."""
    pivots, others = node.inputs if len(node.inputs) == 2 else (None, None)
    if pivots is None or others is None:
        return ""
    second = _product(others)
    if second is None:
        return ""
    if second.x is not pivots:
        return "Concat has something else before the product than what that multiplies"
    first = _product(pivots)
    if first is None:
        return "what Concat has first is no product"
    if not second.pointwise:
        return "the second convolution looks beside a position"
    if first.outputs != second.inputs or not _follow(first, second) or not _along(node, second):
        return "the products and Concat are taken along different axes"
    if not _alone(pivots, node, second.node) or not _alone(others, node):
        return "a value within is read elsewhere"
    if reason := _unlike(first, second, node):
        return reason
    nodes = (first.node, second.node, node)
    return PivotSite("row", nodes, first.x, node.outputs[0], first, second, second.y_axis, first.outputs, None, ())


def _column(node: ir.Node) -> PivotSite | str:
    """A product of x_p + C x_np, the two taken from one Split."""
    second = linear_at(node)
    if isinstance(second, str) or second.spelling is Spelling.GATHER:
        return ""
    found = _brought(second.x)
    if isinstance(found, str):
        return found
    between, pivots, first = found
    split = pivots.producer()
    if split is None or split.op_type != "Split" or split.domain != "" or first.x.producer() is not split:
        return ""
    if len(split.outputs) != 2 or pivots is not split.outputs[0] or first.x is not split.outputs[1]:
        return "the pivots are not the first of two parts"
    rank = second.inputs
    if first.outputs != rank or not _follow(first, second) or not _splits(split, first, rank):
        return "the parts have other sizes than the pivots and the others, or are taken along another axis"
    if first.bias is not None:
        return "the product of the others adds a bias"
    if not first.pointwise:
        return "the first convolution looks beside a position"
    inside = {split, between, first.node, node}
    values = [*split.outputs, first.y, second.x]
    if any(v.is_graph_output() or any(use.node not in inside for use in v.uses()) for v in values):
        return "a value within is read elsewhere"
    if reason := _unlike(first, second, split, between):
        return reason
    x = split.inputs[0]
    assert x is not None
    nodes = list(dict.fromkeys([split, first.node, between, node]))
    gather = made_by(x, "Gather")
    order = None
    if gather is not None and gather.graph is node.graph and gather.inputs[0] is not None and _alone(x, split):
        same = _same_axis(int_attribute(gather, "axis", 0), second.x_axis, rank_of(x))
        order = _permutation(gather.inputs[1], first.inputs + rank) if same else None
        if order is not None:
            x = gather.inputs[0]
            nodes.insert(0, gather)
    return PivotSite("column", tuple(nodes), x, node.outputs[0], first, second, second.y_axis, rank, order, ())


def _brought(value: ir.Value) -> tuple[ir.Node, ir.Value, Linear] | str:
    """x_p + C x_np: the node that adds, x_p, and the product."""
    node = made_by(value, "Add", "Gemm")
    if node is None:
        return ""
    if node.op_type == "Gemm":
        pivots = node.inputs[2] if len(node.inputs) > 2 else None
        product = _gemm(node)
        return "" if pivots is None or product is None else (node, pivots, product)
    for pivots, other in (node.inputs, node.inputs[::-1]):
        product = _product(other)
        maker = None if pivots is None else pivots.producer()
        if pivots is not None and product is not None and maker is not None and maker.op_type == "Split":
            return node, pivots, product
    return ""


def _gemm(node: ir.Node) -> Linear | None:
    """The product in a Gemm that adds an activation."""
    x, weight = node.inputs[0], weight_of(node.inputs[1])
    flips = int_attribute(node, "transA", 0), int_attribute(node, "transB", 0)
    if x is None or weight is None or len(weight.shape) != 2 or flips[0] != 0 or flips[1] is None:
        return None
    if float_attribute(node, "alpha", 1.0) != 1.0 or float_attribute(node, "beta", 1.0) != 1.0:
        return None
    outputs, inputs = weight.shape if flips[1] else weight.shape[::-1]
    return Linear(node, Spelling.GEMM, x, node.outputs[0], weight, inputs, outputs)


def _product(value: ir.Value | None) -> Linear | None:
    node = None if value is None else value.producer()
    if node is None or node.outputs[0] is not value:
        return None
    found = linear_at(node)
    return None if isinstance(found, str) else found


def _follow(first: Linear, second: Linear) -> bool:
    """Whether two products are along one axis of x and of y."""
    axes = {second.x_axis, second.y_axis, first.y_axis}
    if first.spelling is not Spelling.GATHER:
        axes.add(first.x_axis)
    convolutions = {first.spelling is Spelling.CONV, second.spelling is Spelling.CONV}
    return len(axes) == 1 and len(convolutions) == 1


def _along(node: ir.Node, product: Linear) -> bool:
    """Whether Concat or Split is along the channel axis of a product."""
    value = node.outputs[0] if node.op_type == "Concat" else node.inputs[0]
    return _same_axis(int_attribute(node, "axis", 0), product.y_axis, rank_of(value))


def _same_axis(one: int | None, other: int, rank: int | None) -> bool:
    return one == other or (one is not None and rank is not None and (one - other) % rank == 0)


def _splits(split: ir.Node, first: Linear, rank: int) -> bool:
    """Whether a Split takes the first ``rank`` channels of those that follow."""
    if not _along(split, first):
        return False
    attribute = split.attributes.get("split")
    sizes: list[Any] | None = None
    if attribute is not None:
        sizes = None if attribute.is_ref() else list(attribute.as_ints())
    elif len(split.inputs) > 1 and split.inputs[1] is not None:
        array = graphs.constant_array(split.inputs[1], limit=2)
        sizes = None if array is None else array.reshape(-1).tolist()
    if sizes is None:
        shapes = [trusted_shape(value) for value in split.outputs]
        sizes = [None if shape is None else shape[first.x_axis] for shape in shapes]
    return sizes == [rank, first.inputs]


def _unlike(first: Linear, second: Linear, *others: ir.Node) -> str:
    """Why products are not of one form; "" where nothing speaks against it."""
    if any(node.graph is not second.node.graph for node in (first.node, *others)):
        return "a part is computed outside the body"
    if first.weight.dtype != second.weight.dtype:
        return f"the weights are {first.weight.dtype.name} and {second.weight.dtype.name}"
    return ""


def _alone(value: ir.Value, *readers: ir.Node) -> bool:
    """Whether nothing but some nodes read a value."""
    return not value.is_graph_output() and all(use.node in readers for use in value.uses())


def _permutation(value: ir.Value | None, size: int) -> Array | None:
    """The indices of a Gather that name each place of an axis once."""
    array = graphs.constant_array(value, limit=_MOST_INDICES)
    if array is None or array.ndim != 1 or len(array) != size or array.dtype.kind not in "iu":
        return None
    order = np.where(array < 0, array + size, array).astype(np.int64)
    return order if np.array_equal(np.sort(order), np.arange(size)) else None


def _vector(product: Linear, opset: int) -> Array:
    weight = weight_of(product.bias)
    found = np.zeros(1) if weight is None else weight.read(opset).reshape(-1).astype(np.float64)
    return np.broadcast_to(found, (product.outputs,))
