"""What PivotLinear means, in standard operators: one function body for each signature.

``graphopt::PivotLinear(X, kept, coefficients, bias?, order?) -> Y`` is y = W x + b with a matrix W of rank r, of which
only r rows (or columns) are stored, and what makes the others of them.

Inputs, all of one of the types float, float16, bfloat16, double (order: int64):
    X: The channels are along ``axis``.
    kept: Row form (r, inputs[, *kernel]), the pivot rows of W. Column form (outputs, r[, *kernel]), its pivot columns.
    coefficients: Row form (outputs - r, r[, 1, ...]), column form (r, inputs - r[, 1, ...]); as many axes as kept.
    bias: (outputs,), in the order of Y.
    order: A permutation of the pivoted channels. Row form, (outputs,): Y is Gather of [kept; coefficients kept] x by
        it. Column form, (inputs,): Gather of X by it has the pivots first. Without it the channels are in that order.

Attributes:
    form: "row": y = [kept; coefficients kept] x. "column": y = kept (x_p + coefficients x_np).
    axis: Of the channels, in X and Y: -1 or -2 for matrices; 1 for convolutions, whose weights have more than two axes.
    auto_pad, dilations, pads, strides: Of the convolution by kept, as Conv has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt import graphs
from graphopt.errors import BadInput

OP, DOMAIN, VERSION = "PivotLinear", "graphopt", 1
CONVOLUTION = ("auto_pad", "dilations", "pads", "strides")
OLDEST_OPSET = 13
OVERLOADS_SINCE = 10
"""The first IR version whose functions have overloads."""

Form = Literal["row", "column"]


@dataclass(frozen=True)
class Signature:
    """What a body depends on.

    Attributes:
        opset: Of the standard operators in it.
        form: "row" or "column".
        axis: -1, -2 or 1.
        spatial: Axes of a convolution's kernel; 0 for matrices.
        bias: Whether there is one.
        order: Whether there is one.
        convolution: Attributes of the convolution by ``kept``, name and value, sorted.
    """

    opset: int
    form: Form
    axis: int
    spatial: int = 0
    bias: bool = False
    order: bool = False
    convolution: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if self.opset < OLDEST_OPSET:
            raise BadInput(f"{OP} needs opset {OLDEST_OPSET}, not {self.opset}")
        if self.form not in ("row", "column"):
            raise BadInput(f"{OP} has no form {self.form!r}", hint="row or column")
        if self.axis not in ((1,) if self.spatial else (-1, -2)):
            raise BadInput(f"{OP} has no channel axis {self.axis} with {self.spatial} spatial axes")
        if self.convolution and not self.spatial:
            raise BadInput(f"{OP}: {self.convolution[0][0]} is for convolutions")

    @classmethod
    def of(cls, node: ir.Node, opset: int) -> Signature:
        """The signature of a PivotLinear node.

        Raises:
            BadInput: It has none: the number of axes of its weights is not known, an attribute is missing or wrong.
        """
        if len(node.inputs) < 3 or any(value is None for value in node.inputs[:3]):
            raise BadInput(f"{OP} reads X, kept and coefficients", where=node.name)
        kept = node.inputs[1]
        assert kept is not None
        if kept.shape is None or len(kept.shape) < 2:
            raise BadInput(f"the number of axes of what {OP} keeps is not known", where=node.name)
        form, axis = node.attributes.get("form"), node.attributes.get("axis")
        if form is None or axis is None or form.is_ref() or axis.is_ref():
            raise BadInput(f"{OP} has a form and an axis", where=node.name)
        present = [len(node.inputs) > place and node.inputs[place] is not None for place in (3, 4)]
        return cls(
            opset,
            form.as_string(),  # type: ignore[arg-type]
            axis.as_int(),
            len(kept.shape) - 2,
            present[0],
            present[1],
            convolution_of(node.attributes),
        )

    @property
    def overload(self) -> str:
        """The name of the body among those of the operator."""
        told = [self.form, f"axis{self.axis}", f"opset{self.opset}"]
        told += [f"spatial{self.spatial}"] if self.spatial else []
        told += [name for name in ("bias", "order") if getattr(self, name)]
        for name, value in self.convolution:
            told.append(name + (str(value) if isinstance(value, str) else "x".join(map(str, value))))  # type: ignore[call-overload]
        return "_".join(told).replace("-", "m")

    @property
    def attributes(self) -> dict[str, object]:
        """As a node has them."""
        return {
            "form": self.form,
            "axis": self.axis,
            **{name: value if isinstance(value, str) else list(value) for name, value in self.convolution},  # type: ignore[call-overload]
        }


def convolution_of(attributes: Mapping[str, ir.Attr]) -> tuple[tuple[str, object], ...]:
    """Those attributes that Conv and PivotLinear share, without such as say what is so anyway."""
    found: list[tuple[str, object]] = []
    for name in CONVOLUTION:
        attribute = attributes.get(name)
        if attribute is None:
            continue
        if name == "auto_pad":
            if attribute.as_string() != "NOTSET":
                found.append((name, attribute.as_string()))
        elif any(size != (0 if name == "pads" else 1) for size in attribute.as_ints()):
            found.append((name, tuple(attribute.as_ints())))
    return tuple(found)


def pivot_linear(
    signature: Signature,
    x: ir.Value,
    kept: ir.Value,
    coefficients: ir.Value,
    bias: ir.Value | None = None,
    order: ir.Value | None = None,
    *,
    like: ir.Value,
) -> ir.Node:
    """A PivotLinear node in no graph yet, of a body's name.

    Args:
        signature: Which says what inputs there are.
        x, kept, coefficients, bias, order: See above.
        like: Of the type and shape of the result.
    """
    inputs: list[ir.Value | None] = [x, kept, coefficients, bias, order]
    while inputs[-1] is None:
        inputs.pop()
    made = ir.convenience.convert_attributes(signature.attributes)  # type: ignore[arg-type]
    output = ir.Value(type=like.type, shape=None if like.shape is None else like.shape.copy())
    return ir.Node(DOMAIN, OP, inputs, made, overload=signature.overload, outputs=[output])


def standard_nodes(
    signature: Signature, inputs: Sequence[ir.Value | None], *, sizes: Sequence[int] | None = None
) -> list[ir.Node]:
    """The standard operators that a node of a signature stands for, in no graph yet; the last one makes Y.

    Args:
        signature: Of the node.
        inputs: Of the node; absent ones are None, or left out at the end.
        sizes: Of pivots and others in the column form; None: they are read off the coefficients.
    """
    filled: list[ir.Value | None] = [*inputs, *[None] * (5 - len(inputs))]
    x, kept, coefficients, bias, order = filled
    assert x is not None and kept is not None and coefficients is not None
    write = _Writer(signature)
    if signature.form == "row":
        pivots = write.product(x, kept, whole=True)
        others = write.product(pivots, coefficients)
        y = write.op("Concat", pivots, others, axis=signature.axis)
        if order is not None:
            y = write.op("Gather", y, order, axis=signature.axis)
        write.add(y, bias)
        return write.nodes
    if order is not None:
        x = write.op("Gather", x, order, axis=signature.axis)
    # The axes of the coefficients are the pivots and the others.
    lengths = write.op("Shape", coefficients) if sizes is None else write.ints(*sizes)
    if signature.spatial and sizes is None:
        lengths = write.op("Slice", lengths, write.ints(0), write.ints(2))
    split = ir.Node("", "Split", [x, lengths], [ir.AttrInt64("axis", signature.axis)], num_outputs=2)
    write.nodes.append(split)
    inner = write.op("Add", split.outputs[0], write.product(split.outputs[1], coefficients))
    write.add(write.product(inner, kept, whole=True), bias)
    return write.nodes


def function(signature: Signature) -> ir.Function:
    """The body for a signature."""
    names = ["X", "kept", "coefficients", "bias", "order"]
    present = [True, True, True, signature.bias, signature.order]
    count = len(names) if signature.order else 4 if signature.bias else 3
    values = [ir.Value(name=name) for name in names[:count]]
    nodes = standard_nodes(signature, [value if there else None for value, there in zip(values, present, strict=False)])
    for place, node in enumerate(nodes):
        node.name = f"{node.op_type}_{place}"
        for output in node.outputs:
            output.name = f"v{place}_{output.index()}"
    nodes[-1].outputs[0].name = "Y"
    graph = ir.Graph(values, [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": signature.opset}, name=OP)
    declared = {
        "form": ir.AttributeType.STRING,
        "axis": ir.AttributeType.INT,
        **{name: ir.AttributeType.STRING if name == "auto_pad" else ir.AttributeType.INTS for name in CONVOLUTION},
    }
    written = [ir.Attr(name, declared[name], None) for name in signature.attributes]
    return ir.Function(DOMAIN, OP, signature.overload, graph=graph, attributes=written)


def attach(model: ir.Model) -> int:
    """Give every PivotLinear node of a model its body, and take away those that no node has any more.

    Raises a model's IR version to the first whose functions have overloads, where it is older and has such a node.

    Returns:
        How many bodies there are.

    Raises:
        BadInput: A node's signature does not follow from it, or the model's opset is too old.
    """
    nodes = [node for node in graphs.all_nodes(model) if is_pivot_linear(node)]
    wanted: dict[ir.OperatorIdentifier, ir.Function] = {}
    for node in nodes:
        signature = Signature.of(node, graphs.opset(model))
        node.overload = signature.overload
        if node.op_identifier() not in wanted:
            wanted[node.op_identifier()] = function(signature)
    for key in [key for key in model.functions if key[:2] == (DOMAIN, OP)]:
        del model.functions[key]
    model.functions.update(wanted)
    if nodes:
        model.graph.opset_imports.setdefault(DOMAIN, VERSION)
        for other in model.functions.values():
            if any(is_pivot_linear(node) for node in graphs.nested_nodes(other.graph)):
                other.opset_imports.setdefault(DOMAIN, VERSION)
        model.ir_version = max(model.ir_version, OVERLOADS_SINCE)
    return len(wanted)


def is_pivot_linear(node: ir.Node) -> bool:
    """Whether a node is one of this operator."""
    return node.domain == DOMAIN and node.op_type == OP


class _Writer:
    """Nodes one after the other."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes))
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(numbers, np.int64)))

    def product(self, x: ir.Value, matrix: ir.Value, *, whole: bool = False) -> ir.Value:
        """matrix x, along the channel axis; ``whole``: with the strides and pads of a convolution."""
        if self.signature.spatial:
            return self.op("Conv", x, matrix, **(dict(self.signature.convolution) if whole else {}))
        if self.signature.axis == -2:
            return self.op("MatMul", matrix, x)
        return self.op("MatMul", x, self.op("Transpose", matrix, perm=[1, 0]))

    def add(self, y: ir.Value, bias: ir.Value | None) -> None:
        """A number for each channel."""
        if bias is None:
            return
        behind = self.signature.spatial or (1 if self.signature.axis == -2 else 0)
        if behind:
            bias = self.op("Unsqueeze", bias, self.ints(*range(1, behind + 1)))
        self.op("Add", y, bias)
