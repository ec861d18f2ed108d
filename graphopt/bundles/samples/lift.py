"""What rules write the network for many samples with: new nodes, and values brought where an operator wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.bundles.rows import SAMPLES
from graphopt.bundles.samples.lifted import STACKED, Lifted, Sizes
from graphopt.bundles.samples.sizes import sizes_of
from graphopt.editing import fresh
from graphopt.errors import BadInput
from graphopt.shape_values import ShapeValues

_AXES_ARE_INPUTS = 13
SMALL = 1 << 10
"""Axes, sizes, pads, never data: constants up to this many elements are looked at."""
_HELPERS = frozenset({"numbers", "constant"})


@dataclass
class Scope:
    """A graph that is being written: its nodes, and a value in it that has as many samples as its rows are."""

    counted: Lifted
    nodes: list[ir.Node] = field(default_factory=list)
    count: ir.Value | None = None
    moved: dict[object, ir.Value] = field(default_factory=dict)


class Lift:
    """Writes a network for many samples, node by node of the one for one sample.

    Args:
        model: The network for one sample.
        initializers: Those of the network that is written.
        counted: An input of it that has samples.
        batch: What the axis of samples is called.
    """

    def __init__(self, model: ir.Model, initializers: dict[str, ir.Value], counted: Lifted, batch: str) -> None:
        self.batch = batch
        self.opset = graphs.opset(model)
        self.values = ShapeValues(self.opset)
        self.lifted: dict[ir.Value, Lifted] = {}
        self.names = graphs.value_names(model)
        self._initializers = initializers
        self._constants: dict[ir.TensorProtocol | tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._scopes = [Scope(counted)]
        self._node: ir.Node | None = None

    # -- the graph that is written ---------------------------------------------------------------------------------

    def open(self, counted: Lifted) -> None:
        """Begin a body, in which a value has as many samples as rows are there."""
        self._scopes.append(Scope(counted))

    def close(self) -> Scope:
        """End a body, or the network."""
        return self._scopes.pop()

    def reopen(self, scope: Scope) -> None:
        """Go on with a body."""
        self._scopes.append(scope)

    @property
    def latest(self) -> ir.Node:
        """The node written last."""
        return self._scopes[-1].nodes[-1]

    @property
    def counted(self) -> Lifted:
        """A value that has samples, where nodes are written now."""
        return self._scopes[-1].counted

    # -- the node that is lifted -----------------------------------------------------------------------------------

    def begin(self, node: ir.Node) -> None:
        """What is refused from now on is refused because of this node."""
        self._node = node

    def refuse(self, reason: str, hint: str | None = None) -> NoReturn:
        """Say that this network cannot be run on many samples, because of the node that is lifted.

        Raises:
            BadInput: Always.
        """
        node = self._node
        assert node is not None
        raise BadInput(
            f"cannot run on many samples: {reason}",
            where=f"{node.op_type} '{node.name or node.outputs[0].name}'",
            hint=hint or "optimize it without --per-sample",
        )

    def of(self, value: ir.Value | None) -> Lifted:
        """What a value of the network for one sample is in the one for many."""
        assert value is not None
        if value not in self.lifted:
            tensor = graphs.constant_tensor(value)
            assert tensor is not None, f"'{value.name}' is read before it is made"
            self.lifted[value] = self._of_constant(tensor, value.name or "constant")
        return self.lifted[value]

    def inputs(self, node: ir.Node) -> list[Lifted | None]:
        """What a node's inputs are in the network for many; None for those that are left out."""
        return [None if value is None else self.of(value) for value in node.inputs]

    def constant(self, value: ir.Value | None) -> np.ndarray[Any, Any] | None:
        """A value that is the same in every run, as far as shapes and small constants tell it."""
        array = graphs.constant_array(value, limit=SMALL)
        return self.values.constant(value) if array is None else array

    def result(self, node: ir.Node, made: ir.Value, place: int | None, index: int = 0) -> Lifted:
        """A new value in the place of a result of a node."""
        old = node.outputs[index]
        made.name, made.type = old.name, old.type
        return self.lift(made, place, sizes_of(old))

    def lift(self, value: ir.Value, place: int | None, sizes: Sizes | None) -> Lifted:
        """A value of the network for many, with its sizes written down."""
        if sizes is not None:
            many: list[int | str | None] = [*([self.batch] if place == STACKED else []), *sizes]
            if place is not None:
                many[0 if place == STACKED else place] = self.batch
            value.shape = ir.Shape(many)
        if place is not None:
            value.metadata_props[SAMPLES] = str(0 if place == STACKED else place)
        return Lifted(value, place, sizes)

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        name: str = "",
    ) -> list[ir.Value]:
        """A new node; its results."""
        made = ir.node(
            op_type,
            list(inputs),
            attributes or {},
            domain=domain,
            num_outputs=outputs,
            name=name or None,
        )
        base = f"{self._node.name or self._node.outputs[0].name}/{op_type}" if self._node else op_type
        for output in made.outputs:
            output.name = fresh(base, self.names)
        if not name:
            made.name = made.outputs[0].name
        self._scopes[-1].nodes.append(made)
        return list(made.outputs)

    def one(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """A new node of the standard domain with one result."""
        return self.write(op_type, inputs, attributes)[0]

    def again(self, node: ir.Node, inputs: Sequence[ir.Value | None], **changed: Any) -> list[ir.Value]:
        """A node as it was, on other inputs and with some attributes changed; the results of it."""
        attributes = {name: attribute for name, attribute in node.attributes.items() if name not in changed}
        return self.write(
            node.op_type,
            inputs,
            {**attributes, **changed},
            domain=node.domain,
            outputs=len(node.outputs),
            name=node.name or "",
        )

    def same_results(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], place: int | None, **changed: Any
    ) -> list[Lifted]:
        """A node on other inputs, all its results in one place."""
        made = self.again(node, inputs, **changed)
        return [self.result(node, value, place, index) for index, value in enumerate(made)]

    def numbers(self, values: Sequence[int]) -> ir.Value:
        """A vector of integers."""
        return self._constant(ir.tensor(np.array(values, np.int64).reshape(len(values))), "numbers")

    def of_array(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant."""
        return self._constant(ir.tensor(array), "constant")

    def as_int64(self, value: ir.Value | None) -> ir.Value | None:
        """Integers as those of `numbers` are."""
        if value is None or value.dtype in (None, ir.DataType.INT64):
            return value
        made = self.one("Cast", [value], to=ir.DataType.INT64)
        made.type = ir.TensorType(ir.DataType.INT64)
        return made

    def count(self) -> ir.Value:
        """How many rows there are, as a vector of one number."""
        scope = self._scopes[-1]
        if scope.count is None:
            sizes = self.one("Shape", [scope.counted.value])
            scope.count = self.one("Gather", [sizes, self.numbers([scope.counted.axis])], axis=0)
        return scope.count

    def unsqueeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """New axes of one element, at these places of the result."""
        return self._axes("Unsqueeze", value, axes)

    def squeeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Take axes of one element away."""
        return self._axes("Squeeze", value, axes)

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """Axes in another order."""
        return value if list(order) == sorted(order) else self.one("Transpose", [value], perm=list(order))

    # -- bringing values where an operator wants them ---------------------------------------------------------------

    def stacked(self, given: Lifted, rank: int | None = None) -> ir.Value:
        """With an axis of samples in front, and then its axes for one sample, of which there are ``rank``."""
        more = 0 if rank is None else rank - given.rank
        return self._moved(given, 0, ("stacked", more), lambda: self._stacked(given, more))

    def along(self, given: Lifted, axis: int) -> ir.Value:
        """With the samples along an axis, which has one element for one sample."""
        return self._moved(given, axis, "along", lambda: self._along(given, axis))

    def at(self, given: Lifted, place: int) -> ir.Value:
        """With the samples in a place."""
        return self.stacked(given) if place == STACKED else self.along(given, place)

    def _moved(self, given: Lifted, axis: int, how: object, move: Any) -> ir.Value:
        scope = self._scopes[-1]
        key = (given.value, given.place, axis, how)
        if key not in scope.moved:
            made: ir.Value = move()
            made.type = made.type or given.value.type
            made.metadata_props[SAMPLES] = str(axis)
            scope.moved[key] = made
        return scope.moved[key]

    def _stacked(self, given: Lifted, more: int) -> ir.Value:
        front = list(range(1, 1 + more))
        if given.place is None:
            return self._spread(given, [*[1] * (given.rank + more)], 0, stacked=True)
        if given.place == STACKED:
            return self.unsqueeze(given.value, front) if front else given.value
        axis = given.place
        first = self.transpose(given.value, [axis, *(n for n in range(given.rank) if n != axis)])
        return self.unsqueeze(first, [*front, 1 + more + axis])

    def _along(self, given: Lifted, axis: int) -> ir.Value:
        if given.place == axis:
            return given.value
        if not given.is_one(axis):
            self.refuse(f"'{given.value.name}' has more than its batch along axis {axis}")
        if given.place is None:
            return self._spread(given, [1] * given.rank, axis, stacked=False)
        if given.place == STACKED:
            first = self.squeeze(given.value, [1 + axis])
            return self.transpose(first, [*range(1, 1 + axis), 0, *range(1 + axis, given.rank)])
        order = list(range(given.rank))
        order[axis], order[given.place] = given.place, axis
        return self.transpose(given.value, order)

    def _spread(self, given: Lifted, ones: list[int], axis: int, *, stacked: bool) -> ir.Value:
        """What is the same for all samples, once for each."""
        before, after = ones[:axis], ones[axis if stacked else axis + 1 :]
        parts = [*([self.numbers(before)] if before else []), self.count(), *([self.numbers(after)] if after else [])]
        target = parts[0] if len(parts) == 1 else self.one("Concat", parts, axis=0)
        return self.one("Expand", [given.value, target])

    def _axes(self, op_type: str, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        if self.opset < _AXES_ARE_INPUTS:
            made = self.one(op_type, [value], axes=list(axes))
        else:
            made = self.one(op_type, [value, self.numbers(axes)])
        made.type = value.type
        return made

    def _of_constant(self, tensor: ir.TensorProtocol, name: str) -> Lifted:
        return Lifted(self._constant(tensor, name), None, tuple(tensor.shape.numpy()))

    def _constant(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        key: Any = tensor
        if tensor.dtype == ir.DataType.INT64 and tensor.size <= SMALL:
            key = (str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
        if key not in self._constants:
            made = ir.Value(
                name=fresh(name, self.names) if name in _HELPERS else name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            self._initializers[made.name or ""] = made
            self._constants[key] = made
        return self._constants[key]
