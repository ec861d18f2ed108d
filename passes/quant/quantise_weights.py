"""``quantise-weights``: weights of matrix products and convolutions stored as 8- or 4-bit integers with scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from graphopt import graphs
from graphopt.numerics import quantise
from graphopt.rewrite import Context, Explanation, Kind, Pass, Saves, Stage
from graphopt.weights import computed, read

ROOTS = ("MatMul", "Gemm", "Conv")
CODES = {
    (8, True): ir.DataType.INT8,
    (4, True): ir.DataType.INT4,
    (8, False): ir.DataType.UINT8,
    (4, False): ir.DataType.UINT4,
}
# The first opset whose DequantizeLinear gives floats of a type.
SCALE_TYPES = {ir.DataType.FLOAT: 13, ir.DataType.FLOAT16: 19, ir.DataType.BFLOAT16: 19}
NARROW_OPSET = 21
"""The first opset whose DequantizeLinear knows 4-bit codes and blocks."""


class Parameters(BaseModel):
    """How weights are stored.

    Attributes:
        bits: Bits of a code.
        block: Weights along the reduction axis that share a scale; 0: one scale for each output channel. The sizes
            are those that runtimes have kernels for. A convolution always has one scale for each output channel.
        symmetric: Whether codes are signed and have no zero point. TensorRT takes no others.
    """

    model_config = ConfigDict(extra="forbid")

    bits: Literal[4, 8] = 8
    block: Literal[0, 16, 32, 64, 128, 256] = 0
    symmetric: bool = True


@dataclass(frozen=True)
class _Use:
    """A weight of a node: the input that reads it, its axis of output channels and the one that is summed over."""

    index: int
    channels: int
    reduction: int


@dataclass(frozen=True)
class _Stored:
    """The quantised form of a weight: constants that several nodes may read."""

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


class QuantiseWeights(Pass):
    """Stores constant weights as 8- or 4-bit codes, with a DequantizeLinear in front of each node that reads them."""

    name = "quantise-weights"
    kind = Kind.LOSSY
    stage = Stage.QUANTISE
    saves = Saves.BYTES
    explanation = Explanation(
        matches="MatMul, Gemm and Conv with a constant float weight: it is stored as 8-bit codes with a scale for each "
        "output channel, or (MatMul, Gemm; opset 21) as 8- or 4-bit codes with a scale for each block",
        refuses="weights that a caller can override; that something else reads too (a tied embedding would be stored "
        "twice); with NaN or infinity; that blocks do not divide; that would not get smaller. Codes or zero points "
        "that the target does not take; opsets below 13 (8 bits), 19 (float16 weights) or 21 (4 bits, blocks)",
        costs="a DequantizeLinear for each product, which runtimes fuse into it; weights take a quarter (8 bits) or an "
        "eighth (4 bits) of float32. Codes are computed one weight at a time while the model is saved",
        source="ONNX DequantizeLinear (opsets 13, 19, 21); round to nearest, scale from the largest magnitude",
    )
    Parameters: ClassVar[type[BaseModel]] = Parameters

    def apply(self, ctx: Context) -> None:
        users: dict[ir.Value, list[ir.Node]] = {}
        for node in ctx.nodes(*ROOTS):
            weight = _weight_of(node)
            if weight is not None:
                users.setdefault(weight, []).append(node)
        parents = {body: g for g in ctx.graphs() for node in g for body in graphs.subgraphs(node)}
        for weight, nodes in users.items():
            self._quantise(ctx, weight, nodes, parents)

    def _quantise(
        self, ctx: Context, weight: ir.Value, nodes: list[ir.Node], parents: dict[ir.Graph, ir.Graph]
    ) -> None:
        scheme = self._plan(ctx, weight, nodes)
        if isinstance(scheme, str):
            ctx.refuse(nodes[0], f"{weight.name}: {scheme}")
            return
        tensor = graphs.constant_tensor(weight)
        assert tensor is not None
        if not quantise.all_finite(read(tensor)):
            ctx.refuse(nodes[0], f"{weight.name}: holds NaN or infinity")
            return
        quantised = _Quantised(tensor, scheme)
        made: list[_Stored] = []
        for node in nodes:
            assert isinstance(node.graph, ir.Graph)
            visible = next((s for s in made if _is_visible(s.codes, node.graph, parents)), None)
            constants = visible or quantised.constants(ctx, weight.name or "weight")
            if _dequantise_for(ctx, node, weight, constants, scheme) and visible is None:
                made.append(constants)

    def _plan(self, ctx: Context, weight: ir.Value, nodes: list[ir.Node]) -> quantise.Scheme | str:
        """How to quantise a weight, or why not."""
        assert isinstance(self.parameters, Parameters)
        bits, block, symmetric = self.parameters.bits, self.parameters.block, self.parameters.symmetric
        tensor = graphs.constant_tensor(weight)
        if tensor is None:
            return "a caller can override it"
        if tensor.dtype not in SCALE_TYPES:
            return f"DequantizeLinear gives no {tensor.dtype.name}"
        if weight.is_graph_output() or {use.node for use in weight.uses()} != set(nodes):
            others = sorted({use.node.op_type for use in weight.uses()} - set(ROOTS))
            return f"is also read by {', '.join(others) or 'a caller'}: it would be stored twice"
        shape = tuple(tensor.shape.numpy())
        uses = {_use(node, weight, len(shape)) for node in nodes}
        if None in uses:
            return "read in more than one place, or by a node whose axes are not known"
        axes = {(use.channels, use.reduction) for use in uses if use is not None}
        if len(axes) > 1:
            return "its readers sum over different axes"
        channels, reduction = axes.pop()
        if any(node.op_type == "Conv" for node in nodes):
            if bits != 8:
                return "a convolution's weights are stored in 8 bits only"
            block = 0
        refused = ctx.target.refuses_codes(CODES[bits, symmetric], zero_points=not symmetric)
        if refused is not None:
            return refused
        if block and shape[reduction] % block:
            return f"blocks of {block} do not divide its {shape[reduction]} input channels"
        needed = max(SCALE_TYPES[tensor.dtype], NARROW_OPSET if block or bits == 4 else 13)
        if ctx.opset < needed:
            return f"needs opset {needed}, the model has {ctx.opset}: add --set upgrade-opset.version={needed}"
        scheme = quantise.Scheme(bits, reduction if block else channels, block, symmetric)
        # ctx.replace would refuse it too, but only after the weight was read and small codes were computed.
        before, after = tensor.nbytes, _nbytes(scheme, shape, tensor.dtype)
        return scheme if after < before else f"codes and scales take {after} bytes, the weight {before}"


class _Quantised:
    """The quantised form of one weight: tensors that read and quantise it whenever they are read."""

    def __init__(self, weight: ir.TensorProtocol, scheme: quantise.Scheme) -> None:
        self._weight, self._scheme = weight, scheme
        self._code_type = CODES[scheme.bits, scheme.symmetric]
        shape = tuple(weight.shape.numpy())
        scales_shape = scheme.scale_shape(shape)
        self._codes = computed(self._compute_codes, self._code_type, shape)
        self._scales = computed(self._compute_scales, weight.dtype, scales_shape)
        self._zeros = None if scheme.symmetric else computed(self._compute_zeros, self._code_type, scales_shape)

    def constants(self, ctx: Context, name: str) -> _Stored:
        """New constants, in no graph yet. All that come from here hold the same tensors, which a file holds once."""
        return _Stored(
            ctx.constant(self._codes, f"{name}_codes"),
            ctx.constant(self._scales, f"{name}_scales"),
            None if self._zeros is None else ctx.constant(self._zeros, f"{name}_zeros"),
        )

    def _compute_codes(self) -> ir.TensorProtocol:
        weights = read(self._weight)
        scales, zeros = quantise.scales_of(weights, self._scheme)
        return self._coded(quantise.codes_of(weights, scales, zeros, self._scheme))

    def _compute_scales(self) -> ir.TensorProtocol:
        return ir.tensor(quantise.scales_of(read(self._weight), self._scheme)[0])

    def _compute_zeros(self) -> ir.TensorProtocol:
        zeros = quantise.scales_of(read(self._weight), self._scheme)[1]
        assert zeros is not None
        return self._coded(zeros)

    def _coded(self, codes: quantise.Array) -> ir.TensorProtocol:
        if self._code_type.bitwidth == 8:
            return ir.Tensor(codes, dtype=self._code_type)
        return ir.PackedTensor(quantise.pack4(codes), self._code_type, shape=codes.shape)


def _nbytes(scheme: quantise.Scheme, shape: tuple[int, ...], dtype: ir.DataType) -> int:
    def size(of: tuple[int, ...], bits: int) -> int:
        count = 1
        for axis in of:
            count *= axis
        return (count * bits + 7) // 8

    scales = scheme.scale_shape(shape)
    zeros = 0 if scheme.symmetric else size(scales, scheme.bits)
    return size(shape, scheme.bits) + size(scales, dtype.bitwidth) + zeros


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The weight of a product: its constant (or overridable) operand, the second where both are."""
    candidates = (1, 0) if node.op_type == "MatMul" else (1,)
    for index in candidates:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or not (value.is_initializer() or graphs.is_constant(value)):
            continue
        if value.dtype is not None and not value.dtype.is_floating_point():
            continue
        return value
    return None


