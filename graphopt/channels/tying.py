"""What the rules of operators say of axes, and what becomes of it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import graphs
from graphopt.channels.labels import Label, Labels
from graphopt.shape_values import Element
from graphopt.sizes import Sizes


class Group(enum.StrEnum):
    """What an axis is relabelled by."""

    PERMUTATION = "permutation"
    SCALE = "scale"
    ORTHOGONAL = "orthogonal"
    LINEAR = "linear"


Axis = tuple[ir.Value, int]
"""An axis of a value, counted from the front."""


class RankUnknownError(Exception):
    """A rule asked for the axes of a value whose rank is not known."""


@dataclass(frozen=True)
class Absorbed:
    """A constant that takes up a relabelling of an axis that is not its own.

    Attributes:
        constant: The constant.
        axis: Its axis that is scaled; None where it holds indices into the axis.
        label: Of the axis whose relabelling it takes up.
    """

    constant: ir.Value
    axis: int | None
    label: Label


class Tying:
    """The labels of all axes of a graph, as the rules make them equal.

    A rule settles every axis of its node: it ties it, pins it or says that it is free. What a rule does not settle is
    pinned, so that a rule that forgets an axis loses a freedom and never invents one. An axis of one element or of a
    size that is not known has no label.
    """

    def __init__(self, graph: ir.Graph, group: Group, opset: int) -> None:
        self.group = group
        self.opset = opset
        self.graph = graph
        self.sizes = Sizes(opset)
        self._fitting: dict[Axis, int] = {}
        self.labels = Labels(signed=group in (Group.SCALE, Group.LINEAR))
        self.axes: dict[ir.Value, list[Label | None] | None] = {}
        self.absorbed: dict[tuple[ir.Value, int | None, bool], Absorbed] = {}
        self._products: list[tuple[Axis, Axis, Axis, str]] = []
        self._settled: set[Axis] = set()
        self._node: ir.Node | None = None

        for node in graph:
            if node.op_type == "MatMul" and node.domain == "":
                self._fit(node)

    def _fit(self, node: ir.Node) -> None:
        """What a product with a weight reads has as many elements as the weight has rows, or the model does not run."""
        source, weight = node.inputs
        tensor = graphs.constant_tensor(weight)
        rank = None if source is None else self.sizes.rank(source)
        if source is None or tensor is None or rank is None or rank == 0 or len(tensor.shape) == 0:
            return
        rows = tensor.shape.numpy()[max(len(tensor.shape) - 2, 0)]
        if not isinstance(self.sizes.size(source, rank - 1), int):
            self._fitting[source, rank - 1] = int(rows)

    @property
    def permutes(self) -> bool:
        """Whether axes are permuted: nearly every operator lets that pass."""
        return self.group is Group.PERMUTATION

    @property
    def scales(self) -> bool:
        """Whether axes are multiplied by positive numbers."""
        return self.group is Group.SCALE

    # -- one node --------------------------------------------------------------------------------------------------

    def begin(self, node: ir.Node) -> None:
        """What is said next is said of this node."""
        self._node = node
        self._settled.clear()

    def finish(self, reason: str = "") -> None:
        """Pin what the node's rule has not settled."""
        assert self._node is not None
        for value in (*self._node.inputs, *self._node.outputs):
            if value is not None:
                for axis, label in enumerate(self.of(value) or ()):
                    if label is not None and (value, axis) not in self._settled:
                        self.labels.pin(label, reason or self.called())

    def called(self) -> str:
        """The node, as a reason."""
        assert self._node is not None
        return f"{self._node.op_type} {self._node.name!r}"

    # -- what rules ask --------------------------------------------------------------------------------------------

    def of(self, value: ir.Value) -> list[Label | None] | None:
        """The labels of a value's axes; None where their number is not known."""
        if value not in self.axes:
            rank = self.sizes.rank(value)
            sizes = None if rank is None else [self.size((value, axis)) for axis in range(rank)]
            self.axes[value] = (
                None
                if sizes is None
                else [self.labels.fresh(size) if isinstance(size, int) and size > 1 else None for size in sizes]
            )
        return self.axes[value]

    def rank(self, value: ir.Value | None) -> int:
        """The number of axes of a value.

        Raises:
            RankUnknownError: It is not known.
        """
        labels = None if value is None else self.of(value)
        if labels is None:
            raise RankUnknownError(f"rank of {'nothing' if value is None else repr(value.name)} not known")
        return len(labels)

    def size(self, axis: Axis) -> Element:
        """The size of an axis: a number, or an expression that equals that of another axis if the sizes surely do."""
        return self._fitting.get(axis) or self.sizes.size(*axis)

    def label(self, axis: Axis) -> Label | None:
        """The label of an axis; None where it has one element or its size is not known."""
        labels = self.of(axis[0])
        return None if labels is None else labels[axis[1]]

    # -- what rules say --------------------------------------------------------------------------------------------

    def tie(self, one: Axis, other: Axis, *, inverse: bool = False) -> None:
        """Two axes are relabelled together; with ``inverse`` one by the inverse (transposed) of the other."""
        self.tie_products([one], [other], inverse=inverse)

    def contract(self, one: Axis, other: Axis) -> None:
        """Two axes are summed over together."""
        self.tie(one, other, inverse=True)

    def tie_products(self, ones: Sequence[Axis], others: Sequence[Axis], *, inverse: bool = False) -> None:
        """Axes merged into one, outermost first, are relabelled as other axes merged into one are."""
        self._settle(*ones, *others)
        left = [label for axis in ones if (label := self.label(axis)) is not None]
        right = [label for axis in others if (label := self.label(axis)) is not None]
        unknown = [axis for axis in (*ones, *others) if not isinstance(self.size(axis), int)]
        if unknown or not left or not right:
            self.pin(f"size not known at {self.called()}", *ones, *others)
            return
        other = self.labels.product(right)
        self.tie_labels(self.labels.product(left), self.labels.inverse(other) if inverse else other)

    def tie_labels(self, one: Label, other: Label) -> None:
        """Make two labels equal."""
        self.labels.tie(one, other, self.called())

    def pin(self, reason: str, *axes: Axis) -> None:
        """Axes are relabelled by nothing."""
        self._settle(*axes)
        for axis in axes:
            label = self.label(axis)
            if label is not None:
                self.labels.pin(label, reason)

    def pin_all(self, reason: str, *values: ir.Value | None) -> None:
        """No axis of these values is relabelled."""
        for value in values:
            if value is not None:
                self.pin(reason, *((value, n) for n in range(len(self.of(value) or ()))))

    def free(self, *axes: Axis) -> None:
        """The node asks nothing of these axes."""
        self._settle(*axes)

    def free_all(self, *values: ir.Value | None) -> None:
        """The node asks nothing of any axis of these values."""
        for value in values:
            if value is not None:
                self.free(*((value, n) for n in range(len(self.of(value) or ()))))

    def absorb(self, constant: ir.Value, axis: int | None, owner: Axis, *, inverse: bool) -> None:
        """A constant takes up what another axis is relabelled by (``can_absorb`` was asked)."""
        self._settle(owner)
        label = self.label(owner)
        if label is None:
            return
        known = self.absorbed.get((constant, axis, inverse))
        if known is None:
            if inverse:
                label = self.labels.inverse(label)
            self.absorbed[constant, axis, inverse] = Absorbed(constant, axis, label)
        else:
            self.tie_labels(known.label, self.labels.inverse(label) if inverse else label)

    def can_absorb(self, constant: ir.Value | None, index: int) -> bool:
        """Whether a constant may take up relabellings of axes that are not its own: all its uses do so alike."""
        assert self._node is not None
        return (
            constant is not None
            and graphs.is_constant(constant)
            and not constant.is_graph_output()
            and all(
                use.idx == index
                and use.node.graph is self.graph
                and (use.node.domain, use.node.op_type) == ("", self._node.op_type)
                for use in constant.uses()
            )
        )

    def multiply(self, product: Axis, one: Axis, other: Axis) -> None:
        """The scale of an axis is the product of the scales of two."""
        self._settle(product, one, other)
        self._products.append((product, one, other, self.called()))

    # -- at the end ------------------------------------------------------------------------------------------------

    def settle_products(self) -> None:
        """Decide which factor of each product is scaled: where none is pinned, the second is."""
        waiting = self._products
        while waiting:
            still = [entry for entry in waiting if not self._decide(*entry)]
            if len(still) == len(waiting):
                _, one, _, reason = still[0]
                label = self.label(one)
                assert label is not None
                self.labels.pin(label, f"the other factor of {reason} is scaled")
            waiting = still

    def _decide(self, product: Axis, one: Axis, other: Axis, reason: str) -> bool:
        labels = [self.label(axis) for axis in (product, one, other)]
        if any(label is None for label in labels):
            for label in labels:
                if label is not None:
                    self.labels.pin(label, f"size not known at {reason}")
            return True
        whole, left, right = (label for label in labels if label is not None)
        if self.labels.is_pinned(left):
            self.labels.tie(whole, right, reason)
        elif self.labels.is_pinned(right):
            self.labels.tie(whole, left, reason)
        elif self.labels.is_pinned(whole):
            self.labels.pin(left, reason)
            self.labels.pin(right, reason)
        else:
            return False
        return True

    def _settle(self, *axes: Axis) -> None:
        self._settled.update(axes)


def counted(value: ir.Value, axes: Iterable[int]) -> list[Axis]:
    """Axes of a value."""
    return [(value, axis) for axis in axes]