def _use(node: ir.Node, weight: ir.Value, rank: int) -> _Use | None:
    """The axes of a weight that a node reads, or None where it reads it twice or they are not known."""
    indices = [index for index, value in enumerate(node.inputs) if value is weight]
    if len(indices) != 1 or rank < 2:
        return None
    index = indices[0]
    if node.op_type == "Conv":
        return _Use(index, 0, 1) if index == 1 else None
    if node.op_type == "Gemm":
        flipped = node.attributes.get("transB")
        if index != 1 or (flipped is not None and flipped.is_ref()):
            return None
        return _Use(index, 0, 1) if flipped is not None and flipped.as_int() else _Use(index, 1, 0)
    return _Use(index, rank - 1, rank - 2) if index == 1 else _Use(index, rank - 2, rank - 1)


def _is_visible(value: ir.Value, graph: ir.Graph, parents: dict[ir.Graph, ir.Graph]) -> bool:
    """Whether a constant can be read in ``graph``: it is an initializer of that graph or of one around it."""
    current: ir.Graph | None = graph
    while current is not None:
        if current is value.graph:
            return value.is_initializer()
        current = parents.get(current)
    return False


def _dequantise_for(ctx: Context, node: ir.Node, weight: ir.Value, stored: _Stored, scheme: quantise.Scheme) -> bool:
    """Give a node a DequantizeLinear of its own: runtimes fuse it only with a sole reader."""
    attributes: dict[str, object] = {"axis": scheme.axis}
    if scheme.block:
        attributes["block_size"] = scheme.block
    inputs = [stored.codes, stored.scales] + ([stored.zeros] if stored.zeros is not None else [])
    dequantised = ctx.node("DequantizeLinear", inputs, attributes, like=weight)
    operands = [dequantised.outputs[0] if value is weight else value for value in node.inputs]
    product = ctx.node(node.op_type, operands, node.attributes, like=node.outputs[0])
    rule = f"int{scheme.bits}"
    return ctx.replace({node.outputs[0]: product.outputs[0]}, [dequantised, product], rule=rule)
